"""One row per architecture for the property matrix: a tiny model, prompts for it, and what pruning must compute.

A row's file is named after its model_type and defines `ROW`, and where an architecture can be set up in ways that
matter, by name `VARIANTS` of it. Prompts are written by hand as the stock processor would, so that no processor (and
no torchvision) is needed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Image:
    """Stands for a picture of `size` (height, width) in a prompt; its pixels are drawn from the seed."""

    size: tuple[int, int]
    seed: int = 0


@dataclass(frozen=True)
class Video:
    """Stands for a video of so many frames of `size` (height, width)."""

    frames: int
    size: tuple[int, int]
    seed: int = 0


PLAIN = range(10, 60)  # ids of ordinary text in the tiny models, all of which have at least 100
Part = list[int] | Image | Video
# Per placeholder id and item: the tokens (T, D) and the placeholders (T,) of the full prompt that they stand for.
Reference = dict[int, list[tuple[torch.Tensor, torch.Tensor]]]


class Row(Protocol):
    """What the matrix asks of an architecture.

    options     of vispruner_config with which it is tested; they drop tokens of every image and video below
    modalities  of "image" and "video" those it has
    positions   "renumber" or "original": what kept tokens get by default
    attention   of both models, where it is not "eager"
    inputs      any size of image and 8 frames of video must do; the ids of `PLAIN` mean nothing special
    """

    model_type: str
    stock_class: type
    options: dict[str, Any]
    modalities: tuple[str, ...]
    positions: str

    def config(self) -> Any: ...

    def inputs(self, prompts: Sequence[Sequence[Part]]) -> dict[str, torch.Tensor]: ...

    def shortened(self, inputs: Mapping[str, torch.Tensor], kept: Mapping[int, Sequence[int]]) -> dict[str, Any]: ...

    def reference(self, stock: Any, inputs: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> Reference: ...


def rows() -> Iterator[Row]:
    for file in sorted(Path(__file__).parent.glob("[!_]*.py")):
        yield import_module(f"rows.{file.stem}").ROW


def variants() -> dict[str, Row]:
    """Return by name the rows that differ from an architecture's own in how it is set up."""
    modules = [import_module(f"rows.{row.model_type}") for row in rows()]
    return {name: row for module in modules for name, row in getattr(module, "VARIANTS", {}).items()}


@torch.no_grad()
def draw_weights(model: Any, seed: int = 0) -> None:
    """Give a tiny model weights by which attention is uneven, logits depend on the image and answers are `PLAIN`."""
    for name, parameter in model.named_parameters():
        drawn = noise(parameter.shape, zlib.crc32(f"{seed}:{name}".encode()))
        if parameter.ndim < 2:
            scale = "norm" in name and name.endswith("weight")
            parameter.copy_(1.0 + 0.1 * drawn if scale else 0.1 * drawn)
        elif "embed" in name and "patch_embed" not in name:
            parameter.copy_(drawn if "token" in name else 0.3 * drawn)
        else:
            spread = 1.5 if any(part in name for part in ("q_proj", "k_proj", "qkv")) else 1.0
            parameter.copy_(spread * drawn * parameter[0].numel() ** -0.5)
    head = model.get_output_embeddings().weight
    head[: PLAIN.start] = head[PLAIN.stop :] = 0.0


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> dict[str, torch.Tensor]:
    """Return input_ids and attention_mask of prompts of any lengths."""
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
    }


def noise(shape: Sequence[int], seed: int) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def shortened(
    inputs: Mapping[str, torch.Tensor],
    full: Mapping[int, Sequence[int]],
    kept: Mapping[int, Sequence[int]],
    pad: int,
) -> dict[str, Any]:
    """Leave the first `kept[id][j]` of the `full[id][j]` placeholders of each item j, padding anew on the left.

    Where more are kept than there were, the last one stands as often as that takes.
    """
    left = {token: [list(counts) for counts in zip(full[token], kept[token], strict=True)] for token in full}
    rows = []
    for ids, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True):
        row = []
        for column, (token, seen) in enumerate(zip(ids, mask, strict=True)):
            if not seen:
                continue
            if token in left:
                counts = left[token][0]
                counts[0] -= 1
                counts[1] -= 1
                more = counts[1] if counts[0] == 0 else 0
                if counts[0] == 0:
                    left[token].pop(0)
                if counts[1] < 0:
                    continue
                row += [(token, column)] * more
            row.append((token, column))
        rows.append(row)
    width = max(map(len, rows))
    short = {**inputs, **left_padded([[token for token, _ in row] for row in rows], pad)}
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"].tolist()
        short["mm_token_type_ids"] = torch.tensor(
            [
                [0] * (width - len(row)) + [types[number][column] for _, column in row]
                for number, row in enumerate(rows)
            ]
        )
    return short
