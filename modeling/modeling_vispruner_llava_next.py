"""LLaVA-NeXT (v1.6) with visual token pruning: every tile of an image is pruned on its own.

tile_mode "paper": the kept tokens of the base tile, then those of the other tiles in the raster order of the stitched
grid; T tokens a tile, no newlines. "native": stock packing of the kept tokens that survive unpadding, newlines kept.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationMixin, LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextModel
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from transformers.utils import can_return_tuple

from .configuration_vispruner import VisPrunerConfigMixin
from .llava_encoder import LlavaEncoderMixin
from .pruned_encoder import inherit_checkpoint_conversion
from .pruned_forward import forward_of
from .pruning_mixin import VisPrunerMixin
from .selector_registry import Selection
from .visual_features import PrunedImageFeatures, TokenView, VisualTokens, numbered_by_tile

NEWLINE = -1


class VisPrunerLlavaNextConfig(VisPrunerConfigMixin, LlavaNextConfig):
    """`LlavaNextConfig` with a `vispruner_config` block."""

    vispruner_config: dict | None = None


class VisPrunerLlavaNextModel(LlavaEncoderMixin, LlavaNextModel):
    """`LlavaNextModel` whose `get_image_features` returns only the kept visual tokens of each tile."""

    config_class = VisPrunerLlavaNextConfig
    budget_unit = "tile of an image"
    images_are_grids = False  # newlines stand between them

    forward = forward_of(LlavaNextModel)

    def check_prunable(self) -> None:
        super().check_prunable()
        if self.register_tokens:
            raise ValueError(
                "vision_config.num_register_tokens must be 0: LLaVA-NeXT packs all tokens of a tile as a grid, and "
                "registers are of no place in it"
            )
        options = self.encoder_options
        if options.position_policy == "original" and options.tile_mode == "paper":
            raise ValueError(
                'vispruner_config.position_policy "original" needs tile_mode "native": in "paper" mode tokens of the '
                "padding may be kept, which have no position in the full prompt"
            )

    @property
    def stage_hindrance(self) -> str | None:  # type: ignore[override]
        if self.encoder_options.tile_mode == "native":
            return 'how many of a tile are padding, and so what remains, depends on the picture in tile_mode "native"'
        return None

    @property
    def selector_inputs(self) -> frozenset[str]:
        """In native packing, unpadding may leave a part of a tile; what needs the grid of a whole one has none."""
        native = self.encoder_options.tile_mode == "native"
        return super().selector_inputs - ({"grid"} if native else set())

    @property
    def side(self) -> int:
        """Patches along one side of a tile."""
        return self.config.vision_config.image_size // self.config.vision_config.patch_size

    def tile_grid(self, image_size: torch.Tensor | Sequence[int]) -> tuple[int, int]:
        """Return rows and columns of the tiles beside the base tile, for an original image (height, width)."""
        size = [int(value) for value in image_size]
        return get_anyres_image_grid_shape(
            size, self.config.image_grid_pinpoints, self.config.vision_config.image_size
        )

    def stock_packing(self, image_size: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Return the stock order of one image's tokens: tile * N + patch, newline = -1, no padding; on the CPU."""
        rows, columns = self.tile_grid(image_size)
        tiles, patches = 1 + rows * columns, self.side**2
        numbers = torch.arange(tiles * patches, dtype=torch.float64).view(tiles, patches, 1)
        newline = torch.tensor([float(NEWLINE)], dtype=torch.float64)
        sizes = [[int(value) for value in image_size]]
        packed, _ = self.pack_image_features([numbers], sizes, "default", image_newline=newline)
        return packed[0][:, 0].long()

    def image_token_counts(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, **arguments: Any
    ) -> tuple[list[int], list[int]]:
        """Return per image the visual tokens of a full (native) prompt and those that are kept."""
        if image_sizes is None:
            raise ValueError("image_sizes is missing: pass the processor's image_sizes together with pixel_values")
        sizes = _on_host(image_sizes)
        packings = [self.stock_packing(size) for size in sizes]
        kept = [self._kept_count(packing, tiles) for packing, tiles in zip(packings, self._tiles(sizes), strict=True)]
        return [len(packing) for packing in packings], kept

    def image_views(self, pixel_values: torch.Tensor, **arguments: Any) -> list[list[TokenView]]:
        """Return the tiles of each image: the base tile left of the others, which stand as in the image."""
        sizes = _on_host(arguments["image_sizes"])
        images = pixel_values if pixel_values.dim() == 5 else pixel_values.split(self._tiles(sizes))
        views = []
        for image, size in zip(images, sizes, strict=True):
            rows, columns = self.tile_grid(size)
            places = [(0, 0)] + [(tile // columns, 1 + tile % columns) for tile in range(rows * columns)]
            tiles = zip(image[: len(places)], places, strict=True)
            views.append([TokenView(tile, (self.side, self.side), place) for tile, place in tiles])
        return views

    def _tiles(self, sizes: list[list[int]]) -> list[int]:
        """Return per image how many tiles it is cut into, the base tile included."""
        return [1 + rows * columns for rows, columns in map(self.tile_grid, sizes)]

    def _kept_count(self, packing: torch.Tensor, tiles: int) -> int:
        options, patches = self.encoder_options, self.side**2
        if options.method == "none":
            return len(packing)
        budget = options.budget(patches)
        if options.tile_mode == "paper":
            return budget * tiles
        survivors = (packing[packing != NEWLINE] // patches).bincount()
        return int(survivors.clamp(max=budget).sum()) + int((packing == NEWLINE).sum())

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> PrunedImageFeatures:
        """Encode (images, tiles, 3, h, w) or (all tiles, 3, h, w), select per tile, project, pack."""
        options, patches, sizes = self.encoder_options, self.side**2, _on_host(image_sizes)
        packings = [self.stock_packing(size) for size in sizes]
        if options.method == "none" or (self.keeps_all(patches) and options.tile_mode == "native"):
            outputs = super().get_image_features(
                pixel_values,
                image_sizes,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                return_dict=True,
                **kwargs,
            )
            return self.keep_everything(outputs, packings)
        self.require_patches(vision_feature_select_strategy)
        tiles = self._tiles(sizes)
        if pixel_values.dim() == 5:
            pixel_values = torch.cat([image[:count] for image, count in zip(pixel_values, tiles, strict=True)])
        outputs, tokens = self.encode(pixel_values, vision_feature_layer, **kwargs)
        tokens = replace(tokens, owners=tuple(image for image, count in enumerate(tiles) for _ in range(count)))
        if options.tile_mode == "paper":
            selection = self.select(tokens, options.budget(patches))
            placeholders, kept, features = None, selection.indices.split(tiles), selection.fold(self._folded(tokens))
            into = None if selection.merge is None else selection.merged_into(patches)
            grids = map(self.tile_grid, sizes)
            orders = [paper_order(image, *grid, self.side) for image, grid in zip(kept, grids, strict=True)]
            newlines = [0] * len(orders)
        else:
            placeholders, orders, features, into = self._select_native(tokens, packings, tiles)
            newlines = [int((packing == NEWLINE).sum()) for packing in packings]
        return self.pruned_output(
            outputs,
            kwargs,
            tokens,
            pooler_output=self._project(features, orders, tiles, newlines),
            kept_indices=orders,
            placeholders=placeholders,
            full_counts=[len(packing) for packing in packings],
            merged_into=None if into is None else numbered_by_tile(into, tiles),
            tiles=tiles,
        )

    def _select_native(
        self, tokens: VisualTokens, packings: list[torch.Tensor], tiles: list[int]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor | None]:
        """Select among the patches of each tile that survive unpadding.

        Returns per image which tokens of the packing stay, and these tokens themselves; of all tiles the features,
        folded together, and where each went.
        """
        survivors = [
            tile for packing, count in zip(packings, tiles, strict=True) for tile in self._survivors(packing, count)
        ]
        keep = torch.zeros_like(tokens.saliency, dtype=torch.bool)
        grids = [self._grid_of(tile) for tile in survivors]
        features, into = self._folded(tokens), None
        for grid in {*grids} - {(0, 0)}:  # tiles with the same grid are selected from together
            numbers, count = [number for number, own in enumerate(grids) if own == grid], math.prod(grid)
            group = torch.tensor(numbers)[:, None].to(keep.device, non_blocking=True)
            columns = torch.stack([survivors[number] for number in numbers]).to(keep.device, non_blocking=True)
            budget = min(self.encoder_options.budget(keep.shape[1]), count)
            assert tokens.owners is not None
            owners = tuple(tokens.owners[number] for number in numbers)
            part = replace(tokens.part(group, columns, grid), owners=owners)
            selection = self.select(part, budget)
            places = columns.gather(1, selection.indices)
            keep[group, places] = True
            if selection.merge is not None:
                features = features.index_put((group, places), selection.take(features[group, columns]))
                into = torch.full_like(keep, -1, dtype=torch.int64) if into is None else into
                went = selection.merged_into(count)
                into[group, columns] = columns.gather(1, went.clamp(min=0)).masked_fill(went < 0, -1)
        placeholders, orders = [], []
        for packing, image in zip(packings, keep.split(tiles), strict=True):
            kept = self._kept_count(packing, len(image))
            packing = packing.to(keep.device, non_blocking=True)
            stays = (packing == NEWLINE) | image.flatten()[packing.clamp(min=0)]
            placeholders.append(_true_places(stays, kept))
            orders.append(packing[placeholders[-1]])
        return placeholders, orders, features, into

    def _folded(self, tokens: VisualTokens) -> torch.Tensor:
        """Return what the method folds together, of all patches (tiles, N, ...)."""
        return self.project(tokens.features) if self.folds_projected else tokens.features

    def _survivors(self, packing: torch.Tensor, tiles: int) -> tuple[torch.Tensor, ...]:
        """Return per tile of an image the patches that its packing has."""
        patches = packing[packing != NEWLINE].sort().values
        counts = (patches // self.side**2).bincount(minlength=tiles).tolist()
        return (patches % self.side**2).split(counts)

    def _grid_of(self, patches: torch.Tensor) -> tuple[int, int]:
        """Return (rows, columns) of the patches of a tile that unpadding leaves: it cuts off whole rows or columns."""
        if len(patches) == 0:
            return 0, 0
        columns = int(patches[-1] % self.side - patches[0] % self.side) + 1
        return len(patches) // columns, columns

    def _project(
        self, features: torch.Tensor, orders: list[torch.Tensor], tiles: list[int], newlines: list[int]
    ) -> list[torch.Tensor]:
        """Project the patches that `orders` name, if need be, and put the newline embedding where they say so."""
        patches = []
        for image, order, lines in zip(features.split(tiles), orders, newlines, strict=True):
            named = order[_true_places(order != NEWLINE, len(order) - lines)] if lines else order
            patches.append(Selection(named[None]).take(image.flatten(0, 1)[None])[0])
        together = torch.cat(patches)
        together = together if self.folds_projected else self.project(together)
        projected = together.split([len(patch) for patch in patches])
        if not any(newlines):
            return list(projected)
        newline = self.image_newline.to(features.device, projected[0].dtype)
        return [
            newline.expand(len(order), -1).masked_scatter((order != NEWLINE)[:, None], tokens)
            for order, tokens in zip(orders, projected, strict=True)
        ]


def paper_order(kept: torch.Tensor, rows: int, columns: int, side: int) -> torch.Tensor:
    """Order one image's kept patches (tiles, T): base tile first, the others by raster of the stitched grid.

    rows, columns  of the tiles beside the base tile
    side           patches along one side of a tile
    returns        (tiles * T,) tile * N + patch
    """
    tile = torch.arange(rows * columns, device=kept.device)[:, None]
    y = tile // columns * side + kept[1:] // side
    x = tile % columns * side + kept[1:] % side
    flat = kept + torch.arange(len(kept), device=kept.device)[:, None] * side**2
    raster = (y * (columns * side) + x).flatten().argsort()
    return torch.cat([flat[0], flat[1:].flatten()[raster]])


def _on_host(image_sizes: Any) -> list[list[int]]:
    """Read sizes (images, 2) from the device at once."""
    if isinstance(image_sizes, torch.Tensor):
        return image_sizes.tolist()
    return [[int(value) for value in size] for size in image_sizes]


def _true_places(flags: torch.Tensor, count: int) -> torch.Tensor:
    """Return where `count` flags are true; as the count is known, nothing waits for the device."""
    return torch.arange(len(flags), device=flags.device).repeat_interleave(flags.long(), output_size=count)


class VisPrunerLlavaNextForConditionalGeneration(VisPrunerMixin, LlavaNextForConditionalGeneration, GenerationMixin):
    """`LlavaNextForConditionalGeneration` that prunes visual tokens by its `vispruner_config` (arXiv 2412.01818)."""

    config_class = VisPrunerLlavaNextConfig
    base_class = VisPrunerLlavaNextModel

    forward = forward_of(LlavaNextForConditionalGeneration)


inherit_checkpoint_conversion(VisPrunerLlavaNextForConditionalGeneration, "llava_next")
inherit_checkpoint_conversion(VisPrunerLlavaNextModel, "LlavaModel")
