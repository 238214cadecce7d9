"""What an encoder hands over: the kept visual tokens of images, and what a method looked at to choose them.

What is called an image here is what a prompt has a run of placeholders for: an image, a tile of it, or a video.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling


@dataclass
class PrunedImageFeatures(BaseModelOutputWithPooling):
    """Vision output whose `pooler_output` holds only the kept visual tokens, projected.

    pooler_output  the kept tokens (tokens, D) of all images in a row, in the form that the stock model has: one tensor
                   or a list, which may join the tiles of an image
    kept_indices   list per image of (tokens,) int64: tile * N + patch in the order of pooler_output, newline = -1
    placeholders   list per image of (tokens,) int64: the placeholder of a full prompt that each token stands for;
                   None where there is none (LLaVA-NeXT, tile_mode "paper")
    saliency       (tiles, N) of all images together, or a list of (N,) where they differ in size
    layer_saliency (tiles, L, N) or a list of (L, N), likewise: of the further layers that the method asked for
    merged_into    (tiles, N) or a list of (N,), likewise, where the method folds tokens together: which token that
                   stays each went into, itself where it stays, -1 where it fell
    remain         (tiles, N) or a list of (N,), likewise, where patches left within the encoder (`encoder_stage`):
                   True for those that did not, of which the others were chosen
    full_counts    visual tokens a full prompt has for each image
    deepstack_features   Qwen3-VL only: per encoder level what pooler_output holds
    told           list per image of (tokens,) in the order of pooler_output: their saliency, where the method goes on
                   by it in the language model; else None
    """

    kept_indices: list[torch.Tensor] | None = None
    placeholders: list[torch.Tensor] | None = None
    saliency: torch.Tensor | list[torch.Tensor] | None = None
    layer_saliency: torch.Tensor | list[torch.Tensor] | None = None
    merged_into: torch.Tensor | list[torch.Tensor] | None = None
    remain: torch.Tensor | list[torch.Tensor] | None = None
    full_counts: list[int] | None = None
    deepstack_features: list[list[torch.Tensor]] | None = None
    told: list[torch.Tensor] | None = None


def kept_counts_of(features: Any) -> list[int]:
    """Return how many visual tokens each image of a vision output has."""
    indices = getattr(features, "kept_indices", None)
    return [len(image) for image in (features.pooler_output if indices is None else indices)]


def full_counts_of(features: Any) -> list[int]:
    """Return how many placeholders a full prompt has for each image; its tokens, where the output does not say."""
    full, kept = getattr(features, "full_counts", None), kept_counts_of(features)
    return list(full) if full is not None and len(full) == len(kept) else kept


def tokens_of(features: Any) -> list[torch.Tensor]:
    """Return the visual tokens (tokens, D) of each image of a vision output."""
    made = features.pooler_output
    if len(made) == 0:
        return []
    counts = kept_counts_of(features)
    if [len(part) for part in made] == counts:
        return list(made)
    return list(torch.cat(list(made)).split(counts))


def only_tokens(features: Any, images: Sequence[int] | None = None) -> PrunedImageFeatures:
    """Return what stock needs of a vision output to merge it, of all or of some `images`, in lists of its own."""

    def chosen(tokens: Any) -> Any:
        if images is None:
            return tokens if isinstance(tokens, torch.Tensor) else list(tokens)
        picked = [tokens[image] for image in images]
        return torch.stack(picked) if isinstance(tokens, torch.Tensor) else picked

    levels, told = getattr(features, "deepstack_features", None), getattr(features, "told", None)
    joined = [len(part) for part in features.pooler_output] != kept_counts_of(features)
    return PrunedImageFeatures(
        pooler_output=chosen(tokens_of(features) if joined else features.pooler_output),
        deepstack_features=None if levels is None else [chosen(level) for level in levels],
        told=None if told is None else chosen(told),
    )


@dataclass(frozen=True)
class VisualTokens:
    """What a selector may look at: B images, tiles or frames of N tokens each.

    features        (B, N, C)
    saliency        (B, N)
    layer_saliency  (B, L, N) of the further layers that the method asked for, or None
    grid            (rows, columns) of the N tokens, in raster order, or None where they are no whole grid
    projected       (B, N, D) the same as visual tokens, where they were projected before they are chosen; else None
    further         what else the method asked for, by its name in the registry: of the tokens (B, N, d), of these and
                    [CLS] before them (B, 1+N, d), or of an image (B, d)
    videos          which video each of B frames is of, the frames of each in order; None where they are no frames
    owners          which image of the call each of B is, or is a part of; None where they are its images, in order
    remain          (B, N) False for what left within the encoder, which nothing may choose; None where nothing did
    left            how many of the N of each image did not leave, where some did
    numbers         (B, N) which of the encoder's tokens these are, where others left within it; None for all
    """

    features: torch.Tensor
    saliency: torch.Tensor
    layer_saliency: torch.Tensor | None = None
    grid: tuple[int, int] | None = None
    projected: torch.Tensor | None = None
    further: Mapping[str, torch.Tensor] = field(default_factory=dict)
    videos: tuple[int, ...] | None = None
    owners: tuple[int, ...] | None = None
    remain: torch.Tensor | None = None
    left: int | None = None
    numbers: torch.Tensor | None = None

    def remaining(self) -> "VisualTokens":
        """Return the tokens of each image that did not leave within the encoder."""
        assert self.remain is not None
        indices = (~self.remain).int().argsort(dim=1, stable=True)[:, : self.left]
        images = torch.arange(len(indices), device=indices.device)[:, None]
        projected = None if self.projected is None else self.projected[images, indices]
        part = self.part(images, indices, None)
        return replace(part, projected=projected, videos=self.videos, owners=self.owners, numbers=indices)

    def part(self, images: torch.Tensor, indices: torch.Tensor, grid: tuple[int, int] | None) -> "VisualTokens":
        """Return the tokens at `indices` (G, K) of `images` (G, 1): G images of K tokens, which are such a grid."""
        layers = self.layer_saliency
        layers = None if layers is None else layers.transpose(1, 2)[images, indices].transpose(1, 2)
        further = {name: self._part_of(given, images, indices) for name, given in self.further.items()}
        features, saliency = self.features[images, indices], self.saliency[images, indices]
        return VisualTokens(features, saliency, layers, grid, further=further)

    def behind(self, count: int) -> "VisualTokens":
        """Return the same without the first `count` of its N tokens."""
        if count == 0:
            return self
        batch, tokens = self.saliency.shape
        images = torch.arange(batch, device=self.saliency.device)[:, None]
        rest = torch.arange(count, tokens, device=self.saliency.device).expand(batch, -1)
        return self.part(images, rest, self.grid)

    def _part_of(self, given: torch.Tensor, images: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        first = images[:, 0]
        if given.dim() == 2:
            return given[first]
        before = given.shape[1] - self.features.shape[1]  # 1 for [CLS]
        return torch.cat([given[first, :before], given[images, indices + before]], dim=1)


def stacked(images: Sequence[VisualTokens]) -> VisualTokens:
    """Join images (1, N, C) of one size and grid to a batch."""
    if len(images) == 1:
        return images[0]
    layers = [image.layer_saliency for image in images if image.layer_saliency is not None]
    remain = [image.remain for image in images if image.remain is not None]
    return replace(
        images[0],
        features=torch.cat([image.features for image in images]),
        saliency=torch.cat([image.saliency for image in images]),
        layer_saliency=torch.cat(layers) if layers else None,
        further={name: torch.cat([image.further[name] for image in images]) for name in images[0].further},
        remain=torch.cat(remain) if remain else None,
        videos=None if images[0].videos is None else tuple(n for image in images for n in image.videos or ()),
        owners=None if images[0].owners is None else tuple(n for image in images for n in image.owners or ()),
    )


def numbered_by_tile(into: torch.Tensor, tiles: Sequence[int]) -> torch.Tensor:
    """Add to numbers of patches (tiles, N) that of their tile within its image: tile * N + patch; -1 stays."""
    tile = torch.cat([torch.arange(count) for count in tiles]).to(into.device, non_blocking=True)
    return torch.where(into < 0, into, into + tile[:, None] * into.shape[1])


def frames_in_order(videos: int, frames: int) -> tuple[int, ...]:
    """Return `VisualTokens.videos` of so many videos of so many frames each."""
    return tuple(video for video in range(videos) for _ in range(frames))


class TokenView(NamedTuple):
    """What the encoder made one grid of tokens of: an image, a tile of it, or a frame (or two) of a video.

    pixels  (3, height, width), normalised as the processor left them
    grid    (rows, columns) of its tokens; those of an item's views are numbered one after the other, row by row
    place   (row, column) among the other views of its item
    pool    views of one item with the same number were chosen from together; None was chosen from alone
    """

    pixels: torch.Tensor
    grid: tuple[int, int]
    place: tuple[int, int] = (0, 0)
    pool: int | None = None
