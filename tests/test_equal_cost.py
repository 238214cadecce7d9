"""Methods at equal cache, operations and time: what is compared with what, and that the README shows it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from documents import DOCUMENTS

ROOT = Path(__file__).parent.parent
NUMBERS = ("right", "other_percent", "other_right", "interval")


@pytest.fixture(scope="module")
def equal_cost() -> ModuleType:
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("equal_cost")


def test_nothing_is_extrapolated(equal_cost: ModuleType) -> None:
    points = [(100.0, 4.0), (50.0, 2.0), (37.5, 1.0)]
    assert equal_cost.interpolated(points, 75.0) == 3.0 and equal_cost.interpolated(points, 37.5) == 1.0
    assert equal_cost.interpolated(points, 37.0) is None and equal_cost.interpolated(points, 101.0) is None


@pytest.mark.core
@pytest.mark.parametrize("percent", [50.0, 37.5])
@pytest.mark.parametrize("method", ["fastv", "visiondrop"])
def test_the_budget_of_equal_operations_has_as_many(equal_cost: ModuleType, method: str, percent: float) -> None:
    for other in equal_cost.AGAINST:
        budget = equal_cost.budget_of_equal_operations(method, percent, other)
        wanted = equal_cost.operations(method, percent)
        assert equal_cost.operations(other, budget) == pytest.approx(wanted, rel=1e-6)
    assert equal_cost.budget_of_equal_operations("vispruner", percent, "vispruner") == pytest.approx(percent)


def test_a_method_slower_than_the_whole_prompt_is_compared_with_the_whole_prompt(equal_cost: ModuleType) -> None:
    by_method = {"slow": {50.0: 1.2}, "fast": {50.0: 0.5}, "even": {50.0: 0.75}, "other": {100.0: 1.0, 50.0: 0.6}}
    names = ("slow", "fast", "even", "never timed")
    budgets = [equal_cost.budget_of_equal_time(name, 50.0, "other", by_method) for name in names]
    assert budgets == [100.0, None, pytest.approx(68.75), None]


def test_times_that_spread_too_far_are_left_out(equal_cost: ModuleType) -> None:
    rows = [
        {
            "visual_token_num": count,
            "method": method,
            "ratio_to_stock": {"ttft": {"median": 2.0, "low": 1.9, "high": high}},
        }
        for count, method, high in [(100, None, 2.0), (50, "steady", 2.1), (50, "busy", 2.3)]
    ]
    assert equal_cost.times({"settings": [{"rows": rows}]}) == {"steady": {100.0: 1.0, 50.0: 0.5}}


def test_a_gain_is_bold_where_it_is_larger_than_its_interval(equal_cost: ModuleType) -> None:
    points = [(50.0, 0.95), (100.0, 0.99)]
    assert equal_cost._gain(0.90, points, 50.0, 1500) == "**+5.0** (50 %)"
    assert equal_cost._gain(0.94, points, 50.0, 1500) == "+1.0 (50 %)"
    assert equal_cost._gain(0.98, points, 75.0, 1500) == "-1.0 (75 %)"
    assert equal_cost._gain(0.98, points, None, 1500) == "not recorded"


@pytest.mark.core
def test_the_record_of_the_comparison_page_is_what_the_other_records_give(equal_cost: ModuleType) -> None:
    stored = json.loads((equal_cost.RESULTS / "equal-cost.json").read_text())["rows"]
    found = equal_cost.comparisons()
    unmeasured = dict.fromkeys(NUMBERS)
    assert [row | unmeasured for row in stored] == [row | unmeasured for row in found]
    for name in NUMBERS:
        assert [row[name] for row in stored] == pytest.approx([row[name] for row in found])


def test_the_recorded_run_timed_equal_caches(equal_cost: ModuleType) -> None:
    (setting,) = equal_cost.speed_record()["settings"]
    stock, *rows = setting["rows"]
    assert len(equal_cost.speed_record()["load_average"]) == 3
    per_token = stock["kv_bytes"] / sum(stock["kv_length"] - 576 + held for held in stock["held_by_layer"])
    by_budget: dict[int, list[int]] = {}
    for row in rows:
        assert len(row["held_by_layer"]) == 4 and len(row["seconds"]["ttft"]["runs"]) >= 3
        if row["method"] != "downsample":
            by_budget.setdefault(row["visual_token_num"], []).append(row["kv_bytes"])
    assert list(by_budget) == [288, 216]
    for sizes in by_budget.values():
        assert len(sizes) == 8  # vispruner, divprune and six in the language model
        assert max(sizes) - min(sizes) <= 4 * 3 * per_token  # whole tokens in whole layers miss a mean by less


@pytest.mark.core
def test_the_readme_s_tables_at_equal_cost_are_what_the_command_prints(equal_cost: ModuleType) -> None:
    assert "python benchmarks/equal_cost.py" in DOCUMENTS
    record = equal_cost.speed_record()
    tables = [equal_cost.table(), *([equal_cost.time_table(record)] if record else []), equal_cost.loss_table()]
    assert [table for table in tables if table not in DOCUMENTS] == []


def test_what_the_readme_says_of_equal_cost_is_what_the_records_say(equal_cost: ModuleType) -> None:
    """Who is ahead at which budget: by more than the interval, where it says so."""
    right, count = equal_cost.accuracies(), equal_cost.questions()

    def ahead(other: str, method: str, percent: float, budget: float | None = None) -> bool:
        budget = percent if budget is None else budget
        points = list(right[other].items())
        return equal_cost._gain(right[method][percent], points, budget, count).startswith("**+")

    asking = ("fastv", "pyramiddrop", "sparsevlm", "sparsevlm_v1")
    assert all(ahead("divprune", method, percent) for method in asking for percent in (50.0, 37.5))
    assert {method for method in asking if ahead("vispruner", method, 37.5)} == {*asking} - {"pyramiddrop"}
    assert not any(ahead("vispruner", method, 50.0) for method in asking)
    fair = equal_cost.budget_of_equal_operations("pyramiddrop", 37.5, "vispruner")
    assert ahead("vispruner", "pyramiddrop", 37.5, fair)
    assert all(right[method][50.0] <= max(right[name][50.0] for name in asking) for method in ("visiondrop", "dart"))


def test_the_costs_that_the_readme_names_are_those_counted(equal_cost: ModuleType) -> None:
    ratios = {
        method: [
            equal_cost.operations(method, percent) / equal_cost.operations("vispruner", percent)
            for percent in (50.0, 37.5)
        ]
        for method in ("fastv", "dart", "sparsevlm", "sparsevlm_v1", "pyramiddrop", "visiondrop")
    }
    for method, found in ratios.items():
        low, high = (1.075, 1.105) if method in ("pyramiddrop", "visiondrop") else (1.005, 1.02)
        assert all(low <= ratio <= high for ratio in found), (method, found)
