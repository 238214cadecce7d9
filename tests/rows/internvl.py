"""InternVL: tiles of 8 x 8 patches behind [CLS], merged 2 x 2 to 16 tokens, all of an image in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from rows import Image, Part, Reference, left_padded
from rows import shortened as leave_first
from rows._tiles import chosen, drawn_tiles, merged_blocks, with_attention_maps

PAD, BOS, EOS, IMAGE, START, END, FRAME, NEWLINE = 0, 1, 2, 190, 191, 192, 193, 194
SIDE, TOKENS, MOST_TILES = 32, 16, 6


def tiles_of(size: tuple[int, int]) -> int:
    """Return how many tiles an image is cut into: the grid nearest in shape, and the whole image where it is cut."""
    height, width = size
    grids = [(x, y) for x in range(1, MOST_TILES + 1) for y in range(1, MOST_TILES + 1) if x * y <= MOST_TILES]
    best, distance = (1, 1), float("inf")
    for x, y in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        off = abs(width / height - x / y)
        if off < distance or (off == distance and width * height > 0.5 * SIDE**2 * x * y):
            best, distance = (x, y), off
    tiles = best[0] * best[1]
    return tiles + 1 if tiles > 1 else 1


class InternVLRow:
    model_type = "internvl"
    stock_class = InternVLForConditionalGeneration
    options = {"visual_token_num": 5}
    modalities = ("image", "video")
    positions = "renumber"

    def config(self) -> InternVLConfig:
        text = {
            "model_type": "qwen2",
            "vocab_size": 200,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "initializer_range": 0.3,
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
            "layer_scale_init_value": 1.0,
            "initializer_range": 0.3,
        }
        return InternVLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=IMAGE,
            image_seq_length=TOKENS,
            tie_word_embeddings=False,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )

    def inputs(self, prompts: Sequence[Sequence[Part]]) -> dict[str, torch.Tensor]:
        rows, pixels = [], []
        for prompt in prompts:
            rows.append([BOS])
            for part in prompt:
                if isinstance(part, list):
                    rows[-1] += part
                elif isinstance(part, Image):
                    tiles = tiles_of(part.size)
                    rows[-1] += [START, *[IMAGE] * TOKENS * tiles, END]
                    pixels += drawn_tiles(tiles, SIDE, part.seed)
                else:
                    for frame in range(part.frames):
                        rows[-1] += [NEWLINE] * (frame > 0) + [FRAME, START, *[IMAGE] * TOKENS, END]
                    pixels += drawn_tiles(part.frames, SIDE, part.seed)
        return {**left_padded(rows, PAD), **({"pixel_values": torch.stack(pixels)} if pixels else {})}

    def shortened(self, inputs: Mapping[str, torch.Tensor], kept: Mapping[int, Sequence[int]]) -> dict[str, Any]:
        full = {IMAGE: [TOKENS] * len(kept[IMAGE])}
        return leave_first(inputs, full, kept, PAD)

    @torch.no_grad()
    def reference(self, stock: Any, inputs: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> Reference:
        if "pixel_values" not in inputs:
            return {IMAGE: []}
        tower = with_attention_maps(stock.model.vision_tower)
        layer = options.get("attention_layer")
        tiles = []
        for tile in inputs["pixel_values"]:
            outputs = tower(tile[None], output_attentions=True)
            seen_by_cls = outputs.attentions[-1 if layer is None else layer][0, :, 0, 1:].mean(0)
            patches = merged_blocks(outputs.last_hidden_state[0, 1:], 2)
            saliency = merged_blocks(seen_by_cls[:, None], 2).mean(-1)
            kept = chosen(patches, saliency, options)
            tiles.append((stock.model.multi_modal_projector(patches[kept]), kept))
        return {IMAGE: tiles}


ROW = InternVLRow()
