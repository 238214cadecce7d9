"""Ask what it changes that more tokens fall per round of duplicate removal where an image has more than 2,047.

The paper's step of 8 was chosen for 576 tokens. `dedup_step: null` keeps it up to 2,047 and takes 16, 24 ... for more.
The embedded toy LLaVA answers the questions of benchmarks/accuracy.py about pictures enlarged to grids of that many
patches; its tower interpolates the position embeddings it was trained with. It never saw pictures of that size, and
answers worse than at its own 12 x 12 patches, whatever is dropped: look at the differences between the steps only.

right            share of the questions, with Wilson's interval at 95 %
only one right   questions that were answered right under the one step and not under 8
objects          share of the objects that keep a patch: this needs no language model
in common        share of the tokens kept with step 8 that are kept with this step, too

Examples:
  python benchmarks/dedup_step.py --pictures 2 --grids 46            # a first look
  python benchmarks/dedup_step.py --pictures 36 --json out.json      # the recorded run, four minutes on one thread
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from accuracy import PublishedModel, Sample, interval, patches_of, published_repo, questions
from outputs import output_file
from records import write_record
from tables_and_plots import markdown_table

from vispruner.conversion.questions import is_right
from vispruner.duplicate_removal import default_step

PAPER = 8


def asked(pictures: int, seed: int) -> list[Sample]:
    """Return all questions about the first pictures of a test set."""
    many = questions("scenes", seed, 100 * pictures)
    return list(takewhile(lambda sample: sample.picture < pictures, many))


def steps_for(grid: int) -> list[int]:
    """Return the paper's step and those around the default one for this many patches."""
    default = default_step(grid**2)
    return sorted({PAPER, default, 4 * default})


def answers(
    published: PublishedModel, samples: Sequence[Sample], grid: int, kept: int, step: int, progress: tqdm
) -> dict[str, Any]:
    """Answer all questions with one step, a picture encoded once; note what was right, and which tokens were kept."""
    new_tokens = published.longest_answer(sample.answer for sample in samples)
    model = published.model
    model.set_vispruner_config(method="vispruner", visual_token_num=kept, dedup_step=step)
    right: list[bool] = []
    stays: dict[int, set[int]] = {}
    for picture, group in groupby(samples, key=lambda sample: sample.picture):
        batch = list(group)
        inputs = published.inputs(batch, grid)
        pixels, prompt = inputs.pop("pixel_values")[:1], inputs["input_ids"].shape[1]
        with torch.no_grad(), published._recorded_selections() as selections, published._any_picture_size():
            images = model.encode_images(pixels)[[0] * len(batch)]
            output = model.generate(**inputs, encoded_images=images, max_new_tokens=new_tokens, do_sample=False)
        ((chosen, _),) = selections
        if set(images.kept_counts) != {kept} or chosen.shape != (1, kept):
            raise SystemExit(f"{images.kept_counts} of picture {picture}'s tokens were kept, where {kept} are right")
        texts = published.processor.tokenizer.batch_decode(output[:, prompt:], skip_special_tokens=True)
        right += [is_right(text, sample.answer) for text, sample in zip(texts, batch, strict=True)]
        stays[picture] = set(chosen[0].tolist())
        progress.update(len(batch))
    return {"right": right, "kept": stays}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    samples = asked(args.pictures, args.seed)
    boxes = {sample.picture: sample.boxes or () for sample in samples}
    pictures = np.array([sample.picture for sample in samples])
    rows = []
    settings = [(grid, kept) for grid in args.grids for kept in args.kept]
    runs = sum(len(steps_for(grid)) for grid, _ in settings) * len(samples)
    with published_repo(None) as repo, tqdm(total=runs, desc="answers", unit="answer") as progress:
        published = PublishedModel(repo)
        for grid, kept in settings:
            of_steps = {step: answers(published, samples, grid, kept, step, progress) for step in steps_for(grid)}
            paper = of_steps[PAPER]
            for step, found in of_steps.items():
                right = np.array(found["right"], dtype=float)
                differs = right - np.array(paper["right"], dtype=float)
                seen = [bool(found["kept"][number] & patches_of(b, grid)) for number in boxes for b in boxes[number]]
                common = [len(found["kept"][number] & paper["kept"][number]) / kept for number in boxes]
                rows.append(
                    {"tokens": grid**2, "kept": kept, "dedup_step": step, "default": step == default_step(grid**2)}
                    | {"right": round(float(right.mean()), 4), "interval": interval(right, pictures)}
                    | {"only_this_right": int((differs > 0).sum()), "only_8_right": int((differs < 0).sum())}
                    | {"objects": round(float(np.mean(seen)), 4), "in_common": round(float(np.mean(common)), 4)}
                )
    return rows


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    print("tokens  kept  step  right (interval)        only one right  objects  in common with step 8")
    for row in rows:
        low, high = row["interval"]
        print(
            f"{row['tokens']:6d} {row['kept']:5d} {row['dedup_step']:5d}{'*' if row['default'] else ' '} "
            f"{row['right']:.1%} ({low:.1%} to {high:.1%})  {row['only_this_right']:4d} / {row['only_8_right']:<4d} "
            f"{row['objects']:12.1%} {row['in_common']:10.1%}"
        )
    print("* the default for so many tokens")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of the documentation: the default step beside the paper's."""
    columns = "tokens|kept|step|right|only this right / only 8|objects with a token|tokens in common with 8"
    lines = []
    for row in rows:
        if row["default"] or row["dedup_step"] == PAPER:
            name = f"{row['dedup_step']}, the default" if row["default"] else str(row["dedup_step"])
            one = "" if row["dedup_step"] == PAPER else f"{row['only_this_right']} / {row['only_8_right']}"
            shares = [f"{row['objects']:.0%}", f"{row['in_common']:.0%}"]
            lines.append([f"{row['tokens']:,}", row["kept"], name, f"{row['right']:.1%}", one, *shares])
    return markdown_table(columns, lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", type=int, nargs="+", default=[48], help="patches a side (default 48)")
    parser.add_argument("--kept", type=int, nargs="+", default=[36, 144, 576], help="tokens kept (default 36 144 576)")
    parser.add_argument("--pictures", type=int, default=24, help="with all their questions (default 24)")
    parser.add_argument("--seed", type=int, default=0, help="which test set (default 0)")
    parser.add_argument("--json", type=output_file(".json"), help="write all figures here")
    args = parser.parse_args(arguments)
    if args.pictures < 1 or min(args.kept) < 1 or max(args.kept) >= min(args.grids) ** 2:
        parser.error("--pictures and --kept must be at least 1, and --kept less than the patches of the smallest grid")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(1)
    rows = measure(args)
    print_table(rows)
    if args.json:
        settings = {"pictures": args.pictures, "questions": len(asked(args.pictures, args.seed)), "seed": args.seed}
        write_record(args.json, {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
