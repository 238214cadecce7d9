"""Gemma 3 beyond the property matrix: tied weights, crops, and images that are seen in both directions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from counting import cached_tokens
from matrix import ASK, HELLO, ONE, answers, logits
from PIL import Image as Pictures
from rows import draw_weights
from rows.gemma3 import IMAGE, POOLED, ROW, SIZE
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

import vispruner


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose lm_head is the embedding, as that of every released Gemma 3."""
    config = ROW.config()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    stock = ROW.stock_class(config).eval()
    draw_weights(stock)
    folder = tmp_path_factory.mktemp("gemma3") / "base"
    stock.save_pretrained(folder)
    return folder


def test_tied_weights_stay_one_tensor_through_load_and_save(base: Path, tmp_path: Path) -> None:
    model = vispruner.load(base, **ROW.options).eval()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = vispruner.load(tmp_path).eval()
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(logits(again, ROW.inputs([ONE])), logits(model, ROW.inputs([ONE])))


def test_tokens_that_stay_see_those_behind_them(base: Path) -> None:
    """The first token of an image has another hidden state where token_type_ids let it see the others."""
    model = vispruner.load(base, **ROW.options).eval()
    inputs = ROW.inputs([ONE])
    both_ways = logits(model, inputs)
    del inputs["token_type_ids"]
    before = 1 + len(HELLO) + 2  # the first of the image that stays
    first = before + POOLED**2 - 5
    causal = logits(model, inputs)
    torch.testing.assert_close(both_ways[0, :before], causal[0, :before])
    assert not torch.allclose(both_ways[0, first], causal[0, first], atol=1e-3)


def test_crops_are_images_of_their_own(base: Path) -> None:
    model = vispruner.load(base, **ROW.options).eval()
    picture = Pictures.fromarray(np.random.default_rng(0).integers(0, 256, (300, 900, 3), dtype=np.uint8))
    images = Gemma3ImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=100,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    )(images=picture, return_tensors="pt")
    pixels = images["pixel_values"]
    assert len(pixels) == 1 + int(images["num_crops"][0]) > 2
    assert model.visual_token_counts(pixels) == ([POOLED**2] * len(pixels), [5] * len(pixels))
    ids = torch.tensor([[1, *HELLO, *([91, *[IMAGE] * POOLED**2, 92] * len(pixels)), *ASK]])
    inputs = {"input_ids": ids, "token_type_ids": (ids == IMAGE).long(), "pixel_values": pixels}
    assert answers(model, inputs).shape == (1, 6)
    assert cached_tokens(model, inputs) == ids.shape[1] - len(pixels) * (POOLED**2 - 5)
