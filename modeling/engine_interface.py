"""What a serving engine asks of a repo when it runs the code in it: vLLM's Transformers backend, without a plugin.

Such an engine writes the placeholders of a prompt itself, so a processor must tell it how many visual tokens the model
will return, and it wants the base model alone. Both must mean the same budget: it is that of the repo's config.json.
"""

import copy
from typing import Any

from transformers import LlavaNextProcessor, LlavaProcessor, PreTrainedConfig
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from transformers.processing_utils import ProcessorMixin

from .clip_text import FILE_ARGUMENTS, QuestionProcessorMixin
from .configuration_vispruner import VisPrunerOptions, merge_vispruner_config
from .selectors import require_choice_by_image

# The attention function that vLLM's Transformers backend gives the language model.
ENGINE_ATTENTION = "vllm"


class EngineModelMixin:
    """For the ForConditionalGeneration class: to an engine that computes logits itself it is the base model."""

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        if getattr(config.get_text_config(), "_attn_implementation", None) != ENGINE_ATTENTION:
            return super()._from_config(config, **kwargs)  # type: ignore[misc]
        require_servable(config)
        return super()._from_config(config, **kwargs).base_model  # type: ignore[misc]


def require_servable(config: Any) -> None:
    """Raise ValueError, before any request does, for what an engine without the plugin cannot serve pruned."""
    files = {"revision": getattr(config, "_commit_hash", None)}
    options = VisPrunerOptions.from_dict(config.vispruner_config)
    stored, _ = PreTrainedConfig.get_config_dict(config._name_or_path, **files)
    processor, _ = ProcessorMixin.get_processor_dict(config._name_or_path, **files)
    remedy = "or install vispruner where vLLM is: its plugin needs no trust_remote_code"
    if options.weights == "thin":
        raise ValueError(f"a thin repo has no weights for an engine: build it with --full, {remedy}")
    if "AutoProcessor" not in (processor.get("auto_map") or {}):
        raise ValueError(f"the repo's processor counts no kept tokens: build it with --engine-processor, {remedy}")
    if merge_vispruner_config(stored["vispruner_config"], None) != options.to_dict():
        raise ValueError(
            "vispruner_config is not that of the repo's config.json, by which its processor counts kept tokens: "
            f"change it there (or serve a branch with another budget), {remedy}"
        )
    if getattr(config.vision_config, "num_register_tokens", 0):
        raise ValueError("the processor does not count the registers of this vision tower: serve another base")
    _require_known_counts(options)


def _require_known_counts(options: VisPrunerOptions) -> None:
    require_choice_by_image(options)
    if options.position_policy == "original":
        raise ValueError(
            'vispruner_config.position_policy "original" cannot be served: the engine numbers tokens itself '
            '(use null or "renumber")'
        )


class EngineProcessorMixin:
    """For a stock processor: stock in every call but those of an engine, which ask what each image was replaced by.

    There an image gets as many placeholders as visual tokens are kept of it.
    """

    vispruner_config: dict[str, Any] | None = None
    writes_kept = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Stock, and read how many tokens are kept from the config.json beside the processor's files."""
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        files = {name: kwargs[name] for name in FILE_ARGUMENTS if name in kwargs}
        try:
            config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **files)
        except OSError:  # a processor that was saved without its model: no engine can use it, everyone else can
            return processor
        processor.vispruner_config = config.get("vispruner_config")
        return processor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("return_text_replacement_offsets"):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        engine = copy.copy(self)
        engine.writes_kept = True
        return super(EngineProcessorMixin, engine).__call__(*args, **kwargs)  # type: ignore[misc]

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        full = super().replace_image_token(image_inputs, image_idx, **kwargs)  # type: ignore[misc]
        if not self.writes_kept:
            return full
        size = image_inputs["image_sizes"][image_idx] if "image_sizes" in image_inputs else None
        return self.image_token * self.kept_count(full.count(self.image_token), size)  # type: ignore[attr-defined]

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> Any:
        counts = super()._get_num_multimodal_tokens(image_sizes, **kwargs)  # type: ignore[misc]
        if image_sizes is not None:
            full = zip(counts.num_image_tokens, image_sizes, strict=True)
            counts.num_image_tokens = [self.kept_count(count, size) for count, size in full]
        return counts

    def kept_count(self, full: int, image_size: Any) -> int:
        """Return how many of an image's `full` visual tokens are kept; image_size is (height, width)."""
        return self.options.budget(full)

    @property
    def options(self) -> VisPrunerOptions:
        if self.vispruner_config is None:
            raise ValueError("config.json has no vispruner_config, so kept tokens cannot be counted")
        return VisPrunerOptions.from_dict(self.vispruner_config)


class VisPrunerLlavaProcessor(QuestionProcessorMixin, EngineProcessorMixin, LlavaProcessor):
    """`LlavaProcessor` that tells an engine how many visual tokens are kept, and CLIP what is asked."""


class VisPrunerLlavaNextProcessor(QuestionProcessorMixin, EngineProcessorMixin, LlavaNextProcessor):
    """`LlavaNextProcessor` that tells an engine how many are kept (tile_mode "paper" only), and CLIP what is asked."""

    def kept_count(self, full: int, image_size: Any) -> int:
        options, images = self.options, self.image_processor
        if options.method == "none":
            return full
        if options.tile_mode != "paper":
            raise ValueError(
                f'vispruner_config.tile_mode must be "paper" for an engine, got {options.tile_mode!r}: '
                'the kept tokens of "native" packing are not counted'
            )
        side = images.crop_size["height"]
        rows, columns = get_anyres_image_grid_shape([int(v) for v in image_size], images.image_grid_pinpoints, side)
        return options.budget((side // self.patch_size) ** 2) * (1 + rows * columns)


ENGINE_PROCESSORS = {"llava": VisPrunerLlavaProcessor, "llava_next": VisPrunerLlavaNextProcessor}
