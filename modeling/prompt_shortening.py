"""Shorten a prompt's placeholders, and show the caller the full prompt again: tensors in, tensors out.

A model has one placeholder id per modality (image, video). Counts are kept per id: `{id: [visual tokens of its first
image, of its second ...]}`, in reading order over the rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput

Counts = dict[int, list[int]]


@dataclass(frozen=True)
class ShortenedPrompt:
    """Where each column of a shortened prompt comes from.

    index  (B, W) column of the full prompt
    valid  (B, W) False where padding had to be added; None when nowhere
    shift  (B, W) what renumbering adds to the position of each column
    full_length   columns of the full prompt
    """

    index: torch.Tensor
    valid: torch.Tensor | None
    shift: torch.Tensor
    full_length: int

    @property
    def length(self) -> int:
        return self.index.shape[1]

    @property
    def dropped(self) -> int:
        return self.full_length - self.length

    def take(self, tensor: torch.Tensor, fill: int) -> torch.Tensor:
        """Bring a (..., B, S) tensor to (..., B, W); added padding gets `fill`."""
        taken = tensor.gather(-1, self.index.to(tensor.device).expand(*tensor.shape[:-2], -1, -1))
        return taken if self.valid is None else taken.masked_fill(~self.valid.to(tensor.device), fill)

    def attention_mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        if mask is None:
            return None if self.valid is None else self.valid.long()
        return self.take(mask, 0)


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


def read_layout(
    input_ids: torch.Tensor, placeholder_ids: Sequence[int], attention_mask: torch.Tensor | None = None
) -> PromptLayout:
    """Count a prompt's placeholders and padding: the one time that shortening waits for the device."""
    of_id = [input_ids == token for token in placeholder_ids]
    counts = [is_placeholder.sum(1) for is_placeholder in of_id]
    rows = len(input_ids)
    if attention_mask is None:
        placeholders = dict(zip(placeholder_ids, torch.stack(counts).tolist(), strict=True))
        return PromptLayout(placeholders, [0] * rows, [input_ids.shape[1]] * rows, padded_left=True)
    mask = attention_mask.to(input_ids.device)
    inside = _without_outer_padding(mask)
    outside = (any_of(of_id) & ~inside).sum(1)
    columns = (outside, inside.sum(1), mask[:, -1].bool().long(), *counts)
    outside, seen, last, *found = torch.stack(columns).tolist()
    return PromptLayout(dict(zip(placeholder_ids, found, strict=True)), outside, seen, padded_left=all(last))


def any_of(flags: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return where one of several boolean tensors is true."""
    union = flags[0]
    for more in flags[1:]:
        union = union | more
    return union


def shorten_prompt(
    input_ids: torch.Tensor,
    full_counts: Mapping[int, Sequence[int]],
    kept: Mapping[int, Sequence[torch.Tensor]],
    attention_mask: torch.Tensor | None = None,
    layout: PromptLayout | None = None,
) -> ShortenedPrompt:
    """Choose the columns of a full prompt that stay.

    input_ids    (B, S) with full_counts[id][j] placeholders of this id for its image j
    kept         per id and image the placeholders that stay, as indices into its full_counts[id][j]; one may stay
                 repeatedly, so that a prompt can be lengthened too
    layout       of this prompt, where it was read before
    Rows that lose different numbers of placeholders are padded anew, on the side that was padded before.
    Raises ValueError when the placeholders of one image are spread over two rows.
    """
    batch, width = input_ids.shape
    layout = read_layout(input_ids, list(full_counts), attention_mask) if layout is None else layout
    change = [0] * batch  # by how many columns each row grows; below 0, shrinks
    copies, of_id = torch.ones_like(input_ids), []
    for token, counts in full_counts.items():
        of_id.append(input_ids == token)
        if not counts:
            continue
        for row, full, keep in zip(
            rows_of_images(layout.placeholders[token], counts), counts, kept[token], strict=True
        ):
            change[row] += len(keep) - full
        image = of_id[-1].flatten().cumsum(0).sub(1).clamp(min=0).view_as(input_ids)
        copies = copies.where(~of_id[-1], _copies_of_placeholders(counts, kept[token], input_ids.device)[image])
    is_placeholder = any_of(of_id)
    lengths = [width + more for more in change]
    if len(set(change)) > 1 and attention_mask is not None:
        if any(layout.outside):
            raise ValueError("image placeholders must not lie in the padding of attention_mask")
        copies = copies * _without_outer_padding(attention_mask.to(input_ids.device))
        lengths = [seen + more for seen, more in zip(layout.seen, change, strict=True)]
    index, valid = _align_rows(copies, lengths, layout.padded_left)
    taken = is_placeholder.gather(1, index)
    taken = taken if valid is None else taken & valid
    shift = taken.cumsum(1) - is_placeholder.cumsum(1).gather(1, index)
    return ShortenedPrompt(index, valid, shift if valid is None else shift.masked_fill(~valid, 0), width)


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


def holds_unbroken_images(input_ids: torch.Tensor, image_token_id: int, counts: Sequence[int]) -> bool:
    """True when the placeholders, cut into `counts` one after the other, make each image one unbroken run."""
    columns = (input_ids == image_token_id).flatten().nonzero()[:, 0].cpu()
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
    """What a KV cache was built from; attached to the cache, so that a later turn is shortened the same way.

    full_counts, kept_counts  per placeholder id the visual tokens of each image in a full prompt, and in the cache
    dropped          columns the prompt lost; uniform says that every row lost as many
    position_policy  the one its tokens were numbered by
    """

    full_counts: Counts
    kept_counts: Counts
    dropped: int
    uniform: bool
    position_policy: str

    def may_have(self, placeholders: Mapping[int, Sequence[int]]) -> bool:
        """True for the placeholders per id and row of this prompt, in its full or in its shortened form."""
        return all(
            sum(found) in (sum(self.full_counts[token]), sum(self.kept_counts[token]))
            for token, found in placeholders.items()
        )

    def after(self, earlier: "CachedPrompt | None") -> "CachedPrompt":
        """Return what the cache holds when this prompt was appended to an earlier one."""
        if earlier is None:
            return self
        return CachedPrompt(
            _joined(earlier.full_counts, self.full_counts),
            _joined(earlier.kept_counts, self.kept_counts),
            earlier.dropped + self.dropped,
            earlier.uniform and self.uniform,
            self.position_policy,
        )


def _joined(first: Counts, then: Counts) -> Counts:
    return {token: [*first[token], *then[token]] for token in first}


class FullPromptStreamer:
    """Hands the caller's full prompt to a streamer in place of the shortened one, then every new token."""

    def __init__(self, streamer: Any, prompt: torch.Tensor) -> None:
        self.streamer = streamer
        self.prompt: torch.Tensor | None = prompt

    def put(self, value: torch.Tensor) -> None:
        self.streamer.put(value if self.prompt is None else self.prompt)
        self.prompt = None

    def end(self) -> None:
        self.streamer.end()


def with_full_prompt(result: Any, prompt: torch.Tensor, shortened_length: int) -> Any:
    """Put the caller's prompt (B, S) in front of the new tokens of `result`: ids (B * copies, W + new), or an output
    of `generate`, whose other tensors (scores, attentions, hidden states) stay as short as the prompt that was run."""
    if isinstance(result, ModelOutput):
        result.sequences = with_full_prompt(result.sequences, prompt, shortened_length)
        return result
    copies = result.shape[0] // prompt.shape[0]
    full = prompt.to(result.device).repeat_interleave(copies, dim=0)
    return torch.cat([full, result[:, shortened_length:]], dim=1)


class FullPromptHook:
    """A logits processor or stopping criterion of the caller, which sees the caller's own prompt."""

    def __init__(self, hook: Callable, prompt: torch.Tensor, shortened_length: int) -> None:
        self.hook, self.prompt, self.shortened_length = hook, prompt, shortened_length

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ids = with_full_prompt(args[0], self.prompt, self.shortened_length)
        return self.hook(ids, *args[1:], **kwargs)


def see_full_prompt(hooks: dict[str, Any], prompt: torch.Tensor, shortened_length: int) -> dict[str, Any]:
    """Let the caller's logits processors, stopping criteria and prefix function see the caller's own prompt."""

    def allowed_tokens(row: int, ids: torch.Tensor) -> list[int]:
        return prefix_function(row, torch.cat([prompt[row].to(ids.device), ids[shortened_length:]]))

    wrapped = dict(hooks)
    for name in ("logits_processor", "stopping_criteria"):
        if (given := hooks[name]) is not None:
            wrapped[name] = type(given)(FullPromptHook(hook, prompt, shortened_length) for hook in given)
    if (prefix_function := hooks["prefix_allowed_tokens_fn"]) is not None:
        wrapped["prefix_allowed_tokens_fn"] = allowed_tokens
    return wrapped
