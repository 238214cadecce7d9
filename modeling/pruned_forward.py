"""The base model's `forward`: read the prompt, shorten it to the tokens that stay, run stock, spread the result.

A pruned model is the stock model whose images have fewer tokens. Outside it has stock's shapes: of a full prompt the
hidden states come back in its own length, zeros where a token was dropped.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .call_options import Pruning
from .clip_text import TextTower, checked_ids
from .configuration_vispruner import CLIP_INPUTS
from .decoder_pruning import DecoderForward, columns_of_stage
from .encoded_images import features_of
from .position_policies import Original, Renumbered
from .prompt_reading import (
    FEATURES,
    Prompt,
    Questions,
    cached_length,
    cached_prompt,
    count_tokens,
    find_placeholders,
    mask_in_cache,
)
from .prompt_shortening import CachedPrompt, Counts, KeptColumns, every_column, joined_counts, last_placeholders
from .pruned_decoder import PrunedDecoderMixin
from .selectors import selector_named
from .stock_versions import CACHE, CACHE_NAMES, TAKES_FEATURES, by_stock_name, merge_features, versions
from .visual_features import tokens_of


@dataclass
class HeadCall:
    """What the model's head hands down to the base model, to learn which columns of the prompt stayed.

    columns  None until the base model has run, and where nothing was dropped
    last     (B,) the column before the first label that counts, None without labels: where the question ends
    """

    columns: KeptColumns | None = None
    last: torch.Tensor | None = None


def forward_of(stock: type, *further: str) -> Callable[..., Any]:
    """Return the `forward` of a pruned model: what `stock`'s takes and gives, and the arguments of pruning.

    further  inputs that it takes where this version of `stock` does not
    """
    signature = inspect.signature(stock.forward)  # type: ignore[attr-defined]
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    keywords = [p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    new = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in (
            *further,
            FEATURES,
            "encoded_images",
            "vispruner_config",
            "prompt_lengths",
            "visual_importance",
            *CLIP_INPUTS,
        )
        if name not in signature.parameters
    ]
    places = [parameter.name for parameter in named[1:]]  # after self

    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        """Stock forward on the shortened prompt; what it returns has the length of the prompt that was given.

        encoded_images    made by `encode_images`, in place of pixel values
        vispruner_config  fields that differ in this call, such as {"visual_token_num": 64}
        prompt_lengths    (B,) columns that are question; those behind are an answer, by which no method may rank.
                          Without, what comes before the first label, or all
        visual_importance (B, N) how much each visual token of a row counts, for a method that ranks by that ("sgl")
        clip_input_ids, clip_attention_mask  (B, M, L) the question of each row for CLIP, as the repo's processor gives
        """
        if len(args) > len(places):
            raise TypeError(f"forward takes {len(places)} inputs by place, got {len(args)}: name the others")
        by_place = dict(zip(places[: len(args)], args, strict=True))
        if twice := [name for name in by_place if name in inputs]:
            raise TypeError(f"forward got {', '.join(twice)} twice, by place and by name")
        return self.pruned_forward(functools.partial(stock.forward, self), {**by_place, **inputs})  # type: ignore[attr-defined]

    # Not by functools.wraps: who unwraps it, as accelerate does, would come to the dense forward.
    forward.__signature__ = signature.replace(parameters=[*named, *new, *keywords])  # type: ignore[attr-defined]
    return forward


class PrunedForwardMixin(PrunedDecoderMixin):
    """For the base model. Modifications against stock's forward:

    * a prompt may carry the full or the kept number of placeholders per image; any other number raises ValueError
    * behind the cache of a full prompt, masks and positions go on counting from that prompt
    """

    image_names: tuple[str, ...] = ()  # all that stock has called the pixels of images, where it had several names
    dtype: torch.dtype
    default_position_policy = "renumber"
    wrong_in_stock: dict[str, str] = {}  # options of generate that it gets wrong where a prompt has images, and why
    training: bool

    def position_policy(self, name: str | None = None) -> Renumbered:
        """Return the policy of this name, else that of the call in progress."""
        name = name or self.vispruner_options.position_policy or self.default_position_policy
        return Original() if name == "original" else Renumbered()

    def pruned_forward(self, stock_forward: Callable, inputs: dict[str, Any]) -> Any:
        """Call `stock_forward` on a prompt as short as its images have tokens; `inputs` are forward's own."""
        inputs = {name: value for name, value in inputs.items() if value is not None}
        head: HeadCall | None = inputs.pop("vispruner_head", None)
        return_dict = inputs.pop("return_dict", None)
        last = inputs.pop("prompt_lengths", None)
        last = None if last is None else torch.as_tensor(last).reshape(-1) - 1
        importance = inputs.pop("visual_importance", None)
        clip_inputs = {name: inputs.pop(name) for name in CLIP_INPUTS if name in inputs}
        compiling = torch.compiler.is_compiling()
        if compiling and not self.prunes_in_decoder and not self.is_guided:
            # How many columns fall cannot be traced: stock checks that none need to.
            outputs = self._run_stock(stock_forward, self._compiled_inputs(inputs))
        else:
            run = torch.compiler.disable(self._prune_and_run) if compiling else self._prune_and_run
            call = HeadCall() if head is None else head
            call.last = call.last if last is None else last
            with self.call_with(inputs.pop("vispruner_config", None)) as options:
                options.importance = options.importance if importance is None else importance
                options.clip_inputs = clip_inputs or options.clip_inputs
                outputs = run(stock_forward, self.named_as_stock(inputs), call)
        if head is not None:  # which makes a tuple of its own output
            return outputs
        return outputs if (self.config.return_dict if return_dict is None else return_dict) else outputs.to_tuple()

    def _prune_and_run(self, stock_forward: Callable, inputs: dict[str, Any], head: HeadCall) -> Any:
        if not self._has_images(inputs):
            inputs = self._behind_cache(inputs)
            with self.open_decoder(inputs):
                return stock_forward(**inputs, return_dict=True)
        prompt = self.read_prompt(inputs)
        self.note_pruning(prompt)
        policy = self.position_policy()
        if head.last is not None and (self.prunes_in_decoder or (self.is_guided and prompt.drops_tokens)):
            prompt.require_question(head.last)
        if not self.is_in_generate:  # which has noted them
            self.note_questions(prompt, head.last)
        if prompt.form != "same":
            shortened, columns = self.shorten(prompt, policy.in_forward)
        else:
            shortened, columns = self._behind_cache(dict(inputs)), None
            if self.is_in_generate:
                shortened = _seen_as_one(shortened, prompt, policy, None)
        if self.is_told_by_encoder:
            shortened = self.encoded(shortened)
        width = shortened["input_ids" if "input_ids" in shortened else "inputs_embeds"].shape[1]
        with self.open_decoder(shortened, prompt, columns, self._last_of_question(head, prompt, width)) as decoder:
            outputs = self._run_stock(stock_forward, shortened)
        # Of which stock's SmolVLM hands out an empty cache.
        unwritten = self.training and getattr(self.decoder, "gradient_checkpointing", False)
        if (cache := outputs.get(CACHE)) is not None and not unwritten:
            _require_length(cache, prompt.past + width)
            for stage in decoder.stages if decoder is not None else ():
                _require_length(cache, stage.columns.shape[1], stage.layer)
            if not self.is_in_generate:  # which notes it itself
                cache.vispruner_prompt = self.cached(prompt, columns)
        if self.is_in_generate:
            return outputs
        if decoder is not None and decoder.stages:
            head.columns = columns_of_stage(decoder.stages[-1])
            outputs = _spread_stages(outputs, decoder)
        if columns is None or prompt.form != "full":
            return outputs
        head.columns = columns if head.columns is None else columns.of(head.columns)
        return _spread(outputs, columns, prompt.past)

    def _last_of_question(self, head: HeadCall, prompt: Prompt, width: int) -> torch.Tensor | None:
        """Return the last column (B,) of the prompt that is question; None where all is."""
        call = self.open_call
        if call is not None and call.prompt_length is not None:
            short = call.prompt_length
            return None if width == short else torch.full((prompt.rows,), short - 1, device=prompt.device)
        return head.last

    def named_as_stock(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return inputs under stock's names, images that were encoded as stock takes them."""
        given = self.renamed_as_stock(inputs)
        if (images := given.pop("encoded_images", None)) is not None:
            for name in (FEATURES, self.modalities[0].pixels):
                if given.pop(name, None) is not None:
                    raise ValueError(f"encoded_images stand in place of {name}: pass one of them")
            given[FEATURES] = images
        if given.get(FEATURES) is not None:
            given[FEATURES] = features_of(given[FEATURES], self.modalities[0].name, self.encoder_options.to_dict())
            if not TAKES_FEATURES and self._has_cached_prompt(given):  # stock's `generate` hands them to every step
                del given[FEATURES]
        return given

    def _has_cached_prompt(self, inputs: Mapping[str, Any]) -> bool:
        """True where `generate` has read its prompt and only what comes behind it is to be read."""
        call = self.open_call
        return call is not None and call.prompt_length is not None and cached_length(inputs) >= call.prompt_length

    def renamed_as_stock(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return inputs with what stock has had several names for under the one of this version."""
        given = by_stock_name(inputs, CACHE_NAMES, CACHE)
        return by_stock_name(given, self.image_names, self.modalities[0].pixels) if self.image_names else given

    def _compiled_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if inputs.pop("vispruner_config", None):
            raise ValueError("vispruner_config cannot be given per call in compiled code: use set_vispruner_config")
        inputs = self.named_as_stock(inputs)
        if self._has_images(inputs) and self.position_policy().keeps_original and "position_ids" not in inputs:
            raise ValueError(
                'vispruner_config.position_policy "original": a compiled prompt does not say which positions its '
                "visual tokens had; pass position_ids, or run it outside torch.compile"
            )
        return inputs

    def _has_pixels(self, inputs: Mapping[str, Any]) -> bool:
        return any(inputs.get(modality.pixels) is not None for modality in self.modalities)

    def _has_images(self, inputs: Mapping[str, Any]) -> bool:
        return bool(inputs.get(FEATURES)) or self._has_pixels(inputs)

    def read_prompt(self, inputs: Mapping[str, Any], **known: Any) -> Prompt:
        """Read the prompt of a call, whose inputs go by the names of stock.

        known  what is not to be taken from the inputs: full, kept, past, earlier
        """
        modalities = list(zip(self.modalities, self.placeholder_ids, strict=True))
        if "full" not in known:
            known["full"], known["kept"] = self.count_visual_tokens(inputs)
        if "past" not in known:
            known |= {"past": cached_length(inputs), "earlier": cached_prompt(inputs)}
        is_placeholder = find_placeholders(inputs, self.placeholder_ids, self.get_input_embeddings())
        return Prompt(inputs=inputs, modalities=modalities, is_placeholder=is_placeholder, **known)

    def count_visual_tokens(self, inputs: Mapping[str, Any]) -> tuple[Counts, Counts]:
        """Return per placeholder id and image the visual tokens of a full prompt, and those that are kept."""
        full, kept = {}, {}
        for modality, token in zip(self.modalities, self.placeholder_ids, strict=True):
            full[token], kept[token] = count_tokens(self, modality, inputs)
        return full, kept

    def note_pruning(self, prompt: Prompt) -> None:
        """Note what this prompt is, for `last_pruning` too, unless the call in progress has noted its own."""
        call = self.open_call
        if call is not None and call.pruning is None:
            full, kept = ([n for counts in of.values() for n in counts] for of in (prompt.full, prompt.kept))
            call.pruning = Pruning(tuple(full), tuple(kept), self.stages_of_images(kept))
            call.places = self.places_in_images(prompt)
            call.told = self.told_of_columns(prompt, call.importance)

    @property
    def is_guided(self) -> bool:
        """Whether which visual tokens stay behind the encoder depends on the question."""
        method = self.methods[0]
        return method is not None and selector_named(method).is_guided

    @property
    def compares_in_clip(self) -> bool:
        """Whether the question is compared with patches in CLIP's common space, by a text tower of the repo."""
        return self.is_guided and self.vispruner_options.text_tower is not None

    def require_text_tower(self) -> TextTower:
        """Return CLIP's text tower; ValueError where none was read."""
        raise AttributeError(f"{type(self).__name__} must say where its text tower is")

    def note_questions(self, prompt: Prompt, last: torch.Tensor | None = None) -> None:
        """Note what a prompt asks about its images, before they are encoded; where a method chooses by that.

        last  (B,) the last column of each row that is question, not answer; None for all
        """
        call = self.open_call
        if call is not None and self.is_guided and self._has_pixels(prompt.inputs):
            call.questions = self._questions_of(prompt, last, call.clip_inputs)

    def _questions_of(
        self, prompt: Prompt, last: torch.Tensor | None, clip_inputs: Mapping[str, Any]
    ) -> dict[str, Questions]:
        """Return what is asked about the images of each modality: read by CLIP, or as words of the language model."""
        if not self.compares_in_clip:
            return prompt.questions(self.get_input_embeddings(), last)
        if not prompt.drops_tokens:
            return {}
        ids, is_token = checked_ids(clip_inputs, prompt.rows)
        pixels = prompt.inputs[self.modalities[0].pixels]
        like = torch.empty(0, dtype=self.dtype, device=pixels.device)
        asked = self.require_text_tower().of_questions(ids, is_token, like)
        return prompt.questions_in(asked, torch.ones_like(asked[..., 0], dtype=torch.bool))

    def encode_prompt(self, **inputs: Any) -> dict[str, Any]:
        """Return the vision outputs of a prompt's images by modality, as `forward` has them: chosen for its question.

        inputs  what the processor returned
        """
        with self.call_with() as call:
            call.clip_inputs = {name: inputs.pop(name, None) for name in CLIP_INPUTS}
            given = self.named_as_stock(inputs)
            if self.is_guided:
                self.note_questions(self.read_prompt(given))
            return dict(self.encoded(given)[FEATURES])

    def shorten(
        self, prompt: Prompt, full_positions: Callable[[Prompt], torch.Tensor | None], cached: bool = False
    ) -> tuple[dict[str, Any], KeptColumns | None]:
        """Return the inputs of the shortened prompt, and which columns it has of the full one.

        full_positions  a policy's `in_forward` or `in_generate`
        cached          its images are in the cache already, so it does not matter which of their tokens stay
        Where tokens keep their positions, a short prompt is lengthened first: the full one alone tells them.
        """
        policy, given = self.position_policy(), prompt.inputs.get("position_ids")
        if prompt.form == "short":
            if given is not None or not policy.keeps_original:
                return _seen_as_one(dict(prompt.inputs), prompt, policy, given), None
            prompt = self._lengthened(prompt)
        positions = full_positions(prompt) if given is None else given
        if policy.keeps_original and not cached:
            prompt, staying = self._with_features(prompt)
        else:
            staying = last_placeholders(prompt.full, prompt.kept, prompt.device)
        columns = prompt.columns_of(staying)
        inputs = prompt.taken(columns, self.padding_id)
        if positions is not None:
            positions = positions.expand(*positions.shape[:-2], prompt.rows, -1)
            inputs["position_ids"] = policy.of_kept(columns, positions, inputs.get("attention_mask"))
        return _seen_as_one(inputs, prompt, policy, given), columns

    def _lengthened(self, prompt: Prompt) -> Prompt:
        """Return the full prompt that a short one stands for."""
        staying = last_placeholders(prompt.kept, prompt.full, prompt.device)
        columns = replace(prompt, full=prompt.kept).columns_of(staying)
        return self.read_prompt(
            prompt.taken(columns, self.padding_id),
            full=prompt.full,
            kept=prompt.kept,
            past=prompt.past,
            earlier=prompt.earlier,
        )

    def _with_features(self, prompt: Prompt) -> tuple[Prompt, dict[int, list[torch.Tensor]]]:
        """Return the prompt with features in place of pixels, and per image the placeholders that its tokens are."""
        inputs = self.encoded(prompt.inputs)
        features = inputs[FEATURES]
        staying = {
            token: features[modality.name].placeholders if modality.name in features else []
            for modality, token in prompt.modalities
        }
        return prompt.with_inputs(inputs), staying

    def encoded(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return inputs with features in place of pixels."""
        features, call = dict(inputs.get(FEATURES) or {}), self.open_call
        for modality in self.modalities:
            if (pixels := inputs.get(modality.pixels)) is not None:
                described = {name: inputs[name] for name in modality.described_by if name in inputs}
                encode = getattr(self, f"get_{modality.name}_features")
                if call is not None:
                    call.question = call.questions.get(modality.name)
                features[modality.name] = encode(pixels, **described, return_dict=True)
        pixels = {modality.pixels for modality in self.modalities}
        return {**{name: value for name, value in inputs.items() if name not in pixels}, FEATURES: features}

    def must_encode(self, inputs: Mapping[str, Any]) -> bool:
        """Say whether stock cannot encode the pixels in `inputs` itself.

        It takes either pixels or features, and reads no tuples, which it would get where the config asks for them.
        And it does not say what it is about to encode, so that a method could look up what is asked about that.
        """
        cannot = bool(inputs.get(FEATURES)) or not self.config.return_dict or self.is_guided
        return self._has_pixels(inputs) and cannot

    def put_features(self, inputs: dict[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
        """Return inputs of a stock forward that takes no features: here put into the embedded prompt."""
        tokens = {
            token: tokens_of(features[modality.name])
            for modality, token in zip(self.modalities, self.placeholder_ids, strict=True)
            if modality.name in features
        }
        return merge_features(inputs, tokens, self.get_input_embeddings())

    def _run_stock(self, stock_forward: Callable, inputs: dict[str, Any]) -> Any:
        if self.must_encode(inputs):
            inputs = self.encoded(inputs)
        if not TAKES_FEATURES and (features := inputs.pop(FEATURES, None)):
            inputs = self.put_features(inputs, features)
        return stock_forward(**inputs, return_dict=True)

    def _behind_cache(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return inputs of text behind a pruned prompt as the cache counts; callers count from the full prompt."""
        cached = None if self.is_in_generate else cached_prompt(inputs)
        if cached is None or cached.skipped == cached.dropped == 0:
            return inputs
        past, inputs = cached_length(inputs), dict(inputs)
        new = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"].shape[1]
        mask = inputs.get("attention_mask")
        if mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            if mask is not None and mask.shape[1] not in (past + new, past + cached.dropped + new):
                raise ValueError(
                    f"attention_mask has {mask.shape[1]} columns, but {past + cached.dropped + new} are right: the "
                    f"cache stands for {past + cached.dropped} tokens, of which it holds {past}, and {new} are new"
                )
            before = mask_in_cache(cached, past, None if mask is None else mask[:, : mask.shape[1] - new])
            if before is not None:
                behind = before.new_ones(len(before), new) if mask is None else mask[:, mask.shape[1] - new :]
                inputs["attention_mask"] = torch.cat([before, behind.to(before)], dim=1)
        policy = self.position_policy(cached.position_policy)
        positions = policy.after(cached, past, new, inputs.get("position_ids"))
        if positions is not None:
            inputs["position_ids"] = positions.to(self._device_of(inputs))
        return inputs

    @staticmethod
    def _device_of(inputs: Mapping[str, Any]) -> torch.device:
        return inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"].device

    def cached(self, prompt: Prompt, columns: KeptColumns | None) -> CachedPrompt:
        """Return what a cache was built from that holds this prompt, shortened to `columns`."""
        policy = self.position_policy().name
        skipped = 0 if columns is None else columns.dropped
        written = columns if prompt.form == "full" else None
        earlier = prompt.earlier
        if earlier is None:
            return CachedPrompt(prompt.full, prompt.kept, policy, skipped, written)
        if earlier.columns is not None or written is not None:
            before = earlier.columns or every_column(prompt.rows, prompt.past, prompt.device)
            now = written or every_column(prompt.rows, prompt.width, prompt.device)
            written = before.then(prompt.past - before.length, now)
        return CachedPrompt(
            joined_counts(earlier.full_counts, prompt.full),
            joined_counts(earlier.kept_counts, prompt.kept),
            policy,
            earlier.skipped + skipped,
            written,
        )

    @property
    def padding_id(self) -> int:
        """An id for padding that is added to a prompt; nothing attends to it."""
        text = self.config.get_text_config()  # the model's own config may name a default that is no token of it
        for config in (text, self.config):
            value = getattr(config, "pad_token_id", None)
            if isinstance(value, int) and 0 <= value < text.vocab_size and value not in self.placeholder_ids:
                return value
        return min({0, 1, 2} - set(self.placeholder_ids))


def _seen_as_one(
    inputs: dict[str, Any], prompt: Prompt, policy: Renumbered, given: torch.Tensor | None
) -> dict[str, Any]:
    """Add a mask where stock would take positions with gaps for samples that are packed into one row.

    given  the positions that the caller gave, if any
    Stock tells samples apart by positions that do not go on by one, where there is no mask and nothing cached.
    """
    positions = inputs.get("position_ids")
    if not policy.keeps_original or "attention_mask" in inputs or positions is None or positions.dim() != 2:
        return inputs
    if given is not None and (given.diff(dim=-1) <= 0).any():
        raise ValueError(
            'vispruner_config.position_policy "original" cannot keep apart samples that are packed into one row, as '
            'these position_ids say: use "renumber", or one sample a row'
        )
    shape = (prompt.rows, prompt.past + positions.shape[-1])
    return {**inputs, "attention_mask": torch.ones(shape, dtype=torch.long, device=prompt.device)}


def _require_length(cache: Any, expected: int, layer: int = 0) -> None:
    """Raise RuntimeError unless a layer caches the shortened prompt: pruning must never do nothing in silence."""
    length = cache.get_seq_length(layer)
    if isinstance(length, int) and length != expected:  # a static cache has it on the device, which nothing waits for
        raise RuntimeError(
            f"after this prompt the KV cache of layer {layer} must hold {expected} tokens, but it holds {length}: "
            f"pruning did not work with {versions()}. Install a tested version, and please report this"
        )


def _spread(outputs: Any, columns: KeptColumns, past: int) -> Any:
    """Give what has an entry per column the length of the full prompt, zeros where a token was dropped."""
    outputs.last_hidden_state = columns.spread(outputs.last_hidden_state)
    if (states := outputs.get("hidden_states")) is not None:  # of some layers only, where a call asks for these
        outputs.hidden_states = tuple(None if state is None else columns.spread(state) for state in states)
    if (attentions := outputs.get("attentions")) is not None:
        outputs.attentions = tuple(_spread_attention(layer, columns, past) for layer in attentions)
    return outputs


def _spread_attention(attention: torch.Tensor | None, columns: KeptColumns, past: int) -> torch.Tensor | None:
    """Bring (B, heads, W, past + W) to (B, heads, S, past + S)."""
    if attention is None:
        return None
    rows = columns.spread(attention, dim=2)
    return torch.cat([rows[..., :past], columns.spread(rows[..., past:], dim=3)], dim=-1)


def _spread_stages(outputs: Any, decoder: DecoderForward) -> Any:
    """Give what layers made of fewer columns the length of the prompt that the language model began with."""
    by_width = {stage.columns.shape[1]: columns_of_stage(stage) for stage in decoder.stages}

    def spread(state: torch.Tensor | None) -> torch.Tensor | None:
        columns = None if state is None else by_width.get(state.shape[1])
        return state if columns is None or state is None else columns.spread(state)

    outputs.last_hidden_state = spread(outputs.last_hidden_state)
    if (states := outputs.get("hidden_states")) is not None:
        outputs.hidden_states = tuple(spread(state) for state in states)
    if (attentions := outputs.get("attentions")) is not None:
        outputs.attentions = tuple(
            layer
            if layer is None or layer.shape[2] not in by_width
            else _spread_attention(layer, by_width[layer.shape[2]], 0)
            for layer in attentions
        )
    return outputs
