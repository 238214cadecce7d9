"""Qwen-VL prompts with images and videos as the stock processors write them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from rows import Video, draw_weights, rows
from rows._qwen_vl import IMAGE, MERGE, PAD, PATCH, TOKEN_IDS, VIDEO, VISION_END, VISION_START
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import vispruner

pytestmark = pytest.mark.video

ROWS = {row.model_type: row for row in rows() if row.model_type in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")}
MARKERS = {
    "<pad>": PAD,
    "<|vision_start|>": VISION_START,
    "<|vision_end|>": VISION_END,
    "<|image_pad|>": IMAGE,
    "<|video_pad|>": VIDEO,
}
SHOW_IMAGE, SHOW_VIDEO = (f"<|vision_start|><|{name}_pad|><|vision_end|>" for name in ("image", "video"))


def tokenizer() -> PreTrainedTokenizerFast:
    """Every character of plain text is a token; what is none of them is unknown."""
    characters = "abcdefghijklmnopqrstuvwxyz<>.0123456789"
    vocabulary = {"<unk>": 10, **{character: 11 + number for number, character in enumerate(characters)}, **MARKERS}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", unk_token="<unk>", padding_side="left")
    made.add_special_tokens({"additional_special_tokens": list(MARKERS)[1:]})
    assert made.convert_tokens_to_ids(list(MARKERS)) == list(MARKERS.values())
    return made


def processor_of(model_type: str) -> Any:
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    sizes = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 1, "longest_edge": 10**6},
    }
    processor, video_processor = {
        "qwen2_vl": (Qwen2VLProcessor, Qwen2VLVideoProcessor),
        "qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
        "qwen3_vl": (Qwen3VLProcessor, Qwen3VLVideoProcessor),
    }[model_type]
    return processor(Qwen2VLImageProcessorPil(**sizes), tokenizer(), video_processor(**sizes, do_sample_frames=False))


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(params=ROWS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, Any, Callable]]:
    row = ROWS[request.param]
    stock = row.stock_class(row.config()).eval()
    draw_weights(stock)
    stock.save_pretrained(tmp_path)
    pruned = vispruner.load(tmp_path, keep_ratio=0.4).eval()
    assert {name: getattr(pruned.config, name) for name in TOKEN_IDS} == TOKEN_IDS
    processor = processor_of(request.param)

    def inputs(text: str, size: tuple[int, int] = (84, 112)) -> dict[str, Any]:
        given: dict[str, Any] = {"text": [text], "return_tensors": "pt"}
        if SHOW_IMAGE in text:
            given["images"] = [Picture.fromarray(pixels(*size, 3))]
        if SHOW_VIDEO in text:
            given["videos"] = [torch.from_numpy(pixels(8, 3, 56, 84))]
            given["video_metadata"] = [{"fps": 2.0, "total_num_frames": 8, "frames_indices": list(range(8))}]
        return dict(processor(**given))

    yield stock, pruned, inputs


def test_prompts_of_the_stock_processor_have_the_counts_that_the_model_expects(case: tuple) -> None:
    _, pruned, prompt = case
    inputs = prompt(f"see{SHOW_IMAGE}and{SHOW_VIDEO}now")
    full, kept = pruned.model.count_visual_tokens(inputs)
    assert full == {IMAGE: [12], VIDEO: [6] * 4} and kept == {IMAGE: [5], VIDEO: [2] * 4}
    for token, counts in full.items():
        assert (inputs["input_ids"] == token).sum() == sum(counts)
    result = pruned.generate(**copy.copy(inputs), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    width = inputs["input_ids"].shape[1]
    assert torch.equal(result.sequences[:, :width], inputs["input_ids"])
    lost = sum(map(sum, full.values())) - sum(map(sum, kept.values()))
    assert result.past_key_values.get_seq_length() == width - lost + result.sequences.shape[1] - width - 1


def test_keeping_all_equals_stock_bit_for_bit(case: tuple) -> None:
    stock, pruned, prompt = case
    pruned.set_vispruner_config(keep_ratio=1.0)
    for text in (f"see{SHOW_IMAGE}now", f"see{SHOW_VIDEO}now", f"see{SHOW_IMAGE}and{SHOW_VIDEO}now"):
        inputs = prompt(text)
        with torch.no_grad():
            assert torch.equal(pruned(**copy.copy(inputs)).logits, stock(**copy.copy(inputs)).logits)


def test_the_shared_matrix_writes_videos_as_the_stock_processor_does(case: tuple) -> None:
    """So what it finds for prompts without a processor holds for those with one."""
    _, pruned, prompt = case
    row = ROWS[pruned.config.model_type]
    processed = prompt(SHOW_VIDEO)
    written = row.inputs([[Video(8, (56, 84))]])
    for name in ("pixel_values_videos", "video_grid_thw"):
        assert written[name].shape == processed[name].shape
    assert torch.equal(written["video_grid_thw"], processed["video_grid_thw"])

    def shape(inputs: dict[str, Any]) -> list[str]:
        """Runs of placeholders with their lengths, and what stands between them: a marker or text."""
        runs: list[list[Any]] = []
        for token in inputs["input_ids"][0].tolist():
            kind = token if token in MARKERS.values() else "text"
            if not runs or runs[-1][0] != kind:
                runs.append([kind, 0])
            runs[-1][1] += 1
        return [f"{kind} {'' if kind == 'text' else count}" for kind, count in runs]

    assert shape(written) == shape(processed)
    assert processed["mm_token_type_ids"].unique().tolist() == [0, 2]
