"""The tables of the documentation's comparison page, as HTML made from the records in results/.

docs/hooks.py puts them into docs/compare.md where it says `<!-- comparison: NAME -->`, and docs/comparison.js makes
them sortable and filterable. Nothing but the standard library, since the documentation is built without the package.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from records import RESULTS

from vispruner.conversion.checkpoint_io import read_json

# By the name of a test set, the records about it: each method is in at least one of them.
TEST_SETS = {
    "scenes 0": ("accuracy-scenes-seed0", "accuracy-methods-seed0", "accuracy-decoder-seed0"),
    "scenes 1": ("accuracy-scenes-seed1", "accuracy-methods-seed1", "accuracy-decoder-seed1"),
    "easy-VQA": ("accuracy-easy-vqa-seed0", "accuracy-methods-easy-vqa-seed0"),
    "photographs 0": ("photos-seed0", "photos-methods-seed0", "photos-decoder-seed0", "photos-options-seed0"),
    "photographs 1": ("photos-seed1", "photos-methods-seed1", "photos-decoder-seed1", "photos-options-seed1"),
}
# By type of question; "hard" are those that the smaller picture of as many tokens gets wrong, of any type.
TYPES = ("color", "shape", "digit", "exist", "count", "where", "relation")
PHOTO_TYPES = ("what", "attribute", "compare", "read", "photograph", "tilt")
HARD = "hard"
NAMES = {"none": "all tokens", "downsample": "smaller picture, no selection", "no-image": "no picture"}
# What the script is to do with a column: choose rows by it, or show one column of a group.
FILTER, GROUP = "filter", "group"


def accuracy_rows() -> list[list[str]]:
    """Return the cells of every recorded accuracy; with all tokens only those of the unpruned model.

    What several records have measured of the same questions is shown once, as the first of them has it.
    """
    rows: dict[tuple[str, ...], list[str]] = {}
    for test_set, stems in TEST_SETS.items():
        for stem in stems:
            for row in read_json(RESULTS / f"{stem}.json")["rows"]:
                if row["budget_percent"] < 100 or row["selector"] == "none":
                    cells = method, place, _, questions, budget, *_ = _accuracy_row(test_set, row)
                    rows.setdefault((method, place, test_set, questions, budget), cells)
    return list(rows.values())


def _accuracy_row(test_set: str, row: Mapping[str, Any]) -> list[str]:
    by_type = {**row["accuracy_by_type"], **({HARD: row["accuracy_hard"]} if "accuracy_hard" in row else {})}
    low, high = row["ci95"]
    return [
        _method(row),
        _place(row),
        test_set,
        f"{row['n']:,}",
        f"{row['budget_percent']:g} %",
        f"{row['kv_visual_tokens']:g}",
        f"{100 * row['accuracy']:.1f}",
        *(f"{100 * by_type[name]:.1f}" if name in by_type else "" for name in (*TYPES, *PHOTO_TYPES, HARD)),
        f"{50 * (high - low):.1f}",
    ]


def _method(row: Mapping[str, Any]) -> str:
    name = NAMES.get(row["selector"], row["selector"])
    parts = [name, *([] if row["important_ratio"] is None else [f"ratio {row['important_ratio']}"])]
    if "encoder_stage" in row:
        layer, share = row["encoder_stage"]
        parts.append(f"{share:.0%} behind encoder layer {layer}")
    if "attention_layer" in row:
        parts.append(f"ranked in encoder layer {row['attention_layer']}")
    return ", ".join([*parts, *(["positions kept"] if row["position_policy"] == "original" else [])])


def _place(row: Mapping[str, Any]) -> str:
    """A record gives no policy of positions where tokens leave in the language model, or none leave."""
    if row["selector"] in NAMES:
        return "nowhere"
    if "+" in row["selector"]:
        return "in both"
    return "behind the encoder" if row["position_policy"] is not None else "in the language model"


def accuracy_table() -> str:
    columns = {
        "method": FILTER,
        "prunes": FILTER,
        "test set": FILTER,
        "questions": "",
        "kept": FILTER,
        "tokens": "",
        "right, %": "",
        **dict.fromkeys((*TYPES, *PHOTO_TYPES, HARD), GROUP),
        "±": "",
    }
    return _table("accuracy", columns, accuracy_rows(), "question type")


def equal_cost_rows() -> list[list[str]]:
    """Return the cells of every comparison at equal cost; a gain beyond its interval ends in a star."""
    rows = []
    for row in read_json(RESULTS / "equal-cost.json")["rows"]:
        cells = [row["asked"], row["method"], f"{row['percent']:g} %", f"{100 * row['right']:.1f}"]
        cells += [row["against"], row["equal"]]
        if row["other_right"] is None:
            rows.append([*cells, "not recorded", "", "", ""])
            continue
        gain = row["other_right"] - row["right"]
        star = " *" if abs(gain) > row["interval"] else ""
        other = [f"{row['other_percent']:.0f} %", f"{100 * row['other_right']:.1f}", f"{100 * gain:+.1f}{star}"]
        rows.append([*cells, *other, f"{100 * row['interval']:.1f}"])
    return rows


def equal_cost_table() -> str:
    columns = {
        "questions about": FILTER,
        "method": FILTER,
        "kept": FILTER,
        "right, %": "",
        "against": FILTER,
        "at equal": FILTER,
        "it keeps": "",
        "it has right, %": "",
        "its gain, points": "",
        "±": "",
    }
    return _table("equal cost", columns, equal_cost_rows())


TABLES = {"accuracy": accuracy_table, "equal cost": equal_cost_table}


def _table(name: str, columns: Mapping[str, str], rows: Sequence[Sequence[str]], group: str = "") -> str:
    """Return one line of HTML, which Markdown leaves alone."""
    heads = "".join(
        f"<th{f' data-{use}' if use else ''}>{html.escape(column)}</th>" for column, use in columns.items()
    )
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    called = f' data-comparison="{html.escape(name)}"' + (f' data-group-name="{html.escape(group)}"' if group else "")
    return f"<table{called}><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
