"""LLaVA-1.5 in vLLM with visual token pruning: an image takes T placeholders of the prompt instead of N."""

from functools import cached_property

import torch
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vispruner.configuration_vispruner import VisPrunerOptions

from .vllm_pruning import TOWER_NAMES, PrunedVision, launch_options


class VisPrunerLlavaProcessingInfo(LlavaProcessingInfo):
    """Stock, but for the number of visual tokens of an image, from which vLLM works out all the rest."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        patches = super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        return self.vispruner_options.budget(patches)

    @cached_property
    def vispruner_options(self) -> VisPrunerOptions:
        return launch_options(self.ctx.model_config)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMultiModalProcessor, info=VisPrunerLlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class VisPrunerLlavaForConditionalGeneration(PrunedVision, LlavaForConditionalGeneration):
    """vLLM's LLaVA that projects only the visual tokens its `vispruner_config` keeps (arXiv 2412.01818)."""

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES

    def _image_pixels_to_features(self, vision_tower: torch.nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.keeps_all:
            return super()._image_pixels_to_features(vision_tower, pixel_values)
        features, selection = self.select_features(pixel_values)
        return selection.take(features)
