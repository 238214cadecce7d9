"""Gemma 3 in vLLM with visual token pruning: blocks of patches are averaged to tokens; every crop is an image."""

from typing import Any

import torch
from vllm.model_executor.models.gemma3_mm import (
    Gemma3DummyInputsBuilder,
    Gemma3ForConditionalGeneration,
    Gemma3MultiModalProcessor,
    Gemma3ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .vllm_prompts import PrunedPrompts
from .vllm_pruning import TOWER_NAMES, Asked, PrunedTower, merged_tokens


class VisPrunerGemma3MultiModalProcessor(PrunedPrompts, Gemma3MultiModalProcessor):
    """Stock, with the placeholders that stay."""


@MULTIMODAL_REGISTRY.register_processor(
    VisPrunerGemma3MultiModalProcessor, info=Gemma3ProcessingInfo, dummy_inputs=Gemma3DummyInputsBuilder
)
class VisPrunerGemma3ForConditionalGeneration(PrunedTower, Gemma3ForConditionalGeneration):
    """vLLM's Gemma 3 that projects only the visual tokens its `vispruner_config` keeps (arXiv 2412.01818)."""

    hf_to_vllm_mapper = Gemma3ForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES
    folds_projected = True

    @property
    def tokens_of_a_tile(self) -> int:
        return self.config.mm_tokens_per_image

    def project(self, features: torch.Tensor) -> torch.Tensor:
        projector = self.multi_modal_projector
        return torch.matmul(projector.mm_soft_emb_norm(features), projector.mm_input_projection_weight).to(features)

    def merge(self, patches: torch.Tensor) -> torch.Tensor:
        """Average blocks of patches, (tiles, N, C) -> (tiles, M, C)."""
        projector = self.multi_modal_projector
        grid = patches.transpose(1, 2).unflatten(2, (projector.patches_per_image, -1))
        return projector.avg_pool(grid).flatten(2).transpose(1, 2)

    def _process_image_input(self, image_input: Any) -> Any:
        if not isinstance(image_input, Asked):
            return super()._process_image_input(image_input)
        with self.read_attention() as read:
            patches = self.vision_tower(image_input.inputs["pixel_values"])
        tokens = merged_tokens(patches, read(patches), self.merge)
        return self.prune_tiles(tokens, image_input.inputs["num_patches"].tolist(), image_input.options)
