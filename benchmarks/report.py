"""Write a page of test pictures on which the kept patches are drawn, with every answer marked right or wrong.

They are drawn scenes, or with --dataset photos photographs with things and words on them, asked of the real tower.

One row per selector, one column per budget, one block per scene; above them, how many of these few questions each
selector got right. The page is a single file without scripts and links: it opens offline. What is drawn is what
`generate` itself selected while it answered (the model runs as in accuracy.py). Pruning selectors get renumbered
positions; a random one draws anew for every question, and the patches of the first are shown. To compare selectors,
use accuracy.py: a few scenes prove nothing.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from accuracy import (
    DENSE,
    DOWNSAMPLE,
    EMBEDDED,
    PHOTO_BUDGETS,
    PHOTOS,
    BenchmarkError,
    PublishedModel,
    Sample,
    Variant,
    label,
    published_repo,
    questions,
    variants,
)
from outputs import output_file
from records import write_text

from vispruner.conversion.questions import is_right

BUDGETS = (50.0, 25.0, 12.5, 6.0)
RATIOS = (0.0, 0.5)
SCENES = 6
MOST_QUESTIONS = 20  # more than any scene has
SMALL_IMAGE = 128  # whose pixels are part of what it shows


@dataclass(frozen=True)
class Cell:
    """One scene under one variant: its answers, the patches that stayed and those of them that did for attention."""

    variant: Variant
    answers: list[str]
    kept: frozenset[int]
    important: frozenset[int]


def scene_samples(seed: int, scenes: int, dataset: str = "scenes") -> list[list[Sample]]:
    """Return the questions of the first scenes, or photographs, of a test set, one by one."""
    asked = questions(dataset, seed, scenes * MOST_QUESTIONS)
    return [[sample for sample in asked if sample.picture == number] for number in range(scenes)]


def shown_variants(
    published: PublishedModel, selectors: Sequence[str] | None, budgets: Sequence[float]
) -> list[Variant]:
    """Return what the page compares: every selector once per budget, the one with a ratio at 0 and 0.5."""
    registry = published.selectors
    known = [*registry, DOWNSAMPLE]
    chosen = known if selectors is None else list(selectors)
    if unknown := [name for name in chosen if name not in known]:
        raise BenchmarkError(f"--selectors must be among {', '.join(known)}, got {unknown[0]!r}")
    if wrong := [budget for budget in budgets if not 0 < budget < 100]:
        raise BenchmarkError(f"--budgets are percentages between 0 and 100, got {wrong[0]:g}")
    dense = Variant(DENSE, 100.0, published.visual_tokens)
    rows = variants(chosen, budgets, registry, published.visual_tokens)
    return [dense] + [
        row
        for row in rows
        if row.position_policy != "original" and (row.important_ratio is None or row.important_ratio in RATIOS)
    ]


def answer_scene(
    published: PublishedModel, samples: Sequence[Sample], rows: Sequence[Variant], new_tokens: int
) -> list[Cell]:
    """Answer all questions about one scene under every variant."""
    inputs = published.inputs(samples)
    cells = []
    for row in rows:
        smaller = row.selector == DOWNSAMPLE
        own_inputs = published.inputs(samples, math.isqrt(row.visual_token_num)) if smaller else inputs
        options = row.options(row.draws[0], samples[0].picture)
        answers = published.answer(own_inputs, options, row.visual_token_num, new_tokens)
        kept, important = frozenset(range(published.visual_tokens)), frozenset()
        if answers.kept is not None and answers.saliency is not None:
            kept = frozenset(answers.kept[0].tolist())
            ratio = 1.0 if row.selector == "cls_attention" else row.important_ratio or 0.0
            ranked = published.selection.important_tokens(answers.saliency[:1], row.visual_token_num, ratio)
            important = frozenset(ranked[0].tolist())
        cells.append(Cell(row, [text.strip() for text in answers.texts], kept, important))
    return cells


def row_name(variant: Variant) -> str:
    return label({**vars(variant), "position_policy": None})


# The page


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>VisPruner: kept patches and answers</title>
<style>
:root { color-scheme: light dark; --ink: #1e1e1e; --paper: #fff; --line: #ccc; --right: #00795a; --wrong: #b3370c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #eee; --paper: #181818; --line: #555; --right: #35c79d; --wrong: #ff8a5c; }
}
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 1.5rem auto;
  max-width: 78rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: .6rem 0 1.6rem; }
th, td { border: 1px solid var(--line); padding: .4rem .5rem; vertical-align: top; text-align: left; }
td svg, td.scene svg { width: 9rem; height: 9rem; display: block; margin-bottom: .3rem; }
ol { margin: 0; padding-left: 1.5rem; font-size: .82rem; }
.scene ol { font-size: .95rem; }
.right { color: var(--right); }
.wrong { color: var(--wrong); font-weight: 700; }
.right::before { content: "\\2713\\00a0"; }
.wrong::before { content: "\\2717\\00a0"; }
.key { display: inline-block; width: .8em; height: .8em; border: 3px solid; margin: 0 .3em 0 .8em; }
.important { stroke: #E69F00; border-color: #E69F00; }
.diverse { stroke: #0072B2; border-color: #0072B2; }
svg .important, svg .diverse { fill: none; shape-rendering: crispEdges; }
svg .dropped { fill: #fff; fill-opacity: .72; }
svg .small { image-rendering: pixelated; }
</style>
</head>
<body>
<h1>Kept patches and answers</h1>
<p>$about</p>
<p>Patches framed <span class="key important"></span>for their attention (important)
<span class="key diverse"></span>otherwise (diverse, or by a method that makes no such difference); the others were
dropped. Answers are in the order of the questions; a wrong one says what was answered. A random selector draws anew
for every question; the patches shown are those of the first.</p>
<h2>Right answers</h2>
$summary
$scenes
</body>
</html>
""")


def page(scenes: Sequence[Sequence[Sample]], cells: Sequence[Sequence[Cell]], grid: int, about: str) -> str:
    """Return the whole page."""
    blocks = [_scene_block(samples, row, grid) for samples, row in zip(scenes, cells, strict=True)]
    return PAGE.substitute(about=html.escape(about), summary=_summary(scenes, cells), scenes="\n".join(blocks))


def _summary(scenes: Sequence[Sequence[Sample]], cells: Sequence[Sequence[Cell]]) -> str:
    """Count right answers over all scenes by selector and budget."""
    asked = sum(map(len, scenes))
    right: dict[Variant, int] = dict.fromkeys((cell.variant for cell in cells[0]), 0)
    for samples, scene_cells in zip(scenes, cells, strict=True):
        for cell in scene_cells:
            right[cell.variant] += sum(_marks(cell, samples))
    return _table(list(right), lambda variant: f"{right[variant]} of {asked}")


def _scene_block(samples: Sequence[Sample], cells: Sequence[Cell], grid: int) -> str:
    """One scene: its questions with the right answers, then the table of what each variant saw and said."""
    number, side = samples[0].picture, samples[0].image.width
    source = _data_uri(samples[0].image)
    symbol = (
        f'<svg viewBox="0 0 {side} {side}" role="img" aria-label="scene {number}"><image id="scene{number}" '
        f'class="{"small" if side <= SMALL_IMAGE else "photo"}" href="{source}" width="{side}" height="{side}"/></svg>'
    )
    asked = "".join(f"<li>{html.escape(s.text)} <b>{html.escape(s.answer)}</b></li>" for s in samples)
    by_variant = {cell.variant: _cell(cell, samples, grid) for cell in cells}
    return (
        f"<h2>Scene {number}</h2><table><tr><td class='scene'>{symbol}</td><td class='scene'><ol>{asked}</ol></td>"
        f"</tr></table>{_table(list(by_variant), by_variant.__getitem__)}"
    )


def _table(rows: Sequence[Variant], content: Callable[[Variant], str]) -> str:
    """A table with a line per selector and a column per budget; the dense model has the line above them to itself."""
    names = list(dict.fromkeys(row_name(row) for row in rows if row.selector != DENSE))
    budgets = list(dict.fromkeys(row.budget_percent for row in rows if row.selector != DENSE))
    found = {(row_name(row), row.budget_percent): row for row in rows}
    lines = [f"<tr><th>all tokens</th><td colspan='{len(budgets)}'>{content(rows[0])}</td></tr>"]
    lines.append("<tr><th>selector</th>" + "".join(f"<th>{budget:g} %</th>" for budget in budgets) + "</tr>")
    for name in names:
        line = "".join(f"<td>{content(found[name, budget])}</td>" for budget in budgets)
        lines.append(f"<tr><th>{html.escape(name)}</th>{line}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _cell(cell: Cell, samples: Sequence[Sample], grid: int) -> str:
    """The scene with its kept patches, and every answer."""
    marks = "".join(
        f'<li class="{"right" if right else "wrong"}">{html.escape(answer) or "(nothing)"}</li>'
        for right, answer in zip(_marks(cell, samples), cell.answers, strict=True)
    )
    return f"{_overlay(cell, samples[0], grid)}<ol>{marks}</ol>"


def _marks(cell: Cell, samples: Sequence[Sample]) -> list[bool]:
    return [is_right(answer, sample.answer) for answer, sample in zip(cell.answers, samples, strict=True)]


def _overlay(cell: Cell, sample: Sample, grid: int) -> str:
    """The scene again, dropped patches faded and kept ones framed; words where no patch was dropped."""
    side, number = sample.image.width, sample.picture
    if cell.variant.selector == DOWNSAMPLE:
        size = math.isqrt(cell.variant.visual_token_num) * side // grid
        return f"<p>{size} x {size} pixels, {cell.variant.visual_token_num} tokens</p>"
    if len(cell.kept) == grid**2:
        return f"<p>{grid**2} tokens</p>"
    step, stroke = side / grid, side / 80

    def squares(patches: frozenset[int], inset: float) -> str:
        edge = step - 2 * inset
        return "".join(
            f"M{p % grid * step + inset:g} {p // grid * step + inset:g}h{edge:g}v{edge:g}h{-edge:g}z"
            for p in sorted(patches)
        )

    dropped = frozenset(range(grid**2)) - cell.kept
    return (
        f'<svg viewBox="0 0 {side} {side}" role="img" aria-label="{len(cell.kept)} kept patches of scene {number}">'
        f'<use href="#scene{number}"/><path class="dropped" d="{squares(dropped, 0)}"/>'
        f'<g stroke-width="{stroke:g}"><path class="diverse" d="{squares(cell.kept - cell.important, 0.6 * stroke)}"/>'
        f'<path class="important" d="{squares(cell.kept & cell.important, 0.6 * stroke)}"/></g></svg>'
    )


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_report(
    out: Path,
    repo: Path | None = None,
    selectors: Sequence[str] | None = None,
    budgets: Sequence[float] | None = None,
    seed: int = 0,
    scenes: int = SCENES,
    dataset: str = "scenes",
) -> Path:
    """Answer the scenes and write the page.

    repo       a built repo, a stock LLaVA checkpoint to build one from, or None for the embedded one of the data set
    selectors  "downsample" and names that the repo registers; all of them by default
    """
    if scenes < 1 or seed < 0:
        raise BenchmarkError(f"--scenes must be at least 1 and --seed at least 0, got {scenes} and {seed}")
    if budgets is None:
        budgets = PHOTO_BUDGETS[1:] if dataset == PHOTOS else BUDGETS
    config, codebook = EMBEDDED[dataset]
    with published_repo(repo, config) as folder:
        published = PublishedModel(folder, codebook if repo is None else None)
    rows = shown_variants(published, selectors, budgets)
    samples = scene_samples(seed, scenes, dataset)
    new_tokens = published.longest_answer(sample.answer for scene in samples for sample in scene)
    cells = [answer_scene(published, scene, rows, new_tokens) for scene in tqdm(samples, unit="scene")]
    about = (
        f"Of the test set of {dataset} with seed {seed}, {len(samples)} of the pictures and {sum(map(len, samples))} "
        f"questions; budgets in percent of {published.visual_tokens} visual tokens. "
        "Too few to compare selectors: benchmarks/accuracy.py does that."
    )
    text = page(samples, cells, published.grid, about)
    write_text(out, text)
    return out


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=output_file(".html", ".htm"), metavar="FILE", help="the .html file to write")
    parser.add_argument(
        "--repo",
        type=Path,
        metavar="DIR",
        help="a built repo, or a stock LLaVA checkpoint to build one from; by default the trained one in the package",
    )
    parser.add_argument("--selectors", nargs="+", metavar="NAME", help="by default all the repo registers")
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=float,
        metavar="PERCENT",
        help=f"visual tokens kept, in percent (default: {' '.join(f'{b:g}' for b in BUDGETS)}; of photographs "
        f"{' '.join(f'{b:g}' for b in PHOTO_BUDGETS[1:])})",
    )
    parser.add_argument(
        "--dataset",
        choices=("scenes", PHOTOS),
        default="scenes",
        help=f"what to show (default: %(default)s); {PHOTOS} needs vispruner[photo]",
    )
    parser.add_argument("--scenes", type=int, default=SCENES, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="which test set (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    torch.set_num_threads(2)
    try:
        out = write_report(
            parsed.out, parsed.repo, parsed.selectors, parsed.budgets, parsed.seed, parsed.scenes, parsed.dataset
        )
    except ValueError as error:  # BenchmarkError, BuildError and what the model refuses
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    print(f"Wrote {out}: open it in a browser.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
