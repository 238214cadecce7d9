"""What the LLaVA family shares: a tower whose attention ranks the patches (CLIP, SigLIP, DINOv2, ViT); a projector."""

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.utils.import_utils import torch_compilable_check

from .cpu_workarounds import pad_slow_rows
from .encoder_stage import EncoderStage
from .pruned_encoder import VisPrunerModelMixin, remaining_by_saliency
from .selectors import SELECTORS
from .visual_attention import run_tower
from .visual_features import VisualTokens


class TowerEncoderMixin(VisPrunerModelMixin):
    """Encode (B, 3, height, width) with a tower of transformer layers, rank and project the patches.

    tower_types      model_type of the towers whose attention is read
    select_strategy  the `vision_feature_select_strategy` by which features are the patches alone
    """

    vision_tower: Any
    multi_modal_projector: Any
    tower_types: tuple[str, ...] = ("clip_vision_model",)
    select_strategy = "default"

    @property
    def vision_layers(self) -> Sequence[Any]:
        return layers_of(self.vision_tower)

    @property
    def selector_inputs(self) -> frozenset[str]:
        of_cls = {"cls_query", "raw_keys"} if self.has_cls_token else set()
        return super().selector_inputs | of_cls

    @property
    def feature_layer(self) -> int:
        return self._producer_of(self.config.vision_feature_layer)

    def _producer_of(self, indices: int | list[int]) -> int:
        layers = len(self.vision_layers)
        deepest = max(index % (layers + 1) for index in ([indices] if isinstance(indices, int) else indices))
        if deepest == 0:
            raise ValueError("vision_feature_layer 0 is the embedding, which no attention layer produces")
        return deepest - 1

    def check_prunable(self) -> None:
        vision = self.config.vision_config
        if not self._has_known_tower:
            ranks = "of a [CLS] token, which is read of these alone" if self.has_cls_token else "of that encoder"
            raise ValueError(
                f"vision_config.model_type must be {' or '.join(self.tower_types)}, got {vision.model_type!r}: tokens "
                f'are ranked by the attention {ranks} (vispruner_config.method="none" loads it dense)'
            )
        self.require_patches(self.config.vision_feature_select_strategy)
        for name in ("image_size", "patch_size"):
            if not isinstance(size := getattr(vision, name), int):
                raise ValueError(f"vision_config.{name} must be one number, the side of a square, got {size!r}")
        self.warn_if_all_are_kept((vision.image_size // vision.patch_size) ** 2)

    @property
    def _has_known_tower(self) -> bool:
        return self.config.vision_config.model_type in self.tower_types

    @property
    def register_tokens(self) -> int:
        """How many tokens stand between [CLS] and the patches: registers, which are of no place in the picture."""
        return int(getattr(self.config.vision_config, "num_register_tokens", 0))

    def patches_of(self, pixel_values: torch.Tensor) -> int:
        """Return the patches of each image in (..., height, width)."""
        height, width = pixel_values.shape[-2:]
        patch = self.config.vision_config.patch_size
        return (height // patch) * (width // patch)

    def image_token_counts(
        self, pixel_values: torch.Tensor, *, vision_feature_select_strategy: str | None = None, **arguments: Any
    ) -> tuple[list[int], list[int]]:
        """Return per image the visual tokens of a full prompt and those that are kept.

        Where nothing is dropped the strategy may keep [CLS]. Of a tower that cannot be pruned what stands before the
        patches is not known, and only they are counted.
        """
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        patches, images = self.patches_of(pixel_values), len(pixel_values)
        with_cls = strategy == "full" and self.has_cls_token and self._has_known_tower
        full = int(with_cls) + self.register_tokens + patches
        kept = full if self.keeps_all(patches) else self.encoder_options.budget(patches)
        return [full] * images, [kept] * images

    def dense_numbers(self, images: Sequence[torch.Tensor], patches: int) -> list[torch.Tensor]:
        """Return of each image that stock encoded which patch each token is: -1 for those before the patches.

        Of a tower that cannot be pruned they are counted from the first, for it may cut patches off.
        """
        before = len(images[0]) - patches if len(images) and self._has_known_tower else 0
        return [(torch.arange(len(image), device=image.device) - before).clamp(min=-1) for image in images]

    def make_prunable(self) -> None:
        if self._has_known_tower:
            super().make_prunable()

    def require_patches(self, strategy: str | None) -> None:
        """Raise ValueError unless features are patches without [CLS], the only ones that can be ranked."""
        if strategy not in (None, self.select_strategy):
            patches = "patches without [CLS]" if self.has_cls_token else "all patches"
            raise ValueError(
                f'vision_feature_select_strategy must be "{self.select_strategy}" ({patches}), got {strategy!r}'
            )

    def encode(
        self, pixel_values: torch.Tensor, feature_layer: int | list[int] | None, **kwargs: Any
    ) -> tuple[Any, VisualTokens]:
        """Run the tower on (B, 3, height, width); return its output and what selectors look at."""
        outputs, _, tokens = self.encode_with(self.vision_tower, pixel_values, feature_layer, **kwargs)
        return outputs, tokens

    def encode_with(
        self, tower: Any, pixel_values: torch.Tensor, feature_layer: int | list[int] | None, **kwargs: Any
    ) -> tuple[Any, torch.Tensor, VisualTokens]:
        """As `encode`, with a tower of choice; the features of all its tokens, [CLS] among them, come in between."""
        layer = self.config.vision_feature_layer if feature_layer is None else feature_layer
        kwargs["output_hidden_states"] = self.wants_hidden_states(kwargs)
        patch = self.config.vision_config.patch_size
        grid = (pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch)
        stage, before = self._stage(layers_of(tower), math.prod(grid)), self.register_tokens + int(self.has_cls_token)
        with self.open_tap(feature_layer=self._producer_of(layer), stage=stage) as tap:
            outputs, states = run_tower(tower, pixel_values, layer, tap, before, **kwargs)
        features, further = states, tap.further
        if self.has_cls_token:
            features = states[:, 1:]
            selector = SELECTORS[self.encoder_options.method]
            if "cls_feature" in selector.needs | selector.uses:
                further["cls_feature"] = states[:, 0]
        tokens = VisualTokens(features, tap.saliency, tap.layer_saliency, grid, further=further)
        tokens = tokens.behind(self.register_tokens)
        if stage is not None:
            tokens = replace(tokens, remain=stage.remain, left=stage.count)
        return outputs, states, tokens

    def _stage(self, layers: Sequence[Any], patches: int) -> EncoderStage | None:
        """Return what lets patches leave between layers of a tower; None where none do."""
        if (count := self.remaining_count(patches)) == patches:
            return None
        choose = functools.partial(remaining_by_saliency, count=count)
        return self.stage_behind(layers, choose, count, registers=self.register_tokens)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        return self.multi_modal_projector(features)


class LlavaEncoderMixin(TowerEncoderMixin):
    """For `LlavaModel` and its like, whose prompts hold images alone. Towers with a [CLS], which ranks."""

    tower_types = ("clip_vision_model", "dinov2", "dinov2_with_registers", "vit")

    @property
    def has_common_space(self) -> bool:  # type: ignore[override]
        is_clip = self.config.vision_config.model_type == "clip_vision_model"
        return is_clip and isinstance(self.config.vision_feature_layer, int)

    @property
    def last_norm_weight(self) -> torch.Tensor:
        return transformer_of(self.vision_tower).post_layernorm.weight.detach()

    def last_normed(self, features: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return transformer_of(self.vision_tower).post_layernorm(features)

    def make_prunable(self) -> None:
        super().make_prunable()
        if self._has_known_tower:
            transformer_of(self.vision_tower).embeddings.register_forward_hook(pad_slow_rows)

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


def layers_of(tower: Any) -> Sequence[Any]:
    """Return the transformer layers of a tower."""
    transformer = transformer_of(tower)
    stack = getattr(transformer, "encoder", transformer)
    return stack.layers if hasattr(stack, "layers") else stack.layer


def transformer_of(tower: Any) -> Any:
    """Return what holds the embeddings and layers of a tower: itself, or a module within it."""
    return getattr(tower, "vision_model", tower)
