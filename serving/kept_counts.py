"""How many visual tokens a request's picture keeps: known from its size and budget before any encoder runs.

Needs no engine. The front end of an engine writes so many placeholders, and its worker must return as many tokens.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from vispruner.configuration_vispruner import VisPrunerOptions
from vispruner.modeling_vispruner_llava_onevision import PackedTiles


class Picture(NamedTuple):
    """An image, or a video of so many `frames`, as the client sent it."""

    height: int
    width: int
    frames: int | None = None


class OnevisionTiles(PackedTiles):
    """Counts the tokens of LLaVA-OneVision, by its config alone."""

    def __init__(self, config: Any) -> None:
        self.config = config


def kept_count(config: Any, options: VisPrunerOptions, run: int, picture: Picture) -> int:
    """Return how many of a run of `run` placeholders stay that a full prompt has in one piece for a picture."""
    return KEPT.get(config.model_type, _of_one_tile)(config, options, run, picture)


def side_of_tile(config: Any) -> int:
    """Return the patches along one side of an image or tile."""
    return config.vision_config.image_size // config.vision_config.patch_size


def tile_grid(config: Any, height: int, width: int) -> tuple[int, int]:
    """Return rows and columns of the tiles beside the base tile (LLaVA-NeXT)."""
    return get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, config.vision_config.image_size)


def _of_one_tile(config: Any, options: VisPrunerOptions, run: int, picture: Picture) -> int:
    return options.budget(run)


def _of_internvl(config: Any, options: VisPrunerOptions, run: int, picture: Picture) -> int:
    """All tiles of an image stand in one run."""
    (height, width), (rows, columns) = config.vision_config.image_size, config.vision_config.patch_size
    tokens = int((height // rows) * (width // columns) * config.downsample_ratio**2)
    tiles, rest = divmod(run, tokens)
    if rest:
        raise ValueError(
            f"the processor writes {run} placeholders for an image, but a tile has {tokens} visual tokens: set "
            f"image_seq_length in processor_config.json to {tokens}"
        )
    return tiles * options.budget(tokens)


def _of_llava_next(config: Any, options: VisPrunerOptions, run: int, picture: Picture) -> int:
    """In tile_mode "paper": the budget for each tile, and no newlines."""
    rows, columns = tile_grid(config, picture.height, picture.width)
    return options.budget(side_of_tile(config) ** 2) * (1 + rows * columns)


def _of_llava_onevision(config: Any, options: VisPrunerOptions, run: int, picture: Picture) -> int:
    tiles = OnevisionTiles(config)
    if picture.frames is not None:
        return picture.frames * options.budget(math.ceil(tiles.side / 2) ** 2) + 1
    packing = tiles.packing_of([picture.height, picture.width])
    return sum(tiles.budgets_of(packing, options)) + packing.newlines


def _of_frames(config: Any, options: VisPrunerOptions, run: int, picture: Picture) -> int:
    """All frames of a video stand in one run."""
    frames = picture.frames or 1
    return frames * options.budget(run // frames)


KEPT: dict[str, Callable[[Any, VisPrunerOptions, int, Picture], int]] = {
    "internvl": _of_internvl,
    "llava_next": _of_llava_next,
    "llava_onevision": _of_llava_onevision,
    "qwen2_5_vl": _of_frames,
    "qwen2_vl": _of_frames,
}
