"""What an encoder costs is what PyTorch's own counter sees, and ceilings follow from it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from matrix import ONE, pair
from rows import Row, rows
from torch.utils.flop_counter import FlopCounterMode

from vispruner.conversion import cli
from vispruner.conversion.build import build_repo
from vispruner.conversion.ceilings import TEXT_TOKENS, TILES, ceiling, ceiling_of_config, encoder_flops, example_inputs
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
    encoder, projector = encoder_flops(pruned.model, example_inputs(pruned.model))
    config = pruned.config
    dense, text = (language_model_flops(config, TEXT_TOKENS + count) + logits_flops(config) for count in (full, 0))
    before = encoder + projector + dense
    assert found.encoder == pytest.approx((encoder + projector) / before)
    assert found.none == pytest.approx(before / (encoder + text))
    assert f"With {kept:,.0f} visual tokens that token comes at most {found.first_token:.1f} times as soon" in str(
        found
    )


@pytest.mark.parametrize("name", ["llava", "gemma3", "internvl", "smolvlm", "qwen3_vl"])
def test_what_left_within_the_encoder_is_no_work_for_the_layers_behind(name: str) -> None:
    row = next(row for row in rows() if row.model_type == name)
    _, pruned = pair(row, **({} if "keep_ratio" in row.options else {"visual_token_num": 3}))
    pruned.set_attn_implementation("eager")
    inputs, layers = row.inputs([ONE]), len(pruned.model.vision_layers)

    def of_a_layer_behind() -> int:
        """Reading attention is counted in one of the two."""
        described = {key: inputs[key] for key in pruned.modalities[0].described_by if key in inputs}
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            pruned.model.get_image_features(inputs["pixel_values"], **described)
        counts = {key: sum(ops.values()) for key, ops in counter.get_flop_counts().items()}
        return min(flops for key, flops in counts.items() if re.search(r"(blocks|layers?)\.[12]$", key))

    whole, all_rows = ceiling(pruned.model), of_a_layer_behind()
    pruned.set_vispruner_config(encoder_stage={"layer": 0, "keep_ratio": 0.5})
    staged, fewer = ceiling(pruned.model), of_a_layer_behind()
    before, after = (encoder_flops(pruned.model, inputs, staged=counts)[0] for counts in (False, True))
    assert before - after == pytest.approx((all_rows - fewer) * (layers - 1), rel=0.02) and fewer < all_rows
    assert staged.first_token > whole.first_token
    assert (staged.encoder, staged.prefill) == (whole.encoder, whole.prefill)
    assert staged.none > max(whole.none, staged.first_token)


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


def test_a_budget_in_the_language_model_is_of_each_tile() -> None:
    row = next(row for row in rows() if row.model_type == "internvl")
    _, pruned = pair(row, method="fastv", visual_token_num=12, prune_layers=[1])
    full, held = TILES * 16, [TILES * count for count in pruned.model.layer_counts(16)]
    assert ceiling(pruned.model).visual_tokens == (full, sum(held) / len(held))


@pytest.mark.core
def test_the_card_says_it_of_the_encoder_that_the_repo_has(tmp_path: Path) -> None:
    whole, shorter = (
        build_repo("tiny-llava-vispruner", tmp_path / str(drops), show_progress=False, drop_unused_vision_layers=drops)
        for drops in (False, True)
    )
    limits = [ceiling_of_config(json.loads((folder / "config.json").read_text())) for folder in (whole, shorter)]
    assert limits[1].encoder < limits[0].encoder
    for folder, limit in zip((whole, shorter), limits, strict=True):
        assert str(limit) in (folder / "README.md").read_text(encoding="utf-8")


def test_methods_for_a_model_end_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods", "--for", "smolvlm", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["ceiling_at_a_quarter"]
    assert 0 < said["cache"] < 1 < said["first_token"] < said["none"]
