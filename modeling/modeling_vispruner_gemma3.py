"""Gemma 3 with visual token pruning: SigLIP has no [CLS], and every 4 x 4 patches are averaged to one of 256 tokens.

A token is ranked by the mean attention that its patches receive from all patches of the last encoder layer. The crops
of pan and scan are images of their own. Tokens that stay still see all of their image, before and behind them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Model, GenerationMixin
from transformers.utils import can_return_tuple

from .configuration_vispruner import VisPrunerConfigMixin
from .llava_encoder import layers_of
from .prompt_reading import Modality
from .pruned_encoder import inherit_checkpoint_conversion
from .pruned_forward import forward_of
from .pruning_mixin import VisPrunerMixin
from .tile_encoder import TileEncoderMixin
from .visual_features import PrunedImageFeatures


class VisPrunerGemma3Config(VisPrunerConfigMixin, Gemma3Config):
    """`Gemma3Config` with a `vispruner_config` block."""

    vispruner_config: dict | None = None


class VisPrunerGemma3Model(TileEncoderMixin, Gemma3Model):
    """`Gemma3Model` whose `get_image_features` returns only the kept visual tokens."""

    config_class = VisPrunerGemma3Config
    modalities = (Modality("image", "pixel_values", (), "image_token_id"),)
    wrong_in_stock = {"prefill_chunk_size": "an image sees itself in both directions, so it cannot be cut"}
    has_cls_token = False
    budget_unit = "image or crop of an image"

    forward = forward_of(Gemma3Model)

    @property
    def vision_layers(self) -> Sequence[Any]:
        return layers_of(self.vision_tower)

    def check_prunable(self) -> None:
        self.warn_if_all_are_kept(self.config.mm_tokens_per_image)

    def image_token_counts(self, pixel_values: torch.Tensor, **arguments: Any) -> tuple[list[int], list[int]]:
        """Return per image the visual tokens of a full prompt and those that are kept."""
        full, images = self.config.mm_tokens_per_image, len(pixel_values)
        return [full] * images, [self.encoder_options.budget(full)] * images

    def merge_patches(self, patches: torch.Tensor) -> torch.Tensor:
        projector = self.multi_modal_projector
        grid = patches.transpose(1, 2).unflatten(2, (projector.patches_per_image, -1))
        return projector.avg_pool(grid).flatten(2).transpose(1, 2)

    def project_patches(self, patches: torch.Tensor) -> torch.Tensor:
        return self.multi_modal_projector(patches)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> PrunedImageFeatures:
        """Encode (B, 3, height, width), merge, select, project; `pooler_output` is (B, T, D)."""
        if self.keeps_all(self.config.mm_tokens_per_image):
            return self.keep_everything(super().get_image_features(pixel_values, return_dict=True, **kwargs))
        with self.open_tap(stage=self.stage_of(self.multi_modal_projector.patches_per_image**2)) as tap:
            outputs = self.vision_tower(pixel_values=pixel_values, return_dict=True, **kwargs)
        return self.prune_tiles(outputs, outputs.last_hidden_state, tap, **kwargs)


class VisPrunerGemma3ForConditionalGeneration(VisPrunerMixin, Gemma3ForConditionalGeneration, GenerationMixin):
    """`Gemma3ForConditionalGeneration` that prunes visual tokens by its `vispruner_config` (arXiv 2412.01818)."""

    config_class = VisPrunerGemma3Config
    base_class = VisPrunerGemma3Model

    forward = forward_of(Gemma3ForConditionalGeneration)


inherit_checkpoint_conversion(VisPrunerGemma3ForConditionalGeneration, "gemma3")
inherit_checkpoint_conversion(VisPrunerGemma3Model, "Gemma3Model")
