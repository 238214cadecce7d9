"""Stock `generate` around a prompt that is shortened once, and the head of a pruned model.

A pruned model is the stock model whose images have fewer tokens. The base model shortens prompts (pruned_forward.py);
`generate` does so before anything else, so that all of it runs short. Knows transformers, knows no method.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import ModelOutput, logging

from .call_options import Pruning, TokenCounts
from .configuration_vispruner import CLIP_INPUTS, FILES, merge_vispruner_config
from .cpu_workarounds import give_lm_head_its_own_rows
from .encoded_images import EncodedImages
from .engine_interface import EngineModelMixin
from .full_prompt_view import FullPromptHook, FullPromptStreamer, FullPromptView
from .pretrained_mixin import PretrainedMixin, stock_class_of
from .prompt_reading import FEATURES, PER_TOKEN, Modality, Prompt, cached_length, cached_prompt, find_placeholders
from .prompt_shortening import IGNORED, CachedPrompt, KeptColumns, any_of, read_layout, rows_of_images
from .pruned_forward import HeadCall
from .stock_versions import CACHE, CACHE_NAMES, SLICES_FEATURES, TAKES_FEATURES
from .visual_features import only_tokens, tokens_of

# Under the logger of transformers, so that `transformers serve --log-level` counts.
logger = logging.get_logger(f"transformers.{__name__}")

OURS = ("encoded_images", "vispruner_config", "visual_importance", *CLIP_INPUTS)  # arguments that stock does not have

# Arguments of generate for which None says "not given"; for any other, such as top_k, it is a value. Those of the
# modalities come on top.
MODEL_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    *CACHE_NAMES,
    *PER_TOKEN,
    FEATURES,
    *OURS,
    "streamer",
)

# Options of generate that stock gets wrong where a prompt has images, and why.
WRONG_IN_THIS_VERSION = (
    {} if SLICES_FEATURES else {"prefill_chunk_size": "older transformers gets it wrong; upgrade it"}
)


class VisPrunerMixin(PretrainedMixin, EngineModelMixin, GenerationMixin):
    """For the ForConditionalGeneration class. Modifications against stock:

    * a prompt may carry the full or the kept number of placeholders per image; any other number raises ValueError
    * `generate` returns the caller's own prompt followed by the new tokens, and counts lengths from that prompt
    * both take `encoded_images`, made by `encode_images`, in place of pixel values
    * both take a `vispruner_config`: fields that differ in this call

    base_class  the base model's class; it says which modalities there are
    """

    base_class: Any = None
    modalities: tuple[Modality, ...] = ()
    default_position_policy: str = ""
    renamed_inputs: dict[str, str] = {}  # names that processors may use, and what stock calls them
    model: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Enter the class where trainers, pipelines and `transformers serve` look it up: by its name alone."""
        super().__init_subclass__(**kwargs)
        stock = stock_class_of(cls).__name__
        for names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
            if stock in names.values():
                names[cls.__name__] = cls.__name__
        base = cls.base_class
        cls.modalities, cls.default_position_policy = base.modalities, base.default_position_policy
        cls.renamed_inputs = dict.fromkeys(base.image_names, base.modalities[0].pixels)

    def __init__(self, config: Any) -> None:
        # That of the stock class itself would build a stock model.
        super(stock_class_of(type(self)), self).__init__(config)  # type: ignore[arg-type]
        self.model = self.base_class(config)
        text = config.get_text_config()
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.lm_head.register_forward_pre_hook(give_lm_head_its_own_rows)
        self.finish_head(config)
        self.post_init()

    def finish_head(self, config: Any) -> None:
        """Set what else the `__init__` of the stock class sets."""

    def set_vispruner_config(self, **changes: Any) -> None:
        """Change fields of `vispruner_config`, e.g. visual_token_num=64; takes effect at the next call."""
        before = self.config.vispruner_config
        merged = merge_vispruner_config(before, changes)
        self.model.require_usable(merged)
        self.config.vispruner_config = merged
        if changes.keys() & {*FILES}:
            try:
                self.model.load_files(self.name_or_path)
            except (ValueError, OSError):
                self.config.vispruner_config = before
                raise

    @property
    def last_pruning(self) -> Pruning | None:
        """How many visual tokens this thread's last call with images had and kept; None before the first."""
        return self.model.last_pruning

    @property
    def visual_token_counts(self) -> "TokenCounts":
        """Called with pixel_values and the rest of the processor's output: tokens per image, in full and kept."""
        return TokenCounts(self.model)

    def question_inputs(self, questions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return what `generate` and `forward` take of the question of each row, where CLIP reads it (`text_tower`).

        The repo's own processor adds the same; this is for prompts that a stock one has written.
        """
        if isinstance(questions, str):
            raise TypeError("question_inputs takes a list, one question for each row of the prompt, got a string")
        ids = self.model.require_text_tower().tokenize(questions)
        return {name: value.to(self.device) for name, value in ids.items()}

    @torch.no_grad()
    def encode_images(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        vispruner_config: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> EncodedImages:
        """Encode, select and project images once, without gradients, for any number of questions about them.

        image_sizes, arguments  what the processor returned beside pixel_values to describe the images
        vispruner_config        fields that differ in this call
        The result goes to `generate` or `forward` as `encoded_images`, beside the processor's other tensors. Prompts
        are written as ever; one that carries `encoded_images.kept_counts` placeholders needs no image processor.
        """
        sizes = {} if image_sizes is None else {"image_sizes": image_sizes}
        with self.model.call_with(vispruner_config) as call:
            features = self.model.get_image_features(pixel_values, **sizes, **arguments, return_dict=True)
            images = EncodedImages.from_features(features, self.model.encoder_options.to_dict())
            call.pruning = Pruning(images.full_counts, images.kept_counts)
        return images

    def pruned_forward(self, stock_forward: Callable, inputs: dict[str, Any]) -> Any:
        """Call stock `forward`, whose base model shortens the prompt; only labels of tokens that stay count."""
        inputs = {name: value for name, value in inputs.items() if value is not None}
        return_dict = inputs.pop("return_dict", None)
        outputs = stock_forward(
            **self.model.renamed_as_stock(inputs), vispruner_head=_head_of(inputs), return_dict=True
        )
        return outputs if (self.config.return_dict if return_dict is None else return_dict) else outputs.to_tuple()

    @property
    def loss_function(self) -> Callable[..., torch.Tensor]:
        """The loss of stock, or the one that was set, over the labels of the tokens that stay."""
        stock = super().loss_function

        def loss(*args: Any, vispruner_head: HeadCall | None = None, **kwargs: Any) -> Any:
            kwargs = {name: value for name, value in kwargs.items() if name not in OURS}
            if vispruner_head is not None and vispruner_head.columns is not None:
                kwargs = labels_that_stay(kwargs, vispruner_head.columns)
            return stock(*args, **kwargs)

        return loss

    @loss_function.setter
    def loss_function(self, value: Callable) -> None:
        self._loss_function = value

    @torch.compiler.disable  # how many columns fall cannot be traced; what is compiled within it stays so
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
        """Stock `generate`; full prompts are shortened, and the result starts with the caller's own prompt.

        encoded_images    made by `encode_images`, in place of pixel values
        vispruner_config  fields that differ in this call, such as {"visual_token_num": 64}
        visual_importance (B, N) how much each visual token of a row counts, for a method that ranks by that ("sgl")
        clip_input_ids, clip_attention_mask  (B, M, L) the question of each row for CLIP, as the repo's processor gives
        """
        hooks = {
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
        }
        base = self.model
        if base.is_in_generate:  # an assistant that is the model itself
            return super().generate(inputs, generation_config, **hooks, **kwargs)
        kwargs = self._given(kwargs)
        with base.call_with(kwargs.pop("vispruner_config", None)) as call:
            call.importance = kwargs.pop("visual_importance", None)
            call.clip_inputs = {name: kwargs.pop(name, None) for name in CLIP_INPUTS}
            arguments = base.named_as_stock(kwargs)
            prompt = self._read_prompt(inputs, arguments, generation_config)
            call.is_short = True
            if prompt is None:
                given = inputs if inputs is not None else arguments.get("input_ids", arguments.get("inputs_embeds"))
                call.prompt_length = None if given is None else given.shape[1]
                return super().generate(inputs, generation_config, **hooks, **arguments)
            base.note_pruning(prompt)
            base.note_questions(prompt)
            arguments, columns = self._shorten(prompt, generation_config)
            view, run = self._view_of(prompt, arguments), arguments.get("input_ids")
            call.prompt_length = arguments["inputs_embeds" if run is None else "input_ids"].shape[1]
            if view is not None:
                hooks = view.hooks(hooks)
                option = functools.partial(self._option, arguments=arguments, config=generation_config)
                arguments, generation_config = view.lengths(arguments, generation_config, option)
            if inputs is not None:
                inputs = arguments.pop("input_ids")
            result = super().generate(inputs, generation_config, **hooks, **arguments)
            cache = result.get(CACHE) if isinstance(result, ModelOutput) else arguments.get(CACHE)
            if cache is not None:
                cache.vispruner_prompt = base.cached(prompt, columns)
            if view is None:
                return result
            return view.result(result, run if arguments.get("custom_generate") is not None else None)

    def _given(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Leave out what is None where that says "not given", and labels, by which nothing is generated."""
        visual = {name for modality in self.modalities for name in (modality.pixels, *modality.described_by)}
        optional = {*MODEL_INPUTS, *visual, *self.model.image_names}
        given = {name: value for name, value in kwargs.items() if value is not None or name not in optional}
        given.pop("labels", None)
        return given

    def _read_prompt(self, inputs: torch.Tensor | None, arguments: dict[str, Any], config: Any) -> Prompt | None:
        """Read the prompt of `generate`; None where it has no image, or the model is the stock one."""
        base, earlier = self.model, cached_prompt(arguments)
        ids = arguments.get("input_ids") if inputs is None else inputs
        if ids is None and "inputs_embeds" not in arguments:
            return None
        if base.vispruner_options.method == "none" and earlier is None:
            return None
        if ids is not None:
            arguments = {**arguments, "input_ids": ids}
        if ids is not None and "attention_mask" not in arguments and "inputs_embeds" not in arguments:
            arguments |= self._inferred_mask(ids, arguments, config)
        if earlier is not None:
            return self._continued(arguments, earlier)
        past = cached_length(arguments)
        prompt = base.read_prompt(arguments, past=0, earlier=None)
        if past and any(flags[:, :past].any() for flags in prompt.is_placeholder.values()):
            raise ValueError(_cannot_continue(past, prompt))
        prompt.require_images()
        return prompt if prompt.has_images else None

    def _continued(self, arguments: dict[str, Any], earlier: CachedPrompt) -> Prompt:
        """Read the prompt of a later turn: its images are known from the cache."""
        past = cached_length(arguments)
        encoded = (FEATURES, *(modality.pixels for modality in self.modalities))
        arguments = {name: value for name, value in arguments.items() if name not in encoded}
        counts = {"full": earlier.full_counts, "kept": earlier.kept_counts}
        prompt = self.model.read_prompt(arguments, past=0, earlier=None, **counts)
        if not earlier.uniform or not earlier.may_have(prompt.layout.placeholders):
            raise ValueError(_cannot_continue(past, prompt))
        policy = self.model.position_policy().name
        if policy != earlier.position_policy:
            raise ValueError(
                f'this cache was filled with vispruner_config.position_policy "{earlier.position_policy}": set that '
                f"policy again, or start again without {CACHE}"
            )
        return prompt

    def _shorten(self, prompt: Prompt, config: Any) -> tuple[dict[str, Any], KeptColumns | None]:
        """Return arguments for a stock `generate` of the shortened prompt, its images encoded."""
        base, policy, earlier = self.model, self.model.position_policy(), cached_prompt(prompt.inputs)
        if prompt.form == "same":
            arguments, columns = dict(prompt.inputs), None
            if policy.keeps_original and "position_ids" not in arguments:
                arguments["position_ids"] = policy.in_generate(prompt)
        else:
            arguments, columns = base.shorten(prompt, policy.in_generate, cached=earlier is not None)
        if earlier is not None and columns is not None:
            _require_images_in_cache(prompt, columns, cached_length(arguments))
        option = functools.partial(self._option, arguments=arguments, config=config)
        for name, reason in {**base.wrong_in_stock, **WRONG_IN_THIS_VERSION, **base.wrong_in_decoder}.items():
            if option(name) is not None:
                raise ValueError(f"{name} is not to be had for a prompt with images: {reason}. Leave it out")
        if option("use_cache") is False and base.prunes_in_decoder:
            raise ValueError(
                f'use_cache=False is not to be had with vispruner_config.method "{base.vispruner_options.method}": '
                "every step would rank anew, by the answer. Leave it out"
            )
        if option("prompt_lookup_num_tokens"):  # it would propose placeholders, which stand for no image
            arguments["suppress_tokens"] = [*(option("suppress_tokens") or []), *base.placeholder_ids]
        if earlier is None and (TAKES_FEATURES or "assistant_model" not in arguments):
            described = {name for modality in self.modalities for name in modality.described_by}
            arguments = base.encoded(arguments)
            arguments = {name: value for name, value in arguments.items() if name not in described}
        if (features := arguments.get(FEATURES)) is not None:  # stock changes what it is given
            arguments[FEATURES] = {name: only_tokens(image) for name, image in features.items()}
        return arguments, columns

    def _view_of(self, prompt: Prompt, arguments: dict[str, Any]) -> FullPromptView | None:
        """Return how the caller sees a prompt that was shortened; None where the caller wrote it short."""
        if prompt.form != "full":
            return None
        ids = prompt.ids if prompt.ids is not None and prompt.ids.shape[1] == prompt.width else None
        length = arguments["inputs_embeds" if "inputs_embeds" in arguments else "input_ids"].shape[1]
        logger.info(f"VisPruner: a prompt of {prompt.width} tokens is shortened to {length}")
        if ids is not None and "streamer" in arguments:
            arguments["streamer"] = FullPromptStreamer(arguments["streamer"], ids.cpu())
        return FullPromptView(ids, prompt.width, length)

    def _merge_criteria_processor_list(self, default_list: Any, custom_list: Any) -> Any:
        """Stock lets a caller's hook replace its own of the same type, so show it the types behind the wrappers."""
        wrappers = {id(hook.hook): hook for hook in custom_list if isinstance(hook, FullPromptHook)}
        unwrapped = [hook.hook if isinstance(hook, FullPromptHook) else hook for hook in custom_list]
        merged = super()._merge_criteria_processor_list(default_list, type(custom_list)(unwrapped))
        return type(merged)(wrappers.get(id(hook), hook) for hook in merged)

    def _expand_inputs_for_generation(self, expand_size: int = 1, **inputs: Any) -> Any:
        """Stock, but for features: old versions repeat none, or mix up those of a row with several images."""
        encoded = inputs.pop(FEATURES, None) if expand_size > 1 else None
        ids, expanded = super()._expand_inputs_for_generation(expand_size=expand_size, **inputs)
        if encoded:
            flags = find_placeholders(inputs, self.model.placeholder_ids, self.get_input_embeddings())
            placeholders = read_layout(flags).placeholders
            expanded[FEATURES] = {
                modality.name: _repeated(encoded[modality.name], placeholders[token], expand_size)
                for modality, token in zip(self.modalities, placeholders, strict=True)
                if encoded.get(modality.name) is not None
            }
        return ids, expanded

    def _inferred_mask(self, ids: torch.Tensor, arguments: dict[str, Any], config: Any) -> dict[str, Any]:
        """As stock does without a mask: padding is told by its id, unless that id also ends a sequence."""
        pad, eos = (self._option(name, arguments, config) for name in ("pad_token_id", "eos_token_id"))
        ends = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
        return {} if pad is None or pad in ends else {"attention_mask": (ids != pad).long()}

    def _option(self, name: str, arguments: dict[str, Any], config: Any) -> Any:
        """Look up a generation option where stock does."""
        if name in arguments:
            return arguments[name]
        value = getattr(config, name, None)
        return getattr(self.generation_config, name, None) if value is None else value


def _head_of(inputs: Mapping[str, Any]) -> HeadCall:
    """Return what the head knows of a call: where labels begin, the answer does."""
    labels = inputs.get("labels")
    if labels is None:
        return HeadCall()
    labels = torch.atleast_2d(labels)
    counts = labels != IGNORED
    first = torch.where(counts.any(1), counts.int().argmax(1), labels.shape[1])
    return HeadCall(last=(first - 1).clamp(min=0))


def labels_that_stay(arguments: dict[str, Any], columns: KeptColumns) -> dict[str, Any]:
    """Return the arguments of a loss over full-length logits whose labels are those of the tokens that stay.

    The label of a token that was dropped does not count. `num_items_in_batch` shrinks by the share of such labels in
    this batch, so that the loss stays a mean over the labels that do count.
    """
    shifted = arguments.get("shift_labels")
    given = nn.functional.pad(arguments["labels"], (0, 1), value=IGNORED)[..., 1:] if shifted is None else shifted
    given = given.reshape(len(columns.index), -1)  # stock takes one row's labels without a batch, too
    targets = columns.targets(given)
    changed: dict[str, Any] = {"labels": nn.functional.pad(targets, (1, 0), value=IGNORED)[..., :-1]}
    if shifted is not None:
        changed["shift_labels"] = targets
    if (items := arguments.get("num_items_in_batch")) is not None:
        counting, all_given = ((labels != IGNORED).sum().clamp(min=1) for labels in (targets, given))
        changed["num_items_in_batch"] = items * counting / all_given
    return {**arguments, **changed}


def _repeated(features: Any, placeholders: list[int], times: int) -> Any:
    """Repeat the images of each row as often as the row is."""
    rows = rows_of_images(placeholders, [len(image) for image in tokens_of(features)])
    copies = [
        image for row in range(len(placeholders)) for _ in range(times) for image, own in enumerate(rows) if own == row
    ]
    return only_tokens(features, copies)


def _cannot_continue(past: int, prompt: Prompt) -> str:
    placeholders = sum(map(sum, prompt.layout.placeholders.values()))
    return (
        f"cannot continue from this cache of {past} tokens and a prompt of {placeholders} image placeholders: pass "
        f"the whole conversation so far, with the same images and no new one, and the {CACHE} that generate returned "
        f"for it (not possible when rows lost different numbers of visual tokens); or start again without {CACHE}"
    )


def _require_images_in_cache(prompt: Prompt, columns: KeptColumns, past: int) -> None:
    short = columns.take(any_of(list(prompt.is_placeholder.values())).long(), 0)
    last = int(short.any(0).nonzero()[-1])
    if last >= past or past >= columns.length or columns.valid is not None:
        raise ValueError(
            f"the cache of {past} tokens does not fit this prompt, which has {columns.length} tokens after pruning "
            f"and its last visual token at {last}: pass the cache that generate returned for this conversation, or "
            f"start again without {CACHE}"
        )
