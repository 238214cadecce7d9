"""Count which blocks of pixels leave before the encoder of Qwen-VL (`pixel_tolerance`): of documents, of photographs.

Documents are drawn here, so that everyone counts the same ones; photographs are those that scikit-image ships. All go
through the image processor of transformers, nearly at their own size.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from outputs import output_file
from PIL import Image, ImageDraw, ImageFont
from records import versions, write_record
from tables_and_plots import markdown_table
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vispruner.pixel_prediction import cells_to_encode

SIDE = 1008  # of a drawn document
LEVELS = (0, 2)  # by how many of 256 levels a pixel may differ
MERGE = 2
# The processors of the released models: the side of a patch, and the spread that pixels are divided by.
MODELS = {"Qwen2-VL, Qwen2.5-VL": (14, (0.26862954, 0.26130258, 0.27577711)), "Qwen3-VL": (16, (0.5, 0.5, 0.5))}
WORDS = ("of", "a", "page", "most", "is", "white", "and", "each", "block", "foretells", "the", "next", "one", "there")


def _lines(pen: ImageDraw.ImageDraw, left: int, top: int, right: int, bottom: int, size: int) -> None:
    """Fill a box with words, and leave a line free after each fifth."""
    font, x, y = ImageFont.load_default(size), left, top
    for number in range(10_000):
        word = WORDS[number * 7 % len(WORDS)]
        if x + (width := int(pen.textlength(word, font))) > right:
            x, y = left, y + size * 3 // 2
            if (y - top) // (size * 3 // 2) % 6 == 5:
                y += size * 3 // 2
        if y + size > bottom:
            return
        pen.text((x, y), word, fill="black", font=font)
        x += width + size // 3


def page() -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), "white")
    _lines(ImageDraw.Draw(image), 90, 100, SIDE - 90, SIDE - 100, 18)
    return image


def slide() -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE * 9 // 16), (245, 245, 250))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, SIDE, 90), fill=(30, 60, 120))
    pen.text((40, 24), "what a neighbour foretells", fill="white", font=ImageFont.load_default(40))
    _lines(pen, 60, 150, 520, 420, 26)
    pen.rectangle((600, 160, 930, 440), fill=(230, 160, 0))
    return image


def chart() -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE * 3 // 4), "white")
    pen = ImageDraw.Draw(image)
    for number, height in enumerate((210, 340, 120, 460, 520, 300)):
        pen.rectangle((130 + 140 * number, 640 - height, 210 + 140 * number, 640), fill=(0, 114, 178))
        pen.text((150 + 140 * number, 655), f"{number}", fill="black", font=ImageFont.load_default(28))
    pen.line((100, 60, 100, 640, 980, 640), fill="black", width=3)
    return image


def as_jpeg(image: Image.Image) -> Image.Image:
    written = io.BytesIO()
    image.save(written, "JPEG", quality=90)
    return Image.open(written).convert("RGB")


def _photograph(name: str) -> Callable[[], Image.Image]:
    def read() -> Image.Image:
        import skimage.data  # of the extra vispruner[photo]

        return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")

    return read


PICTURES: dict[str, Callable[[], Image.Image]] = {
    "a page of text": page,
    "the same as JPEG, quality 90": lambda: as_jpeg(page()),
    "a slide": slide,
    "a bar chart": chart,
    "scanned text (`text`)": _photograph("text"),
    "a portrait (`astronaut`)": _photograph("astronaut"),
    "a table (`coffee`)": _photograph("coffee"),
    "a cat (`chelsea`)": _photograph("chelsea"),
    "a launch at night (`rocket`)": _photograph("rocket"),
    "an eye on black (`retina`)": _photograph("retina"),
}


def counted(image: Image.Image, model: str) -> dict[str, Any]:
    """Return how many visual tokens a picture has for a model, and how many stay at each of `LEVELS`."""
    patch, spread = MODELS[model]
    sizes = {"patch_size": patch, "merge_size": MERGE, "image_std": list(spread)}
    made = Qwen2VLImageProcessorPil(**sizes)(image, return_tensors="pt")
    _, rows, columns = made["image_grid_thw"][0].tolist()
    cells = made["pixel_values"].view(1, rows // MERGE, columns // MERGE, -1)
    stays = {}
    for level in LEVELS:
        tolerance = (level + 0.5) / 255 / min(spread) if level else 0
        stays[str(level)] = int(cells_to_encode(cells, tolerance).sum())
    return {"tokens": cells.shape[1] * cells.shape[2], "stays": stays}


def measure(names: Sequence[str] = tuple(PICTURES)) -> dict[str, Any]:
    pictures = {name: PICTURES[name]() for name in names}
    return {
        "versions": versions("pillow", "scikit-image"),
        "pictures": [
            {"picture": name, "size": list(image.size), **{model: counted(image, model) for model in MODELS}}
            for name, image in pictures.items()
        ],
    }


def table(record: Mapping[str, Any]) -> str:
    """Return the record as Markdown: what part of the tokens stays, bit for bit and at the last of `LEVELS`."""
    heads = [f"{model}{words}" for model in MODELS for words in ("", f", within {LEVELS[-1]} levels")]
    lines = []
    for row in record["pictures"]:
        cells = [row["picture"], " x ".join(map(str, row["size"]))]
        for model in MODELS:
            found = row[model]
            cells.append(
                f"{found['stays']['0']:,} of {found['tokens']:,} ({found['stays']['0'] / found['tokens']:.0%})"
            )
            cells.append(f"{found['stays'][str(LEVELS[-1])] / found['tokens']:.0%}")
        lines.append(cells)
    return markdown_table(["picture", "pixels", *heads], lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE", help="write all counts here")
    parsed = parser.parse_args(arguments)
    record = measure()
    print(table(record))
    if parsed.json is not None:
        write_record(parsed.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
