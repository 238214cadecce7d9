"""LLaVA-OneVision: SigLIP without [CLS], two pools of tokens per image, grids that are scaled down, pooled frames.

With anyres_max_1 the grid of the 2:3 picture is interpolated, and that of the square one is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.image_processing_utils import select_best_resolution

from rows import Image, Part, Reference, Video, left_padded, noise, shortened
from vispruner.selectors import select_tokens

IMAGE, VIDEO, PAD = 90, 91, 0
SIDE, TILE, POOLED = 7, 98, 4  # patches along a tile, pixels along it, tokens along a pooled frame
GRIDS = [[98, 196], [196, 98], [196, 196]]
NEWLINE = None


class LlavaOnevisionRow:
    model_type = "llava_onevision"
    stock_class = LlavaOnevisionForConditionalGeneration
    options = {"visual_token_num": 6}
    modalities = ("image", "video")
    positions = "renumber"
    most_tiles = 1

    def config(self) -> LlavaOnevisionConfig:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
        vision = SiglipVisionConfig(
            **sizes, num_hidden_layers=3, image_size=TILE, patch_size=TILE // SIDE, vision_use_head=False
        )
        text = Qwen2Config(
            **sizes,
            vocab_size=100,
            num_hidden_layers=2,
            num_key_value_heads=2,
            pad_token_id=PAD,
            bos_token_id=1,
            eos_token_id=2,
        )
        return LlavaOnevisionConfig(
            vision_config=vision.to_dict(),
            text_config=text.to_dict(),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_grid_pinpoints=GRIDS,
            vision_aspect_ratio=f"anyres_max_{self.most_tiles}",
        )

    def inputs(self, prompts: Sequence[Sequence[Part]]) -> dict[str, torch.Tensor]:
        rows, pixels, sizes, together, videos = [], [], [], [], []
        for prompt in prompts:
            rows.append([1])
            images = sum(isinstance(part, Image) for part in prompt)
            together += [images] * bool(images)
            for part in prompt:
                if isinstance(part, Image):
                    shape = grid_of(part.size) if images == 1 else (0, 0)
                    rows[-1] += [IMAGE] * len(self.layout(part.size, *shape))
                    pixels.append(noise((1 + math.prod(shape), 3, TILE, TILE), part.seed))
                    sizes.append(part.size)
                elif isinstance(part, Video):
                    rows[-1] += [VIDEO] * (part.frames * POOLED**2 + 1)
                    videos.append(noise((part.frames, 3, TILE, TILE), part.seed))
                else:
                    rows[-1] += part
        inputs = left_padded(rows, PAD)
        if pixels:
            most = max(map(len, pixels))
            padded = [torch.cat([tiles, tiles.new_zeros(most - len(tiles), 3, TILE, TILE)]) for tiles in pixels]
            inputs |= {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor(sizes)}
            inputs |= {"batch_num_images": torch.tensor(together)}
        return inputs | ({"pixel_values_videos": torch.stack(videos)} if videos else {})

    def kept_area(self, size: tuple[int, int], rows: int, columns: int) -> tuple[range, range]:
        """Rows and columns of the stitched grid that hold picture, not padding."""
        high, wide = rows * SIDE, columns * SIDE
        height, width = size
        top = left = 0
        if width / height > wide / high:
            top = (high - int(round(height * wide / width, 7))) // 2
        else:
            left = (wide - int(round(width * high / height, 7))) // 2
        return range(top, high - top), range(left, wide - left)

    def scaled(self, high: int, wide: int) -> tuple[int, int]:
        """Rows and columns of tokens that stock makes of a grid of patches."""
        ratio = math.sqrt(high * wide / (self.most_tiles * SIDE**2))
        return (int(high // ratio), int(wide // ratio)) if ratio > 1.1 else (high, wide)

    def layout(self, size: tuple[int, int], rows: int, columns: int) -> list:
        """An image's tokens in order: ("base", patch), ("rest", place in its grid), or NEWLINE."""
        tokens: list = [("base", patch) for patch in range(SIDE**2)]
        if rows == 0:
            return [*tokens, NEWLINE]
        high, wide = self.scaled(*map(len, self.kept_area(size, rows, columns)))
        for y in range(high):
            tokens += [("rest", y * wide + x) for x in range(wide)]
            tokens.append(NEWLINE)
        return tokens

    def grid_tokens(self, tiles: torch.Tensor, size: tuple[int, int], rows: int, columns: int) -> torch.Tensor:
        """What the tiles beside the base tile (tiles, N, C) give for each token of the packed grid: (tokens, C)."""
        ys, xs = self.kept_area(size, rows, columns)
        grid = torch.empty(tiles.shape[-1], len(ys), len(xs), dtype=tiles.dtype)
        for i, y in enumerate(ys):
            for j, x in enumerate(xs):
                grid[:, i, j] = tiles[y // SIDE * columns + x // SIDE, y % SIDE * SIDE + x % SIDE]
        if self.scaled(len(ys), len(xs)) != (len(ys), len(xs)):
            grid = resized(grid, *self.scaled(len(ys), len(xs)))
        return grid.flatten(1).T

    def shortened(self, inputs: Mapping[str, torch.Tensor], kept: Mapping[int, Sequence[int]]) -> dict[str, Any]:
        full = [len(self.layout(*image)) for image in images_of(inputs)]
        videos = [8 * POOLED**2 + 1] * len(inputs.get("pixel_values_videos", ()))
        return shortened(inputs, {IMAGE: full, VIDEO: videos}, kept, PAD)

    @torch.no_grad()
    def reference(self, stock: Any, inputs: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> Reference:
        newline = stock.model.image_newline
        images, videos = [], []
        for pixels, (size, rows, columns) in zip(inputs.get("pixel_values", ()), images_of(inputs), strict=True):
            features, saliency, projected = encode(stock, pixels[: 1 + rows * columns])
            stays = {("base", patch) for patch in choose(features[0], saliency[0], options)}
            pools = {"base": projected[0]}
            if rows:
                image = (size, rows, columns)
                rest = self.grid_tokens(features[1:], *image), self.grid_tokens(saliency[1:, :, None], *image)[:, 0]
                pools["rest"] = self.grid_tokens(projected[1:], *image)
                stays |= {("rest", place) for place in choose(*rest, options, rows * columns)}
            layout = self.layout(size, rows, columns)
            places = [place for place, token in enumerate(layout) if token is NEWLINE or token in stays]
            tokens = [newline if layout[n] is NEWLINE else pools[layout[n][0]][layout[n][1]] for n in places]
            images.append((torch.stack(tokens), torch.tensor(places)))
        for frames in inputs.get("pixel_values_videos", ()):
            tokens, places = [], []
            for number, frame in enumerate(frames):
                features, saliency, projected = (pool(part[0]) for part in encode(stock, frame[None]))
                for place in choose(features, saliency[:, 0], options):
                    tokens.append(projected[place])
                    places.append(number * POOLED**2 + place)
            videos.append((torch.stack([*tokens, newline]), torch.tensor([*places, len(frames) * POOLED**2])))
        return {token: items for token, items in ((IMAGE, images), (VIDEO, videos)) if items}


def grid_of(size: tuple[int, int]) -> tuple[int, int]:
    height, width = select_best_resolution(size, GRIDS)
    return height // TILE, width // TILE


def images_of(inputs: Mapping[str, torch.Tensor]) -> list[tuple[tuple[int, int], int, int]]:
    """Per image its size and the rows and columns of its tiles, none where it is not alone in its prompt."""
    together = inputs.get("batch_num_images", torch.ones(len(inputs.get("image_sizes", ())), dtype=torch.long))
    alone = [images == 1 for images in together.tolist() for _ in range(images)]
    sizes = [tuple(size.tolist()) for size in inputs.get("image_sizes", ())]
    return [(size, *(grid_of(size) if one else (0, 0))) for size, one in zip(sizes, alone, strict=True)]


def encode(stock: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features (tiles, N, C), the mean attention each patch gets (tiles, N), projected features (tiles, N, D)."""
    outputs = stock.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
    features = outputs.hidden_states[-1]
    return features, outputs.attentions[-1].mean(dim=(1, 2)), stock.model.multi_modal_projector(features)


def choose(features: torch.Tensor, saliency: torch.Tensor, options: Mapping[str, Any], tiles: int = 1) -> list[int]:
    """Which of a pool's tokens stay: T for each of its tiles, or a fraction of all."""
    if len(features) == 0:
        return []
    if options["visual_token_num"] is None:
        budget = max(1, math.floor(len(features) * options["keep_ratio"] + 0.5))
    else:
        budget = min(options["visual_token_num"] * tiles, len(features))
    return select_tokens("vispruner", features[None], saliency[None], budget)[0].tolist()


def resized(grid: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(grid[None], size=(rows, columns), mode="bilinear")[0]


def pool(tokens: torch.Tensor) -> torch.Tensor:
    """Bring a frame's patches (N, C) or (N,) to the grid of pooled tokens."""
    tokens = tokens[:, None] if tokens.dim() == 1 else tokens
    return resized(tokens.T.unflatten(1, (SIDE, SIDE)), POOLED, POOLED).flatten(1).T


ROW = LlavaOnevisionRow()
