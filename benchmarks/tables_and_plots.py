"""How records are shown: Markdown tables, and plots that need no display."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vispruner.conversion.checkpoint_io import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe-Ito: told apart with every common colour blindness.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
RED, SKY, BLACK = "#D55E00", "#56B4E9", "#000000"


def markdown_table(columns: str | Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table, its columns also as one text parted by `|`; ValueError where a row has not one cell for each."""
    columns = columns.split("|") if isinstance(columns, str) else columns
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row has {len(row)} cells where the table has {len(columns)} columns: {row}")
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def new_figure(**options: Any) -> Figure:
    """Return matplotlib's figure, which needs no display and nothing to be closed."""
    from matplotlib.figure import Figure

    return Figure(**options)


def save_figure(figure: Figure, path: Path, dpi: int = 130) -> None:
    """Write a figure, which appears only when it is complete."""
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=dpi, format=path.suffix[1:].lower())
