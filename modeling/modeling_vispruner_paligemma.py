"""PaliGemma (1 and 2) with visual token pruning: SigLIP has no [CLS], and every patch is a token.

A token is ranked by the attention that it receives from all patches in the last encoder layer. Prompts number their
tokens from 1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationMixin,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaModel,
)
from transformers.utils import can_return_tuple

from .configuration_vispruner import VisPrunerConfigMixin
from .llava_encoder import layers_of
from .pruned_encoder import PrunedImageFeatures, inherit_checkpoint_conversion
from .pruning_mixin import Modality, VisPrunerMixin, forward_of, give_lm_head_its_own_rows
from .tile_encoder import TileEncoderMixin


class VisPrunerPaliGemmaConfig(VisPrunerConfigMixin, PaliGemmaConfig):
    """`PaliGemmaConfig` with a `vispruner_config` block."""

    vispruner_config: dict | None = None


class VisPrunerPaliGemmaModel(TileEncoderMixin, PaliGemmaModel):
    """`PaliGemmaModel` whose `get_image_features` returns only the kept visual tokens."""

    config_class = VisPrunerPaliGemmaConfig
    has_cls_token = False

    def __init__(self, config: VisPrunerPaliGemmaConfig) -> None:
        super().__init__(config)
        self.prepare_pruning()

    @property
    def vision_attentions(self) -> Sequence[Any]:
        return [layer.self_attn for layer in layers_of(self.vision_tower)]

    @property
    def _patches(self) -> int:
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    def check_prunable(self) -> None:
        self.warn_if_all_are_kept(self._patches)

    def image_token_counts(self, pixel_values: torch.Tensor, **arguments: Any) -> tuple[list[int], list[int]]:
        """Return per image the visual tokens of a full prompt and those that are kept."""
        images = len(pixel_values)
        return [self._patches] * images, [self.vispruner_options.budget(self._patches)] * images

    def merge_patches(self, patches: torch.Tensor) -> torch.Tensor:
        return patches  # a token is one patch

    def project(self, features: torch.Tensor) -> torch.Tensor:
        return self.multi_modal_projector(features)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> PrunedImageFeatures:
        """Encode (B, 3, height, width), select, project; `pooler_output` is (B, T, D)."""
        if self.keeps_all(self._patches):
            return self.keep_everything(super().get_image_features(pixel_values, **kwargs))
        with self.open_tap() as tap:
            outputs = self.vision_tower(pixel_values, return_dict=True, **kwargs)
        return self.prune_tiles(outputs, outputs.last_hidden_state, tap, **kwargs)


class VisPrunerPaliGemmaForConditionalGeneration(VisPrunerMixin, PaliGemmaForConditionalGeneration, GenerationMixin):
    """`PaliGemmaForConditionalGeneration` that prunes visual tokens by its `vispruner_config` (arXiv 2412.01818)."""

    config_class = VisPrunerPaliGemmaConfig
    modalities = (Modality("image", "pixel_values", (), "image_token_id"),)

    def __init__(self, config: VisPrunerPaliGemmaConfig) -> None:
        super(PaliGemmaForConditionalGeneration, self).__init__(config)  # the stock one would build a stock model
        self.model = VisPrunerPaliGemmaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.lm_head.register_forward_pre_hook(give_lm_head_its_own_rows)
        self.post_init()

    def _positions_in_forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        return super()._positions_in_forward(inputs) + 1  # in `generate`, stock adds it to the positions it is given

    forward = forward_of(PaliGemmaForConditionalGeneration)


inherit_checkpoint_conversion(VisPrunerPaliGemmaForConditionalGeneration, "paligemma")
inherit_checkpoint_conversion(VisPrunerPaliGemmaModel, "PaliGemmaModel")
