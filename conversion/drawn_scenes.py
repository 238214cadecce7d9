"""Draw scenes of coloured shapes and ask about them: pictures for who has none of their own, the same for a seed.

They are of the kind that the embedded checkpoint answers questions about, without digits. Nobody says what is right:
they serve to compare a pruned model with the unpruned one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIDE = 96  # pixels, enlarged where a model sees more
COLORS = {
    "red": (220, 35, 40),
    "green": (40, 175, 60),
    "blue": (45, 85, 235),
    "yellow": (240, 225, 50),
    "purple": (165, 45, 190),
    "orange": (245, 135, 25),
}
CORNERS = {"triangle": 3, "square": 4, "star": 10}  # around the middle of a shape; the others are drawn apart
SHAPES = (*CORNERS, "circle", "cross")
SCALE = 4  # shapes are drawn so much larger, for smooth edges


class Scene(NamedTuple):
    """A picture, and what to ask about it."""

    picture: Image.Image
    questions: list[str]


def draw_scene(seed: int, number: int, side: int = SIDE) -> Scene:
    """Draw scene `number` of a seed, `side` pixels wide and high, of one to four shapes that are all different."""
    rng = np.random.default_rng([seed, number])
    large = Image.fromarray(_ground(rng)).resize((SIDE * SCALE,) * 2, Image.Resampling.NEAREST)
    pen, quarters = ImageDraw.Draw(large), rng.permutation(4)
    colors = rng.permutation(list(COLORS))[: int(rng.integers(1, 5))]
    shapes = rng.permutation(SHAPES)[: len(colors)]
    for color, shape, quarter in zip(colors, shapes, quarters, strict=False):
        radius = float(rng.uniform(6, 9))
        corner = np.array([quarter % 2, quarter // 2]) * SIDE / 2
        middle = corner + rng.uniform(radius + 2, SIDE / 2 - radius - 2, 2)
        _draw_shape(pen, str(shape), COLORS[str(color)], middle * SCALE, radius * SCALE, float(rng.uniform(-0.2, 0.2)))
    picture = large.resize((side, side), Image.Resampling.BOX if side < SIDE * SCALE else Image.Resampling.BICUBIC)
    return Scene(picture, _questions(rng, [str(color) for color in colors], [str(shape) for shape in shapes]))


def _ground(rng: np.random.Generator) -> np.ndarray:
    """Return a dim uneven ground with specks (96, 96, 3)."""
    coarse = rng.uniform(25, 105) + rng.normal(0, 14, (4, 4, 3))
    ground = np.kron(coarse, np.ones((SIDE // 4, SIDE // 4, 1))) + rng.normal(0, 4, (SIDE, SIDE, 3))
    specks = rng.integers(0, SIDE, (2, 24))
    ground[specks[0], specks[1]] = rng.integers(0, 256, (24, 3))
    return np.clip(ground, 0, 255).astype(np.uint8)


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, color: tuple[int, int, int], middle: np.ndarray, radius: float, turn: float
) -> None:
    if shape == "circle":
        pen.ellipse([*(middle - radius), *(middle + radius)], fill=color)
        return
    if shape == "cross":
        for angle in (turn, turn + math.pi / 2):
            along = np.array([math.cos(angle), math.sin(angle)]) * radius
            pen.line([*(middle - along), *(middle + along)], fill=color, width=round(0.55 * radius))
        return
    corners = CORNERS[shape]
    first = turn - math.pi / (4 if shape == "square" else 2)
    points = []
    for corner in range(corners):
        angle = first + 2 * math.pi * corner / corners
        reach = radius * (0.42 if shape == "star" and corner % 2 else 1)
        points.append((middle[0] + reach * math.cos(angle), middle[1] + reach * math.sin(angle)))
    pen.polygon(points, fill=color)


def _questions(rng: np.random.Generator, colors: list[str], shapes: list[str]) -> list[str]:
    """Ask for a colour, a shape, how many there are, where one is, and whether there is one that may not be."""
    there = int(rng.integers(len(colors)))
    other = str(rng.choice(list(COLORS)))
    article = "an" if other[0] in "aeiou" else "a"
    return [
        f"What color is the {shapes[there]}?",
        f"What shape is the {colors[there]} object?",
        "How many shapes are there?",
        f"Where is the {colors[there]} {shapes[there]}?",
        f"Is there {article} {other} {shapes[there]}?",
    ]
