"""The benchmark of stages within the encoder: what it times keeps what it says, on miniatures of every geometry."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from matrix import ROWS

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RECORD = BENCHMARKS / "results" / "encoder-stage.json"
sys.path.insert(0, str(BENCHMARKS))


@pytest.fixture(scope="module")
def stage_times() -> Any:
    return pytest.importorskip("encoder_stage")


@pytest.mark.parametrize(
    "name", ["gemma3", "internvl", "llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm"]
)
def test_every_row_keeps_what_it_says(
    stage_times: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    released = stage_times.RELEASED
    fields = ROWS[name].config().to_dict()
    if name == "llava_onevision":  # its row has no pictures of 3 x 3 tiles and of a quarter of that
        side = fields["vision_config"]["image_size"]
        fields["image_grid_pinpoints"] = [[rows * side, columns * side] for rows in (1, 2, 3) for columns in (1, 2, 3)]
        fields["vision_aspect_ratio"] = "anyres_max_9"
    monkeypatch.setitem(released, "miniature", (name, fields))
    monkeypatch.setattr(sys.modules["vispruner.conversion.ceilings"], "PIXELS", 140)
    file = tmp_path / "record.json"
    options = ["--models", "miniature", "--depth-divisor", "1", "--rounds", "2", "--threads", "1"]
    assert stage_times.main([*options, "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    (model,) = record["models"]
    rows = model["rows"]
    full = rows["dense"]["visual_tokens"]
    assert rows["pruned"]["visual_tokens"] < 0.35 * full
    assert ("smaller" in rows) == (name not in ("llava", "gemma3"))
    if "smaller" in rows:
        assert rows["smaller"]["visual_tokens"] <= (0.51 if name == "llava_onevision" else 0.4) * full
    assert ("staged" in rows) == (name != "llava_onevision")
    if "staged" in rows:
        assert rows["staged"]["visual_tokens"] == rows["pruned"]["visual_tokens"]
        assert 1 < rows["pruned"]["ceiling"] < rows["staged"]["ceiling"]
    for row in rows.values():
        assert len(row["seconds"]["runs"]) == 2 and row["seconds"]["low"] > 0
    assert set(rows["dense"]["ratio_to_dense"]["runs"]) == {1.0}
    shown = capsys.readouterr().out
    assert shown.startswith("| model | encoder |") and "| miniature |" in shown


def test_what_cannot_be_meant_is_refused(stage_times: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for asked, said in (
        (["--rounds", "0"], "must be at least 1"),
        (["--add-to", "record.json"], "say by --json where the whole record is to be written"),
        (["--models", "llava-1.5-7b", "llava-1.5-7b"], "--models has llava-1.5-7b twice"),
    ):
        with pytest.raises(SystemExit):
            stage_times.parse_arguments(asked)
        assert said in capsys.readouterr().err


def test_costs_of_other_layers_are_refused(stage_times: Any) -> None:
    """The record of photographs has stages behind one layer, half of its tower, which the table would call a third."""
    record = Path(__file__).parent.parent / "benchmarks" / "results" / "photos-seed0.json"
    with pytest.raises(SystemExit, match=r"--costs: the record of photos, seed 0, .* behind the layers \[5\]"):
        stage_times.main(["--costs", str(record)])


def test_a_record_grows_by_further_models(stage_times: Any) -> None:
    record = json.loads(RECORD.read_text())
    further = {**record, "date": "now", "models": [{**record["models"][0], "model": "qwen2-vl-7b"}]}
    grown = stage_times.with_models_of(record, further)
    assert grown["models"] == [*record["models"], *further["models"]]
    assert grown["date"] == record["date"] and grown["further_runs"][-1]["models"] == ["qwen2-vl-7b"]
    assert stage_times.table(grown).startswith(stage_times.table(record))


@pytest.mark.parametrize(
    ("change", "asked", "said"),
    [
        ({}, ["llava-1.5-7b"], "it has llava-1.5-7b already: give other --models"),
        ({"depth_divisor": 3}, ["qwen2-vl-7b"], "it is of another run: it differs in depth_divisor"),
        ({"models": None}, ["qwen2-vl-7b"], "it is no record of encoder_stage.py, which has models"),
    ],
)
def test_a_record_that_cannot_grow_is_refused_before_anything_is_timed(
    stage_times: Any, change: dict, asked: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {**json.loads(RECORD.read_text()), **change}
    content = {name: value for name, value in record.items() if value is not None}
    (earlier := tmp_path / "earlier.json").write_text(json.dumps(content))
    monkeypatch.setattr(stage_times, "measure", lambda *_: pytest.fail("it timed"))
    monkeypatch.setattr(stage_times.torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(stage_times.torch, "get_num_threads", lambda: record["threads"])
    with pytest.raises(SystemExit, match=f"--add-to .*{said}"):
        stage_times.main(["--models", *asked, "--add-to", str(earlier), "--json", str(tmp_path / "grown.json")])
