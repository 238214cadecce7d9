"""What an encoder costs is what PyTorch's own counter sees, and ceilings follow from it."""

from __future__ import annotations

import pytest
import torch
from matrix import ONE, pair
from rows import Row, rows
from torch.utils.flop_counter import FlopCounterMode

from vispruner.conversion.ceilings import TEXT_TOKENS, ceiling, ceiling_of_config, encoder_flops, example_inputs
from vispruner.conversion.prefill_cost import language_model_flops, logits_flops

every_row = pytest.mark.parametrize("row", list(rows()), ids=lambda row: row.model_type)


@every_row
def test_the_cost_of_every_encoder_is_known(row: Row) -> None:
    stock, pruned = pair(row)
    stock.set_attn_implementation("eager")
    inputs = row.inputs([ONE])
    modality = pruned.modalities[0]
    described = {name: inputs[name] for name in modality.described_by if name in inputs}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        stock.model.get_image_features(inputs[modality.pixels], **described)
    by_module = counter.get_flop_counts()
    beside = ("rotary_emb", "rotary_pos_emb", ".head", "pooler")
    left_out = sum(sum(ops.values()) for name, ops in by_module.items() if name.endswith(beside))
    assert sum(encoder_flops(pruned.model, inputs)) == counter.get_total_flops() - left_out


@every_row
def test_a_ceiling_is_between_nothing_and_no_visual_tokens(row: Row) -> None:
    _, pruned = pair(row, method="vispruner", keep_ratio=0.25, visual_token_num=None)
    found = ceiling(pruned.model)
    assert 1 < found.first_token < found.none and found.first_token < found.prefill
    assert 0 < found.encoder < 1 and 0 < found.cache < 1
    full, kept = found.visual_tokens
    before = sum(encoder_flops(pruned.model, example_inputs(pruned.model)))
    config = pruned.config
    dense = language_model_flops(config, TEXT_TOKENS + full) + logits_flops(config)
    assert found.encoder == pytest.approx(before / (before + dense))
    assert f"with {kept:,.0f} of them expect it at most {found.first_token:.1f}x as soon" in str(found)


def test_nothing_pruned_gains_nothing() -> None:
    row = next(rows())
    _, pruned = pair(row, method="none", visual_token_num=None, keep_ratio=None)
    found = ceiling(pruned.model)
    assert (found.first_token, found.prefill, found.cache) == (1, 1, 1) and found.none > 1


def test_a_method_in_the_language_model_counts_what_its_layers_hold() -> None:
    row = next(row for row in rows() if row.model_type == "llava")
    _, pruned = pair(row, method="fastv", visual_token_num=40, prune_layers=[1])
    found = ceiling(pruned.model)
    held = pruned.model.layer_counts(64)
    assert found.visual_tokens == (64, sum(held) / len(held))
    assert found.cache == pytest.approx(sum(TEXT_TOKENS + n for n in held) / (len(held) * (TEXT_TOKENS + 64)))


@every_row
def test_a_config_alone_says_the_same(row: Row) -> None:
    _, pruned = pair(row)
    content = {**pruned.config.to_dict(), "vispruner_config": pruned.config.vispruner_config}
    assert ceiling_of_config(content) == ceiling(pruned.model)
