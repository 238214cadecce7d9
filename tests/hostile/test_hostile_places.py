"""Working folders that somebody prepared: nothing is written through a link, and no folder of others is replaced."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attack import write_yaml
from PIL import Image

import vispruner
from vispruner.conversion import cli, demo, publish
from vispruner.conversion.build import build_repo
from vispruner.conversion.checkpoint_io import CheckpointError, atomic_directory, replacing
from vispruner.conversion.codebook import save_codebook
from vispruner.conversion.hub_access import HubAccess, PublishError
from vispruner.conversion.picture import save_png
from vispruner.conversion.repo_config import load_repo_config

PRECIOUS = "years of work"


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A folder of the user, with a file."""
    folder = tmp_path / "home" / "thesis"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text(PRECIOUS)
    return folder


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that somebody prepared, in which the user works."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def untouched(precious: Path) -> bool:
    names = [path.name for path in precious.iterdir()]
    return names == ["thesis.tex"] and (precious / "thesis.tex").read_text() == PRECIOUS


def write_picture(out: Path) -> None:
    save_png(Image.new("RGB", (4, 4)), out.with_suffix(".png"))


def write_codebook(out: Path) -> None:
    save_codebook(torch.ones(2, 8), out.with_suffix(".safetensors"), {})


@pytest.mark.parametrize("write", [write_picture, write_codebook])
def test_a_file_is_never_written_through_a_link(
    write: Callable[[Path], None], prepared: Path, precious: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix = ".png" if write is write_picture else ".safetensors"
    target = precious / "thesis.tex"
    for name in (f"kept{suffix}", f".kept{suffix}.partial"):
        (prepared / name).symlink_to(target)
    write(prepared / "kept")
    assert untouched(precious)
    assert (prepared / f"kept{suffix}").is_file() and not (prepared / f"kept{suffix}").is_symlink()
    assert len(list(prepared.iterdir())) == 2


def test_a_saved_codebook_replaces_a_link(prepared: Path, precious: Path, tiny_llava_repo: Path) -> None:
    book = save_codebook(torch.ones(2, 64), prepared / "book.safetensors", {})
    model = vispruner.load(tiny_llava_repo, method="codebook", codebook=str(book), visual_token_num=8)
    saved = prepared / "saved"
    saved.mkdir()
    for name in ("book.safetensors", ".book.safetensors.partial"):
        (saved / name).symlink_to(precious / "thesis.tex")
    model.save_pretrained(saved)
    assert untouched(precious)
    assert (saved / "book.safetensors").read_bytes() == book.read_bytes()


def test_temporary_files_have_names_that_nobody_can_foresee(prepared: Path) -> None:
    names = set()
    for _ in range(3):
        with replacing(prepared / "file") as unfinished:
            unfinished.write_text("x")
            names.add(unfinished.parent.name)
            assert unfinished.parent.stat().st_mode & 0o077 == 0
    assert len(names) == 3
    assert os.listdir(prepared) == ["file"]


# The demo, and all that replaces a folder


def claim_repo(prepared: Path, precious: Path) -> None:
    (prepared / "vispruner-demo").mkdir()
    (prepared / "vispruner-demo" / "repo").symlink_to(precious)
    (prepared / "vispruner-demo" / "demo.json").write_text(json.dumps({"made_by": demo.MADE_BY}))


def claim_whole(prepared: Path, precious: Path) -> None:
    (precious.parent / "demo.json").write_text(json.dumps({"made_by": demo.MADE_BY}))
    precious.rename(precious.parent / "repo")
    (prepared / "vispruner-demo").symlink_to(precious.parent)


def claim_folder(prepared: Path, precious: Path) -> None:
    (prepared / "vispruner-demo").mkdir()
    shutil.copytree(precious, prepared / "vispruner-demo" / "repo")
    (prepared / "vispruner-demo" / "demo.json").write_text(json.dumps({"made_by": demo.MADE_BY}))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (claim_repo, "repo is a link, through which nothing is replaced"),
        (claim_whole, "vispruner-demo is a link, through which nothing is replaced"),
        (claim_folder, "holds files that no demo wrote"),
    ],
)
def test_a_demo_replaces_only_what_a_demo_wrote(
    prepare: Callable[[Path, Path], None],
    message: str,
    prepared: Path,
    precious: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare(prepared, precious)
    assert cli.main(["demo"]) == 2
    assert message in capsys.readouterr().err
    theses = [path for path in prepared.parent.rglob("thesis.tex") if path.read_text() == PRECIOUS]
    assert len(theses) == (2 if prepare is claim_folder else 1)


def test_the_figures_of_a_demo_replace_a_link(prepared: Path, precious: Path) -> None:
    folder = prepared / "vispruner-demo"
    folder.mkdir()
    mine = {"made_by": demo.MADE_BY}
    (precious / "thesis.tex").write_text(json.dumps(mine))
    (folder / "demo.json").symlink_to(precious / "thesis.tex")
    demo._claim_folder(folder)
    assert json.loads((precious / "thesis.tex").read_text()) == mine
    assert not (folder / "demo.json").is_symlink()


@pytest.mark.parametrize("where", ["linked", "linked/inner"])
def test_overwriting_goes_through_no_link(
    where: str, prepared: Path, precious: Path, tiny_llava_repo: Path, tmp_path: Path
) -> None:
    shutil.copytree(precious, precious.parent / "outer" / "inner")
    (prepared / "linked").symlink_to(precious if where == "linked" else precious.parent / "outer")
    for give in (Path(where), prepared / where):
        with pytest.raises(CheckpointError, match="is a link, through which nothing is replaced: give the folder it"):
            build_repo(write_yaml(tmp_path), give, base=tiny_llava_repo, thin=False, overwrite=True)
    assert untouched(precious) and untouched(precious.parent / "outer" / "inner")


def test_a_new_folder_may_lie_behind_a_link(prepared: Path, precious: Path) -> None:
    (prepared / "linked").symlink_to(precious)
    with atomic_directory(Path("linked/new")) as work:
        (work / "file").touch()
    assert (precious / "new" / "file").exists()


def test_a_link_with_the_name_of_a_left_over_is_not_followed(prepared: Path, precious: Path) -> None:
    (prepared / ".out.incomplete-0123abcd").symlink_to(precious)
    with atomic_directory(prepared / "out") as work:
        (work / "file").touch()
    assert untouched(precious)


def with_a_thesis(folder: Path) -> None:
    (folder / "thesis.tex").write_text(PRECIOUS)


def with_a_folder(folder: Path) -> None:
    (folder / "chapters").mkdir()


def with_a_link(folder: Path) -> None:
    (folder / "vocab.txt").symlink_to("/etc/hosts")


@pytest.mark.parametrize("add", [with_a_thesis, with_a_folder, with_a_link])
def test_upload_replaces_a_build_and_nothing_that_was_added_to_it(
    add: Callable[[Path], None], good_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*arguments: Any, **options: Any) -> None:
        pytest.fail("it was built over somebody's files")

    monkeypatch.setattr(publish, "build_repo", build)
    folder = Path(shutil.copytree(good_repo, tmp_path / "out" / "pruned"))
    add(folder)
    job = publish.PublishJob(HubAccess(), load_repo_config(write_yaml(tmp_path)))
    with pytest.raises(PublishError, match="holds something else: give another folder as --out"):
        job.build(tmp_path / "out", thin=None, base=None)
