"""What is said of rounding is what was measured, and the benchmark asks the same questions in every type."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from documents import DOCUMENTS

for needed in ("sklearn", "easy_vqa"):
    pytest.importorskip(needed, reason="the benchmarks need `pip install 'vispruner[benchmarks]'`")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import accuracy  # noqa: E402
import photos  # noqa: E402
import rounding  # noqa: E402

RECORD = json.loads((BENCHMARKS / "results" / "rounding.json").read_text(encoding="utf-8"))


def test_the_table_is_the_recorded_one() -> None:
    assert rounding.markdown(RECORD) in DOCUMENTS
    settings = RECORD["settings"]
    assert f"{settings['questions']} questions about {settings['pictures']} photographs" in DOCUMENTS


def test_what_is_said_of_it_is_recorded() -> None:
    rows = {(row["row"], row["dtype"]): row for row in RECORD["rows"]}
    others = [f"{name}, {budget}" for name in rounding.METHODS for budget in (128, 32)]
    for name in (*others, "vispruner, important alone, 128", "vispruner, important alone, 32"):
        assert rows[name, "float32"]["in_common"] == rows[name, "float32"]["same_answers"] == 1
    assert 0.74 < rows["vispruner, 32", "float32"]["in_common"] < 0.76
    assert 0.55 < rows["vispruner, 32", "float32"]["in_common_least"] < 0.6
    lost = {name: 1 - rows[name, "bfloat16"]["in_common"] for name in others}
    assert all(round(100 * lost[f"divprune, {budget}"]) in (13, 14) for budget in (128, 32))
    assert all(0.02 < lost[f"{name}, {budget}"] < 0.065 for name in ("visionzip", "scope") for budget in (128, 32))
    alone = [rows[f"vispruner, important alone, {budget}", "bfloat16"]["in_common"] for budget in (128, 32)]
    assert [round(share, 2) for share in alone] == [0.99, 0.99]
    halves = [abs(end - row["right"]) for row in rows.values() for end in row["interval"]]
    assert min(halves) > 0.0695 and max(halves) < 0.095
    ours = [
        rows[f"vispruner, {budget}", dtype]["same_answers"]
        for budget in (128, 32)
        for dtype in ("float32", "bfloat16")
    ]
    assert [round(share, 2) for share in ours] == [0.9, 0.82, 0.8, 0.76]
    theirs = [rows[name, "bfloat16"]["same_answers"] for name in others]
    assert (round(min(theirs), 2), round(max(theirs), 2)) == (0.86, 0.99)
    moved = {key: abs(row["right"] - rows[key[0], "float64"]["right"]) for key, row in rows.items()}
    assert max(share for (name, _), share in moved.items() if name in ("vispruner, 128", "vispruner, 32")) <= 0.0245
    assert max(moved.values()) <= 0.0605
    assert [round(100 * moved[f"vispruner, {budget}", "float32"], 1) for budget in (128, 32)] == [0.6, 2.4]


@pytest.mark.slow
@pytest.mark.photo
def test_one_photograph_is_asked_about_in_every_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "DTYPES", {"float64": torch.float64, "float32": torch.float32})
    out = tmp_path / "out.json"
    rounding.main(["--questions", "3", "--budgets", "64", "--methods", "divprune", "--json", str(out)])
    record = json.loads(out.read_text(encoding="utf-8"))
    rows = {(row["row"], row["dtype"]): row for row in record["rows"]}
    assert record["settings"] == {"questions": 3, "pictures": 1, "seed": 0} and len(rows) == 10
    for row in rows.values():
        exact = row["dtype"] == "float64"
        assert (row["in_common"] is None) == (row["method"] == "none")
        assert not exact or (row["same_answers"] == 1 and row["in_common"] in (None, 1))
    # Half of the tokens are those that [CLS] attends to most in any type.
    assert rows["vispruner, important alone, 64", "float32"]["in_common"] >= 0.98
    assert rows["vispruner, 64", "float32"]["in_common"] >= 0.49


def test_a_budget_that_keeps_all_or_halves_to_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for budget in ("1", "576"):
        with pytest.raises(SystemExit):
            rounding.parse(["--budgets", budget])
        assert "--budgets from 2 to 575" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nothing", "none", "vispruner", "random", "fastv", "vispruner+fastv"])
def test_a_method_that_cannot_be_measured_is_refused_by_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rounding.parse(["--methods", "scope", name])
    assert f"--methods has {name!r}: give some of adts, " in capsys.readouterr().err


def test_a_negative_seed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rounding.parse(["--seed", "-1"])
    assert "--seed must be at least 0, got -1" in capsys.readouterr().err


@pytest.mark.parametrize("script", [accuracy, rounding], ids=lambda script: script.__name__)
def test_what_is_not_installed_is_named_in_one_line(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(photos, "find_spec", lambda name: None)
    monkeypatch.setattr(photos, "_photograph", photos._photograph.__wrapped__)  # another test may have read them
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # of other tests in this process, too
    try:
        ended: object = script.main(["--dataset", "photos"] if script is accuracy else [])
    except SystemExit as error:
        ended = error.code
    said = f"{ended} {capsys.readouterr().err}"
    # The tower's package is asked for before the photographs' where it is missing as well, in its own words.
    named = rf'{script.__name__}\.py: [^\n]*\b[\w-]+ is not installed: pip install "vispruner\[photo\]"'
    assert ended != 0 and re.search(named, said)
