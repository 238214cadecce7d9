"""Say how much of a choice of tokens is decided by rounding, and whether answers change with it.

The embedded model on a real tower answers the questions about photographs of benchmarks/accuracy.py in float64, which
rounds half a billion times finer than float32, and then in float32 and bfloat16. Processors, devices and attention
kernels round otherwise in one type, too.

in common   share of the tokens kept in float64 that are kept in this type, too; the mean over the pictures
same        share of the questions that have the same answer as in float64
right       share of the questions that are answered right, with Wilson's interval at 95 %
none        drops nothing: what the rest of the model's rounding does to answers

Examples:
  python benchmarks/rounding.py --questions 40                 # a first look
  python benchmarks/rounding.py --json out.json                # the recorded run, half an hour on a slow core
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from accuracy import (
    BATCH,
    DENSE,
    PHOTO_CODEBOOK,
    PHOTO_CONFIG,
    PHOTOS,
    PublishedModel,
    Sample,
    Variant,
    interval,
    one_run_of_the_tower,
    published_repo,
    questions,
)
from outputs import output_file
from records import versions, write_record
from tables_and_plots import markdown_table

from vispruner import SELECTORS
from vispruner.conversion.questions import is_right

EXACT = "float64"
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
# What `vispruner` keeps is of two halves: rows of each alone say which of them rounding moves.
PARTS = {1.0: "vispruner, important alone", 0.5: "vispruner", 0.0: "vispruner, diverse alone"}
METHODS = ("visionzip", "divprune", "scope")
FULL = 576  # visual tokens of the embedded model
# Within the language model a layer's budget is another one, and what is drawn by a seed does not ask the arithmetic.
MEASURABLE = sorted(
    name
    for name, selector in SELECTORS.items()
    if name != "vispruner" and not selector.in_decoder and "seed" not in selector.options
)


def variants(budgets: Sequence[int], methods: Sequence[str]) -> dict[str, Variant]:
    """Return by name what is asked: nothing dropped, the parts of VisPruner, and further methods."""
    rows = {DENSE: Variant(DENSE, 100.0, FULL)}
    for budget in budgets:
        share = 100 * budget / FULL
        rows |= {f"{name}, {budget}": Variant("vispruner", share, budget, part) for part, name in PARTS.items()}
        rows |= {f"{name}, {budget}": Variant(name, share, budget) for name in methods}
    return rows


def answered(
    repo: Path, dtype: torch.dtype, samples: Sequence[Sample], rows: Mapping[str, Variant], progress: tqdm
) -> dict[str, tuple[list[str], list[set[int]]]]:
    """Return by row the answers, and the numbers of the kept tokens, to each question, in one type."""
    published = PublishedModel(repo, PHOTO_CODEBOOK)
    published.model.to(dtype)
    new_tokens = published.longest_answer(sample.answer for sample in samples)
    found: dict[str, tuple[list[str], list[set[int]]]] = {name: ([], []) for name in rows}
    for start in range(0, len(samples), BATCH):
        batch = samples[start : start + BATCH]
        inputs = published.inputs(batch)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        with one_run_of_the_tower(published):
            for name, row in rows.items():
                answers = published.answer(inputs, row.options(0, 0), row.visual_token_num, new_tokens)
                found[name][0].extend(answers.texts)
                if answers.kept is not None:
                    found[name][1].extend(map(set, answers.kept.tolist()))
                progress.update(len(batch))
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    samples = questions(PHOTOS, args.seed, args.questions)
    pictures = np.array([sample.picture for sample in samples])
    firsts = [number for number, sample in enumerate(samples) if sample.first]
    rows, result = variants(args.budgets, args.methods), []
    total = len(DTYPES) * len(rows) * len(samples)
    with published_repo(None, PHOTO_CONFIG) as repo, tqdm(total=total, unit="answer") as progress:
        of_types = {name: answered(repo, dtype, samples, rows, progress) for name, dtype in DTYPES.items()}
    for name, row in rows.items():
        exact_texts, exact_kept = of_types[EXACT][name]
        for dtype, of_rows in of_types.items():
            texts, kept = of_rows[name]
            right = np.array([is_right(text, s.answer) for text, s in zip(texts, samples, strict=True)], dtype=float)
            same = np.mean([text == exact for text, exact in zip(texts, exact_texts, strict=True)])
            common = [len(kept[n] & exact_kept[n]) / row.visual_token_num for n in firsts] if kept else None
            result.append(
                {"row": name, "method": row.selector, "visual_token_num": row.visual_token_num}
                | {"important_ratio": row.important_ratio, "dtype": dtype}
                | {"in_common": None if common is None else round(float(np.mean(common)), 4)}
                | {"in_common_least": None if common is None else round(min(common), 4)}
                | {"same_answers": round(float(same), 4), "right": round(float(right.mean()), 4)}
                | {"interval": interval(right, pictures)}
            )
    settings = {"questions": len(samples), "pictures": len(firsts), "seed": args.seed}
    return {
        "settings": settings,
        "versions": versions(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "rows": result,
    }


def markdown(record: Mapping[str, Any]) -> str:
    """Return the table of the documentation."""
    by_row: dict[str, dict[str, Any]] = {}
    for row in record["rows"]:
        by_row.setdefault(row["row"], {})[row["dtype"]] = row
    types = [name for name in DTYPES if name != EXACT]
    lines = []
    for name, found in by_row.items():
        exact = found[EXACT]
        if exact["in_common"] is None:
            shares = ["" for _ in types]
        else:
            shares = [f"{found[t]['in_common']:.0%} ({found[t]['in_common_least']:.0%})" for t in types]
        rights = [f"{found[t]['right']:.1%}" for t in DTYPES]
        lines.append([name, *shares, *(f"{found[t]['same_answers']:.0%}" for t in types), " / ".join(rights)])
    heads = [f"in common, {t}" for t in types] + [f"same answers, {t}" for t in types]
    return markdown_table(["tokens kept by", *heads, "right, " + " / ".join(DTYPES)], lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 32], help="tokens kept (default 128 32)")
    parser.add_argument(
        "--methods",
        nargs="*",
        default=list(METHODS),
        metavar="NAME",
        help=f"beside vispruner (default {' '.join(METHODS)})",
    )
    parser.add_argument(
        "--questions", type=int, default=168, help="of the test set (default 168, about 16 photographs)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which test set (default 0)")
    parser.add_argument("--json", type=output_file(".json"), help="write all figures here")
    args = parser.parse_args(arguments)
    if args.questions < 1 or min(args.budgets) < 2 or max(args.budgets) >= FULL:
        parser.error(f"--questions must be at least 1, and --budgets from 2 to {FULL - 1}")
    if args.seed < 0:
        parser.error(f"--seed must be at least 0, got {args.seed}")
    if wrong := [name for name in args.methods if name not in MEASURABLE]:
        parser.error(
            f"--methods has {wrong[0]!r}: give some of {', '.join(MEASURABLE)}; vispruner is always asked, "
            "and methods in the language model, pairs and random draws cannot be"
        )
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    try:
        record = measure(args)
    except ValueError as error:  # of a package that is missing, and what the model refuses
        raise SystemExit(f"rounding.py: {error}") from error
    print(markdown(record))
    if args.json:
        write_record(args.json, record)


if __name__ == "__main__":
    main(sys.argv[1:])
