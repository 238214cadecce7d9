"""LLaVA-OneVision with visual token pruning: SigLIP has no [CLS], so patches are ranked by the attention they receive.

Images are packed as stock packs them, newlines kept (`tile_mode` is a field of LLaVA-NeXT and says nothing here). An
image has two pools of tokens: of its base tile T stay, and of the packed grid of its other tiles T for every tile. A
video is pruned frame by frame, after pooling. Where stock interpolates tokens (that pooling, and the grids that
anyres_max_N scales down), the features and the attention that they are chosen by are interpolated alike.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationMixin,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
)
from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape
from transformers.utils import can_return_tuple

from .configuration_vispruner import VisPrunerConfigMixin, VisPrunerOptions
from .llava_encoder import TowerEncoderMixin
from .prompt_reading import Modality, Prompt
from .pruned_encoder import inherit_checkpoint_conversion
from .pruned_forward import forward_of
from .pruning_mixin import VisPrunerMixin
from .selector_registry import Selection, joined
from .stock_versions import TAKES_FEATURES
from .visual_features import PrunedImageFeatures, TokenView, VisualTokens, frames_in_order, numbered_by_tile

NEWLINE = -1
FEATURE_CHOICE = ("vision_feature_layer", "vision_feature_select_strategy")


class VisPrunerLlavaOnevisionConfig(VisPrunerConfigMixin, LlavaOnevisionConfig):
    """`LlavaOnevisionConfig` with a `vispruner_config` block."""

    vispruner_config: dict | None = None


@dataclass(frozen=True)
class Packing:
    """How stock lines up one image's tokens; on the host.

    size    (height, width) of the original image
    tiles   how many it is cut into, the base tile first
    order   (n,) tile * N + patch of each token, newline = -1; the patch nearest to it where `scaled`
    scaled  whether tokens are interpolated between patches
    """

    size: list[int]
    tiles: int
    order: torch.Tensor
    scaled: bool

    @property
    def newlines(self) -> int:
        return int((self.order == NEWLINE).sum())

    def rest(self, base: int) -> tuple[int, int]:
        """Return rows and columns of what follows the `base` tokens of the base tile, without newlines.

        Unpadding leaves no row, or no column, of a picture that is hardly a pixel high or wide.
        """
        rows = self.newlines if self.tiles > 1 else 0
        return rows, (len(self.order) - base) // rows - 1 if rows else 0


class PackedTiles:
    """How stock lines up the tiles of images, and which of these tokens stay. Whoever has it, has:

    config         the model's
    image_newline  (D,), project and select_each, as the model has them, to choose and not only to count
    """

    config: Any
    image_newline: torch.Tensor
    pack_image_features = LlavaOnevisionModel.pack_image_features

    @property
    def side(self) -> int:
        """Patches along one side of a tile."""
        return self.config.vision_config.image_size // self.config.vision_config.patch_size

    def project(self, features: torch.Tensor) -> torch.Tensor:
        raise AttributeError(f"{type(self).__name__} must say how features are projected")

    def select_each(self, images: Sequence[VisualTokens], budgets: Sequence[int]) -> list[Selection]:
        raise AttributeError(f"{type(self).__name__} must say which tokens stay")

    def packing_of(self, size: list[int], anyres: bool = True) -> Packing:
        """Return how stock packs an image of a size, from its base tile alone where not `anyres`."""
        side, rows, columns = self.side, 0, 0
        if anyres:
            pinpoints, tile_size = self.config.image_grid_pinpoints, self.config.vision_config.image_size
            rows, columns = get_anyres_image_grid_shape(size, pinpoints, tile_size)
        tile, patch = torch.arange(rows * columns)[:, None], torch.arange(side**2)
        y = torch.cat([patch[None] // side, tile // max(columns, 1) * side + patch // side])
        x = torch.cat([patch[None] % side, tile % max(columns, 1) * side + patch % side])
        places = self._pack(torch.stack([y, x], dim=-1).double(), size, torch.full((2,), torch.nan).double())
        newline = places.isnan().any(-1)
        nearest = places.nan_to_num().round()
        y, x = nearest.long().unbind(-1)
        tile = 1 + y // side * columns + x // side
        tile[: side**2] = 0
        order = (tile * side**2 + y % side * side + x % side).masked_fill(newline, NEWLINE)
        return Packing(size, 1 + rows * columns, order, not torch.equal(nearest, places.nan_to_num()))

    def _pack(self, tiles: torch.Tensor, size: list[int], newline: torch.Tensor) -> torch.Tensor:
        """Line up what an image's tiles (tiles, N, channels) have, as stock does -> (n, channels)."""
        packed, _ = self.pack_image_features(
            [tiles], [size], image_newline=newline, vision_aspect_ratio=self.config.vision_aspect_ratio
        )
        return packed[0]

    def budgets_of(self, packing: Packing, options: VisPrunerOptions) -> tuple[int, int]:
        """Return how many tokens of the base tile and of the rest of an image stay."""
        base = self.side**2
        rest = math.prod(packing.rest(base))
        if options.method == "none" or options.visual_token_num is None:
            return options.budget(base), options.budget(rest) if rest else 0
        return options.budget(base), min(rest, options.visual_token_num * (packing.tiles - 1))

    def choose_packed(
        self, tokens: VisualTokens, packings: list[Packing], budgets: Sequence[tuple[int, int]]
    ) -> list[Selection]:
        """Return per image which tokens of its packing stay, ascending.

        tokens   of all tiles of all images
        budgets  per image how many tokens of its base tile and of the rest stay
        """
        base, device = self.side**2, tokens.features.device
        tiles = channels_of(tokens).split([packing.tiles for packing in packings])
        bases = [
            replace(tokens_in(image[:1], tokens, (self.side, self.side)), owners=(number,))
            for number, image in enumerate(tiles)
        ]
        kept_of_base = self.select_each(bases, [of_base for of_base, _ in budgets])
        rests, budgets_of_rests = [], []
        for number, (image, packing, (_, of_rest)) in enumerate(zip(tiles, packings, budgets, strict=True)):
            rows, columns = packing.rest(base)
            if rows * columns:
                packed = self._pack(image, packing.size, image.new_zeros(image.shape[-1]))
                grid = packed[base:].unflatten(0, (rows, columns + 1))[:, :columns].flatten(0, 1)
                rests.append(replace(tokens_in(grid[None], tokens, (rows, columns)), owners=(number,)))
                budgets_of_rests.append(of_rest)
        kept_of_rests = iter(self.select_each(rests, budgets_of_rests))
        chosen = []
        for packing, of_base in zip(packings, kept_of_base, strict=True):
            newlines = (packing.order == NEWLINE).nonzero()[:, 0].to(device, non_blocking=True)
            parts = [of_base, Selection(newlines[None])]
            rows, columns = packing.rest(base)
            if rows * columns:
                grid = torch.arange(rows * columns, device=device)
                parts.append(next(kept_of_rests).placed(base + grid + grid // columns))
            chosen.append(joined(parts).ascending())
        return chosen

    def tokens_at(
        self, features: torch.Tensor, packing: Packing, selection: Selection, folds_projected: bool = False
    ) -> torch.Tensor:
        """Project one image's features (tiles, N, C) to what stays of the visual tokens of its packing.

        folds_projected  whether the method folds together what is projected, and not features
        """
        if packing.scaled or folds_projected:  # stock interpolates what is projected
            packed = self._pack(self.project(features), packing.size, self.image_newline)
            return selection.take(packed[None])[0]
        order = packing.order.to(features.device, non_blocking=True)
        patches = selection.placed(order.clamp(min=0)).take(features.flatten(0, 1)[None])[0]
        tokens = self.project(patches)
        is_newline = order[selection.indices[0]] == NEWLINE
        return torch.where(is_newline[:, None], self.image_newline.to(tokens), tokens)


class VisPrunerLlavaOnevisionModel(TowerEncoderMixin, PackedTiles, LlavaOnevisionModel):
    """`LlavaOnevisionModel` whose `get_image_features` and `get_video_features` return only the kept visual tokens."""

    config_class = VisPrunerLlavaOnevisionConfig
    modalities = (
        Modality("image", "pixel_values", ("image_sizes", "batch_num_images", *FEATURE_CHOICE), "image_token_id"),
        Modality("video", "pixel_values_videos", FEATURE_CHOICE, "video_token_id"),
    )
    has_cls_token = False
    tower_types = ("siglip_vision_model",)
    select_strategy = "full"
    budget_unit = "tile of an image or frame of a video"
    images_are_grids = False  # newlines stand between them
    stage_hindrance = "large images and frames of videos are interpolated, so what left would be part of what stays"

    forward = forward_of(LlavaOnevisionModel)

    def read_prompt(self, inputs: Mapping[str, Any], **known: Any) -> Prompt:
        """As ever; an image is packed as the config says, which the number of its placeholders depends on."""
        configured, method = self.config.vision_aspect_ratio, self.encoder_options.method
        if (given := inputs.get("vision_aspect_ratio")) not in (None, configured) and method != "none":
            raise ValueError(
                f"vision_aspect_ratio is {given!r}, but prompts are shortened for config.vision_aspect_ratio "
                f"{configured!r}: change it there"
            )
        return super().read_prompt(inputs, **known)

    def must_encode(self, inputs: Mapping[str, Any]) -> bool:
        """As ever; and where stock takes no features, it adds the newline behind a video itself, as ours have it."""
        return super().must_encode(inputs) or (not TAKES_FEATURES and "pixel_values_videos" in inputs)

    @property
    def frame_tokens(self) -> int:
        """Tokens of a frame, after pooling."""
        return math.ceil(self.side / 2) ** 2

    def packings(self, image_sizes: torch.Tensor | None, batch_num_images: Any = None) -> list[Packing]:
        """Return how stock packs each image; one that shares its prompt with others is its base tile alone."""
        if image_sizes is None:
            raise ValueError("image_sizes is missing: pass the processor's image_sizes together with pixel_values")
        sizes = torch.as_tensor(image_sizes).tolist()
        together = [1] * len(sizes) if batch_num_images is None else torch.as_tensor(batch_num_images).tolist()
        alone = [images == 1 for images in together for _ in range(images)]
        if len(alone) != len(sizes):
            raise ValueError(f"batch_num_images counts {len(alone)} images, but image_sizes has {len(sizes)}")
        return [self.packing_of(size, anyres) for size, anyres in zip(sizes, alone, strict=True)]

    def image_views(self, pixel_values: torch.Tensor, **arguments: Any) -> list[list[TokenView]]:
        """Return the tiles of each image: the base tile left of the others, which stand as in the image."""
        packings = self.packings(arguments["image_sizes"], arguments.get("batch_num_images"))
        tiles = [packing.tiles for packing in packings]
        images = pixel_values if pixel_values.dim() == 5 else pixel_values.split(tiles)
        views = []
        for image, packing in zip(images, packings, strict=True):
            pinpoints, tile_size = self.config.image_grid_pinpoints, self.config.vision_config.image_size
            columns = get_anyres_image_grid_shape(packing.size, pinpoints, tile_size)[1]
            places = [(0, 0)] + [(tile // columns, 1 + tile % columns) for tile in range(packing.tiles - 1)]
            pools = [0] + [1] * (packing.tiles - 1)
            parts = zip(image[: packing.tiles], places, pools, strict=True)
            views.append([TokenView(tile, (self.side, self.side), place, pool) for tile, place, pool in parts])
        return views

    def video_views(self, pixel_values_videos: torch.Tensor, **arguments: Any) -> list[list[TokenView]]:
        """Return the frames of each video, side by side."""
        side = math.ceil(self.side / 2)
        return [
            [TokenView(frame, (side, side), (0, number)) for number, frame in enumerate(video)]
            for video in pixel_values_videos
        ]

    def image_token_counts(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        batch_num_images: Any = None,
        **arguments: Any,
    ) -> tuple[list[int], list[int]]:
        """Return per image the visual tokens of a full prompt and those that are kept."""
        packings = self.packings(image_sizes, batch_num_images)
        budgets = [self.budgets_of(packing, self.encoder_options) for packing in packings]
        kept = [sum(both) + packing.newlines for both, packing in zip(budgets, packings, strict=True)]
        return [len(packing.order) for packing in packings], kept

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        batch_num_images: Any = None,
        **kwargs: Any,
    ) -> PrunedImageFeatures:
        """Encode (images, tiles, 3, h, w) or (all tiles, 3, h, w), pack, select, project."""
        packings = self.packings(image_sizes, batch_num_images)
        budgets = [self.budgets_of(packing, self.encoder_options) for packing in packings]
        kept = [sum(both) + packing.newlines for both, packing in zip(budgets, packings, strict=True)]
        if not self.is_told_by_encoder and kept == [len(packing.order) for packing in packings]:
            outputs = super().get_image_features(
                pixel_values,
                image_sizes,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                batch_num_images=batch_num_images,
                return_dict=True,
                **kwargs,
            )
            return self.keep_everything(outputs, [packing.order.to(pixel_values.device) for packing in packings])
        self.require_patches(vision_feature_select_strategy)
        tiles = [packing.tiles for packing in packings]
        if pixel_values.dim() == 5:
            pixel_values = torch.cat([image[:count] for image, count in zip(pixel_values, tiles, strict=True)])
        outputs, tokens = self.encode(pixel_values, vision_feature_layer, **kwargs)
        chosen = self.choose_packed(tokens, packings, budgets)
        placeholders = [selection.indices[0] for selection in chosen]
        images = zip(tokens.features.split(tiles), packings, chosen, strict=True)
        orders = [packing.order.to(pixel_values.device, non_blocking=True) for packing in packings]
        return self.pruned_output(
            outputs,
            kwargs,
            tokens,
            pooler_output=[self.tokens_at(*image, self.folds_projected) for image in images],
            kept_indices=[order[places] for order, places in zip(orders, placeholders, strict=True)],
            placeholders=placeholders,
            full_counts=[len(packing.order) for packing in packings],
            merged_into=_merged_into(chosen, packings, base=self.side**2),
            tiles=tiles,
        )

    def video_token_counts(self, pixel_values_videos: torch.Tensor, **arguments: Any) -> tuple[list[int], list[int]]:
        """Return per video the visual tokens of a full prompt and those that are kept."""
        videos, frames = pixel_values_videos.shape[:2]
        kept = frames * self.encoder_options.budget(self.frame_tokens)
        return [frames * self.frame_tokens + 1] * videos, [kept + 1] * videos

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> PrunedImageFeatures:
        """Encode (videos, frames, 3, h, w), pool, select in each frame; `pooler_output` is (videos, tokens, D)."""
        videos, frames = pixel_values_videos.shape[:2]
        newline = self.image_newline.expand(videos, 1, -1)
        if self.keeps_all(self.frame_tokens):
            outputs = super().get_video_features(
                pixel_values_videos,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                return_dict=True,
                **kwargs,
            )
            if not TAKES_FEATURES:
                outputs.pooler_output = torch.cat([outputs.pooler_output, newline.to(outputs.pooler_output)], dim=1)
            order = torch.arange(frames * self.frame_tokens, device=pixel_values_videos.device)
            return self.keep_everything(outputs, [nn.functional.pad(order, (0, 1), value=NEWLINE)] * videos)
        self.require_patches(vision_feature_select_strategy)
        outputs, tokens = self.encode(pixel_values_videos.flatten(0, 1), vision_feature_layer, **kwargs)
        side = math.ceil(self.side / 2)
        pooled = tokens_in(self.apply_pooling(channels_of(tokens)), tokens, (side, side))
        of_videos = frames_in_order(videos, frames)
        pooled = replace(pooled, videos=of_videos, owners=of_videos)
        selection = self.select(pooled, self.encoder_options.budget(self.frame_tokens))
        visual = selection.take(self.apply_pooling(self.project(tokens.features)))
        visual = visual.unflatten(0, (videos, frames)).flatten(1, 2)
        start = torch.arange(frames, device=visual.device)[:, None] * self.frame_tokens
        places = (selection.indices.unflatten(0, (videos, frames)) + start).flatten(1)
        full = frames * self.frame_tokens
        return self.pruned_output(
            outputs,
            kwargs,
            pooled,
            pooler_output=torch.cat([visual, newline.to(visual)], dim=1),
            kept_indices=list(nn.functional.pad(places, (0, 1), value=NEWLINE)),
            placeholders=list(nn.functional.pad(places, (0, 1), value=full)),
            full_counts=[full + 1] * videos,
            merged_into=None
            if selection.merge is None
            else numbered_by_tile(selection.merged_into(self.frame_tokens), [frames] * videos),
            tiles=[frames] * videos,
        )


def _merged_into(chosen: list[Selection], packings: list[Packing], base: int) -> torch.Tensor | None:
    """Return where the patches (tiles, N) of all images went; None where stock interpolates between them."""
    if all(selection.merge is None for selection in chosen) or any(packing.scaled for packing in packings):
        return None
    went = []
    for selection, packing in zip(chosen, packings, strict=True):
        into = selection.merged_into(len(packing.order))[0]
        order = packing.order.to(into.device)
        is_patch = order != NEWLINE
        patches = torch.full((packing.tiles * base,), -1, device=into.device)
        patches[order[is_patch]] = order[into.clamp(min=0)].masked_fill(into < 0, -1)[is_patch]
        went.append(patches.view(packing.tiles, base))
    return torch.cat(went)


def channels_of(tokens: VisualTokens) -> torch.Tensor:
    """Return all that tokens are chosen by as channels, so that it is interpolated in one piece: (B, N, channels)."""
    layers = [] if tokens.layer_saliency is None else [tokens.layer_saliency.transpose(1, 2)]
    features = tokens.features.detach().to(torch.promote_types(tokens.features.dtype, torch.float32))
    parts = (features, tokens.saliency[..., None], *tokens.further.values(), *layers)
    return torch.cat([part.to(features) for part in parts], dim=-1)


def tokens_in(channels: torch.Tensor, like: VisualTokens, grid: tuple[int, int]) -> VisualTokens:
    """Undo `channels_of`, in the dtypes of `like`."""
    widths = [like.features.shape[-1], 1, *(given.shape[-1] for given in like.further.values())]
    features, saliency, *further, layers = channels.split([*widths, channels.shape[-1] - sum(widths)], dim=-1)
    return VisualTokens(
        features.to(like.features),
        saliency[..., 0].to(like.saliency),
        layers.transpose(1, 2) if like.layer_saliency is not None else None,
        grid,
        further=dict(zip(like.further, further, strict=True)),
    )


class VisPrunerLlavaOnevisionForConditionalGeneration(
    VisPrunerMixin, LlavaOnevisionForConditionalGeneration, GenerationMixin
):
    """`LlavaOnevisionForConditionalGeneration` that prunes visual tokens by `vispruner_config` (arXiv 2412.01818)."""

    config_class = VisPrunerLlavaOnevisionConfig
    base_class = VisPrunerLlavaOnevisionModel

    forward = forward_of(LlavaOnevisionForConditionalGeneration)


inherit_checkpoint_conversion(VisPrunerLlavaOnevisionForConditionalGeneration, "llava_onevision")
inherit_checkpoint_conversion(VisPrunerLlavaOnevisionModel, "LlavaOnevisionModel")
