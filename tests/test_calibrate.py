"""The search for the options of `vflowopt`: what it tries, finds, writes and refuses, on the embedded model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import vispruner
from vispruner.conversion import calibrate as calibration
from vispruner.conversion import cli
from vispruner.conversion.base_checkpoint import resolve_base
from vispruner.conversion.calibrate import CELLS, THRESHOLDS, CalibrationError, calibrate
from vispruner.conversion.drawn_scenes import COLORS, SHAPES, draw_scene
from vispruner.conversion.questions import ask, load_model, load_processor
from vispruner.conversion.repo_config import DEMO_CONFIG, load_repo_config
from vispruner.selectors import SELECTORS

BASE = "embedded/tiny-llava"
FEW = ["--trials", "12", "--scenes", "4"]  # so many that two of them are what the first ten suggest


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, list[dict[str, Any]]]:
    """What a search found, the file that it wrote, and all that it tried."""
    pytest.importorskip("optuna")
    out, tried = tmp_path_factory.mktemp("calibrate") / "found.yaml", []
    measure = calibration.divergence

    def note(model: Any, asked: Any, options: dict[str, Any]) -> float:
        tried.append({**options, "divergence": measure(model, asked, options), "pictures": len(asked)})
        with model.model.call_with({"method_options": options}):
            budget = model.model.encoder_options.budget(144)
            tried[-1]["held"] = model.model.layer_counts(budget)
        return tried[-1]["divergence"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "divergence", note)
        found = calibrate(out=out, trials=12, scenes=4)
    return found, out, tried


Finished = tuple[dict[str, Any], Path, list[dict[str, Any]]]


@pytest.mark.core
def test_whatever_is_tried_a_layer_holds_the_budget_on_average(finished: Finished) -> None:
    _, _, tried = finished
    assert len(tried) == 14 and [one["pictures"] for one in tried] == [3] * 12 + [1] * 2
    for one in tried:
        assert len(one["stage_shares"]) == 2 and all(0.1 <= share <= 1 for share in one["stage_shares"])
        assert CELLS[0] <= one["cell"] <= CELLS[1] and THRESHOLDS[0] <= one["global_threshold"] <= THRESHOLDS[1]
        assert len(one["held"]) == 4 and abs(sum(one["held"]) - 0.25 * 4 * 144) <= 4  # tokens are whole, in each layer
    assert len({str(one) for one in tried[:12]}) == 12


@pytest.mark.core
def test_the_best_of_the_tries_is_found_and_the_default_is_the_first(finished: Finished) -> None:
    found, _, tried = finished
    best = min(tried[:12], key=lambda one: one["divergence"])
    default = SELECTORS["vflowopt"].options
    assert {name: tried[0][name] for name in default} == {**default, "stage_shares": list(default["stage_shares"])}
    assert found["vispruner_config"]["method_options"] == {name: best[name] for name in default}
    assert found["divergence"] == {"found": best["divergence"], "default": tried[0]["divergence"]}
    assert found["divergence"]["found"] < found["divergence"]["default"]
    checked = {"found": tried[12]["divergence"], "default": tried[13]["divergence"]}
    assert found["held_out_divergence"] == checked and found["held_out_questions"] == 5 and found["questions"] == 15


@pytest.mark.core
def test_what_is_written_is_a_block_that_models_and_repos_take(finished: Finished) -> None:
    found, out, _ = finished
    text = out.read_text(encoding="utf-8")
    written = yaml.safe_load(text)
    assert written == {"vispruner_config": found["vispruner_config"]}
    assert text.startswith("# Found by vispruner calibrate ") and f"# {found['tokens']}." in text
    model = vispruner.load(str(resolve_base(BASE)), **written["vispruner_config"])
    assert model.config.vispruner_config["method_options"] == written["vispruner_config"]["method_options"]
    yaml_of_repo = out.with_name("repo.yaml")
    fields = {"repo_id": "someone/tiny", "base_model": BASE, "architecture": "llava"}
    yaml_of_repo.write_text(yaml.safe_dump(fields) + text)
    assert load_repo_config(yaml_of_repo).vispruner_config["method"] == "vflowopt"


@pytest.mark.core
def test_the_same_search_finds_the_same_and_prints_it(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    found, _, _ = finished
    assert cli.main(["calibrate", DEMO_CONFIG, *FEW, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {**found, "file": None}
    assert "calibrating" in captured.err


@pytest.mark.core
def test_own_pictures_and_questions(
    finished: Finished, photo: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo.save(tmp_path / "photo.png")
    asked = ["--question", "What is this?", "--question", "Is there a cat?"]
    out = tmp_path / "found.yml"
    base = str(resolve_base(BASE))
    arguments = [
        "calibrate",
        base,
        "--images",
        str(tmp_path / "photo.png"),
        *asked,
        "--trials",
        "2",
        "--out",
        str(out),
    ]
    assert cli.main([*arguments, "--keep-ratio", "0.5"]) == 0
    said = capsys.readouterr().out
    assert f"wrote {out}" in said and "(2 questions)" in said and "did not see" not in said
    assert yaml.safe_load(out.read_text())["vispruner_config"]["keep_ratio"] == 0.5


@pytest.mark.core
def test_the_divergence_is_that_of_the_next_token() -> None:
    base = str(resolve_base(BASE))
    model, processor = load_model(base, method="vflowopt", keep_ratio=0.25), load_processor(base)
    scene = draw_scene(0, 1)
    asked = calibration._ask_all(model, processor, [(scene.picture, scene.questions[:2])])
    options = {"stage_shares": [0.3, 0.5]}
    found = calibration.divergence(model, asked, options)
    expected = []
    for question in scene.questions[:2]:
        inputs = calibration.model_inputs(model, processor, scene.picture, question)
        with torch.no_grad():
            logits = [
                model(**inputs, vispruner_config=changes).logits[0, -1]
                for changes in ({"method": "none"}, {"method_options": options})
            ]
        true, pruned = (one.softmax(-1) for one in logits)
        expected.append(float((true * (true / pruned).log()).sum()))
    assert found == pytest.approx(sum(expected) / 2, rel=1e-3, abs=1e-6) and found > 0
    assert calibration.divergence(model, asked, {"stage_shares": [0.9, 0.9]}) != found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 1.0}, "--keep-ratio must be above 0 and below 1, got 1"),
        ({"keep_ratio": 0}, "--keep-ratio must be above 0 and below 1, got 0"),
        ({"trials": 0}, "--trials must be at least 1, got 0"),
        ({"scenes": 0}, "--scenes must be at least 1, got 0"),
        ({"images": ["photo.png"]}, "--images needs --question"),
        ({"questions": ["What?"]}, "--question needs --images"),
        ({"images": ["absent.png"], "questions": ["What?"]}, "No such file or directory: absent.png"),
        ({"out": "found.json"}, "a calibration must be written to a .yaml or .yml file"),
        ({"out": "absent/found.yaml"}, "does not exist: make"),
        ({"model": "no-such-yaml"}, "no-such-yaml"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibration, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises((ValueError, OSError), match=message):
        calibrate(**options)
    assert not list(tmp_path.iterdir())


def test_without_optuna_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(CalibrationError, match=r"pip install 'vispruner\[calibrate\]'"):
        calibrate()


@pytest.mark.core
def test_scenes_are_the_same_for_a_seed_and_their_questions_can_be_answered() -> None:
    model = load_model(str(resolve_base(BASE)), method="none")
    processor = load_processor(str(resolve_base(BASE)))
    right = 0
    for number in range(6):
        scene, again = draw_scene(0, number), draw_scene(0, number)
        assert scene.questions == again.questions and np.array_equal(scene.picture, again.picture)
        assert not np.array_equal(scene.picture, draw_scene(1, number).picture)
        color, shape = scene.questions[1].split()[4], scene.questions[0].split()[-1].rstrip("?")
        assert color in COLORS and shape in SHAPES and len(scene.questions) == len(set(scene.questions)) == 5
        right += ask(model, processor, scene.picture, scene.questions[0]) == color
        right += ask(model, processor, scene.picture, scene.questions[1]) == shape
    assert right >= 9  # of 12; by chance two
    assert draw_scene(0, 0, 336).picture.size == (336, 336)
