"""Compare methods in the language model with those behind the encoder at equal KV cache, operations and time.

Nothing is measured here: accuracies are those of results/accuracy-decoder-seed{0,1}.json, about drawn scenes, and of
results/photos-decoder-seed{0,1}.json and photos-seed{0,1}.json, times those of results/latency-methods-decoder-*.json,
operations those of flops.py. For each method in the language model and each budget at which its accuracy was recorded,
the other method gets the budget that costs as much, and its accuracy there:

equal cache   the same budget, which is the mean of the decoder layers for both
equal FLOPs   the budget with as many operations until the first token, for the model whose accuracy it is, one image
              and as many text tokens as the test questions have on average with their template, choosing and ranking
              included; of SparseVLM, all words behind the image rate
equal time    the budget with which the first token comes as soon: time as a share of stock's, interpolated between the
              recorded budgets and stock. The model timed is wider, since the small models' own times are those of
              Python, and has four decoder layers, too, so that every method prunes before the same ones. Times whose
              runs spread by more than 15 % are left out: a busy machine tells nothing

The accuracy at a budget between recorded ones is interpolated, too, linearly in tokens. Nothing is extrapolated, and
no method's options were chosen by these test sets. Accuracies are means of both; a difference stands in bold where it
is larger than its 95 % interval, taken as of independent questions. `--json results/equal-cost.json` writes what the
documentation's comparison page shows.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from flops import IN_LAYERS, OURS, first_token_flops, stage_flops
from geometry import load_geometry, patches_of
from outputs import output_file
from records import RESULTS, write_record
from tables_and_plots import markdown_table
from transformers import LlavaConfig

from vispruner.conversion.checkpoint_io import read_json
from vispruner.conversion.repo_config import ASSETS
from vispruner.selectors import DECODER_METHODS, SELECTORS

STEADY = 1.15
AGAINST = ("vispruner", "divprune")
EQUAL = ("KV cache", "FLOPs", "time")

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Asked:
    """Questions of one kind, in two test sets, and the model that answered them.

    records      stems of the records of a test set
    text_tokens  of a question with its template, on average
    budgets      of methods in the language model, in percent, at which others are compared with them
    """

    name: str
    records: tuple[str, ...]
    model: Path
    text_tokens: int
    budgets: tuple[float, ...]

    def recorded(self, seed: int) -> list[dict[str, Any]]:
        return [read_json(RESULTS / f"{stem}-seed{seed}.json") for stem in self.records]


SCENES = Asked("scenes", ("accuracy-decoder",), ASSETS / "tiny-llava", 14, (50.0, 37.5))
PHOTOGRAPHS = Asked(
    "photographs",
    ("photos-decoder", "photos"),
    ASSETS / "photo-llava",
    13,
    (50.0, 37.5, 33.33),
)


def accuracies(asked: Asked = SCENES) -> dict[str, dict[float, float]]:
    """Return by method and percent of the tokens the share of right answers, over both test sets."""
    of_seeds = []
    for seed in (0, 1):
        rows = [row for record in asked.recorded(seed) for row in record["rows"]]
        plain = [
            row
            for row in rows
            if row["important_ratio"] in (None, 0.5)
            and row["position_policy"] != "original"
            and not {"encoder_stage", "attention_layer"} & row.keys()
        ]
        of_seeds.append({(row["selector"], row["budget_percent"]): row["accuracy"] for row in plain})
    by_method: dict[str, dict[float, float]] = {}
    for method, percent in of_seeds[0]:
        by_method.setdefault(method, {})[percent] = sum(rows[method, percent] for rows in of_seeds) / 2
    return by_method


def questions(asked: Asked = SCENES) -> int:
    """Return how many questions both test sets have."""
    return sum(asked.recorded(seed)[0]["questions"] for seed in (0, 1))


def operations(method: str, percent: float, asked: Asked = SCENES) -> float:
    """Return the operations until the first token with this share of the tokens, any share, of the small model."""
    config = _geometry(asked.model)
    budget = patches_of(config) * percent / 100

    def of(tokens: int) -> int:
        return first_token_flops(stage_flops(config, OURS, tokens, text_tokens=asked.text_tokens, method=method))

    low, high = math.floor(budget), math.ceil(budget)
    return of(low) + (of(high) - of(low)) * (budget - low)


@cache
def _geometry(model: Path) -> LlavaConfig:
    return load_geometry(str(model))


def speed_record() -> dict[str, Any] | None:
    """Return the record of latency.py, where there is one."""
    paths = sorted(RESULTS.glob("latency-methods-decoder-*.json"))
    return read_json(paths[0]) if paths else None


def times(record: Mapping[str, Any] | None) -> dict[str, dict[float, float]]:
    """Return by method and percent of the tokens the time until the first token, as a share of stock's."""
    found: dict[str, dict[float, float]] = {}
    if record is None:
        return found
    (setting,) = record["settings"]
    full = setting["rows"][0]["visual_token_num"]
    steady = (row for row in setting["rows"][1:] if is_steady(row["ratio_to_stock"]["ttft"]))
    for row in steady:
        percent = 100 * row["visual_token_num"] / full
        found.setdefault(row["method"], {100.0: 1.0})[percent] = 1 / row["ratio_to_stock"]["ttft"]["median"]
    return found


def is_steady(ratio: Mapping[str, float]) -> bool:
    """Whether the runs of a row are near enough to each other to be set against those of another."""
    return ratio["high"] <= STEADY * ratio["low"]


def interpolated(points: Points, at: float) -> float | None:
    """Return the value at `at` between points (x, y); None outside of them."""
    points = sorted(points)
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return None


def budget_of_equal_operations(method: str, percent: float, other: str, asked: Asked = SCENES) -> float:
    """Return the percent of the tokens with which `other` has as many operations as `method` with `percent`."""
    wanted, low, high = operations(method, percent, asked), 1.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if operations(other, middle, asked) < wanted else (low, middle)
    return (low + high) / 2


def budget_of_equal_time(method: str, percent: float, other: str, by_method: Mapping[str, dict]) -> float | None:
    """As above, of time; 100 where even the whole prompt comes sooner, None below the recorded budgets."""
    taken = by_method.get(method, {}).get(percent)
    if taken is None:
        return None
    if taken >= 1:
        return 100.0
    return interpolated([(share, budget) for budget, share in by_method.get(other, {}).items()], taken)


def comparisons(against: Sequence[str] = AGAINST) -> list[dict[str, Any]]:
    """Return every comparison, for the page of the documentation that is sorted and filtered in the browser.

    asked                        what about: "scenes" or "photographs"
    percent, right               the share of the tokens that `method` keeps, and of its answers that are right
    equal                        what costs as much: "KV cache", "FLOPs" or "time"
    other_percent, other_right   the same of the method `against`; None where that was not recorded
    interval                     half of the 95 % interval of the difference
    """
    return [row for asked in (SCENES, PHOTOGRAPHS) for row in _comparisons_of(asked, against)]


def _comparisons_of(asked: Asked, against: Sequence[str]) -> list[dict[str, Any]]:
    right, count, by_time = accuracies(asked), questions(asked), times(speed_record())
    found = []
    for percent, method, other in itertools.product(asked.budgets, _compared(right), against):
        own = right[method][percent]
        for equal, budget in zip(EQUAL, _budgets(method, percent, other, by_time, asked), strict=True):
            reached = None if budget is None else interpolated(list(right[other].items()), budget)
            row = {"asked": asked.name, "method": method, "percent": percent, "right": own}
            row |= {"against": other, "equal": equal}
            row |= {"other_percent": None if reached is None else budget, "other_right": reached}
            found.append(row | {"interval": None if reached is None else _interval(own, reached, count)})
    return found


def _compared(right: Mapping[str, Any]) -> list[str]:
    return [name for name in DECODER_METHODS if name in right and name in IN_LAYERS]


def _budgets(method: str, percent: float, other: str, by_time: Mapping[str, dict], asked: Asked) -> list[float | None]:
    """Return the budgets of `other` that cost as much, in the order of `EQUAL`."""
    operations = budget_of_equal_operations(method, percent, other, asked)
    return [percent, operations, budget_of_equal_time(method, percent, other, by_time)]


def table(asked: Asked = SCENES, against: Sequence[str] = AGAINST) -> str:
    """Return the comparison as Markdown: what the other method gains, in points, and its budget in percent."""
    right, count, by_time = accuracies(asked), questions(asked), times(speed_record())
    columns = [name for other in against for name in (f"`{other}` at equal cache", "FLOPs", "time")]
    lines = []
    for percent, method in itertools.product(asked.budgets, _compared(right)):
        own, cells = right[method][percent], []
        for other in against:
            budgets = _budgets(method, percent, other, by_time, asked)
            cells += [_gain(own, list(right[other].items()), budget, count) for budget in budgets]
        lines.append([f"`{method}`", f"{percent:g} %", f"{100 * own:.1f}", *cells])
    return markdown_table(["method", "tokens", "right", *columns], lines)


def _gain(own: float, points: Points, budget: float | None, questions: int) -> str:
    """Return what another method gains at `budget`, in points; bold where that is more than its interval."""
    other = None if budget is None else interpolated(points, budget)
    if other is None or budget is None:
        return "not recorded"
    text = f"{100 * (other - own):+.1f}"
    return f"{f'**{text}**' if abs(other - own) > _interval(own, other, questions) else text} ({budget:.0f} %)"


def _interval(own: float, other: float, questions: int) -> float:
    """Return half of the 95 % interval of a difference."""
    return 1.96 * math.sqrt((own * (1 - own) + other * (1 - other)) / questions)


def time_table(record: Mapping[str, Any]) -> str:
    """Return how long the first token, the whole answer and the cache are, as Markdown."""
    (setting,) = record["settings"]
    lines = []
    for row in setting["rows"]:
        ratios = [row["ratio_to_stock"][name] for name in ("ttft", "e2e")]
        cells = [f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" for ratio in ratios]
        name = {None: "stock", "downsample": "smaller picture, no selection"}.get(row["method"], f"`{row['method']}`")
        lines.append([row["visual_token_num"], name, *cells, f"{row['kv_bytes'] / 2**20:.1f}"])
    columns = "tokens|method|first token, x (low to high)|whole answer, x (low to high)|KV MiB"
    return markdown_table(columns, lines)


def loss_table() -> str:
    """Return what each kind of the compared methods gives up, as Markdown, by what they declare."""
    columns = "method|an encoded image holds|paged engines|a second question on the same cache|Qwen-VL"
    lines = [
        ["all behind the encoder", "what is left", "yes", "sees the same tokens", "yes, where [CLS] is not needed"]
    ]
    kinds: dict[tuple[bool, bool], list[str]] = {}
    right = accuracies()
    for method in (name for name in DECODER_METHODS if name in right):
        place = SELECTORS[method].place
        assert place is not None
        asks = place.ranking in ("last_row", "rater_rows", "level_rater_rows") or "text" in SELECTORS[method].needs
        kinds.setdefault((asks, place.positions == "renumber"), []).append(method)
    for (asks, renumbers), methods in sorted(kinds.items(), reverse=True):
        second = "sees what the first one left" if asks else "sees the same tokens"
        lines.append([_names(methods), "all tokens", "no", second, "no" if renumbers else "yes"])
    return markdown_table(columns, lines)


def _names(methods: Sequence[str]) -> str:
    return ", ".join(f"`{method}`" for method in methods)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare methods at equal cost, from the records.")
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE", help="write all comparisons here, too")
    options = parser.parse_args(arguments)
    if options.json is not None:
        write_record(options.json, {"rows": comparisons()})
    record = speed_record()
    timed = [] if record is None else [time_table(record)]
    print(table(), *timed, loss_table(), table(PHOTOGRAPHS), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
