"""Encoders of tiles whose patches are merged: padding, prompts as the stock processors write them, features in use."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matrix import pair
from PIL import Image as PILImage
from rows import Image, Row
from rows._tiles import with_attention_maps
from rows.idefics3 import ROW as IDEFICS3
from rows.idefics3 import tile_grid
from rows.internvl import ROW as INTERNVL
from rows.internvl import tiles_of
from rows.smolvlm import ROW as SMOLVLM
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

from vispruner.visual_features import tokens_of

SIZES = [(56, 84), (84, 112), (112, 56), (32, 32), (33, 32), (20, 200), (200, 20), (96, 95), (31, 64), (150, 149)]
# Sums run in another order than in the loops of the reference.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def photo(size: tuple[int, int]) -> PILImage.Image:
    height, width = size
    return PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def by_tile(features: Any, tokens: int) -> torch.Tensor:
    """Return a stock output as (tiles, tokens, D): transformers versions differ in what they join."""
    return torch.cat(list(features.pooler_output)).unflatten(0, (-1, tokens))


@pytest.mark.parametrize("size", SIZES)
def test_an_internvl_image_has_the_tiles_that_its_processor_cuts(size: tuple[int, int]) -> None:
    processor = GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=6
    )
    made = processor(images=photo(size), return_tensors="pt")
    assert made["num_patches"].tolist() == [tiles_of(size)]
    inputs = INTERNVL.inputs([[[10], Image(size)]])
    assert inputs["pixel_values"].shape == made["pixel_values"].shape


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("processor_class", "image_processor_class"),
    [(Idefics3Processor, Idefics3ImageProcessorPil), (SmolVLMProcessor, SmolVLMImageProcessorPil)],
)
def test_an_idefics3_prompt_has_the_tiles_and_markers_that_its_processor_writes(
    size: tuple[int, int], processor_class: Any, image_processor_class: Any
) -> None:
    processor = image_processor_class(size={"longest_edge": 96}, max_image_size={"longest_edge": 32})
    made = processor(images=[[photo(size)]], return_row_col_info=True, return_tensors="pt")
    grid = int(made["rows"][0][0]), int(made["cols"][0][0])
    assert grid == tile_grid(size)
    inputs = IDEFICS3.inputs([[[10], Image(size)]])
    assert inputs["pixel_values"].shape == made["pixel_values"].shape
    assert torch.equal(inputs["pixel_attention_mask"], made["pixel_attention_mask"])
    # Of SmolVLM's processor only this method works without the packages that its videos need.
    letters = SimpleNamespace(
        fake_image_token="A", image_token="I", global_image_tag="G", global_image_token="G", image_seq_len=16
    )
    text = processor_class.replace_image_token(letters, made, 0)
    for row in range(grid[0]):
        for column in range(grid[1]):
            text = text.replace(f"<row_{row + 1}_col_{column + 1}>", chr(200 + 10 * row + column))
    names = {"A": 91, "I": 90, "G": 92, "\n": 93}
    written = [names.get(letter, ord(letter) - 100) for letter in text]
    assert inputs["input_ids"][0, 2:].tolist() == written


@pytest.mark.parametrize("row", [INTERNVL, IDEFICS3, SMOLVLM], ids=lambda row: row.model_type)
@pytest.mark.parametrize("budget", [1, 2, 5, 15])
def test_kept_tokens_are_rows_of_the_stock_features(row: Row, budget: int) -> None:
    stock, pruned = pair(row, visual_token_num=budget)
    inputs = row.inputs([[[10], Image((56, 84), 1), Image((84, 56), 2)], [[11], Image((32, 32), 3)]])
    given = {name: inputs[name] for name in ("pixel_values", "pixel_attention_mask") if name in inputs}
    with torch.no_grad():
        whole = by_tile(stock.get_image_features(**given, return_dict=True), 16)
        kept = pruned.get_image_features(**given, return_dict=True)
    assert torch.stack(tokens_of(kept)).shape == (len(whole), budget, whole.shape[-1])
    assert pruned.visual_token_counts(**given) == ([16] * len(whole), [budget] * len(whole))
    for tile, tokens, placeholders in zip(whole, tokens_of(kept), kept.placeholders, strict=True):
        torch.testing.assert_close(tokens, tile[placeholders], **CLOSE)


@pytest.mark.parametrize("row", [IDEFICS3, SMOLVLM], ids=lambda row: row.model_type)
class TestPadding:
    def inputs(self, row: Row) -> dict[str, torch.Tensor]:
        """Two rows of tiles, of which one lacks rows and columns of patches."""
        inputs = row.inputs([[[10], Image((56, 84), 1), [11]], [[12], Image((20, 200), 2), [13]]])
        inputs["pixel_attention_mask"][0, 1, 21:] = 0  # a patch with any pixel in it stays
        inputs["pixel_attention_mask"][0, 1, :, 16:] = 0
        return inputs

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_padding_within_a_tile_neither_asks_nor_is_attended_to(self, row: Row, attention: str) -> None:
        stock, pruned = pair(row)
        pruned.set_attn_implementation(attention)
        inputs = self.inputs(row)
        given = {name: inputs[name] for name in ("pixel_values", "pixel_attention_mask")}
        expected = row.reference(stock, inputs, row.options)[90]
        with torch.no_grad():
            kept = pruned.get_image_features(**given)
        for tile, (tokens, places) in enumerate(expected):
            assert torch.equal(kept.placeholders[tile], places)
            torch.testing.assert_close(tokens_of(kept)[tile], tokens, rtol=1e-4, atol=1e-5)
        saliency = kept.saliency[1].view(4, 4)
        assert (saliency[3:] == 0).all() and (saliency[:, 2:] == 0).all()
        torch.testing.assert_close(kept.saliency.sum(1), torch.full((len(kept.saliency),), 0.25))
        assert math.isclose(float(saliency[:3, :2].sum()), 0.25, rel_tol=1e-5)

    def test_a_mask_of_ones_is_no_mask(self, row: Row) -> None:
        _, pruned = pair(row)
        inputs = row.inputs([[[10], Image((56, 84), 1)]])
        with torch.no_grad():
            masked = pruned.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"])
            plain = pruned.get_image_features(inputs["pixel_values"])
        assert torch.equal(torch.cat(tokens_of(masked)), torch.cat(tokens_of(plain)))

    def test_padding_tiles_are_left_out_wherever_they_stand(self, row: Row) -> None:
        stock, pruned = pair(row)
        inputs = row.inputs([[[10], Image((56, 84), 1)]])
        pixels = inputs["pixel_values"]
        gaps = torch.zeros(1, pixels.shape[1] + 2, 3, 32, 32)
        gaps[:, 1:2], gaps[:, 3:] = pixels[:, :1], pixels[:, 1:]
        with torch.no_grad():
            spread, together = (tokens_of(pruned.get_image_features(tiles)) for tiles in (gaps, pixels))
            assert torch.equal(torch.cat(spread), torch.cat(together))
            whole = by_tile(stock.get_image_features(gaps, return_dict=True), 16)
        assert pruned.visual_token_counts(gaps)[0] == [16] * len(whole)


def test_smolvlm_encodes_one_tile_where_all_are_padding_as_stock_does() -> None:
    stock, pruned = pair(SMOLVLM)
    nothing = torch.zeros(2, 3, 3, 32, 32)
    with torch.no_grad():
        (whole,) = by_tile(stock.get_image_features(nothing, return_dict=True), 16)
        kept = pruned.get_image_features(nothing)
    torch.testing.assert_close(kept.pooler_output[0], whole[kept.placeholders[0]], **CLOSE)
    assert pruned.visual_token_counts(nothing) == ([16], [5])


@pytest.mark.parametrize("layer", [-2, 1, 2, 3])
@pytest.mark.parametrize("mean_pooling", [True, False])
def test_internvl_takes_features_and_attention_from_the_same_layer(layer: int, mean_pooling: bool) -> None:
    """Stock reads layer -1 after a layer norm, where the encoder has one, and the others before it."""
    vision = INTERNVL.config().vision_config
    vision.use_mean_pooling = mean_pooling
    stock, pruned = pair(INTERNVL, {"vision_feature_layer": layer, "vision_config": vision})
    pixels = INTERNVL.inputs([[[10], Image((56, 84), 1)]])["pixel_values"]
    with torch.no_grad():
        whole = stock.get_image_features(pixels, return_dict=True).pooler_output
        kept = pruned.get_image_features(pixels)
        maps = with_attention_maps(stock.model.vision_tower)(pixels, output_attentions=True).attentions
    for tile, tokens, placeholders in zip(whole, tokens_of(kept), kept.placeholders, strict=True):
        torch.testing.assert_close(tokens, tile[placeholders], **CLOSE)
    used = {-2: 1, 1: 0, 2: 1, 3: 2}[layer]
    of_patches = maps[used][:, :, 0, 1:].mean(1).view(-1, 4, 2, 4, 2).mean(dim=(2, 4)).flatten(1)
    torch.testing.assert_close(kept.saliency, of_patches, **CLOSE)


def test_internvl_takes_another_feature_layer_in_a_call() -> None:
    stock, pruned = pair(INTERNVL)
    inputs = INTERNVL.inputs([[[10], Image((56, 84), 1), [11]]])
    pixels = inputs["pixel_values"]
    with torch.no_grad():
        whole = stock.get_image_features(pixels, vision_feature_layer=-2, return_dict=True).pooler_output
        kept = pruned.get_image_features(pixels, vision_feature_layer=-2)
        other = pruned(**inputs, vision_feature_layer=-2).logits
        assert not torch.allclose(other, pruned(**inputs).logits, atol=1e-3)
    for tile, tokens, placeholders in zip(whole, tokens_of(kept), kept.placeholders, strict=True):
        torch.testing.assert_close(tokens, tile[placeholders], **CLOSE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vision_feature_layer": 0}, "vision_feature_layer must name one attention layer, got 0"),
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer must name one attention layer, got \[-2, -1\]"),
        ({"vision_feature_select_strategy": "full"}, 'vision_feature_select_strategy must be "default"'),
    ],
)
def test_internvl_refuses_features_that_cannot_be_ranked(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        pair(INTERNVL, change)


def test_hidden_states_are_returned_when_asked_for() -> None:
    for row in (INTERNVL, IDEFICS3, SMOLVLM):
        _, pruned = pair(row)
        inputs = row.inputs([[[10], Image((56, 84), 1)]])
        with torch.no_grad():
            assert pruned.get_image_features(inputs["pixel_values"]).hidden_states is None
            states = pruned.get_image_features(inputs["pixel_values"], output_hidden_states=True).hidden_states
        assert len(states) == 4


def test_new_padding_is_a_token_of_the_model_whatever_its_config_says() -> None:
    """These configs name a padding id of 128002 for any vocabulary; it must not reach the embedding."""
    _, pruned = pair(SMOLVLM)
    inputs = SMOLVLM.inputs([[[10], Image((56, 84), 1), [11]], [[12]]])
    with torch.no_grad():
        expected = pruned(**inputs).logits[:, -1]
        pruned.generation_config.pad_token_id = pruned.config.text_config.pad_token_id = None
        assert torch.equal(pruned(**inputs).logits[:, -1], expected)
