"""Saliency of visual tokens: the [CLS] row of one encoder layer's attention, without any attention map.

Every attention module of a tapped tower asks its config which attention function to call. While a tap is open the
answer is ours: it reads the queries and keys of one layer, then hands over to the function the user chose. So SDPA,
flash and custom kernels stay in use, fused q/k/v projections do not matter, and outside a tap the tower is stock.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

from .token_selection import without_autocast

# Where transformers can, only the hidden states that are features are kept; 5.17 keeps all, as its own models do.
KEEPS_NAMED_HIDDEN_STATES = hasattr(output_capturing, "select_hidden_states")

# The registry is one for the whole process, which may hold this file several times: installed, and once per repo.
TAPPED_ATTENTION = f"vispruner_tapped_attention:{__name__}"


class _OpenTap(threading.local):
    """The tap of this thread's current forward; thread-local, because `torch.compile` cannot trace a ContextVar."""

    def __init__(self) -> None:
        self.tap: SaliencyTap | None = None


_open = _OpenTap()


class SaliencyTap:
    """Record the saliency (B, N) of the visual tokens in one attention module while the `with` block runs."""

    def __init__(self, attention: Any) -> None:
        self.place: int = attention.config.place
        self.saliency: torch.Tensor | None = None

    def __enter__(self) -> "SaliencyTap":
        self._outer = _open.tap
        _open.tap = self
        return self

    def __exit__(self, *exception: Any) -> None:
        _open.tap = self._outer


class _TappableConfig:
    """Stands in for an attention module's config: the same in everything but the attention function under a tap."""

    def __init__(self, config: Any, eager_attention: Callable, place: int) -> None:
        self._stock_config = config
        self.eager_attention = eager_attention
        self.place = place  # a number, because compiled layers that share one graph cannot tell modules apart

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_stock_config":  # copy and pickle look these up before __init__
            raise AttributeError(name)
        return getattr(self._stock_config, name)

    @property
    def _attn_implementation(self) -> str | None:
        return self._stock_config._attn_implementation if _open.tap is None else TAPPED_ATTENTION


def make_tappable(attention_modules: list[Any]) -> None:
    """Prepare attention modules for `SaliencyTap`; their computation does not change. Once per model, at creation."""
    for place, module in enumerate(attention_modules):
        if not hasattr(module, "config"):
            raise ValueError(f"{type(module).__name__} has no config that names its attention function; cannot tap it")
        if not isinstance(module.config, _TappableConfig):
            module.config = _TappableConfig(module.config, _eager_attention_of(module), place)


def _eager_attention_of(module: nn.Module) -> Callable:
    """Return the eager attention function beside `module`'s class: the registry has no entry for it."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise ValueError(f"no eager_attention_forward beside {type(module).__name__}; its attention cannot be tapped")


def _tapped_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    tap = _open.tap
    _open.tap = None  # the user's attention function must see the user's own config
    try:
        if tap is not None and tap.place == module.config.place:
            tap.saliency = cls_saliency(query, key, kwargs.get("scaling"))
        function = ALL_ATTENTION_FUNCTIONS.get_interface(
            module.config._attn_implementation, module.config.eager_attention
        )
        return function(module, query, key, value, attention_mask, **kwargs)
    finally:
        _open.tap = tap


AttentionInterface.register(TAPPED_ATTENTION, _tapped_attention)


@torch.no_grad()
def cls_saliency(query: torch.Tensor, key: torch.Tensor, scaling: float | None = None) -> torch.Tensor:
    """Return how much the [CLS] token (index 0) attends to each other token, averaged over heads.

    query, key  (B, H, 1+N, d)  after projection; logits and softmax run in at least fp32
    returns     (B, N)          softmax over all 1+N tokens, [CLS] cut off afterwards, not renormalised
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = torch.promote_types(query.dtype, torch.float32)
    with without_autocast(query.device):
        logits = torch.matmul(query[:, :, :1].to(dtype), key.to(dtype).transpose(-1, -2)) * scaling
    return logits.softmax(dim=-1)[:, :, 0, 1:].mean(dim=1)


def resolve_attention_layer(attention_layer: int | None, feature_layers: Sequence[int], layers: int) -> int:
    """Return the encoder layer to read attention from; None means the one that produces the (deepest) features."""
    if attention_layer is None:
        attention_layer = max(index % (layers + 1) for index in feature_layers) - 1
        if attention_layer < 0:
            raise ValueError("vision_feature_layer 0 is the embedding, which no attention layer produces")
    if not -layers <= attention_layer < layers:
        raise ValueError(
            f"vispruner_config.attention_layer must be an encoder layer index in [{-layers}, {layers - 1}], "
            f"got {attention_layer}"
        )
    return attention_layer


def encode_with_saliency(
    vision_tower: nn.Module,
    layers: Sequence[Any],
    pixel_values: torch.Tensor,
    feature_layer: int | list[int],
    attention_layer: int | None = None,
    **kwargs: Any,
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Run a tower with a [CLS] token once; return its output, patch features and their saliency.

    pixel_values     (B, 3, height, width)
    feature_layer    index or indices into hidden_states, several are concatenated
    attention_layer  index into `layers`; None is the layer that produces the (deepest) features
    returns          output, features (B, N, C), saliency (B, N)
    """
    indices = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
    attention_layer = resolve_attention_layer(attention_layer, indices, len(layers))
    every = bool(kwargs.pop("output_hidden_states", None)) or not KEEPS_NAMED_HIDDEN_STATES
    wanted = True if every else indices
    with SaliencyTap(layers[attention_layer].self_attn) as tap:
        outputs = vision_tower(pixel_values, return_dict=True, output_hidden_states=wanted, **kwargs)
    if tap.saliency is None:
        raise RuntimeError(
            f"no attention was recorded in layer {attention_layer} of {type(vision_tower).__name__}: it did not call "
            "the attention function its config names, so tokens cannot be ranked"
        )
    states = [outputs.hidden_states[index][:, 1:] for index in indices]
    features = states[0] if len(states) == 1 else torch.cat(states, dim=-1)
    return outputs, features, tap.saliency
