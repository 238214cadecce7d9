"""Idefics3: tiles of 8 x 8 patches without [CLS], merged 2 x 2 to 16 tokens, with markers for rows and columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

from rows import Image, Part, Reference, left_padded
from rows import shortened as leave_first
from rows._tiles import chosen, drawn_tiles, merged_blocks, with_attention_maps

PAD, BOS, EOS, IMAGE, AROUND, GLOBAL, NEWLINE, FRAME, MARKER = 0, 1, 2, 90, 91, 92, 93, 94, 100
SIDE, TOKENS, LONGEST = 32, 16, 96


def tile_grid(size: tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns of the tiles of an image whose longer side is scaled to `LONGEST`."""
    height, width = size
    shorter = max(1, int(LONGEST * min(size) / max(size)))
    shorter += shorter % 2
    height, width = (shorter, LONGEST) if width >= height else (LONGEST, shorter)
    across = math.ceil(max(height, width) / SIDE)
    along = math.ceil(int(across * SIDE * min(height, width) / max(height, width)) / SIDE)
    return (along, across) if width >= height else (across, along)


class Idefics3Row:
    model_type = "idefics3"
    stock_class: Any = Idefics3ForConditionalGeneration
    config_class: Any = Idefics3Config
    options = {"visual_token_num": 5}
    modalities: tuple[str, ...] = ("image",)
    positions = "renumber"

    def config(self) -> Any:
        text = {
            "model_type": "llama",
            "vocab_size": 200,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        }
        vision = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": 4,
        }
        return self.config_class(vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2)

    def inputs(self, prompts: Sequence[Sequence[Part]]) -> dict[str, torch.Tensor]:
        rows, pixels = [], []
        for prompt in prompts:
            rows.append([BOS])
            pixels.append([])
            for part in prompt:
                if isinstance(part, list):
                    rows[-1] += part
                elif isinstance(part, Image):
                    rows[-1] += self.image(*tile_grid(part.size))
                    tiles = math.prod(tile_grid(part.size)) + 1
                    pixels[-1] += drawn_tiles(tiles, SIDE, part.seed)
                else:
                    for _ in range(part.frames):
                        rows[-1] += [FRAME, AROUND, GLOBAL, *[IMAGE] * TOKENS, AROUND]
                    pixels[-1] += drawn_tiles(part.frames, SIDE, part.seed)
        most = max(map(len, pixels))
        inputs = left_padded(rows, PAD)
        if most:
            inputs["pixel_values"] = torch.zeros(len(rows), most, 3, SIDE, SIDE)
            inputs["pixel_attention_mask"] = torch.zeros(len(rows), most, SIDE, SIDE, dtype=torch.long)
            for row, tiles in enumerate(pixels):
                for number, tile in enumerate(tiles):
                    inputs["pixel_values"][row, number] = tile
                    inputs["pixel_attention_mask"][row, number] = 1
        return inputs

    @staticmethod
    def image(rows: int, columns: int) -> list[int]:
        ids = []
        for row in range(rows):
            for column in range(columns):
                ids += [AROUND, MARKER + 10 * row + column, *[IMAGE] * TOKENS]
            ids.append(NEWLINE)
        return [*ids, NEWLINE, AROUND, GLOBAL, *[IMAGE] * TOKENS, AROUND]

    def shortened(self, inputs: Mapping[str, torch.Tensor], kept: Mapping[int, Sequence[int]]) -> dict[str, Any]:
        return leave_first(inputs, {IMAGE: [TOKENS] * len(kept[IMAGE])}, kept, PAD)

    @torch.no_grad()
    def reference(self, stock: Any, inputs: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> Reference:
        encoder = with_attention_maps(stock.model.vision_model)
        tiles = []
        for row, masks in zip(inputs.get("pixel_values", []), inputs.get("pixel_attention_mask", []), strict=True):
            for tile, mask in zip(row, masks, strict=True):
                if not tile.any():
                    continue
                corners = mask[::4, ::4].bool()  # a patch of which any pixel is seen; masks here begin at its corner
                outputs = encoder(tile[None], patch_attention_mask=corners[None], output_attentions=True)
                attention, queries = outputs.attentions[-1][0].mean(0), corners.flatten().nonzero()[:, 0].tolist()
                received = sum(attention[query] for query in queries) / len(queries)
                patches = merged_blocks(outputs.last_hidden_state[0], 2)
                kept = chosen(patches, merged_blocks(received[:, None], 2).mean(-1), options)
                tiles.append((stock.model.connector.modality_projection(patches[kept]), kept))
        return {IMAGE: tiles}


ROW = Idefics3Row()
