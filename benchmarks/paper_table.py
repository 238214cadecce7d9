"""The paper's table of measured cells: beside what was published, with the differences and what has to be said."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paper_benchmarks import AUTHORS, AVERAGES, BENCHMARKS, PAPER, POPE, PUBLISHED, Row
from tables_and_plots import markdown_table, new_figure, save_figure


@dataclass(frozen=True)
class Result:
    """A row of the table, by benchmark: what was measured, why it was not, and what was published."""

    row: Row
    measured: dict[str, float]
    why: dict[str, str]
    published: dict[str, float]
    cells: dict[str, dict[str, Any]]

    @property
    def difference(self) -> dict[str, float]:
        return {name: self.measured[name] - value for name, value in self.published.items() if name in self.measured}


def average(figures: Mapping[str, float], stock: Mapping[str, float], names: Sequence[str]) -> float | None:
    """Return how many percent of the stock model's figures are left, the mean over these of the paper's benchmarks."""
    ratios = [figures[name] / stock[name] for name in names if name in PAPER and name in figures and stock.get(name)]
    return 100 * sum(ratios) / len(ratios) if ratios else None


@dataclass(frozen=True)
class Table:
    """The rows, that of the stock model first; settings are those of the run."""

    settings: Mapping[str, Any]
    benchmarks: Sequence[str]
    results: Sequence[Result]

    @classmethod
    def of(
        cls,
        settings: Mapping[str, Any],
        rows: Sequence[Row],
        benchmarks: Sequence[str],
        read: Callable[[Row, tuple[str, ...]], dict[str, Any] | None],
        reasons: Mapping[tuple[str, tuple[str, ...]], str],
    ) -> Table:
        """Read the cells; `reasons` says by row's name and tasks why one is empty."""
        results = []
        for row in rows:
            measured, why, cells = {}, {}, {}
            for name in benchmarks:
                benchmark = BENCHMARKS[name]
                if (cell := read(row, benchmark.tasks)) is None:
                    why[name] = reasons.get((row.name, benchmark.tasks), "not measured yet")
                    continue
                cells["+".join(benchmark.tasks)] = cell
                if (figure := benchmark.figure(cell)) is None:
                    why[name] = f"lmms-eval gave no {benchmark.metric}"
                else:
                    measured[name] = figure
            known = PUBLISHED.get(settings["model"], {}) if row.method in (None, "vispruner") else {}
            told = dict(zip(PAPER, known.get(row.budget, ()), strict=False))
            results.append(Result(row, measured, why, {n: v for n, v in told.items() if n in benchmarks}, cells))
        return cls(settings, benchmarks, results)

    def averages(self) -> list[dict[str, float]]:
        """Return for every row its average, measured, published and the difference, over what was measured."""
        stock, rows = self.results[0], []
        for result in self.results:
            names = [name for name in result.measured if stock.measured.get(name)]
            mean = {
                "measured": average(result.measured, stock.measured, names),
                "published": average(result.published, stock.published, names or list(PAPER)),
            }
            found = {kind: value for kind, value in mean.items() if value is not None}
            if len(found) == 2:
                found["difference"] = found["measured"] - found["published"]
            rows.append(found)
        return rows

    def markdown(self) -> str:
        """Return the table, each row measured, published and the difference, and its notes below."""
        full = next((cell["visual_tokens"]["full"] for r in self.results for cell in r.cells.values()), None)
        of = "" if full is None else f" of {full:.0f}"
        reasons = list(dict.fromkeys(why for result in self.results for why in result.why.values()))
        columns = ["tokens", "method", "", *self.benchmarks, "average"]
        lines = []
        for result, mean in zip(self.results, self.averages(), strict=True):
            row = [f"{result.row.budget or 'all'}{of}", result.row.method or "stock"]
            kinds = {"measured": result.measured}
            if result.published:
                kinds |= {"published": result.published, "difference": result.difference}
            for kind, figures in kinds.items():
                form = "+.1f" if kind == "difference" else ".1f"
                shown = {name: format(value, form) for name, value in figures.items()}
                if kind in mean:
                    shown["average"] = format(mean[kind], form)
                if kind == "measured":
                    shown |= {name: f"({reasons.index(why) + 1})" for name, why in result.why.items()}
                cells = [*row, kind, *(shown.get(name, "") for name in (*self.benchmarks, "average"))]
                lines.append(cells)
        numbered = [f"({number}) {why}" for number, why in enumerate(reasons, 1)]
        return "\n".join([markdown_table(columns, lines), "", *numbered, "", *self.notes()])

    def notes(self) -> list[str]:
        """Return what has to be said of the figures: sources, differences of protocol, and what POPE's F1 hides."""
        lines = []
        if (limit := self.settings["limit"]) is not None:
            lines.append(f"The first {limit} questions of each task alone; published figures are of all of them.")
        if any(result.published for result in self.results):
            lines.append(f"Published: {AUTHORS}.")
        for source, methods in AVERAGES.get(self.settings["model"], {}).items():
            rows = [result.row for result in self.results]
            told = [f"{r.name} {methods[r.method][r.budget]}" for r in rows if r.budget in methods.get(r.method, ())]
            if told:
                lines.append(f"Averages published elsewhere: {', '.join(told)}; {source}.")
        for result in self.results:
            if (cell := result.cells.get("+".join(POPE))) and "said_yes" in cell:
                yes, neither = f"{cell['said_yes']:.0%}", f"{cell['said_neither']:.0%}"
                lines.append(f"{result.row.name}: {yes} of POPE's answers are yes, {neither} neither yes nor no.")
        return [*lines, *(f"{name}: {BENCHMARKS[name].differs}." for name in self.benchmarks)]

    def record(self) -> dict[str, Any]:
        """Return all of it, for JSON."""
        rows = [
            {**asdict(result), "name": result.row.name, "difference": result.difference, "average": mean}
            for result, mean in zip(self.results, self.averages(), strict=True)
        ]
        return {"settings": dict(self.settings), "rows": rows}

    def plot(self, path: Path) -> None:
        """Draw the averages against the budgets: measured as lines, the published ones dashed."""
        figure = new_figure(figsize=(7, 4.5), layout="tight")
        axes = figure.subplots()
        for kind, style in (("measured", "-o"), ("published", "--x")):
            curves: dict[str, list[tuple[int, float]]] = {}
            for result, mean in list(zip(self.results, self.averages(), strict=True))[1:]:
                if kind in mean and result.row.budget is not None:
                    curves.setdefault(f"{result.row.method}, {kind}", []).append((result.row.budget, mean[kind]))
            for name, points in curves.items():
                axes.plot(*zip(*sorted(points), strict=True), style, label=name)
        axes.set(title=self.settings["model"], xlabel="visual tokens kept of a picture or tile")
        axes.set_ylabel("average, % of the stock model")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        save_figure(figure, path)
