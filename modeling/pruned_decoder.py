"""The base model's part of pruning within the language model: which stages a call has, and what cannot have any."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import QuantizedLayer

from .call_options import CallOptionsMixin
from .choosing import choose
from .configuration_vispruner import VisPrunerOptions
from .decoder_pruning import DecoderForward, PromptToPrune, make_decoder_prunable, stages_of
from .prompt_reading import Prompt, cached_length
from .prompt_shortening import KeptColumns, any_of, rows_of_images
from .pruning_plan import layer_counts, stage_counts
from .selectors import (
    DECODER_INPUTS,
    DecoderPlace,
    check_method_options,
    methods_by_place,
    selector_named,
)
from .stock_versions import CACHE

HERE = DecoderPlace(lambda depth: [])  # of a method for the encoder that `prune_layers` puts into the language model


class PrunedDecoderMixin(CallOptionsMixin):
    """For the base model. A method prunes behind the encoder, in the language model, or, as "a+b", in both."""

    position_axes = 1  # numbers that the position of a token has

    @property
    def first_prunable_layer(self) -> int:
        """The first decoder layer before which visual tokens may leave: layers below this one need all of them."""
        return 1

    @property
    def decoder(self) -> Any:
        """The stock text model."""
        return self.text_model if hasattr(self, "text_model") else self.language_model  # type: ignore[attr-defined]

    @property
    def depth(self) -> int:
        """How many layers the language model has."""
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def methods(self) -> tuple[str | None, str | None]:
        """The method that prunes behind the encoder and the one in the language model; None where there is none."""
        return methods_by_place(self.vispruner_options)

    @property
    def encoder_options(self) -> VisPrunerOptions:
        """The options of what prunes behind the encoder, as if there were no other."""
        options = self.vispruner_options
        encoder, decoder = self.methods
        if decoder is None:
            return options
        elsewhere: dict[str, Any] = {"keep_ratio": None, "stage_token_nums": None, "prune_layers": None}
        if encoder is None:
            return replace(options, method="none", visual_token_num=None, method_options=None, **elsewhere)
        return replace(options, method=encoder, visual_token_num=(options.stage_token_nums or [1])[0], **elsewhere)

    @property
    def prunes_in_decoder(self) -> bool:
        """Whether visual tokens leave in the language model."""
        return self.methods[1] is not None

    @property
    def decoder_place(self) -> DecoderPlace:
        """Where in the language model the method prunes, and by what."""
        return selector_named(self.methods[1]).place or HERE

    @property
    def wrong_in_decoder(self) -> dict[str, str]:
        """Options of generate that go wrong where visual tokens leave in the language model, and why."""
        reason = "the token that ranks is in the last chunk"
        return {"prefill_chunk_size": reason} if self.prunes_in_decoder else {}

    @property
    def decoder_layers(self) -> list[int]:
        """The decoder layers before which visual tokens leave."""
        if not self.prunes_in_decoder:
            return []
        return list(self.vispruner_options.prune_layers or self.decoder_place.layers(self.depth))

    def decoder_counts(self, tokens: int) -> Sequence[int]:
        """Return how many of an image's visual tokens are left from each of `decoder_layers` on.

        tokens  how many it has when the language model begins
        Raises ValueError for a budget that cannot be met.
        """
        options, layers = self.vispruner_options, self.decoder_layers
        if options.stage_token_nums is None:
            mean = float(options.visual_token_num) if options.visual_token_num else tokens * (options.keep_ratio or 1)
            return stage_counts(tokens, tuple(layers), self.depth, mean)
        counts = options.stage_token_nums[-len(layers) :]
        if counts[0] > tokens:
            raise ValueError(
                f"vispruner_config.stage_token_nums asks for {counts[0]} visual tokens of an image from decoder layer "
                f"{layers[0]} on, but only {tokens} are there: lower it"
            )
        return counts

    def layer_counts(self, tokens: int) -> list[int]:
        """Return how many of an image's `tokens` visual tokens each decoder layer holds."""
        layers = self.decoder_layers
        return layer_counts(tokens, layers, self.decoder_counts(tokens) if layers else [], self.depth)

    def stages_of_images(self, counts: Sequence[int]) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Return each stage in the language model: its first layer, and how many tokens it leaves of each image.

        counts  how many visual tokens each has when the language model begins
        """
        left = [self.decoder_counts(count) for count in counts] if self.prunes_in_decoder else []
        return tuple(zip(self.decoder_layers, zip(*left, strict=True), strict=False))

    def check_decoder_options(self) -> None:
        """Raise ValueError with the remedy when the language model cannot be pruned under the options of the call."""
        options = self.vispruner_options
        encoder, method = self.methods
        if len(options.methods) == 2:
            self._check_both(encoder, method)
        if method is None:
            if options.stage_token_nums is not None:
                raise ValueError(
                    "vispruner_config.stage_token_nums is for methods that prune in the language model: use "
                    "visual_token_num, or say at which layers by prune_layers"
                )
            return
        selector = selector_named(method)
        layers, first = self.decoder_layers, self.first_prunable_layer
        if not all(first <= layer < self.depth for layer in layers):
            raise ValueError(
                f"vispruner_config.prune_layers must be decoder layers from {first} to {self.depth - 1} of "
                f"{type(self).__name__}, got {layers}: visual tokens leave before each of them"
            )
        stages = len(layers) + (encoder is not None)
        if options.stage_token_nums is not None and len(options.stage_token_nums) != stages:
            raise ValueError(
                f"vispruner_config.stage_token_nums must have {stages} numbers, one for each stage of method "
                f'"{options.method}", got {options.stage_token_nums}'
            )
        if missing := sorted(selector.needs - DECODER_INPUTS):
            raise ValueError(
                f'vispruner_config.method "{method}" needs {", ".join(missing)}, which a decoder layer cannot give: '
                "take out prune_layers, or choose another method"
            )
        if self.decoder_place.positions == "renumber" and self.position_axes > 1:
            raise ValueError(
                f'vispruner_config.method "{method}" counts positions anew, which means nothing where tokens have '
                f"(time, height, width) positions, as in {type(self).__name__}: choose another method"
            )
        make_decoder_prunable(self.decoder)

    def _check_both(self, encoder: str | None, method: str | None) -> None:
        options = self.vispruner_options
        if selector_named(encoder).place is not None:
            raise ValueError(
                f'vispruner_config.method "{options.method}": the first method prunes behind the encoder, and '
                f'"{encoder}" prunes in the language model'
            )
        if selector_named(method).place is None and options.prune_layers is None:
            raise ValueError(
                f'vispruner_config.method "{options.method}": "{method}" prunes in the language model only where '
                "prune_layers says at which layers"
            )
        if options.stage_token_nums is None:
            raise ValueError(
                f'vispruner_config.method "{options.method}" has several stages: say how many visual tokens each '
                "leaves of an image, by stage_token_nums"
            )

    def check_method_options(self) -> None:
        """Raise ValueError for an option that none of the call's methods has."""
        given = self.vispruner_options.method_options or {}
        methods = [method for method in self.methods if method is not None]
        known = {name for method in methods for name in selector_named(method).options}
        check_method_options(methods[-1], {name: value for name, value in given.items() if name not in known})

    def open_decoder(
        self,
        inputs: Mapping[str, Any],
        prompt: Prompt | None = None,
        columns: KeptColumns | None = None,
        last: torch.Tensor | None = None,
    ) -> AbstractContextManager[DecoderForward | None]:
        """Return what a stock forward runs under whose layers see fewer columns.

        inputs   of that forward
        prompt   what was read of the caller's, where it has images; columns  which of it the inputs have, None for all
        last     (B,) the last column of the caller's prompt that is question, not answer; None for all
        """
        cache: Any = inputs.get(CACHE)
        prunes, stages = prompt is not None and self.prunes_in_decoder, stages_of(cache)
        if not prunes and not stages:  # without a look at the cache's length, which a static one has on the device
            return nullcontext()
        past = cached_length(inputs)
        if stages and not past:  # it was emptied since
            cache.vispruner_stages = stages = ()
        ids_or_embeds = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"]
        length = ids_or_embeds.shape[1]
        seen = _seen_by_last(inputs.get("attention_mask"), past + length)
        forward = DecoderForward(self.decoder, seen, past, length, stages=list(stages))
        if prunes:
            assert prompt is not None
            self._check_call(cache, past, length)
            forward.prompt = self._prompt_to_prune(prompt, columns, seen, last)
        return forward

    def _prompt_to_prune(
        self,
        prompt: Prompt,
        columns: KeptColumns | None,
        seen: torch.Tensor | None,
        last: torch.Tensor | None,
    ) -> PromptToPrune:
        written = prompt.full if prompt.form == "full" else prompt.kept
        of_row: list[list[int]] = [[] for _ in range(prompt.rows)]
        for token, images in written.items():
            rows = rows_of_images(prompt.layout.placeholders[token], images) if images else []
            for row, left in zip(rows, prompt.kept[token], strict=True):
                of_row[row].append(left)
        by_image = {count: self.decoder_counts(count) for count in {n for images in of_row for n in images}}
        counts = {
            layer: [sum(by_image[image][stage] for image in images) for images in of_row]
            for stage, layer in enumerate(self.decoder_layers)
        }
        visual = any_of(list(prompt.is_placeholder.values()))
        if columns is not None:
            visual = columns.take(visual.long(), 0).bool()
        if last is not None and columns is not None:
            last = _place_of(columns, last)
        _, method = self.methods
        chooser = partial(choose, self.vispruner_options, method=method)
        totals = [sum(images) for images in of_row]
        return PromptToPrune(visual, self._texts(prompt, seen), totals, counts, self.decoder_place, chooser, last)

    @staticmethod
    def _texts(prompt: Prompt, seen: torch.Tensor | None) -> list[int]:
        """Return of each row how many columns are neither padding nor visual tokens."""
        visual = [sum(row) for row in zip(*prompt.layout.placeholders.values(), strict=True)]
        inside = prompt.layout.seen
        if prompt.mask is None and seen is not None:  # a mask of another form, as for a static cache
            inside = seen.sum(1).tolist()
        return [columns - count for columns, count in zip(inside, visual, strict=True)]

    def _check_call(self, cache: Any, past: int, length: int) -> None:
        """Raise ValueError for what pruning within the language model would get wrong."""
        method = self.vispruner_options.method
        if past:
            raise ValueError(
                f'vispruner_config.method "{method}" cannot prune new images behind a cache: pass the whole '
                f"conversation without {CACHE}"
            )
        if any(isinstance(layer, QuantizedLayer) for layer in getattr(cache, "layers", ())):
            raise ValueError(
                f'vispruner_config.method "{method}" cannot prune with a quantized cache: use another cache, or a '
                "method that prunes behind the encoder"
            )
        text = self.config.get_text_config()
        window = getattr(text, "sliding_window", None)
        kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * self.depth
        slides = "sliding_attention" in kinds[max(0, self.decoder_layers[0] - 1) :]
        if window and slides and length > window:
            raise ValueError(
                f'vispruner_config.method "{method}" cannot prune a prompt of {length} tokens in layers that attend '
                f"over a sliding window of {window}: shorten it, or choose a method that prunes behind the encoder"
            )


def _seen_by_last(mask: Any, width: int) -> torch.Tensor | None:
    """Return which columns (B, width) are no padding, by a mask of any form; None where all are."""
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if not isinstance(mask, torch.Tensor):
        return None
    if mask.dim() == 2:
        return mask.bool()
    last = mask[:, 0, -1, :width]
    return last if last.dtype == torch.bool else last == 0


def _place_of(columns: KeptColumns, last: torch.Tensor) -> torch.Tensor:
    """Return the column (B,) of the shortened prompt that the column `last` (B,) of the full one became."""
    before = columns.index <= last.to(columns.index.device)[:, None]
    if columns.valid is not None:
        before = before & columns.valid
    return (before * torch.arange(1, columns.length + 1, device=before.device)).argmax(1)
