"""Saving and pushing: a pruned model carries its code, and comes back pruned in a process without this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, PreTrainedModel

import vispruner
from vispruner import ARCHITECTURES, code_files

KEPT = {"llava": 6, "llava_next": 4}
QUESTION = "What is it?"
GENERATION = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(scope="module", params=list(KEPT))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(architecture: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue({"llava": "tiny_llava_repo", "llava_next": "tiny_llava_next_repo"}[architecture])


@pytest.fixture(scope="module")
def processor(base: Path) -> Any:
    return AutoProcessor.from_pretrained(base)


@pytest.fixture(scope="module")
def model(base: Path, architecture: str) -> PreTrainedModel:
    return vispruner.load(base, visual_token_num=KEPT[architecture], important_ratio=0.25)


@pytest.fixture(scope="module")
def prompt(processor: Any, photo: Image.Image) -> dict[str, torch.Tensor]:
    return processor(text=f"USER: <image>\n{QUESTION} ASSISTANT:", images=photo, return_tensors="pt")


@pytest.fixture(scope="module")
def saved(model: PreTrainedModel, processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "repo"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: PreTrainedModel, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**prompt).logits


def assert_carries_its_code(files: dict[str, bytes], architecture: str) -> None:
    """`files` are those of a repo by name: exactly the published code, and a config.json that leads to it."""
    assert {name: content for name, content in files.items() if name.endswith(".py")} == {
        file.name: file.read_bytes() for file in code_files(architecture)
    }
    config = json.loads(files["config.json"])
    assert config["auto_map"] == vispruner.auto_map(architecture) and len(config["auto_map"]) == 4
    assert config["architectures"] == [ARCHITECTURES[architecture].model_class.__name__]
    assert config["model_type"] == architecture
    assert config["vispruner_config"]["visual_token_num"] == KEPT[architecture]
    assert config["vispruner_config"]["important_ratio"] == 0.25
    assert "vispruner_config" not in json.loads(files["generation_config.json"])


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_saved_model_is_a_full_remote_code_repo(saved: Path, architecture: str) -> None:
    assert_carries_its_code(contents(saved), architecture)


def test_a_saved_model_comes_back_with_the_same_logits(
    saved: Path, model: PreTrainedModel, prompt: dict[str, torch.Tensor]
) -> None:
    again, info = type(model).from_pretrained(saved, output_loading_info=True)
    assert not any(info.values()), info
    assert again.config.vispruner_config == model.config.vispruner_config
    assert torch.equal(logits(again, prompt), logits(model, prompt))
    assert torch.equal(logits(vispruner.load(saved), prompt), logits(model, prompt))


@pytest.mark.core
def test_saving_twice_changes_nothing(saved: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    first = contents(tmp_path)
    model.save_pretrained(tmp_path)
    assert contents(tmp_path) == first
    vispruner.load(tmp_path).save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == first


def test_a_change_after_loading_is_saved(saved: Path, tmp_path: Path) -> None:
    changed = vispruner.load(saved)
    changed.set_vispruner_config(keep_ratio=0.5)
    changed.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["vispruner_config"]
    assert (stored["visual_token_num"], stored["keep_ratio"], stored["important_ratio"]) == (None, 0.5, 0.25)


def test_sharded_and_half_precision_saves_come_back(
    base: Path, prompt: dict[str, torch.Tensor], architecture: str, tmp_path: Path
) -> None:
    settings = {"visual_token_num": KEPT[architecture], "important_ratio": 0.25, "dtype": torch.bfloat16}
    half = vispruner.load(base, **settings)
    half.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_carries_its_code(contents(tmp_path), architecture)
    again = vispruner.load(tmp_path, dtype="auto")
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again, prompt), logits(half, prompt))


FRESH_PROCESS = """
import json, sys
from pathlib import Path

sys.modules["vispruner"] = None  # importing the installed package would be an error
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, pipeline

torch.set_num_threads(1)
repo, photo, question, results = sys.argv[1:]
generation = {"max_new_tokens": 5, "do_sample": False}
image = Image.open(photo).convert("RGB")
prompt = AutoProcessor.from_pretrained(repo)(
    text=f"USER: <image>\\n{question} ASSISTANT:", images=image, return_tensors="pt"
)
facts, tensors = {}, {}


def look_at(name, model):
    with torch.no_grad():
        tensors[name + ".logits"] = model(**prompt).logits
    output = model.generate(**prompt, **generation, return_dict_in_generate=True)
    tensors[name + ".sequences"] = output.sequences
    facts[name] = {
        "class": type(model).__name__,
        "module": type(model).__module__.split(".")[0],
        "cache": output.past_key_values.get_seq_length(),
        "vispruner_config": model.config.vispruner_config,
    }


for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = auto_class.from_pretrained(repo, trust_remote_code=True)
    look_at(auto_class.__name__, model)
model.save_pretrained(repo + "-again")
look_at("saved again", AutoModel.from_pretrained(repo + "-again", trust_remote_code=True))

pipe = pipeline("image-text-to-text", model=repo, trust_remote_code=True)
facts["pipeline class"] = type(pipe.model).__name__
chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
look_at("after another repo", model)  # each repo brings its own copy of the code
facts["answer"] = pipe(text=chat, return_full_text=False, generate_kwargs=generation)[0]["generated_text"]

from safetensors.torch import save_file

save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, results + ".safetensors")
Path(results + ".json").write_text(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def fresh_process(
    saved: Path, photo: Image.Image, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a process finds in the saved folder that has neither this package nor a cache of remote code."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    photo.save(elsewhere / "photo.png")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(saved), "photo.png", QUESTION, "results"],
        env={**environment, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(elsewhere / "modules")},
        cwd=elsewhere,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "is not supported" not in result.stderr  # how a pipeline greets a class that it does not know
    facts = json.loads((elsewhere / "results.json").read_text())
    return facts, load_file(elsewhere / "results.safetensors")


LOADED_BY = (
    "AutoModel",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "saved again",
    "after another repo",
)


@pytest.mark.slow
@pytest.mark.parametrize("loaded_by", LOADED_BY)
def test_a_fresh_process_gets_the_pruned_model(
    fresh_process: Any,
    model: PreTrainedModel,
    prompt: dict[str, torch.Tensor],
    architecture: str,
    loaded_by: str,
) -> None:
    facts, tensors = fresh_process
    found = facts[loaded_by]
    assert found["class"] == ARCHITECTURES[architecture].model_class.__name__
    assert found["module"] == "transformers_modules"
    assert found["vispruner_config"] == model.config.vispruner_config
    assert torch.equal(tensors[f"{loaded_by}.logits"], logits(model, prompt))
    assert torch.equal(tensors[f"{loaded_by}.sequences"], model.generate(**prompt, **GENERATION))
    (full,), (kept,) = model.visual_token_counts(prompt["pixel_values"], prompt.get("image_sizes"))
    assert kept < full
    new_tokens = tensors[f"{loaded_by}.sequences"].shape[1] - prompt["input_ids"].shape[1]
    assert found["cache"] == prompt["input_ids"].shape[1] - (full - kept) + new_tokens - 1


@pytest.mark.slow
def test_the_pipeline_answers_as_generate_does(
    fresh_process: Any, model: PreTrainedModel, processor: Any, photo: Image.Image
) -> None:
    facts, _ = fresh_process
    assert facts["pipeline class"] == type(model).__name__
    chat = [{"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**prompt, **GENERATION)[:, prompt["input_ids"].shape[1] :]
    assert facts["answer"] == processor.decode(output[0], skip_special_tokens=True)
    assert facts["answer"].strip()


@pytest.mark.slow
def test_a_remote_loaded_model_saves_its_code_again(fresh_process: Any, saved: Path, architecture: str) -> None:
    again = contents(saved.parent / "repo-again")
    assert_carries_its_code(again, architecture)
    assert again["model.safetensors"] == (saved / "model.safetensors").read_bytes()
    assert again["config.json"] == (saved / "config.json").read_bytes()


@pytest.fixture
def uploaded(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, bytes]]:
    """Stand in for the Hub at the API that transformers calls; note each repo's files with their content."""
    repos: dict[str, dict[str, bytes]] = {}

    def create_repo(self: HfApi, repo_id: str, **kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self: HfApi, repo_id: str, operations: list[Any], **kwargs: Any) -> None:
        repos[repo_id] = {each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations}

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    return repos


@pytest.mark.parametrize("by", ["push_to_hub", "save_pretrained"])
def test_a_push_uploads_the_code(
    uploaded: dict[str, dict[str, bytes]], model: PreTrainedModel, architecture: str, tmp_path: Path, by: str
) -> None:
    if by == "push_to_hub":
        model.push_to_hub("someone/pruned")
    else:
        model.save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="someone/pruned")
    assert list(uploaded) == ["someone/pruned"]
    files = uploaded["someone/pruned"]
    assert_carries_its_code(files, architecture)
    assert {"model.safetensors", "generation_config.json"} <= set(files)


def test_a_pushed_repo_loads(
    uploaded: dict[str, dict[str, bytes]], model: PreTrainedModel, prompt: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    model.push_to_hub("someone/pruned")
    for name, content in uploaded["someone/pruned"].items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(logits(vispruner.load(tmp_path), prompt), logits(model, prompt))
