"""Loading: every key layout of a base gives stock's own numbers; what is missing is an error, never random weights."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import cached_tokens
from matrix import ROWS, Model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)

import vispruner
from vispruner import VisPrunerLlavaForConditionalGeneration, VisPrunerLlavaNextForConditionalGeneration

STOCK = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}
OURS = {"llava": VisPrunerLlavaForConditionalGeneration, "llava_next": VisPrunerLlavaNextForConditionalGeneration}
ARCHITECTURES = list(STOCK)
KEPT = 6  # visual tokens kept per image or tile


@pytest.fixture(scope="module")
def bases(tiny_llava_repo: Path, tiny_llava_next_repo: Path) -> dict[str, Path]:
    return {"llava": tiny_llava_repo, "llava_next": tiny_llava_next_repo}


@pytest.fixture(scope="module")
def prompts(bases: dict[str, Path], photo: Image.Image) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: AutoProcessor.from_pretrained(base)(text="<image> What is it?", images=photo, return_tensors="pt")
        for name, base in bases.items()
    }


@torch.no_grad()
def logits(model: PreTrainedModel, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**prompt).logits


def rewritten(base: Path, folder: Path, rename: Callable[[str], str | None], **settings: Any) -> Path:
    """Copy a checkpoint with other key names (None leaves the tensor out) and other settings in config.json."""
    shutil.copytree(base, folder)
    tensors = load_file(base / "model.safetensors")
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    renamed.pop(None, None)
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


def bare_name(name: str) -> str:
    """Reduce a key that stock `save_pretrained` wrote to what all layouts share."""
    for prefix, short in (
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "text."),
        ("vision_tower.vision_model.", "vision."),
        ("vision_tower.", "vision."),
        ("multi_modal_projector.", "projector."),
        ("image_newline", "image_newline"),
    ):
        if name.startswith(prefix):
            return short + name.removeprefix(prefix)
    raise AssertionError(f"stock save_pretrained wrote an unexpected key: {name}")


LAYOUTS = {
    "llava-hf": {
        "lm_head.": "language_model.lm_head.",
        "text.": "language_model.model.",
        "vision.": "vision_tower.vision_model.",
        "projector.": "multi_modal_projector.",
        "image_newline": "image_newline",
    },
    "flattened tower": {
        "lm_head.": "language_model.lm_head.",
        "text.": "language_model.model.",
        "vision.": "vision_tower.",
        "projector.": "multi_modal_projector.",
        "image_newline": "image_newline",
    },
    "published": {
        "lm_head.": "lm_head.",
        "text.": "model.language_model.",
        "vision.": "model.vision_tower.vision_model.",
        "projector.": "model.multi_modal_projector.",
        "image_newline": "model.image_newline",
    },
}


def in_layout(layout: str) -> Callable[[str], str]:
    def rename(name: str) -> str:
        bare = bare_name(name)
        prefix = next(prefix for prefix in LAYOUTS[layout] if bare.startswith(prefix))
        return LAYOUTS[layout][prefix] + bare.removeprefix(prefix)

    return rename


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layout", [*LAYOUTS, "as saved"])
def test_every_key_layout_gives_stock_logits(
    bases: dict[str, Path], prompts: dict[str, Any], tmp_path: Path, architecture: str, layout: str
) -> None:
    base, prompt = bases[architecture], prompts[architecture]
    expected = logits(STOCK[architecture].from_pretrained(base), prompt)
    repo = base if layout == "as saved" else rewritten(base, tmp_path / "repo", in_layout(layout))
    model, info = OURS[architecture].from_pretrained(
        repo, vispruner_config={"method": "none"}, output_loading_info=True
    )
    assert not any(info.values()), info
    assert torch.equal(logits(model, prompt), expected)
    if architecture == "llava":
        pruned = vispruner.load(repo, visual_token_num=KEPT)
        assert torch.equal(logits(pruned, prompt), logits(vispruner.load(base, visual_token_num=KEPT), prompt))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_is_the_checkpoints_own(bases: dict[str, Path], architecture: str) -> None:
    """Equal logits could hide a tensor that is not used; the names of a loaded model must all come from the file."""
    tensors = {
        bare_name(name): tensor for name, tensor in load_file(bases[architecture] / "model.safetensors").items()
    }
    model = vispruner.load(bases[architecture], visual_token_num=KEPT)
    found = {
        name.replace("model.language_model.", "text.")
        .replace("model.multi_modal_projector.", "projector.")
        .replace("model.vision_tower.vision_model.", "vision.")
        .replace("model.vision_tower.", "vision.")
        .replace("model.image_newline", "image_newline"): tensor
        for name, tensor in model.state_dict().items()
    }
    found = {name: tensor for name, tensor in found.items() if not name.endswith("position_ids")}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("architecture", "lost"),
    [
        ("llava", "lm_head.weight"),
        ("llava", "text.layers.1.mlp.up_proj.weight"),
        ("llava", "vision.encoder.layers.2.self_attn.q_proj.bias"),
        ("llava", "projector.linear_2.weight"),
        ("llava_next", "image_newline"),
        ("llava_next", "lm_head.weight"),
    ],
)
def test_a_missing_tensor_is_an_error(bases: dict[str, Path], tmp_path: Path, architecture: str, lost: str) -> None:
    repo = rewritten(bases[architecture], tmp_path / "repo", lambda name: None if bare_name(name) == lost else name)
    message = rf"lacks weights of {OURS[architecture].__name__}, which would be random: \S*{lost.split('.', 1)[-1]} "
    with pytest.raises(ValueError, match=message):
        vispruner.load(repo, visual_token_num=KEPT)


def test_a_checkpoint_of_another_layout_is_an_error(bases: dict[str, Path], tmp_path: Path) -> None:
    repo = rewritten(bases["llava"], tmp_path / "repo", lambda name: f"strange.{name}")
    with pytest.raises(ValueError, match=r"lacks weights .* \.\.\. \(\d+ in all\)"):
        vispruner.load(repo, visual_token_num=KEPT)


def test_a_tied_head_need_not_be_stored(bases: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((bases["llava"] / "config.json").read_text())
    tied = {"tie_word_embeddings": True, "text_config": {**config["text_config"], "tie_word_embeddings": True}}
    repo = rewritten(bases["llava"], tmp_path / "repo", lambda name: None if "lm_head" in name else name, **tied)
    model = vispruner.load(repo, visual_token_num=KEPT)
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_mismatched_sizes_are_an_error_unless_allowed(bases: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((bases["llava"] / "config.json").read_text())
    wider = {"text_config": {**config["text_config"], "vocab_size": config["text_config"]["vocab_size"] + 8}}
    repo = rewritten(bases["llava"], tmp_path / "repo", str, **wider)
    with pytest.raises((RuntimeError, ValueError), match=r"ignore_mismatched_sizes|lacks weights"):
        vispruner.load(repo, visual_token_num=KEPT)
    model = vispruner.load(repo, visual_token_num=KEPT, ignore_mismatched_sizes=True)
    assert model.lm_head.out_features == config["text_config"]["vocab_size"] + 8


def test_allowing_mismatched_sizes_does_not_allow_missing_weights(bases: dict[str, Path], tmp_path: Path) -> None:
    repo = rewritten(bases["llava"], tmp_path / "repo", lambda name: None if "lm_head" in name else name)
    with pytest.raises(ValueError, match=r"lacks weights .* lm_head.weight"):
        vispruner.load(repo, visual_token_num=KEPT, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_load_picks_the_class_and_splits_the_options(bases: dict[str, Path], architecture: str) -> None:
    model = vispruner.load(
        bases[architecture],
        visual_token_num=KEPT,
        important_ratio=0.25,
        base_model_name_or_path="someone/base",
        dtype=torch.bfloat16,
        attn_implementation="eager",
        device_map="cpu",
        low_cpu_mem_usage=True,
    )
    assert type(model) is OURS[architecture]
    assert type(model.config) is OURS[architecture].config_class
    stored = model.config.vispruner_config
    assert (stored["visual_token_num"], stored["important_ratio"]) == (KEPT, 0.25)
    assert stored["base_model_name_or_path"] == "someone/base"
    assert model.dtype == torch.bfloat16
    assert model.config.vision_config._attn_implementation == "eager"
    assert model.device.type == "cpu"
    assert not model.training


def test_load_takes_strings_and_paths_and_both_forms_of_options(bases: dict[str, Path]) -> None:
    base = bases["llava"]
    for model in (
        vispruner.load(str(base), visual_token_num=KEPT, important_ratio=0.0),
        vispruner.load(base, vispruner_config={"visual_token_num": KEPT, "important_ratio": 0.0}),
        vispruner.load(base, vispruner_config={"visual_token_num": 60, "important_ratio": 0.0}, visual_token_num=KEPT),
        vispruner.load(base, visual_token_num=KEPT, important_ratio=0.0, trust_remote_code=True),
    ):
        stored = model.config.vispruner_config
        assert (stored["visual_token_num"], stored["important_ratio"]) == (KEPT, 0.0)


def test_load_refuses_an_unknown_keyword(bases: dict[str, Path]) -> None:
    with pytest.raises((TypeError, ValueError), match="visual_tokens"):
        vispruner.load(bases["llava"], visual_token_num=KEPT, visual_tokens=KEPT)


def test_load_refuses_other_model_types(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"'llama' is not supported; the supported ones are \[.*'llava', 'llava_next'"
    ):
        vispruner.load(tmp_path, visual_token_num=KEPT)


def test_load_says_when_there_is_no_such_base(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        vispruner.load(tmp_path / "nowhere", visual_token_num=KEPT)


def test_load_of_another_architectures_base_by_class_is_refused(bases: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"lacks weights .* model.image_newline"):
        VisPrunerLlavaNextForConditionalGeneration.from_pretrained(
            bases["llava"], vispruner_config={"visual_token_num": KEPT}
        )


@pytest.mark.parametrize(
    "settings", [{"device_map": "auto"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}]
)
def test_placement_does_not_change_the_numbers(
    bases: dict[str, Path], prompts: dict[str, Any], settings: dict[str, Any]
) -> None:
    expected = logits(vispruner.load(bases["llava"], visual_token_num=KEPT), prompts["llava"])
    model = vispruner.load(bases["llava"], visual_token_num=KEPT, **settings)
    assert model.device.type in ("cpu", "cuda")
    found = logits(model, {name: tensor.to(model.device) for name, tensor in prompts["llava"].items()})
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0 if model.device.type == "cpu" else 1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("offloaded", [("model.vision_tower",), ("model.language_model", "lm_head"), ("model",)])
def test_offload_to_disk_does_not_change_the_numbers(
    bases: dict[str, Path], prompts: dict[str, Any], tmp_path: Path, architecture: str, offloaded: tuple[str, ...]
) -> None:
    base, prompt = bases[architecture], prompts[architecture]
    expected = vispruner.load(base, visual_token_num=KEPT)
    parts = ["model", "lm_head"]
    if "model" not in offloaded:
        parts = ["model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head"]
        parts += ["model.image_newline"] if architecture == "llava_next" else []
    device_map = {part: "disk" if part in offloaded else "cpu" for part in parts}
    model = vispruner.load(base, visual_token_num=KEPT, device_map=device_map, offload_folder=tmp_path / "offload")
    devices = {name: parameter.device.type for name, parameter in model.named_parameters()}
    assert {devices[name] for name in devices if name.startswith(offloaded)} == {"meta"}
    assert torch.equal(logits(model, prompt), logits(expected, prompt))
    if "model" in offloaded and architecture == "llava_next":
        return  # generate of transformers 5.23 reads image_newline past the hook that would bring it in
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**prompt, **settings), expected.generate(**prompt, **settings))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sharded_checkpoints_load(
    bases: dict[str, Path], prompts: dict[str, Any], tmp_path: Path, architecture: str
) -> None:
    STOCK[architecture].from_pretrained(bases[architecture]).save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    expected = logits(vispruner.load(bases[architecture], visual_token_num=KEPT), prompts[architecture])
    assert torch.equal(logits(vispruner.load(tmp_path, visual_token_num=KEPT), prompts[architecture]), expected)
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(OSError):
        vispruner.load(tmp_path, visual_token_num=KEPT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_half_precision_answers_with_fewer_tokens(
    bases: dict[str, Path], prompts: dict[str, Any], dtype: torch.dtype | str
) -> None:
    model = vispruner.load(bases["llava"], visual_token_num=KEPT, dtype=dtype)
    assert model.dtype == (torch.float32 if dtype == "auto" else dtype)
    prompt = prompts["llava"]
    found = logits(model, prompt)
    assert found.isfinite().all() and found.dtype == model.dtype
    assert cached_tokens(model, prompt) == prompt["input_ids"].shape[1] - 64 + KEPT


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_trust_remote_code_a_pruned_repo_is_the_dense_stock_model(
    bases: dict[str, Path], prompts: dict[str, Any], tmp_path: Path, architecture: str
) -> None:
    """Nothing warns: a native model_type finds the stock class. The one-line check below is what the README shows."""
    prompt = prompts[architecture]
    vispruner.load(bases[architecture], visual_token_num=KEPT).save_pretrained(tmp_path)
    dense = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=False)
    assert type(dense) is STOCK[architecture]
    assert cached_tokens(dense, prompt) == prompt["input_ids"].shape[1]
    with pytest.raises(AssertionError):
        assert type(dense).__name__.startswith("VisPruner")
    pruned = vispruner.load(tmp_path)
    assert type(pruned).__name__.startswith("VisPruner")
    assert cached_tokens(pruned, prompt) < prompt["input_ids"].shape[1]


def write_line(repo: Path, line: str) -> None:
    """Change code that every model of a repo runs, in a file that none of its entries is in."""
    with (repo / "pruning_mixin.py").open("a") as file:
        file.write(f"\n{line}\n")


def running(loaded: PreTrainedModel, name: str) -> Any:
    """Look a name up in the file `pruning_mixin.py` that a model runs."""
    code = next(cls for cls in type(loaded).__mro__ if cls.__name__ == "VisPrunerMixin")
    return getattr(sys.modules[code.__module__], name, None)


@pytest.mark.core
@pytest.mark.parametrize("model", ROWS, indirect=True)
def test_local_repos_of_one_folder_name_run_their_own_code(model: Model, tmp_path: Path) -> None:
    """Of the same architecture, another one's, and after the code was edited; and each saves what it ran."""
    other = "llava" if model.row.model_type != "llava" else "internvl"
    first, second, third = (tmp_path / owner / "pruned" for owner in ("one", "two", "three"))
    model.pruned.save_pretrained(first)
    shutil.copytree(first, second)
    write_line(first, "EDITION = 1")
    write_line(second, "EDITION = 2")
    ROWS[other].stock_class(ROWS[other].config()).save_pretrained(tmp_path / "base")
    vispruner.load(tmp_path / "base", **ROWS[other].options).save_pretrained(third)

    def loaded(repo: Path) -> PreTrainedModel:
        return AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True)

    models = [loaded(repo) for repo in (first, second, third)]
    assert [running(each, "EDITION") for each in models] == [1, 2, None]
    assert [each.config.model_type for each in models] == [model.row.model_type, model.row.model_type, other]
    write_line(first, "EDITION = 3")
    edited = loaded(first)
    assert [running(each, "EDITION") for each in (edited, models[0], models[1], loaded(second))] == [3, 1, 2, 2]
    for number, each in ((2, models[1]), (3, edited)):
        each.save_pretrained(tmp_path / f"saved-{number}")
        assert (tmp_path / f"saved-{number}" / "pruning_mixin.py").read_text().endswith(f"EDITION = {number}\n")
