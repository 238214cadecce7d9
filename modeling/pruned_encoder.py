"""The base model's part of pruning: encode an image with saliency, select, and say what was kept.

Knows CLIP-like towers and the registry of selectors; which tokens an image has is the architecture file's business.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging
from transformers.utils.import_utils import torch_compilable_check

from .configuration_vispruner import VisPrunerOptions, used_vision_layers
from .token_selection import SELECTORS, select_tokens
from .visual_attention import encode_with_saliency, make_tappable, resolve_attention_layer

logger = logging.get_logger(__name__)

DROPPED_LAYERS = r"vision_tower\.(vision_model\.)?encoder\.layers\.\d+\."


@dataclass
class PrunedImageFeatures(BaseModelOutputWithPooling):
    """Vision output whose `pooler_output` holds only the kept visual tokens, projected.

    pooler_output  list per image of (tokens, D)
    kept_indices   list per image of (tokens,) int64: tile * N + patch in the order of pooler_output, newline = -1
    placeholders   list per image of (tokens,) int64: the placeholder of a full prompt that each token stands for;
                   None where there is none (LLaVA-NeXT, tile_mode "paper")
    saliency       (tiles, N) of all images together
    full_counts    visual tokens a full prompt has for each image
    """

    kept_indices: list[torch.Tensor] | None = None
    placeholders: list[torch.Tensor] | None = None
    saliency: torch.Tensor | None = None
    full_counts: list[int] | None = None


def inherit_checkpoint_conversion(model_class: type[nn.Module], stock_name: str) -> None:
    """Read every key layout that the stock class or model_type `stock_name` reads.

    transformers converts no keys for a class outside itself: a checkpoint with older names would leave weights random.
    """
    mapping = get_checkpoint_conversion_mapping(stock_name)
    if mapping is None:
        raise RuntimeError(
            f"transformers has no checkpoint conversion named {stock_name!r}; this version is unsupported"
        )
    register_checkpoint_conversion_mapping(model_class.__name__, mapping, overwrite=True)


class VisPrunerModelMixin:
    """For the base model (encoder, projector, language model): encode with saliency, then select."""

    config: Any
    vision_tower: Any
    _keys_to_ignore_on_load_unexpected: Any

    def prepare_pruning(self) -> None:
        """Check that this config can be pruned and make the tower tappable. Raises ValueError with the remedy."""
        options = self.vispruner_options
        if options.method != "none":
            if options.method not in SELECTORS:
                allowed = [*sorted(SELECTORS), "none"]
                raise ValueError(f"vispruner_config.method must be one of {allowed}, got {options.method!r}")
            tower, strategy = self.config.vision_config.model_type, self.config.vision_feature_select_strategy
            if tower != "clip_vision_model":
                raise ValueError(
                    f"vision_config.model_type must be clip_vision_model, got {tower!r}: tokens are ranked by the "
                    'attention of a [CLS] token, which it lacks (vispruner_config.method="none" loads it dense)'
                )
            self.require_patches(strategy)
            self._check_layers_and_budget(options)
        if self.config.vision_config.model_type == "clip_vision_model":
            make_tappable([layer.self_attn for layer in self.vision_layers])
            if used_vision_layers(self.config) == len(self.vision_layers):
                # Layers above those are not missed: loading need not warn of a base that still has them.
                self._keys_to_ignore_on_load_unexpected.add(DROPPED_LAYERS)

    def _check_layers_and_budget(self, options: VisPrunerOptions) -> None:
        feature_layer, vision = self.config.vision_feature_layer, self.config.vision_config
        indices = [feature_layer] if isinstance(feature_layer, int) else feature_layer
        resolve_attention_layer(options.attention_layer, indices, len(self.vision_layers))
        patches = (vision.image_size // vision.patch_size) ** 2
        if options.budget(patches) == patches:
            logger.warning_once(
                f"vispruner_config keeps all {patches} visual tokens of an image or tile, so nothing is pruned; "
                "lower visual_token_num or keep_ratio to prune"
            )

    @staticmethod
    def require_patches(strategy: str | None) -> None:
        """Raise ValueError unless features are patches without [CLS], the only ones that can be ranked."""
        if strategy not in (None, "default"):
            raise ValueError(
                f'vision_feature_select_strategy must be "default" (patches without [CLS]), got {strategy!r}'
            )

    @property
    def vispruner_options(self) -> VisPrunerOptions:
        if getattr(self.config, "vispruner_config", None) is None:
            raise ValueError(
                "config.vispruner_config is missing: pass vispruner_config={'visual_token_num': 128} to "
                "from_pretrained, or {'method': 'none'} for the dense model"
            )
        return VisPrunerOptions.from_dict(self.config.vispruner_config)

    @property
    def vision_layers(self) -> Sequence[Any]:
        return getattr(self.vision_tower, "vision_model", self.vision_tower).encoder.layers

    def encode_with_saliency(
        self, pixel_values: torch.Tensor, feature_layer: int | list[int], **kwargs: Any
    ) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """Run the vision tower on (B, 3, height, width); return its output, features (B, N, C) and saliency (B, N)."""
        layer = self.vispruner_options.attention_layer
        return encode_with_saliency(
            self.vision_tower, self.vision_layers, pixel_values, feature_layer, layer, **kwargs
        )

    def select(self, features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int) -> torch.Tensor:
        """Return the kept indices (B, T), ascending, by the configured method."""
        options = self.vispruner_options
        return select_tokens(
            options.method,
            features.detach(),
            saliency,
            visual_token_num,
            important_ratio=options.important_ratio,
            dedup_step=options.dedup_step,
            seed=options.seed,
        )

    def keeps_all(self, visual_tokens: int) -> bool:
        """True when the budget leaves nothing to drop from the `visual_tokens` tokens of an image or tile."""
        return self.vispruner_options.budget(visual_tokens) == visual_tokens

    def keep_everything(self, outputs: Any, kept_indices: list[torch.Tensor]) -> "PrunedImageFeatures":
        """Describe a stock vision output, of which nothing was dropped, in the terms of a pruned one."""
        counts = [len(image) for image in outputs.pooler_output]
        placeholders = [torch.arange(count, device=outputs.pooler_output[0].device) for count in counts]
        return PrunedImageFeatures(**outputs, kept_indices=kept_indices, placeholders=placeholders, full_counts=counts)

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """Stock, but for its message, which waits for the device once more: it is written only when the check fails.

        So a prompt that is shortened, which takes one look at its ids, is waited for no more often than a stock one.
        """
        if input_ids is None:
            return super().get_placeholder_mask(input_ids, inputs_embeds, image_features)  # type: ignore[misc]
        mask = input_ids == self.config.image_token_id
        tokens = mask.sum()
        torch_compilable_check(
            tokens * inputs_embeds.shape[-1] == image_features.numel(),
            lambda: (
                f"the prompt has {tokens} image placeholders (id {self.config.image_token_id}), but the images have "
                f"{image_features.numel() // inputs_embeds.shape[-1]} visual tokens"
            ),
        )
        return mask[..., None].to(inputs_embeds.device)

    def take_tokens(self, features: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Gather (B, N, C) at (B, T) -> (B, T, C)."""
        return features.gather(1, indices[..., None].expand(-1, -1, features.shape[-1]))
