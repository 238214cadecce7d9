"""LLaVA-1.5 with visual token pruning: one image is one tile of N patches behind a [CLS] token."""

from typing import Any

import torch
from transformers import GenerationMixin, LlavaConfig, LlavaForConditionalGeneration, LlavaModel
from transformers.utils import can_return_tuple

from .configuration_vispruner import VisPrunerConfigMixin
from .llava_encoder import LlavaEncoderMixin
from .pruned_encoder import inherit_checkpoint_conversion
from .pruned_forward import forward_of
from .pruning_mixin import VisPrunerMixin
from .visual_features import PrunedImageFeatures


class VisPrunerLlavaConfig(VisPrunerConfigMixin, LlavaConfig):
    """`LlavaConfig` with a `vispruner_config` block."""

    vispruner_config: dict | None = None


class VisPrunerLlavaModel(LlavaEncoderMixin, LlavaModel):
    """`LlavaModel` whose `get_image_features` returns only the kept visual tokens."""

    config_class = VisPrunerLlavaConfig

    forward = forward_of(LlavaModel)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> PrunedImageFeatures:
        """Encode (B, 3, height, width), select, project; `pooler_output` holds B tensors (T, D)."""
        if self.keeps_all(patches := self.patches_of(pixel_values)):
            outputs = super().get_image_features(
                pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                image_sizes=image_sizes,
                return_dict=True,
                **kwargs,
            )
            return self.keep_everything(outputs, self.dense_numbers(outputs.pooler_output, patches))
        self.require_patches(vision_feature_select_strategy)
        outputs, tokens = self.encode(pixel_values, vision_feature_layer, **kwargs)
        pruned = self.prune(outputs, tokens, kwargs)
        pruned.pooler_output = list(pruned.pooler_output)
        if registers := self.register_tokens:  # of these a full prompt has placeholders too
            pruned.placeholders = [registers + kept for kept in pruned.kept_indices or ()]
            pruned.full_counts = [registers + count for count in pruned.full_counts or ()]
        return pruned


class VisPrunerLlavaForConditionalGeneration(VisPrunerMixin, LlavaForConditionalGeneration, GenerationMixin):
    """`LlavaForConditionalGeneration` that prunes visual tokens by its `vispruner_config` (arXiv 2412.01818)."""

    config_class = VisPrunerLlavaConfig
    base_class = VisPrunerLlavaModel

    forward = forward_of(LlavaForConditionalGeneration)


inherit_checkpoint_conversion(VisPrunerLlavaForConditionalGeneration, "llava")
inherit_checkpoint_conversion(VisPrunerLlavaModel, "LlavaModel")
