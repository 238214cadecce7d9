"""The accuracy benchmark: the same questions for every row, counts that were really seen, intervals that hold."""

from __future__ import annotations

import importlib
import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vispruner

for needed in ("sklearn", "easy_vqa", "matplotlib"):
    pytest.importorskip(needed, reason="the benchmarks need `pip install 'vispruner[benchmarks]'`")

QUESTIONS = 60


@pytest.fixture(scope="module")
def accuracy() -> ModuleType:
    folder = str(Path(__file__).parent.parent / "benchmarks")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("accuracy")


def run(accuracy: ModuleType, folder: Path, *arguments: str) -> dict[str, Any]:
    files = ["--json", str(folder / "result.json"), "--plot", str(folder / "result.png")]
    common = ["--limit", str(QUESTIONS), "--processes", "1"]
    assert accuracy.main([*common, *files, *arguments]) == 0
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def result(accuracy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("accuracy")
    found = run(
        accuracy, folder, "--selectors", "none", "vispruner", "random", "downsample", "--budgets", "100", "12.5"
    )
    with Image.open(folder / "result.png") as picture:
        assert picture.width > 600
    return found


def rows(result: dict[str, Any], selector: str, budget: float) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["selector"] == selector and row["budget_percent"] == budget]


@pytest.mark.slow
def test_every_row_answers_the_same_questions_and_has_the_promised_fields(result: dict[str, Any]) -> None:
    assert {row["n"] for row in result["rows"]} == {QUESTIONS}
    assert result["seed"] == 0 and result["dataset"] == "scenes" and "torch" in result["versions"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])
    for row in result["rows"]:
        low, high = row["ci95"]
        assert low <= row["accuracy"] <= high
        by_type = sum(row["accuracy_by_type"][kind] * count for kind, count in row["n_by_type"].items())
        assert math.isclose(by_type / QUESTIONS, row["accuracy"])


@pytest.mark.slow
def test_the_kv_cache_held_the_budget(result: dict[str, Any]) -> None:
    for row in rows(result, "vispruner", 12.5) + rows(result, "random", 12.5):
        assert row["kv_visual_tokens"] == row["visual_token_num"] == 18
    for row in rows(result, "none", 100):
        assert row["kv_visual_tokens"] == 144
    for row in rows(result, "downsample", 12.5):
        assert row["kv_visual_tokens"] == 16  # the nearest smaller square grid


@pytest.mark.slow
def test_all_ratios_and_both_position_policies_take_part(result: dict[str, Any]) -> None:
    seen = {(row["important_ratio"], row["position_policy"]) for row in rows(result, "vispruner", 12.5)}
    assert seen == {(ratio, policy) for ratio in (0, 0.25, 0.5, 0.75, 1) for policy in ("renumber", "original")}


@pytest.mark.slow
def test_the_trained_model_answers_and_pruning_costs_something(result: dict[str, Any]) -> None:
    """Not a claim about methods: only that the measurement can tell a good model from one that sees little."""
    (dense,) = rows(result, "none", 100)
    assert dense["accuracy"] > 0.9
    assert max(row["accuracy"] for row in rows(result, "random", 12.5)) < dense["accuracy"]
    assert dense["object_recall"] == 1.0
    assert all(row["object_recall"] < 1.0 for row in rows(result, "random", 12.5))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_figures(accuracy: ModuleType, result: dict[str, Any], tmp_path: Path) -> None:
    again = run(accuracy, tmp_path, "--selectors", "random", "--budgets", "12.5")
    assert rows(again, "random", 12.5) == rows(result, "random", 12.5)


def test_a_record_grows_by_further_methods_about_the_same_questions(accuracy: ModuleType) -> None:
    def row(selector: str, share: float) -> dict[str, Any]:
        return {"selector": selector, "budget_percent": 50, "important_ratio": None, "position_policy": None} | {
            "accuracy": share
        }

    about = dict.fromkeys(("dataset", "seed", "base_model", "questions", "pictures", "full_visual_tokens"), 1)
    about |= dict.fromkeys(("date", "versions", "processes", "minutes"), "then")
    record = {**about, "rows": [row("none", 0.9), row("random", 0.5)]}
    further = {**about, "date": "now", "rows": [row("none", 0.9), row("scope", 0.6), row("random", 0.4)]}
    grown = accuracy.with_rows_of(record, further)
    assert [(r["selector"], r["accuracy"]) for r in grown["rows"]] == [("none", 0.9), ("random", 0.4), ("scope", 0.6)]
    assert grown["date"] == "then" and grown["further_runs"][0]["date"] == "now"
    assert grown["further_runs"][0]["selectors"] == ["none", "scope", "random"]
    pruned_alone = {"rows": [row("random", 0.5), row("scope", 0.6)]}
    assert len(accuracy.with_rows_of(record, {**further, **pruned_alone})["rows"]) == 3
    other_model = {"rows": [row("none", 0.8), row("random", 0.5)]}
    for wrong in ({"seed": 2}, other_model, {"rows": [row("random", 0.4)]}, {"rows": [row("scope", 0.6)]}):
        with pytest.raises(accuracy.BenchmarkError, match=r"differs in seed|measured some of its rows again"):
            accuracy.with_rows_of(record, {**further, **wrong})


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"a": 1}, "earlier.json: it is no record of accuracy.py, which has dataset, seed, base_model"),
        ({"seed": 1}, "the record is of another run: it differs in seed"),
        ({"dataset": "photos"}, "it differs in dataset"),
        ({"questions": 8}, "it differs in questions"),
    ],
)
def test_a_record_that_cannot_grow_is_refused_before_anything_is_measured(
    accuracy: ModuleType,
    record: dict[str, Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = {"dataset": "scenes", "seed": 0, "base_model": "", "questions": 2, "pictures": 1, "full_visual_tokens": 144}
    content = record if "a" in record else {**own, "rows": [], **record}
    (earlier := tmp_path / "earlier.json").write_text(json.dumps(content))
    monkeypatch.setattr(accuracy, "run_benchmark", lambda *_: pytest.fail("it measured"))
    assert accuracy.main(["--limit", "2", "--add-to", str(earlier), "--json", str(tmp_path / "grown.json")]) == 2
    assert said in capsys.readouterr().err


def test_a_run_that_measures_no_row_of_the_record_again_is_refused_before_it_answers(
    accuracy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    about = {"dataset": "scenes", "seed": 0, "base_model": "", "questions": 2, "pictures": 1}
    about["full_visual_tokens"] = 144
    row = {"selector": "random", "budget_percent": 25.0, "important_ratio": None, "position_policy": "renumber"}
    (earlier := tmp_path / "earlier.json").write_text(json.dumps({**about, "rows": [row]}))
    monkeypatch.setattr(accuracy, "measure", lambda *_: pytest.fail("it measured"))
    with pytest.raises(SystemExit):
        accuracy.main(["--add-to", str(earlier)])
    assert "say by --json where the whole record is to be written" in capsys.readouterr().err
    asked = ["--limit", "2", "--selectors", "random", "--add-to", str(earlier)]
    asked += ["--json", str(tmp_path / "grown.json"), "--budgets"]
    assert accuracy.main([*asked, "50"]) == 2
    assert "measured some of its rows again" in capsys.readouterr().err
    with pytest.raises(pytest.fail.Exception, match="it measured"):
        accuracy.main([*asked, "50", "25"])


def test_a_tower_with_registers_is_refused(accuracy: ModuleType, tiny_llava_repo: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_llava_repo / "config.json").read_text())
    vision = {"model_type": "dinov2_with_registers", "num_register_tokens": 4}
    vision |= {k: v for k, v in config["vision_config"].items() if k not in ("model_type", "intermediate_size")}
    shutil.copytree(tiny_llava_repo, own := tmp_path / "repo")
    llava = vispruner.architecture_of("llava")
    stored = {"vispruner_config": {"visual_token_num": 18}, "vision_config": vision}
    llava.model_class(llava.config_class.from_dict({**config, **stored})).save_pretrained(own)
    with pytest.raises(accuracy.BenchmarkError, match="has 4 register tokens, which stay beside every budget"):
        accuracy.PublishedModel(own)


def test_ratios_are_numbers_or_decided_by_the_image(accuracy: ModuleType) -> None:
    assert accuracy.parse_arguments(["--ratios", "0", "0.5", "auto"]).ratios == [0.0, 0.5, "auto"]
    found = accuracy.variants(["vispruner", "random"], [50], accuracy.SELECTORS, 144, (None,), ["auto", 0.5])
    assert [row.options(0, 0).get("important_ratio") for row in found] == ["auto", 0.5, None]
    names = [accuracy.label({**vars(row), "position_policy": None}) for row in found]
    assert names == ["vispruner r=auto", "vispruner r=0.5", "random"]


def test_stages_within_the_encoder_are_rows_of_their_own(accuracy: ModuleType) -> None:
    stages = accuracy.parse_arguments(["--encoder-stages", "1:0.5", "3:0.3"]).encoder_stages
    assert stages == [(1, 0.5), (3, 0.3)]
    found = accuracy.variants(["vispruner"], [100, 50, 25], accuracy.SELECTORS, 144, ("renumber",), [0.5], stages)
    staged = [(row.visual_token_num, row.encoder_stage) for row in found if row.encoder_stage]
    assert staged == [(36, (1, 0.5)), (36, (3, 0.3))]  # what leaves no more than the budget is no row
    assert found[-1].options(0, 0)["encoder_stage"] == {"layer": 3, "keep_ratio": 0.3}
    assert all(row.options(0, 0)["encoder_stage"] is None for row in found if not row.encoder_stage)
    names = {accuracy.label({**vars(row), "encoder_stage": row.encoder_stage}) for row in found}
    assert names == {
        "vispruner r=0.5",
        "vispruner, 50% behind encoder layer 1",
        "vispruner, 30% behind encoder layer 3",
    }


def test_layers_whose_attention_ranks_are_rows_of_their_own(accuracy: ModuleType) -> None:
    layers = accuracy.parse_arguments(["--attention-layers", "3", "11"]).attention_layers
    found = accuracy.variants(
        ["vispruner", "random"], [100, 25], accuracy.SELECTORS, 144, ("renumber",), [0.5, 1], layers=layers
    )
    ranked = [(row.attention_layer, row.important_ratio) for row in found if row.attention_layer is not None]
    assert ranked == [(3, 0.5), (3, 1), (11, 0.5), (11, 1)]  # with all tokens nothing is ranked
    assert [row.options(0, 0)["attention_layer"] for row in found] == [row.attention_layer for row in found]
    assert accuracy.label(vars(found[-1]) | {"encoder_stage": None}) == "vispruner r=1, ranked in encoder layer 11"
    assert accuracy.Variant("none", 100, 144).options(0, 0)["attention_layer"] is None  # of the row before


@pytest.mark.core
def test_two_methods_at_once_hold_the_mean_that_is_asked_for(accuracy: ModuleType) -> None:
    (row,) = accuracy.variants(["vispruner+pyramiddrop"], [25], accuracy.SELECTORS, 144, ratios=[0.5])
    assert (row.important_ratio, row.position_policy) == (0.5, None)  # the second says which positions tokens have
    with accuracy.published_repo(None) as folder:
        published = accuracy.PublishedModel(folder)
        samples = accuracy.questions("scenes", 3, 2)
        answers = published.answer(published.inputs(samples), row.options(0, 0), row.visual_token_num, 2)
        stages = published.model.config.vispruner_config["stage_token_nums"]
    assert answers.kv_visual_tokens == 36 == row.visual_token_num
    assert stages == [77, 38, 19, 9] and 0 <= 36 - sum(stages) / 4 < 1  # each stage leaves half
    assert answers.kept.shape == (2, 9)


def test_a_gain_is_that_of_the_same_questions(accuracy: ModuleType) -> None:
    other = np.array([1.0, 0.0] * 50)
    gain, (low, high) = accuracy.paired_gain(other, other, np.arange(100))
    assert (gain, low, high) == (0, 0, 0)
    right = other.copy()
    right[1:21:2] = 1  # ten more
    gain, (low, high) = accuracy.paired_gain(right, other, np.arange(100))
    assert gain == pytest.approx(0.1) and high - 0.1 == pytest.approx(1.96 * math.sqrt(0.1 * 0.9 / 100), rel=0.02)
    _, (of_few, _) = accuracy.paired_gain(right, other, np.arange(100) // 10)  # all ten are of the first two pictures
    assert of_few < low < gain


@pytest.mark.parametrize("wrong", ["3", "a:0.5", "3:half"])
def test_a_stage_is_a_layer_and_a_share(accuracy: ModuleType, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accuracy.parse_arguments(["--encoder-stages", wrong])
    assert "must be LAYER:SHARE such as 3:0.5" in capsys.readouterr().err


def test_wilsons_interval(accuracy: ModuleType) -> None:
    low, high = accuracy.wilson(0.5, 100)
    assert low == pytest.approx(0.4038, abs=1e-4) and high == pytest.approx(0.5962, abs=1e-4)
    assert accuracy.wilson(0.0, 50)[0] == 0.0 and accuracy.wilson(1.0, 50)[1] == pytest.approx(1.0)


def test_a_right_answer_is_the_whole_word(accuracy: ModuleType) -> None:
    assert accuracy.is_right(" Red\n", "red")
    assert not accuracy.is_right("reddish", "red") and not accuracy.is_right("", "red")


def test_an_unknown_selector_is_refused(accuracy: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy.main(["--selectors", "nonsense", "--limit", "5"]) == 2
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.core
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--selectors", "vispruner+divprune"], "one in the language model, got 'vispruner+divprune'"),
        (["--selectors", "vispruner+vflowopt"], "one in the language model, got 'vispruner+vflowopt'"),
        (["--selectors", "fastv+vispruner"], "one in the language model, got 'fastv+vispruner'"),
        (["--selectors", "vispruner+fastv+dart"], "one in the language model, got 'vispruner+fastv+dart'"),
        (["--encoder-stages", "3:0.1"], "--encoder-stages 3:0.1 leaves no more patches than every budget keeps"),
        (["--attention-layers", "3", "--budgets", "100"], "--attention-layers: with all tokens nothing is ranked"),
    ],
)
def test_what_no_row_would_measure_is_refused(
    accuracy: ModuleType, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--selectors", "vispruner", "--budgets", "12.5", "--limit", "2", "--processes", "1"]
    assert accuracy.main([*common, *arguments]) == 2  # the last of an option given twice counts
    assert said in capsys.readouterr().err


@pytest.mark.core
def test_a_method_of_two_places_is_said_to_keep_what_both_leave(accuracy: ModuleType, tmp_path: Path) -> None:
    rows = run(accuracy, tmp_path, "--selectors", "todre", "vflowopt", "--budgets", "50")["rows"]
    assert {row["selector"] for row in rows} == {"todre", "vflowopt"}
    recall = {row["selector"]: row["object_recall"] for row in rows}
    assert recall["todre"] == 0 and 0 < recall["vflowopt"] <= 1  # the first leaves none in the last layers
