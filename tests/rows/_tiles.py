"""What the rows of tiled encoders share: pixels of tiles, and selection tile by tile, in plain loops."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from rows import noise
from vispruner.configuration_vispruner import VisPrunerOptions, merge_vispruner_config
from vispruner.selectors import select_tokens


def drawn_tiles(count: int, side: int, seed: int) -> list[torch.Tensor]:
    return [noise((3, side, side), seed * 1000 + number) for number in range(count)]


def with_attention_maps(encoder: Any) -> Any:
    """Return a copy of a stock vision encoder that computes and returns its attention maps."""
    encoder = copy.deepcopy(encoder)
    encoder.set_attn_implementation("eager")
    return encoder


def merged_blocks(patches: torch.Tensor, size: int) -> torch.Tensor:
    """Join each block of `size` x `size` patches (N, C), line by line: (N / size**2, C * size**2)."""
    side = round(len(patches) ** 0.5)
    blocks = []
    for top in range(0, side, size):
        for left in range(0, side, size):
            places = [(top + row) * side + left + column for row in range(size) for column in range(size)]
            blocks.append(torch.cat([patches[place] for place in places]))
    return torch.stack(blocks)


def chosen(features: torch.Tensor, saliency: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
    """Return the tokens that stay of one tile, features (N, C) and saliency (N,)."""
    settings = VisPrunerOptions(**merge_vispruner_config(None, dict(options)))
    (kept,) = select_tokens(
        settings.method,
        features[None],
        saliency[None],
        settings.budget(len(features)),
        important_ratio=settings.important_ratio,
        dedup_step=settings.dedup_step,
        seed=settings.seed,
    )
    return kept
