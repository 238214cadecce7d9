"""LLaVA-1.5 in vLLM with visual token pruning: an image takes T placeholders of the prompt instead of N."""

from typing import Any

from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .vllm_prompts import PrunedPrompts
from .vllm_pruning import TOWER_NAMES, Asked, PrunedTower


class VisPrunerLlavaMultiModalProcessor(PrunedPrompts, LlavaMultiModalProcessor):
    """Stock, with the placeholders that stay."""


@MULTIMODAL_REGISTRY.register_processor(
    VisPrunerLlavaMultiModalProcessor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class VisPrunerLlavaForConditionalGeneration(PrunedTower, LlavaForConditionalGeneration):
    """vLLM's LLaVA that projects only the visual tokens its `vispruner_config` keeps (arXiv 2412.01818)."""

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES

    def _process_image_input(self, image_input: Any) -> Any:
        if not isinstance(image_input, Asked):
            return super()._process_image_input(image_input)
        tokens = self.encode(image_input.inputs["pixel_values"])
        return self.prune_tiles(tokens, [1] * len(image_input.options), image_input.options)
