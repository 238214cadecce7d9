"""Converting original LLaVA checkpoints: the recorded outputs come back, and what is not understood is refused.

tests/data/original_llava holds tiny checkpoints in the original format and what the authors' code answered with them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)

from vispruner import VisPrunerLlavaForConditionalGeneration, VisPrunerLlavaNextForConditionalGeneration
from vispruner.conversion import checkpoint_io, convert, llava_keys
from vispruner.conversion.checkpoint_io import CheckpointError, iter_checkpoint_tensors, write_checkpoint
from vispruner.conversion.convert import convert_llava, fetch, grid_pinpoints

DATA = Path(__file__).parent / "data" / "original_llava"
CLIP = DATA / "clip"
EXPECTED = load_file(DATA / "expected.safetensors")
OLD_VOCABULARY = 400
STOCK = {"v15": LlavaForConditionalGeneration, "v16": LlavaNextForConditionalGeneration}
SETTINGS = {
    version: sorted({key.rsplit(".", 1)[0] for key in EXPECTED if key.startswith(f"{version}.T")})
    for version in ("v15", "v16")
}


def original(folder: Path, version: str = "v15", **config: Any) -> Path:
    """Copy one of the recorded checkpoints; keywords change its config.json, None removes a field."""
    shutil.copytree(DATA / {"v15": "llava-v1.5-tiny", "v16": "llava-v1.6-tiny"}[version], folder)
    shutil.copyfile(DATA / "tokenizer.model", folder / "tokenizer.model")
    if config:
        edit_json(folder / "config.json", **config)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    removed = {key for key, value in changes.items() if value is None}
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in removed}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = weights(folder)
    change(tensors)
    torch.save(tensors, folder / "pytorch_model.bin")


def shard_bin(folder: Path, count: int = 3) -> None:
    tensors = weights(folder)
    (folder / "pytorch_model.bin").unlink()
    index = {}
    for i in range(count):
        file = f"pytorch_model-{i + 1:05d}-of-{count:05d}.bin"
        part = {name: tensors[name] for name in list(tensors)[i::count]}
        torch.save(part, folder / file)
        index.update(dict.fromkeys(part, file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def to_safetensors(folder: Path, max_shard_size: int | str) -> None:
    tensors = weights(folder)
    (folder / "pytorch_model.bin").unlink()
    write_checkpoint(tensors.items(), folder, max_shard_size)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def load(folder: Path, version: str) -> Any:
    model, info = STOCK[version].from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("converted")
    return {
        version: convert_llava(original(root / f"original-{version}", version), root / version, CLIP)
        for version in ("v15", "v16")
    }


@pytest.fixture
def scene() -> Iterator[Image.Image]:
    with Image.open(DATA / "scene.png") as image:
        yield image


class TestResultIsStock:
    @pytest.mark.parametrize("version", ["v15", "v16"])
    def test_every_weight_is_read_under_its_published_name(self, converted: dict[str, Path], version: str) -> None:
        load(converted[version], version)
        names = checkpoint_io.read_tensor_headers(converted[version]).keys()
        roots = ["lm_head.", "model.language_model.", "model.multi_modal_projector.linear_", "model.image_newline"]
        roots.append("model.vision_tower.vision_model.")
        assert {next(root for root in roots if name.startswith(root)) for name in names} == set(
            roots if version == "v16" else [root for root in roots if root != "model.image_newline"]
        )

    def test_files_of_the_result(self, converted: dict[str, Path]) -> None:
        assert sorted(contents(converted["v15"])) == [
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "preprocessor_config.json",
            "processor_config.json",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
        ]
        with safe_open(converted["v15"] / "model.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": "pt"}

    def test_config_fields(self, converted: dict[str, Path]) -> None:
        config = load(converted["v16"], "v16").config
        assert config.vision_feature_layer == -2
        assert config.vision_feature_select_strategy == "default"
        assert config.image_seq_length == 576
        assert config.image_grid_pinpoints == [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        assert config.text_config.model_type == "llama"
        assert config.text_config.max_position_embeddings == 4096
        assert config.vision_config.num_hidden_layers == 4

    @pytest.mark.parametrize("version", ["v15", "v16"])
    def test_added_rows_are_the_mean_and_never_the_likeliest(self, converted: dict[str, Path], version: str) -> None:
        model = load(converted[version], version)
        for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
            assert weight.shape[0] == 448  # 400 and two more, up to the next multiple of 64
            mean = weight[:OLD_VOCABULARY].double().mean(0).float()
            assert torch.equal(weight[OLD_VOCABULARY:], mean.expand(48, -1))
        hidden = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0))
        assert model.lm_head(hidden).argmax(-1).max() < OLD_VOCABULARY

    @pytest.mark.parametrize("version", ["v15", "v16"])
    def test_token_ids_agree_everywhere(self, converted: dict[str, Path], version: str) -> None:
        model, tokenizer = (
            load(converted[version], version),
            AutoProcessor.from_pretrained(converted[version]).tokenizer,
        )
        assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<image>") == 400
        assert model.generation_config.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id == 401
        assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)
        assert len(tokenizer) <= model.config.text_config.vocab_size
        assert tokenizer.padding_side == "left"

    def test_prompt_is_tokenized_as_the_original_code_did(self, converted: dict[str, Path]) -> None:
        tokenizer = AutoProcessor.from_pretrained(converted["v15"]).tokenizer
        expected = EXPECTED["v15.input_ids"][0].clone()
        expected[expected == -200] = 400
        assert tokenizer("USER:<image>what is in this image? ASSISTANT:").input_ids == expected.tolist()

    def test_padding_to_a_square_gives_the_recorded_pixels(
        self, converted: dict[str, Path], scene: Image.Image
    ) -> None:
        pixels = (
            AutoProcessor.from_pretrained(converted["v15"]).image_processor(scene, return_tensors="pt").pixel_values
        )
        assert torch.equal(pixels.half(), EXPECTED["v15.pixel_values"])

    def test_tiling_gives_the_recorded_pixels(self, converted: dict[str, Path], scene: Image.Image) -> None:
        pixels = (
            AutoProcessor.from_pretrained(converted["v16"]).image_processor(scene, return_tensors="pt").pixel_values
        )
        with safe_open(DATA / "expected.safetensors", framework="pt") as file:
            recorded = file.metadata()["v16.pixel_values.sha256"]
        assert hashlib.sha256(pixels.half().numpy().tobytes()).hexdigest() == recorded

    def test_without_padding_the_processor_crops_as_clip_does(self, tmp_path: Path, scene: Image.Image) -> None:
        out = convert_llava(original(tmp_path / "src", image_aspect_ratio=None), tmp_path / "out", CLIP)
        pixels = AutoProcessor.from_pretrained(out).image_processor(scene, return_tensors="pt").pixel_values
        clip = AutoProcessor.from_pretrained(CLIP)(scene, return_tensors="pt").pixel_values
        assert torch.equal(pixels, clip)
        assert not torch.equal(pixels.half(), EXPECTED["v15.pixel_values"])

    @pytest.mark.parametrize(("version", "count"), [("v15", 576), ("v16", 2438)])
    def test_processor_and_model_answer(
        self, converted: dict[str, Path], scene: Image.Image, version: str, count: int
    ) -> None:
        processor, model = AutoProcessor.from_pretrained(converted[version]), load(converted[version], version)
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}],
            add_generation_prompt=True,
        )
        assert prompt == "USER: <image>\nwhat is it? ASSISTANT:"
        inputs = processor(images=scene, text=prompt, return_tensors="pt")
        assert int((inputs.input_ids == 400).sum()) == count
        answer = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert answer.shape[1] == inputs.input_ids.shape[1] + 2

    def test_vicuna_conversation(self, converted: dict[str, Path]) -> None:
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "which?"}, {"type": "image"}, {"type": "image"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "both"}]},
            {"role": "user", "content": "why?"},
        ]
        render = AutoProcessor.from_pretrained(converted["v15"]).apply_chat_template
        told = "Be brief. USER: <image>\n<image>\nwhich? ASSISTANT: both</s>USER: why? "
        assert render(messages) == told
        assert render(messages, add_generation_prompt=True) == told + "ASSISTANT:"

    def test_mistral_text_model(self, tmp_path: Path) -> None:
        src = original(tmp_path / "src", "v16", model_type="llava_mistral", architectures=["LlavaMistralForCausalLM"])
        out = convert_llava(src, tmp_path / "out", CLIP)
        assert load(out, "v16").config.text_config.model_type == "mistral"
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": "a cat"},
            {"role": "user", "content": "why?"},
        ]
        rendered = AutoProcessor.from_pretrained(out).apply_chat_template(messages, add_generation_prompt=True)
        assert (
            rendered == "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nwhat? [/INST] a cat </s> [INST] why? [/INST]"
        )


@torch.no_grad()
def visual_tokens(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Projected patch tokens (tiles, N, D) of every tile, by the stock parts."""
    hidden = model.model.vision_tower(pixel_values.float(), output_hidden_states=True).hidden_states[-2]
    return model.model.multi_modal_projector(hidden[:, 1:])


def paper_order(tokens: torch.Tensor, kept: torch.Tensor, columns: int) -> torch.Tensor:
    """The kept tokens of the base tile, then those of the other tiles in raster order of the stitched grid."""
    side = int(tokens.shape[1] ** 0.5)
    rows = (len(tokens) - 1) // columns

    def stitch(tiles: torch.Tensor) -> torch.Tensor:  # (rows * columns, N, X) -> (rows * side * columns * side, X)
        grid = tiles.reshape(rows, columns, side, side, -1).permute(0, 2, 1, 3, 4)
        return grid.reshape(rows * side * columns * side, -1)

    rest = stitch(tokens[1:])[stitch(kept[1:, :, None])[:, 0]]
    return torch.cat([tokens[0][kept[0]], rest])


@torch.no_grad()
def continue_prompt(model: Any, input_ids: torch.Tensor, tokens: torch.Tensor, steps: int) -> tuple[Any, list[int]]:
    """Put visual tokens where -200 stands and decode greedily without a cache: first logits, and the ids."""
    at = int((input_ids == -200).nonzero())
    embed, head, text = model.get_input_embeddings(), model.lm_head, model.model.language_model
    prompt = torch.cat([embed(input_ids[:at]), tokens, embed(input_ids[at + 1 :])])[None]
    first, answer = None, []
    while len(answer) < steps and 2 not in answer:
        logits = head(text(inputs_embeds=prompt).last_hidden_state[0, -1])
        first = logits if first is None else first
        answer.append(int(logits.argmax()))
        prompt = torch.cat([prompt, embed(torch.tensor([[answer[-1]]]))], dim=1)
    return first, answer


class TestRecordedOutputs:
    """Stock modules on converted weights, pruned by hand with the recorded indices, answer as the original did."""

    @pytest.mark.parametrize("setting", SETTINGS["v15"])
    def test_llava_15(self, converted: dict[str, Path], setting: str) -> None:
        model = load(converted["v15"], "v15")
        tokens = visual_tokens(model, EXPECTED["v15.pixel_values"])[0, EXPECTED[f"{setting}.kept"]]
        generated = EXPECTED[f"{setting}.generated"].tolist()
        logits, answer = continue_prompt(model, EXPECTED["v15.input_ids"][0], tokens, len(generated) - 1)
        torch.testing.assert_close(logits[:OLD_VOCABULARY], EXPECTED[f"{setting}.last_logits"], atol=1e-4, rtol=0)
        assert [1, *answer] == generated  # the old generate put BOS in front

    @pytest.mark.parametrize("setting", SETTINGS["v16"])
    def test_llava_16_in_the_papers_tile_order(
        self, converted: dict[str, Path], scene: Image.Image, setting: str
    ) -> None:
        model = load(converted["v16"], "v16")
        processor = AutoProcessor.from_pretrained(converted["v16"])
        pixels = processor.image_processor(scene, return_tensors="pt").pixel_values[0].half()
        tokens = paper_order(visual_tokens(model, pixels), EXPECTED[f"{setting}.kept"], columns=2)
        input_ids = EXPECTED["v16.input_ids"][0]
        assert len(input_ids) - 1 + len(tokens) == EXPECTED[f"{setting}.seq_len"]
        logits, _ = continue_prompt(model, input_ids, tokens, 1)
        torch.testing.assert_close(logits[:OLD_VOCABULARY], EXPECTED[f"{setting}.last_logits"], atol=1e-4, rtol=0)


def full_prompt(version: str, count: int) -> dict[str, torch.Tensor]:
    """The recorded prompt with `count` placeholders of the converted vocabulary for its image."""
    ids = EXPECTED[f"{version}.input_ids"][0]
    full = torch.where(ids == -200, 400, ids).repeat_interleave(torch.where(ids == -200, count, 1))[None]
    return {"input_ids": full, "attention_mask": torch.ones_like(full)}


def options(setting: str) -> dict[str, Any]:
    budget, ratio = setting[len("v15.T") :].split(".r")
    return {"visual_token_num": int(budget), "important_ratio": float(ratio)}


class TestRecordedOutputsOfOurModels:
    """The pruned models choose the recorded tokens themselves."""

    @pytest.mark.parametrize("setting", SETTINGS["v15"])
    def test_llava_15(self, converted: dict[str, Path], setting: str) -> None:
        model = VisPrunerLlavaForConditionalGeneration.from_pretrained(
            converted["v15"], vispruner_config=options(setting)
        )
        inputs = full_prompt("v15", 576) | {"pixel_values": EXPECTED["v15.pixel_values"].float()}
        kept = EXPECTED[f"{setting}.kept"]
        if len(kept) < 576:
            features = model.get_image_features(pixel_values=inputs["pixel_values"])
            assert torch.equal(features.kept_indices[0], kept)
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1, :OLD_VOCABULARY]
        torch.testing.assert_close(logits, EXPECTED[f"{setting}.last_logits"], atol=1e-4, rtol=0)
        generated = EXPECTED[f"{setting}.generated"].tolist()
        answer = model.generate(**inputs, max_new_tokens=len(generated) - 1, do_sample=False)
        assert [1, *answer[0, inputs["input_ids"].shape[1] :].tolist()] == generated

    @pytest.mark.core
    @pytest.mark.parametrize("setting", SETTINGS["v16"])
    def test_llava_16(self, converted: dict[str, Path], scene: Image.Image, setting: str) -> None:
        model = VisPrunerLlavaNextForConditionalGeneration.from_pretrained(
            converted["v16"], vispruner_config=options(setting) | {"tile_mode": "paper"}
        )
        images = AutoProcessor.from_pretrained(converted["v16"]).image_processor(scene, return_tensors="pt")
        images["pixel_values"] = images.pixel_values.half().float()  # as recorded
        kept = model.get_image_features(**images).kept_indices[0]
        assert torch.equal(kept.sort().values, EXPECTED[f"{setting}.kept"].flatten().nonzero()[:, 0])
        with torch.no_grad():
            logits = model(**full_prompt("v16", 2438), **images).logits[0, -1, :OLD_VOCABULARY]
        torch.testing.assert_close(logits, EXPECTED[f"{setting}.last_logits"], atol=1e-4, rtol=0)


class TestSources:
    """Every form a checkpoint comes in gives the same tensors."""

    @pytest.mark.parametrize("version", ["v15", "v16"])
    @pytest.mark.parametrize(
        "repack",
        [
            shard_bin,
            lambda folder: to_safetensors(folder, "5GB"),
            lambda folder: to_safetensors(folder, "200KB"),
        ],
        ids=["sharded-bin", "safetensors", "sharded-safetensors"],
    )
    def test_weight_files(
        self, converted: dict[str, Path], tmp_path: Path, version: str, repack: Callable[[Path], None]
    ) -> None:
        src = original(tmp_path / "src", version)
        repack(src)
        out = convert_llava(src, tmp_path / "out", CLIP)
        assert checkpoint_io.same_tensors(iter_checkpoint_tensors(out), converted[version])
        load(out, version)

    def test_sharded_result(self, converted: dict[str, Path], tmp_path: Path) -> None:
        out = convert_llava(original(tmp_path / "src"), tmp_path / "out", CLIP, max_shard_size="300KB")
        assert len(list(out.glob("model-*.safetensors"))) > 3
        assert checkpoint_io.same_tensors(iter_checkpoint_tensors(out), converted["v15"])
        load(out, "v15")

    @pytest.mark.parametrize("form", ["bin", "full-clip", "flat"])
    def test_tower_folders(self, converted: dict[str, Path], tmp_path: Path, form: str) -> None:
        tower = shutil.copytree(CLIP, tmp_path / "tower")
        tensors = load_file(CLIP / "model.safetensors")
        if form == "bin":
            (tower / "model.safetensors").unlink()
            torch.save(tensors, tower / "pytorch_model.bin")
        elif form == "flat":  # as CLIPVisionModel.save_pretrained of some versions names them
            flat = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
            save_file(flat, tower / "model.safetensors")
        else:
            vision = json.loads((CLIP / "config.json").read_text())
            text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
            full = CLIPConfig(vision_config=vision, text_config={**text, "vocab_size": 10}, projection_dim=32)
            state = CLIPModel(full).state_dict() | tensors
            state["vision_model.embeddings.position_ids"] = torch.arange(577)[None]
            state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
            save_file(state, tower / "model.safetensors")
            (tower / "config.json").write_text(full.to_json_string())
            edit_json(
                tower / "preprocessor_config.json",  # as openai's own repos still have it
                size=336,
                crop_size=336,
                feature_extractor_type="CLIPFeatureExtractor",
                **dict.fromkeys(("image_processor_type", "do_rescale", "rescale_factor", "do_convert_rgb")),
            )
        out = convert_llava(original(tmp_path / "src"), tmp_path / "out", tower)
        assert contents(out) == contents(converted["v15"])

    def test_weights_inside_win_over_the_towers(self, converted: dict[str, Path], tmp_path: Path) -> None:
        tower = shutil.copytree(CLIP, tmp_path / "tower")
        wrong = {name: torch.zeros_like(t) for name, t in load_file(CLIP / "model.safetensors").items()}
        save_file(wrong, tower / "model.safetensors")
        inside = convert_llava(original(tmp_path / "16", "v16"), tmp_path / "out16", tower)
        assert contents(inside) == contents(converted["v16"])
        outside = dict(iter_checkpoint_tensors(convert_llava(original(tmp_path / "15"), tmp_path / "out15", tower)))
        assert all(not t.any() for name, t in outside.items() if name.startswith("model.vision_tower."))

    def test_a_tower_inside_needs_only_the_config_files_of_a_folder(
        self, converted: dict[str, Path], tmp_path: Path
    ) -> None:
        tower = shutil.copytree(CLIP, tmp_path / "tower")
        (tower / "model.safetensors").unlink()
        assert contents(convert_llava(original(tmp_path / "src", "v16"), tmp_path / "out", tower)) == contents(
            converted["v16"]
        )

    def test_the_tower_that_the_config_names_is_the_default(
        self, converted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            convert, "snapshot_download", lambda name, allow_patterns: {"openai/clip": str(CLIP)}[name]
        )
        src = original(tmp_path / "src", mm_vision_tower="openai/clip")
        assert contents(convert_llava(src, tmp_path / "out")) == contents(converted["v15"])

    @pytest.mark.core
    def test_a_half_precision_checkpoint_stays_half_precision(self, tmp_path: Path) -> None:
        src = original(tmp_path / "src")
        change_weights(src, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
        out = convert_llava(src, tmp_path / "out", CLIP)
        assert {t.dtype for _, t in iter_checkpoint_tensors(out)} == {torch.float16}
        model = load(out, "v15")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}

    @pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
    def test_model_types_of_the_original_code(self, tmp_path: Path, model_type: str) -> None:
        out = convert_llava(original(tmp_path / "src", model_type=model_type), tmp_path / "out", CLIP)
        assert load(out, "v15").config.text_config.model_type == "llama"

    def test_buffers_of_old_versions_are_left_out(self, converted: dict[str, Path], tmp_path: Path) -> None:
        src = original(tmp_path / "src", "v16")
        buffers = {
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
            "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(577)[None],
        }
        change_weights(src, lambda tensors: tensors.update(buffers))
        assert contents(convert_llava(src, tmp_path / "out", CLIP)) == contents(converted["v16"])

    def test_a_vocabulary_with_room_does_not_grow(self, tmp_path: Path) -> None:
        src = original(tmp_path / "src", vocab_size=410)

        def grow(tensors: dict[str, torch.Tensor]) -> None:
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                tensors[name] = torch.cat([tensors[name], torch.ones(10, 64)])

        change_weights(src, grow)
        model = load(convert_llava(src, tmp_path / "out", CLIP), "v15")
        assert model.get_input_embeddings().weight.shape[0] == model.config.text_config.vocab_size == 410
        assert (model.get_input_embeddings().weight[400:] == 1).all()

    def test_hub_ids_are_fetched(
        self, converted: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folders = {"someone/llava": original(tmp_path / "src"), "openai/clip": CLIP}
        monkeypatch.setattr(convert, "snapshot_download", lambda name, allow_patterns: str(folders[name]))
        out = convert_llava("someone/llava", tmp_path / "out", "openai/clip")
        assert contents(out) == contents(converted["v15"])

    def test_bin_files_are_fetched_only_where_there_are_no_safetensors(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []
        monkeypatch.setattr(
            convert, "snapshot_download", lambda name, allow_patterns: asked.append(allow_patterns[-1]) or tmp_path
        )
        fetch("a/b", weights=False)
        fetch("a/b")
        (tmp_path / "model.safetensors").touch()
        fetch("a/b")
        assert asked == ["*.model", "*.safetensors", "*.bin", "*.safetensors"]

    def test_grid_pinpoints_turn_from_width_first_to_height_first(self) -> None:
        both_ways = [[336, 672], [672, 336], [672, 672]]
        assert grid_pinpoints(both_ways) == both_ways
        assert grid_pinpoints([[336, 672], [336, 1008]]) == [[672, 336], [1008, 336]]
        assert grid_pinpoints("[(336, 672), (336, 1008)]") == [[672, 336], [1008, 336]]

    def test_published_names_are_not_taken_for_original_ones(self) -> None:
        name = "model.layers.3.mlp.up_proj.weight"
        assert llava_keys.rename(name, llava_keys.KEY_MAP, ()) == f"model.language_model.{name[6:]}"
        with pytest.raises(KeyError):
            llava_keys.rename("model.language_model.layers.3.mlp.up_proj.weight", llava_keys.KEY_MAP, ())


class TestIdempotent:
    @pytest.mark.parametrize("version", ["v15", "v16"])
    def test_a_second_run_writes_nothing(
        self, tmp_path: Path, version: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        src, out = original(tmp_path / "src", version), tmp_path / "out"
        convert_llava(src, out, CLIP)
        before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
        monkeypatch.setattr(convert, "write_checkpoint", None)
        assert convert_llava(src, out, CLIP, max_shard_size="1KB") == out
        assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
        assert "already holds this conversion" in capsys.readouterr().err

    def test_two_runs_give_the_same_bytes(self, converted: dict[str, Path], tmp_path: Path) -> None:
        out = convert_llava(original(tmp_path / "src"), tmp_path / "out", CLIP)
        assert contents(out) == contents(converted["v15"])

    @pytest.mark.parametrize("version", ["v15", "v16"])
    def test_its_own_output_is_converted_to_itself(
        self, converted: dict[str, Path], tmp_path: Path, version: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        src = converted[version]
        assert convert_llava(src, src) == src
        assert "already a Hugging Face checkpoint, nothing to convert" in capsys.readouterr().err
        again = convert_llava(src, tmp_path / "again", CLIP)
        assert contents(again) == contents(src)
        before = {path.name: path.stat().st_mtime_ns for path in again.iterdir()}
        assert convert_llava(src, again) == again
        assert {path.name: path.stat().st_mtime_ns for path in again.iterdir()} == before

    @pytest.mark.parametrize("change", ["weights", "config", "source"])
    def test_another_result_is_not_taken_for_this_one(self, tmp_path: Path, change: str) -> None:
        src, out = original(tmp_path / "src"), tmp_path / "out"
        convert_llava(src, out, CLIP)
        if change == "weights":
            tensors = load_file(out / "model.safetensors")
            tensors["lm_head.weight"][3, 3] += 1
            save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        elif change == "config":
            edit_json(out / "config.json", vision_feature_layer=-1)
        else:
            change_weights(src, lambda weights: weights["model.norm.weight"].mul_(2))
        with pytest.raises(CheckpointError, match="not empty"):
            convert_llava(src, out, CLIP)
        convert_llava(src, out, CLIP, overwrite=True)
        convert_llava(src, out, CLIP)
        load(out, "v15")


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: change_weights(folder, lambda tensors: tensors.pop(name))


def put(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: change_weights(folder, lambda tensors: tensors.update({name: tensor}))


def with_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def with_file(name: str, text: str = "{}") -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


def without_file(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def only_projector(folder: Path) -> None:
    torch.save({"model.mm_projector.0.weight": torch.zeros(64, 64)}, folder / "mm_projector.bin")
    (folder / "pytorch_model.bin").unlink()


def lose_a_shard(folder: Path) -> None:
    shard_bin(folder)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()


def truncate_safetensors(folder: Path) -> None:
    to_safetensors(folder, "5GB")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def add_chatml(folder: Path) -> None:
    token = {"content": "<|im_start|>", "special": True}
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["400"] = {**token, **flags}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


REFUSED = {
    "no config": (without_file("config.json"), r"has no config\.json"),
    "config is no JSON": (with_file("config.json", "{"), r"config\.json is not valid JSON"),
    "MPT": (with_config(model_type="llava_mpt"), r"config\.model_type is 'llava_mpt'; known are 'llava'"),
    "another model": (with_config(model_type="qwen2_vl"), r"config\.model_type is 'qwen2_vl'"),
    "LoRA adapter": (with_file("adapter_config.json"), r"adapter_config\.json says that it holds LoRA deltas; merge"),
    "LoRA rest": (with_file("non_lora_trainables.bin"), r"non_lora_trainables\.bin says that it holds LoRA deltas"),
    "projector only": (only_projector, r"only a projector \(mm_projector\.bin\)"),
    "linear projector": (
        with_config(mm_projector_type="linear"),
        r"mm_projector_type must be 'mlp2x_gelu', got 'linear'",
    ),
    "no projector type": (with_config(mm_projector_type=None), r"must be 'mlp2x_gelu', got 'linear'"),
    "start and end tokens": (with_config(mm_use_im_start_end=True), r"config\.mm_use_im_start_end is set"),
    "tied": (with_config(tie_word_embeddings=True), r"config\.tie_word_embeddings is set"),
    "quantized": (with_config(quantization_config={"bits": 4}), r"config\.quantization_config is set"),
    "another tokenizer": (without_file("tokenizer.model"), r"has no tokenizer\.model"),
    "broken tokenizer": (with_file("tokenizer.model", "nonsense"), r"cannot read the tokenizer"),
    "ChatML": (add_chatml, r"ChatML prompts"),
    "feature": (with_config(mm_vision_select_feature="cls"), r"mm_vision_select_feature must be"),
    "no layer": (with_config(mm_vision_select_layer=None), r"mm_vision_select_layer must be a layer number, got None"),
    "no vocabulary": (with_config(vocab_size=None), r"config\.vocab_size must be a positive number, got None"),
    "impossible config": (with_config(hidden_size="wide"), r"config\.json does not describe a model"),
    "no weights": (without_file("pytorch_model.bin"), r"holds no weights"),
    "missing key": (remove("lm_head.weight"), r"lacks 1 tensors: lm_head\.weight"),
    "missing layer": (with_config(num_hidden_layers=4), r"lacks 9 tensors: model\.language_model\.layers\.3\."),
    "surplus layer": (with_config(num_hidden_layers=2), r"holds more than config\.json describes"),
    "unknown key": (put("model.resampler.query", torch.zeros(1)), r"not known: model\.resampler\.query"),
    "one tensor of a tower": (
        put("model.vision_tower.vision_model.pre_layrnorm.bias", torch.zeros(64)),
        r"lacks \d+ tensors: model\.vision_tower",
    ),
    "shape": (put("model.norm.weight", torch.zeros(63)), r"language_model\.norm\.weight has shape \[63\] .* \[64\]"),
    "vocabulary rows": (with_config(vocab_size=399), r"has shape \[400, 64\] .* asks for \[399, 64\]"),
    "v1.6 config on v1.5 weights": (with_config(mm_patch_merge_type="spatial_unpad"), r"no model\.image_newline"),
    "lost shard": (lose_a_shard, r"names pytorch_model-00002-of-00003\.bin, which is not there"),
    "truncated": (truncate_safetensors, r"model\.safetensors is truncated"),
}
REFUSED_16 = {
    "flat merge": (with_config(mm_patch_merge_type="flat"), r"mm_patch_merge_type must be 'spatial_unpad'"),
    "max pooling": (
        with_config(mm_patch_merge_type="spatial_unpad_max"),
        r"must be 'spatial_unpad' for LLaVA v1\.6, got",
    ),
    "no pinpoints": (with_config(image_grid_pinpoints=None), r"image_grid_pinpoints is missing"),
    "lost tower": (
        lambda folder: (
            with_config(unfreeze_mm_vision_tower=True)(folder),
            change_weights(folder, lambda tensors: [tensors.pop(k) for k in list(tensors) if "vision_tower" in k]),
        ),
        r"was trained together with its vision tower, but does not hold that tower",
    ),
    "odd pinpoints": (with_config(image_grid_pinpoints="many"), r"image_grid_pinpoints must be a list of pairs"),
    "no newline": (remove("model.image_newline"), r"no model\.image_newline"),
    "half a tower": (
        remove("model.vision_tower.vision_tower.vision_model.post_layernorm.bias"),
        r"lacks 1 tensors: model\.vision_tower\.vision_model\.post_layernorm\.bias",
    ),
    "tensor under two names": (
        put("model.vision_tower.vision_model.post_layernorm.bias", torch.zeros(64)),
        r"twice, the second time as",
    ),
}


class TestRefusals:
    """A clear message, and no trace of a destination."""

    @pytest.mark.parametrize("case", REFUSED)
    def test_v15(self, tmp_path: Path, case: str) -> None:
        self.check(tmp_path, "v15", *REFUSED[case])

    @pytest.mark.parametrize("case", REFUSED_16)
    def test_v16(self, tmp_path: Path, case: str) -> None:
        self.check(tmp_path, "v16", *REFUSED_16[case])

    def check(self, root: Path, version: str, spoil: Callable[[Path], Any], message: str) -> None:
        src = original(root / "src", version)
        spoil(src)
        with pytest.raises(CheckpointError, match=message):
            convert_llava(src, root / "new" / "out", CLIP)
        assert os.listdir(root) == ["src"]

    def test_a_pickle_with_code_is_never_run(self, tmp_path: Path) -> None:
        class RunsCode:
            def __reduce__(self) -> tuple:
                return Path.touch, (tmp_path / "executed",)

        src = original(tmp_path / "src")
        torch.save({**weights(src), "model.extra": RunsCode()}, src / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is refused"):
            convert_llava(src, tmp_path / "out", CLIP)
        assert os.listdir(tmp_path) == ["src"]

    def test_a_tower_that_is_no_clip(self, tmp_path: Path) -> None:
        tower = shutil.copytree(CLIP, tmp_path / "tower")
        edit_json(tower / "config.json", model_type="siglip_vision_model")
        with pytest.raises(CheckpointError, match=r"must be a CLIP model, its config\.model_type is 'siglip"):
            convert_llava(original(tmp_path / "src"), tmp_path / "out", tower)

    def test_a_tower_of_another_size(self, tmp_path: Path) -> None:
        tower = shutil.copytree(CLIP, tmp_path / "tower")
        edit_json(tower / "config.json", hidden_size=32)
        with pytest.raises(CheckpointError, match=r"has shape \[64\].*asks for \[32\]"):
            convert_llava(original(tmp_path / "src", "v16"), tmp_path / "out", tower)

    def test_a_tower_without_preprocessor(self, tmp_path: Path) -> None:
        tower = shutil.copytree(CLIP, tmp_path / "tower")
        (tower / "preprocessor_config.json").unlink()
        with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json"):
            convert_llava(original(tmp_path / "src"), tmp_path / "out", tower)

    def test_a_tower_whose_preprocessor_is_for_another_size(self, tmp_path: Path) -> None:
        tower = shutil.copytree(CLIP, tmp_path / "tower")
        edit_json(tower / "preprocessor_config.json", crop_size=224)
        with pytest.raises(CheckpointError, match=r"crops images to 224, but its config\.image_size is 336"):
            convert_llava(original(tmp_path / "src"), tmp_path / "out", tower)

    def test_no_tower_anywhere(self, tmp_path: Path) -> None:
        src = original(tmp_path / "src", mm_vision_tower=None)
        with pytest.raises(CheckpointError, match=r"names no vision tower.*--vision-tower"):
            convert_llava(src, tmp_path / "out")

    def test_a_tower_without_weights_where_they_are_needed(self, tmp_path: Path) -> None:
        tower = shutil.copytree(CLIP, tmp_path / "tower")
        (tower / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"neither .* holds vision weights"):
            convert_llava(original(tmp_path / "src"), tmp_path / "out", tower)

    def test_the_named_tower_cannot_be_fetched_offline(self, tmp_path: Path) -> None:
        src = original(tmp_path / "src", mm_vision_tower="openai/clip-vit-large-patch14-336-absent")
        with pytest.raises(CheckpointError, match=r"the Hub did not give it .*--vision-tower"):
            convert_llava(src, tmp_path / "out")

    def test_a_hub_source_cannot_be_fetched_offline(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"nobody/nothing is no local folder, and the Hub did not give it"):
            convert_llava("nobody/nothing", tmp_path / "out", CLIP)

    @pytest.mark.parametrize("source", ["", "./absent", "/absent/folder", "a/b/c", Path("absent")])
    def test_a_source_that_is_not_there(self, tmp_path: Path, source: str | Path) -> None:
        with pytest.raises(CheckpointError, match=r"there is no folder|an empty name"):
            convert_llava(source, tmp_path / "out", CLIP)

    def test_a_source_that_is_a_file(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="is a file; give the folder"):
            convert_llava(DATA / "scene.png", tmp_path / "out", CLIP)

    @pytest.mark.parametrize("where", [".", "..", "../tower"])
    def test_inputs_are_never_overwritten(self, tmp_path: Path, where: str) -> None:
        src, tower = original(tmp_path / "a" / "src"), shutil.copytree(CLIP, tmp_path / "a" / "tower")
        before = contents(src), contents(tower)
        with pytest.raises(CheckpointError, match="holds the input"):
            convert_llava(src, src / where, tower, overwrite=True)
        assert (contents(src), contents(tower)) == before


class TestFailuresWhileWriting:
    def test_a_filled_destination_is_kept_unless_told(self, tmp_path: Path) -> None:
        src, out = original(tmp_path / "src"), tmp_path / "out"
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        with pytest.raises(CheckpointError, match="exists and is not empty"):
            convert_llava(src, out, CLIP)
        assert contents(out).keys() == {"notes.txt"}
        convert_llava(src, out, CLIP, overwrite=True)
        assert not (out / "notes.txt").exists()
        load(out, "v15")

    @pytest.mark.parametrize(
        ("number", "message"), [(errno.ENOSPC, "no space left to write"), (errno.EACCES, "no permission to write")]
    )
    def test_the_disk_gives_up_half_way(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
    ) -> None:
        written: list[Path] = []

        def write_two(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
            if len(written) == 2:
                path.write_bytes(b"half a shard")
                raise OSError(number, os.strerror(number), str(path))
            save_file(tensors, path, metadata)
            written.append(path)

        monkeypatch.setattr(checkpoint_io, "save_file", write_two)
        with pytest.raises(CheckpointError, match=message):
            convert_llava(original(tmp_path / "src"), tmp_path / "out", CLIP, max_shard_size="200KB")
        assert len(written) == 2
        assert os.listdir(tmp_path) == ["src"]

    def test_an_interrupt_leaves_the_old_result(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        src, out = original(tmp_path / "src"), tmp_path / "out"
        out.mkdir()
        (out / "config.json").write_text("old")

        def interrupt(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(checkpoint_io, "save_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert_llava(src, out, CLIP, overwrite=True)
        assert (out / "config.json").read_text() == "old"
        assert sorted(os.listdir(tmp_path)) == ["out", "src"]


def big_original(folder: Path, layers: int = 10) -> int:
    """Write a checkpoint of about 17 MB a layer in 32 MB shards; return its size in bytes."""
    original(folder, hidden_size=512, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=8)
    edit_json(folder / "config.json", num_key_value_heads=8)
    (folder / "pytorch_model.bin").unlink()
    shapes = {"model.embed_tokens.weight": (400, 512), "lm_head.weight": (400, 512), "model.norm.weight": (512,)}
    shapes |= {"model.mm_projector.0.weight": (512, 64), "model.mm_projector.2.weight": (512, 512)}
    shapes |= {"model.mm_projector.0.bias": (512,), "model.mm_projector.2.bias": (512,)}
    for i in range(layers):
        part = f"model.layers.{i}."
        shapes |= {f"{part}self_attn.{name}_proj.weight": (512, 512) for name in "qkvo"}
        shapes |= {f"{part}mlp.{name}_proj.weight": (2048, 512) for name in ("gate", "up")}
        shapes |= {f"{part}mlp.down_proj.weight": (512, 2048)}
        shapes |= {f"{part}{name}_layernorm.weight": (512,) for name in ("input", "post_attention")}
    write_checkpoint(((name, torch.ones(shape)) for name, shape in shapes.items()), folder, "32MB")
    return 4 * sum(torch.Size(shape).numel() for shape in shapes.values())


class TestMemory:
    def test_only_one_shard_of_tensors_is_alive(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        src = original(tmp_path / "src", "v16")
        to_safetensors(src, "200KB")
        live = peak = total = 0

        def gone(size: int) -> None:
            nonlocal live
            live -= size

        def watched(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal live, peak, total
            for name, tensor in iter_checkpoint_tensors(folder):
                size = tensor.numel() * tensor.element_size()
                live, total = live + size, total + size
                peak = max(peak, live)
                weakref.finalize(tensor, gone, size)
                yield name, tensor
                del tensor

        monkeypatch.setattr(convert, "iter_checkpoint_tensors", watched)
        convert_llava(src, tmp_path / "out", CLIP, max_shard_size="200KB")
        largest = 577 * 64 * 4
        assert total > 1_500_000
        assert peak <= 200_000 + 2 * largest

    @pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA covers what is needed here on Linux only")
    @pytest.mark.parametrize("form", ["safetensors", "bin"])
    @pytest.mark.core
    def test_a_process_that_may_use_three_shards_converts_six(self, tmp_path: Path, form: str) -> None:
        src = tmp_path / "src"
        assert big_original(src) > 5 * 32_000_000
        if form == "bin":
            index = json.loads((src / "model.safetensors.index.json").read_text())["weight_map"]
            for file in set(index.values()):
                torch.save(load_file(src / file), src / file.replace("safetensors", "bin"))
                (src / file).unlink()
            index = {name: file.replace("safetensors", "bin") for name, file in index.items()}
            (src / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
            (src / "model.safetensors.index.json").unlink()
        program = f"""
            import resource, sys, torch
            torch.set_num_threads(1)
            from vispruner.conversion.convert import convert_llava
            with open("/proc/self/status") as status:
                used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
            resource.setrlimit(resource.RLIMIT_DATA, (used + {3 * 32_000_000}, resource.RLIM_INFINITY))
            try:
                torch.ones({4 * 32_000_000 // 4})
                sys.exit("the limit does not hold")
            except RuntimeError:
                pass
            convert_llava({str(src)!r}, {str(tmp_path / "out")!r}, {str(CLIP)!r}, max_shard_size="32MB")
        """
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        assert "converting: 100%" in run.stderr
        assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 5
