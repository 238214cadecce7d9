"""Qwen2.5-VL with visual token pruning: saliency is read in the last layer that attends over the whole image.

Its other layers attend within windows, for which the encoder sorts the patches.
"""

from typing import Any

import torch
from transformers import GenerationMixin, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel
from transformers.vision_utils import get_vision_window_index

from .configuration_vispruner import VisPrunerConfigMixin
from .pruned_encoder import inherit_checkpoint_conversion
from .pruned_forward import forward_of
from .pruning_mixin import VisPrunerMixin
from .qwen_vl_encoder import QwenVLEncoderMixin


class VisPrunerQwen2_5_VLConfig(VisPrunerConfigMixin, Qwen2_5_VLConfig):
    """`Qwen2_5_VLConfig` with a `vispruner_config` block."""

    vispruner_config: dict | None = None


class WindowOrder:
    """Puts merged tokens in raster order, which such an encoder sorts by windows."""

    visual: Any

    def in_raster_order(self, merged: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        vision = self.visual
        order, _ = get_vision_window_index(grid_thw, vision.spatial_merge_size, vision.window_size, vision.patch_size)
        return merged[..., order.argsort().to(merged.device)]


class VisPrunerQwen2_5_VLModel(WindowOrder, QwenVLEncoderMixin, Qwen2_5_VLModel):
    """`Qwen2_5_VLModel` whose image and video features are only the kept visual tokens."""

    config_class = VisPrunerQwen2_5_VLConfig

    forward = forward_of(Qwen2_5_VLModel)

    @property
    def feature_layer(self) -> int:
        return self.saliency_layer(len(self.vision_attentions) - 1)

    @property
    def whole_image_layers(self) -> list[int]:
        """The layers that attend over the whole image, ascending."""
        return sorted(index for index in self.visual.fullatt_block_indexes if index < len(self.vision_attentions))

    @property
    def stage_layers(self) -> range:
        """From the first layer that attends over the whole image on."""
        return range(min(self.whole_image_layers, default=0), len(self.vision_layers) - 1)

    def saliency_layer(self, layer: int) -> int:
        """Return the layer that attends over the whole image and is the next at or below `layer`, else above it."""
        whole = self.whole_image_layers
        return max((index for index in whole if index <= layer), default=whole[0])

    def check_prunable(self) -> None:
        super().check_prunable()
        layer, whole = self.encoder_options.attention_layer, self.whole_image_layers
        if not whole:
            raise ValueError(
                "vision_config.fullatt_block_indexes names no layer of the encoder: tokens are ranked in a layer that "
                'attends over the whole image (vispruner_config.method="none" loads it dense)'
            )
        if layer is not None and layer % len(self.vision_attentions) not in whole:
            raise ValueError(
                f"vispruner_config.attention_layer must be one of {whole}, which attend over the whole image, "
                f"got {layer}"
            )


class VisPrunerQwen2_5_VLForConditionalGeneration(VisPrunerMixin, Qwen2_5_VLForConditionalGeneration, GenerationMixin):
    """`Qwen2_5_VLForConditionalGeneration` that prunes visual tokens by its `vispruner_config` (arXiv 2412.01818)."""

    config_class = VisPrunerQwen2_5_VLConfig
    base_class = VisPrunerQwen2_5_VLModel

    forward = forward_of(Qwen2_5_VLForConditionalGeneration)


inherit_checkpoint_conversion(VisPrunerQwen2_5_VLForConditionalGeneration, "Qwen2_5_VLForConditionalGeneration")
inherit_checkpoint_conversion(VisPrunerQwen2_5_VLModel, "Qwen2_5_VLModel")
