"""PaliGemma beyond the property matrix: prefixes that are seen in both directions, and answers to learn from."""

from __future__ import annotations

import pytest
import torch
from matrix import ONE, TOLERANCE, Model, logits
from rows.paligemma import PATCHES, ROW

MODEL = "paligemma"


def test_the_prefix_is_seen_in_both_directions_after_pruning_too(model: Model) -> None:
    """The first token of a prompt sees the last word of it, but no word of the answer."""
    inputs = model.prompt(ONE)
    for type_of_last, is_seen in ((0, True), (1, False)):
        inputs["token_type_ids"][0, -1] = type_of_last
        firsts = []
        for last in (21, 31):
            inputs["input_ids"][0, -1] = last
            firsts.append(logits(model.pruned, inputs)[0, 0])
        assert torch.allclose(*firsts, atol=1e-4) != is_seen


@pytest.mark.parametrize("short", [False, True], ids=["full prompt", "short prompt"])
def test_an_answer_is_learnt_without_seeing_what_follows(model: Model, short: bool) -> None:
    """The first word of the answer is predicted alike, whatever the rest of it is."""
    inputs, losses = model.prompt(ONE), []
    if short:
        inputs = ROW.shortened(inputs, model.counts(inputs)[1])
    width = inputs["input_ids"].shape[1]
    for rest in ([21, 22], [31, 32]):
        answer = torch.tensor([[20, *rest]])
        ids = torch.cat([inputs["input_ids"], answer], dim=1)
        types = torch.cat([inputs["token_type_ids"], torch.ones_like(answer)], dim=1)
        labels = ids.masked_fill(torch.arange(ids.shape[1]) != width, -100)
        given = {"input_ids": ids, "token_type_ids": types, "attention_mask": torch.ones_like(ids), "labels": labels}
        losses.append(model.pruned(**{**inputs, **given}).loss)
    assert losses[0] > 0
    torch.testing.assert_close(*losses, **TOLERANCE)


def test_positions_count_from_1(model: Model) -> None:
    """What the caller gives as position_ids to forward is what the stock model numbers a short prompt with."""
    short = ROW.shortened(model.prompt(ONE), model.counts(model.prompt(ONE))[1])
    positions = 1 + torch.arange(short["input_ids"].shape[1])[None]
    assert torch.equal(logits(model.pruned, {**short, "position_ids": positions}), logits(model.pruned, short))


def test_images_take_the_placeholders_that_the_stock_config_counts(model: Model) -> None:
    pixels = torch.empty(3, 3, 56, 56)
    assert model.pruned.config.text_config.num_image_tokens == PATCHES
    assert model.pruned.visual_token_counts(pixels) == ([PATCHES] * 3, [5] * 3)
