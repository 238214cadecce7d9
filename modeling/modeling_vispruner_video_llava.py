"""Video-LLaVA with visual token pruning: an image tower and a video tower, both with a [CLS] that ranks the patches.

Every image and every frame keeps T of its N patches. [CLS], which stock hands to the language model with each frame of
a video (never with an image), stays on top of T. The paper's budgets are for 8 frames of 256 patches: 455, 227 and 114
of 2048 are 56.9, 28.4 and 14.3 a frame, so T = 57, 28 and 14: they keep 456, 224 and 112 patches, and 8 [CLS].
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationMixin,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaModel,
)
from transformers.utils import can_return_tuple

from .configuration_vispruner import VisPrunerConfigMixin
from .llava_encoder import TowerEncoderMixin, layers_of
from .prompt_reading import Modality
from .pruned_encoder import inherit_checkpoint_conversion
from .pruned_forward import forward_of
from .pruning_mixin import VisPrunerMixin
from .selectors import SELECTORS
from .stock_versions import VIDEO_LLAVA_IMAGE_NAMES, VIDEO_LLAVA_IMAGES, by_stock_name
from .visual_attention import make_tappable
from .visual_features import PrunedImageFeatures, TokenView, frames_in_order


class VisPrunerVideoLlavaConfig(VisPrunerConfigMixin, VideoLlavaConfig):
    """`VideoLlavaConfig` with a `vispruner_config` block."""

    vispruner_config: dict | None = None


class VisPrunerVideoLlavaModel(TowerEncoderMixin, VideoLlavaModel):
    """`VideoLlavaModel` whose `get_image_features` and `get_video_features` return only the kept visual tokens."""

    config_class = VisPrunerVideoLlavaConfig
    modalities = (
        Modality(
            "image", VIDEO_LLAVA_IMAGES, ("vision_feature_layer", "vision_feature_select_strategy"), "image_token_id"
        ),
        Modality("video", "pixel_values_videos", ("vision_feature_layer",), "video_token_id"),
    )
    image_names = VIDEO_LLAVA_IMAGE_NAMES
    budget_unit = "image or frame of a video"
    images_are_grids = False  # [CLS] is among those of frames

    forward = forward_of(VideoLlavaModel, *VIDEO_LLAVA_IMAGE_NAMES)

    @property
    def vision_layers(self) -> Sequence[Any]:
        return layers_of(self.image_tower)

    def make_prunable(self) -> None:
        """As ever, for the video tower too: the layers of both, made from one config, go by the same numbers."""
        super().make_prunable()
        if self._has_known_tower:
            make_tappable([layer.self_attn for layer in layers_of(self.video_tower)])

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        pixel_values_images: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> PrunedImageFeatures:
        """Encode (B, 3, height, width), select, project; `pooler_output` is (B, T, D)."""
        names = {"pixel_values": pixel_values, "pixel_values_images": pixel_values_images}
        pixels = by_stock_name(names, VIDEO_LLAVA_IMAGE_NAMES, VIDEO_LLAVA_IMAGES)[VIDEO_LLAVA_IMAGES]
        if self.keeps_all(patches := self.patches_of(pixels)):
            outputs = super().get_image_features(
                pixels,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                return_dict=True,
                **kwargs,
            )
            return self.keep_everything(outputs, self.dense_numbers(outputs.pooler_output, patches))
        self.require_patches(vision_feature_select_strategy)
        outputs, _, tokens = self.encode_with(self.image_tower, pixels, vision_feature_layer, **kwargs)
        return self.prune(outputs, tokens, kwargs)

    def video_views(self, pixel_values_videos: torch.Tensor, **arguments: Any) -> list[list[TokenView]]:
        """Return every frame as an image of its own; [CLS] has no place in it."""
        return self.image_views(pixel_values_videos.flatten(0, 1))

    def video_token_counts(self, pixel_values_videos: torch.Tensor, **arguments: Any) -> tuple[list[int], list[int]]:
        """Return per frame the visual tokens of a full prompt and those that are kept, [CLS] among them."""
        patches, frames = self.patches_of(pixel_values_videos), pixel_values_videos.shape[:2].numel()
        return [1 + patches] * frames, [1 + self.encoder_options.budget(patches)] * frames

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        **kwargs: Any,
    ) -> PrunedImageFeatures:
        """Encode (videos, frames, 3, h, w), select, project; `pooler_output` is (videos * frames, 1 + T, D).

        What `PrunedImageFeatures` tells per image is told per frame here; the kept index of [CLS] is -1.
        """
        if self.keeps_all(self.patches_of(pixel_values_videos)):
            outputs = super().get_video_features(
                pixel_values_videos, vision_feature_layer=vision_feature_layer, return_dict=True, **kwargs
            )
            frames, tokens = outputs.pooler_output.shape[:2]
            return self.keep_everything(outputs, list(torch.arange(-1, tokens - 1).expand(frames, -1)))
        frames = pixel_values_videos.flatten(0, 1)
        outputs, states, tokens = self.encode_with(self.video_tower, frames, vision_feature_layer, **kwargs)
        if "cls_feature" in SELECTORS[self.encoder_options.method].uses:  # to keep it, and here it stays in any case
            further = {name: given for name, given in tokens.further.items() if name != "cls_feature"}
            tokens = replace(tokens, further=further)
        patches = tokens.saliency.shape[1]
        tokens = replace(tokens, videos=frames_in_order(*pixel_values_videos.shape[:2]))
        selection = self.select(tokens, self.encoder_options.budget(patches))
        places = nn.functional.pad(1 + selection.indices, (1, 0))
        folded = self.project(states) if self.folds_projected else states
        with_cls = torch.cat([folded[:, :1], selection.take(folded[:, 1:])], dim=1)
        return self.pruned_output(
            outputs,
            kwargs,
            tokens,
            pooler_output=with_cls if self.folds_projected else self.project(with_cls),
            kept_indices=list(places - 1),
            placeholders=list(places),
            full_counts=[1 + patches] * len(frames),
            merged_into=None if selection.merge is None else selection.merged_into(patches),
        )


class VisPrunerVideoLlavaForConditionalGeneration(VisPrunerMixin, VideoLlavaForConditionalGeneration, GenerationMixin):
    """`VideoLlavaForConditionalGeneration` that prunes visual tokens by its `vispruner_config` (arXiv 2412.01818)."""

    config_class = VisPrunerVideoLlavaConfig
    base_class = VisPrunerVideoLlavaModel

    forward = forward_of(VideoLlavaForConditionalGeneration, *VIDEO_LLAVA_IMAGE_NAMES)


inherit_checkpoint_conversion(VisPrunerVideoLlavaForConditionalGeneration, "video_llava")
inherit_checkpoint_conversion(VisPrunerVideoLlavaModel, "VideoLlavaModel")
