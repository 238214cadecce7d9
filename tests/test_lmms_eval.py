"""lmms-eval, by the command of its README, gives the demo repo the answers that transformers gives, and prunes."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vispruner.conversion.build import build_repo

try:
    importlib.metadata.version("lmms-eval")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("lmms-eval is not installed: see benchmarks/lmms_eval/README.md", allow_module_level=True)

# Appended, not inserted: a folder in it is called lmms_eval like the package.
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from datasets import Dataset
from photos import generate_photo
from scenes import Question, generate_scene

ROOT = Path(__file__).parent.parent
TASK = ROOT / "benchmarks" / "lmms_eval"
QUESTIONS, BATCH = 320, 32
KEPT, FULL = 18, 144

# What the command runs, noting whose forward is called and how long each prefilled KV cache is.
WATCHED = """
import json, sys
from torch.nn.modules.module import register_module_forward_hook
from vispruner.stock_versions import CACHE
models, prefills = set(), []
def note(module, inputs, output):
    name = type(module).__name__
    if name.endswith("ForConditionalGeneration"):
        models.add((type(module).__module__.split(".")[0], name, str(module.dtype)))
    elif name == "LlamaModel" and output[CACHE].get_seq_length() == output.last_hidden_state.shape[1]:
        prefills.append(output[CACHE].get_seq_length())
register_module_forward_hook(note)
notes, script, *arguments = sys.argv[1:]
sys.path.insert(0, script.rpartition("/")[0])
import run_lmms_eval
sys.argv = [script, *arguments]
run_lmms_eval.register()
run_lmms_eval.main()
json.dump({"models": sorted(models), "prefills": prefills}, open(notes, "w"))
"""


def readme_requirements() -> list[Requirement]:
    """Return what the README's steps install."""
    lines = re.findall(r"^pip install (.*)$", (TASK / "README.md").read_text(), flags=re.MULTILINE)
    return [Requirement(word) for line in lines for word in shlex.split(line) if not word.startswith("-")]


def test_what_the_readme_says_to_install_is_installed() -> None:
    requirements = readme_requirements()
    assert {"lmms-eval", "filelock", "datasets"} <= {requirement.name for requirement in requirements}
    for requirement in requirements:
        installed = importlib.metadata.version(requirement.name)
        assert requirement.specifier.contains(installed), f"{requirement}, by the README; {installed} is installed"


def readme_command() -> list[str]:
    """Return the words of the README's command after `python`."""
    blocks = re.findall(r"^```\n(python .*?)^```$", (TASK / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    (command,) = blocks
    return shlex.split(command.replace("\\\n", " "))[1:]


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo repo, which keeps an eighth of the visual tokens."""
    out = tmp_path_factory.mktemp("lmms") / "tiny-llava-vispruner"
    return build_repo("tiny-llava-vispruner", out, show_progress=False)


@pytest.fixture(scope="module")
def lmms_run(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict, list[dict]]:
    """Run the README's command on the first questions; return what was noted, its results and its samples."""
    return evaluated(repo, "vispruner_scenes", QUESTIONS, tmp_path_factory.mktemp("lmms-run"))


def evaluated(repo: Path, task: str, limit: int, work: Path) -> tuple[dict, dict, list[dict]]:
    changed = {"vispruner_scenes": task, "pretrained=tiny-llava-vispruner,": f"pretrained={repo},"}
    words = readme_command()
    for before, after in changed.items():
        words = [word.replace(before, after) for word in words]
    words += ["--limit", str(limit), "--output_path", str(work / "out"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "huggingface")}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(work / "notes.json"), *words],
        cwd=ROOT,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    # It catches what went wrong and ends with status 0.
    assert done.returncode == 0 and "Error during evaluation" not in done.stdout + done.stderr, done.stderr
    (results,) = (work / "out").rglob("*_results.json")
    (samples,) = (work / "out").rglob("*_samples_*.jsonl")
    answered = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads((work / "notes.json").read_text()), json.loads(results.read_text()), answered


@pytest.fixture(scope="module")
def asked() -> list[tuple[Image.Image, Question]]:
    """The same questions, straight from the scenes."""
    scenes = (generate_scene("test", 0, index) for index in range(QUESTIONS))
    return [(scene.image, question) for scene in scenes for question in scene.questions][:QUESTIONS]


@pytest.fixture(scope="module")
def transformers_run(repo: Path, asked: list[tuple[Image.Image, Question]]) -> tuple[list[str], list[int]]:
    """Return the answers of the published repo, and the length of every batch's prompt before pruning."""
    return answered_by_transformers(repo, asked)


def answered_by_transformers(repo: Path, asked: list[tuple[Image.Image, Question]]) -> tuple[list[str], list[int]]:
    processor = AutoProcessor.from_pretrained(repo)
    model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True)
    answers, lengths = [], []
    for start in range(0, len(asked), BATCH):
        batch = asked[start : start + BATCH]
        texts = [f"USER: <image>\n{question.text} ASSISTANT:" for _, question in batch]
        inputs = processor(images=[image for image, _ in batch], text=texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        lengths.append(inputs["input_ids"].shape[1])
        answers += processor.batch_decode(tokens[:, lengths[-1] :], skip_special_tokens=True)
    return answers, lengths


@pytest.mark.slow
def test_lmms_eval_gets_the_answers_that_transformers_gives(
    lmms_run: tuple[dict, dict, list[dict]],
    transformers_run: tuple[list[str], list[int]],
    asked: list[tuple[Image.Image, Question]],
) -> None:
    _, results, samples = lmms_run
    answers, _ = transformers_run
    by_question = sorted(samples, key=lambda sample: sample["doc_id"])
    assert [sample["input"] for sample in by_question] == [question.text for _, question in asked]
    assert [sample["target"] for sample in by_question] == [question.answer for _, question in asked]
    assert [sample["filtered_resps"].strip() for sample in by_question] == [answer.strip() for answer in answers]
    right = [answer.strip() == question.answer for answer, (_, question) in zip(answers, asked, strict=True)]
    assert 0.8 < sum(right) / QUESTIONS < 1  # the trained checkpoint, with too few tokens to be always right
    assert results["results"]["vispruner_scenes"]["accuracy,none"] == pytest.approx(sum(right) / QUESTIONS, abs=1e-12)


@pytest.mark.slow
def test_lmms_eval_ran_the_pruned_model(
    lmms_run: tuple[dict, dict, list[dict]], transformers_run: tuple[list[str], list[int]]
) -> None:
    notes, _, _ = lmms_run
    _, lengths = transformers_run
    assert notes["models"] == [["transformers_modules", "VisPrunerLlavaForConditionalGeneration", "torch.float32"]]
    assert notes["prefills"] == [length - FULL + KEPT for length in lengths]


@pytest.mark.photo
@pytest.mark.parametrize("dataset", ["scenes", "photos"])
def test_the_task_asks_what_accuracy_asks(dataset: str) -> None:
    spec = importlib.util.spec_from_file_location("generated_task", TASK / "generated_task.py")
    task = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(task)
    chosen = json.loads((TASK / f"{dataset}.json").read_text())
    assert (chosen["dataset"], chosen["split"], chosen["seed"]) == (dataset, "test", 0)
    asked = task.questions(Dataset.from_list([{**chosen, "questions": 40}]))
    expected = importlib.import_module("accuracy").questions(dataset, 0, 40)
    assert [(row["question"], row["answer"]) for row in asked] == [(sample.text, sample.answer) for sample in expected]
    assert [task.picture(row)[0].tobytes() for row in asked] == [sample.image.tobytes() for sample in expected]


@pytest.mark.slow
@pytest.mark.photo
def test_lmms_eval_asks_a_real_tower_about_photographs(tmp_path: Path) -> None:
    """The recorded run asked as many questions as the task; the first 24 are enough to see that they are the same."""
    count, kept = 24, 64
    record = json.loads((ROOT / "benchmarks" / "results" / "photos-seed0.json").read_text())
    assert record["questions"] == json.loads((TASK / "photos.json").read_text())["questions"]
    repo = build_repo("photo-llava-vispruner", tmp_path / "repo", show_progress=False)
    notes, results, samples = evaluated(repo, "vispruner_photos", count, tmp_path)
    photos = (generate_photo("test", 0, index) for index in range(count))
    asked = [(photo.image, question) for photo in photos for question in photo.questions][:count]
    answers, lengths = answered_by_transformers(repo, asked)
    by_question = sorted(samples, key=lambda sample: sample["doc_id"])
    assert [sample["input"] for sample in by_question] == [question.text for _, question in asked]
    assert [sample["filtered_resps"].strip() for sample in by_question] == [answer.strip() for answer in answers]
    right = sum(answer.strip() == question.answer for answer, (_, question) in zip(answers, asked, strict=True))
    assert 0 < right < count
    assert results["results"]["vispruner_photos"]["accuracy,none"] == pytest.approx(right / count, abs=1e-12)
    assert notes["models"] == [["transformers_modules", "VisPrunerLlavaForConditionalGeneration", "torch.float32"]]
    assert notes["prefills"] == [length - record["full_visual_tokens"] + kept for length in lengths]
