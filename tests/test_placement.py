"""Several devices and processes: a repo that is split, offloaded or sharded answers as it does on one device."""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload, dispatch_model
from counting import cached_tokens
from matrix import ONE, ROWS, SEVERAL, Model, generate, logits
from PIL import Image
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

import vispruner
from vispruner.conversion.build import build_repo
from vispruner.conversion.questions import SCENE, model_inputs

KEPT, FULL = 18, 144
QUESTION = "What shape is the orange object?"
PARTS = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")

# Run by every rank where `vispruner` cannot be imported: the repo has to bring all it needs.
SHARDED = """
import json, os, sys
sys.modules["vispruner"] = None
import torch
from transformers import AutoModelForImageTextToText
from transformers.distributed import DistributedConfig
repo, inputs, out = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(
    repo, trust_remote_code=True, distributed_config=DistributedConfig(tp_plan="auto")
)
inputs = torch.load(inputs)
local = lambda tensor: getattr(tensor, "to_local", lambda: tensor)().numel()
with torch.no_grad():
    features = model.model.get_image_features(inputs["pixel_values"])
    images = model.encode_images(inputs["pixel_values"])
    logits = model(**inputs).logits
settings = {"max_new_tokens": 6, "do_sample": False}
text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
found = {
    "kept": [image.tolist() for image in features.kept_indices],
    "logits": logits.tolist(),
    "answer": model.generate(**inputs, **settings).tolist(),
    "answer_of_encoded": model.generate(**text, encoded_images=images, **settings).tolist(),
    "numbers": {name: local(parameter) for name, parameter in model.named_parameters()},
}
with open(f"{out}/{os.environ['RANK']}.json", "w") as file:
    json.dump(found, file)
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built repo of the embedded trained checkpoint."""
    return build_repo("tiny-llava-vispruner", tmp_path_factory.mktemp("built") / "repo", show_progress=False)


def load(repo: Path, **settings: Any) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, **settings).eval()


@pytest.fixture(scope="module")
def whole(repo: Path) -> PreTrainedModel:
    """The repo on one device."""
    return load(repo)


@pytest.fixture(scope="module")
def inputs(repo: Path, whole: PreTrainedModel) -> dict[str, torch.Tensor]:
    processor = AutoProcessor.from_pretrained(repo)
    with Image.open(SCENE) as picture:
        return dict(model_inputs(whole, processor, picture.convert("RGB"), QUESTION))


def without_pixels(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}


def answers(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=6, do_sample=False)


@torch.no_grad()
def assert_same(model: PreTrainedModel, whole: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    """The same tokens stay, the same logits and answers come out, from pixels and from images encoded before."""
    expected_images, images = (each.encode_images(inputs["pixel_values"]) for each in (whole, model))
    assert torch.equal(images.kept_indices[0], expected_images.kept_indices[0])
    assert len(images.kept_indices[0]) == KEPT
    text = without_pixels(inputs)
    expected = whole(**inputs).logits
    assert cached_tokens(whole, inputs) == inputs["input_ids"].shape[1] - FULL + KEPT
    for found in (model(**inputs).logits, model(**text, encoded_images=images).logits):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for found in (answers(model, inputs), answers(model, {**text, "encoded_images": images})):
        assert torch.equal(found, answers(whole, inputs))


@pytest.mark.core
@pytest.mark.parametrize("share", [0.3, 0.7, 0.9])
def test_device_map_auto_puts_on_disk_what_memory_does_not_hold(
    repo: Path, whole: PreTrainedModel, inputs: dict[str, torch.Tensor], tmp_path: Path, share: float
) -> None:
    """The split runs through the tower, behind the projector, or through the language model."""
    size = sum(parameter.nbytes for parameter in whole.parameters())
    settings = {"max_memory": {"cpu": int(share * size)}, "offload_folder": tmp_path / "offload"}
    model = load(repo, device_map="auto", **settings)
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu", "meta"}
    assert_same(model, whole, inputs)


@pytest.mark.core
@pytest.mark.parametrize("moved", [PARTS[:1], PARTS[:2], PARTS[1:2], PARTS[2:]])
def test_parts_brought_in_when_they_run(
    repo: Path, whole: PreTrainedModel, inputs: dict[str, torch.Tensor], moved: tuple[str, ...], tmp_path: Path
) -> None:
    device_map = {part: "disk" if part in moved else "cpu" for part in PARTS}
    model = load(repo, device_map=device_map, offload_folder=tmp_path / "offload")
    devices = {part: next(model.get_submodule(part).parameters()).device.type for part in PARTS}
    assert devices == {part: "meta" if part in moved else "cpu" for part in PARTS}
    assert_same(model, whole, inputs)


def test_parts_that_each_have_a_device_of_their_own(
    repo: Path, whole: PreTrainedModel, inputs: dict[str, torch.Tensor]
) -> None:
    """PyTorch knows one CPU, so the hooks that move inputs from device to device are asked for by name."""
    model = dispatch_model(load(repo), dict.fromkeys(PARTS, "cpu"), force_hooks=True)
    assert all(hasattr(model.get_submodule(part), "_hf_hook") for part in PARTS)
    assert_same(model, whole, inputs)


@pytest.mark.core
def test_tensor_parallel_ranks_keep_the_tokens_of_one_process(
    repo: Path, whole: PreTrainedModel, inputs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save(inputs, tmp_path / "inputs.pt")
    (tmp_path / "sharded.py").write_text(SHARDED)
    launch("torch.distributed.run", "--standalone", "--nproc-per-node", "2", cwd=tmp_path)(
        "sharded.py", repo, "inputs.pt", "."
    )
    with torch.no_grad():
        kept = whole.encode_images(inputs["pixel_values"]).kept_indices
        expected = whole(**inputs).logits
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["kept"] == [image.tolist() for image in kept]
        torch.testing.assert_close(torch.tensor(found["logits"]), expected, rtol=0, atol=1e-4)
        assert found["answer"] == found["answer_of_encoded"] == answers(whole, inputs).tolist()
        for name, parameter in whole.named_parameters():
            if "language_model" in name and name.endswith("_proj.weight"):
                assert found["numbers"][name] == parameter.numel() // 2, name
            if "vision_tower" in name:  # were its heads split, each rank would rank patches by its own
                assert found["numbers"][name] == parameter.numel(), name


def projector_of(model: Any) -> str:
    """Return the name of what turns features into visual tokens."""
    names = {name for name, _ in model.named_modules()}
    (found,) = names & {"model.multi_modal_projector", "model.connector", "model.visual.merger"}
    return found


def device_map_with_on_disk(model: torch.nn.Module, name: str) -> dict[str, str]:
    """Return what puts one module on disk, and all that is beside it or its parents on the CPU."""
    device_map, place = {name: "disk"}, ""
    for step in name.split("."):
        module = model.get_submodule(place)
        beside = [*module._modules, *module._parameters, *module._buffers]
        device_map |= {f"{place}.{part}".strip("."): "cpu" for part in beside if part != step}
        place = f"{place}.{step}".strip(".")
    return device_map


@pytest.mark.parametrize("way", ["disk_offload", "device_map"])
@pytest.mark.parametrize("model", ROWS, indirect=True)
def test_a_projector_on_disk(model: Model, way: str, tmp_path: Path) -> None:
    """Whatever is used of it outside its own forward would be missing."""
    inputs, name = model.prompt(ONE, SEVERAL), projector_of(model.pruned)
    if way == "disk_offload":
        split = copy.deepcopy(model.pruned)
        disk_offload(split.get_submodule(name), tmp_path, execution_device=torch.device("cpu"))
    else:
        device_map = device_map_with_on_disk(model.pruned, name)
        settings = {"device_map": device_map, "offload_folder": tmp_path, "attn_implementation": "eager"}
        split = vispruner.load(model.folder, **model.row.options, **settings).eval()
    assert {parameter.device.type for parameter in split.get_submodule(name).parameters()} == {"meta"}
    assert torch.equal(logits(split, inputs), logits(model.pruned, inputs))
    assert torch.equal(generate(split, inputs), generate(model.pruned, inputs))
    assert cached_tokens(split, inputs) < inputs["input_ids"].shape[1]


@pytest.fixture(scope="module")
def one_process() -> Iterator[Any]:
    """A group of this process alone, and its mesh."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("model", ROWS, indirect=True)
def test_fully_sharded_with_the_projector_as_a_unit_of_its_own(model: Model, one_process: Any) -> None:
    inputs = model.prompt(ONE, SEVERAL)
    sharded, whole = copy.deepcopy(model.pruned), copy.deepcopy(model.pruned)
    for unit in (sharded.get_submodule(projector_of(sharded)), *sharded.model.get_decoder().layers, sharded):
        fully_shard(unit, mesh=one_process)
    assert torch.equal(logits(sharded, inputs), logits(whole, inputs))
    assert torch.equal(generate(sharded, inputs), generate(whole, inputs))
    for each in (sharded, whole):
        each(**copy.copy(inputs), labels=inputs["input_ids"]).loss.backward()
    expected = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        assert (parameter.grad is None) == (expected[name].grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad.full_tensor(), expected[name].grad)


@pytest.mark.slow
def test_accelerate_launch_shares_the_accuracy_benchmark_out(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for needed in ("sklearn", "easy_vqa", "matplotlib"):
        pytest.importorskip(needed, reason="the benchmarks need `pip install 'vispruner[benchmarks]'`")
    benchmarks = Path(__file__).parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    three_batches = ["--limit", "70", "--selectors", "random", "--budgets", "6"]
    common = ["--repo", str(repo), *three_batches, "--json"]
    assert importlib.import_module("accuracy").main([*common, str(tmp_path / "one.json"), "--processes", "1"]) == 0
    settings = (
        "--multi_gpu --num_processes 3 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    )
    launch("accelerate.commands.launch", *settings.split(), cwd=tmp_path)(
        benchmarks / "accuracy.py", *common, "three.json"
    )
    one, three = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "three"))
    assert (one["processes"], three["processes"]) == (1, 3)  # by default it is 2
    assert one["rows"] == three["rows"] and {row["n"] for row in three["rows"]} == {70}


def launch(launcher: str, *options: str, cwd: Path) -> Any:
    """Return what runs a script in several processes on the CPU, and fails when one of them does."""

    def run(*script: object) -> None:
        command = [sys.executable, "-m", launcher, *options, *map(str, script)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]

    return run
