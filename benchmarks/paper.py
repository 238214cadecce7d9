"""Measure the paper's table: lmms-eval on a stock model and on its pruned repos, beside what was published.

  python benchmarks/paper.py                                        # LLaVA-1.5-7B, VisPruner, ten benchmarks and more
  python benchmarks/paper.py --limit 100                            # a first look: 100 questions of each
  python benchmarks/paper.py --methods vispruner divprune fastv --budgets 64 --benchmarks GQA TextVQA POPE
  python benchmarks/paper.py --print                                # the table of what is there; measures nothing

The stock model comes first, then each method at each budget, as a repo that is built for it (without weights, which
are the base's). Every cell, one repo on one benchmark, is a file of its own in --out, and a second run goes on where
the first one stopped. A folder begun with another model, limit or version is refused. A cell that fails does not stop
the others: the table says why it is empty, and the next run tries it again. A repo that prunes nothing stops all.

A difference is measured minus published. The average is the mean of the ratios to the stock model's figures, over
those of the paper's ten benchmarks that were measured; the published one beside it is over the same benchmarks.

What differs from the paper's protocol, by benchmark:
{differs}
Pictures are padded to squares, as LLaVA-1.5 saw them, where the repo's own processor would crop their middle out.
LLaVA's prompts began with a sentence about "a curious user" (--system-prompt). Weights are of the checkpoint's dtype.

Data sets come from the Hub. Without a network, put each into a folder named like it (DATA/lmms-lab-encoder/POPE, by
`hf download lmms-lab-encoder/POPE --repo-type dataset --local-dir DATA/lmms-lab-encoder/POPE`) and give --data DATA.
MM-Vet needs a judge: OPENAI_API_KEY, and MODEL_VERSION for another one than lmms-eval's default.

Needs lmms-eval as benchmarks/lmms_eval/README.md installs it, and for MMB and CHAIR `pip install openpyxl nltk`.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from outputs import new_folder, output_file
from paper_benchmarks import BENCHMARKS, Row
from paper_table import Table
from records import write_record

from vispruner import __version__, architecture_of
from vispruner.configuration_vispruner import merge_vispruner_config
from vispruner.conversion.base_checkpoint import BuildError
from vispruner.conversion.build import build_repo, find_repo_base
from vispruner.conversion.ceilings import TEXT_TOKENS, ceiling, encoder_flops, example_inputs
from vispruner.conversion.checkpoint_io import CheckpointError, read_json
from vispruner.conversion.prefill_cost import kv_cache_bytes, language_model_flops, logits_flops
from vispruner.conversion.repo_config import RepoConfig, hub_config_names, load_repo_config
from vispruner.selectors import require_published

LMMS_EVAL = Path(__file__).parent / "lmms_eval"
METHODS, BUDGETS = ("vispruner",), (192, 128, 64, 32)
ANSWER_TOKENS = 8  # for the estimate
SETTINGS = "settings.json"


class PaperError(ValueError):
    """What was asked for cannot be measured, with the remedy."""


@dataclass(frozen=True)
class Plan:
    """What to measure, as the command line says it."""

    model: str
    repo: RepoConfig
    rows: list[Row]
    benchmarks: list[str]
    folder: Path
    data: Path | None
    device: str
    batch_size: int
    limit: int | None
    system_prompt: str | None

    @cached_property
    def base(self) -> Any:
        """The checkpoint of the stock model, found once."""
        return find_repo_base(self.repo)

    @property
    def tasks(self) -> list[tuple[str, ...]]:
        """The tasks of each cell of a row: two benchmarks may read one."""
        return list(dict.fromkeys(BENCHMARKS[name].tasks for name in self.benchmarks))

    def todo(self) -> dict[Row, list[tuple[str, ...]]]:
        """Return by row the tasks that can be scored and were not yet; rows that are done are left out."""
        cells, scored = Cells(self.folder), [tasks for tasks in self.tasks if missing(tasks) is None]
        left = {row: [tasks for tasks in scored if cells.read(row, tasks) is None] for row in self.rows}
        return {row: tasks for row, tasks in left.items() if tasks}

    def settings(self) -> dict[str, Any]:
        """Return what all cells of a folder have to have in common."""
        return {
            "model": self.model,
            "base_model": self.repo.base_model,
            "base_commit": self.base.commit,
            "limit": self.limit,
            "system_prompt": self.system_prompt,
            "vispruner": __version__,
            "lmms_eval": lmms_eval_version(),
            "transformers": importlib.metadata.version("transformers"),
        }


def lmms_eval_version() -> str:
    """Return which lmms-eval is installed; a folder here has its name, so that importing it says nothing."""
    try:
        return importlib.metadata.version("lmms-eval")
    except importlib.metadata.PackageNotFoundError as error:
        raise PaperError("lmms-eval is not installed: benchmarks/lmms_eval/README.md says how") from error


class Cells:
    """The measured cells in a folder, a file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise PaperError naming the first setting that this folder was begun with otherwise."""
        if not (self.folder / SETTINGS).exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise PaperError(f"{self.folder} is not empty and has no {SETTINGS}: give another --out")
            return
        before = read_json(self.folder / SETTINGS)
        for name, now in settings.items():
            if before.get(name) != now:
                raise PaperError(
                    f"{self.folder} was measured with {name} {before.get(name)!r}, not {now!r}, which would be mixed: "
                    f"give another --out, or go on with the former {name}"
                )

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Check the folder, or make it."""
        self.check(settings)
        if not (self.folder / SETTINGS).exists():
            self.folder.mkdir(exist_ok=True)
            write_record(self.folder / SETTINGS, settings)

    def path(self, row: Row, tasks: Sequence[str]) -> Path:
        return self.folder / f"{row.name}--{'+'.join(tasks)}.json"

    def read(self, row: Row, tasks: Sequence[str]) -> dict[str, Any] | None:
        """Return a cell, or None where it was not measured yet."""
        path = self.path(row, tasks)
        return read_json(path) if path.exists() else None

    def rows(self) -> list[Row]:
        """Return the rows of which the folder has a cell, that of the stock model first, by method and budget."""
        names = {path.name.partition("--")[0] for path in self.folder.glob("*--*.json")} - {Row().name}
        pairs = (name.rpartition("-") for name in names)
        found = [Row(method, int(budget)) for method, _, budget in pairs if budget.isdecimal()]
        return [Row(), *sorted(found, key=lambda row: (row.method or "", -(row.budget or 0)))]

    def write(self, row: Row, tasks: Sequence[str], cell: Mapping[str, Any]) -> None:
        write_record(self.path(row, tasks), cell)


def missing(tasks: Sequence[str]) -> str | None:
    """Return what has to be done before these tasks can be scored, if anything: known before hours of questions."""
    if "mmvet_plain" in tasks:
        key = "AZURE_API_KEY" if (kind := os.environ.get("API_TYPE", "openai")) == "azure" else "OPENAI_API_KEY"
        if kind in ("openai", "azure") and not os.environ.get(key):
            return f"needs a judge, without which every answer scores 0: set {key} (MODEL_VERSION chooses the judge)"
    if "mmbench_en_dev_static" in tasks and find_spec("openpyxl") is None:
        return "needs openpyxl: pip install openpyxl"
    if "coco_cap_chair" in tasks:
        words = ("tokenizers/punkt_tab", "taggers/averaged_perceptron_tagger_eng", "corpora/wordnet")
        if find_spec("nltk") is None:
            return "needs nltk: pip install nltk"
        if lacking := [word for word in words if not _has_nltk(word)]:
            names = " ".join(word.rpartition("/")[2] for word in lacking)
            return f"needs data of nltk: python -m nltk.downloader {names}"
    return None


def _has_nltk(resource: str) -> bool:
    import nltk

    for name in (resource, f"{resource}.zip"):
        try:
            nltk.data.find(name)
            return True
        except LookupError:
            continue
    return False


def built(plan: Plan, row: Row) -> Path:
    """Return the folder of a row's model; a repo that is not there yet is built."""
    if row.method is None:
        return plan.base.with_weights().folder.resolve()
    out = plan.folder / "repos" / row.name
    if not out.exists():
        options = merge_vispruner_config(None, {"method": row.method, "visual_token_num": row.budget})
        build_repo(replace(plan.repo, vispruner_config=options, files={}, budgets={}), out, show_progress=False)
    return out


def measure(plan: Plan) -> dict[tuple[str, tuple[str, ...]], str]:
    """Measure every cell that is not in the folder yet; return by row's name and tasks why one is empty.

    Raises PaperError for a folder of other settings, and for a repo that prunes nothing.
    """
    cells, todo = Cells(plan.folder), plan.todo()
    cells.begin(plan.settings())
    reasons = {(row.name, tasks): why for tasks in plan.tasks if (why := missing(tasks)) for row in plan.rows}
    folders = {row: built(plan, row) for row in todo}  # all of them, before hours are spent on one
    if not todo:
        return reasons
    sys.path.append(str(LMMS_EVAL))
    from measured_cell import NotPrunedError, measure_cell, task_manager

    manager = task_manager()
    with tqdm(total=sum(map(len, todo.values())), desc="cells") as progress, _working_in(plan.data or Path.cwd()):
        for row, tasks_of_row in todo.items():
            model = _load(plan, row, folders[row])
            for tasks in tasks_of_row:
                progress.set_postfix_str(f"{row.name}, {'+'.join(tasks)}")
                try:
                    with redirect_stdout(sys.stderr):
                        cell = measure_cell(model, tasks, manager, plan.limit)
                    cells.write(row, tasks, cell | {"device": plan.device, "batch_size": plan.batch_size})
                except NotPrunedError as error:
                    raise PaperError(f"{folders[row]}: {error}. Delete the folder, and it is built anew") from error
                except Exception as error:  # one benchmark that fails must not take the others along
                    reasons[row.name, tasks] = _said(error)
                    tqdm.write(f"{row.name}, {'+'.join(tasks)}: {_said(error)}", file=sys.stderr)
                progress.update()
            del model
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return reasons


def _load(plan: Plan, row: Row, folder: Path) -> Any:
    from measured_cell import CountedModel

    return CountedModel(
        str(folder),
        pads=plan.repo.architecture == "llava",
        prunes=row.method is not None,
        device=plan.device,
        device_map=plan.device,
        batch_size=plan.batch_size,
        system_prompt=plan.system_prompt,
    )


def _said(error: Exception) -> str:
    while (cause := getattr(error, "last_attempt", None)) is not None:  # lmms-eval tries to read data five times
        error = cause.exception()
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """Work in `folder`, where data sets are looked for first, under their names."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def estimate(plan: Plan) -> str:
    """Return how long what is left takes at least, and the memory: from operations, and how fast this device is."""
    content = read_json(plan.base.folder / "config.json")
    dtype = torch.float32 if plan.device == "cpu" else torch.bfloat16
    matrix = torch.ones(1024, 1024, device=plan.device, dtype=dtype)
    begin, products = time.perf_counter(), 0
    while (passed := time.perf_counter() - begin) < 0.5:
        (matrix @ matrix).sum().item()
        products += 1
    rate = 2 * 1024**3 * products / passed
    questions, operations, cache = 0, 0.0, 0
    for row, tasks_of_row in plan.todo().items():
        count = sum(_questions(tasks, plan.limit) for tasks in tasks_of_row)
        flops, cache_of_row = question_cost(content, row)
        questions, operations, cache = questions + count, operations + count * flops, max(cache, cache_of_row)
    return (
        f"{questions:,} questions are left, of all repos together. On {plan.device}, which multiplies matrices at "
        f"{rate / 1e12:.2f} TFLOP/s, they take at least {_duration(operations / rate)}. Memory: "
        f"{plan.base.weights_size() / 1e9:.2f} GB of weights, {cache * plan.batch_size / 1e6:.0f} MB of KV cache."
    )


def question_cost(content: Mapping[str, Any], row: Row) -> tuple[float, int]:
    """Return the operations of a usual question with its answer, and the bytes of its KV cache, by a config.json."""
    architecture = architecture_of(content["model_type"])
    options = {"method": row.method, "visual_token_num": row.budget} if row.method else {"method": "none"}
    config = architecture.config_class.from_dict(dict(content), vispruner_config=merge_vispruner_config(None, options))
    with torch.device("meta"):
        base = architecture.base_class(config)
    limit, encoder = ceiling(base), sum(encoder_flops(base, example_inputs(base)))
    length = TEXT_TOKENS + limit.visual_tokens[0]
    first = encoder + language_model_flops(config, length) + logits_flops(config)
    later = language_model_flops(config, 1, length) + logits_flops(config)
    return first / limit.first_token + ANSWER_TOKENS * later, round(kv_cache_bytes(config, length) * limit.cache)


def _questions(tasks: tuple[str, ...], limit: int | None) -> int:
    count = next(benchmark.questions for benchmark in BENCHMARKS.values() if benchmark.tasks == tasks)
    return count if limit is None else min(count, limit * len(tasks))


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} seconds"


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, Plan]:
    differs = "\n".join(f"  {name + ':':10}{benchmark.differs}" for name, benchmark in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").format(differs=differs), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llava-1.5-7b", help="YAML of hub_configs/ without -vispruner, or a path")
    parser.add_argument(
        "--methods", nargs="+", help="`vispruner methods` lists all (default: vispruner; with --print, what is there)"
    )
    budgets = f"tokens kept of a picture, or of a tile (default: {' '.join(map(str, BUDGETS))}; with --print likewise)"
    parser.add_argument("--budgets", nargs="+", type=int, help=budgets)
    names = f"of {', '.join(BENCHMARKS)} (default: all)"
    parser.add_argument("--benchmarks", nargs="+", choices=BENCHMARKS, metavar="NAME", help=names)
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    parser.add_argument("--out", type=new_folder, help="folder of the cells (default: paper-MODEL)")
    parser.add_argument("--data", type=Path, help="folder of data sets, each in a folder named OWNER/NAME")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda; where there is none, only an estimate)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--system-prompt", metavar="TEXT", help="what every prompt begins with (default: nothing)")
    parser.add_argument("--print", action="store_true", help="measure nothing, show what is in the folder")
    parser.add_argument("--json", type=output_file(".json"), help="write all figures here, too")
    parser.add_argument("--plot", type=output_file(".png"), help="draw the averages here")
    options = parser.parse_args(arguments)
    try:
        return options, _plan(options)
    except ValueError as error:
        parser.error(str(error))


def _plan(options: argparse.Namespace) -> Plan:
    """Return what the options mean; ValueError with the remedy for one that means nothing."""
    for option, values in {
        "--budgets": options.budgets or [],
        "--limit": [] if options.limit is None else [options.limit],
        "--batch-size": [options.batch_size],
    }.items():
        if (least := min(values, default=1)) < 1:
            raise PaperError(f"{option} must be at least 1, got {least}")
    if options.limit is not None and options.limit % 2 and "MME" in (options.benchmarks or BENCHMARKS):
        raise PaperError(f"--limit must be even, because MME's questions are pairs, got {options.limit}")
    methods, budgets = options.methods or METHODS, options.budgets or BUDGETS
    for method in methods:
        for name in method.split("+"):
            require_published(name)
    if options.data is not None and not options.data.is_dir():
        raise PaperError(f"--data: {options.data} is no folder")
    for name in options.benchmarks or ():  # asked for by name, not only among all
        if why := None if options.print else missing(BENCHMARKS[name].tasks):
            raise PaperError(f"{name} {why}")
    shipped = f"{options.model}-vispruner"
    repo = load_repo_config(shipped if shipped in hub_config_names() else options.model)
    model = repo.path.stem.removesuffix("-vispruner")
    pairs = dict.fromkeys((method, budget) for method in methods for budget in budgets)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not options.print:
        _require_device(device)
    return Plan(
        model=model,
        repo=repo,
        rows=[Row(), *(Row(method, budget) for method, budget in pairs)],
        benchmarks=list(dict.fromkeys(options.benchmarks or BENCHMARKS)),
        folder=(options.out or new_folder(f"paper-{model}")).absolute(),
        data=options.data and options.data.resolve(),
        device=device,
        batch_size=options.batch_size,
        limit=options.limit,
        system_prompt=options.system_prompt,
    )


def _require_device(name: str) -> None:
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a name that means nothing, a missing driver
        said = str(error).partition("\n")[0].rstrip(".")
        raise PaperError(f"--device {name} cannot be used here ({said}): give another, such as cpu") from error


def main(arguments: Sequence[str] | None = None) -> int:
    options, plan = parse_arguments(arguments)
    if options.print and options.methods is None and options.budgets is None:  # all that is there
        plan = replace(plan, rows=Cells(plan.folder).rows())
    try:
        table = stored_table(plan) if options.print else measured_table(plan, goes_on=options.device is not None)
    except (PaperError, CheckpointError, BuildError) as error:
        print(f"paper.py: {error}", file=sys.stderr)
        return 1
    print(table.markdown())
    if options.json:
        write_record(options.json, table.record())
    if options.plot:
        table.plot(options.plot)
    return 0


def measured_table(plan: Plan, goes_on: bool) -> Table:
    """Say what it takes, measure what is missing, and return the table; `goes_on`, even without a GPU."""
    cells, asks = Cells(plan.folder), goes_on or plan.device != "cpu"
    # An estimate needs no lmms-eval.
    cells.check(plan.settings() if asks else {"model": plan.model, "limit": plan.limit})
    print(estimate(plan), file=sys.stderr)
    if not asks:
        raise PaperError("no GPU was found: to measure on the processor all the same, give --device cpu")
    reasons = measure(plan)
    return Table.of(plan.settings(), plan.rows, plan.benchmarks, cells.read, reasons)


def stored_table(plan: Plan) -> Table:
    """Return the table of what is in the folder, which may come from another machine."""
    cells = Cells(plan.folder)
    cells.check({"model": plan.model})
    if not (settings := plan.folder / SETTINGS).exists():
        raise PaperError(f"{plan.folder} has no {SETTINGS}: nothing was measured there")
    return Table.of(read_json(settings), plan.rows, plan.benchmarks, cells.read, {})


if __name__ == "__main__":
    sys.exit(main())
