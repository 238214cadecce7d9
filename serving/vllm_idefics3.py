"""Idefics3 and SmolVLM in vLLM with visual token pruning: every tile of an image on its own."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.model_executor.models.idefics3 import (
    Idefics3DummyInputsBuilder,
    Idefics3ForConditionalGeneration,
    Idefics3MultiModalProcessor,
    Idefics3ProcessingInfo,
)
from vllm.model_executor.models.smolvlm import SmolVLMForConditionalGeneration, SmolVLMProcessingInfo
from vllm.multimodal import MULTIMODAL_REGISTRY

from .vllm_prompts import PrunedPrompts
from .vllm_pruning import Asked, PrunedVision, merged_tokens


class VisPrunerIdefics3MultiModalProcessor(PrunedPrompts, Idefics3MultiModalProcessor):
    """Stock, with the placeholders that stay."""


class PrunedIdefics3(PrunedVision):
    """What both models share."""

    model: Any

    @property
    def vision_attentions(self) -> Sequence[Any]:
        return [layer.self_attn for layer in self.model.vision_model.encoder.layers]

    @property
    def tokens_of_a_tile(self) -> int:
        return self.model.image_seq_len

    def project(self, features: torch.Tensor) -> torch.Tensor:
        return self.model.connector.modality_projection(features)

    def merge(self, patches: torch.Tensor) -> torch.Tensor:
        """Join blocks of patches, (tiles, N, C) -> (tiles, M, C * N / M)."""
        return self.model.connector.pixel_shuffle(patches, self.model.connector.scale_factor)

    def _process_image_input(self, image_input: Any) -> Any:
        if not isinstance(image_input, Asked):
            return super()._process_image_input(image_input)  # type: ignore[misc]
        pixels = image_input.inputs
        seen = self.model.get_patch_attention_mask(pixels["pixel_attention_mask"]).flatten(1)
        with self.read_attention(seen) as read:
            patches = self.model.image_pixels_to_features(
                pixels["pixel_values"], pixel_attention_mask=pixels["pixel_attention_mask"]
            )
        tokens = merged_tokens(patches, read(patches), self.merge)
        return self.prune_tiles(tokens, pixels["num_patches"].tolist(), image_input.options)


@MULTIMODAL_REGISTRY.register_processor(
    VisPrunerIdefics3MultiModalProcessor, info=Idefics3ProcessingInfo, dummy_inputs=Idefics3DummyInputsBuilder
)
class VisPrunerIdefics3ForConditionalGeneration(PrunedIdefics3, Idefics3ForConditionalGeneration):
    """vLLM's Idefics3 that projects only the visual tokens its `vispruner_config` keeps (arXiv 2412.01818)."""


@MULTIMODAL_REGISTRY.register_processor(
    VisPrunerIdefics3MultiModalProcessor, info=SmolVLMProcessingInfo, dummy_inputs=Idefics3DummyInputsBuilder
)
class VisPrunerSmolVLMForConditionalGeneration(PrunedIdefics3, SmolVLMForConditionalGeneration):
    """vLLM's SmolVLM that projects only the visual tokens its `vispruner_config` keeps (arXiv 2412.01818)."""
