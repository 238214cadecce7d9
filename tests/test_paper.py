"""The paper's table: what is asked, stored, refused and printed; and, through lmms-eval, all of it on miniatures."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from vispruner.conversion.build import build_repo

# Appended, not inserted: a folder in it is called lmms_eval like the package.
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import paper
from miniature_benchmarks import COCO_OBJECTS, QUESTIONS, asked, wide, write_miniatures
from miniature_nltk import write_nltk_data
from paper_benchmarks import AVERAGES, BENCHMARKS, PAPER, POPE, PUBLISHED, Row
from paper_table import Table, average

ROOT = Path(__file__).parent.parent
BASE = ROOT / "conversion" / "assets" / "tiny-llava"
FULL, KEPT = 144, 18
TINY = ["--model", "tiny-llava", "--device", "cpu"]


def cell(tasks: Sequence[str], *values: float, metric: str = "", questions: int = 10, **more: Any) -> dict[str, Any]:
    """Return a cell as measured: a value for each task."""
    metric = metric or next(b.metric for b in BENCHMARKS.values() if b.tasks == tuple(tasks))
    figures = {
        task: {"questions": questions, "metrics": {metric: value}} for task, value in zip(tasks, values, strict=True)
    }
    return {"tasks": figures, "visual_tokens": {"full": 144.0, "kept": 18.0, "last": 18.0}, **more}


def plan_of(*arguments: str) -> Any:
    return paper.parse_arguments(arguments)[1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a run writes to, on a machine that may lack lmms-eval and has no judge."""
    monkeypatch.setattr(paper, "lmms_eval_version", lambda: "0.7.3")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("API_TYPE", raising=False)
    return tmp_path / "paper"


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """In place of lmms-eval: notes what is loaded and asked, and raises what `failing` says of a task."""
    noted = SimpleNamespace(asked=[], loaded=[], failing={})

    class NotPrunedError(RuntimeError):
        pass

    def load(pretrained: str, prunes: bool, **options: Any) -> SimpleNamespace:
        noted.loaded.append((Path(pretrained).name, prunes, options))
        return SimpleNamespace(name=Path(pretrained).name)

    def measure_cell(model: SimpleNamespace, tasks: Sequence[str], manager: Any, limit: int | None) -> dict[str, Any]:
        noted.asked.append((model.name, "+".join(tasks)))
        if tasks[0] in noted.failing:
            raise noted.failing[tasks[0]]
        return cell(tasks, *[0.5] * len(tasks))

    module = ModuleType("measured_cell")
    vars(module).update(
        NotPrunedError=NotPrunedError, CountedModel=load, measure_cell=measure_cell, task_manager=lambda: None
    )
    noted.NotPrunedError = NotPrunedError
    monkeypatch.setitem(sys.modules, "measured_cell", module)
    return noted


def run(*arguments: str) -> int:
    return paper.main([*TINY, *arguments])


# What was published


@pytest.mark.parametrize(("budget", "relative"), [(128, 99.6), (64, 96.6), (32, 91.5)])
def test_the_published_figures_have_the_published_averages(budget: int, relative: float) -> None:
    table = PUBLISHED["llava-1.5-7b"]
    stock, kept = (dict(zip(PAPER, table[key], strict=True)) for key in (None, budget))
    assert average(kept, stock, list(PAPER)) == pytest.approx(relative, abs=0.06)  # cut off, not rounded


def test_published_averages_are_of_methods_and_models_that_exist() -> None:
    for model, sources in AVERAGES.items():
        assert f"{model}-vispruner" in paper.hub_config_names()
        for source, methods in sources.items():
            assert re.search(r"github\.com/|arXiv", source)
            for method, budgets in methods.items():
                paper.require_published(method)
                assert all(60 < value < 101 for value in budgets.values())


# The table


def test_the_table_sets_measured_beside_published(folder: Path) -> None:
    plan = plan_of(
        "--budgets", "64", "192", "--methods", "vispruner", "divprune", "--benchmarks", "GQA", "POPE", "MME"
    )
    cells = paper.Cells(folder)
    cells.folder.mkdir()
    for row, shift in zip(plan.rows, (0, 0.02, 0.01, 0.03, 0.01), strict=True):
        cells.write(row, ("gqa",), cell(["gqa"], 0.6 - shift))
        cells.write(row, POPE, cell(POPE, 0.8 - shift, 0.85 - shift, 0.9 - shift, said_yes=0.4, said_neither=0.25))
    settings, reasons = {"model": "llava-1.5-7b", "limit": None}, {("vispruner-64", ("mme",)): "RuntimeError: no room"}
    lines = Table.of(settings, plan.rows, plan.benchmarks, cells.read, reasons).markdown().splitlines()
    assert lines[0] == "| tokens | method |  | GQA | POPE | MME | average |"
    assert lines[2:8] == [
        "| all of 144 | stock | measured | 60.0 | 85.0 | (1) | 100.0 |",
        "| all of 144 | stock | published | 62.0 | 85.9 | 1510.7 | 100.0 |",
        "| all of 144 | stock | difference | -2.0 | -0.9 |  | +0.0 |",
        "| 64 of 144 | vispruner | measured | 58.0 | 83.0 | (2) | 97.2 |",
        "| 64 of 144 | vispruner | published | 55.4 | 80.4 | 1369.9 | 91.5 |",
        "| 64 of 144 | vispruner | difference | +2.6 | +2.6 |  | +5.7 |",
    ]
    assert lines[8:11] == [  # nobody published these
        "| 192 of 144 | vispruner | measured | 59.0 | 84.0 | (1) | 98.6 |",
        "| 64 of 144 | divprune | measured | 57.0 | 82.0 | (1) | 95.7 |",
        "| 192 of 144 | divprune | measured | 59.0 | 84.0 | (1) | 98.6 |",
    ]
    text = "\n".join(lines[11:])
    assert "(1) not measured yet\n(2) RuntimeError: no room\n" in text
    assert "VisPruner's project page" in text and "vispruner-192 98.2, divprune-64 93.3; FSR's table" in text
    assert "stock: 40% of POPE's answers are yes, 25% neither yes nor no." in text
    assert f"POPE: {PAPER['POPE'].differs}." in text and "VQAv2" not in text


def test_a_figure_is_in_the_papers_unit() -> None:
    assert BENCHMARKS["TextVQA"].figure(cell(["textvqa_val_ocr"], 0.582)) == pytest.approx(58.2)
    assert BENCHMARKS["MME"].figure(cell(["mme"], 1510.7)) == 1510.7
    ocrbench = cell(["ocrbench"], 0.006, questions=8)  # six right answers, which lmms-eval divides by 1000
    assert BENCHMARKS["OCRBench"].figure(ocrbench) == pytest.approx(75)
    chair = cell(["coco_cap_chair"], 3.0, metric="coco_cap_chair_i")
    assert BENCHMARKS["CHAIR-I"].figure(chair) == 3.0 and BENCHMARKS["CHAIR-S"].figure(chair) is None


# Running, stopping and going on


@pytest.mark.core
def test_a_second_run_measures_only_what_is_missing(
    folder: Path, asking: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--out", str(folder), "--budgets", "18", "--benchmarks", "GQA", "POPE")
    asking.failing["gqa"] = RuntimeError("no room\nfor it")
    assert run(*options) == 0
    assert asking.asked == [
        (name, tasks) for name in ("tiny-llava", "vispruner-18") for tasks in ("gqa", "+".join(POPE))
    ]
    assert [(name, prunes) for name, prunes, _ in asking.loaded] == [("tiny-llava", False), ("vispruner-18", True)]
    assert all(options["pads"] and options["device"] == "cpu" for _, _, options in asking.loaded)
    assert "(1) RuntimeError: no room for it" in capsys.readouterr().out

    asking.failing.clear()
    asking.asked.clear()
    before = {path: path.read_bytes() for path in folder.glob("*.json")}
    assert run(*options) == 0
    assert asking.asked == [("tiny-llava", "gqa"), ("vispruner-18", "gqa")]
    assert {path: path.read_bytes() for path in before} == before
    assert "| 18 of 144 | vispruner | measured | 50.0 | 50.0 | 100.0 |" in capsys.readouterr().out

    asking.asked.clear()
    asking.loaded.clear()
    assert run(*options[:2], "--budgets", "18", "9", *options[4:]) == 0
    assert {name for name, _ in asking.asked} == {"vispruner-9"} and len(asking.loaded) == 1
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


@pytest.mark.core
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--limit", "4"], "measured with limit 2, not 4"),
        ([], "measured with limit 2, not None"),
        (["--limit", "2", "--model", "tiny-llava-divprune"], "measured with model 'tiny-llava'"),
        (["--limit", "2", "--system-prompt", "Hello"], "measured with system_prompt None, not 'Hello'"),
    ],
)
def test_a_folder_of_other_settings_is_refused_by_name(
    arguments: list[str], said: str, folder: Path, asking: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--out", str(folder), "--budgets", "18", "--benchmarks", "GQA")
    assert run(*options, "--limit", "2") == 0
    asking.asked.clear()
    capsys.readouterr()
    assert run(*options, *arguments) == 1
    error = capsys.readouterr().err
    assert said in error and "give another --out" in error
    assert not asking.asked


def test_a_folder_of_something_else_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.mkdir()
    (folder / "letter.txt").write_text("mine")
    assert run("--out", str(folder), "--budgets", "18", "--benchmarks", "GQA") == 1
    assert "is not empty and has no settings.json" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["letter.txt"]


@pytest.mark.core
def test_a_repo_that_prunes_nothing_stops_all(
    folder: Path, asking: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    asking.failing["gqa"] = asking.NotPrunedError("all visual tokens reached the language model")
    assert run("--out", str(folder), "--budgets", "18", "--benchmarks", "GQA", "POPE") == 1
    captured = capsys.readouterr()
    assert "all visual tokens reached the language model" in captured.err and not captured.out
    assert len(asking.asked) == 1 and [path.name for path in folder.glob("*.json")] == ["settings.json"]


@pytest.mark.core
def test_a_budget_that_keeps_everything_is_refused_before_anything_is_asked(
    folder: Path, asking: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--out", str(folder), "--budgets", "18", "144", "--benchmarks", "GQA") == 1
    assert re.search(r"visual_token_num.*144", capsys.readouterr().err)
    assert not asking.asked


def test_without_a_gpu_an_estimate_is_all(
    folder: Path, asking: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(paper, "lmms_eval_version", lambda: pytest.fail("it asks for lmms-eval"))
    arguments = ["--model", "tiny-llava", "--out", str(folder), "--budgets", "18", "--limit", "100"]
    assert paper.main([*arguments, "--benchmarks", "GQA", "POPE"]) == 1
    said = capsys.readouterr().err
    assert "800 questions are left" in said and "they take at least" in said and "GB of weights" in said
    assert "give --device cpu" in said
    assert not asking.asked and not folder.exists()


def test_the_estimate_knows_what_pruning_saves() -> None:
    content = json.loads((BASE / "config.json").read_text())
    rows = [Row(), *(Row("vispruner", budget) for budget in (72, 18)), Row("fastv", 72)]
    stock, half, eighth, fastv = (paper.question_cost(content, row) for row in rows)
    assert all(a > b for a, b in zip(stock, half, strict=True)) and all(
        a > b for a, b in zip(half, eighth, strict=True)
    )
    assert fastv[0] < stock[0] and fastv[1] == pytest.approx(half[1], rel=0.01)
    assert paper.question_cost(content, Row())[1] == 2 * 4 * 128 * 2 * (paper.TEXT_TOKENS + FULL)


# What cannot be asked


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "visprunner"], "did you mean vispruner"),
        (["--budgets", "64", "0"], "--budgets must be at least 1, got 0"),
        (["--budgets", "many"], "invalid int value: 'many'"),
        (["--benchmarks", "VQA"], "invalid choice: 'VQA'"),
        (["--model", "llava-1.5-8b"], "llava-1.5-8b: neither a file nor one of the configs"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--limit", "5"], "--limit must be even, because MME's questions are pairs, got 5"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--device", "gpu"], "--device gpu cannot be used here (Expected one of cpu, cuda"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["--data", "nowhere"], "--data: nowhere is no folder"),
        (["--benchmarks", "MM-Vet"], "MM-Vet needs a judge, without which every answer scores 0: set OPENAI_API_KEY"),
    ],
)
def test_what_means_nothing_is_refused_with_the_remedy(
    arguments: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        paper.main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.core
def test_what_cannot_be_scored_says_so_in_the_table(
    folder: Path, asking: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paper, "find_spec", lambda name: None)
    assert run("--out", str(folder), "--budgets", "18") == 0
    out = capsys.readouterr().out
    for reason in (
        r"needs a judge.*set OPENAI_API_KEY",
        "needs openpyxl: pip install",
        "needs nltk: pip install nltk",
    ):
        assert re.search(rf"^\(\d\) {reason}", out, flags=re.MULTILINE)
    never = {"mmvet_plain", "mmbench_en_dev_static", "coco_cap_chair"}
    assert {tasks for _, tasks in asking.asked} == {"+".join(b.tasks) for b in BENCHMARKS.values()} - never
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    assert paper.missing(("mmvet_plain",)) is None
    monkeypatch.setenv("API_TYPE", "azure")
    assert "AZURE_API_KEY" in str(paper.missing(("mmvet_plain",)))


def test_data_of_nltk_is_named_where_it_is_missing_and_found_zipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nltk = pytest.importorskip("nltk")
    write_nltk_data(tmp_path)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    assert paper.missing(("coco_cap_chair",)) is None
    wordnet = tmp_path / "corpora" / "wordnet"
    zipped = shutil.make_archive(str(tmp_path / "wordnet"), "zip", wordnet.parent, wordnet.name)
    shutil.rmtree(wordnet)
    assert paper.missing(("coco_cap_chair",)) == "needs data of nltk: python -m nltk.downloader wordnet"
    shutil.move(zipped, wordnet.parent)  # as the downloader leaves it
    assert paper.missing(("coco_cap_chair",)) is None


def test_without_lmms_eval_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert run("--out", str(tmp_path / "paper"), "--benchmarks", "GQA") == 1
    assert "lmms-eval is not installed: benchmarks/lmms_eval/README.md says how" in capsys.readouterr().err


@pytest.mark.core
def test_what_is_there_can_be_shown_elsewhere(
    folder: Path, asking: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    options = ("--out", str(folder), "--budgets", "18", "36", "--benchmarks", "GQA")
    assert run(*options) == 0
    table = capsys.readouterr().out
    monkeypatch.setattr(paper, "measure", lambda plan: pytest.fail("it measures"))
    monkeypatch.setattr(paper, "lmms_eval_version", lambda: pytest.fail("it asks for lmms-eval"))
    written = ("--json", str(folder.parent / "all.json"), "--plot", str(folder.parent / "all.png"))
    assert run(*options, "--print", *written) == 0
    assert capsys.readouterr().out == table
    record = json.loads((folder.parent / "all.json").read_text())
    assert [row["name"] for row in record["rows"]] == ["stock", "vispruner-18", "vispruner-36"]
    assert record["rows"][1]["measured"] == {"GQA": 50.0} and record["settings"]["lmms_eval"] == "0.7.3"
    assert (folder.parent / "all.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.core
def test_all_that_is_there_is_shown_whatever_its_methods_and_budgets(
    folder: Path, asking: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--out", str(folder), "--benchmarks", "GQA")
    assert run(*common, "--methods", "vispruner", "divprune", "--budgets", "18", "36") == 0
    written = folder.parent / "all.json"
    assert run(*common, "--print", "--json", str(written)) == 0
    pruned = [f"{method}-{budget}" for method in ("divprune", "vispruner") for budget in (36, 18)]
    assert [row["name"] for row in json.loads(written.read_text())["rows"]] == ["stock", *pruned]
    assert run(*common, "--print", "--budgets", "18", "--json", str(written)) == 0
    assert [row["name"] for row in json.loads(written.read_text())["rows"]] == ["stock", "vispruner-18"]
    capsys.readouterr()


def test_what_is_not_there_cannot_be_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--out", str(folder), "--print") == 1
    assert f"{folder} has no settings.json: nothing was measured there" in capsys.readouterr().err


def test_the_help_says_what_differs_by_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        paper.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"  {name + ':':10}{benchmark.differs}" in out for name, benchmark in BENCHMARKS.items())


def test_the_docs_name_every_benchmark_and_its_task() -> None:
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    for name, benchmark in BENCHMARKS.items():
        tasks = ", ".join(f"`{task}`" for task in benchmark.tasks)
        assert f"| {name} | {tasks} | `{benchmark.metric}` | {benchmark.differs} |" in page


# Through lmms-eval

NEEDED = ("lmms-eval", "openpyxl", "nltk")
LACKING = [name for name in NEEDED if not any(importlib.metadata.distributions(name=name))]
through_lmms_eval = pytest.mark.skipif(
    bool(LACKING), reason=f"not installed: {', '.join(LACKING)}; see benchmarks/lmms_eval/README.md"
)


class Judge(BaseHTTPRequestHandler):
    """Gives half of the points to every answer."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "0.5"}}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}
        body = json.dumps({**answer, "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def judge() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


# What the captioner says for "no" and "yes", with the objects of COCO that it names: a puppy is a dog, a tree is none.
CAPTIONS = {
    "no": ("Two puppies chase mice. A mouse hides under the table.", ["dog", "mouse", "mouse", "dining table"]),
    "yes": ("A stop sign beside a tree.", ["stop sign"]),
}


def write_captioner(folder: Path) -> None:
    """Write the embedded model, which answers CHAIR's question by yes or no, with a tokenizer that writes captions."""
    shutil.copytree(BASE, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    written = [
        {"type": "Replace", "pattern": {"String": word}, "content": caption} for word, (caption, _) in CAPTIONS.items()
    ]
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [tokenizer["decoder"], *written]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    repo = {"repo_id": "someone/captioner-vispruner", "base_model": str(folder), "base_revision": None}
    options = {"architecture": "llava", "vispruner_config": {"visual_token_num": KEPT}, "weights": "full"}
    folder.with_suffix(".yaml").write_text(json.dumps(repo | options))  # JSON is YAML


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, judge: str) -> dict[str, Any]:
    """Run the command on all miniatures but one, then on all, then with a repo that prunes nothing."""
    work = tmp_path_factory.mktemp("paper")
    write_miniatures(work / "data")
    write_nltk_data(work / "nltk")
    write_captioner(work / "captioner")
    missing = work / "data" / "lmms-lab-encoder" / "ChartQA"
    missing.rename(work / "ChartQA")
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(work / "huggingface"),
        "OPENAI_API_KEY": "key",
        "OPENAI_API_URL": judge,
        "NO_PROXY": "127.0.0.1",
        "NLTK_DATA": str(work / "nltk"),
    }

    def command(*options: str, out: str = "out") -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
        arguments = [*TINY, "--out", str(work / out), "--data", str(work / "data"), "--batch-size", "8"]
        script = [sys.executable, str(ROOT / "benchmarks" / "paper.py"), *arguments, *options]
        record = work / "record.json"
        record.unlink(missing_ok=True)
        done = subprocess.run(
            [*script, "--json", str(record)], cwd=work, env=environment, capture_output=True, text=True, timeout=3600
        )
        return done, json.loads(record.read_text()) if record.exists() else {}

    first = command("--budgets", str(KEPT))
    cells = {path: path.stat().st_mtime_ns for path in (work / "out").glob("*.json")}
    (work / "ChartQA").rename(missing)
    second = command("--budgets", str(KEPT))
    later = {path: path.stat().st_mtime_ns for path in (work / "out").glob("*.json")}
    decoder = command("--methods", "fastv", "--budgets", "100", "--benchmarks", "POPE")
    plan = paper.replace(plan_of(*TINY), folder=work / "dense")
    paper.Cells(plan.folder).begin(plan.settings())
    dense = build_repo("tiny-llava-vispruner", plan.folder / "repos" / f"vispruner-{KEPT}", show_progress=False)
    config = json.loads((dense / "config.json").read_text())
    config["vispruner_config"] = {**config["vispruner_config"], "method": "none", "visual_token_num": None}
    (dense / "config.json").write_text(json.dumps(config))
    refused = command("--budgets", str(KEPT), "--benchmarks", "POPE", out="dense")
    chair = ("--model", str(work / "captioner.yaml"), "--benchmarks", "CHAIR-S", "CHAIR-I")
    captions = command(*chair, "--budgets", str(KEPT), out="captions")
    runs = {"first": first, "second": second, "decoder": decoder, "refused": refused, "captions": captions}
    return {**runs, "before": cells, "later": later, "work": work}


def figures(measured: dict[str, Any], run: str, row: int) -> dict[str, float]:
    return measured[run][1]["rows"][row]["measured"]


@through_lmms_eval
@pytest.mark.slow
def test_every_benchmark_is_measured_through_lmms_eval(measured: dict[str, Any]) -> None:
    done, record = measured["second"]
    assert done.returncode == 0, done.stderr
    nothing = "ValueError: no caption names an object of COCO, and CHAIR is the share of wrong ones"
    for row in record["rows"]:
        assert row["why"] == {"CHAIR-S": nothing, "CHAIR-I": nothing}  # this model knows shapes alone
        assert {*row["measured"], "CHAIR-S", "CHAIR-I"} == set(BENCHMARKS)
        assert row["measured"]["MM-Vet"] == 50  # the judge's word
        counted = [cell["visual_tokens"] for cell in row["cells"].values()]
        kept = FULL if row["name"] == "stock" else KEPT
        assert counted == [{"full": FULL, "kept": kept, "last": kept}] * len(counted)
        questions = {task: found["questions"] for c in row["cells"].values() for task, found in c["tasks"].items()}
        exploded = questions.pop("refcoco_bbox_rec_val")
        assert set(questions.values()) == {QUESTIONS} and exploded == 2 * QUESTIONS  # each box is described twice
    assert "| all of 144 | stock | measured |" in done.stdout and "Postprocessing" not in done.stdout


@through_lmms_eval
@pytest.mark.slow
def test_a_benchmark_that_fails_leaves_the_others_and_is_tried_again(measured: dict[str, Any]) -> None:
    done, record = measured["first"]
    assert done.returncode == 0, done.stderr
    assert all(re.search("ChartQA", row["why"]["ChartQA"]) for row in record["rows"])
    assert figures(measured, "first", 0) == {n: v for n, v in figures(measured, "second", 0).items() if n != "ChartQA"}
    assert {path.name for path in measured["later"].keys() - measured["before"].keys()} == {
        "stock--chartqa.json",
        f"vispruner-{KEPT}--chartqa.json",
    }
    assert {path: measured["later"][path] for path in measured["before"]} == measured["before"]


@through_lmms_eval
@pytest.mark.slow
def test_a_method_in_the_language_model_is_counted_where_it_drops(measured: dict[str, Any]) -> None:
    done, record = measured["decoder"]
    assert done.returncode == 0, done.stderr
    assert "9,000 questions are left" in done.stderr  # those of the stock model were asked before
    ((counted,),) = [[cell["visual_tokens"] for cell in row["cells"].values()] for row in record["rows"][1:]]
    left = (4 * 100 - FULL) // 3  # all in the first of four layers, so many in the others: 100 on average
    assert counted == {"full": FULL, "kept": FULL, "last": left}


@through_lmms_eval
@pytest.mark.slow
def test_a_repo_that_prunes_nothing_is_refused_through_lmms_eval(measured: dict[str, Any]) -> None:
    done, record = measured["refused"]
    assert done.returncode == 1 and not record
    assert "all visual tokens reached the language model" in done.stderr
    cells = sorted(path.name for path in (measured["work"] / "dense").glob("*.json"))
    assert cells == ["settings.json", f"stock--{'+'.join(POPE)}.json"]


def answers(model: Any, folder: Path, questions: list[tuple[Any, str]]) -> list[str]:
    """Return what `generate` answers, one question at a time."""
    processor = AutoProcessor.from_pretrained(folder)
    found = []
    for image, question in questions:
        text = f"USER: <image>\n{question} ASSISTANT:"
        inputs = processor(images=image, text=text, return_tensors="pt")
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        found.append(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


def loaded(base: Path, out: Path, row: int) -> tuple[Any, Path]:
    """Return the model of a row, the stock one or the pruned one, with its folder."""
    if row == 0:
        return LlavaForConditionalGeneration.from_pretrained(base), base
    repo = out / "repos" / f"vispruner-{KEPT}"
    return AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True), repo


@through_lmms_eval
@pytest.mark.slow
@pytest.mark.parametrize("row", [0, 1], ids=["stock", "pruned"])
def test_the_figures_are_those_of_the_answers_of_transformers(measured: dict[str, Any], row: int) -> None:
    model, repo = loaded(BASE, measured["work"] / "out", row)
    briefly = "\nAnswer the question using a single word or phrase."
    there = asked("exist")
    said = answers(model, repo, [(image, question.text + briefly) for _, image, question in there])
    right = [question.answer for _, _, question in there]
    hits = sum(a == b == "yes" for a, b in zip(said, right, strict=True))
    f1 = 200 * hits / (said.count("yes") + right.count("yes"))
    found = figures(measured, "second", row)
    assert found["POPE"] == pytest.approx(f1) and 0 < f1 < 100
    cells = measured["second"][1]["rows"][row]["cells"]
    assert cells["+".join(POPE)]["said_yes"] == said.count("yes") / QUESTIONS
    words = asked("color", "shape", "digit")
    plain = answers(model, repo, [(image, question.text) for _, image, question in words])
    read = [q.answer in answer for (_, _, q), answer in zip(words, plain, strict=True)]
    assert found["OCRBench"] == pytest.approx(100 * sum(read) / QUESTIONS) and any(read)


@through_lmms_eval
@pytest.mark.slow
@pytest.mark.parametrize("row", [0, 1], ids=["stock", "pruned"])
def test_chair_is_the_share_of_wrong_objects_in_the_captions(measured: dict[str, Any], row: int) -> None:
    done, record = measured["captions"]
    assert done.returncode == 0, done.stderr
    model, repo = loaded(measured["work"] / "captioner", measured["work"] / "captions", row)
    pictures = [image for _, image, _ in asked("color", "shape", "digit")]
    said = answers(model, repo, [(image, "Please describe this image in detail.") for image in pictures])
    named = [dict(CAPTIONS.values())[caption] for caption in said]
    wrong = [[name for name in names if name not in COCO_OBJECTS[n % 2]] for n, names in enumerate(named)]
    found = record["rows"][row]["measured"]
    assert found["CHAIR-S"] == pytest.approx(100 * sum(map(bool, wrong)) / QUESTIONS)
    assert found["CHAIR-I"] == pytest.approx(100 * sum(map(len, wrong)) / sum(map(len, named)))
    assert 0 < found["CHAIR-I"] < found["CHAIR-S"] < 100


@through_lmms_eval
def test_the_metrics_are_those_of_the_tasks_and_prompts_are_the_papers() -> None:
    sys.path.append(str(ROOT / "benchmarks" / "lmms_eval"))
    manager = importlib.import_module("measured_cell").task_manager()
    for benchmark in BENCHMARKS.values():
        for task in benchmark.tasks:
            metrics = {metric["metric"] for metric in manager._get_config(task)["metric_list"]}
            assert benchmark.metric in metrics
    text = manager._get_config("textvqa_val_ocr")
    prompt = text["doc_to_text"](
        {"question": "what is it?", "ocr_tokens": ["STOP", "24"]}, text["lmms_eval_specific_kwargs"]["default"]
    )
    briefly = "\nAnswer the question using a single word or phrase."
    assert prompt == f"What is it?\nReference OCR token: STOP, 24{briefly}"
    vet = manager._get_config("mmvet_plain")
    assert vet["lmms_eval_specific_kwargs"]["default"] == {"pre_prompt": "", "post_prompt": ""}
    ours, theirs = (manager._get_config(f"mmbench_cn_dev{name}") for name in ("_static", ""))
    for field in ("dataset_path", "dataset_name", "test_split", "lmms_eval_specific_kwargs"):
        assert ours[field] == theirs[field]
    score = ours["metric_list"][0]["aggregation"]
    rows = [
        {
            "index": n,
            "answer": "A",
            "prediction": said,
            "A": "red",
            "B": "blue",
            "C": "nan",
            "D": "nan",
            "category": "c",
        }
        for n, said in enumerate(["A", "B", "red", "I cannot say"])
    ]
    assert score(rows) == 50  # where no letter is found no dice are rolled


@through_lmms_eval
def test_a_judge_that_did_not_answer_is_no_zero() -> None:
    sys.path.append(str(ROOT / "benchmarks" / "lmms_eval"))
    require_judged = importlib.import_module("measured_cell").require_judged
    samples = [{"gpt_eval_score": {"score": 0.0, "eval_model": name}} for name in ("gpt-4o", "", "gpt-4o")]
    require_judged([*samples[::2], {"pope_accuracy": {}}])
    with pytest.raises(ValueError, match="the judge did not answer for 1 of 3 questions: see OPENAI_API_KEY"):
        require_judged(samples)


@through_lmms_eval
def test_a_wide_picture_becomes_a_square() -> None:
    sys.path.append(str(ROOT / "benchmarks" / "lmms_eval"))
    pads = importlib.import_module("measured_cell").PadsToSquare
    processor = AutoProcessor.from_pretrained(BASE)
    picture = wide(asked("exist")[0][1])
    pixels = pads(processor)(images=[picture], text="<image>", return_tensors="pt")["pixel_values"]
    cropped = processor(images=[picture], text="<image>", return_tensors="pt")["pixel_values"]
    assert pixels.shape == cropped.shape == (1, 3, 96, 96)
    assert pixels[..., :12, :].abs().max() < 0.02 and pixels[..., -12:, :].abs().max() < 0.02  # normalises to zero
    left = pixels[0, :, 48, 0]
    assert torch.allclose(left, pixels[0, :, 48, 4], atol=0.05) and (left - pixels[0, :, 48, 48]).abs().max() > 0.1
