"""Generate the pictures and questions that the embedded checkpoint is trained and measured on.

A scene is a 96 x 96 picture, 12 x 12 patches: a cluttered background, one to four small coloured shapes and mostly a
real handwritten digit, about a tenth of the area. `generate_scene(split, seed, index)` always returns the same scene.
No scene of one split occurs in another, whatever the seeds, and neither does a digit image. `easy_vqa_questions` reads
the pictures of the easy-vqa package in the same form. Needs scikit-learn (the digits) and easy-vqa.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from vispruner.conversion.drawn_scenes import COLORS

IMAGE_SIZE = 96
PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE

SPLITS = ("train", "validation", "test")
QUESTION_TYPES = ("color", "shape", "digit", "exist", "count", "where", "relation")

SHAPES = ("circle", "square", "triangle", "star", "cross")
NUMBERS = ("zero", "one", "two", "three", "four")
EASY_VQA_SHAPES = ("circle", "rectangle", "triangle")
QUADRANTS = ("top-left", "top-right", "bottom-left", "bottom-right")

SHAPE_SIDES = (12, 17)  # pixels, the upper end excluded
DIGIT_SIDES = (18, 23)
DIGIT_SHARE = 0.8  # of the scenes
QUADRANT_MARGIN = 5  # pixels from both middle lines, below which nobody is asked where something is
RELATION_MARGIN = 12  # pixels between two centres

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class SceneObject:
    """A shape (has color and shape) or a digit (has digit); box is left, top, right, bottom, ends excluded."""

    kind: str
    box: Box
    color: str | None = None
    shape: str | None = None
    digit: int | None = None

    @property
    def name(self) -> str:
        return "digit" if self.kind == "digit" else f"{self.color} {self.shape}"

    @property
    def center(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Question:
    """A question with its one-word answer; boxes are those of the objects that the answer rests on (none for a no)."""

    type: str
    text: str
    answer: str
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Scene:
    """A picture, its objects and questions about it."""

    image: Image.Image
    questions: list[Question]
    objects: list[SceneObject]


@dataclass(frozen=True)
class EasyVqaItem:
    """One question of the easy-vqa package with its picture, and the picture's number there."""

    image: Image.Image
    question: Question
    image_id: int


def prompt(question: str) -> str:
    """The prompt that the checkpoint is trained on: what its chat template gives for one picture and a question."""
    return f"USER: <image>\n{question} ASSISTANT:"


def generate_scene(split: str, seed: int, index: int) -> Scene:
    """Generate scene number `index` of a split ("train", "validation" or "test") and a seed (any integer >= 0)."""
    rng = scene_rng(split, seed, index)
    digits = int(rng.random() < DIGIT_SHARE)
    pixels, objects = compose(rng, split, shapes=int(rng.integers(1, 5)), digits=digits)
    return Scene(Image.fromarray(pixels), ask(objects, rng), objects)


def scene_rng(split: str, seed: int, index: int) -> np.random.Generator:
    """The random numbers of one scene: a stream of its own for every (split, seed, index)."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be >= 0, got {seed} and {index}")
    return np.random.default_rng([SPLITS.index(split), seed, index])


def compose(rng: np.random.Generator, split: str, *, shapes: int, digits: int) -> tuple[np.ndarray, list[SceneObject]]:
    """Draw a picture (96, 96, 3) of bytes with this many shapes, no two alike, and digits; return it with its objects.

    Where the picture gets too crowded for one more object, it stays without.
    """
    canvas = _background(rng)
    objects: list[SceneObject] = []
    for number in rng.permutation(len(COLORS) * len(SHAPES))[:shapes]:
        box = _free_box(rng, int(rng.integers(*SHAPE_SIDES)), objects)
        if box is None:
            continue
        color, shape = list(COLORS)[number // len(SHAPES)], SHAPES[number % len(SHAPES)]
        ink = np.clip(np.array(COLORS[color]) + rng.integers(-15, 16, 3), 0, 255)
        _blend(canvas, box, _shape_mask(shape, box[2] - box[0], rng), ink)
        objects.append(SceneObject("shape", box, color=color, shape=shape))
    for _ in range(digits):
        box = _free_box(rng, int(rng.integers(*DIGIT_SIDES)), objects)
        if box is None:
            continue
        images, labels = _digits(split)
        chosen = int(rng.integers(len(labels)))
        _blend(canvas, box, _digit_mask(images[chosen], box[2] - box[0], rng), np.full(3, rng.integers(225, 256)))
        objects.append(SceneObject("digit", box, digit=int(labels[chosen])))
    canvas += rng.normal(0, 4, canvas.shape)
    return np.clip(canvas, 0, 255).astype(np.uint8), objects


def ask(objects: list[SceneObject], rng: np.random.Generator) -> list[Question]:
    """Ask about the objects of a scene: up to two questions of each type, one for the digit; nothing ambiguous."""
    shapes = [o for o in objects if o.kind == "shape"]
    by_color, by_shape = Counter(o.color for o in shapes), Counter(o.shape for o in shapes)
    questions: list[Question] = []
    for o in _some(rng, [o for o in shapes if by_shape[o.shape] == 1], 2):
        questions.append(Question("color", f"What color is the {o.shape}?", str(o.color), (o.box,)))
    for o in _some(rng, [o for o in shapes if by_color[o.color] == 1], 2):
        questions.append(Question("shape", f"What shape is the {o.color} object?", str(o.shape), (o.box,)))
    digits = [o for o in objects if o.kind == "digit"]
    if len(digits) == 1:
        questions.append(Question("digit", "Which digit is shown?", str(digits[0].digit), (digits[0].box,)))
    questions += _ask_exist(shapes, rng)
    questions += _ask_count(shapes, rng)
    named = shapes + (digits if len(digits) == 1 else [])
    middle = IMAGE_SIZE / 2
    placed = [o for o in named if min(abs(c - middle) for c in o.center) >= QUADRANT_MARGIN]
    for o in _some(rng, placed, 2):
        x, y = o.center
        answer = QUADRANTS[2 * (y > middle) + (x > middle)]
        questions.append(Question("where", f"Where is the {o.name}?", answer, (o.box,)))
    return questions + _ask_relation(named, rng)


def easy_vqa_questions(split: str, limit: int | None = None) -> Iterator[EasyVqaItem]:
    """Read the questions of easy-vqa, the pictures resized to 96 x 96, in the order of the package.

    Its test split is "test"; the last tenth of its training pictures is "validation", the rest "train".
    """
    import easy_vqa

    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    test = split == "test"
    paths = easy_vqa.get_test_image_paths() if test else easy_vqa.get_train_image_paths()
    texts, answers, image_ids = easy_vqa.get_test_questions() if test else easy_vqa.get_train_questions()
    held_out = set(sorted(paths)[-(len(paths) // 10) :])
    taken, image, image_of = 0, None, None
    for text, answer, image_id in zip(texts, answers, image_ids, strict=True):
        if not test and (image_id in held_out) != (split == "validation"):
            continue
        if limit is not None and taken == limit:
            return
        if image is None or image_of != image_id:
            with Image.open(paths[image_id]) as file:
                image = file.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
            image_of = image_id
        kind = "exist" if answer in ("yes", "no") else "shape" if answer in EASY_VQA_SHAPES else "color"
        yield EasyVqaItem(image, Question(kind, text, answer), image_id)
        taken += 1


def _some(rng: np.random.Generator, items: list[SceneObject], most: int) -> list[SceneObject]:
    return [items[i] for i in rng.permutation(len(items))[:most]]


def _ask_exist(shapes: list[SceneObject], rng: np.random.Generator) -> list[Question]:
    """One yes and one no; the no names the colour or the shape of something that is there, where it can both."""
    present = {(o.color, o.shape): o for o in shapes}
    crossed = [(c, s) for c in {o.color: 0 for o in shapes} for s in {o.shape: 0 for o in shapes}]
    absent = [pair for pair in crossed if pair not in present]
    if not absent or rng.random() < 0.3:
        o = shapes[int(rng.integers(len(shapes)))]
        near = [(c, o.shape) for c in COLORS] + [(o.color, s) for s in SHAPES]
        absent = [pair for pair in near if pair not in present]
    color, shape = absent[int(rng.integers(len(absent)))]
    there = shapes[int(rng.integers(len(shapes)))]
    return [
        Question("exist", f"Is there {_article(there.name)}?", "yes", (there.box,)),
        Question("exist", f"Is there {_article(f'{color} {shape}')}?", "no"),
    ]


def _ask_count(shapes: list[SceneObject], rng: np.random.Generator) -> list[Question]:
    """Count all shapes, and those of one colour or form, which once in a while does not occur."""
    everything = Question("count", "How many shapes are there?", NUMBERS[len(shapes)], tuple(o.box for o in shapes))
    o = shapes[int(rng.integers(len(shapes)))]
    somewhere = rng.random() < 0.75
    if rng.random() < 0.5:
        color = str(o.color) if somewhere else list(COLORS)[int(rng.integers(len(COLORS)))]
        asked, matching = f"{color} shapes", [o for o in shapes if o.color == color]
    else:
        shape = str(o.shape) if somewhere else SHAPES[int(rng.integers(len(SHAPES)))]
        plural = "crosses" if shape == "cross" else f"{shape}s"
        asked, matching = plural, [o for o in shapes if o.shape == shape]
    answer = NUMBERS[len(matching)]
    return [everything, Question("count", f"How many {asked} are there?", answer, tuple(o.box for o in matching))]


def _ask_relation(named: list[SceneObject], rng: np.random.Generator) -> list[Question]:
    """Ask whether one object is left of another, or above it, when it clearly is or is not."""
    candidates = []
    for first in named:
        for second in named:
            dx, dy = (b - a for a, b in zip(first.center, second.center, strict=True))
            if abs(dx) >= RELATION_MARGIN:
                candidates.append((first, second, "left of", dx > 0))
            if abs(dy) >= RELATION_MARGIN:
                candidates.append((first, second, "above", dy > 0))
    questions = []
    for i in rng.permutation(len(candidates))[:2]:
        first, second, relation, holds = candidates[i]
        text = f"Is the {first.name} {relation} the {second.name}?"
        questions.append(Question("relation", text, "yes" if holds else "no", (first.box, second.box)))
    return questions


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _background(rng: np.random.Generator) -> np.ndarray:
    """A dim uneven ground with thin strokes and bright specks, in any colour: clutter that nobody asks about."""
    coarse = rng.uniform(25, 105) + rng.normal(0, 14, (4, 4, 1)) + rng.normal(0, 10, (4, 4, 3))
    ramp = _ramp()
    canvas = np.einsum("bj,ajc->abc", ramp, np.einsum("ai,ijc->ajc", ramp, coarse))
    for _ in range(int(rng.integers(4, 9))):
        start, angle, length = rng.uniform(0, IMAGE_SIZE, 2), rng.uniform(0, 2 * math.pi), rng.uniform(15, 60)
        steps = np.arange(0, length, 0.7)
        bend = angle + rng.uniform(-1, 1) * steps / length
        xs = (start[0] + np.cumsum(np.cos(bend)) * 0.7).astype(int)
        ys = (start[1] + np.cumsum(np.sin(bend)) * 0.7).astype(int)
        inside = (xs >= 0) & (ys >= 0) & (xs < IMAGE_SIZE) & (ys < IMAGE_SIZE)
        canvas[ys[inside], xs[inside]] = rng.integers(60, 210, 3)
    specks = int(rng.integers(12, 30))
    ys, xs = rng.integers(0, IMAGE_SIZE - 1, (2, specks))
    inks = rng.integers(0, 256, (specks, 3))
    canvas[ys, xs] = inks
    wide = specks // 2
    canvas[ys[:wide] + 1, xs[:wide]] = canvas[ys[:wide], xs[:wide] + 1] = inks[:wide]
    return canvas


@lru_cache(maxsize=1)
def _ramp() -> np.ndarray:
    """(96, 4): the weights that stretch four values linearly over the picture."""
    position = np.linspace(0, 3, IMAGE_SIZE)[:, None]
    return np.clip(1 - np.abs(position - np.arange(4)[None]), 0, 1)


def _free_box(rng: np.random.Generator, side: int, objects: list[SceneObject]) -> Box | None:
    for _ in range(60):
        left, top = (int(v) for v in rng.integers(1, IMAGE_SIZE - side, 2))
        box = (left, top, left + side, top + side)
        if all(_apart(box, other.box) for other in objects):
            return box
    return None


def _apart(a: Box, b: Box, gap: int = 3) -> bool:
    return a[2] + gap <= b[0] or b[2] + gap <= a[0] or a[3] + gap <= b[1] or b[3] + gap <= a[1]


def _blend(canvas: np.ndarray, box: Box, mask: np.ndarray, ink: np.ndarray) -> None:
    left, top, right, bottom = box
    part = canvas[top:bottom, left:right]
    part += mask[..., None] * (ink - part)


def _shape_mask(shape: str, side: int, rng: np.random.Generator, samples: int = 3) -> np.ndarray:
    """(side, side): how much of each pixel the shape covers; slightly turned, except the circle."""
    ticks = (np.arange(side * samples) + 0.5) / (side * samples) * 2 - 1
    x, y = np.meshgrid(ticks, ticks)
    angle = rng.uniform(-0.2, 0.2)
    x, y = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    if shape == "circle":
        inside = x * x + y * y <= 0.95
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) <= 0.82
    elif shape == "triangle":
        inside = (y <= 0.78) & (y >= 2 * abs(x) * 0.9 - 0.9)
    elif shape == "cross":
        inside = (np.minimum(abs(x), abs(y)) <= 0.27) & (np.maximum(abs(x), abs(y)) <= 0.92)
    else:
        turn = (np.arctan2(x, -y) / (2 * math.pi / 5) + 0.5) % 1 - 0.5
        inside = np.hypot(x, y) * (1 + 2.6 * abs(turn)) <= 0.98
    return inside.reshape(side, samples, side, samples).mean((1, 3))


def _digit_mask(image: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """(side, side): the 8 x 8 digit enlarged bilinearly, slightly turned and slanted."""
    ticks = (np.arange(side) + 0.5) / side * 2 - 1
    x, y = np.meshgrid(ticks, ticks)
    angle, slant = rng.uniform(-0.12, 0.12, 2)
    x, y = x * math.cos(angle) + y * (math.sin(angle) + slant), y * math.cos(angle) - x * math.sin(angle)
    padded = np.pad(image, 2)
    columns, rows = (np.clip((v + 1) * 4 - 0.5 + 2, 0, 10.999) for v in (x, y))
    left, top = columns.astype(int), rows.astype(int)
    fx, fy = columns - left, rows - top
    upper = padded[top, left] * (1 - fx) + padded[top, left + 1] * fx
    lower = padded[top + 1, left] * (1 - fx) + padded[top + 1, left + 1] * fx
    return np.clip(1.3 * (upper * (1 - fy) + lower * fy), 0, 1)


@lru_cache(maxsize=len(SPLITS))
def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The split's share of scikit-learn's digits, by index: six of eight train, one validates, one tests."""
    from sklearn.datasets import load_digits

    data = load_digits()
    turn = np.arange(len(data.target)) % 8
    chosen = {"train": turn < 6, "validation": turn == 6, "test": turn == 7}[split]
    return data.images[chosen] / 16.0, data.target[chosen]
