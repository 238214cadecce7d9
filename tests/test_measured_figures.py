"""Measured figures in the README are those of the recorded results, and a second test set reproduces them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = [ROOT / "benchmarks" / "results" / f"accuracy-scenes-seed{seed}.json" for seed in (0, 1)]
BUDGETS = (50.0, 25.0, 12.5, 6.0)
README_ROWS = {
    "VisPruner, `important_ratio` 0.5": ("vispruner", 0.5),
    "VisPruner, `important_ratio` 0 (diversity alone)": ("vispruner", 0.0),
    "`cls_attention`": ("cls_attention", None),
    "`uniform_grid`": ("uniform_grid", None),
    "`random` (three draws)": ("random", None),
    "smaller picture, no selection": ("downsample", None),
}


def load(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The rows by what they measure: selector, budget, ratio and position policy."""
    rows = json.loads(path.read_text())["rows"]
    keys = ("selector", "budget_percent", "important_ratio", "position_policy")
    return {tuple(row[key] for key in keys): row for row in rows}


def measured(rows: dict[tuple[Any, ...], dict[str, Any]], selector: str, budget: float, ratio: float | None) -> Any:
    found = [row for (s, b, r, p), row in rows.items() if (s, b, r) == (selector, budget, ratio) and p != "original"]
    assert len(found) == 1, (selector, budget, ratio)
    return found[0]


@pytest.mark.parametrize("name", README_ROWS)
def test_the_readme_table_is_the_recorded_result(name: str) -> None:
    rows, (selector, ratio) = load(RESULTS[0]), README_ROWS[name]
    cells = [f"{measured(rows, selector, budget, ratio)['accuracy']:.1%}".replace("%", " %") for budget in BUDGETS]
    assert f"| {name} | {' | '.join(cells)} |" in (ROOT / "README.md").read_text()


def test_a_second_test_set_reproduces_the_figures_within_their_intervals() -> None:
    first, second = map(load, RESULTS)
    assert first.keys() == second.keys() and len(first) > 50
    apart = [
        key
        for key, row in first.items()
        if row["ci95"][1] < second[key]["ci95"][0] or second[key]["ci95"][1] < row["ci95"][0]
    ]
    assert not apart


def test_the_caches_held_what_the_budgets_say() -> None:
    for rows in map(load, RESULTS):
        for (selector, _, _, _), row in rows.items():
            assert row["kv_visual_tokens"] <= row["visual_token_num"]
            assert selector == "downsample" or row["kv_visual_tokens"] == row["visual_token_num"]
