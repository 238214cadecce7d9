"""Saliency of visual tokens: how much attention each gets in an encoder layer, without holding any attention map.

It comes from the [CLS] token where the encoder has one, else from all tokens alike; some methods want queries or keys
themselves, which are read the same way. Every attention module of a tapped tower asks its config which attention
function to call. While a tap is open the answer is ours: it reads the queries and keys of the wanted layers, then
hands over to the function the user chose. So SDPA, flash and custom kernels stay in use, fused q/k/v projections do
not matter, and outside a tap the tower is stock.
"""

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .encoder_stage import EncoderStage
from .similarity import without_autocast
from .stock_versions import KEEPS_NAMED_HIDDEN_STATES

# Entries of attention that received_attention holds at a time: on a CPU what its last cache holds, on an accelerator
# enough to keep it busy.
ATTENTION_IN_CACHE = 2**22  # 16 MiB
ATTENTION_AT_ONCE = 2**25  # 128 MiB

# The registry is one for the whole process, which may hold this file several times: installed, and once per repo.
TAPPED_ATTENTION = f"vispruner_tapped_attention:{__name__}"


class _OpenTap(threading.local):
    """The tap of this thread's current forward; thread-local, because `torch.compile` cannot trace a ContextVar."""

    def __init__(self) -> None:
        self.tap: Any = None


_open = _OpenTap()


class TextLayer(NamedTuple):
    """The place of a language model's attention module; an encoder's is a number alone."""

    number: int


class Reading(NamedTuple):
    """What is to be read: the number of an encoder layer, and a kind that `SALIENCY_KINDS` names.

    threshold  of `global_attention`; None for the kinds that have none
    """

    layer: int
    kind: str
    threshold: float | None = None

    def of(self, *read: Any) -> torch.Tensor:
        """Return it of queries, keys, their scaling and what is no padding."""
        options = {} if self.threshold is None else {"threshold": self.threshold}
        return SALIENCY_KINDS[self.kind](*read, **options)


class SaliencyTap:
    """Record saliency in some of a tower's layers while the `with` block runs; afterwards `tap[reading]` is (B, N).

    What else is wanted, `further` says by the name that selectors have for it.

    An encoder that packs images of different sizes into one sequence attends in chunks (`packed`); what each chunk of
    (1, n) tokens recorded is then joined to (1, N), in the order of the sequence. Small chunks of one size, like the
    frames of a video, are read together. An encoder that pads images attends under a mask, of a form that depends on
    the attention function; so `seen` (B, N) says which of its tokens are no padding.

    Where a `stage` lets patches leave between two layers, what is read behind it is 0 for those.
    """

    def __init__(
        self,
        attentions: Sequence[Any],
        main: Reading,
        others: Sequence[Reading] = (),
        seen: torch.Tensor | None = None,
        packed: bool = False,
        further: Mapping[str, Reading] | None = None,
        stage: EncoderStage | None = None,
    ) -> None:
        self._main, self._others, self._seen, self._packed = main, others, seen, packed
        self._further, self.stage = dict(further or {}), stage
        self._hooks: list[Any] = []
        wanted = [main, *others, *self._further.values()]
        wanted += [] if stage is None or stage.ranked_by is None else [stage.ranked_by]
        self._places = {reading: attentions[reading.layer].config.place for reading in wanted}
        self._recorded: dict[Reading, list[torch.Tensor]] = {reading: [] for reading in self._places}
        self._waiting: dict[Reading, list[tuple[torch.Tensor, torch.Tensor]]] = {r: [] for r in self._places}
        self._scaling: float | None = None  # of those that wait
        self.may_pad = False  # only `run_tower` takes away again what is appended
        self.tokens: int | None = None  # others were appended to these, and nothing may attend to those
        self.only_reads = False

    def __enter__(self) -> "SaliencyTap":
        self._outer = _open.tap
        if self.stage is not None:
            ranked_by = self.stage.ranked_by
            self._hooks = self.stage.listen(lambda: self[ranked_by], lambda: _open.tap is self)
        _open.tap = self
        return self

    def __exit__(self, *exception: Any) -> None:
        _open.tap = self._outer
        for hook in self._hooks:
            hook.remove()
        if self.stage is not None and exception[0] is None:
            self.stage.require_done()

    def record(self, place: int, query: torch.Tensor, key: torch.Tensor, scaling: float | None) -> None:
        for reading, wanted in self._places.items():
            if wanted != place:
                continue
            if self._packed:
                self._record_chunk(reading, query, key, scaling)
            else:
                seen = self._seen if self.stage is None else self.stage.cut_seen(self._seen)
                self._recorded[reading].append(reading.of(query, key, scaling, seen))

    def _record_chunk(self, reading: Reading, query: torch.Tensor, key: torch.Tensor, scaling: float | None) -> None:
        """Read a chunk with those of its size before and after it, as many as may have their attention held."""
        waiting, self._scaling = self._waiting[reading], scaling
        if waiting and waiting[0][0].shape != query.shape:
            self._read(reading)
        waiting.append((query.detach(), key.detach()))
        if (len(waiting) + 1) * query.shape[1] * query.shape[2] ** 2 > entries_at_once(query.device):
            self._read(reading)

    def _read(self, reading: Reading) -> None:
        waiting = self._waiting[reading]
        queries, keys = waiting[0] if len(waiting) == 1 else map(torch.cat, zip(*waiting, strict=True))
        waiting.clear()
        of_chunks = reading.of(queries, keys, self._scaling, self._seen)
        self._recorded[reading].append(of_chunks.flatten(0, 1)[None])

    def __getitem__(self, reading: Reading) -> torch.Tensor:
        if self._waiting[reading]:
            self._read(reading)
        recorded = self._recorded[reading]
        if not recorded:
            raise RuntimeError(
                f"no attention was recorded in layer {reading.layer}: the encoder did not call the attention function "
                "its config names, so tokens cannot be ranked"
            )
        read = recorded[0] if len(recorded) == 1 else torch.cat(recorded, dim=1)
        if self.stage is None or reading.layer <= self.stage.after or reading.kind == "cls_query":
            return read
        return self.stage.restored(read, read.shape[1] - self.stage.count)

    def restored(self, values: torch.Tensor, before: int = 0) -> torch.Tensor:
        """Return what an encoder made of all its tokens, of `before` and N patches: 0 for those that left."""
        return values if self.stage is None else self.stage.restored(values, before)

    @property
    def readings(self) -> frozenset[Reading]:
        """All that is read."""
        return frozenset(self._places)

    @property
    def saliency(self) -> torch.Tensor:
        """What the main reading recorded, (B, N)."""
        return self[self._main]

    @property
    def layer_saliency(self) -> torch.Tensor | None:
        """What the other readings recorded, (B, L, N); None where there are none."""
        return torch.stack([self[reading] for reading in self._others], dim=1) if self._others else None

    @property
    def further(self) -> dict[str, torch.Tensor]:
        """What was recorded of `further`, by name: (B, N, d), or (B, d) of [CLS]."""
        return {name: self[reading] for name, reading in self._further.items()}


class _TappableConfig:
    """Stands in for an attention module's config: the same in everything but the attention function under a tap."""

    def __init__(self, config: Any, eager_attention: Callable, place: Any) -> None:
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


def make_tappable(attention_modules: Sequence[Any], place_of: Callable[[int], Any] = int) -> None:
    """Prepare attention modules for a tap; their computation does not change. Once per model.

    place_of  makes of each module's number the place that the tap is told
    """
    for number, module in enumerate(attention_modules):
        if not hasattr(module, "config"):
            raise ValueError(f"{type(module).__name__} has no config that names its attention function; cannot tap it")
        if not isinstance(module.config, _TappableConfig):
            module.config = _TappableConfig(module.config, _eager_attention_of(module), place_of(number))


def listen(tap: Any) -> None:
    """Let a tap other than an encoder's hear this thread's attention from now on; None for no longer."""
    _open.tap = tap


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
            if tap.only_reads:
                return torch.zeros_like(query).transpose(1, 2), None
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
    return _attention(query[:, :, :1], key, scaling, seen).mean(dim=(1, 2))[:, 1:]


@torch.no_grad()
def received_attention(
    query: torch.Tensor, key: torch.Tensor, scaling: float | None = None, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Return how much attention each token gets from all tokens, averaged over heads and queries.

    query, key  (B, H, N, d)  after projection and rotary embedding; logits and softmax run in at least fp32
    seen        (B, N)        False for padding, which gets nothing and does not count among the queries
    returns     (B, N)        sums to 1; it is computed from `ATTENTION_IN_CACHE` entries of attention at a time on a
                              CPU, `ATTENTION_AT_ONCE` elsewhere, or those of one head for 16 queries
    """
    return _mean_attention(query, key, scaling, seen, seen)


def _mean_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float | None,
    seen: torch.Tensor | None,
    asks: torch.Tensor | None,
) -> torch.Tensor:
    """Return how much attention each token gets (B, N), averaged over heads and the queries that `asks` (B, N) has."""
    batch, heads, queries, _ = query.shape
    at_once = entries_at_once(query.device)
    some_queries = min(queries, max(16, at_once // (batch * key.shape[2])))
    some_heads = max(1, at_once // (batch * key.shape[2] * some_queries))
    asking = (None,) * queries if asks is None else asks[:, None, :, None].split(some_queries, dim=2)
    received = torch.zeros((), device=query.device)
    for of_heads, k in zip(query.split(some_heads, dim=1), key.split(some_heads, dim=1), strict=True):
        k = k.to(torch.promote_types(k.dtype, torch.float32))
        for q, some in zip(of_heads.split(some_queries, dim=2), asking, strict=False):
            received = received + _attention(q, k, scaling, seen, some).sum(dim=(1, 2))
    if asks is None:
        return received / (heads * queries)
    return received / (heads * asks.sum(dim=1, keepdim=True)).clamp(min=1)


def entries_at_once(device: torch.device) -> int:
    """Return how many entries of attention may exist at a time on a device."""
    return ATTENTION_IN_CACHE if device.type == "cpu" else ATTENTION_AT_ONCE


@torch.no_grad()
def received_attention_of_patches(
    query: torch.Tensor, key: torch.Tensor, scaling: float | None = None, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Return `received_attention` (B, N) of the tokens behind [CLS]; [CLS] counts among the 1+N queries."""
    return received_attention(query, key, scaling, seen)[:, 1:]


@torch.no_grad()
def global_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float | None = None,
    seen: torch.Tensor | None = None,
    *,
    threshold: float,
) -> torch.Tensor:
    """Return how much attention each token gets from those that get most of it themselves, the global ones (VFlowOpt).

    query, key  (B, H, N, d)  after projection and rotary embedding; logits and softmax run in at least fp32
    seen        (B, N)        False for padding, which gets nothing and does not count among the queries
    threshold                 a token is global that gets more than so many times the mean; where none does, all are
    returns     (B, N)        averaged over heads and global tokens; sums to 1
    """
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not threshold >= 0:
        raise ValueError(
            f"vispruner_config.method_options.global_threshold must be a number from 0 on, got {threshold!r}"
        )
    received = received_attention(query, key, scaling, seen)
    tokens = received.shape[1] if seen is None else seen.sum(dim=1, keepdim=True)
    asks = received * tokens > threshold
    asks = asks | ~asks.any(dim=1, keepdim=True)
    return _mean_attention(query, key, scaling, seen, asks if seen is None else asks & seen)


def global_attention_of_patches(*read: Any, threshold: float) -> torch.Tensor:
    """Return `global_attention` (B, N) of the tokens behind [CLS], which may be global itself."""
    return global_attention(*read, threshold=threshold)[:, 1:]


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float | None,
    seen: torch.Tensor | None,
    asking: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return how much each query attends to each token, (B, H, queries, N).

    seen    (B, N)              False for padding, which gets nothing
    asking  (B, 1, queries, 1)  False for padding, which gives nothing
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = torch.promote_types(query.dtype, torch.float32)
    with without_autocast(query.device):
        logits = torch.matmul(query.to(dtype), key.to(dtype).transpose(-1, -2)).mul_(scaling)
    if seen is not None:
        logits.masked_fill_(~seen[:, None, None], torch.finfo(dtype).min)
    attention = logits.softmax(dim=-1)
    return attention if asking is None else attention.mul_(asking)


@torch.no_grad()
def head_mean_keys(
    query: torch.Tensor, key: torch.Tensor, scaling: float | None = None, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the mean over heads of the keys as they are compared: (B, H, N, d) -> (B, N, d), in at least fp32."""
    return key.to(torch.promote_types(key.dtype, torch.float32)).mean(dim=1)


def head_mean_keys_of_patches(*read: Any) -> torch.Tensor:
    """Return `head_mean_keys` (B, N, d) of the tokens behind [CLS]."""
    return head_mean_keys(*read)[:, 1:]


@torch.no_grad()
def cls_query(
    query: torch.Tensor, key: torch.Tensor, scaling: float | None = None, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the query of [CLS], its heads side by side: (B, H, 1+N, d) -> (B, H * d)."""
    return query[:, :, 0].flatten(1)


@torch.no_grad()
def raw_keys(
    query: torch.Tensor, key: torch.Tensor, scaling: float | None = None, seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Return all keys, their heads side by side: (B, H, 1+N, d) -> (B, 1+N, H * d)."""
    return key.transpose(1, 2).flatten(2)


# "received", "global" and "keys" are for encoders without a [CLS]; the others need one whose token 0 is [CLS].
SALIENCY_KINDS: dict[str, Callable[..., torch.Tensor]] = {
    "cls": cls_saliency,
    "received": received_attention,
    "received_behind_cls": received_attention_of_patches,
    "global": global_attention,
    "global_behind_cls": global_attention_of_patches,
    "keys": head_mean_keys,
    "keys_behind_cls": head_mean_keys_of_patches,
    "cls_query": cls_query,
    "raw_keys": raw_keys,
}


def run_tower(
    vision_tower: nn.Module,
    pixel_values: torch.Tensor,
    feature_layer: int | list[int],
    tap: SaliencyTap,
    before: int = 0,
    **kwargs: Any,
) -> tuple[Any, torch.Tensor]:
    """Run a tower once under `tap`; return its output and the features (B, N, C) of its tokens, with any [CLS].

    pixel_values   (B, 3, height, width)
    feature_layer  index or indices into hidden_states, several are concatenated
    before         how many of its tokens stand before the patches
    """
    indices = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
    every = bool(kwargs.pop("output_hidden_states", None)) or not KEEPS_NAMED_HIDDEN_STATES
    wanted = True if every else indices
    tap.may_pad = True
    outputs = vision_tower(pixel_values, return_dict=True, output_hidden_states=wanted, **kwargs)
    if tap.tokens is not None:
        _take_away_padding(outputs, tap.tokens)
    tap.may_pad, tap.tokens = False, None
    states = [tap.restored(outputs.hidden_states[index], before) for index in indices]
    return outputs, states[0] if len(states) == 1 else torch.cat(states, dim=-1)


def _take_away_padding(outputs: Any, tokens: int) -> None:
    outputs.last_hidden_state = outputs.last_hidden_state[:, :tokens]
    for name in ("hidden_states", "attentions"):
        if (layers := getattr(outputs, name)) is not None:
            setattr(outputs, name, tuple(None if layer is None else layer[..., :tokens, :] for layer in layers))
