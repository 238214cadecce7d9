"""What a decoder layer's queries and keys say of the visual tokens in a prompt: pure functions, no attention map kept.

Only rows that rank are ever multiplied with the keys. Logits and softmax run in float32 at least.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from .selector_registry import rows_at
from .similarity import without_autocast
from .visual_attention import entries_at_once

HEADS = 14  # of every model, as in SparseVLM 2


@dataclass(frozen=True)
class DecoderReading:
    """What was read in one decoder layer of B prompts of S columns, H query heads and G key heads.

    query, key   (B, H, S, d), (B, G, S, d)  after rotary embedding
    scaling      of the logits
    seen         (B, S)     False for padding
    last         (B,)       column of the last token of the prompt
    visual       (B, S)     True for visual tokens
    raters       (B, S)     True for the words that rate visual tokens (SparseVLM); None where nobody asked
    rotary       cos and sin (B, S, d) of the positions; None where nobody asked
    given        (B, S, C)  what the layer was given
    places       (B, S, 3)  where visual tokens lie in their images; None where nobody asked
    told         (B, S)     what the call said of visual tokens; None where it said nothing
    """

    query: torch.Tensor
    key: torch.Tensor
    scaling: float
    seen: torch.Tensor
    last: torch.Tensor
    visual: torch.Tensor
    raters: torch.Tensor | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    given: torch.Tensor | None = None
    places: torch.Tensor | None = None
    told: torch.Tensor | None = None

    @cached_property
    def _wide_key(self) -> torch.Tensor:
        return self.key.float()

    def attention(self, rows: torch.Tensor) -> torch.Tensor:
        """Return what some rows attend to: columns (B, R) -> (B, H, R, S), causal, nothing for padding."""
        at = rows[:, None, :, None].expand(-1, self.query.shape[1], -1, self.query.shape[3])
        asking = self.query.gather(2, at).float()
        key = self._wide_key
        grouped = asking.unflatten(1, (key.shape[1], -1))  # (B, G, H/G, R, d)
        with without_autocast(key.device):
            logits = torch.matmul(grouped, key[:, :, None].mT) * self.scaling
        columns = torch.arange(key.shape[2], device=key.device)
        visible = (columns <= rows[..., None]) & self.seen[:, None]
        logits = logits.masked_fill(~visible[:, None, None], torch.finfo(logits.dtype).min)
        return logits.softmax(dim=-1).flatten(1, 2)

    def mean_attention(self, asking: torch.Tensor, level: bool = False) -> torch.Tensor:
        """Return what the rows that `asking` (B, S) names attend to on average, in pieces: (B, H, S).

        level  divide by the logits that positions alone give
        """
        rows, weight = _rows_of(asking)
        batch, heads, _, _ = self.query.shape
        at_once = max(16, entries_at_once(self.key.device) // (batch * heads * self.key.shape[2]))
        total = torch.zeros((), device=self.key.device)
        for part, share in zip(rows.split(at_once, 1), weight.split(at_once, 1), strict=True):
            attention = self.attention(part)
            if level:
                attention = attention / self._gravity(part)[:, None]
            total = total + (attention * share[:, None, :, None]).sum(2)
        return total / weight.sum(1).clamp(min=1)[:, None, None]

    def _gravity(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, R, S) that two vectors of ones have by their positions alone."""
        if self.rotary is None:
            raise RuntimeError("positions were not read")
        cos, sin = (part.float() for part in self.rotary)
        low, high = sin.chunk(2, dim=-1)
        ones = cos + torch.cat([-low, high], dim=-1)  # a vector of ones, rotated
        return rows_at(ones, rows) @ ones.mT / ones.shape[-1] ** 0.5


def _rows_of(flags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the columns (B, R) where `flags` (B, S) is true, and 1 where one is, 0 where a row has fewer."""
    most = max(1, int(flags.sum(1).max()))
    order = (~flags).int().argsort(dim=1, stable=True)[:, :most]
    return order, flags.gather(1, order).float()


def last_row(reading: DecoderReading) -> torch.Tensor:
    """Attention that the last token of the prompt pays, mean over heads (FastV, PyramidDrop): (B, S)."""
    return reading.attention(reading.last[:, None]).mean(1)[:, 0]


def visual_rows(reading: DecoderReading) -> torch.Tensor:
    """Attention that all visual tokens pay, mean over heads and rows (VisionDrop): (B, S)."""
    return reading.mean_attention(reading.visual).mean(1)


def rater_rows(reading: DecoderReading) -> torch.Tensor:
    """Attention that the raters pay, mean over heads and rows (SparseVLM 1.5): (B, S)."""
    return reading.mean_attention(_raters(reading)).mean(1)


def level_rater_rows(reading: DecoderReading) -> torch.Tensor:
    """As `rater_rows`, freed of what positions alone give near tokens, in the `HEADS` most attentive heads: (B, S)."""
    attention = reading.mean_attention(_raters(reading), level=True)
    best = (attention * reading.visual[:, None]).sum(2).argsort(dim=1, descending=True, stable=True)[:, :HEADS]
    return rows_at(attention, best).mean(1)


def key_norms(reading: DecoderReading) -> torch.Tensor:
    """Sum of the absolute values of each column's keys, over all heads (DART): (B, S)."""
    return reading.key.float().abs().sum((1, 3))


def told(reading: DecoderReading) -> torch.Tensor:
    """What the call said of each visual token: how much another model attended to it (SGL): (B, S)."""
    if reading.told is None:
        raise RuntimeError("the call did not say how important visual tokens are")
    return reading.told


def visual_importance(attentions: Sequence[Any], is_visual: torch.Tensor) -> torch.Tensor:
    """Return how much a model attended to each visual token while it read the end of its prompt and answered (SGL).

    Its sum over layers, heads and rows tells another model, by `visual_importance` of `generate` and `forward`, which
    tokens it may drop. Rows are the prompt's from its last visual token on, and those of the answer.

    attentions  of a dense model loaded with attn_implementation="eager", which returns them for
                output_attentions=True: those of `forward`, by layer (B, H, S, S), or those of `generate`, by step
    is_visual   (B, S) where its prompt has visual tokens
    returns     (B, N) in the order of the prompt, N of the row that has most; zeros behind those of the others

    Answers of a batch count up to the end of the longest: where that matters, ask one prompt at a time.
    """
    by_step = list(attentions or ())
    steps = [by_step] if by_step and isinstance(by_step[0], torch.Tensor) else by_step
    if not steps or not all(isinstance(layer, torch.Tensor) for step in steps for layer in step or [None]):
        raise ValueError(
            'no attentions: load the model with attn_implementation="eager" and pass output_attentions=True'
        )
    rows, width = is_visual.shape
    if any(layer.shape[0] != rows or layer.shape[2] != width for layer in steps[0]):
        raise ValueError(
            f"attentions of {tuple(steps[0][0].shape)} do not fit a prompt of {tuple(is_visual.shape)}: they must be "
            "of a dense model, with one answer to each prompt, and is_visual of the same prompt"
        )
    places = torch.arange(1, width + 1, device=is_visual.device)
    is_asking = places > (is_visual * places).argmax(1, keepdim=True)
    total = torch.zeros(rows, width, device=is_visual.device)
    for number, step in enumerate(steps):
        for layer in step:
            attention = layer.detach().float().to(total.device)
            weight = is_asking[:, None, :, None] if number == 0 else 1.0
            total += (attention * weight).sum((1, 2))[:, :width]
    order = (~is_visual).int().argsort(dim=1, stable=True)[:, : int(is_visual.sum(1).max())]
    return total.gather(1, order) * is_visual.gather(1, order)


def _raters(reading: DecoderReading) -> torch.Tensor:
    if reading.raters is None:
        raise RuntimeError("raters were not found when the prompt began")
    return reading.raters


def find_raters(embeds: torch.Tensor, visual: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Return the words behind a prompt's visual tokens that resemble these more than the average (SparseVLM): (B, S).

    embeds  (B, S, C)  the prompt as embedded
    visual  (B, S)     True for visual tokens
    seen    (B, S)     False for padding
    """
    raters = torch.zeros_like(visual)
    for row, (tokens, is_visual, is_seen) in enumerate(zip(embeds.detach().float(), visual, seen, strict=True)):
        behind = is_seen & (is_visual.flip(0).cumsum(0).flip(0) == 0) & is_visual.any()
        words = tokens[behind]
        if len(words):
            share = (tokens[is_visual] @ words.mT).softmax(dim=-1).mean(0)
            chosen = share > share.mean()
            raters[row, behind] = chosen if bool(chosen.any()) else torch.ones_like(chosen)
    return raters


RANKINGS: dict[str, Callable[..., torch.Tensor]] = {
    "last_row": last_row,
    "visual_rows": visual_rows,
    "rater_rows": rater_rows,
    "level_rater_rows": level_rater_rows,
    "key_norms": key_norms,
    "told": told,
}
