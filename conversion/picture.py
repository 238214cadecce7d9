"""Show which patches of an image a pruned model keeps, on the image as the model sees it (resized, cropped, tiled)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from transformers import AutoProcessor, PreTrainedModel

import vispruner
from vispruner.token_selection import important_tokens

# Okabe-Ito orange and blue: told apart with every common colour blindness, and by their brightness in grey.
IMPORTANT_COLOUR = (230, 159, 0)
DIVERSE_COLOUR = (0, 114, 178)
BACKGROUND = (255, 255, 255)
INK = (30, 30, 30)

GAP = 12
TEXT_SIZE = 20
SINGLE_TILE_WIDTH = 720
TILE_WIDTH = 360


@dataclass(frozen=True)
class TileView:
    """One encoded tile and what was kept of it.

    image      the pixels that the vision tower got
    kept       (rows, columns) True where the patch stays
    important  (rows, columns) True where it stays for its attention; None when the method makes no such difference
    row, column  place among the other tiles
    """

    image: Image.Image
    kept: torch.Tensor
    important: torch.Tensor | None
    row: int = 0
    column: int = 0


def open_photo(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file as upright RGB; OSError says which file cannot be read."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"{os.fspath(path)} is not a readable image: {error}") from error


def show(
    image: str | os.PathLike[str], repo: str, out: str | os.PathLike[str], visual_token_num: int | None = None
) -> Path:
    """Write the picture of the patches that the model in `repo` keeps of the file `image`.

    repo              a built repo, or any stock checkpoint together with visual_token_num; a folder or a Hub id.
                      Its own code is never run: the installed package reads it
    visual_token_num  overrides the budget that the repo stores
    """
    out = _png_path(out)
    photo = open_photo(image)
    changes = {} if visual_token_num is None else {"visual_token_num": visual_token_num}
    model = vispruner.load(repo, dtype="auto", **changes).eval()
    tiles = view_kept_patches(model, AutoProcessor.from_pretrained(repo), photo)
    return save_png(kept_patches_picture(tiles, caption=f"{Path(image).name} as {Path(repo).name} sees it"), out)


@torch.no_grad()
def view_kept_patches(model: PreTrainedModel, processor: Any, photo: Image.Image) -> list[TileView]:
    """Encode one photo and return its tiles: the base tile first, then the others row by row."""
    inputs = processor.image_processor(images=photo, return_tensors="pt").to(model.device)
    arguments = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    arguments["pixel_values"] = arguments["pixel_values"].to(model.dtype)
    output = model.get_image_features(**arguments, return_dict=True)
    pixels = arguments["pixel_values"].flatten(0, -4)  # (tiles, 3, height, width)
    patch = model.config.vision_config.patch_size
    rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    kept = torch.zeros(len(pixels), rows * columns, dtype=torch.bool)
    chosen = output.kept_indices[0].cpu()
    kept.view(-1)[chosen[chosen >= 0]] = True
    important = None
    if output.saliency is not None:  # something was dropped
        important = _important_patches(model, output.saliency.cpu(), inputs.get("image_sizes"))
    places = _tile_places(model, inputs.get("image_sizes"), len(pixels))
    views = [image_from_pixels(tile, processor.image_processor) for tile in pixels.float().cpu()]
    return [
        TileView(
            view,
            kept[tile].view(rows, columns),
            None if important is None else important[tile].view(rows, columns),
            *places[tile],
        )
        for tile, view in enumerate(views)
    ]


def image_from_pixels(pixel_values: torch.Tensor, image_processor: Any) -> Image.Image:
    """Undo the normalisation of one tile (3, height, width)."""
    mean = torch.tensor(image_processor.image_mean)[:, None, None]
    std = torch.tensor(image_processor.image_std)[:, None, None]
    pixels = ((pixel_values * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _important_patches(
    model: PreTrainedModel, saliency: torch.Tensor, image_sizes: torch.Tensor | None
) -> torch.Tensor | None:
    """Return (tiles, N) True at the patches kept for their attention; None when the method makes no difference."""
    options = model.model.vispruner_options
    ratio = {"vispruner": options.important_ratio, "cls_attention": 1.0}.get(options.method)
    if ratio is None:
        return None
    candidates = torch.ones_like(saliency, dtype=torch.bool)
    if image_sizes is not None and options.tile_mode == "native":
        packing = model.model.stock_packing(image_sizes[0])
        candidates = torch.zeros_like(candidates)
        candidates.view(-1)[packing[packing >= 0]] = True
    important = torch.zeros_like(candidates)
    for tile, patches in enumerate(mask.nonzero()[:, 0] for mask in candidates):
        if len(patches):
            budget = options.budget(saliency.shape[1])
            ranked = important_tokens(saliency[tile, patches][None], budget, ratio)[0]
            important[tile, patches[ranked]] = True
    return important


def _tile_places(model: PreTrainedModel, image_sizes: torch.Tensor | None, tiles: int) -> list[tuple[int, int]]:
    """The base tile stands left of the others, which stand as in the image."""
    if image_sizes is None:
        return [(0, tile) for tile in range(tiles)]
    columns = model.model.tile_grid(image_sizes[0])[1]
    return [(0, 0)] + [(tile // columns, 1 + tile % columns) for tile in range(tiles - 1)]


def kept_patches_picture(tiles: Sequence[TileView], caption: str = "") -> Image.Image:
    """Draw tiles with their dropped patches dimmed and their kept ones framed, above a legend and a caption."""
    width = SINGLE_TILE_WIDTH if len(tiles) == 1 else TILE_WIDTH
    drawn = [_draw_tile(tile, width) for tile in tiles]
    rows, columns = 1 + max(tile.row for tile in tiles), 1 + max(tile.column for tile in tiles)
    cell_width, cell_height = max(image.width for image in drawn), max(image.height for image in drawn)
    tiles_width, tiles_height = columns * (cell_width + GAP) + GAP, rows * (cell_height + GAP) + GAP
    lines = 2 if caption else 1
    picture = Image.new("RGB", (tiles_width, tiles_height + lines * (TEXT_SIZE + GAP)), BACKGROUND)
    for tile, image in zip(tiles, drawn, strict=True):
        picture.paste(image, (GAP + tile.column * (cell_width + GAP), GAP + tile.row * (cell_height + GAP)))
    _draw_legend(picture, tiles, tiles_height)
    if caption:
        text_at = (GAP, tiles_height + TEXT_SIZE + GAP)
        ImageDraw.Draw(picture).text(text_at, caption, fill=INK, font=ImageFont.load_default(TEXT_SIZE))
    return picture


def _draw_tile(tile: TileView, width: int) -> Image.Image:
    rows, columns = tile.kept.shape
    side = max(4, width // columns)
    image = tile.image.resize((side * columns, side * rows), Image.Resampling.BICUBIC)
    faded = Image.blend(ImageOps.grayscale(image).convert("RGB"), Image.new("RGB", image.size, BACKGROUND), 0.7)
    stroke = max(2, side // 9)
    for row, column in tile.kept.nonzero().tolist():
        box = (column * side, row * side, (column + 1) * side, (row + 1) * side)
        faded.paste(image.crop(box), box)
        frame = (box[0], box[1], box[2] - 1, box[3] - 1)
        is_important = tile.important is not None and bool(tile.important[row, column])
        colour = IMPORTANT_COLOUR if is_important else DIVERSE_COLOUR
        ImageDraw.Draw(faded).rectangle(frame, outline=colour, width=stroke)
    return faded


def _draw_legend(picture: Image.Image, tiles: Sequence[TileView], top: int) -> None:
    total, kept = sum(tile.kept.numel() for tile in tiles), sum(int(tile.kept.sum()) for tile in tiles)
    if any(tile.important is not None for tile in tiles):
        important = sum(int(tile.important.sum()) for tile in tiles if tile.important is not None)
        entries = [(IMPORTANT_COLOUR, f"important {important}"), (DIVERSE_COLOUR, f"diverse {kept - important}")]
    else:
        entries = [(DIVERSE_COLOUR, f"kept {kept}")]
    pen, font, left = ImageDraw.Draw(picture), ImageFont.load_default(TEXT_SIZE), GAP
    for colour, text in [*entries, (None, f"of {total} patches")]:
        if colour is not None:
            pen.rectangle((left, top + 2, left + TEXT_SIZE, top + 2 + TEXT_SIZE), outline=colour, width=4)
            left += TEXT_SIZE + GAP // 2
        pen.text((left, top), text, fill=INK, font=font)
        left += round(pen.textlength(text, font=font)) + 2 * GAP


def save_png(picture: Image.Image, out: str | os.PathLike[str]) -> Path:
    """Write a PNG that appears only when it is complete."""
    out = _png_path(out)
    partial = out.with_name(f".{out.name}.partial")
    try:
        picture.save(partial, format="PNG")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return out


def _png_path(out: str | os.PathLike[str]) -> Path:
    out = Path(out).expanduser()
    if out.suffix.lower() != ".png":
        raise ValueError(f"the picture must be written to a .png file, got {out}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"the folder of {out} does not exist: make {out.parent} first")
    return out
