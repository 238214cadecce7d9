"""LLaVA-NeXT, packed as stock packs: tiles pruned on their own among what survives unpadding, newlines kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from reference import visual_tokens
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextModel

from rows import Image, Part, Reference, left_padded, noise, shortened
from rows.llava import IMAGE, PAD, LlavaRow

SIDE, GRIDS = 56, [[56, 112], [112, 56], [112, 112]]


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
        rows, columns = (side // SIDE for side in best_grid(size))
        patches, tiles = (SIDE // 14) ** 2, 1 + rows * columns
        model = LlavaNextModel(self.config())
        features = [torch.zeros(tiles, patches, 1)]
        packed, _ = model.pack_image_features(features, [list(size)], "default", image_newline=torch.zeros(1))
        return tiles, len(packed[0])

    def shortened(self, inputs: Mapping[str, torch.Tensor], kept: Mapping[int, Sequence[int]]) -> dict[str, Any]:
        full = [self.shape_of(tuple(size))[1] for size in inputs["image_sizes"].tolist()]
        return shortened(inputs, {IMAGE: full}, kept, PAD)

    @torch.no_grad()
    def reference(self, stock: Any, inputs: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> Reference:
        items = []
        for pixels, size in zip(inputs["pixel_values"], inputs["image_sizes"], strict=True):
            tiles = pixels[: self.shape_of(tuple(size.tolist()))[0]]
            items.append(visual_tokens(stock, tiles, options["visual_token_num"], size, "native"))
        return {IMAGE: items}


def best_grid(size: tuple[int, int]) -> tuple[int, int]:
    from transformers.image_processing_utils import select_best_resolution

    return select_best_resolution(size, GRIDS)


ROW = LlavaNextRow()
