"""The benchmark of stages within the encoder: what it times keeps what it says, on miniatures of every geometry."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from matrix import ROWS

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))


@pytest.fixture(scope="module")
def stage_times() -> Any:
    return pytest.importorskip("encoder_stage")


@pytest.mark.parametrize("name", ["gemma3", "internvl", "llava", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
def test_every_row_keeps_what_it_says(
    stage_times: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    released = stage_times.RELEASED
    monkeypatch.setitem(released, "miniature", (name, ROWS[name].config().to_dict()))
    monkeypatch.setattr(sys.modules["vispruner.conversion.ceilings"], "PIXELS", 140)
    file = tmp_path / "record.json"
    options = ["--models", "miniature", "--depth-divisor", "1", "--rounds", "2", "--threads", "1"]
    assert stage_times.main([*options, "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    (model,) = record["models"]
    rows = model["rows"]
    full = rows["dense"]["visual_tokens"]
    assert rows["pruned"]["visual_tokens"] == rows["staged"]["visual_tokens"] < 0.35 * full
    assert ("smaller" in rows) == (name not in ("llava", "gemma3"))
    if "smaller" in rows:
        assert rows["smaller"]["visual_tokens"] <= 0.4 * full
    assert 1 < rows["pruned"]["ceiling"] < rows["staged"]["ceiling"]
    for row in rows.values():
        assert len(row["seconds"]["runs"]) == 2 and row["seconds"]["low"] > 0
    assert set(rows["dense"]["ratio_to_dense"]["runs"]) == {1.0}
    shown = capsys.readouterr().out
    assert shown.startswith("| model | encoder |") and "| miniature |" in shown


def test_a_wrong_number_is_refused(stage_times: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        stage_times.parse_arguments(["--rounds", "0"])
    assert "must be at least 1" in capsys.readouterr().err


def test_costs_of_other_layers_are_refused(stage_times: Any) -> None:
    """The record of photographs has stages behind one layer, half of its tower, which the table would call a third."""
    record = Path(__file__).parent.parent / "benchmarks" / "results" / "photos-seed0.json"
    with pytest.raises(SystemExit, match=r"--costs: the record of photos, seed 0, .* behind the layers \[5\]"):
        stage_times.main(["--costs", str(record)])
