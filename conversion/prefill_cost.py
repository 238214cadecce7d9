"""What a prefill costs: floating-point operations and KV-cache bytes, computed from a config and a sequence length.

Counts a multiply-add as two operations, matrix products only, and attention over the full square (the causal half is
not discounted), which is how `torch.utils.flop_counter` counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedConfig


def prefill_flops(config: PreTrainedConfig, sequence_length: int | Sequence[int], visual_tokens: int) -> int:
    """Return the operations of what reads visual tokens: the projector, the language model and one row of logits.

    config           a LLaVA-like config: a vision tower, a two-layer projector and a Llama-like text model
    sequence_length  tokens the language model reads, visual ones included: in all layers, or in each of them
    visual_tokens    tokens that pass the projector
    """
    visual, logits = projector_flops(config, visual_tokens), logits_flops(config)
    return visual + language_model_flops(config, sequence_length) + logits


def language_model_flops(
    config: PreTrainedConfig, new_tokens: int | Sequence[int], cached_tokens: int | Sequence[int] = 0
) -> int:
    """Return the operations of the language model's layers for `new_tokens` after `cached_tokens`, without logits.

    Each is the same in all layers, or a number for every layer, where a method prunes within the language model.
    """
    depth = config.get_text_config().num_hidden_layers
    layers = zip(by_layer(new_tokens, depth), by_layer(cached_tokens, depth), strict=True)
    return sum(layer_flops(config, new, cached) for new, cached in layers)


def layer_flops(config: PreTrainedConfig, new_tokens: int, cached_tokens: int = 0) -> int:
    """Return the operations of one layer of the language model."""
    text = config.get_text_config()
    mlp = 2 * new_tokens * 3 * text.hidden_size * text.intermediate_size
    attention = 4 * new_tokens * (cached_tokens + new_tokens) * query_width(config)
    return attention_projection_flops(config, new_tokens) + mlp + attention


def attention_projection_flops(config: PreTrainedConfig, new_tokens: int) -> int:
    """Return the operations of the four projections around the attention of one layer."""
    text = config.get_text_config()
    keys = text.num_key_value_heads * head_width(config)
    return 2 * new_tokens * text.hidden_size * (2 * query_width(config) + 2 * keys)


def by_layer(tokens: int | Sequence[int], depth: int) -> Sequence[int]:
    """Return a number for each of `depth` layers."""
    return [tokens] * depth if isinstance(tokens, int) else tokens


def logits_flops(config: PreTrainedConfig) -> int:
    """Return the operations of one row of logits."""
    text = config.get_text_config()
    return 2 * text.hidden_size * text.vocab_size


def projector_flops(config: PreTrainedConfig, visual_tokens: int) -> int:
    """Return the operations of LLaVA's two-layer projector, or its like, for `visual_tokens` tokens.

    ValueError for a model with another one; the other functions here hold for every model.
    """
    if not hasattr(config, "vision_feature_layer") or hasattr(config, "downsample_ratio"):
        raise ValueError(f"what the projector of a {config.model_type} costs is not known: count its language model")
    width = config.get_text_config().hidden_size
    return 2 * visual_tokens * width * (feature_width(config) + width)


def feature_width(config: PreTrainedConfig) -> int:
    """Return how wide a patch's features are, which may be those of several encoder layers side by side."""
    layers = config.vision_feature_layer
    return config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))


def kv_cache_bytes(config: PreTrainedConfig, sequence_length: int | Sequence[int], bytes_per_value: int = 2) -> int:
    """Return the size of the keys and values of `sequence_length` tokens, in all layers or in each.

    Two bytes a value is fp16 or bf16.
    """
    text = config.get_text_config()
    per_token = 2 * text.num_key_value_heads * head_width(config)
    return per_token * sum(by_layer(sequence_length, text.num_hidden_layers)) * bytes_per_value


def query_width(config: PreTrainedConfig) -> int:
    """Return the width of all query heads together."""
    return config.get_text_config().num_attention_heads * head_width(config)


def head_width(config: PreTrainedConfig) -> int:
    """Return the width of one head of attention in the language model."""
    text = config.get_text_config()
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
