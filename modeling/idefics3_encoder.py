"""What Idefics3 and SmolVLM share: a SigLIP encoder without [CLS], and a connector that merges patches and projects.

A token is a block of patches: it is ranked by the mean attention that these receive from all patches of the last
encoder layer. Padding is no patch. The tokens that mark rows and columns of tiles belong to the prompt and stay.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.utils import can_return_tuple

from .prompt_reading import Modality
from .stock_versions import JOINS_TILES
from .tile_encoder import TileEncoderMixin
from .visual_features import PrunedImageFeatures

# A frame of a video is an image to these models too.
IDEFICS3_IMAGES = Modality("image", "pixel_values", ("pixel_attention_mask",), "image_token_id")


class Idefics3EncoderMixin(TileEncoderMixin):
    """For `Idefics3Model` and its like. What is called an image elsewhere is a tile here."""

    vision_model: Any
    connector: Any
    image_seq_len: int
    dtype: torch.dtype
    has_cls_token = False
    budget_unit = "tile of an image"

    @property
    def vision_layers(self) -> Sequence[Any]:
        return self.vision_model.encoder.layers

    def check_prunable(self) -> None:
        self.warn_if_all_are_kept(self.image_seq_len)

    def merge_patches(self, patches: torch.Tensor) -> torch.Tensor:
        return self.connector.pixel_shuffle(patches, self.connector.scale_factor)

    def project_patches(self, patches: torch.Tensor) -> torch.Tensor:
        return self.connector(patches)

    def real_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return which of (tiles, 3, height, width) are no padding: those with a pixel that is not 0."""
        return tiles.flatten(1).ne(0).any(dim=1)

    def encoded_tiles(self, pixel_values: torch.Tensor) -> torch.Tensor:
        tiles = pixel_values.to(self.dtype).flatten(0, 1)
        return tiles[self.real_tiles(tiles)]

    def image_token_counts(self, pixel_values: torch.Tensor, **arguments: Any) -> tuple[list[int], list[int]]:
        """Return per tile of (batch, tiles, 3, height, width) its tokens in a full prompt and those that are kept."""
        full = self._tokens(pixel_values)
        tiles = int(self.real_tiles(pixel_values.to(self.dtype).flatten(0, 1)).sum())
        return [full] * tiles, [self.encoder_options.budget(full)] * tiles

    def _tokens(self, pixel_values: torch.Tensor) -> int:
        height, width = pixel_values.shape[-2:]
        patch = self.config.vision_config.patch_size
        return (height // patch) * (width // patch) // self.config.scale_factor**2

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, pixel_attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> PrunedImageFeatures:
        """Encode (batch, tiles, 3, height, width) without padding, merge, select, project."""
        full = self._tokens(pixel_values)
        if self.keeps_all(full):
            outputs = super().get_image_features(pixel_values, pixel_attention_mask, return_dict=True, **kwargs)  # type: ignore[misc]
            return self.keep_everything(outputs, counts=[full] * len(outputs.last_hidden_state))
        tiles = pixel_values.to(self.dtype).flatten(0, 1)
        real = self.real_tiles(tiles)
        tiles = tiles[real]
        mask = tiles.new_ones(tiles[:, 0].shape, dtype=torch.bool)
        if pixel_attention_mask is not None:
            mask = pixel_attention_mask.flatten(0, 1)[real]
        patch = self.config.vision_config.patch_size
        seen = mask.unfold(1, patch, patch).unfold(2, patch, patch).sum(dim=(-1, -2)) > 0
        stage = self.stage_of(seen.shape[1:].numel())
        with self.open_tap(None if pixel_attention_mask is None else seen.flatten(1), stage=stage) as tap:
            outputs = self.vision_model(tiles, patch_attention_mask=seen, return_dict=True, **kwargs)
        pruned = self.prune_tiles(outputs, outputs.last_hidden_state, tap, **kwargs)
        if JOINS_TILES:
            of_row = real.view(pixel_values.shape[:2]).sum(1).tolist()
            pruned.pooler_output = [row.flatten(0, 1) for row in pruned.pooler_output.split(of_row)]
        return pruned
