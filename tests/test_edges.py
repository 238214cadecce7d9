"""Bad input at the edges: what the commands say of it, in one or two lines, and that nothing of it is left behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vispruner
from vispruner.conversion import codebook, picture
from vispruner.conversion.checkpoint_io import CheckpointError, replacing
from vispruner.conversion.cli import main
from vispruner.conversion.hub_access import ExitCode, PublishError, explain
from vispruner.conversion.publish import publish

CONFIG = """\
repo_id: someone/tiny
base_model: embedded/tiny-llava
architecture: llava
vispruner_config: {visual_token_num: 16}
"""


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused, and return what it says."""

    def run(*arguments: str | Path) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        text = capsys.readouterr().err
        (line,) = [line for line in text.splitlines() if line.startswith("vispruner: error: ")]
        assert "[Errno" not in line and "Traceback" not in text
        return line.removeprefix("vispruner: error: ")

    return run


# Outputs are looked at before long work


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the output was not looked at before the model was loaded")

    for module in (codebook, picture):
        monkeypatch.setattr(module, "load_model", refuse)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("command", "suffix"), [("codebook", ".safetensors"), ("show", ".png")])
def test_an_output_that_cannot_be_written_is_refused_before_long_work(
    command: str, suffix: str, photo: Image.Image, tmp_path: Path, said: Callable[..., str]
) -> None:
    photo.save(tmp_path / "photo.png")
    (tmp_path / f"folder{suffix}").mkdir()
    for out, complaint in (
        ("k.txt", f"must be written to a {suffix} file, got"),
        (f"none/k{suffix}", "does not exist: make"),
        (f"folder{suffix}", "is a folder"),
    ):
        assert complaint in said(command, tmp_path / "photo.png", "--out", tmp_path / out)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("command", ["codebook", "show"])
def test_a_picture_that_is_not_there_is_named(command: str, tmp_path: Path, said: Callable[..., str]) -> None:
    out = tmp_path / ("k.png" if command == "show" else "k.safetensors")
    assert f"{tmp_path}/no.jpg: give the path of a picture" in said(command, tmp_path / "no.jpg", "--out", out)
    address = "https://example.org/cat.jpg"
    assert f"{address} is an address" in said(command, address, "--out", out)


def test_a_demo_names_a_picture_that_is_not_there(tmp_path: Path, said: Callable[..., str]) -> None:
    assert "give the path of a picture" in said("demo", "--image", tmp_path / "no.jpg", "--out", tmp_path / "demo")
    assert "is an address" in said("demo", "--image", "https://example.org/cat.jpg", "--out", tmp_path / "demo")
    assert not list(tmp_path.iterdir())


# A disk that is full, a name that is taken


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_with_the_path_and_leaves_the_old_file(number: int, tmp_path: Path) -> None:
    (tmp_path / "kept.png").write_text("old")
    with (
        pytest.raises(CheckpointError, match=f"no space left to write {tmp_path}/kept.png"),
        replacing(tmp_path / "kept.png"),
    ):
        raise OSError(number, os.strerror(number))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("kept.png", "old")]


def test_no_message_names_a_file_of_the_way_there(tmp_path: Path) -> None:
    (tmp_path / "kept.png" / "full").mkdir(parents=True)
    with (
        pytest.raises(CheckpointError, match=f"cannot write {tmp_path}/kept.png: "),
        replacing(tmp_path / "kept.png") as unfinished,
    ):
        unfinished.write_text("new")


# Messages


def test_verify_of_a_wrong_path_says_little_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "wrong")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "wrong is not a folder: give one that `vispruner build` wrote" in lines[0]
    assert lines[1].startswith("refused: ") and "not run" in lines[1]


def test_a_build_into_a_full_folder_names_the_option(tmp_path: Path, said: Callable[..., str]) -> None:
    (tmp_path / "notes.txt").touch()
    assert "give --overwrite" in said("build", "tiny-llava-vispruner", "--out", tmp_path)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("folder", "is a folder: give the YAML file in it"),
        ("empty.yaml", "must hold the fields repo_id, base_model, architecture, vispruner_config, it is empty"),
    ],
)
def test_a_config_that_holds_nothing(given: str, complaint: str, tmp_path: Path, said: Callable[..., str]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.yaml").touch()
    assert complaint in said("build", tmp_path / given, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "meant"),
    [
        (("repo_id", "repo_ids"), "repo_id"),
        (("visual_token_num", "visual_token_nums"), "visual_token_num"),
        (("visual_token_num: 16", "visual_token_num: 16, method: vispuner"), "vispruner"),
        (("architecture: llava", "architecture: lava"), "llava"),
    ],
)
def test_a_mistyped_name_is_answered_by_the_one_that_was_meant(
    change: tuple[str, str], meant: str, tmp_path: Path, said: Callable[..., str]
) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(CONFIG.replace(*change))
    assert f"did you mean {meant}?" in said("build", config, "--out", tmp_path / "out")


@pytest.mark.parametrize("name", ["tiny-lava-vispruner", "tiny-lava-vispruner.yaml"])
def test_a_mistyped_config_is_answered_by_the_one_that_was_meant(
    name: str, tmp_path: Path, said: Callable[..., str]
) -> None:
    line = said("build", name, "--out", tmp_path / "out")
    assert line.endswith("did you mean tiny-llava-vispruner?") and "qwen" not in line


def test_a_suggested_command_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.yaml").write_text(CONFIG)
    assert main(["build", str(tmp_path / "my.yaml"), "--out", str(tmp_path / "my repo")]) == 0
    assert capsys.readouterr().out.strip().endswith(f"vispruner verify '{tmp_path}/my repo'")


@pytest.mark.parametrize("name", ["/no/where", "./no/where", "no/where/else"])
def test_load_says_that_a_folder_is_not_there(name: str) -> None:
    with pytest.raises(OSError, match=f"^{name} does not exist: give a checkpoint folder or a Hub id"):
        vispruner.load(name, visual_token_num=4)


def test_only_an_upload_says_what_is_not_sent_twice() -> None:
    for uploading in (False, True):
        found = explain(ConnectionError("no route"), "someone/repo", "https://hub", uploading=uploading)
        assert found is not None and found.exit_code == ExitCode.CONNECTION_LOST
        assert ("not sent twice" in str(found)) == uploading
        assert "run the same command again" in str(found)


@pytest.mark.parametrize("name", ["bad name..", "refs/heads/x", "0123456", "-x"])
def test_a_branch_that_git_would_not_take_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(CONFIG)
    with pytest.raises(PublishError, match=r"--revision '.*' is no good branch name") as refused:
        publish([tmp_path / "my.yaml"], revision=name, out=tmp_path / "out")
    assert refused.value.exit_code == ExitCode.BAD_INPUT
    assert not (tmp_path / "out").exists()
