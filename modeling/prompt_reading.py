"""What a call hands over, read once: where its placeholders are, how many its images need, which form it has.

A prompt is *full* when it has as many placeholders as a stock processor writes, and *short* when it has as many as
visual tokens are kept. Nothing that a caller handed over is changed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch

from .prompt_shortening import (
    CachedPrompt,
    Counts,
    Flags,
    KeptColumns,
    PromptLayout,
    any_of,
    holds_unbroken_images,
    keep_columns,
    read_layout,
    rows_of_images,
)
from .similarity import refuse_unless
from .stock_versions import CACHE
from .visual_features import full_counts_of, kept_counts_of

# What has an entry per token of the prompt, and the entry that padding gets.
PER_TOKEN = {"labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0}
FEATURES = "mm_encoder_outputs"


class Modality(NamedTuple):
    """How stock code names one kind of visual input.

    name          key among `mm_encoder_outputs`; the base model has `get_<name>_features` and `<name>_token_counts`
    pixels        argument of forward that holds it
    described_by  further arguments of `get_<name>_features`, given to forward beside the pixels
    placeholder   field of the config with the id that prompts hold for it
    """

    name: str
    pixels: str
    described_by: tuple[str, ...]
    placeholder: str


IMAGES = Modality(
    "image",
    "pixel_values",
    ("image_sizes", "vision_feature_layer", "vision_feature_select_strategy"),
    "image_token_id",
)


@dataclass(frozen=True)
class Questions:
    """What the rows of a prompt ask about their images.

    words    (B, L, D) the words of each row's question, as the language model embeds them; or in CLIP's common space
    is_word  (B, L)    False for what fills up a row with fewer words
    rows     of each image, in reading order, the row that shows it
    """

    words: torch.Tensor
    is_word: torch.Tensor
    rows: list[int]


@dataclass(frozen=True)
class Prompt:
    """One call's prompt of S columns and the visual inputs that belong to it.

    inputs          what the call handed over, under the names of stock, without what is None
    modalities      those of the model, and the placeholder id of each
    is_placeholder  per id (B, S)
    full, kept      per id the visual tokens of each image in a full prompt, and those that are kept
    past            tokens in the cache before it
    earlier         what these were made of, where the cache says so
    """

    inputs: Mapping[str, Any]
    modalities: Sequence[tuple[Modality, int]]
    is_placeholder: Flags
    full: Counts
    kept: Counts
    past: int
    earlier: CachedPrompt | None

    @property
    def ids(self) -> torch.Tensor | None:
        return self.inputs.get("input_ids")

    @property
    def width(self) -> int:
        return next(iter(self.is_placeholder.values())).shape[1]

    @property
    def device(self) -> torch.device:
        return next(iter(self.is_placeholder.values())).device

    @property
    def rows(self) -> int:
        return len(next(iter(self.is_placeholder.values())))

    @property
    def columns_before(self) -> int:
        """Columns before this prompt, as the caller counts them."""
        return self.past + (self.earlier.dropped if self.earlier else 0)

    @property
    def positions_before(self) -> int:
        """Positions before this prompt where every token keeps its own."""
        return self.past + (self.earlier.skipped if self.earlier else 0)

    @property
    def has_images(self) -> bool:
        return any(self.full.values())

    @property
    def drops_tokens(self) -> bool:
        return self.full != self.kept

    @cached_property
    def mask(self) -> torch.Tensor | None:
        """Return the part (B, S) of a 2-D attention mask that is about this prompt, without what is in the cache."""
        mask = self.inputs.get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return None
        return mask[:, -self.width :] if mask.shape[1] >= self.width else None

    @cached_property
    def layout(self) -> PromptLayout:
        return read_layout(self.is_placeholder, self.mask)

    @cached_property
    def is_full(self) -> bool:
        """True for the full number of placeholders, False for the kept one; any other raises ValueError."""
        found: dict[str, bool] = {}
        for modality, token in self.modalities:
            full, kept = self.full[token], self.kept[token]
            placeholders, whole, short = sum(self.layout.placeholders[token]), sum(full), sum(kept)
            if not full:
                continue
            if placeholders == whole == short:  # by chance, with several images in the paper's tile mode
                if full != kept:
                    found[modality.name] = holds_unbroken_images(self.is_placeholder[token], full)
            elif placeholders in (whole, short):
                found[modality.name] = placeholders == whole
            else:
                raise ValueError(_wrong_placeholders(modality, token, placeholders, full, kept))
        if len(set(found.values())) > 1:
            full_ones = ", ".join(name for name, is_full in found.items() if is_full)
            raise ValueError(
                f"the prompt is full for some of its visual inputs and shortened for others ({full_ones} full): write "
                "it one way"
            )
        return any(found.values())

    @property
    def form(self) -> Literal["text", "same", "full", "short"]:
        """ "text" has no image, and in "same" nothing is dropped."""
        if not self.has_images:
            return "text"
        if not self.drops_tokens:
            return "same"
        return "full" if self.is_full else "short"

    def require_images(self) -> None:
        """Raise ValueError for placeholders of a modality that no visual input was given for."""
        for modality, token in self.modalities:
            if not self.full[token] and (placeholders := sum(self.layout.placeholders[token])):
                raise ValueError(_wrong_placeholders(modality, token, placeholders, [], []))

    def require_question(self, last: torch.Tensor) -> None:
        """Raise ValueError where an answer begins before a row's images end, so that no question is known to be its.

        last  (B,) the last column of each row that is question
        """
        visual = any_of(list(self.is_placeholder.values()))
        column = torch.arange(self.width, device=self.device)
        refuse_unless(
            ~(visual & (column > last.to(self.device)[:, None])).any(),
            "labels begin before the last image of a row, so what is asked about it is not known: give tokens before "
            "the answer the label -100, or say in prompt_lengths where the question ends",
        )

    def questions(
        self, embed: Callable[[torch.Tensor], torch.Tensor], last: torch.Tensor | None = None
    ) -> dict[str, Questions]:
        """Return what is asked about the images of each modality, by its name.

        embed  ids (B, L) to embeddings (B, L, D)
        last   (B,) the last column of each row that is question, not answer; None for all
        A question is the words behind the last image of its row; all words of a row where none come behind it.
        Raises ValueError for a mask that does not say which columns are padding.
        """
        mask = self.inputs.get("attention_mask")
        if mask is not None and self.mask is None and self.drops_tokens:
            raise ValueError(_wrong_mask(mask, self.width, "to read the question in it"))
        visual = any_of(list(self.is_placeholder.values()))
        column = torch.arange(self.width, device=self.device)
        is_text = ~visual if self.mask is None else ~visual & self.mask.bool().to(self.device)
        if last is not None:
            is_text &= column <= last.to(self.device)[:, None]
        behind = is_text & (column > (visual * column).amax(dim=1, keepdim=True))
        is_word = torch.where(behind.any(dim=1, keepdim=True), behind, is_text)
        per_row = zip(self.layout.seen, *self.layout.placeholders.values(), strict=True)
        most = max(1, *(seen - sum(images) for seen, *images in per_row))  # known without a look at the device
        order = (~is_word).int().argsort(dim=1, stable=True)[:, :most]
        row, embeds = torch.arange(self.rows, device=self.device)[:, None], self.inputs.get("inputs_embeds")
        with torch.no_grad():
            words = embed(self.inputs["input_ids"][row, order]) if embeds is None else embeds[row, order]
        return self.questions_in(words.detach(), is_word.gather(1, order))

    def questions_in(self, words: torch.Tensor, is_word: torch.Tensor) -> dict[str, Questions]:
        """Return these words (B, L, D) as what each row asks about its images of each modality, by its name."""
        written = self.full if self.form == "full" else self.kept
        rows = {token: rows_of_images(self.layout.placeholders[token], images) for token, images in written.items()}
        return {modality.name: Questions(words, is_word, rows[token]) for modality, token in self.modalities}

    def with_inputs(self, inputs: Mapping[str, Any]) -> "Prompt":
        """Return this prompt with other inputs of the same tokens; what was read of it stays."""
        other = replace(self, inputs=inputs)
        vars(other).update({name: vars(self)[name] for name in ("mask", "layout", "is_full") if name in vars(self)})
        return other

    def columns_of(self, staying: Mapping[int, Sequence[torch.Tensor]]) -> KeptColumns:
        """Return the columns that stay when, per id and image, `staying` says which of its placeholders do."""
        mask = self.inputs.get("attention_mask")
        if mask is not None and self.mask is None:
            raise ValueError(_wrong_mask(mask, self.width, "to shorten it"))
        return keep_columns(self.is_placeholder, self.full, staying, self.mask, self.layout)

    def taken(self, columns: KeptColumns, padding_id: int) -> dict[str, Any]:
        """Return the inputs of the shortened prompt; positions are left to the policy, and out."""
        inputs = {name: value for name, value in self.inputs.items() if name != "position_ids"}
        if self.ids is not None:
            inputs["input_ids"] = columns.take(self.ids, padding_id)
        if (embeds := inputs.get("inputs_embeds")) is not None:
            inputs["inputs_embeds"] = columns.take_embedded(embeds)
        for name, padding in PER_TOKEN.items():
            if (values := inputs.get(name)) is not None:
                if values.shape[-1] != self.width:
                    raise ValueError(
                        f"{name} must have an entry for each of the {self.width} tokens of the prompt, "
                        f"got {tuple(values.shape)}"
                    )
                inputs[name] = columns.take(values.reshape(self.rows, -1), padding)
        if (mask := columns.mask(self.mask)) is not None:
            inputs["attention_mask"] = self._behind_cache(mask)
        return inputs

    def _behind_cache(self, mask: torch.Tensor) -> torch.Tensor:
        """Put in front of a prompt's mask (B, W) the columns of what is in the cache."""
        if self.past == 0:
            return mask
        given = self.inputs.get("attention_mask")
        before: torch.Tensor | None = mask.new_ones(len(mask), self.columns_before)
        if given is not None and given.shape[1] > self.width:
            before = given[:, : -self.width]
        if self.earlier is not None:
            before = mask_in_cache(self.earlier, self.past, before)
        assert before is not None  # of a mask, mask_in_cache makes a mask
        return torch.cat([before.to(mask), mask], dim=1)


def mask_in_cache(cached: CachedPrompt, past: int, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Bring an attention mask over what a cache was made of to the `past` columns that it holds; as it is, if so long.

    mask  (B, past + dropped) as the caller counts, or (B, past); None where all is seen
    """
    columns = cached.columns
    if columns is None:
        return mask
    text = past - columns.length
    if text < 0:
        raise ValueError(
            f"the cache holds {past} tokens, fewer than the {columns.length} of the prompt it was built from: it was "
            "cropped or changed since; start again without it"
        )
    if mask is None:
        seen = columns.mask(None)
        return None if seen is None else torch.nn.functional.pad(seen, (0, text), value=1)
    if mask.shape[1] == past:
        return mask
    return torch.cat([columns.take(mask[:, : columns.full_length], 0), mask[:, columns.full_length :]], dim=1)


def cached_length(inputs: Mapping[str, Any]) -> int:
    """Return how many tokens are in the cache that a call was given; 0 without one."""
    cache = inputs.get(CACHE)
    return 0 if cache is None else int(cache.get_seq_length())


def cached_prompt(inputs: Mapping[str, Any]) -> CachedPrompt | None:
    """Return what the given cache was built from; forget it when the cache was emptied since."""
    cache = inputs.get(CACHE)
    prompt: CachedPrompt | None = getattr(cache, "vispruner_prompt", None)
    if cache is not None and prompt is not None and cached_length(inputs) == 0:
        cache.vispruner_prompt = prompt = None
    return prompt


def count_tokens(model: Any, modality: Modality, inputs: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Return per image the visual tokens of a full prompt and those that are kept; `model` is the base model."""
    encoded = (inputs.get(FEATURES) or {}).get(modality.name)
    if encoded is not None:
        return full_counts_of(encoded), kept_counts_of(encoded)
    if inputs.get(modality.pixels) is None:
        return [], []
    described = {name: inputs[name] for name in modality.described_by if inputs.get(name) is not None}
    return getattr(model, f"{modality.name}_token_counts")(inputs[modality.pixels], **described)


def find_placeholders(
    inputs: Mapping[str, Any], tokens: Sequence[int], embed: torch.nn.Module
) -> dict[int, torch.Tensor]:
    """Return per placeholder id where (B, S) the prompt has it; in embeddings, as stock does, by comparing them."""
    embeds = inputs.get("inputs_embeds")
    if embeds is None:
        return {token: inputs["input_ids"] == token for token in tokens}
    with torch.no_grad():
        made = embed(torch.tensor(list(tokens), device=embeds.device)).to(embeds.device)
    return {token: (embeds == one).all(-1) for token, one in zip(tokens, made, strict=True)}


def _wrong_mask(mask: Any, width: int, purpose: str) -> str:
    shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
    return f"attention_mask must be 2-D and as long as the prompt of {width} tokens {purpose}, got {shape}"


def _wrong_placeholders(modality: Modality, token: int, placeholders: int, full: list[int], kept: list[int]) -> str:
    found = f"the prompt has {placeholders} {modality.name} placeholders (id {token})"
    if not full:
        remedy = f"pass {modality.pixels}, or take <{modality.name}> out of the prompt"
        return f"{found} but there is no {modality.name}: {remedy}"
    return (
        f"{found}, but the {modality.name}s given take {sum(full)} in a full prompt or {sum(kept)} in a shortened "
        f"one: put one <{modality.name}> per {modality.name} into the prompt, use the processor of this repo and pass "
        "all that it returns"
    )
