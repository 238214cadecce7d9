"""InternVL (in its transformers form) in vLLM with visual token pruning: every tile and every frame on its own."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .vllm_prompts import PrunedPrompts
from .vllm_pruning import Asked, PrunedVision, merged_tokens


class VisPrunerInternVLMultiModalProcessor(PrunedPrompts, InternS1MultiModalProcessor):
    """Stock, with the placeholders that stay."""


@MULTIMODAL_REGISTRY.register_processor(
    VisPrunerInternVLMultiModalProcessor, info=InternS1ProcessingInfo, dummy_inputs=InternS1DummyInputsBuilder
)
class VisPrunerInternVLForConditionalGeneration(PrunedVision, InternS1ForConditionalGeneration):
    """vLLM's InternVL that projects only the visual tokens its `vispruner_config` keeps (arXiv 2412.01818)."""

    @property
    def vision_attentions(self) -> Sequence[Any]:
        return [layer.attention for layer in self.vision_tower.encoder.layer]

    @property
    def tokens_of_a_tile(self) -> int:
        return self.num_image_token

    def merge(self, patches: torch.Tensor) -> torch.Tensor:
        """Join blocks of patches, (tiles, N, C) -> (tiles, M, C * N / M)."""
        side = int(patches.shape[1] ** 0.5)
        return self.pixel_shuffle(patches.unflatten(1, (side, side)), self.downsample_ratio).flatten(1, 2)

    def _process_vision_input(self, image_input: Any) -> Any:
        if not isinstance(image_input, Asked):
            return super()._process_vision_input(image_input)
        with self.read_attention() as read:
            states = self.vision_tower(pixel_values=image_input.inputs["pixel_values"])
        patches = states[:, 1:]
        tokens = merged_tokens(patches, read(patches), self.merge)
        tiles = [int(count) for count in image_input.inputs["num_patches"]]
        return tuple(self.prune_tiles(tokens, tiles, image_input.options))
