"""The base model's part of pruning within the language model: which stages a call has, and what cannot have any."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from transformers.cache_utils import QuantizedLayer

from .call_options import CallOptionsMixin
from .choosing import choose
from .configuration_vispruner import VisPrunerOptions
from .decoder_pruning import DecoderForward, PromptToPrune, make_decoder_prunable, stages_of
from .prompt_reading import FEATURES, IMAGES, Modality, Prompt, cached_length, find_placeholders
from .prompt_shortening import Flags, KeptColumns, any_of, rows_of_images
from .pruning_plan import layer_counts, most_before, stage_counts, whole_counts
from .selector_inputs import checked_share
from .selectors import (
    DECODER_INPUTS,
    DecoderPlace,
    Then,
    check_method_options,
    methods_by_place,
    selector_named,
)
from .similarity import refuse_unless
from .stock_versions import CACHE

HERE = DecoderPlace(lambda depth: [])  # of a method for the encoder that `prune_layers` puts into the language model


class PrunedDecoderMixin(CallOptionsMixin):
    """For the base model. A method prunes behind the encoder, in the language model, or, as "a+b", in both."""

    position_axes = 1  # numbers that the position of a token has
    images_are_grids = True  # whether the tokens of an image, all of them, are a grid in raster order and nothing else
    modalities: tuple[Modality, ...] = (IMAGES,)
    get_input_embeddings: Callable[[], Any]

    @property
    def placeholder_ids(self) -> list[int]:
        return [getattr(self.config, modality.placeholder) for modality in self.modalities]

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
        if options.stage_token_nums is not None:
            return replace(options, method=encoder, visual_token_num=options.stage_token_nums[0], **elsewhere)
        count, ratio = options.visual_token_num, options.keep_ratio
        if count is not None:
            count = most_before(tuple(self.decoder_layers), self._left, self.depth, count)
        if ratio is not None:
            elsewhere["keep_ratio"] = min(1.0, ratio / self._mean_of_what_the_encoder_leaves)
        return replace(options, method=encoder, visual_token_num=count, **elsewhere)

    @property
    def _then(self) -> Then | None:
        """Where the method for the encoder goes on by itself; None also where `method` names what follows."""
        (first, *second) = self.vispruner_options.methods
        return None if second or first == "none" else selector_named(first).then

    @property
    def _mean_of_what_the_encoder_leaves(self) -> float:
        """What part of the tokens behind the encoder a decoder layer holds on average, where a method goes on."""
        layers, left = self.decoder_layers, [1.0, *self._left]
        return sum(left[sum(layer >= first for first in layers)] for layer in range(self.depth)) / self.depth

    @property
    def _left(self) -> tuple[float, ...]:
        """What part of the tokens behind the encoder is left from each of `decoder_layers` on, likewise."""
        return tuple(accumulate(self._shares, mul))

    @property
    def _shares(self) -> list[float]:
        """What part of the tokens before it each stage leaves, where the method for the encoder goes on by itself."""
        then, layers = self._then, self.decoder_layers
        assert then is not None
        if not isinstance(then.share, str):
            return [then.share] * len(layers)
        options = self.vispruner_options
        given = (options.method_options or {}).get(then.share)
        shares = selector_named(options.method).options[then.share][: len(layers)] if given is None else given
        if not isinstance(shares, list | tuple) or len(shares) != len(layers):
            raise ValueError(
                f"vispruner_config.method_options.{then.share} must be {len(layers)} numbers from 0 to 1, what part "
                f"of the tokens before it each of the decoder layers {layers} leaves, got {shares!r}"
            )
        return [checked_share(then.share, share) for share in shares]

    @property
    def is_told_by_encoder(self) -> bool:
        """Whether tokens leave in the language model by the saliency that the encoder found of them."""
        then = self._then
        return then is not None and then.ranking == "told" and self.vispruner_options.keep_ratio != 1

    @property
    def prunes_in_decoder(self) -> bool:
        """Whether visual tokens leave in the language model."""
        return self.methods[1] is not None

    @property
    def decoder_place(self) -> DecoderPlace:
        """Where in the language model the method prunes, and by what."""
        place = selector_named(self.methods[1]).place or HERE
        return place._replace(ranking="told") if self.is_told_by_encoder else place

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
        own = self._then or self.decoder_place
        return list(self.vispruner_options.prune_layers or own.layers(self.depth))

    def decoder_counts(self, tokens: int) -> Sequence[int]:
        """Return how many of an image's visual tokens are left from each of `decoder_layers` on.

        tokens  how many it has when the language model begins
        Raises ValueError for a budget that cannot be met.
        """
        options, layers, then = self.vispruner_options, self.decoder_layers, self._then
        if options.stage_token_nums is None:
            mean = float(options.visual_token_num) if options.visual_token_num else tokens * (options.keep_ratio or 1)
            if then is None or self._encoder_leaves_all(tokens):
                return stage_counts(tokens, tuple(layers), self.depth, mean)
            if (begin := self.encoder_options.visual_token_num) is None:
                return whole_counts(tokens, self._left)
            # An image of several tiles leaves what each of them would, in whole tokens.
            return [max(int(count > 0), tokens * count // begin) for count in whole_counts(begin, self._left)]
        counts = options.stage_token_nums[-len(layers) :]
        if counts[0] > tokens:
            raise ValueError(
                f"vispruner_config.stage_token_nums asks for {counts[0]} visual tokens of an image from decoder layer "
                f"{layers[0]} on, but only {tokens} are there: lower it"
            )
        return counts

    def _encoder_leaves_all(self, tokens: int) -> bool:
        """Whether the budget is more than what is left when all `tokens` of an image go on as the method does."""
        options = self.encoder_options
        return options.keep_ratio == 1 if options.keep_ratio else tokens < (options.visual_token_num or 0)

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
        if self._then is not None:
            _ = self._shares  # which says what is wrong with them
        stages = len(layers) + (encoder is not None)
        if options.stage_token_nums is not None and len(options.stage_token_nums) != stages:
            raise ValueError(
                f"vispruner_config.stage_token_nums must have {stages} numbers, one for each stage of method "
                f'"{options.method}", got {options.stage_token_nums}'
            )
        can_give = DECODER_INPUTS - (set() if self.images_are_grids and encoder is None else {"places"})
        if missing := sorted(selector.needs - can_give):
            raise ValueError(
                f'vispruner_config.method "{method}" needs {", ".join(missing)}, which a decoder layer of '
                f"{type(self).__name__} cannot give: take out prune_layers, or choose another method"
            )
        if self.decoder_place.positions == "renumber" and self.position_axes > 1:
            raise ValueError(
                f'vispruner_config.method "{method}" counts positions anew, which means nothing where tokens have '
                f"(time, height, width) positions, as in {type(self).__name__}: choose another method"
            )
        make_decoder_prunable(self.decoder)

    def _check_both(self, encoder: str | None, method: str | None) -> None:
        options = self.vispruner_options
        if selector_named(encoder).in_decoder:
            raise ValueError(
                f'vispruner_config.method "{options.method}": the first method prunes behind the encoder alone, and '
                f'"{encoder}" prunes in the language model: put one for the encoder there, as in "vispruner+{encoder}"'
            )
        if selector_named(method).place is None and options.prune_layers is None:
            raise ValueError(
                f'vispruner_config.method "{options.method}": "{method}" prunes in the language model only where '
                "prune_layers says at which layers"
            )
        if selector_named(method).is_told:
            raise ValueError(
                f'vispruner_config.method "{options.method}": "{method}" ranks all tokens of an image: use it alone'
            )
        if options.stage_token_nums is None:
            raise ValueError(
                f'vispruner_config.method "{options.method}" has several stages: say how many visual tokens each '
                "leaves of an image, by stage_token_nums"
            )

    def check_method_options(self) -> None:
        """Raise ValueError for an option that none of the call's methods has, or a value it cannot have."""
        methods = [method for method in self.methods if method is not None]
        for name, value in (self.vispruner_options.method_options or {}).items():
            having = [method for method in methods if name in selector_named(method).options]
            for method in having or methods[-1:]:
                check_method_options(method, {name: value})

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
            forward.prompt = self._prompt_to_prune(inputs, prompt, columns, seen, last)
        return forward

    def _prompt_to_prune(
        self,
        inputs: Mapping[str, Any],
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
        flags = prompt.is_placeholder
        if columns is not None:
            flags = find_placeholders(inputs, self.placeholder_ids, self.get_input_embeddings())
        visual = any_of(list(flags.values()))
        if last is not None and columns is not None:
            # Columns are those of a full prompt; where the caller wrote it short, only padding has come or gone.
            moved = visual.shape[1] - prompt.width if prompt.layout.padded_left else 0
            last = _place_of(columns, last) if prompt.form == "full" else last + moved
        _, method = self.methods
        chooser = partial(choose, self.vispruner_options, method=method)
        totals = [sum(images) for images in of_row]
        call = self.open_call
        said = (None, None) if call is None else (call.places, call.told)
        places, told = (None if one is None else _of_every_beam(one, prompt.rows) for one in said)
        if self.is_told_by_encoder:
            told = self._told_by_encoder(flags, inputs[FEATURES])
        texts = self._texts(prompt, seen)
        return PromptToPrune(visual, texts, totals, counts, self.decoder_place, chooser, last, places, told)

    def _told_by_encoder(self, flags: Flags, features: Mapping[str, Any]) -> torch.Tensor:
        """Return by what visual tokens are ranked in the language model, in their columns (B, W).

        flags     per placeholder id (B, W) where the prompt has it
        features  what the encoder made of its images
        """
        told = torch.zeros(next(iter(flags.values())).shape)
        for modality, token in zip(self.modalities, self.placeholder_ids, strict=True):
            if (of_images := features.get(modality.name)) is None:
                continue
            if (values := getattr(of_images, "told", None)) is None:
                raise ValueError(
                    f'vispruner_config.method "{self.vispruner_options.method}" ranks by what the encoder says of '
                    f"tokens, which these {modality.name} features do not tell: pass {modality.pixels}, or what "
                    "encode_images returns"
                )
            told = told.to(flags[token].device)
            told = told.masked_scatter(flags[token], torch.cat(list(values)).to(told))
        return told

    def told_of_columns(self, prompt: Prompt, importance: Any) -> torch.Tensor | None:
        """Return what a call says of the visual tokens of its prompt, in their columns (B, S); None where none asks.

        Raises ValueError where a method asks and the call says nothing, or says it of other tokens; or none asks.
        """
        method = self.vispruner_options.method
        asks = self.prunes_in_decoder and selector_named(self.methods[1]).is_told
        if importance is None and asks:
            raise ValueError(
                f'vispruner_config.method "{method}" ranks by what another model found: pass visual_importance, which '
                "vispruner.visual_importance makes of that model's attentions"
            )
        if importance is None:
            return None
        if not asks:
            raise ValueError(f'visual_importance says nothing to vispruner_config.method "{method}": take it out')
        importance = torch.as_tensor(importance, device=prompt.device).float()
        visual = any_of(list(prompt.is_placeholder.values()))
        number = visual.long().cumsum(1)
        most = int(number[:, -1].max())
        if importance.shape != (prompt.rows, most):
            raise ValueError(
                f"visual_importance must be ({prompt.rows}, {most}), a number for each visual token of each row of "
                f"the prompt, got {tuple(importance.shape)}"
            )
        refuse_unless((importance == importance).all(), "visual_importance holds NaN: what made it is not finite")
        return importance.gather(1, (number - 1).clamp(min=0)) * visual

    def token_grids(self, prompt: Prompt) -> dict[int, list[tuple[int, int]]]:
        """Return per placeholder id the rows and columns that the tokens of each image are: here squares."""
        counts = {count for images in prompt.full.values() for count in images}
        if odd := sorted(count for count in counts if math.isqrt(count) ** 2 != count):
            raise ValueError(
                f'vispruner_config.method "{self.vispruner_options.method}" needs the places of visual tokens, and '
                f"{odd[0]} are no square: choose another method"
            )
        return {token: [(math.isqrt(n), math.isqrt(n)) for n in images] for token, images in prompt.full.items()}

    def places_in_images(self, prompt: Prompt) -> torch.Tensor | None:
        """Return where (B, S, 3) the visual tokens of a prompt lie in their images; None where no method asks."""
        method = self.methods[1]
        if method is None or "places" not in selector_named(method).needs:
            return None
        places, number = torch.zeros(prompt.rows, prompt.width, 3, device=prompt.device), 0
        for token, grids in self.token_grids(prompt).items():
            if not grids:
                continue
            of_images = torch.cat([_places_in_grid(number + image, *grid) for image, grid in enumerate(grids)])
            places = places.masked_scatter(prompt.is_placeholder[token][..., None], of_images.to(prompt.device))
            number += len(grids)
        return places

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


def _of_every_beam(values: torch.Tensor, rows: int) -> torch.Tensor:
    """Bring what a call says of its rows (B, ...) to the rows that stock makes of each, one after the other."""
    return values.repeat_interleave(rows // len(values), dim=0)


def _places_in_grid(number: int, rows: int, columns: int) -> torch.Tensor:
    """Return of each token of an image its number, and how far down and across from the centre: (N, 3)."""
    diagonal = math.hypot(rows - 1, columns - 1) or 1.0
    down, across = ((torch.arange(count) - (count - 1) / 2) / diagonal for count in (rows, columns))
    grid = torch.cartesian_prod(down, across)
    return torch.cat([torch.full((len(grid), 1), float(number)), grid], dim=1)


def _place_of(columns: KeptColumns, last: torch.Tensor) -> torch.Tensor:
    """Return the column (B,) of the shortened prompt that the column `last` (B,) of the full one became."""
    before = columns.index <= last.to(columns.index.device)[:, None]
    if columns.valid is not None:
        before = before & columns.valid
    return (before * torch.arange(1, columns.length + 1, device=before.device)).argmax(1)
