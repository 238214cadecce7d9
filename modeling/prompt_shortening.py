"""Shorten a prompt's image placeholders, and show the caller the full prompt again: tensors in, tensors out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput


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
        """Bring a (B, S) tensor to (B, W); added padding gets `fill`."""
        taken = tensor.gather(1, self.index.to(tensor.device))
        return taken if self.valid is None else taken.masked_fill(~self.valid.to(tensor.device), fill)

    def attention_mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        if mask is None:
            return None if self.valid is None else self.valid.long()
        return self.take(mask, 0)


def shorten_prompt(
    input_ids: torch.Tensor,
    image_token_id: int,
    full_counts: Sequence[int],
    kept: Sequence[torch.Tensor],
    attention_mask: torch.Tensor | None = None,
) -> ShortenedPrompt:
    """Choose the columns of a full prompt that stay.

    input_ids    (B, S) with full_counts[j] placeholders for image j, images in reading order over the rows
    kept         per image the placeholders that stay, as indices into its full_counts[j]
    Rows that lose different numbers of placeholders are padded anew, on the side that was padded before.
    Raises ValueError when the placeholders of one image are spread over two rows.
    """
    batch, width = input_ids.shape
    ids = input_ids.flatten().cpu()
    is_image = ids == image_token_id
    text, images = (~is_image).nonzero()[:, 0], is_image.nonzero()[:, 0]
    chosen = []
    for number, (columns, keep) in enumerate(zip(images.split(list(full_counts)), kept, strict=True)):
        if columns[0] // width != columns[-1] // width:
            raise ValueError(f"the placeholders of image {number} are spread over two rows of input_ids")
        chosen.append(columns[keep.cpu()])
    columns = torch.cat([text, *chosen]).sort().values
    rows = columns // width
    if rows.bincount(minlength=batch).unique().numel() > 1 and attention_mask is not None:
        inside = _without_outer_padding(attention_mask).flatten().cpu()[columns]
        columns, rows = columns[inside], rows[inside]
    index, valid = _align_rows(rows, columns % width, batch, left=_padded_left(attention_mask))
    full_rank = is_image.view(batch, width).cumsum(1).gather(1, index)
    kept_rank = (is_image.view(batch, width).gather(1, index) & valid).cumsum(1)
    device = input_ids.device
    all_valid = bool(valid.all())
    return ShortenedPrompt(
        index.to(device), None if all_valid else valid.to(device), (kept_rank - full_rank).to(device), width
    )


def holds_unbroken_images(input_ids: torch.Tensor, image_token_id: int, counts: Sequence[int]) -> bool:
    """True when the placeholders, cut into `counts` one after the other, make each image one unbroken run."""
    columns = (input_ids == image_token_id).flatten().nonzero()[:, 0].cpu()
    return all(int(run[-1] - run[0]) == len(run) - 1 for run in columns.split(list(counts)))


def _without_outer_padding(attention_mask: torch.Tensor) -> torch.Tensor:
    seen = attention_mask.bool().int()
    return (seen.cumsum(1) > 0) & (seen.flip(1).cumsum(1).flip(1) > 0)


def _padded_left(attention_mask: torch.Tensor | None) -> bool:
    return attention_mask is None or bool(attention_mask[:, -1].all())


def _align_rows(
    rows: torch.Tensor, columns: torch.Tensor, batch: int, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = rows.bincount(minlength=batch)
    width = int(lengths.max())
    offset = torch.arange(width).expand(batch, width)
    valid = offset >= (width - lengths)[:, None] if left else offset < lengths[:, None]
    index = torch.zeros(batch, width, dtype=torch.long)
    index[valid] = columns
    return index, valid


@dataclass(frozen=True)
class CachedPrompt:
    """What a KV cache was built from; attached to the cache, so that a later turn is shortened the same way.

    full_counts, kept_counts  visual tokens of each image in a full prompt, and in the cache
    dropped          columns the prompt lost; uniform says that every row lost as many
    position_policy  the one its tokens were numbered by
    """

    full_counts: tuple[int, ...]
    kept_counts: tuple[int, ...]
    dropped: int
    uniform: bool
    position_policy: str

    @property
    def possible_placeholders(self) -> tuple[int, int]:
        return sum(self.full_counts), sum(self.kept_counts)

    def after(self, earlier: "CachedPrompt | None") -> "CachedPrompt":
        """Return what the cache holds when this prompt was appended to an earlier one."""
        if earlier is None:
            return self
        return CachedPrompt(
            earlier.full_counts + self.full_counts,
            earlier.kept_counts + self.kept_counts,
            earlier.dropped + self.dropped,
            earlier.uniform and self.uniform,
            self.position_policy,
        )


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
