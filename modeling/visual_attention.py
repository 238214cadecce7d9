"""Saliency of visual tokens: how much attention each gets in an encoder layer, without holding any attention map.

It comes from the [CLS] token where the encoder has one, else from all tokens alike. Every attention module of a
tapped tower asks its config which attention function to call. While a tap is open the answer is ours: it reads the
queries and keys of the wanted layers, then hands over to the function the user chose. So SDPA, flash and custom
kernels stay in use, fused q/k/v projections do not matter, and outside a tap the tower is stock.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .stock_versions import KEEPS_NAMED_HIDDEN_STATES
from .token_selection import without_autocast

ATTENTION_AT_ONCE = 2**25  # entries of attention that received_attention holds at a time: 128 MiB

# The registry is one for the whole process, which may hold this file several times: installed, and once per repo.
TAPPED_ATTENTION = f"vispruner_tapped_attention:{__name__}"


class _OpenTap(threading.local):
    """The tap of this thread's current forward; thread-local, because `torch.compile` cannot trace a ContextVar."""

    def __init__(self) -> None:
        self.tap: SaliencyTap | None = None


_open = _OpenTap()


class Reading(NamedTuple):
    """Saliency to be read: the number of an encoder layer, and a kind that `SALIENCY_KINDS` names."""

    layer: int
    kind: str


class SaliencyTap:
    """Record saliency in some of a tower's layers while the `with` block runs; afterwards `tap[reading]` is (B, N).

    An encoder that packs images of different sizes into one sequence attends in chunks; what each chunk of (1, n)
    tokens recorded is then joined to (1, N), in the order of the sequence. One that pads images attends under a mask,
    of a form that depends on the attention function; so `seen` (B, N) says which of its tokens are no padding.
    """

    def __init__(
        self,
        attentions: Sequence[Any],
        main: Reading,
        others: Sequence[Reading] = (),
        seen: torch.Tensor | None = None,
    ) -> None:
        self._main, self._others, self._seen = main, others, seen
        self._places = {reading: attentions[reading.layer].config.place for reading in (main, *others)}
        self._recorded: dict[Reading, list[torch.Tensor]] = {reading: [] for reading in self._places}
        self.may_pad = False  # only `run_tower` takes away again what is appended
        self.tokens: int | None = None  # others were appended to these, and nothing may attend to those

    def __enter__(self) -> "SaliencyTap":
        self._outer = _open.tap
        _open.tap = self
        return self

    def __exit__(self, *exception: Any) -> None:
        _open.tap = self._outer

    def record(self, place: int, query: torch.Tensor, key: torch.Tensor, scaling: float | None) -> None:
        for reading, wanted in self._places.items():
            if wanted == place:
                self._recorded[reading].append(SALIENCY_KINDS[reading.kind](query, key, scaling, self._seen))

    def __getitem__(self, reading: Reading) -> torch.Tensor:
        recorded = self._recorded[reading]
        if not recorded:
            raise RuntimeError(
                f"no attention was recorded in layer {reading.layer}: the encoder did not call the attention function "
                "its config names, so tokens cannot be ranked"
            )
        return recorded[0] if len(recorded) == 1 else torch.cat(recorded, dim=1)

    @property
    def saliency(self) -> torch.Tensor:
        """What the main reading recorded, (B, N)."""
        return self[self._main]

    @property
    def layer_saliency(self) -> torch.Tensor | None:
        """What the other readings recorded, (B, L, N); None where there are none."""
        return torch.stack([self[reading] for reading in self._others], dim=1) if self._others else None


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


def make_tappable(attention_modules: Sequence[Any]) -> None:
    """Prepare attention modules for `SaliencyTap`; their computation does not change. Once per model, at creation."""
    for place, module in enumerate(attention_modules):
        if not hasattr(module, "config"):
            raise ValueError(f"{type(module).__name__} has no config that names its attention function; cannot tap it")
        if not isinstance(module.config, _TappableConfig):
            module.config = _TappableConfig(module.config, _eager_attention_of(module), place)


def open_tap_that_may_pad() -> SaliencyTap | None:
    """Return the open tap while `run_tower` runs, which takes away again what is appended to the tokens."""
    return _open.tap if _open.tap is not None and _open.tap.may_pad else None


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
        if tap is not None:
            asking = query
            if tap.tokens is not None:
                asking, key, value = (states[:, :, : tap.tokens] for states in (query, key, value))
            tap.record(module.config.place, asking, key, kwargs.get("scaling"))
        function = ALL_ATTENTION_FUNCTIONS.get_interface(
            module.config._attn_implementation, module.config.eager_attention
        )
        return function(module, query, key, value, attention_mask, **kwargs)
    finally:
        _open.tap = tap


AttentionInterface.register(TAPPED_ATTENTION, _tapped_attention)


@torch.no_grad()
def cls_saliency(
    query: torch.Tensor, key: torch.Tensor, scaling: float | None = None, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Return how much the [CLS] token (index 0) attends to each other token, averaged over heads.

    query, key  (B, H, 1+N, d)  after projection; logits and softmax run in at least fp32
    seen        (B, 1+N)        False for padding, which gets nothing
    returns     (B, N)          softmax over all 1+N tokens, [CLS] cut off afterwards, not renormalised
    """
    return _attention_received(query[:, :, :1], key, scaling, seen)[:, 1:]


@torch.no_grad()
def received_attention(
    query: torch.Tensor, key: torch.Tensor, scaling: float | None = None, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Return how much attention each token gets from all tokens, averaged over heads and queries.

    query, key  (B, H, N, d)  after projection and rotary embedding; logits and softmax run in at least fp32
    seen        (B, N)        False for padding, which gets nothing and does not count among the queries
    returns     (B, N)        sums to 1; no more than `ATTENTION_AT_ONCE` entries of attention exist at a time
    """
    batch, heads, _, _ = query.shape
    at_once = max(16, ATTENTION_AT_ONCE // (batch * heads * key.shape[2]))
    chunks = query.split(at_once, dim=2)
    if seen is None:
        return sum(_attention_received(chunk, key, scaling) * chunk.shape[2] for chunk in chunks) / query.shape[2]
    asking = seen.split(at_once, dim=1)
    received = sum(
        _attention_received(chunk, key, scaling, seen, asks) * chunk.shape[2]
        for chunk, asks in zip(chunks, asking, strict=True)
    )
    return received / seen.sum(dim=1, keepdim=True).clamp(min=1)


@torch.no_grad()
def received_attention_of_patches(
    query: torch.Tensor, key: torch.Tensor, scaling: float | None = None, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Return `received_attention` (B, N) of the tokens behind [CLS]; [CLS] counts among the 1+N queries."""
    return received_attention(query, key, scaling, seen)[:, 1:]


def _attention_received(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float | None,
    seen: torch.Tensor | None = None,
    asking: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the mean over heads and queries (B, N); `seen` (B, N) and `asking` (B, queries) leave padding out."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = torch.promote_types(query.dtype, torch.float32)
    with without_autocast(query.device):
        logits = torch.matmul(query.to(dtype), key.to(dtype).transpose(-1, -2)) * scaling
    if seen is not None:
        logits = logits.masked_fill(~seen[:, None, None], torch.finfo(dtype).min)
    attention = logits.softmax(dim=-1)
    if asking is not None:
        attention = attention * asking[:, None, :, None]
    return attention.mean(dim=(1, 2))


# "cls" and "received_behind_cls" need an encoder whose token 0 is [CLS]; "received" is for encoders without one.
SALIENCY_KINDS: dict[str, Callable[..., torch.Tensor]] = {
    "cls": cls_saliency,
    "received": received_attention,
    "received_behind_cls": received_attention_of_patches,
}


def run_tower(
    vision_tower: nn.Module,
    pixel_values: torch.Tensor,
    feature_layer: int | list[int],
    tap: SaliencyTap,
    **kwargs: Any,
) -> tuple[Any, torch.Tensor]:
    """Run a tower once under `tap`; return its output and the features (B, N, C) of its tokens, with any [CLS].

    pixel_values   (B, 3, height, width)
    feature_layer  index or indices into hidden_states, several are concatenated
    """
    indices = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
    every = bool(kwargs.pop("output_hidden_states", None)) or not KEEPS_NAMED_HIDDEN_STATES
    wanted = True if every else indices
    tap.may_pad = True
    outputs = vision_tower(pixel_values, return_dict=True, output_hidden_states=wanted, **kwargs)
    if tap.tokens is not None:
        _take_away_padding(outputs, tap.tokens)
    tap.may_pad, tap.tokens = False, None
    states = [outputs.hidden_states[index] for index in indices]
    return outputs, states[0] if len(states) == 1 else torch.cat(states, dim=-1)


def _take_away_padding(outputs: Any, tokens: int) -> None:
    outputs.last_hidden_state = outputs.last_hidden_state[:, :tokens]
    for name in ("hidden_states", "attentions"):
        if (layers := getattr(outputs, name)) is not None:
            setattr(outputs, name, tuple(None if layer is None else layer[..., :tokens, :] for layer in layers))
