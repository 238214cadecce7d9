"""Shorten a prompt's placeholders, and spread what was computed over the full prompt again: tensors in, tensors out.

A model has one placeholder id per modality (image, video). Counts are kept per id: `{id: [visual tokens of its first
image, of its second ...]}`, in reading order over the rows. "Full" is the prompt as a stock processor writes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

Counts = dict[int, list[int]]
Flags = Mapping[int, torch.Tensor]  # per placeholder id (B, S), True where a prompt has it

IGNORED = -100  # a label that does not count


@dataclass(frozen=True)
class KeptColumns:
    """Which columns of a full prompt (B, S) make the shortened one (B, W).

    index  (B, W) column of the full prompt
    valid  (B, W) False where padding had to be added; None when nowhere
    shift  (B, W) what counting anew adds to the position of each column; negative
    grown  (B, S) by how many columns the prompt grew up to and including each column; negative where it shrank
    """

    index: torch.Tensor
    valid: torch.Tensor | None
    shift: torch.Tensor
    grown: torch.Tensor

    @property
    def length(self) -> int:
        return self.index.shape[1]

    @property
    def full_length(self) -> int:
        return self.grown.shape[1]

    @property
    def dropped(self) -> int:
        return self.full_length - self.length

    def take(self, tensor: torch.Tensor, fill: int) -> torch.Tensor:
        """Bring (..., B, S) to (..., B, W); added padding gets `fill`."""
        taken = tensor.gather(-1, self.index.to(tensor.device).expand(*tensor.shape[:-2], -1, -1))
        return taken if self.valid is None else taken.masked_fill(~self.valid.to(tensor.device), fill)

    def take_embedded(self, embeds: torch.Tensor) -> torch.Tensor:
        """Bring (B, S, D) to (B, W, D)."""
        return embeds.gather(1, self.index.to(embeds.device)[..., None].expand(-1, -1, embeds.shape[-1]))

    def mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Bring an attention mask (B, S) to (B, W); None stays None unless padding was added."""
        if mask is None:
            return None if self.valid is None else self.valid.long()
        return self.take(mask, 0)

    def renumbered(self, positions: torch.Tensor) -> torch.Tensor:
        """Bring positions (B, S) to (B, W), counted anew; samples that were packed into one row each for itself."""
        positions = positions.to(self.index.device)
        is_start = F.pad(positions.diff(dim=-1) != 1, (1, 0))
        columns = torch.arange(self.full_length, device=positions.device)
        start = torch.where(is_start, columns, 0).cummax(dim=-1).values
        before = F.pad(self.grown, (1, 0))[:, :-1].gather(1, start)
        return self.take(positions - before, 0) + self.shift

    def spread(self, tensor: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Bring a tensor with W columns along `dim` to S columns, zeros where a column was dropped.

        dimension 0 is the batch. Of a column that stands in the short prompt repeatedly, the last copy counts.
        """
        source = self._source.to(tensor.device)
        shape = [1] * tensor.dim()
        shape[0], shape[dim] = source.shape
        source = source.view(shape)
        target = [*tensor.shape]
        target[dim] = self.full_length
        return tensor.gather(dim, source.clamp(min=0).expand(target)).masked_fill(source < 0, 0)

    def then(self, between: int, more: "KeptColumns") -> "KeptColumns":
        """Append `between` columns of text that all stay, and then those of another prompt."""
        grown = self.grown[:, -1:]
        before = self.full_length + between
        text = torch.arange(self.full_length, before, device=self.index.device).expand(len(self.index), -1)
        valid = None
        if self.valid is not None or more.valid is not None:
            flags = [c.index >= 0 if c.valid is None else c.valid for c in (self, more)]
            valid = torch.cat([flags[0], text >= 0, flags[1]], dim=1)
        return KeptColumns(
            torch.cat([self.index, text, more.index + before], dim=1),
            valid,
            torch.cat([self.shift, grown.expand(-1, between), more.shift + grown], dim=1),
            torch.cat([self.grown, grown.expand(-1, between), more.grown + grown], dim=1),
        )

    def of(self, inner: "KeptColumns") -> "KeptColumns":
        """Return which columns of the full prompt those are that `inner` keeps of the shortened one."""
        valid = inner.valid
        if self.valid is not None:
            of_own = self.valid.gather(1, inner.index)
            valid = of_own if valid is None else valid & of_own
        index = self.index.gather(1, inner.index)
        stays = torch.ones_like(index) if valid is None else valid.long()
        kept = torch.zeros_like(self.grown).scatter_reduce(1, index, stays, "amax")
        return KeptColumns(index, valid, self.shift.gather(1, inner.index) + inner.shift, (kept - 1).cumsum(1))

    @property
    def _source(self) -> torch.Tensor:
        """Return (B, S) the column of the short prompt that each column of the full one became, -1 if none."""
        columns = torch.arange(self.length, device=self.index.device).expand_as(self.index)
        index, nothing = self.index, columns.new_full((len(columns), self.full_length), -1)
        if self.valid is not None:  # padding that was added lies where the full prompt has padding, if it has some
            first = self.valid.int().argmax(1, keepdim=True)
            last = self.length - 1 - self.valid.int().flip(1).argmax(1, keepdim=True)
            edge = torch.where(self.valid[:, :1], last, first)
            index = index.where(self.valid, columns + index.gather(1, edge) - edge)
            columns = columns.masked_fill((index < 0) | (index >= self.full_length), -1)
        return nothing.scatter_reduce(1, index.clamp(0, self.full_length - 1), columns, "amax")

    def targets(self, targets: torch.Tensor) -> torch.Tensor:
        """Move each target (B, S) to the column that predicts it in the short prompt.

        A column's target is the label of the column behind it. Where that one was dropped, the next that stays takes
        its place, and a dropped column predicts nothing: the loss is that of the short prompt.
        """
        index = self.index.to(targets.device)
        following = F.pad(index, (0, 1), value=self.full_length)[:, 1:]
        if self.valid is not None:
            valid = self.valid.to(targets.device)
            following = following.masked_fill(~F.pad(valid, (0, 1), value=True)[:, 1:], self.full_length)
        short = targets.gather(1, (following - 1).clamp(min=0))
        source = self._source.to(targets.device)
        return short.gather(1, source.clamp(min=0)).masked_fill(source < 0, IGNORED)


@dataclass(frozen=True)
class PromptLayout:
    """What the host must know of a prompt (B, S) to shorten it; all else stays on the device.

    placeholders   per id the placeholders of each row
    outside        placeholders of each row that lie in the padding at either end of it
    seen           columns of each row without that padding
    padded_left    True unless some row ends in padding
    """

    placeholders: dict[int, list[int]]
    outside: list[int]
    seen: list[int]
    padded_left: bool


def read_layout(is_placeholder: Flags, attention_mask: torch.Tensor | None = None) -> PromptLayout:
    """Count a prompt's placeholders and padding: the one time that shortening waits for the device.

    is_placeholder  per id (B, S)
    attention_mask  (B, S) of this prompt alone; None where all is seen
    """
    flags = list(is_placeholder.values())
    counts = [flag.sum(1) for flag in flags]
    rows, width = flags[0].shape
    if attention_mask is None:
        placeholders = dict(zip(is_placeholder, torch.stack(counts).tolist(), strict=True))
        return PromptLayout(placeholders, [0] * rows, [width] * rows, padded_left=True)
    mask = attention_mask.to(flags[0].device)
    inside = _without_outer_padding(mask)
    outside = (any_of(flags) & ~inside).sum(1)
    columns = (outside, inside.sum(1), mask[:, -1].bool().long(), *counts)
    outside, seen, last, *found = torch.stack(columns).tolist()
    return PromptLayout(dict(zip(is_placeholder, found, strict=True)), outside, seen, padded_left=all(last))


def any_of(flags: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return where one of several boolean tensors is true."""
    union = flags[0]
    for more in flags[1:]:
        union = union | more
    return union


def keep_columns(
    is_placeholder: Flags,
    full_counts: Mapping[int, Sequence[int]],
    kept: Mapping[int, Sequence[torch.Tensor]],
    attention_mask: torch.Tensor | None,
    layout: PromptLayout,
) -> KeptColumns:
    """Choose the columns of a full prompt that stay.

    is_placeholder  per id (B, S); full_counts[id][j] of them are its image j
    kept            per id and image the placeholders that stay, as indices into its full_counts[id][j]; one may stay
                    repeatedly, so that a prompt can be lengthened too
    attention_mask  (B, S), which `layout` was read with
    Rows that lose different numbers of placeholders are padded anew, on the side that was padded before.
    Raises ValueError when the placeholders of one image are spread over two rows.
    """
    flags = list(is_placeholder.values())
    batch, width = flags[0].shape
    device = flags[0].device
    change = [0] * batch  # by how many columns each row grows; below 0, shrinks
    copies = torch.ones((batch, width), dtype=torch.long, device=device)
    for token, counts in full_counts.items():
        if not counts:
            continue
        rows = rows_of_images(layout.placeholders[token], counts)
        for row, full, keep in zip(rows, counts, kept[token], strict=True):
            change[row] += len(keep) - full
        image = is_placeholder[token].flatten().cumsum(0).sub(1).clamp(min=0).view(batch, width)
        of_image = _copies_of_placeholders(counts, kept[token], device)[image]
        copies = copies.where(~is_placeholder[token], of_image)
    grown = (copies - 1).cumsum(1)
    lengths = [width + more for more in change]
    if len(set(change)) > 1 and attention_mask is not None:
        if any(layout.outside):
            raise ValueError("image placeholders must not lie in the padding of attention_mask")
        copies = copies * _without_outer_padding(attention_mask.to(device))
        lengths = [seen + more for seen, more in zip(layout.seen, change, strict=True)]
    index, valid = _align_rows(copies, lengths, layout.padded_left)
    is_any = any_of(flags)
    taken = is_any.gather(1, index)
    taken = taken if valid is None else taken & valid
    shift = taken.cumsum(1) - is_any.cumsum(1).gather(1, index)
    return KeptColumns(index, valid, shift if valid is None else shift.masked_fill(~valid, 0), grown)


def every_column(batch: int, width: int, device: torch.device) -> KeptColumns:
    """Return the columns of a prompt (B, S) that loses none."""
    index = torch.arange(width, device=device).expand(batch, -1)
    return KeptColumns(index, None, torch.zeros_like(index), torch.zeros_like(index))


def last_placeholders(full: Counts, kept: Counts, device: torch.device) -> dict[int, list[torch.Tensor]]:
    """Return per image the placeholders that stay where it does not matter which: they are all alike.

    The last ones, because what follows an image is predicted from its last column. The first repeats where there must
    be more of them (LLaVA-NeXT, tile_mode "paper").
    """
    return {
        token: [
            torch.arange(whole - count, whole, device=device).clamp(min=0)
            for whole, count in zip(full[token], kept[token], strict=True)
        ]
        for token in full
    }


def rows_of_images(placeholders: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Return the row of each image, given the placeholders of each row and of each image, in reading order.

    Raises ValueError when the placeholders of one image are spread over two rows.
    """
    rows, row, left = [], -1, 0
    for number, count in enumerate(counts):
        while left == 0:
            row += 1
            left = placeholders[row]
        if count > left:
            raise ValueError(f"the placeholders of image {number} are spread over two rows of input_ids")
        left -= count
        rows.append(row)
    return rows


def _copies_of_placeholders(
    full_counts: Sequence[int], kept: Sequence[torch.Tensor], device: torch.device
) -> torch.Tensor:
    """Return for each placeholder of a full prompt, in reading order, how often it occurs in the shortened one."""
    total, places = 0, []
    for full, keep in zip(full_counts, kept, strict=True):
        places.append(keep.to(device) + total)
        total += full
    place = torch.cat(places)
    return torch.zeros(total, dtype=torch.long, device=device).scatter_add(0, place, torch.ones_like(place))


def holds_unbroken_images(is_placeholder: torch.Tensor, counts: Sequence[int]) -> bool:
    """True when the placeholders (B, S), cut into `counts` one after the other, make each image one unbroken run."""
    columns = is_placeholder.flatten().nonzero()[:, 0].cpu()
    return all(int(run[-1] - run[0]) == len(run) - 1 for run in columns.split(list(counts)))


def _without_outer_padding(attention_mask: torch.Tensor) -> torch.Tensor:
    seen = attention_mask.bool().int()
    return (seen.cumsum(1) > 0) & (seen.flip(1).cumsum(1).flip(1) > 0)


def _align_rows(copies: torch.Tensor, lengths: list[int], left: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the columns (B, W) that `copies` (B, S) of each column make, and where they are no padding.

    lengths  the sum of each row of `copies`, known beforehand so that no shape has to be read from the device
    """
    batch, width = len(lengths), max(lengths)
    valid = None
    if min(lengths) < width:  # the outermost column stands in for the padding
        length = copies.sum(1, keepdim=True)
        offset = torch.arange(width, device=copies.device).expand(batch, width)
        valid = offset >= width - length if left else offset < length
        padding = torch.zeros_like(copies)
        padding[:, 0 if left else -1] = width - length[:, 0]
        copies = copies + padding
    columns = torch.arange(copies.shape[1], device=copies.device).repeat(batch)
    index = columns.repeat_interleave(copies.flatten(), output_size=batch * width)
    return index.view(batch, width), valid


@dataclass(frozen=True)
class CachedPrompt:
    """What a KV cache was built from; attached to the cache, so that a later call goes on in the same way.

    full_counts, kept_counts  per placeholder id the visual tokens of each image in a full prompt, and in the cache
    position_policy  the one its tokens were numbered by
    skipped          how many positions of the full prompt have no token in the cache
    columns          those of the caller's prompt that are in the cache; None where the caller wrote it so short
    """

    full_counts: Counts
    kept_counts: Counts
    position_policy: str
    skipped: int = 0
    columns: KeptColumns | None = None

    @property
    def dropped(self) -> int:
        """By how many columns the cache is shorter than what the caller wrote."""
        return 0 if self.columns is None else self.columns.dropped

    @property
    def uniform(self) -> bool:
        """True when every row lost as many columns."""
        return self.columns is None or self.columns.valid is None

    def may_have(self, placeholders: Mapping[int, Sequence[int]]) -> bool:
        """True for the placeholders per id and row of this prompt, in its full or in its shortened form."""
        return all(
            sum(found) in (sum(self.full_counts[token]), sum(self.kept_counts[token]))
            for token, found in placeholders.items()
        )


def joined_counts(first: Counts, then: Counts) -> Counts:
    return {token: [*first[token], *then[token]] for token in first}
