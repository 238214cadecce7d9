"""LLaVA-NeXT: tiles pruned on their own, among what survives stock's unpadding, or in the paper's way whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextModel

from rows import Image, Part, Reference, left_padded, noise, shortened
from rows._tiles import with_attention_maps
from rows.llava import IMAGE, PAD, LlavaRow, Mistral
from vispruner.selectors import select_tokens

SIDE, PATCHES = 56, 4  # pixels and patches along a tile
GRIDS = [[56, 112], [112, 56], [112, 112]]


class LlavaNextRow(LlavaRow):
    model_type = "llava_next"
    stock_class = LlavaNextForConditionalGeneration
    options = {"visual_token_num": 5, "tile_mode": "native"}

    def config(self) -> LlavaNextConfig:
        llava = super().config()
        llava.vision_config.image_size = SIDE
        return LlavaNextConfig(
            vision_config=llava.vision_config.to_dict(),
            text_config=llava.text_config.to_dict(),
            image_token_id=IMAGE,
            image_grid_pinpoints=GRIDS,
        )

    def inputs(self, prompts: Sequence[Sequence[Part]]) -> dict[str, torch.Tensor]:
        rows, pixels, sizes = [], [], []
        for prompt in prompts:
            rows.append([1])
            for part in prompt:
                if isinstance(part, Image):
                    tiles, placeholders = self.shape_of(part.size)
                    rows[-1] += [IMAGE] * placeholders
                    pixels.append(noise((tiles, 3, SIDE, SIDE), part.seed))
                    sizes.append(part.size)
                else:
                    rows[-1] += part
        inputs = left_padded(rows, PAD)
        if pixels:
            most = max(map(len, pixels))
            padded = [torch.cat([tiles, tiles.new_zeros(most - len(tiles), 3, SIDE, SIDE)]) for tiles in pixels]
            inputs |= {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor(sizes)}
        return inputs

    def shape_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Tiles and placeholders of an image of `size`, from the stock packing of a tensor that holds nothing."""
        tiles = 1 + math.prod(tiles_of(size))
        model = LlavaNextModel(self.config())
        features = [torch.zeros(tiles, PATCHES**2, 1)]
        packed, _ = model.pack_image_features(features, [list(size)], "default", image_newline=torch.zeros(1))
        return tiles, len(packed[0])

    def shortened(self, inputs: Mapping[str, torch.Tensor], kept: Mapping[int, Sequence[int]]) -> dict[str, Any]:
        full = [self.shape_of(tuple(size))[1] for size in inputs["image_sizes"].tolist()]
        return shortened(inputs, {IMAGE: full}, kept, PAD)

    @torch.no_grad()
    def reference(self, stock: Any, inputs: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> Reference:
        items = []
        for pixels, size in zip(inputs["pixel_values"], inputs["image_sizes"].tolist(), strict=True):
            tiles = pixels[: self.shape_of(tuple(size))[0]]
            features, saliency = encode(stock, tiles)
            projected = stock.model.multi_modal_projector(features)
            items.append(self.kept_tokens(stock, features, saliency, projected, options["visual_token_num"], size))
        return {IMAGE: items}

    @staticmethod
    def kept_tokens(
        stock: Any,
        features: torch.Tensor,
        saliency: torch.Tensor,
        projected: torch.Tensor,
        budget: int,
        size: tuple[int, int],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return an image's kept tokens (T, D) and the placeholders of a full prompt that they stand for (T,)."""
        layout = stock_layout(size)
        kept = set()
        for tile in range(len(features)):
            patches = sorted(patch for place in layout if place and place[0] == tile for patch in [place[1]])
            if patches:
                chosen = select(features[tile][patches], saliency[tile][patches], budget)
                kept |= {(tile, patches[index]) for index in chosen}
        places = [number for number, place in enumerate(layout) if place is None or place in kept]
        tokens = [stock.model.image_newline if layout[n] is None else projected[layout[n]] for n in places]
        return torch.stack(tokens), torch.tensor(places)


class PaperRow(LlavaNextRow):
    """Every tile whole, its padding too: a kept token then stands for no placeholder of the full prompt."""

    attention = "sdpa"
    options = {"visual_token_num": 5, "tile_mode": "paper"}

    @staticmethod
    def kept_tokens(
        stock: Any,
        features: torch.Tensor,
        saliency: torch.Tensor,
        projected: torch.Tensor,
        budget: int,
        size: tuple[int, int],
    ) -> tuple[torch.Tensor, None]:
        chosen = [select(features[tile], saliency[tile], budget) for tile in range(len(features))]
        tokens = [projected[0, patch] for patch in chosen[0]]
        for tile, patch in places_of_tiles(*tiles_of(size)):
            if patch in chosen[tile]:
                tokens.append(projected[tile, patch])
        return torch.stack(tokens), None


class LlavaNextMistralRow(Mistral, LlavaNextRow):
    options = {"visual_token_num": 4, "tile_mode": "native"}


def encode(stock: Any, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (tiles, N, C) and saliency (tiles, N) from full attention maps."""
    tower = with_attention_maps(stock.model.vision_tower)
    outputs = tower(tiles, output_hidden_states=True, output_attentions=True)
    return outputs.hidden_states[-2][:, 1:], outputs.attentions[-2][:, :, 0, 1:].mean(1)


def select(features: torch.Tensor, saliency: torch.Tensor, budget: int) -> list[int]:
    return select_tokens("vispruner", features[None], saliency[None], budget)[0].tolist()


def places_of_tiles(rows: int, columns: int) -> list[tuple[int, int]]:
    """(tile, patch) of every place of the grid behind the base tile, line by line."""
    return [
        (1 + (y // PATCHES) * columns + x // PATCHES, (y % PATCHES) * PATCHES + x % PATCHES)
        for y in range(rows * PATCHES)
        for x in range(columns * PATCHES)
    ]


def stock_layout(size: tuple[int, int]) -> list[tuple[int, int] | None]:
    """What each placeholder of an image stands for: (tile, patch), or None for a newline."""
    rows, columns = tiles_of(size)
    height, width = size
    high, wide = rows * PATCHES, columns * PATCHES
    top = left = 0
    if width / height > wide / high:
        top = (high - int(round(height * wide / width, 7))) // 2
    else:
        left = (wide - int(round(width * high / height, 7))) // 2
    places = places_of_tiles(rows, columns)
    layout: list[tuple[int, int] | None] = [(0, patch) for patch in range(PATCHES**2)]
    for y in range(top, high - top):
        layout += [*places[y * wide + left : (y + 1) * wide - left], None]
    return layout


def tiles_of(size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tiles beside the base tile."""
    height, width = best_grid(size)
    return height // SIDE, width // SIDE


def best_grid(size: tuple[int, int]) -> tuple[int, int]:
    from transformers.image_processing_utils import select_best_resolution

    return select_best_resolution(size, GRIDS)


ROW = LlavaNextRow()
VARIANTS = {"llava_next-paper": PaperRow(), "llava_next-mistral": LlavaNextMistralRow()}
