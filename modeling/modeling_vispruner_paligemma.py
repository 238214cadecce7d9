"""PaliGemma (1 and 2) with visual token pruning: SigLIP has no [CLS], and every patch is a token.

A token is ranked by the attention that it receives from all patches in the last encoder layer. Prompts number their
tokens from 1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    GenerationMixin,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaModel,
)
from transformers.utils import can_return_tuple

from .configuration_vispruner import VisPrunerConfigMixin
from .llava_encoder import layers_of
from .position_policies import Original, Renumbered
from .prompt_reading import Modality
from .pruned_encoder import inherit_checkpoint_conversion
from .pruned_forward import forward_of
from .pruning_mixin import VisPrunerMixin
from .tile_encoder import TileEncoderMixin
from .visual_features import PrunedImageFeatures


class VisPrunerPaliGemmaConfig(VisPrunerConfigMixin, PaliGemmaConfig):
    """`PaliGemmaConfig` with a `vispruner_config` block."""

    vispruner_config: dict | None = None


class VisPrunerPaliGemmaModel(TileEncoderMixin, PaliGemmaModel):
    """`PaliGemmaModel` whose `get_image_features` returns only the kept visual tokens."""

    config_class = VisPrunerPaliGemmaConfig
    modalities = (Modality("image", "pixel_values", (), "image_token_id"),)
    wrong_in_stock = {
        "prefill_chunk_size": "a prompt sees itself in both directions, so it cannot be cut",
        "assistant_model": "a prompt sees itself in both directions, and so would the tokens that are proposed",
    }
    has_cls_token = False

    forward = forward_of(PaliGemmaModel)

    def position_policy(self, name: str | None = None) -> Renumbered:
        policy = super().position_policy(name)
        # In `generate`, stock adds 1 to the positions that it is given.
        return Original(first=1) if policy.keeps_original else policy

    @property
    def vision_layers(self) -> Sequence[Any]:
        return layers_of(self.vision_tower)

    @property
    def _patches(self) -> int:
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    def check_prunable(self) -> None:
        self.warn_if_all_are_kept(self._patches)

    def image_token_counts(self, pixel_values: torch.Tensor, **arguments: Any) -> tuple[list[int], list[int]]:
        """Return per image the visual tokens of a full prompt and those that are kept."""
        images = len(pixel_values)
        return [self._patches] * images, [self.encoder_options.budget(self._patches)] * images

    def merge_patches(self, patches: torch.Tensor) -> torch.Tensor:
        return patches  # a token is one patch

    def project(self, features: torch.Tensor) -> torch.Tensor:
        return self.multi_modal_projector(features)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> PrunedImageFeatures:
        """Encode (B, 3, height, width), select, project; `pooler_output` is (B, T, D)."""
        if self.keeps_all(self._patches):
            return self.keep_everything(super().get_image_features(pixel_values, return_dict=True, **kwargs))
        with self.open_tap(stage=self.stage_of(self._patches)) as tap:
            outputs = self.vision_tower(pixel_values, return_dict=True, **kwargs)
        return self.prune_tiles(outputs, outputs.last_hidden_state, tap, **kwargs)


class VisPrunerPaliGemmaForConditionalGeneration(VisPrunerMixin, PaliGemmaForConditionalGeneration, GenerationMixin):
    """`PaliGemmaForConditionalGeneration` that prunes visual tokens by its `vispruner_config` (arXiv 2412.01818)."""

    config_class = VisPrunerPaliGemmaConfig
    base_class = VisPrunerPaliGemmaModel

    forward = forward_of(PaliGemmaForConditionalGeneration)


inherit_checkpoint_conversion(VisPrunerPaliGemmaForConditionalGeneration, "paligemma")
inherit_checkpoint_conversion(VisPrunerPaliGemmaModel, "PaliGemmaModel")
