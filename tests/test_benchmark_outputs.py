"""The benchmarks look at what they are to write before they measure: a wrong name is one message, and no work."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest

for needed in ("sklearn", "easy_vqa"):
    pytest.importorskip(needed, reason="the benchmarks need `pip install 'vispruner[benchmarks]'`")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MEASURING = {  # what each script calls first once its options are read
    "accuracy": "run_benchmark",
    "codebook": "resolve_base",
    "dedup_step": "measure",
    "encoder_stage": "measure",
    "equal_cost": "comparisons",
    "flops": "ceilings_record",
    "foretold_pixels": "measure",
    "large_checkpoints": "tempfile",
    "latency": "measure",
    "paper": "measure",
    "report": "write_report",
    "rounding": "measure",
    "scaling": "machine",
    "selection": "machine",
    "serving": "measure",
    "train_photo": "Run",
    "serving_load": "measure",
    "train_tiny": "Run",
}
REQUIRED = {
    (script, option): ["--out", "new"]
    for script in ("train_photo", "train_tiny")
    for option in ("--features", "--json", "--work")
}
NO_TYPE = ast.keyword("type", ast.Name("str"))


def written(script: Path) -> list[tuple[str, str, list[str]]]:
    """Return (option, what reads it, the suffixes it takes) of each option that names what `script` writes."""
    found = []
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            option = ast.unparse(node.args[0]).strip("'")
            kind = ast.unparse(next(word.value for word in [*node.keywords, NO_TYPE] if word.arg == "type"))
            name, _, suffixes = kind.partition("(")
            if option in ("out", "--out", "--json", "--plot", "--work") or name.startswith(("output_", "new_")):
                found.append((option, name, [part.strip("'") for part in suffixes.strip(")").split(", ") if part]))
    return found


SCRIPTS = [path for path in sorted(BENCHMARKS.glob("*.py")) if "ArgumentParser(" in path.read_text(encoding="utf-8")]
OPTIONS = [(path.stem, *option) for path in SCRIPTS for option in written(path)]


def test_every_option_that_names_an_output_is_known() -> None:
    assert {name for name, *_ in OPTIONS} == MEASURING.keys()
    assert {kind for _, _, kind, _ in OPTIONS} == {"output_file", "output_folder", "new_folder"}
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        assert ".mkdir(parents" not in text or script.stem.startswith("train_")


@pytest.mark.parametrize(("script", "option", "kind", "suffixes"), OPTIONS, ids=lambda value: str(value))
def test_a_benchmark_refuses_what_it_could_not_write_before_it_measures(
    script: str,
    option: str,
    kind: str,
    suffixes: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module(script)

    def measured(*arguments: Any, **options: Any) -> None:
        pytest.fail("it measures before it looks at the output")

    monkeypatch.setattr(module, MEASURING[script], measured)
    monkeypatch.chdir(tmp_path)

    def said(name: str) -> str:
        arguments = [*REQUIRED.get((script, option), []), *([option] if option.startswith("-") else []), name]
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit, match="2"):
            module.main(*([] if script == "codebook" else [arguments]))
        return capsys.readouterr().err.splitlines()[-1]

    suffix = suffixes[0] if suffixes else ""
    (tmp_path / "text").write_text("")
    (tmp_path / f"folder{suffix}").mkdir()
    if kind == "output_file":
        assert f"must be written to a {' or '.join(suffixes)} file, got k.txt" in said("k.txt")
        assert f"folder{suffix} is a folder: give the name of" in said(f"folder{suffix}")
    if kind == "new_folder":
        assert "text exists and is not a folder" in said("text")
    inside = "" if kind == "output_folder" else f"/k{suffix}"
    assert "make none first" in said(f"none{inside}")
    assert "text is not a folder" in said(f"text{inside}")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != Path("folder" + suffix))
    assert "no permission to write" in said(f"folder{suffix}{inside}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"folder{suffix}", "text"]


def test_an_earlier_record_that_is_not_there_is_said_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("accuracy").parse_arguments(["--add-to", str(tmp_path / "no.json")])
    assert "no.json: there is no such file" in capsys.readouterr().err


def test_records_tables_and_plots_are_written_in_one_place() -> None:
    its_own = {'indent=1) + "\\n"': "records", '"|---"': "tables_and_plots", "matplotlib.figure": "tables_and_plots"}
    for text, module in its_own.items():
        assert {path.stem for path in BENCHMARKS.glob("*.py") if text in path.read_text(encoding="utf-8")} == {module}
    scripts = [path.read_text(encoding="utf-8") for path in BENCHMARKS.glob("*.py")]
    assert not any("pyplot" in script for script in scripts)


def test_a_row_of_a_table_has_a_cell_for_every_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    markdown_table = importlib.import_module("tables_and_plots").markdown_table
    assert markdown_table("a|b", [[1, "x"]]) == "| a | b |\n|---|---|\n| 1 | x |"
    with pytest.raises(ValueError, match="3 cells where the table has 2 columns"):
        markdown_table(["a", "b"], [[1, 2, 3]])
