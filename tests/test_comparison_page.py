"""The comparison page: its figures are those of the records, and in a browser it sorts and filters them."""

from __future__ import annotations

import importlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from browser import open_page

from vispruner.selectors import DECODER_METHODS, SELECTORS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def comparison() -> ModuleType:
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("comparison")


class Table(HTMLParser):
    """The cells of one table, heading first."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.rows[-1][-1] += data


def rows_of(text: str) -> list[dict[str, str]]:
    heads, *rows = Table(text).rows
    return [dict(zip(heads, row, strict=True)) for row in rows]


def recorded(stem: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / f"{stem}.json").read_text())["rows"]


def test_every_recorded_accuracy_is_on_the_page_as_it_is_on_record(comparison: ModuleType) -> None:
    shown = rows_of(comparison.accuracy_table())
    stems = [stem for of_set in comparison.TEST_SETS.values() for stem in of_set]
    assert set(stems) == {path.stem for kind in ("accuracy", "photos") for path in RESULTS.glob(f"{kind}-*.json")}
    named = ("selector", "budget_percent", "important_ratio", "position_policy", "n")
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for test_set, of_set in comparison.TEST_SETS.items():
        for row in (row for stem in of_set for row in recorded(stem)):
            if row["budget_percent"] < 100 or row["selector"] == "none":
                measured = (row[name] for name in named)
                key = (test_set, *measured, str(row.get("encoder_stage")), row.get("attention_layer"))
                found.setdefault(key, row)  # what two records have measured of the same questions is shown once
    expected = list(found.values())
    assert len(shown) == len(expected) > 600
    names = {"all tokens": "none", "smaller picture": "downsample", "no picture": "no-image"}
    for cells, row in zip(shown, expected, strict=True):
        name = cells["method"].partition(",")[0]
        assert names.get(name, name) == row["selector"]
        assert ("behind encoder layer" in cells["method"]) == ("encoder_stage" in row)
        assert ("ranked in encoder layer" in cells["method"]) == ("attention_layer" in row)
        assert float(cells["right, %"]) == pytest.approx(100 * row["accuracy"], abs=0.051)
        assert float(cells["kept"].removesuffix(" %")) == row["budget_percent"]
        assert int(cells["questions"].replace(",", "")) == row["n"]
        assert float(cells["±"]) == pytest.approx(50 * (row["ci95"][1] - row["ci95"][0]), abs=0.051)
        types = (*comparison.TYPES, *comparison.PHOTO_TYPES, comparison.HARD)
        by_type = {name: float(cells[name]) for name in types if cells[name]}
        of_types = {**row["accuracy_by_type"], **({"hard": row["accuracy_hard"]} if "accuracy_hard" in row else {})}
        assert by_type == pytest.approx({name: 100 * share for name, share in of_types.items()}, abs=0.051)
        assert (cells["prunes"] == "in the language model") == (row["selector"] in DECODER_METHODS)
        assert (cells["prunes"] == "in both") == ("+" in row["selector"])
        assert (cells["prunes"] == "behind the encoder") == (
            row["selector"] in SELECTORS.keys() - set(DECODER_METHODS)
        )


def test_every_comparison_at_equal_cost_is_on_the_page(comparison: ModuleType) -> None:
    shown, expected = rows_of(comparison.equal_cost_table()), recorded("equal-cost")
    assert len(shown) == len(expected) > 120
    for cells, row in zip(shown, expected, strict=True):
        said = ("questions about", "method", "against", "at equal")
        assert [cells[name] for name in said] == [row[name] for name in ("asked", "method", "against", "equal")]
        assert float(cells["right, %"]) == pytest.approx(100 * row["right"], abs=0.051)
        if row["other_right"] is None:
            assert (cells["it keeps"], cells["its gain, points"]) == ("not recorded", "")
            continue
        gain = 100 * (row["other_right"] - row["right"])
        assert float(cells["its gain, points"].removesuffix(" *")) == pytest.approx(gain, abs=0.051)
        assert cells["its gain, points"].endswith("*") == (abs(gain) > 100 * row["interval"])


def test_the_page_asks_for_each_table_once(comparison: ModuleType) -> None:
    page = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    assert re.findall(r"<!-- comparison: ([\w ]+) -->", page) == list(comparison.TABLES)
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "extra_javascript: [comparison.js]" in menu


@pytest.mark.browser
def test_it_sorts_and_filters_in_chromium(comparison: ModuleType, tmp_path: Path) -> None:
    script = (ROOT / "docs" / "comparison.js").read_text(encoding="utf-8")
    tables = "".join(f"<div>{table()}</div>" for table in comparison.TABLES.values())
    (tmp_path / "page.html").write_text(f"<meta charset=utf-8>{tables}<script>{script}</script>", encoding="utf-8")
    with open_page((tmp_path / "page.html").as_uri()) as (page, _):

        def seen(name: str) -> list[dict[str, str]]:
            cells = "[...r.cells].filter(c => !c.hidden).map(c => c.textContent)"
            read = f"t => [...t.rows].filter(r => !r.hidden).map(r => {cells})"
            heads, *rows = page.locator(f"table[data-comparison='{name}']").evaluate(read)
            return [dict(zip(heads, row, strict=True)) for row in rows]

        every = rows_of(comparison.accuracy_table())
        assert seen("accuracy") == every
        accuracy = page.locator("div").first
        accuracy.get_by_label("test set", exact=True).select_option("photographs 1")
        assert {"photograph", "hard"} <= seen("accuracy")[0].keys() and "color" not in seen("accuracy")[0]
        accuracy.get_by_label("question type", exact=True).select_option("photograph")
        assert "photograph" in seen("accuracy")[0] and "hard" not in seen("accuracy")[0]
        accuracy.get_by_label("test set", exact=True).select_option("scenes 0")
        types = accuracy.get_by_label("question type", exact=True)
        assert types.input_value() == "" and "color" in seen("accuracy")[0], "scenes have no photographs"
        accuracy.get_by_label("kept", exact=True).select_option("12.5 %")
        asked = {"photograph", "hard", "what", "attribute", "compare", "read", "tilt"}
        chosen = [row for row in every if (row["test set"], row["kept"]) == ("scenes 0", "12.5 %")]
        chosen = [{name: cell for name, cell in row.items() if name not in asked} for row in chosen]
        assert seen("accuracy") == chosen and 10 < len(chosen) < len(every)
        assert f"{len(chosen)} of {len(every)} rows" in accuracy.inner_text()

        accuracy.locator("th", has_text="right, %").click()
        shares = [float(row["right, %"]) for row in seen("accuracy")]
        assert shares == sorted((float(row["right, %"]) for row in chosen), reverse=True)
        accuracy.locator("th", has_text="right, %").click()
        assert [float(row["right, %"]) for row in seen("accuracy")] == sorted(shares)
        accuracy.locator("th", has_text="method").click()
        names = [row["method"] for row in seen("accuracy")]
        assert names[0] == min(names, key=str.casefold) and sorted(names) == sorted(row["method"] for row in chosen)
        for key, expected in (("Enter", sorted(shares, reverse=True)), ("Space", sorted(shares))):
            accuracy.locator("th", has_text="right, %").press(key)  # a reader without a mouse
            assert [float(row["right, %"]) for row in seen("accuracy")] == expected
        assert page.evaluate("document.activeElement.textContent") == "right, %", "the tab key comes there"

        accuracy.get_by_label("question type", exact=True).select_option("count")
        counted = seen("accuracy")
        assert "count" in counted[0] and "color" not in counted[0]
        assert [float(row["count"]) for row in counted] == sorted(
            (float(row["count"]) for row in chosen), reverse=True
        )
        accuracy.get_by_label("test set", exact=True).select_option("easy-VQA")  # asks nothing to be counted
        accuracy.get_by_label("kept", exact=True).select_option("12.5 %")
        assert types.input_value() == "" and "count" not in seen("accuracy")[0] and "color" in seen("accuracy")[0]

        equal = page.locator("div").nth(1)
        equal.get_by_label("at equal", exact=True).select_option("time")
        equal.get_by_label("against", exact=True).select_option("divprune")
        equal.get_by_label("questions about", exact=True).select_option("photographs")
        about = {"asked": "photographs", "equal": "time", "against": "divprune"}
        wanted = [row for row in recorded("equal-cost") if row.items() >= about.items()]
        assert [row["method"] for row in seen("equal cost")] == [row["method"] for row in wanted]
