"""LLaVA-NeXT's own: grids of any shape, and the paper's tile mode, which keeps the padding of tiles too."""

from __future__ import annotations

import math

import pytest
import torch
from matrix import ASK, HELLO, NEW, ONE, Model, generate, logits, require_the_reference
from rows import Image
from rows.llava_next import tiles_of

from vispruner.stock_versions import CACHE

TILED = ["llava_next", "llava_next-paper", "llava_next-mistral"]
paper = pytest.mark.parametrize("model", ["llava_next-paper"], indirect=True)


@pytest.mark.parametrize("size", [(2000, 60), (60, 2000), (5000, 20), (57, 56), (112, 112)], ids=str)
@pytest.mark.parametrize("model", [*TILED, "llava_onevision"], indirect=True)
def test_any_aspect_ratio_equals_the_reference(model: Model, size: tuple[int, int]) -> None:
    """The grid of a very long image may lose whole tiles to unpadding."""
    require_the_reference(model, [HELLO, Image(size), ASK])


@pytest.mark.parametrize("model", TILED, indirect=True)
def test_a_bad_grid_is_no_grid_of_the_shared_prompts(model: Model) -> None:
    """So the batches of test_architectures.py hold images of different numbers of tiles."""
    assert len({tiles_of(size) for size in [(56, 84), (84, 112), (112, 56)]}) > 1
    inputs = model.prompt(ONE)
    rows, columns = model.pruned.model.tile_grid(inputs["image_sizes"][0])
    assert (rows, columns) == tiles_of((56, 84))


@paper
def test_keeping_all_keeps_every_patch_of_every_tile(model: Model) -> None:
    model.pruned.set_vispruner_config(visual_token_num=16)
    inputs = model.prompt(ONE)
    tokens = 16 * (1 + math.prod(tiles_of((56, 84))))
    ((full,), (kept,)) = model.pruned.visual_token_counts(inputs["pixel_values"], inputs["image_sizes"])
    assert kept == tokens > full  # more than stock's unpadded packing: the prompt is lengthened
    result = generate(model.pruned, inputs, return_dict_in_generate=True)
    prompt = inputs["input_ids"].shape[1]
    assert result[CACHE].get_seq_length() == prompt - full + tokens + NEW - 1
    assert torch.equal(result.sequences[:, :prompt], inputs["input_ids"])


@paper
def test_a_tile_takes_as_many_tokens_as_any_other(model: Model) -> None:
    inputs = model.prompt(ONE)
    _, kept = model.pruned.visual_token_counts(inputs["pixel_values"], inputs["image_sizes"])
    assert kept == [5 * (1 + math.prod(tiles_of((56, 84))))]


@paper
def test_short_and_full_prompts_of_equal_length_are_told_apart(model: Model) -> None:
    """Two images may need as many tokens together, but each a different number."""
    model.pruned.set_vispruner_config(visual_token_num=15)
    inputs = model.prompt([HELLO, Image((28, 112), seed=1), [18], Image((112, 56), seed=2), ASK])
    full, kept = model.pruned.visual_token_counts(inputs["pixel_values"], inputs["image_sizes"])
    assert full != kept and sum(full) == sum(kept)
    short = model.shortened(inputs)
    assert short["input_ids"].shape == inputs["input_ids"].shape
    assert not torch.equal(short["input_ids"], inputs["input_ids"])
    assert torch.equal(logits(model.pruned, short)[0, -1], logits(model.pruned, inputs)[0, -1])
