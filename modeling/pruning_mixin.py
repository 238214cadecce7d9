"""Shorten prompts to the visual tokens that stay, around stock `forward` and `generate`.

A pruned model is the stock model whose images have fewer tokens: here the placeholders of a prompt are brought down to
the number of features that the model's `get_image_features` (`get_video_features`) returns. Knows transformers, knows
no method.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import GenerationMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import ModelOutput, logging
from transformers.utils.import_utils import torch_compilable_check

from .configuration_vispruner import merge_vispruner_config
from .encoded_images import EncodedImages
from .engine_interface import EngineModelMixin
from .pretrained_mixin import PretrainedMixin
from .prompt_shortening import (
    CachedPrompt,
    Counts,
    FullPromptHook,
    FullPromptStreamer,
    PromptLayout,
    ShortenedPrompt,
    any_of,
    holds_unbroken_images,
    read_layout,
    rows_of_images,
    see_full_prompt,
    shorten_prompt,
    with_full_prompt,
)
from .pruned_encoder import PrunedImageFeatures
from .stock_versions import CACHE, CACHE_NAMES, SLICES_FEATURES, TAKES_FEATURES, by_stock_name, versions

# Under the logger of transformers, so that `transformers serve --log-level` counts.
logger = logging.get_logger(f"transformers.{__name__}")

# Arguments of generate for which None says "not given"; for any other, such as top_k, it is a value. Those of the
# modalities come on top.
MODEL_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    *CACHE_NAMES,
    "mm_encoder_outputs",
    "encoded_images",
    "streamer",
)
# What has an entry per token of the prompt, and the entry that padding gets.
PER_TOKEN = {"labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0}


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


def forward_of(stock: type, *further: str) -> Callable[..., Any]:
    """Return the `forward` of a pruned model: it takes and gives what `stock`'s does, and takes `encoded_images`.

    further  inputs that it takes where this version of `stock` does not
    """
    signature = inspect.signature(stock.forward)  # type: ignore[attr-defined]
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    keywords = [p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    new = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in (*further, "mm_encoder_outputs", "encoded_images")
        if name not in signature.parameters
    ]
    places = [parameter.name for parameter in named[1:]]  # after self

    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        """Stock forward on the shortened prompt; the logits have its length W <= S. Loss is over its `labels`."""
        if len(args) > len(places):
            raise TypeError(f"forward takes {len(places)} inputs by place, got {len(args)}: name the others")
        by_place = dict(zip(places[: len(args)], args, strict=True))
        if twice := [name for name in by_place if name in inputs]:
            raise TypeError(f"forward got {', '.join(twice)} twice, by place and by name")
        return self.pruned_forward(functools.partial(stock.forward, self), {**by_place, **inputs})  # type: ignore[attr-defined]

    # Not by functools.wraps: who unwraps it, as accelerate does, would come to the dense forward.
    forward.__signature__ = signature.replace(parameters=[*named, *new, *keywords])  # type: ignore[attr-defined]
    return forward


class VisPrunerMixin(PretrainedMixin, EngineModelMixin, GenerationMixin):
    """For the ForConditionalGeneration class: full prompts in, stock `forward` and `generate` on shortened ones.

    Modifications against stock:
    * a prompt may carry the full or the kept number of placeholders per image; any other number raises ValueError
    * `generate` returns the caller's own prompt followed by the new tokens, and counts lengths from that prompt
    * both take `encoded_images`, made by `encode_images`, in place of pixel values
    """

    modalities: tuple[Modality, ...] = (IMAGES,)
    renamed_inputs: dict[str, str] = {}  # names that processors still use, and what stock forward calls them
    default_position_policy = "renumber"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Enter the class where `transformers serve` and pipelines look up what a class takes: by its name alone."""
        super().__init_subclass__(**kwargs)
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[cls.__name__] = cls.__name__

    def set_vispruner_config(self, **changes: Any) -> None:
        """Change fields of `vispruner_config`, e.g. visual_token_num=64; takes effect at the next call."""
        before = self.config.vispruner_config
        self.config.vispruner_config = merge_vispruner_config(before, changes)
        try:
            self.model.prepare_pruning()
            if "codebook" in changes:
                self.model.load_codebook(self.name_or_path)
        except (ValueError, OSError):
            self.config.vispruner_config = before
            raise

    def visual_token_counts(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, **arguments: Any
    ) -> tuple[list[int], list[int]]:
        """Return per image the visual tokens of a full prompt and those that are kept.

        image_sizes, arguments  what the processor returned beside pixel_values to describe the images
        """
        sizes = {} if image_sizes is None else {"image_sizes": image_sizes}
        return self.model.image_token_counts(pixel_values, **sizes, **arguments)

    @torch.no_grad()
    def encode_images(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, **arguments: Any
    ) -> EncodedImages:
        """Encode, select and project images once, without gradients, for any number of questions about them.

        image_sizes, arguments  what the processor returned beside pixel_values to describe the images
        The result goes to `generate` or `forward` as `encoded_images`, beside the processor's other tensors. Prompts
        are written as ever; one that carries `encoded_images.kept_counts` placeholders needs no image processor.
        """
        sizes = {} if image_sizes is None else {"image_sizes": image_sizes}
        features = self.model.get_image_features(pixel_values, **sizes, **arguments, return_dict=True)
        return EncodedImages.from_features(features, self.config.vispruner_config)

    def pruned_forward(self, stock_forward: Callable, inputs: dict[str, Any]) -> Any:
        """Call `stock_forward(**inputs)` on a prompt as short as its image features; `inputs` are forward's own."""
        inputs = {name: value for name, value in inputs.items() if value is not None}
        inputs = by_stock_name(inputs, CACHE_NAMES, CACHE)
        self._use_encoded_images(inputs)
        encoded = bool(inputs.get("mm_encoder_outputs"))
        if self._is_stock(inputs):
            return self._run_stock(stock_forward, inputs)
        pixels = self._has_pixels(inputs)
        if torch.compiler.is_compiling() or "input_ids" not in inputs:
            if pixels or encoded:
                self._require_known_positions(inputs)
            return self._run_stock(stock_forward, inputs)  # its check enforces the short prompt required here
        if not pixels and not encoded:
            self._check_text_only(inputs)
            return stock_forward(**inputs)
        full, kept = self._count_visual_tokens(inputs)
        earlier = _cached_prompt(inputs)
        prompt = None
        if full != kept:  # else nothing can be shortened, and the stock check finds a wrong number of placeholders
            layout = self._read_layout(inputs)
            is_full = self._is_full_prompt(inputs["input_ids"], layout, full, kept)
            if not is_full and self._keeps_original_positions and "position_ids" not in inputs:
                layout, is_full = self._lengthen(inputs, layout, full, kept), True
            if is_full:
                prompt = self._shorten_for_forward(inputs, layout, full, kept)
        if self._keeps_original_positions and "position_ids" in inputs and "attention_mask" not in inputs:
            self._mask_everything_seen(inputs)
        expected = _cached_length(inputs) + inputs["input_ids"].shape[1]
        outputs = self._run_stock(stock_forward, inputs)
        if (cache := getattr(outputs, CACHE, None)) is not None:
            _require_length(cache, expected)
            cache.vispruner_prompt = self._remember(full, kept, prompt).after(earlier)
        return outputs

    def _use_encoded_images(self, inputs: dict[str, Any]) -> None:
        """Replace `encoded_images` by the name that stock has for features."""
        if "encoded_images" not in inputs:
            return
        images = inputs.pop("encoded_images")
        modality = self.modalities[0]
        for name in (modality.pixels, "mm_encoder_outputs"):
            if inputs.pop(name, None) is not None:
                raise ValueError(f"encoded_images stand in place of {name}: pass one of them")
        if not hasattr(images, "to_features"):
            raise TypeError(f"encoded_images must be what encode_images returns, got {type(images).__name__}")
        images.require_made_with(self.config.vispruner_config)
        if len(images) == 0:  # a prompt of text alone
            return
        inputs["mm_encoder_outputs"] = {modality.name: images.to_features()}

    def _has_pixels(self, inputs: dict[str, Any]) -> bool:
        return any(inputs.get(modality.pixels) is not None for modality in self.modalities)

    @property
    def _placeholder_ids(self) -> list[int]:
        return [getattr(self.config, modality.placeholder) for modality in self.modalities]

    def _run_stock(self, stock_forward: Callable, inputs: dict[str, Any]) -> Any:
        if inputs.get("mm_encoder_outputs") and self._has_pixels(inputs):  # stock takes one or the other
            self._encode_here(inputs)
        if not TAKES_FEATURES and (encoded := inputs.pop("mm_encoder_outputs", None)):
            self._merge_features(inputs, encoded)
        return stock_forward(**inputs)

    def _is_stock(self, inputs: dict[str, Any]) -> bool:
        """True for the dense model, unless it is handed the cache of a pruned prompt."""
        return self.model.vispruner_options.method == "none" and _cached_prompt(inputs) is None

    def _shorten_for_forward(
        self, inputs: dict[str, Any], layout: PromptLayout, full: Counts, kept: Counts
    ) -> ShortenedPrompt:
        if isinstance(inputs.get("logits_to_keep"), torch.Tensor):
            raise ValueError("logits_to_keep must be an integer for a full prompt: logits are shorter than its ids")
        if not self._keeps_original_positions:
            staying = _leading_placeholders(full, kept, inputs["input_ids"].device)
            return self._shorten(inputs, layout, full, staying)
        if "position_ids" not in inputs:
            self._require_contiguous_cache(inputs)
            inputs["position_ids"] = self._positions_in_forward(inputs)
        return self._shorten(inputs, layout, full, self._encode_here(inputs))

    def _positions_in_forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the positions that stock `forward` gives the tokens of a full prompt, (..., B, S)."""
        ids = inputs["input_ids"]
        return (_cached_length(inputs) + torch.arange(ids.shape[1], device=ids.device)).expand_as(ids)

    def _positions_in_generate(self, arguments: dict[str, Any]) -> torch.Tensor:
        """Return the positions that stock `generate` gives the tokens of a full prompt, (..., B, S)."""
        mask = arguments.get("attention_mask", torch.ones_like(arguments["input_ids"]))
        return (mask.long().cumsum(-1) - 1).clamp(min=0)

    def _positions_after(self, prompt: ShortenedPrompt, positions: torch.Tensor) -> torch.Tensor:
        """Return the positions (..., B, W) of a shortened prompt, given those (..., B, S) of the full one."""
        shift = 0 if self._keeps_original_positions else prompt.shift.to(positions.device)
        return prompt.take(positions, 0) + shift

    def _lengthen(self, inputs: dict[str, Any], layout: PromptLayout, full: Counts, kept: Counts) -> PromptLayout:
        """Turn a short prompt into the full one that it stands for, which alone tells the positions of its tokens."""
        staying = _leading_placeholders(kept, full, inputs["input_ids"].device)
        self._shorten(inputs, layout, kept, staying)
        return self._read_layout(inputs)

    def _remember(self, full: Counts, kept: Counts, prompt: ShortenedPrompt | None) -> CachedPrompt:
        return CachedPrompt(
            full_counts=full,
            kept_counts=kept,
            dropped=0 if prompt is None else prompt.dropped,
            uniform=prompt is None or prompt.valid is None,
            position_policy=self._position_policy,
        )

    @property
    def _position_policy(self) -> str:
        return self.model.vispruner_options.position_policy or self.default_position_policy

    @property
    def _keeps_original_positions(self) -> bool:
        return self._position_policy == "original"

    def _merge_features(self, inputs: dict[str, Any], encoded: dict[str, Any]) -> None:
        """Put features into the embedded prompt, for a stock `forward` that does not take them."""
        input_ids = inputs.pop("input_ids", None)
        embed = self.get_input_embeddings()
        embeds = inputs["inputs_embeds"] if input_ids is None else embed(input_ids)
        for modality, token in zip(self.modalities, self._placeholder_ids, strict=True):
            if (features := encoded.get(modality.name)) is None:
                continue
            tokens = torch.cat(list(features.pooler_output)).to(embeds.device, embeds.dtype)
            if input_ids is None:
                mask = (embeds == embed(torch.tensor(token, device=embeds.device))).all(-1)
            else:
                mask = input_ids == token
            torch_compilable_check(
                mask.sum() == len(tokens),
                lambda: f"the prompt has {mask.sum()} {modality.name} placeholders for {len(tokens)} visual tokens",  # noqa: B023
            )
            embeds = embeds.masked_scatter(mask[..., None].to(embeds.device), tokens)
        inputs["inputs_embeds"] = embeds

    @staticmethod
    def _mask_everything_seen(inputs: dict[str, Any]) -> None:
        """Without a 2-D mask and a cache, stock takes position ids with gaps for several packed sequences."""
        batch, width = inputs["input_ids"].shape
        inputs["attention_mask"] = inputs["input_ids"].new_ones(batch, _cached_length(inputs) + width)

    def _check_text_only(self, inputs: dict[str, Any]) -> None:
        """Refuse what stock would get wrong: placeholders without an image, full-length masks on a shortened cache."""
        cache, input_ids = inputs.get(CACHE), inputs["input_ids"]
        if cache is None:  # generate, which always brings a cache, has checked its whole prompt
            nothing: Counts = {token: [] for token in self._placeholder_ids}
            self._is_full_prompt(input_ids, read_layout(input_ids, self._placeholder_ids), nothing, nothing)
        prompt: CachedPrompt | None = getattr(cache, "vispruner_prompt", None)
        if prompt is None or prompt.dropped == 0:
            return
        if (mask := inputs.get("attention_mask")) is not None and mask.dim() == 2:
            past = _cached_length(inputs)
            if past and mask.shape[1] != past + input_ids.shape[1]:
                raise ValueError(
                    f"attention_mask has {mask.shape[1]} columns, but the cache holds {past} tokens of a pruned "
                    f"prompt and {input_ids.shape[1]} are new: leave out the columns of the {prompt.dropped} dropped "
                    "tokens"
                )
        if "position_ids" not in inputs:
            self._require_contiguous_cache(inputs)

    def _require_contiguous_cache(self, inputs: dict[str, Any]) -> None:
        """With original positions the next one cannot be told from the length of a cache that lost tokens."""
        prompt = _cached_prompt(inputs)
        if self._keeps_original_positions and prompt is not None and prompt.dropped != 0:
            raise ValueError('vispruner_config.position_policy "original": pass position_ids to continue from a cache')

    def _count_visual_tokens(self, inputs: dict[str, Any]) -> tuple[Counts, Counts]:
        """Return per placeholder id and image the visual tokens of a full prompt and those that are kept."""
        full, kept = {}, {}
        for modality, token in zip(self.modalities, self._placeholder_ids, strict=True):
            full[token], kept[token] = self._count_tokens_of(modality, inputs)
        return full, kept

    def _count_tokens_of(self, modality: Modality, inputs: dict[str, Any]) -> tuple[list[int], list[int]]:
        encoded = (inputs.get("mm_encoder_outputs") or {}).get(modality.name)
        if encoded is not None:
            kept = [len(feature) for feature in encoded.pooler_output]
            full = getattr(encoded, "full_counts", None)
            return (list(full) if full is not None and len(full) == len(kept) else kept), kept
        if inputs.get(modality.pixels) is None:
            return [], []
        described = {name: inputs[name] for name in modality.described_by if inputs.get(name) is not None}
        return getattr(self.model, f"{modality.name}_token_counts")(inputs[modality.pixels], **described)

    def _read_layout(self, inputs: dict[str, Any]) -> PromptLayout:
        input_ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if mask is not None and mask.shape != input_ids.shape:  # no mask that a full prompt could have
            mask = None
        return read_layout(input_ids, self._placeholder_ids, mask)

    def _is_full_prompt(self, input_ids: torch.Tensor, layout: PromptLayout, full: Counts, kept: Counts) -> bool:
        """True for the full number of placeholders, False for the kept number; any other raises ValueError."""
        found_full = {}
        for modality, token in zip(self.modalities, self._placeholder_ids, strict=True):
            placeholders, whole, short = sum(layout.placeholders[token]), sum(full[token]), sum(kept[token])
            if placeholders == whole == short:  # by chance, with several images in the paper's tile mode
                if full[token] != kept[token]:
                    found_full[modality.name] = holds_unbroken_images(input_ids, token, full[token])
            elif placeholders in (whole, short):
                found_full[modality.name] = placeholders == whole
            else:
                raise ValueError(_wrong_placeholders(modality, token, placeholders, full[token], kept[token]))
        if len(set(found_full.values())) > 1:
            raise ValueError(
                "the prompt is full for some of its visual inputs and shortened for others "
                f"({', '.join(name for name, is_full in found_full.items() if is_full)} full): write it one way"
            )
        return any(found_full.values())

    def _require_known_positions(self, inputs: dict[str, Any]) -> None:
        if self._keeps_original_positions and "position_ids" not in inputs:
            raise ValueError(
                'vispruner_config.position_policy "original": an embedded or compiled prompt does not say which '
                "positions its visual tokens had; pass input_ids outside torch.compile, or position_ids"
            )

    def _encode_here(self, inputs: dict[str, Any]) -> dict[int, list[torch.Tensor]]:
        """Replace the pixels in `inputs` by features; return per image the placeholders its kept tokens stand for."""
        encoded, staying = dict(inputs.get("mm_encoder_outputs") or {}), {}
        for modality, token in zip(self.modalities, self._placeholder_ids, strict=True):
            if (pixels := inputs.pop(modality.pixels, None)) is not None:
                described = {name: inputs[name] for name in modality.described_by if name in inputs}
                encode = getattr(self.model, f"get_{modality.name}_features")
                encoded[modality.name] = encode(pixels, **described, return_dict=True)
            staying[token] = encoded[modality.name].placeholders if modality.name in encoded else []
        for name in {name for modality in self.modalities for name in modality.described_by}:
            inputs.pop(name, None)  # last, as modalities may share them
        inputs["mm_encoder_outputs"] = encoded
        return staying

    def _shorten(
        self, inputs: dict[str, Any], layout: PromptLayout, full: Counts, staying: dict[int, list[torch.Tensor]]
    ) -> ShortenedPrompt:
        """Shorten every per-token entry of `inputs`; `staying` says per image which of its placeholders stay."""
        input_ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if mask is not None and mask.shape != input_ids.shape:
            raise ValueError(
                "attention_mask must be 2-D and as long as input_ids to shorten a full prompt, got "
                f"{tuple(mask.shape)} for {tuple(input_ids.shape)}"
            )
        prompt = shorten_prompt(input_ids, full, staying, mask, layout)
        inputs["input_ids"] = prompt.take(input_ids, self._padding_id())
        for name, padding in PER_TOKEN.items():
            if inputs.get(name) is not None:
                inputs[name] = prompt.take(inputs[name], padding)
        if (positions := inputs.get("position_ids")) is not None:
            positions = positions.expand(*positions.shape[:-2], *input_ids.shape)
            inputs["position_ids"] = self._positions_after(prompt, positions)
        if (mask := prompt.attention_mask(mask)) is not None:
            inputs["attention_mask"] = mask
        return prompt

    def _padding_id(self) -> int:
        text = self.config.get_text_config()  # the model's own config may name a default that is no token of it
        for config in (self.generation_config, text, self.config):
            value = getattr(config, "pad_token_id", None)
            if isinstance(value, int) and 0 <= value < text.vocab_size and value not in self._placeholder_ids:
                return value
        return min({0, 1, 2} - set(self._placeholder_ids))

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Callable | None = None,
        **kwargs: Any,
    ) -> ModelOutput | torch.Tensor:
        """Stock `generate`; full prompts are shortened, and the result starts with the caller's own prompt."""
        visual = [name for modality in self.modalities for name in (modality.pixels, *modality.described_by)]
        optional = {*MODEL_INPUTS, *PER_TOKEN, *visual}
        kwargs = {name: kwargs[name] for name in kwargs if kwargs[name] is not None or name not in optional}
        kwargs = by_stock_name(kwargs, CACHE_NAMES, CACHE)
        hooks = {
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
        }
        self._use_encoded_images(kwargs)
        has_ids = (inputs is not None or "input_ids" in kwargs) and "inputs_embeds" not in kwargs
        if not has_ids or self._is_stock(kwargs):
            return super().generate(inputs, generation_config, **hooks, **kwargs)
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        arguments = {**kwargs, "input_ids": input_ids}
        if "attention_mask" not in arguments:
            self._infer_mask(arguments, generation_config)
        layout = self._read_layout(arguments)
        full, kept = self._images_of(arguments, layout)
        prompt = self._shorten_for_generate(arguments, layout, full, kept)
        if any(kept.values()):
            self._refuse_what_stock_gets_wrong(arguments, generation_config)
            self._never_look_up_placeholders(arguments, generation_config)
            self._hand_over_features(arguments)
        if prompt is not None:
            logger.info(f"VisPruner: a prompt of {input_ids.shape[1]} tokens is shortened to {prompt.length}")
            hooks = see_full_prompt(hooks, input_ids, prompt.length)
            dropped = input_ids.shape[1] - prompt.length
            generation_config = self._count_lengths_from_full_prompt(arguments, generation_config, dropped)
            if "streamer" in arguments:
                arguments["streamer"] = FullPromptStreamer(arguments["streamer"], input_ids.cpu())
        result = super().generate(arguments.pop("input_ids"), generation_config, **hooks, **arguments)
        if prompt is not None:
            result = with_full_prompt(result, input_ids, prompt.length)
        cache = getattr(result, CACHE, arguments.get(CACHE))
        if cache is not None and any(full.values()):
            cache.vispruner_prompt = self._remember(full, kept, prompt)
        return result

    def _merge_criteria_processor_list(self, default_list: Any, custom_list: Any) -> Any:
        """Stock lets a caller's hook replace its own of the same type, so show it the types behind the wrappers."""
        wrappers = {id(hook.hook): hook for hook in custom_list if isinstance(hook, FullPromptHook)}
        unwrapped = [hook.hook if isinstance(hook, FullPromptHook) else hook for hook in custom_list]
        merged = super()._merge_criteria_processor_list(default_list, type(custom_list)(unwrapped))
        return type(merged)(wrappers.get(id(hook), hook) for hook in merged)

    def _images_of(self, arguments: dict[str, Any], layout: PromptLayout) -> tuple[Counts, Counts]:
        """Count the visual tokens of the prompt's images; on a later turn they are known from the cache."""
        past = _cached_length(arguments)
        prompt = _cached_prompt(arguments)
        if prompt is None:
            cached = any_of([arguments["input_ids"][:, :past] == token for token in self._placeholder_ids])
            if past == 0 or not cached.any():  # no image is in the cache yet
                return self._count_visual_tokens(arguments)
        if prompt is None or not prompt.uniform or not prompt.may_have(layout.placeholders):
            placeholders = sum(map(sum, layout.placeholders.values()))
            raise ValueError(
                f"cannot continue from this cache of {past} tokens and a prompt of {placeholders} image placeholders: "
                f"pass the whole conversation so far, with the same images and no new one, and the {CACHE} that "
                "generate returned for it (not possible when rows lost different numbers of visual tokens); or "
                f"start again without {CACHE}"
            )
        if prompt.position_policy != self._position_policy:
            raise ValueError(
                f'this cache was filled with vispruner_config.position_policy "{prompt.position_policy}": set that '
                f"policy again, or start again without {CACHE}"
            )
        for name in ("mm_encoder_outputs", *(modality.pixels for modality in self.modalities)):
            arguments.pop(name, None)  # their tokens are in the cache already
        return prompt.full_counts, prompt.kept_counts

    def _shorten_for_generate(
        self, arguments: dict[str, Any], layout: PromptLayout, full: Counts, kept: Counts
    ) -> ShortenedPrompt | None:
        original, cached = self._keeps_original_positions, _cached_prompt(arguments)
        numbered = not original or "position_ids" in arguments or not any(full.values())
        if not self._is_full_prompt(arguments["input_ids"], layout, full, kept):
            if numbered:
                return None
            if full != kept:
                layout = self._lengthen(arguments, layout, full, kept)
        if not numbered:
            arguments["position_ids"] = self._positions_in_generate(arguments)
        if full == kept:
            return None
        # For cached tokens too: their positions are in the cache.
        staying = _leading_placeholders(full, kept, arguments["input_ids"].device)
        if original and cached is None:
            # Where stock encodes too, the same tokens stay, because selection is deterministic.
            staying = self._encode_here(arguments if _may_encode_here(arguments) else dict(arguments))
        prompt = self._shorten(arguments, layout, full, staying)
        if cached is not None:
            self._check_cache_covers_images(arguments, cached, prompt)
        return prompt

    def _hand_over_features(self, arguments: dict[str, Any]) -> None:
        """Encode before stock would, and leave out what the prompt's full form was: it has its final length by now."""
        if self._has_pixels(arguments) and _may_encode_here(arguments):
            self._encode_here(arguments)
        if encoded := arguments.get("mm_encoder_outputs"):  # stock changes what it is given, so not the caller's own
            arguments["mm_encoder_outputs"] = {name: _only_tokens(features) for name, features in encoded.items()}

    def _expand_inputs_for_generation(self, expand_size: int = 1, **inputs: Any) -> Any:
        """Stock, with the features of each row repeated for its copies where stock does not know of features."""
        encoded = inputs.get("mm_encoder_outputs")
        if encoded and expand_size > 1 and not TAKES_FEATURES:
            layout = read_layout(inputs["input_ids"], self._placeholder_ids)
            for modality, token in zip(self.modalities, self._placeholder_ids, strict=True):
                if modality.name in encoded:
                    features = encoded[modality.name]
                    rows = rows_of_images(layout.placeholders[token], [len(image) for image in features.pooler_output])
                    copies = [
                        image
                        for row in range(len(layout.placeholders[token]))
                        for _ in range(expand_size)
                        for image, own in enumerate(rows)
                        if own == row
                    ]
                    encoded = {**encoded, modality.name: _only_tokens(features, copies)}
            inputs["mm_encoder_outputs"] = encoded
        return super()._expand_inputs_for_generation(expand_size=expand_size, **inputs)

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Stock, without the features once they are in the cache: a stock that knows none hands them to every step."""
        model_kwargs = super()._update_model_kwargs_for_generation(*args, **kwargs)
        if not TAKES_FEATURES and model_kwargs.get("use_cache", True):
            model_kwargs.pop("mm_encoder_outputs", None)
        return model_kwargs

    def _check_cache_covers_images(
        self, arguments: dict[str, Any], cached: CachedPrompt, prompt: ShortenedPrompt
    ) -> None:
        past = _cached_length(arguments)
        is_placeholder = any_of([arguments["input_ids"] == token for token in self._placeholder_ids])
        last = int(is_placeholder.any(0).nonzero()[-1])
        if last >= past or past >= prompt.length or cached.dropped != prompt.dropped:
            raise ValueError(
                f"the cache of {past} tokens does not fit this prompt, which has {prompt.length} tokens after pruning "
                f"and its last visual token at {last}: pass the cache that generate returned for this "
                f"conversation, or start again without {CACHE}"
            )

    def _infer_mask(self, arguments: dict[str, Any], config: Any) -> None:
        """As stock does without a mask: padding is told by its id, unless that id also ends a sequence."""
        pad, eos = (self._generation_option(name, arguments, config) for name in ("pad_token_id", "eos_token_id"))
        ends = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
        if pad is not None and pad not in ends:
            arguments["attention_mask"] = (arguments["input_ids"] != pad).long()

    def _generation_option(self, name: str, arguments: dict[str, Any], config: Any) -> Any:
        if name in arguments:
            return arguments[name]
        value = getattr(config, name, None)
        return getattr(self.generation_config, name, None) if value is None else value

    def _refuse_what_stock_gets_wrong(self, arguments: dict[str, Any], config: Any) -> None:
        if not SLICES_FEATURES and self._generation_option("prefill_chunk_size", arguments, config) is not None:
            raise ValueError(
                "this version of transformers cannot chunk the prefill of a prompt with images: upgrade transformers, "
                "or leave out prefill_chunk_size"
            )

    def _never_look_up_placeholders(self, arguments: dict[str, Any], config: Any) -> None:
        """Prompt lookup would propose image placeholders as a continuation, and be refused for having no image."""
        if self._generation_option("prompt_lookup_num_tokens", arguments, config):
            suppressed = self._generation_option("suppress_tokens", arguments, config) or []
            arguments["suppress_tokens"] = [*suppressed, *self._placeholder_ids]

    def _count_lengths_from_full_prompt(self, arguments: dict[str, Any], config: Any, dropped: int) -> Any:
        """Take the dropped tokens off the lengths that count the prompt, where they were given; return the config."""
        config = copy.deepcopy(config)
        for name, counts_new_only in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            value = self._generation_option(name, arguments, config)
            if not value or self._generation_option(counts_new_only, arguments, config) is not None:
                continue
            if config is not None and name not in arguments:
                setattr(config, name, max(value - dropped, 0))
            else:
                arguments[name] = max(value - dropped, 0)
        return config


def _cached_prompt(inputs: dict[str, Any]) -> CachedPrompt | None:
    """Return what the given cache was built from; forget it when the cache was emptied since."""
    cache = inputs.get(CACHE)
    prompt: CachedPrompt | None = getattr(cache, "vispruner_prompt", None)
    if cache is not None and prompt is not None and _cached_length(inputs) == 0:
        cache.vispruner_prompt = prompt = None
    return prompt


def _cached_length(inputs: dict[str, Any]) -> int:
    cache = inputs.get(CACHE)
    return 0 if cache is None else int(cache.get_seq_length())


def _require_length(cache: Any, expected: int) -> None:
    """Raise RuntimeError unless the cache holds the shortened prompt: pruning must never do nothing in silence."""
    length = cache.get_seq_length()
    if isinstance(length, int) and length != expected:  # a static cache has it on the device, which nothing waits for
        raise RuntimeError(
            f"after this prompt the KV cache must hold {expected} tokens, but it holds {length}: pruning did not work "
            f"with {versions()}. Install a tested version, and please report this"
        )


def _only_tokens(features: Any, images: list[int] | None = None) -> Any:
    """Return what stock needs of a vision output to merge it, of all or of some `images`, in lists of its own."""

    def chosen(tokens: Any) -> Any:
        if images is None:
            return tokens if isinstance(tokens, torch.Tensor) else list(tokens)
        picked = [tokens[image] for image in images]
        return torch.stack(picked) if isinstance(tokens, torch.Tensor) else picked

    levels = getattr(features, "deepstack_features", None)
    return PrunedImageFeatures(
        pooler_output=chosen(features.pooler_output),
        deepstack_features=None if levels is None else [chosen(level) for level in levels],
    )


def _may_encode_here(arguments: dict[str, Any]) -> bool:
    """A stock that takes no features hands an assistant the pixels, of which it makes features of its own size."""
    return TAKES_FEATURES or "assistant_model" not in arguments


def _leading_placeholders(full: Counts, kept: Counts, device: torch.device) -> dict[int, list[torch.Tensor]]:
    """Placeholders are all alike, so the first stay; the last repeats where there must be more (paper tiles)."""
    return {
        token: [
            torch.arange(count, device=device).clamp(max=whole - 1)
            for whole, count in zip(full[token], kept[token], strict=True)
        ]
        for token in full
    }


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


def give_lm_head_its_own_rows(lm_head: Any, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Forward pre-hook of `lm_head`: what it multiplies is no slice of a longer tensor.

    The first token comes from such a slice, and in bfloat16 on the CPU PyTorch (issue 151934) then copies all of
    lm_head's weights for every prompt, 0.6 s each for a 7B model. Elsewhere a slice costs next to nothing, and stays.
    """
    (hidden,) = arguments
    is_slice = hidden.dim() == 3 and hidden.stride(0) != hidden.shape[1] * hidden.stride(1)
    if is_slice and hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16:
        hidden = hidden.clone(memory_format=torch.contiguous_format)
    return (hidden,)
