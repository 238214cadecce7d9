"""Qwen3-VL with visual token pruning: features of several encoder layers (deepstack) lose the same tokens.

Saliency is read in the last layer of its encoder. Each frame of a video stands behind its timestamp in the prompt.
"""

from typing import Any

import torch
from transformers import GenerationMixin, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel
from transformers.utils import can_return_tuple

from .configuration_vispruner import VisPrunerConfigMixin
from .pruned_forward import forward_of
from .pruning_mixin import VisPrunerMixin
from .qwen_vl_encoder import QwenVLEncoderMixin
from .visual_features import PrunedImageFeatures


class VisPrunerQwen3VLConfig(VisPrunerConfigMixin, Qwen3VLConfig):
    """`Qwen3VLConfig` with a `vispruner_config` block."""

    vispruner_config: dict | None = None


class VisPrunerQwen3VLModel(QwenVLEncoderMixin, Qwen3VLModel):
    """`Qwen3VLModel` whose image and video features are only the kept visual tokens."""

    config_class = VisPrunerQwen3VLConfig

    forward = forward_of(Qwen3VLModel)

    @property
    def first_prunable_layer(self) -> int:
        """The language model adds features of encoder layers to all visual tokens in its first layers."""
        return max(1, len(self.config.vision_config.deepstack_visual_indexes))

    @can_return_tuple
    def get_video_features(
        self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.Tensor | None = None, **kwargs: Any
    ) -> PrunedImageFeatures:
        """As for images, which is all that stock does."""
        return self.get_image_features(pixel_values_videos, video_grid_thw, return_dict=True, **kwargs)


class VisPrunerQwen3VLForConditionalGeneration(VisPrunerMixin, Qwen3VLForConditionalGeneration, GenerationMixin):
    """`Qwen3VLForConditionalGeneration` that prunes visual tokens by its `vispruner_config` (arXiv 2412.01818)."""

    config_class = VisPrunerQwen3VLConfig
    base_class = VisPrunerQwen3VLModel

    forward = forward_of(Qwen3VLForConditionalGeneration)
