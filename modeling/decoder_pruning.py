"""Visual tokens that leave between the layers of the language model, by hooks on stock layers.

A prompt goes in full; from a stage's first layer on, hidden states, mask, positions and KV cache hold the columns that
are left. What each layer's cache holds is noted on the cache itself, so that decoding, beams and later turns go on
with it. Hooks are functions of this module and find the call in progress by thread, so that copies of a model work.
"""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .decoder_attention import RANKINGS, DecoderReading, find_raters
from .prompt_shortening import KeptColumns
from .selector_registry import DecoderPlace, Selection, rows_at
from .stock_versions import CACHE
from .visual_attention import TextLayer, listen, make_tappable
from .visual_features import VisualTokens


@dataclass(frozen=True)
class DecoderStage:
    """What a decoder layer and those behind it see of a prompt (B, S); noted on the cache.

    layer    the first layer that sees it so
    columns  (B, W) columns of the prompt
    seen     (B, W) False where a row was padded
    width    S
    padded   whether some row was, known without asking the device
    renumbered  whether the columns that are left are counted anew
    """

    layer: int
    columns: torch.Tensor
    seen: torch.Tensor
    width: int
    padded: bool
    renumbered: bool = False


def columns_of_stage(stage: DecoderStage) -> KeptColumns:
    """Return the columns of a stage as those of a shortened prompt."""
    stays = torch.zeros(len(stage.columns), stage.width, dtype=torch.long, device=stage.columns.device)
    stays = stays.scatter_reduce(1, stage.columns, stage.seen.long(), "amax")
    return KeptColumns(stage.columns, stage.seen, torch.zeros_like(stage.columns), (stays - 1).cumsum(1))


@dataclass
class PromptToPrune:
    """A prompt (B, S) whose visual tokens will leave.

    visual    (B, S) where they are; all others stay
    texts     of each row, how many other columns are no padding
    totals    of each row, how many visual tokens it has
    counts    by layer: of each row, how many are left from there on
    place     where and by what the method ranks them
    choose    `choose` of choosing.py, given the options and the method
    last      (B,) the column that ranks, None for the last that is no padding
    places    (B, S, 3) where visual tokens lie in their images, None where the method does not ask
    told      (B, S) what the call said of visual tokens, None where the method does not ask
    """

    visual: torch.Tensor
    texts: list[int]
    totals: list[int]
    counts: dict[int, list[int]]
    place: DecoderPlace
    choose: Callable[..., Selection]
    last: torch.Tensor | None = None
    places: torch.Tensor | None = None
    told: torch.Tensor | None = None


class _Open(threading.local):
    forward: "DecoderForward | None" = None


_open = _Open()


def make_decoder_prunable(decoder: Any) -> None:
    """Prepare a stock text model for `DecoderForward`, once; what it computes outside one does not change."""
    if getattr(decoder, "vispruner_prunable", False):
        return
    make_tappable([layer.self_attn for layer in decoder.layers], TextLayer)
    for number, layer in enumerate(decoder.layers):
        layer.register_forward_pre_hook(functools.partial(_before_layer, number), with_kwargs=True)
    decoder.vispruner_prunable = True


def _before_layer(number: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    now = _open.forward
    if now is not None:
        return now.before_layer(number, layer, args, kwargs)
    # A recomputed checkpoint may run hooks again (see stock_versions.py), outside the call, with the same arguments.
    taken = getattr(_first(kwargs.get("position_embeddings")), "vispruner_taken", {})
    if number not in taken:
        return None
    change, made = taken[number]
    return (change(args[0]), *args[1:]), {**kwargs, **made}


def _first(pair: Any) -> Any:
    return pair[0] if isinstance(pair, tuple) and pair else None


def _as_it_is(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def stages_of(cache: Any) -> tuple[DecoderStage, ...]:
    """Return what the layers of a cache hold of the prompt it was made of, where that differs."""
    return getattr(cache, "vispruner_stages", ())


@dataclass
class DecoderForward:
    """One forward of a text model some of whose layers see fewer columns; open while the `with` block runs.

    decoder  the stock text model, made prunable
    seen     (B, past + S) False for padding; None where all is seen
    past     how many columns the cache holds in its first layer
    length   S
    prompt   what leaves in this forward; None where nothing does
    stages   what the cache holds, and then what this forward made
    """

    decoder: Any
    seen: torch.Tensor | None
    past: int
    length: int
    prompt: PromptToPrune | None = None
    stages: list[DecoderStage] = field(default_factory=list)
    _made: dict[Any, dict[str, Any]] = field(default_factory=dict)
    _taken: dict[int, tuple] = field(default_factory=dict)
    _read: dict[int, tuple[torch.Tensor, torch.Tensor, float | None]] = field(default_factory=dict)
    _raters: torch.Tensor | None = None
    _given: torch.Tensor | None = None  # to the layer that ranks
    _rotary: Any = None  # cos and sin that the layer before got
    _left: list[int] = field(default_factory=list)  # of each row, how many visual tokens the last stage left

    # A tap of visual_attention.py, of the layers that rank.
    tokens = None
    may_pad = False
    only_reads = False

    def __enter__(self) -> "DecoderForward":
        self._outer = _open.forward
        _open.forward = self
        return self

    def __exit__(self, *exception: Any) -> None:
        _open.forward = self._outer
        listen(None)

    def record(self, place: Any, query: torch.Tensor, key: torch.Tensor, scaling: float | None) -> None:
        """Keep what an attention module is about to multiply; a static cache has more keys than were written."""
        self._read[place.number] = (query.detach(), key.detach()[:, :, : query.shape[2]], scaling)

    def before_layer(self, number: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        hidden, prompt = args[0], self.prompt
        change: Callable[[torch.Tensor], torch.Tensor] = _as_it_is
        if prompt is not None:
            if number == 0 and "rater" in prompt.place.ranking:
                self._raters = find_raters(hidden, prompt.visual, self._asked(self._all_seen(hidden)))
            if number in prompt.counts:
                change = self._drop(number, layer, hidden, kwargs)
                hidden = change(hidden)
            listens = prompt.place.of_layer == "previous" and number + 1 in prompt.counts
            listen(self if listens else None)
            self._given = hidden.detach() if listens else None
        made = self._inputs_at(number, hidden, kwargs)
        self._rotary = made.get("position_embeddings", kwargs["position_embeddings"])
        if not made:
            return None
        if (cos := _first(kwargs.get("position_embeddings"))) is not None and layer.training:
            cos.vispruner_taken = self._taken
            self._taken[number] = (change, made)
        return (hidden, *args[1:]), {**kwargs, **made}

    def _inputs_at(self, number: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return what a layer gets in place of stock's arguments: made once per stage and kind of layer."""
        stage = next((stage for stage in reversed(self.stages) if stage.layer <= number), None)
        if stage is None:
            return {}
        kind = self._kind_of(number)
        if (stage.layer, kind) not in self._made:
            self._made[stage.layer, kind] = self._inputs_of(stage, number, kind, hidden, kwargs)
        return self._made[stage.layer, kind]

    def _kind_of(self, number: int) -> str:
        config = self.decoder.config
        if kinds := getattr(config, "layer_types", None):
            return kinds[number]
        return "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"

    def _rotary_kind(self, kind: str) -> tuple[str, ...]:
        """Return the kind of a layer for text models whose rotary embedding depends on it (Gemma 3)."""
        return (kind,) if kind in (getattr(self.decoder.config, "rope_parameters", None) or {}) else ()

    def _all_seen(self, like: torch.Tensor) -> torch.Tensor:
        if self.seen is not None:
            return self.seen.bool()
        return torch.ones(len(like), self.past + self.length, dtype=torch.bool, device=like.device)

    def _drop(
        self, number: int, layer: nn.Module, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Choose what stays from this layer on, note it, and return how hidden states become those that stay."""
        prompt = self.prompt
        assert prompt is not None
        before = self.stages[-1] if self.stages else None
        width = hidden.shape[1]
        if before is None:
            columns = torch.arange(width, device=hidden.device).expand(len(hidden), -1)
            seen, left = self._all_seen(hidden), prompt.totals
        else:
            columns, seen, left = before.columns, before.seen, self._left
        keep = [min(count, total) for count, total in zip(prompt.counts[number], left, strict=True)]
        if keep == left:
            return _as_it_is
        visual = prompt.visual.gather(1, columns) & seen
        with torch.no_grad():
            reading = self._reading(number, layer, hidden, visual, seen, columns, kwargs)
            features = self.decoder.norm(hidden) if prompt.place.normed else hidden
            chosen = _choose(prompt, number, features.detach(), reading, left, keep)
            index, stays = _index_of(visual, seen, chosen, keep, prompt.texts)
        stage = DecoderStage(
            number,
            columns.gather(1, index),
            stays,
            self.length,
            padded=len({text + count for text, count in zip(prompt.texts, keep, strict=True)}) > 1,
            renumbered=prompt.place.positions == "renumber",
        )
        self._left = keep
        self.stages.append(stage)
        if (cache := kwargs.get(CACHE)) is not None:
            cache.vispruner_stages = tuple(self.stages)
        return functools.partial(_kept_rows, index=index, merges=_merges(chosen, index, width))

    def _reading(
        self,
        number: int,
        layer: Any,
        hidden: torch.Tensor,
        visual: torch.Tensor,
        seen: torch.Tensor,
        columns: torch.Tensor,
        kwargs: dict[str, Any],
    ) -> DecoderReading:
        assert self.prompt is not None
        rotary = self._rotary
        if self.prompt.place.of_layer == "own":  # queries and keys of the layer to come, by its own code
            rotary = self._inputs_at(number, hidden, kwargs).get("position_embeddings", kwargs["position_embeddings"])
            number += 1
            self.only_reads = True
            listen(self)
            try:
                layer.self_attn(layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=None)
            finally:
                self.only_reads = False
                listen(None)
        query, key, scaling = self._read.pop(number - 1)
        last = self._last(seen, columns)
        return DecoderReading(
            query=query,
            key=key,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            seen=seen & (torch.arange(seen.shape[1], device=seen.device) <= last[:, None]),
            last=last,
            visual=visual,
            raters=None if self._raters is None else self._raters.gather(1, columns) & seen,
            rotary=tuple(part.expand(len(hidden), -1, -1) for part in rotary) if rotary[0].dim() == 3 else None,
            given=hidden.detach() if self._given is None else self._given,
            places=None if self.prompt.places is None else rows_at(self.prompt.places, columns),
            told=None if self.prompt.told is None else self.prompt.told.gather(1, columns),
        )

    def _last(self, seen: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Return the place (B,) of the last token of the prompt, which ranks, among the columns that are left."""
        assert self.prompt is not None
        places = torch.arange(1, seen.shape[1] + 1, device=seen.device)
        return (self._asked(seen, columns) * places).argmax(1)

    def _asked(self, seen: torch.Tensor, columns: torch.Tensor | None = None) -> torch.Tensor:
        """Return which seen columns belong to the prompt, not to an answer behind it."""
        if self.prompt is None or self.prompt.last is None:
            return seen
        columns = torch.arange(seen.shape[1], device=seen.device) if columns is None else columns
        return seen & (columns <= self.prompt.last.to(seen.device)[:, None])

    def _inputs_of(
        self, stage: DecoderStage, number: int, kind: str, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Return what the layers of one kind get in place of stock's arguments in this stage."""
        made: dict[str, Any] = {}
        mask, seen = kwargs.get("attention_mask"), stage.seen
        behind = self.past + self.length - stage.width  # columns behind the prompt of the stage
        if behind:
            seen = torch.cat([seen, self._all_seen(hidden)[:, stage.width :].to(seen)], dim=1)
        is_prefill = behind == 0 and self.prompt is not None
        if is_prefill:
            made["position_embeddings"] = tuple(
                _gathered(part, stage.columns) for part in kwargs["position_embeddings"]
            )
        if stage.renumbered:
            positions = seen.long().cumsum(1).sub(1).clamp(min=0)[:, -hidden.shape[1] :]
            made["position_embeddings"] = self.decoder.rotary_emb(hidden, positions, *self._rotary_kind(kind))
        if kwargs.get("position_ids") is not None:
            # Layers use them to tell packed samples apart, which gaps would look like.
            made["position_ids"] = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
        if mask is None and not stage.padded:
            return made
        if is_prefill and isinstance(mask, torch.Tensor) and mask.dim() == 4:
            made["attention_mask"] = _gathered_mask(mask, stage, self.length)
            return made
        create = create_sliding_window_causal_mask if kind == "sliding_attention" else create_causal_mask
        made["attention_mask"] = create(
            self.decoder.config, hidden, seen, **{CACHE: kwargs.get(CACHE)}, layer_idx=number
        )
        return made


class _Chosen(NamedTuple):
    """What was decided of G rows with as many visual tokens: their places (G, N) among the columns, and which stay."""

    rows: list[int]
    places: torch.Tensor
    selection: Selection


def _choose(
    prompt: PromptToPrune,
    layer: int,
    features: torch.Tensor,
    reading: DecoderReading,
    left: list[int],
    keep: list[int],
) -> list[_Chosen]:
    """Choose in rows with as many visual tokens together; features (B, W, C)."""
    place = prompt.place
    saliency = RANKINGS[place.ranking](reading)
    order = (~reading.visual).int().argsort(dim=1, stable=True)
    groups: dict[tuple[int, int], list[int]] = {}
    for row, (total, count) in enumerate(zip(left, keep, strict=True)):
        if total:
            groups.setdefault((total, count), []).append(row)
    chosen = []
    for (total, count), rows in groups.items():
        places = order[rows, :total]
        if count == total:
            selection = Selection(torch.arange(total, device=places.device).expand(len(rows), -1))
        elif count == 0:
            selection = Selection(places[:, :0])
        else:
            further = _further(reading, rows, places, features[rows], saliency)
            states = rows_at(features[rows], places)
            tokens = VisualTokens(states, saliency[rows].gather(1, places), projected=states)
            selection = prompt.choose(tokens, count, layer=layer, **further)
        chosen.append(_Chosen(rows, places, selection))
    return chosen


def _further(
    reading: DecoderReading, rows: list[int], places: torch.Tensor, features: torch.Tensor, saliency: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return what else a decoder layer can give of G rows: `DECODER_INPUTS` of the registry beside `projected`."""
    columns = torch.arange(features.shape[1], device=features.device)
    is_word = reading.seen[rows] & (columns > places[:, -1:])
    further = {"layer_inputs": reading.given, "places": reading.places}
    return {
        **{name: rows_at(value[rows], places) for name, value in further.items() if value is not None},
        "keys": rows_at(reading.key[rows].mean(1), places),
        "text": features,
        "text_saliency": saliency[rows].masked_fill(~is_word, float("-inf")),
    }


def _index_of(
    visual: torch.Tensor,
    seen: torch.Tensor,
    chosen: list[_Chosen],
    keep: list[int],
    texts: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the columns (B, W') that stay, in the order in which they go on, and where they are no padding."""
    width = visual.shape[1]
    stride = 1 + max((one.selection.appended for one in chosen), default=0)
    place = torch.arange(width, device=visual.device).expand_as(visual) * stride
    order = place.masked_fill(visual | ~seen, -1)
    for rows, places, selection in chosen:
        kept = places.gather(1, selection.indices)
        at = kept * stride
        if selection.appended:  # behind the last visual token of their image
            behind = torch.arange(1, selection.appended + 1, device=at.device)
            ends = _ends_of_runs(visual[rows]).gather(1, kept[:, -selection.appended :])
            at = torch.cat([at[:, : -selection.appended], ends * stride + behind], dim=1)
        order[rows] = order[rows].scatter(1, kept, at)
    longest = max(text + count for text, count in zip(texts, keep, strict=True))
    index = order.argsort(dim=1, stable=True)[:, width - longest :]  # padding is on the left
    return index, order.gather(1, index) >= 0


def _ends_of_runs(flags: torch.Tensor) -> torch.Tensor:
    """Return for each column (B, W) the last one of the run of true flags that it is in."""
    goes_on = torch.nn.functional.pad(flags[:, 1:], (0, 1), value=False)
    width = flags.shape[1]
    ends = torch.arange(width, device=flags.device).expand_as(flags).masked_fill(goes_on, width - 1)
    return ends.flip(1).cummin(1).values.flip(1)


def _merges(
    chosen: list[_Chosen], index: torch.Tensor, width: int
) -> list[tuple[list[int], torch.Tensor, torch.Tensor, Selection]]:
    """Return for rows whose kept tokens have others folded in: where these come from, and where they go."""
    new_place = torch.zeros(len(index), width, dtype=torch.long, device=index.device).scatter(
        1, index, torch.arange(index.shape[1], device=index.device).expand_as(index)
    )
    return [
        (rows, places, new_place[rows].gather(1, places.gather(1, selection.indices)), selection)
        for rows, places, selection in chosen
        if selection.merge is not None
    ]


def _kept_rows(
    hidden: torch.Tensor, index: torch.Tensor, merges: list[tuple[list[int], torch.Tensor, torch.Tensor, Selection]]
) -> torch.Tensor:
    """Bring hidden states (B, W, C) to the columns (B, W') that stay, with what is folded into them."""
    kept = rows_at(hidden, index)
    for rows, places, targets, selection in merges:
        merged = selection.take(rows_at(hidden[rows], places))
        at = torch.tensor(rows, device=hidden.device)[:, None].expand_as(targets)
        kept = kept.index_put((at, targets), merged)
    return kept


def _gathered(part: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Bring cos or sin (..., 1 or B, S, d) to (..., B, W, d); M-RoPE has a leading axis."""
    columns = columns.to(part.device)
    part = part.expand(*part.shape[:-3], len(columns), *part.shape[-2:])
    index = columns[..., None].expand(*part.shape[:-3], *columns.shape, part.shape[-1])
    return part.gather(-2, index)


def _gathered_mask(mask: torch.Tensor, stage: DecoderStage, length: int) -> torch.Tensor:
    """Bring a mask (B or 1, heads, S, columns of the cache) to the columns that are left; images stay as they see."""
    seen = stage.seen.to(mask.device)
    # What stands behind its image sees and is seen from there, whichever column it was.
    columns = stage.columns.to(mask.device).masked_fill(~seen, -1).sort(dim=1).values.clamp(min=0)
    mask = mask.expand(len(columns), -1, -1, -1)
    room = mask.shape[3]
    mask = mask[..., :length].gather(2, columns[:, None, :, None].expand(-1, mask.shape[1], -1, length))
    mask = mask.gather(3, columns[:, None, None].expand(-1, mask.shape[1], columns.shape[1], -1))
    nothing = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    itself = torch.eye(mask.shape[2], dtype=torch.bool, device=mask.device)
    mask = mask.masked_fill(~seen[:, None, None] & ~itself, nothing)
    # A static cache has more columns than were written.
    return mask if room == length else torch.nn.functional.pad(mask, (0, room - mask.shape[3]), value=nothing)
