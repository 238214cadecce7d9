"""What models share that cut an image into tiles of one size and merge neighbouring patches (pixel shuffle)."""

import math
from collections.abc import Callable
from typing import Any

import torch

from .encoder_stage import EncoderStage
from .pruned_encoder import VisPrunerModelMixin, remaining_by_saliency
from .selectors import SELECTORS
from .visual_attention import SaliencyTap
from .visual_features import PrunedImageFeatures, TokenView, VisualTokens


class TileEncoderMixin(VisPrunerModelMixin):
    """Prunes every tile on its own, with one budget. Merged tokens are compared, before they are projected.

    The saliency of a token is the mean over the patches that are merged into it. An architecture says:

    merge_patches    (B, N, C) patches of square tiles to (B, M, C * N / M), as its stock model does
    project_patches  where the stock projector takes patches and merges them itself
    encoded_tiles    the tiles (B, 3, height, width) that pixel values hold, if these are not they
    """

    def encoded_tiles(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values

    def image_views(self, pixel_values: torch.Tensor, **arguments: Any) -> list[list[TokenView]]:
        """Return every tile as an image of its own, with a grid of merged tokens."""
        full, _ = self.image_token_counts(pixel_values)
        tiles = zip(self.encoded_tiles(pixel_values), full, strict=True)
        return [[TokenView(tile, (math.isqrt(count), math.isqrt(count)))] for tile, count in tiles]

    def merge_patches(self, patches: torch.Tensor) -> torch.Tensor:
        raise AttributeError(f"{type(self).__name__} must say how its patches are merged")

    def project_patches(self, patches: torch.Tensor) -> torch.Tensor | None:
        """Return the visual tokens (B, M, D) of patches (B, N, C); None where `project` takes merged tokens.

        Projectors are called as a whole, since offloading and sharding act on such calls: so all tokens are projected.
        """
        return None

    def merge_saliency(self, saliency: torch.Tensor) -> torch.Tensor:
        """Return the mean of each token's patches, (..., N) -> (..., M)."""
        return mean_of_merged(saliency, self.merge_patches)

    def stage_of(self, patches: int) -> EncoderStage | None:
        """Return what lets merge blocks of a tile's `patches` leave within the encoder; None where none do."""
        if self.encoder_options.encoder_stage is None:
            return None
        of_patch = self._token_of_patch(patches)
        tokens = int(of_patch.max()) + 1
        if (count := self.remaining_count(tokens)) == tokens:
            return None

        def choose(saliency: torch.Tensor) -> torch.Tensor:
            stays = remaining_by_saliency(self.merge_saliency(saliency), count)
            return stays[:, of_patch.to(stays.device, non_blocking=True)]

        return self.stage_behind(self.vision_layers, choose, count * (patches // tokens))

    def _token_of_patch(self, patches: int) -> torch.Tensor:
        """Return the number (N,) of the merged token that each of a tile's patches becomes a part of."""
        known = self.__dict__.setdefault("_tokens_of_patches", {})
        if patches not in known:
            known[patches] = self.merge_saliency(torch.eye(patches)).argmax(dim=1)
        return known[patches]

    def prune_tiles(
        self,
        outputs: Any,
        patches: torch.Tensor,
        tap: SaliencyTap,
        cls_feature: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> PrunedImageFeatures:
        """Merge `patches` (tiles, N, C), select and project; `pooler_output` is one tensor (tiles, T, D).

        cls_feature  (tiles, C); what is compared with merged tokens is what as many of it would be merged into
        """
        patches = tap.restored(patches)
        features, layers, projected = self.merge_patches(patches), tap.layer_saliency, self.project_patches(patches)
        further = {name: self.merge_saliency(given.mT).mT for name, given in tap.further.items()}
        if cls_feature is not None and "cls_feature" in SELECTORS[self.encoder_options.method].needs:
            further["cls_feature"] = self.merge_patches(cls_feature[:, None].expand_as(patches).clone())[:, 0]
        side = math.isqrt(features.shape[1])
        tokens = VisualTokens(
            features,
            self.merge_saliency(tap.saliency),
            None if layers is None else self.merge_saliency(layers),
            (side, side),
            projected,
            further,
            remain=self._remain(tap),
            left=self.remaining_count(features.shape[1]),
        )
        return self.prune(outputs, tokens, kwargs)

    def _remain(self, tap: SaliencyTap) -> torch.Tensor | None:
        if tap.stage is None or tap.stage.remain is None:
            return None
        return self.merge_saliency(tap.stage.remain.float()) > 0.5


def mean_of_merged(of_patches: torch.Tensor, merge: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return the mean over the patches that become one token, (..., N) -> (..., M).

    merge  patches (B, N, C) to merged tokens (B, M, C * N / M)
    """
    merged = merge(of_patches.reshape(-1, of_patches.shape[-1], 1)).mean(dim=-1)
    return merged.view(*of_patches.shape[:-1], -1)
