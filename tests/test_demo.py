"""The demo: the newcomer's whole path, with figures that are read off the run and answers that are true."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoProcessor

import vispruner
from vispruner.conversion.demo import (
    RESULTS,
    Answered,
    DemoError,
    Measured,
    answer_report,
    report,
    require_pruning,
    run_demo,
)
from vispruner.conversion.picture import view_kept_patches
from vispruner.conversion.prefill_cost import prefill_flops
from vispruner.conversion.questions import SCENE, Question, ask, is_right, judged, scene_questions

QUESTION_TYPES = {"color", "shape", "digit", "exist", "count", "where", "relation"}


class Finished(NamedTuple):
    """One demo with default options: its folder, what it returned, what it printed."""

    out: Path
    results: dict[str, Any]
    printed: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    out = tmp_path_factory.mktemp("demo") / "vispruner-demo"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        results = run_demo(out)
    return Finished(out, results, printed.getvalue())


def measured(**changes: Any) -> Measured:
    run = Measured(
        visual_tokens=576,
        prompt_tokens=600,
        kv_tokens=600,
        kv_bytes=2**20,
        prefill_flops=10**9,
        seconds=dict.fromkeys(("vision", "select", "project", "prefill", "decode", "whole"), 0.5),
    )
    return dataclasses.replace(run, **changes)


@pytest.mark.core
def test_visual_tokens_and_cache_fall_by_the_same_number(finished: Finished) -> None:
    results = finished.results
    unpruned, pruned = results["unpruned"], results["pruned"]
    assert (unpruned["visual_tokens"], pruned["visual_tokens"]) == (144, 18)
    assert unpruned["kv_tokens"] - pruned["kv_tokens"] == 144 - 18
    assert unpruned["kv_tokens"] == unpruned["prompt_tokens"] == pruned["prompt_tokens"]


@pytest.mark.core
def test_operations_are_those_of_the_measured_lengths(finished: Finished) -> None:
    results = finished.results
    config = vispruner.VisPrunerLlavaConfig.from_pretrained(finished.out / "repo")
    for run in (results["unpruned"], results["pruned"]):
        assert run["prefill_flops"] == prefill_flops(config, run["kv_tokens"], run["visual_tokens"])
    assert results["pruned"]["prefill_flops"] < 0.2 * results["unpruned"]["prefill_flops"]


@pytest.mark.core
def test_every_stage_took_time_and_only_pruning_selects(finished: Finished) -> None:
    results = copy.deepcopy(finished.results)
    assert results["unpruned"]["seconds"].pop("select") == 0
    for run in (results["unpruned"], results["pruned"]):
        stages = run["seconds"]
        assert all(seconds > 0 for seconds in stages.values())
        assert stages["vision"] + stages["project"] + stages["prefill"] < stages["whole"]


@pytest.mark.core
def test_questions_of_every_type_are_answered_right_with_an_eighth_of_the_tokens(
    finished: Finished,
) -> None:
    answers = finished.results["answers"]
    assert {asked["question"]["type"] for asked in answers} == QUESTION_TYPES
    expected = [asked["question"]["answer"] for asked in answers]
    right = {
        name: sum(is_right(asked[name], answer) for asked, answer in zip(answers, expected, strict=True))
        for name in ("unpruned", "pruned")
    }
    # All ten are; one may turn where another processor rounds otherwise.
    assert right["unpruned"] >= len(answers) - 1
    assert right["pruned"] >= len(answers) - 1
    total = next(line for line in finished.printed.splitlines() if line.startswith("right answers"))
    assert total.split()[2:] == [str(len(answers)), str(right["unpruned"]), str(right["pruned"])]


@pytest.mark.core
def test_the_pruned_answers_come_from_the_picture(finished: Finished) -> None:
    """What lies on the right of the scene lies on the left of its mirror image, and the answers follow."""
    model = vispruner.load(str(finished.out / "repo")).eval()
    processor = AutoProcessor.from_pretrained(finished.out / "repo")
    with Image.open(SCENE) as scene:
        pictures = [scene.convert("RGB"), ImageOps.mirror(scene.convert("RGB"))]
    asked = ("Where is the orange square?", "Is the digit left of the orange square?")
    answers = [[ask(model, processor, picture, question) for question in asked] for picture in pictures]
    assert answers == [["top-right", "yes"], ["top-left", "no"]]


@pytest.mark.core
def test_every_question_is_printed_with_the_true_and_both_given_answers(finished: Finished) -> None:
    for asked in finished.results["answers"]:
        truth = asked["question"]["answer"]
        (line,) = (row for row in finished.printed.splitlines() if row.startswith(asked["question"]["text"]))
        given = [judged(asked["unpruned"], truth), judged(asked["pruned"], truth)]
        assert line.removeprefix(asked["question"]["text"]).split() == " ".join([truth, *given]).split()


@pytest.mark.core
def test_it_says_that_the_embedded_model_is_a_toy(finished: Finished) -> None:
    assert "a toy of 2.2 M parameters, trained on drawn scenes" in finished.printed


def test_the_scene_is_the_first_of_the_test_split() -> None:
    pytest.importorskip("sklearn")
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    from scenes import generate_scene

    scene = generate_scene("test", 0, 0)
    assert scene_questions() == [Question(asked.text, asked.type, asked.answer) for asked in scene.questions]
    with Image.open(SCENE) as shipped:
        difference = np.asarray(shipped, dtype=int) - np.asarray(scene.image, dtype=int)
    assert np.abs(difference).max() <= 1  # the last bit of a sum may differ between machines


def test_the_stored_scene_says_where_it_came_from() -> None:
    stored = json.loads(SCENE.with_suffix(".json").read_text())
    assert (stored["split"], stored["seed"], stored["index"]) == ("test", 0, 0)


@pytest.mark.core
def test_it_leaves_a_verified_repo_a_picture_and_its_figures(finished: Finished) -> None:
    out, results, printed = finished
    assert sorted(path.name for path in out.iterdir()) == ["demo.json", "demo.png", "repo"]
    assert "verified:" in printed
    assert json.loads((out / RESULTS).read_text())["pruned"]["kv_tokens"] == results["pruned"]["kv_tokens"]
    with Image.open(out / "demo.png") as picture:
        assert picture.width > 4 * 300  # the unpruned scene and three budgets


@pytest.mark.core
def test_the_installed_code_works_beside_the_copy_that_a_repo_brought(finished: Finished, photo: Image.Image) -> None:
    """The demo ran the repo's own code in this process; `vispruner.load` must not trip over it."""
    model = vispruner.load(str(finished.out / "repo"))
    (tile,) = view_kept_patches(model, AutoProcessor.from_pretrained(finished.out / "repo"), photo)
    assert int(tile.kept.sum()) == 18


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "thesis.tex").write_text("years of work")
    with pytest.raises(DemoError, match="holds files that no demo wrote"):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["repo", "thesis.tex"]


@pytest.mark.slow
def test_a_built_repo_another_photo_and_another_budget(finished: Finished, tmp_path: Path, photo: Image.Image) -> None:
    photo.rotate(90, expand=True).save(tmp_path / "turned.png")
    repo = finished.out / "repo"
    before = {path.name: path.stat().st_mtime_ns for path in repo.iterdir()}
    results = run_demo(tmp_path / "out", image=tmp_path / "turned.png", repo=repo, visual_token_num=32)
    assert results["pruned"]["visual_tokens"] == 32
    assert results["picture"] == "turned.png"
    assert [asked["question"]["text"] for asked in results["answers"]] == ["What is in this picture?"]
    assert {path.name: path.stat().st_mtime_ns for path in repo.iterdir()} == before
    assert not (tmp_path / "out" / "repo").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "answer"), [("Where is the orange square?", "top-right"), ("Is there a cat?", None)]
)
def test_a_question_of_your_own_is_asked_alone(
    question: str, answer: str | None, finished: Finished, tmp_path: Path
) -> None:
    """The repo is the embedded model's, so the picture is the scene; truths are known for its own questions."""
    results = run_demo(tmp_path / "out", question=question, repo=finished.out / "repo")
    assert results["picture"] == "scene.png"
    assert [(asked["question"]["text"], asked["question"]["answer"]) for asked in results["answers"]] == [
        (question, answer)
    ]


@pytest.mark.slow
def test_a_llava_next_base_and_a_second_run_in_the_same_folder(tmp_path: Path, tiny_llava_next_repo: Path) -> None:
    for budget in (4, 2):
        results = run_demo(tmp_path / "out", base=str(tiny_llava_next_repo), visual_token_num=budget)
        assert results["pruned"]["visual_tokens"] == 5 * budget  # the photo is five tiles
        assert results["picture"] == "chelsea.jpg"
    assert results["unpruned"]["kv_tokens"] - results["pruned"]["kv_tokens"] == (
        results["unpruned"]["visual_tokens"] - 5 * 2
    )


def test_a_base_and_a_repo_are_too_much(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="give either --base"):
        run_demo(tmp_path / "out", base="x", repo="y")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_below_one_is_refused_before_anything_is_written(budget: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vispruner_config\.visual_token_num must be an integer >= 1"):
        run_demo(tmp_path / "out", visual_token_num=budget)
    assert not (tmp_path / "out").exists()


def test_a_base_of_another_kind_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = tmp_path / "bert"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type 'bert' is not supported"):
        run_demo(tmp_path / "out", base=str(base))
    assert not (tmp_path / "out").exists()


def test_pruning_that_does_nothing_is_an_error() -> None:
    with pytest.raises(DemoError, match="nothing was pruned: 576 of 576"):
        require_pruning(measured(), measured())


def test_a_cache_that_did_not_fall_is_an_error() -> None:
    with pytest.raises(DemoError, match="512 visual tokens were dropped, but the cache fell from 600 to 600"):
        require_pruning(measured(), measured(visual_tokens=64))
    require_pruning(measured(), measured(visual_tokens=64, kv_tokens=88))


def test_an_unpruned_run_that_caches_less_than_its_prompt_is_an_error() -> None:
    with pytest.raises(DemoError, match="should cache its whole prompt of 600 tokens"):
        require_pruning(measured(kv_tokens=590), measured(visual_tokens=64, kv_tokens=78))


def test_report_gives_ratios_to_the_unpruned_model() -> None:
    table = report(measured(), measured(visual_tokens=64, kv_tokens=88, prefill_flops=10**8))
    ratios = {line[:32].strip(): line.split()[-1] for line in table.splitlines() if line[:1].isalpha()}
    assert ratios["visual tokens"] == "0.111"
    assert ratios["KV cache, tokens"] == "0.147"
    assert ratios["prefill, GFLOPs"] == "0.100"


def test_answers_without_a_known_truth_are_not_judged() -> None:
    printed = answer_report([Answered(Question("What is this?"), "a cat", "a dog")])
    assert printed.splitlines() == ["", "What is this?", "answer, unpruned: a cat", "answer, pruned:   a dog"]


@pytest.mark.parametrize(
    ("answer", "mark"), [("Orange ", "(right)"), ("orange square", "(wrong)"), ("red", "(wrong)"), ("", "(wrong)")]
)
def test_an_answer_is_right_when_it_is_the_true_word_and_no_other(answer: str, mark: str) -> None:
    assert judged(answer, "orange").endswith(mark)


@pytest.mark.core
def test_the_number_of_threads_is_restored(finished: Finished) -> None:
    assert torch.get_num_threads() == 1  # conftest's
