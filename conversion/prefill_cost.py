"""What a prefill costs: floating-point operations and KV-cache bytes, computed from a config and a sequence length.

Counts a multiply-add as two operations, matrix products only, and attention over the full square (the causal half is
not discounted), which is how `torch.utils.flop_counter` counts.
"""

from __future__ import annotations

from transformers import PreTrainedConfig


def prefill_flops(config: PreTrainedConfig, sequence_length: int, visual_tokens: int) -> int:
    """Return the operations of what reads visual tokens: the projector, the language model and one row of logits.

    config           a LLaVA-like config: a vision tower, a two-layer projector and a Llama-like text model
    sequence_length  tokens the language model reads, visual ones included
    visual_tokens    tokens that pass the projector
    """
    visual, logits = projector_flops(config, visual_tokens), logits_flops(config)
    return visual + language_model_flops(config, sequence_length) + logits


def language_model_flops(config: PreTrainedConfig, new_tokens: int, cached_tokens: int = 0) -> int:
    """Return the operations of the language model's layers for `new_tokens` after `cached_tokens`, without logits."""
    text = config.get_text_config()
    width = text.hidden_size
    queries, keys = text.num_attention_heads * _head_dim(text), text.num_key_value_heads * _head_dim(text)
    attention_weights = width * queries + 2 * width * keys + queries * width
    mlp_weights = 3 * width * text.intermediate_size
    attention = 4 * new_tokens * (cached_tokens + new_tokens) * queries
    return text.num_hidden_layers * (2 * new_tokens * (attention_weights + mlp_weights) + attention)


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
    layers = config.vision_feature_layer
    features = config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
    width = config.get_text_config().hidden_size
    return 2 * visual_tokens * width * (features + width)


def kv_cache_bytes(config: PreTrainedConfig, sequence_length: int, bytes_per_value: int = 2) -> int:
    """Return the size of the keys and values of `sequence_length` tokens; two bytes a value is fp16 or bf16."""
    text = config.get_text_config()
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * _head_dim(text)
    return per_token * sequence_length * bytes_per_value


def _head_dim(text: PreTrainedConfig) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
