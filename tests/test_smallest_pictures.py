"""The smallest and thinnest pictures that processors let through: pruned as others are, or refused there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matrix import ASK, HELLO, NEW, ROWS, Model, generate, logits
from PIL import Image as Picture
from rows import Image, Video
from tiny_processors import NEED_EXTRA, WRITERS, write_processor
from transformers import AutoProcessor

import vispruner

LEAST = 28  # pixels of a side that the Qwen-VL processors never go below: one merged token
THIN = [(1, 1), (1, 100), (100, 1), (1, 199), (199, 1), (2, 3), (13, 15)]


def require_pruned(model: Any, inputs: dict[str, Any]) -> None:
    """Assert that a prompt is answered from as many visual tokens as are counted beforehand."""
    full, kept = model.model.count_visual_tokens(model.model.named_as_stock(inputs))
    dropped = sum(map(sum, full.values())) - sum(map(sum, kept.values()))
    assert all(a >= b >= 1 for token in full for a, b in zip(full[token], kept[token], strict=True))
    made = generate(model, inputs, return_dict_in_generate=True)
    length = inputs["input_ids"].shape[1]
    assert made.sequences.shape[1] == length + NEW
    assert made.past_key_values.get_seq_length() == length - dropped + NEW - 1
    assert logits(model, inputs)[:, -1].isfinite().all()


@pytest.mark.parametrize("model", ROWS, indirect=True)
@pytest.mark.parametrize("change", [{"visual_token_num": 1}, {"keep_ratio": 0.01}, {"method": "uniform_grid"}])
def test_prompts_with_the_smallest_items_are_pruned(model: Model, change: dict[str, Any]) -> None:
    """A size stands for what the processor makes of it: Qwen-VL's makes a multiple of `LEAST`, others tiles."""
    model.pruned.set_vispruner_config(**change)
    qwen = model.row.model_type.startswith("qwen")
    sizes = [(LEAST, LEAST), (LEAST, 5 * LEAST), (5 * LEAST, LEAST)] if qwen else THIN
    for number, size in enumerate(sizes):
        require_pruned(model.pruned, model.prompt([HELLO, Image(size, seed=number), ASK]))
    beside = [HELLO, Image(sizes[1], seed=1), [18], Image((84, 112), seed=2), ASK]
    require_pruned(model.pruned, model.prompt(beside))
    if "video" in model.row.modalities:
        require_pruned(model.pruned, model.prompt([HELLO, Video(8, sizes[1] if qwen else (1, 9), seed=4), ASK]))


# Through the processors themselves


def answered(folder: Path, picture: Picture.Image, **options: Any) -> None:
    """Ask about the picture, unless the processor refuses it.

    Qwen-VL's refuse what is 200 times as long as wide; Video-LLaVA's takes a side of one pixel for a channel.
    """
    processor, model = AutoProcessor.from_pretrained(folder), vispruner.load(folder, **options).eval()
    texts = [{"type": "image"}, {"type": "text", "text": "w11 w12"}]
    text = processor.apply_chat_template([{"role": "user", "content": texts}], add_generation_prompt=True)
    try:
        inputs = processor(images=[picture], text=[text], return_tensors="pt")
    except ValueError as error:
        assert "aspect ratio" in str(error) or 1 in picture.size
        return
    require_pruned(model, dict(inputs))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


def folder_of(name: str, written: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    if name not in written:
        row = ROWS[name]
        stock = row.stock_class(row.config()).eval()
        stock.save_pretrained(folder := tmp_path_factory.mktemp(name))
        write_processor(row, folder)
        written[name] = folder
    return written[name]


@pytest.mark.parametrize("size", THIN)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.video] if name in NEED_EXTRA else []) for name in WRITERS]
)
def test_what_a_processor_makes_of_thin_pictures_is_pruned(
    name: str, size: tuple[int, int], written: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    if name in NEED_EXTRA:
        pytest.importorskip("torchvision")
    folder = folder_of(name, written, tmp_path_factory)
    picture = Picture.effect_noise(size[::-1], 60).convert("RGB")
    answered(folder, picture, visual_token_num=1)


@pytest.mark.parametrize("size", THIN)
@pytest.mark.parametrize("mode", [None, "paper", "native"])
def test_llava_and_llava_next_prune_thin_pictures(
    mode: str | None, size: tuple[int, int], tiny_llava_repo: Path, tiny_llava_next_repo: Path
) -> None:
    repo, options = (tiny_llava_repo, {}) if mode is None else (tiny_llava_next_repo, {"tile_mode": mode})
    picture = Picture.effect_noise(size[::-1], 60).convert("RGB")
    processor, model = AutoProcessor.from_pretrained(repo), vispruner.load(repo, visual_token_num=1, **options).eval()
    inputs = dict(processor(images=[picture], text=["USER: <image>\nWhat is this? ASSISTANT:"], return_tensors="pt"))
    require_pruned(model, inputs)
