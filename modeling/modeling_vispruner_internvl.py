"""InternVL (2.5 and 3, in their transformers form) with visual token pruning: an image is tiles behind a [CLS] token.

A token is a block of patches: it is ranked by the mean attention that [CLS] pays to them. Videos need nothing of their
own, because the processor hands every frame over as one more tile of `pixel_values`, with image placeholders.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationMixin, InternVLConfig, InternVLForConditionalGeneration, InternVLModel
from transformers.utils import can_return_tuple

from .configuration_vispruner import VisPrunerConfigMixin
from .prompt_reading import Modality
from .pruned_encoder import inherit_checkpoint_conversion
from .pruned_forward import forward_of
from .pruning_mixin import VisPrunerMixin
from .stock_versions import KEEPS_NAMED_HIDDEN_STATES
from .tile_encoder import TileEncoderMixin
from .visual_features import PrunedImageFeatures


class VisPrunerInternVLConfig(VisPrunerConfigMixin, InternVLConfig):
    """`InternVLConfig` with a `vispruner_config` block."""

    vispruner_config: dict | None = None


class VisPrunerInternVLModel(TileEncoderMixin, InternVLModel):
    """`InternVLModel` whose `get_image_features` returns only the kept visual tokens of each tile."""

    config_class = VisPrunerInternVLConfig
    modalities = (
        Modality(
            "image",
            "pixel_values",
            ("vision_feature_layer", "vision_feature_select_strategy"),
            "image_token_id",
        ),
    )
    budget_unit = "tile of an image or frame of a video"

    forward = forward_of(InternVLModel)

    @property
    def vision_layers(self) -> Sequence[Any]:
        return self.vision_tower.encoder.layer

    @property
    def feature_layer(self) -> int:
        return self._producer_of(self.config.vision_feature_layer)

    def _producer_of(self, index: int | list[int]) -> int:
        layers = len(self.vision_attentions)
        if not isinstance(index, int) or index % (layers + 1) == 0:
            raise ValueError(f"vision_feature_layer must name one attention layer, got {index}")
        return index % (layers + 1) - 1

    def check_prunable(self) -> None:
        self.require_patches(self.config.vision_feature_select_strategy)
        self.warn_if_all_are_kept(self._tokens(*self.config.vision_config.image_size))

    @staticmethod
    def require_patches(strategy: str | None) -> None:
        """Raise ValueError unless features are patches without [CLS], the only ones that form a grid."""
        if strategy not in (None, "default"):
            raise ValueError(
                f'vision_feature_select_strategy must be "default" (patches without [CLS]), got {strategy!r}'
            )

    def _tokens(self, height: int, width: int) -> int:
        rows, columns = self.config.vision_config.patch_size
        return int((height // rows) * (width // columns) * self.config.downsample_ratio**2)

    def image_token_counts(self, pixel_values: torch.Tensor, **arguments: Any) -> tuple[list[int], list[int]]:
        """Return per tile the visual tokens of a full prompt and those that are kept."""
        full, tiles = self._tokens(*pixel_values.shape[-2:]), len(pixel_values)
        return [full] * tiles, [self.encoder_options.budget(full)] * tiles

    def merge_patches(self, patches: torch.Tensor) -> torch.Tensor:
        side = int(patches.shape[1] ** 0.5)
        merged = self.pixel_shuffle(patches.unflatten(1, (side, side)), self.config.downsample_ratio)
        return merged.flatten(1, 2)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        return self.multi_modal_projector(features)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> PrunedImageFeatures:
        """Encode (tiles, 3, height, width), merge, select, project; `pooler_output` is (tiles, T, D)."""
        if self.keeps_all(self._tokens(*pixel_values.shape[-2:])):
            outputs = super().get_image_features(
                pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                return_dict=True,
                **kwargs,
            )
            return self.keep_everything(outputs)
        self.require_patches(vision_feature_select_strategy)
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        hidden_states = self.wants_hidden_states(kwargs)
        wanted: Any = hidden_states
        if layer != -1 and not hidden_states:
            wanted = layer if KEEPS_NAMED_HIDDEN_STATES else True
        rows, columns = self.config.vision_config.patch_size
        stage = self.stage_of((pixel_values.shape[-2] // rows) * (pixel_values.shape[-1] // columns))
        with self.open_tap(feature_layer=self._producer_of(layer), stage=stage) as tap:
            kwargs["output_hidden_states"] = wanted
            outputs = self.vision_tower(pixel_values.to(self.dtype), return_dict=True, **kwargs)
        states = outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer]
        return self.prune_tiles(outputs, states[:, 1:], tap, states[:, 0], output_hidden_states=hidden_states)


class VisPrunerInternVLForConditionalGeneration(VisPrunerMixin, InternVLForConditionalGeneration, GenerationMixin):
    """`InternVLForConditionalGeneration` that prunes visual tokens by its `vispruner_config` (arXiv 2412.01818)."""

    config_class = VisPrunerInternVLConfig
    base_class = VisPrunerInternVLModel

    forward = forward_of(InternVLForConditionalGeneration)


inherit_checkpoint_conversion(VisPrunerInternVLForConditionalGeneration, "internvl")
inherit_checkpoint_conversion(VisPrunerInternVLModel, "InternVLModel")
