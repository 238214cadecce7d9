"""The analytic cost of a prefill is what PyTorch's own counter sees on a real model."""

from __future__ import annotations

import pytest
import torch
from rows import Row, rows
from tiny_llava import write_tiny_llava
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaNextConfig

from vispruner.conversion.prefill_cost import (
    kv_cache_bytes,
    language_model_flops,
    prefill_flops,
    projector_flops,
)


@pytest.fixture(scope="module", params=["llama", "mistral"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LlavaForConditionalGeneration:
    """Mistral has grouped key-value heads, Llama has not."""
    folder = write_tiny_llava(tmp_path_factory.mktemp("cost") / "base", image_size=112, text_model=request.param)
    # PyTorch's counter does not know the fused attention of the CPU, so it would leave attention out.
    return LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")


def counted_flops(model: LlavaForConditionalGeneration, sequence_length: int, visual_tokens: int) -> int:
    features = torch.zeros(1, visual_tokens, model.config.vision_config.hidden_size)
    embeds = torch.zeros(1, sequence_length, model.config.text_config.hidden_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model.multi_modal_projector(features)
        hidden = model.model.language_model(inputs_embeds=embeds).last_hidden_state
        model.lm_head(hidden[:, -1:])
    return without_angles(counter)


def without_angles(counter: FlopCounterMode) -> int:
    """Angles of the rotary embedding are made by a matrix product of inner size 1, which is no work of the model's."""
    by_module = counter.get_flop_counts()
    angles = sum(sum(ops.values()) for name, ops in by_module.items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - angles


@pytest.mark.parametrize("row", list(rows()), ids=lambda row: row.model_type)
def test_the_cost_of_every_language_model_is_known(row: Row) -> None:
    config = row.config()
    config._attn_implementation = "eager"
    decoder = row.stock_class(config).get_decoder()
    embeds = torch.zeros(1, 21, config.get_text_config().hidden_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        cache = decoder(inputs_embeds=embeds, use_cache=True).past_key_values
    assert language_model_flops(config, 21) == without_angles(counter)
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert kv_cache_bytes(config, 21, bytes_per_value=4) == held


def test_layers_that_see_fewer_tokens_cost_what_they_cost_by_themselves(
    model: LlavaForConditionalGeneration,
) -> None:
    config = model.config
    depth = config.text_config.num_hidden_layers
    lengths = [40 - 7 * layer for layer in range(depth)]
    assert prefill_flops(config, [40] * depth, 30) == prefill_flops(config, 40, 30)
    alone = [language_model_flops(config, length) // depth for length in lengths]
    assert language_model_flops(config, lengths) == sum(alone)
    cached = [language_model_flops(config, 1, length) // depth for length in lengths]
    assert language_model_flops(config, 1, lengths) == sum(cached)
    assert kv_cache_bytes(config, lengths) == sum(kv_cache_bytes(config, length) // depth for length in lengths)


def test_an_unknown_projector_is_no_guess() -> None:
    row = next(row for row in rows() if row.model_type == "qwen2_vl")
    with pytest.raises(ValueError, match="qwen2_vl costs is not known: count its language model"):
        projector_flops(row.config(), 10)


@pytest.mark.parametrize(("sequence_length", "visual_tokens"), [(75, 64), (27, 16), (1, 1), (300, 0)])
def test_prefill_flops_are_those_that_torch_counts(
    model: LlavaForConditionalGeneration, sequence_length: int, visual_tokens: int
) -> None:
    expected = counted_flops(model, sequence_length, visual_tokens)
    assert prefill_flops(model.config, sequence_length, visual_tokens) == expected


def test_kv_bytes_are_those_of_the_returned_cache(model: LlavaForConditionalGeneration) -> None:
    cache = model(input_ids=torch.ones(1, 37, dtype=torch.long), use_cache=True).past_key_values
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert kv_cache_bytes(model.config, 37, bytes_per_value=4) == held


def test_projector_reads_every_concatenated_feature_layer() -> None:
    one = LlavaConfig(vision_feature_layer=-2)
    two = LlavaConfig(vision_feature_layer=[-2, -5])
    width, features = one.text_config.hidden_size, one.vision_config.hidden_size
    assert projector_flops(two, 10) - projector_flops(one, 10) == 2 * 10 * features * width


def test_llava_next_7b_is_near_its_published_cost() -> None:
    """The authors publish 43.6 TFLOPs for 2880 visual tokens; the length of their text prompt is not stated."""
    text = LlamaConfig(vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    assert prefill_flops(LlavaNextConfig(text_config=text), 2880 + 60, 2880) == pytest.approx(43.6e12, rel=0.05)
