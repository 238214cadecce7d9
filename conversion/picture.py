"""Show which patches of an image or a video a pruned model keeps, as the model sees it (resized, cropped, tiled).

A picture has a panel per budget side by side, a text column with the legend on the left, and questions with their
answers underneath. Several photos have a row of panels each, and the legend underneath.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from transformers import PreTrainedModel

from vispruner.decoder_pruning import stages_of
from vispruner.selectors import SELECTORS, kinds_of_kept
from vispruner.stock_versions import CACHE
from vispruner.visual_features import TokenView

from .checkpoint_io import replacing, writable_file
from .questions import (
    PHOTOGRAPHS,
    SCENE,
    WRONG,
    Picture,
    Question,
    ask,
    judged,
    load_model,
    load_processor,
    model_inputs,
    questions_about,
    where_and_how,
)
from .repo_config import DEMO_CONFIG, PHOTO_LLAVA

# Okabe-Ito orange and blue: told apart with every common colour blindness, and by their brightness in grey. Green is
# for the one method that has a third reason to keep a patch.
ORANGE, BLUE, GREEN = (230, 159, 0), (0, 114, 178), (0, 158, 115)
# By the name of the reason; else blue.
COLOURS = {
    **dict.fromkeys(["important", "anchor", "dominant", "single"], ORANGE),
    **dict.fromkeys(["buffer", "[CLS]", "rest"], GREEN),
}
BACKGROUND = (255, 255, 255)
INK = (30, 30, 30)
WRONG_INK = (190, 20, 40)
GONE = (150, 165, 180)  # laid over patches that left within the encoder, or before it
LEFT_WITHIN, LEFT_BEFORE = "left within the encoder", "foretold by a neighbour's pixels"
MERGED = (120, 120, 120)  # lines from what was folded together to where it went

PNG = ([".png"], "the picture")
PictureFile = str | os.PathLike[str]
GAP = 12
COLUMN_GAP = 24
TEXT_SIZE = 20
LINE_HEIGHT = 26
TEXT_WIDTH = 372  # of the left column
TILES_WIDTH = 1536  # shared by the tiles that stand side by side
TILE_WIDTHS = (320, 720)  # at least, at most
GRID_WIDTH, GRID_LEAST = 1056, 240  # likewise, where photos have rows
SMALL_IMAGE = 128
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")  # no kind that runs another program
FRAMES = 8  # of a video, evenly spaced
MOST_PIXELS, MOST_KEPT_PIXELS = 2**31, 2**28  # of all its frames, and of these
MOST_SIDES = 200  # the longer side of a picture by the shorter, which many processors bring to one size
STRIP = 8  # tiles or frames in a row, where nothing says how they lie


@dataclass(frozen=True)
class TileView:
    """One encoded tile and what was kept of it.

    image      the pixels that the vision tower got
    kept       (rows, columns) True where the patch stays
    kinds      by reason, in the words of `Selector.kinds`, (rows, columns) True where the patch stays for it; empty
               where that is not known
    merges     pairs of patches, by their numbers in the tile: the first was folded into the second
    row, column  place among the other tiles
    pruned     False when the model dropped nothing, so that no choice is there to be drawn
    left       (rows, columns) True where the patch left within the encoder, or before it; None where none did
    left_as    why it did, in words
    """

    image: Image.Image
    kept: torch.Tensor
    kinds: Mapping[str, torch.Tensor] = field(default_factory=dict)
    row: int = 0
    column: int = 0
    pruned: bool = True
    merges: Sequence[tuple[int, int]] = ()
    left: torch.Tensor | None = None
    left_as: str = LEFT_WITHIN


@dataclass(frozen=True)
class Panel:
    """What the model keeps under one budget, and its answers to the questions asked."""

    tiles: list[TileView]
    answers: Sequence[str] = ()
    title: str = ""


def existing_picture(path: str | os.PathLike[str]) -> Path:
    """Return the path of a picture that is there; an address on the web is refused as what it is."""
    if "://" in os.fspath(path):
        raise ValueError(f"{os.fspath(path)} is an address, and pictures are read from files only: download it first")
    if not Path(path).exists():
        raise FileNotFoundError(f"No such file or directory: {path}: give the path of a picture")
    return Path(path)


def open_photo(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file as upright RGB; OSError says which file cannot be read."""
    with _opened(path) as image:
        return _upright(image)


def require_picture(path: str | os.PathLike[str]) -> None:
    """Raise what `open_photo` does for a file that is no picture; only its header is read."""
    with _opened(path) as image:
        _refuse_line(image)


def _upright(image: Image.Image) -> Image.Image:
    _refuse_line(image)
    return _rgb(ImageOps.exif_transpose(image))


def _rgb(image: Image.Image) -> Image.Image:
    """Bring pixels to 8 bits a channel; of more, Pillow would make white whatever is above 255."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels are numbers without a known range (mode {image.mode}): save it with 8 bits each")
    return image.convert("RGB")


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Open a picture of a common kind; whatever its decoder makes of it becomes an OSError that names the file."""
    path = existing_picture(path)
    if not path.is_file():
        raise OSError(f"{path} is not a readable image: it is no regular file")
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        with Image.open(path, formats=formats) as image:
            yield image
    except UnidentifiedImageError as error:  # a phone's HEIC, for instance
        raise OSError(
            f"{path} is not a readable image: it is none of {', '.join(formats)}; save it as one of these"
        ) from error
    except Exception as error:  # each decoder has errors of its own
        raise OSError(f"{path} is not a readable image: {error or type(error).__name__}") from error


def open_picture(path: Path, reads_videos: bool) -> Picture:
    """Read a photo, or at most 8 frames of an animated picture (GIF, WebP, PNG) or of a folder, a file per frame."""
    if path.is_dir():
        if not reads_videos:
            raise ValueError(f"{path} is a folder of frames, and this model reads no videos: give a photo")
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        if not files:
            raise ValueError(f"{path} holds no frames")
        return [_open_frame(file) for file in _evenly_spaced(files)]
    if reads_videos:
        with _opened(path) as image:
            numbers = range(getattr(image, "n_frames", 1))
            if len(numbers) > 1:
                _require_small(image, len(numbers))
                _refuse_line(image)
                return [_frame(image, number) for number in _evenly_spaced(numbers)]
    return open_photo(path)


def _open_frame(path: Path) -> Image.Image:
    with _opened(path) as image:
        _require_small(image, 1)
        return _upright(image)


def _require_small(image: Image.Image, frames: int) -> None:
    pixels = image.width * image.height
    if pixels * frames > MOST_PIXELS or pixels * FRAMES > MOST_KEPT_PIXELS:  # all are decoded on the way to the last
        raise ValueError(f"{frames} frames of {image.width} x {image.height} are too much: make it shorter or smaller")


def _refuse_line(image: Image.Image) -> None:
    if max(image.size) > MOST_SIDES * min(image.size):
        raise ValueError(f"{image.width} x {image.height} is a line and no picture: crop it")


def _frame(image: Image.Image, number: int) -> Image.Image:
    image.seek(number)
    return _rgb(image)


def _evenly_spaced(frames: Sequence[Any]) -> list[Any]:
    count = min(len(frames), FRAMES)
    return [frames[number * len(frames) // count] for number in range(count)]


def show(
    image: PictureFile | Sequence[PictureFile] | None,
    repo: str | None,
    out: str | os.PathLike[str],
    visual_token_num: int | None = None,
    budgets: Sequence[int] = (),
    question: str | None = None,
    method: str | None = None,
) -> tuple[Path, dict[str, list[list[list[int]]]]]:
    """Write the picture of the patches that the model in `repo` keeps of each file in `image`.

    image             a photo, or several of different names, which get a row each; for models that read videos also
                      an animated picture or a folder of frames. None for what ships with the package: the photographs
                      for `embedded/photo-llava`, else the scene, which is asked its own questions unless one is given
    repo              a built repo, or any stock checkpoint together with a budget; a folder, a Hub id, or the name of
                      an embedded checkpoint. Its own code is never run: the installed package reads it. None for the
                      embedded toy
    visual_token_num  overrides the budget that the repo stores
    budgets           draw these budgets side by side, after the unpruned image
    question          answer this under every budget, and unpruned; a method may choose by it. For one picture
    method            overrides the method that the repo stores; "random" draws by the seed 0
    returns           the file written, and by the name of a picture the patches that stay: per panel but the unpruned
                      one and per tile their numbers, row by row
    """
    if visual_token_num is not None and budgets:
        raise ValueError("give either --visual-token-num (one budget) or --budgets (several side by side)")
    if method is not None and "+" in method:
        raise ValueError(
            f'--method draws one method, and "{method}" names several: build a repo whose vispruner_config has it, '
            "with stage_token_nums, and give that by --repo"
        )
    out, paths = writable_file(out, *PNG), _shown_pictures(image, repo)
    if len(paths) > 1 and question is not None:
        raise ValueError(f"--question is answered under one picture, and these are {len(paths)}: give one IMAGE")
    first = budgets[0] if budgets else visual_token_num
    options: dict[str, Any] = {} if first is None else {"visual_token_num": first}
    if method is not None:
        options |= {"method": method, "seed": 0}
    source, stored = where_and_how(repo)
    model, processor = load_model(source, **{**stored, **options}), load_processor(source)
    reads_videos = getattr(processor, "video_processor", None) is not None
    pictures = {path.name: open_picture(path, reads_videos) for path in paths}
    questions = questions_about(paths[0], question) if len(paths) == 1 else []
    rows = []
    for picture in pictures.values():
        if budgets or questions or len(paths) > 1 or model.model.prunes_in_decoder:
            rows.append(view_budgets(model, processor, picture, budgets or [None], questions))
        else:
            rows.append([Panel(view_kept_patches(model, processor, picture))])
    seen_by = f"as {DEMO_CONFIG if repo is None else Path(repo).name} sees"
    chosen = f", chosen by {method}" if method is not None else ""
    if model.model.vispruner_options.pixel_tolerance is not None:
        chosen += "; how many patches stay depends on the picture"
    if len(paths) > 1:
        drawn = kept_patches_grid(rows, f"A{seen_by[1:]} them{chosen}")
    else:
        drawn = kept_patches_picture(rows[0], f"{paths[0].name} {seen_by} it{chosen}", questions)
    return save_png(drawn, out), dict(zip(pictures, map(_numbers_of_kept, rows), strict=True))


def _shown_pictures(image: PictureFile | Sequence[PictureFile] | None, repo: str | None) -> list[Path]:
    given = [image] if isinstance(image, str | os.PathLike) else list(image or [])
    if not given:
        return list(PHOTOGRAPHS) if repo == PHOTO_LLAVA else [SCENE]
    paths = [existing_picture(path) for path in given]
    for path in paths:
        if not path.is_dir():
            require_picture(path)
    names = [path.name for path in paths]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"two pictures have the same name, {twice[0]}, and are told apart by it: give it once, or rename one"
        )
    return paths


def _numbers_of_kept(panels: Sequence[Panel]) -> list[list[list[int]]]:
    """Return per panel that dropped something, and per tile of it, the numbers of the patches that stay."""
    pruned = [panel for panel in panels if any(tile.pruned for tile in panel.tiles)]
    return [[tile.kept.flatten().nonzero()[:, 0].tolist() for tile in panel.tiles] for panel in pruned]


def view_budgets(
    model: PreTrainedModel,
    processor: Any,
    picture: Picture,
    budgets: Sequence[int | None],
    questions: Sequence[Question] = (),
) -> list[Panel]:
    """Return a panel of the unpruned model and one for each budget (None: the configured one), with its answers.

    Where what stays depends on the question, it is drawn for the first of `questions`.
    """
    first = questions[0].text if questions else ""
    stored = model.config.vispruner_config
    variants: list[dict[str, Any]] = [{} if budget is None else {"visual_token_num": budget} for budget in budgets]
    panels = []
    try:
        for changes in [{"method": "none"}, *variants]:
            model.config.vispruner_config = stored
            model.set_vispruner_config(**changes)
            answers = [ask(model, processor, picture, question.text) for question in questions]
            choices = view_choice(model, processor, picture, first)
            panels += [replace(p, answers=answers) if p is choices[-1] or not p.title else p for p in choices]
    finally:
        model.config.vispruner_config = stored
    return panels


def view_choice(model: PreTrainedModel, processor: Any, picture: Picture, question: str) -> list[Panel]:
    """Return a panel for each place where the model, as it is configured, drops tokens."""
    panels = []
    if model.model.methods[0] is not None or not model.model.prunes_in_decoder:
        panels.append(Panel(view_kept_patches(model, processor, picture, question)))
    if model.model.prunes_in_decoder:
        panels += view_stages(model, processor, picture, question)
    return panels


@torch.no_grad()
def view_kept_patches(model: PreTrainedModel, processor: Any, picture: Picture, question: str = "") -> list[TileView]:
    """Encode one photo, or the frames of one video, and return what it was encoded as: tiles, or a strip of frames.

    question  by which a method may choose
    A cell of their grids is a visual token: a patch, or the block of patches that the model merged into one.
    """
    shown = _Shown.of(model, processor, picture, question)
    return shown.tiles(_looked_at(shown.output), shown.output.kept_indices)


@torch.no_grad()
def view_stages(model: PreTrainedModel, processor: Any, picture: Picture, question: str) -> list[Panel]:
    """Return a panel for each stage in the language model: what is left of the picture from there on.

    That depends on the question. Stages are pooled over all tiles of a prompt, as the language model has them.
    """
    shown = _Shown.of(model, processor, picture, question)
    names = {modality.pixels for modality in model.modalities} - {shown.modality.pixels}
    inputs = {name: value for name, value in shown.inputs.items() if name not in names}
    cache = model(**inputs, use_cache=True)[CACHE]
    token = getattr(model.config, shown.modality.placeholder)
    is_visual = inputs["input_ids"] == token
    if (columns := cache.vispruner_prompt.columns) is not None:  # it was shortened before
        is_visual = columns.take(is_visual.long(), 0).bool()
    is_visual = is_visual[0].cpu()
    panels = []
    for stage in stages_of(cache):
        stays = torch.zeros(stage.width, dtype=torch.bool)
        stays[stage.columns[0][stage.seen[0]].cpu()] = True
        counts = [len(indices) for indices in shown.output.kept_indices]
        of_items = stays[is_visual].split(counts)
        kept = [indices.cpu()[mask] for indices, mask in zip(shown.output.kept_indices, of_items, strict=True)]
        kind = SELECTORS[model.model.methods[1]].kinds[0]
        panels.append(Panel(shown.tiles({}, kept, kind), title=f"from layer {stage.layer} on, "))
    return panels


@dataclass(frozen=True)
class _Shown:
    """A picture as a model encoded it: the inputs of its prompt, the vision output, and what its tokens are of."""

    model: PreTrainedModel
    modality: Any
    inputs: Mapping[str, Any]
    output: Any
    items: list[list[TokenView]]
    image_processor: Any

    @classmethod
    def of(cls, model: PreTrainedModel, processor: Any, picture: Picture, question: str) -> _Shown:
        inputs = model_inputs(model, processor, picture, question)
        read_as = "image" if isinstance(picture, Image.Image) else "video"
        given = sorted((m for m in model.modalities if m.pixels in inputs), key=lambda m: m.name != read_as)
        modality = given[0]  # of a video, where the model has no other modality: its frames are images
        arguments = {name: inputs[name] for name in modality.described_by if name in inputs}
        output = model.model.encode_prompt(**inputs)[modality.name]
        items = getattr(model.model, f"{modality.name}_views")(inputs[modality.pixels], **arguments)
        return cls(model, modality, inputs, output, items, getattr(processor, f"{read_as}_processor"))

    def tiles(
        self, looked_at: Mapping[str, torch.Tensor], kept_indices: Sequence[torch.Tensor], kind: str | None = None
    ) -> list[TileView]:
        """Return the tiles with what stays of them: `kept_indices` of each item, for the reason `kind` if given."""
        tiles: list[TileView] = []
        first = 0
        left_as = LEFT_WITHIN if self.model.model.vispruner_options.pixel_tolerance is None else LEFT_BEFORE
        for number, (views, indices) in enumerate(zip(self.items, kept_indices, strict=True)):
            sizes = [rows * columns for rows, columns in (view.grid for view in views)]
            kept = torch.zeros(sum(sizes), dtype=torch.bool)
            chosen = indices.cpu()
            kept[chosen[chosen >= 0]] = True
            own = {name: values[..., first : first + sum(sizes)] for name, values in looked_at.items()}
            first += sum(sizes)
            kinds = {kind: kept} if kind is not None else _kinds_of(self.model, kept, own, views) if own else {}
            split_kinds = {name: mask.split(sizes) for name, mask in kinds.items()}
            merged = _merges_in(own["merged_into"], sizes) if "merged_into" in own else []
            left = (~own["remain"]).split(sizes) if "remain" in own else [None] * len(sizes)
            for place, (view, stays) in enumerate(zip(views, kept.split(sizes), strict=True)):
                # What is an item by itself, a tile for some models, stands beside the one before.
                row, column = view.place if len(self.items) == 1 else divmod(number, STRIP)
                image = image_from_pixels(view.pixels.float().cpu(), self.image_processor)
                marked = {name: masks[place].view(view.grid) for name, masks in split_kinds.items()}
                pruned = bool(own or kinds) and not bool(stays.all())
                merges = merged[place] if merged else ()
                gone = None if (early := left[place]) is None else early.view(view.grid)
                stays = stays.view(view.grid)
                tiles.append(TileView(image, stays, marked, row, column, pruned, merges, gone, left_as))
        return tiles


def _looked_at(output: Any) -> dict[str, torch.Tensor]:
    """Return what patches were chosen by as (..., patches of all items); nothing where none was dropped."""
    found = {name: getattr(output, name) for name in ("saliency", "layer_saliency", "merged_into", "remain")}
    parts = {name: torch.cat(list(values), dim=-1).cpu() for name, values in found.items() if values is not None}
    return {name: values.float() if values.is_floating_point() else values for name, values in parts.items()}


def _merges_in(into: torch.Tensor, sizes: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Return per view of an item the pairs of its patches of which one was folded into the other.

    into  (N,) of all patches of the item: which one that stays each went into, -1 where it fell
    """
    pairs, first = [], 0
    for size in sizes:
        went = (into[first : first + size] - first).tolist()
        pairs.append([(patch, kept) for patch, kept in enumerate(went) if patch != kept and 0 <= kept < size])
        first += size
    return pairs


def _kinds_of(
    model: PreTrainedModel, kept: torch.Tensor, looked_at: Mapping[str, torch.Tensor], views: Sequence[TokenView]
) -> dict[str, torch.Tensor]:
    """Return by reason the patches (N,) of one item that stay for it; nothing where that cannot be told.

    A reason that depends on where patches lie cannot be told of an item with views that were chosen from together: the
    grid that they were is none of theirs.
    """
    options = model.model.encoder_options
    selector = SELECTORS[options.method]
    together = any(view.pool is not None for view in views)
    if together and "grid" in selector.needs and len(selector.kinds) > 1:
        return {}
    sizes = torch.tensor([rows * columns for rows, columns in (view.grid for view in views)])
    pools = [1 + len(views) + place if view.pool is None else view.pool for place, view in enumerate(views)]
    pool_of = torch.tensor(pools).repeat_interleave(sizes)
    kinds = {name: torch.zeros_like(kept) for name in selector.kinds}
    for pool, view in dict(zip(pools, views, strict=True)).items():
        places = (pool_of == pool).nonzero()[:, 0]
        stays = kept[places].nonzero()[:, 0]
        left = looked_at["remain"][places].sum() if "remain" in looked_at else len(places)
        if len(stays) in (0, left):  # no choice was made
            continue
        given = {name: values[..., places][None] for name, values in looked_at.items()}
        if "merged_into" in given:  # numbers of the item, which the pool has others for
            number = torch.full((len(kept) + 1,), -1).scatter(0, places, torch.arange(len(places)))
            given["merged_into"] = number[given["merged_into"]]
        marks = kinds_of_kept(options.method, stays[None], **given, grid=view.grid, **options.selector_options)
        for name, mark in marks.items():
            kinds[name][places[stays]] = mark[0]
    return kinds


def image_from_pixels(pixel_values: torch.Tensor, image_processor: Any) -> Image.Image:
    """Undo the normalisation of one tile (3, height, width)."""
    mean = torch.tensor(image_processor.image_mean)[:, None, None]
    std = torch.tensor(image_processor.image_std)[:, None, None]
    pixels = ((pixel_values * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def kept_patches_picture(
    panels: Sequence[Panel], caption: str = "", questions: Sequence[Question] = ()
) -> Image.Image:
    """Draw panels side by side, dropped patches faded and kept ones framed; answers stand under their panel."""
    drawn = [_draw_panel(panel, _tile_width(panels)) for panel in panels]
    widths = [TEXT_WIDTH, *(image.width for image in drawn)]
    lefts = [GAP + sum(widths[:column]) + COLUMN_GAP * column for column in range(len(widths))]
    rows = [[_wrap(text, width) for text, width in zip(row, widths, strict=True)] for row in _texts(panels, questions)]
    heights = [LINE_HEIGHT * max(map(len, row)) + GAP // 2 for row in rows]
    top = 2 * GAP + max(image.height for image in drawn)
    picture = Image.new("RGB", (lefts[-1] + widths[-1] + GAP, top + sum(heights) + GAP), BACKGROUND)
    _draw_legend(picture, panels, caption)
    for image, left in zip(drawn, lefts[1:], strict=True):
        picture.paste(image, (left, GAP))
    for row, height in zip(rows, heights, strict=True):
        for lines, left in zip(row, lefts, strict=True):
            _write(picture, lines, left, top)
        top += height
    return picture


def kept_patches_grid(rows: Sequence[Sequence[Panel]], caption: str = "") -> Image.Image:
    """Draw a row of panels for each photo; how much is kept stands above them, once where it is the same."""
    drawn = [[_draw_panel(panel, _tile_width(row, GRID_WIDTH, GRID_LEAST)) for panel in row] for row in rows]
    widths = [max(row[column].width for row in drawn) for column in range(len(drawn[0]))]
    lefts = [GAP + sum(widths[:column]) + GAP * column for column in range(len(widths))]
    labels = [[panel.title + _kept_of_all(panel.tiles) for panel in row] for row in rows]
    shown = [texts if number == 0 or texts != labels[0] else [] for number, texts in enumerate(labels)]
    lines = sum(map(bool, shown)) + 2  # with the legend and the caption
    height = sum(max(image.height for image in row) + GAP for row in drawn) + LINE_HEIGHT * lines
    picture = Image.new("RGB", (lefts[-1] + widths[-1] + GAP, height + 2 * GAP), BACKGROUND)
    pen, font, top = ImageDraw.Draw(picture), ImageFont.load_default(TEXT_SIZE), GAP
    for row, texts in zip(drawn, shown, strict=True):
        for text, left, width in zip(texts, lefts, widths, strict=False):
            pen.text((left + width // 2, top), text, fill=INK, font=font, anchor="ma")
        top += LINE_HEIGHT * bool(texts)
        for image, left in zip(row, lefts, strict=True):
            picture.paste(image, (left, top))
        top += max(image.height for image in row) + GAP
    left = GAP
    for text, colour in _legend([panel for row in rows for panel in row]).items():
        left = _draw_entry(picture, left, top, text, colour) + COLUMN_GAP
    _write(picture, [caption], GAP, top + LINE_HEIGHT)
    return picture


def _kept_of_all(tiles: Sequence[TileView]) -> str:
    total, kept = sum(tile.kept.numel() for tile in tiles), sum(int(tile.kept.sum()) for tile in tiles)
    return f"{kept} of {total} patches" if any(tile.pruned for tile in tiles) else f"all {kept} patches"


def _texts(panels: Sequence[Panel], questions: Sequence[Question]) -> list[list[str]]:
    """The table under the panels: what each keeps, then a row per question."""
    rows = [["", *(panel.title + _kept_count(panel.tiles) for panel in panels)]]
    for number, question in enumerate(questions):
        answers = [judged(panel.answers[number], question.answer) if panel.answers else "" for panel in panels]
        rows.append([question.text, *answers])
    return rows


def _kept_count(tiles: Sequence[TileView]) -> str:
    total, kept = sum(tile.kept.numel() for tile in tiles), sum(int(tile.kept.sum()) for tile in tiles)
    if not any(tile.pruned for tile in tiles):
        return f"unpruned: {kept} patches"
    counts = {_name(kind): sum(int(tile.kinds[kind].sum()) for tile in tiles) for kind in _kinds_in(tiles)}
    if len(counts) < 2:
        return f"{kept} of {total} patches"
    return f"{kept} of {total}: " + ", ".join(f"{count} {name}" for name, count in counts.items())


def _kinds_in(tiles: Sequence[TileView]) -> list[str]:
    """Return the reasons for which any patch stays, each once."""
    return list(dict.fromkeys(kind for tile in tiles for kind, mask in tile.kinds.items() if mask.any()))


def _name(kind: str) -> str:
    return kind.partition(":")[0]


def _colour(kind: str) -> tuple[int, int, int]:
    return COLOURS.get(_name(kind), BLUE)


def _tile_width(panels: Sequence[Panel], shared: int = TILES_WIDTH, least: int = TILE_WIDTHS[0]) -> int:
    across = sum(1 + max(tile.column for tile in panel.tiles) for panel in panels)
    return max(least, min(TILE_WIDTHS[1], shared // across))


def _draw_panel(panel: Panel, tile_width: int) -> Image.Image:
    drawn = [_draw_tile(tile, tile_width) for tile in panel.tiles]
    width, height = max(image.width for image in drawn) + GAP, max(image.height for image in drawn) + GAP
    rows, columns = 1 + max(tile.row for tile in panel.tiles), 1 + max(tile.column for tile in panel.tiles)
    image = Image.new("RGB", (columns * width - GAP, rows * height - GAP), BACKGROUND)
    for tile, part in zip(panel.tiles, drawn, strict=True):
        image.paste(part, (tile.column * width, tile.row * height))
    return image


def _draw_tile(tile: TileView, width: int) -> Image.Image:
    rows, columns = tile.kept.shape
    side = max(4, width // columns)
    # Pixels of a picture this small are part of what it shows; a photograph looks better smooth.
    enlarge = Image.Resampling.NEAREST if tile.image.width <= SMALL_IMAGE else Image.Resampling.BICUBIC
    image = tile.image.resize((side * columns, side * rows), enlarge)
    if not tile.pruned:
        return image
    faded = Image.blend(ImageOps.grayscale(image).convert("RGB"), Image.new("RGB", image.size, BACKGROUND), 0.7)
    for row, column in [] if tile.left is None else tile.left.nonzero().tolist():
        box = (column * side, row * side, (column + 1) * side, (row + 1) * side)
        faded.paste(Image.blend(faded.crop(box), Image.new("RGB", (side, side), GONE), 0.7), box)
    stroke = max(1, side // 11)
    pen = ImageDraw.Draw(faded)
    for ends in tile.merges:
        middles = [(patch % columns * side + side // 2, patch // columns * side + side // 2) for patch in ends]
        pen.line(middles, fill=MERGED, width=max(1, stroke // 2))
    for row, column in tile.kept.nonzero().tolist():
        box = (column * side, row * side, (column + 1) * side, (row + 1) * side)
        faded.paste(image.crop(box), box)
        frame = (box[0], box[1], box[2] - 1, box[3] - 1)
        colour = next((_colour(kind) for kind, mask in tile.kinds.items() if mask[row, column]), BLUE)
        ImageDraw.Draw(faded).rectangle(frame, outline=colour, width=stroke)
    return faded


def _draw_legend(picture: Image.Image, panels: Sequence[Panel], caption: str) -> None:
    """Write the caption and what the colours mean into the left column."""
    lines = _wrap(caption, TEXT_WIDTH)
    _write(picture, lines, GAP, GAP)
    for number, (text, colour) in enumerate(_legend(panels).items()):
        _draw_entry(picture, GAP, 2 * GAP + LINE_HEIGHT * (len(lines) + number), text, colour)


def _legend(panels: Sequence[Panel]) -> dict[str, tuple[int, int, int]]:
    """Return what the colours mean, as far as they occur."""
    pruned = [tile for panel in panels for tile in panel.tiles if tile.pruned]
    entries = {kind: _colour(kind) for kind in _kinds_in(pruned) or ["kept"] * bool(pruned)}
    entries |= {tile.left_as: GONE for tile in pruned if tile.left is not None}
    if any(tile.merges for tile in pruned):
        entries |= {"folded into": MERGED}
    return entries


def _draw_entry(picture: Image.Image, left: int, top: int, text: str, colour: tuple[int, int, int]) -> int:
    """Draw a sample of a colour and what it means; return where that ends."""
    box = (left, top, left + TEXT_SIZE, top + TEXT_SIZE)
    if colour == MERGED:
        ImageDraw.Draw(picture).line(box, fill=colour, width=2)
    else:
        ImageDraw.Draw(picture).rectangle(box, outline=colour, width=4)
    left += TEXT_SIZE + GAP // 2
    _write(picture, [text], left, top)
    return left + int(ImageFont.load_default(TEXT_SIZE).getlength(text))


def _write(picture: Image.Image, lines: Sequence[str], left: int, top: int) -> None:
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(TEXT_SIZE)
    ink = WRONG_INK if lines and lines[-1].endswith(WRONG) else INK
    for number, line in enumerate(lines):
        pen.text((left, top + number * LINE_HEIGHT), line, fill=ink, font=font)


def _wrap(text: str, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels; a longer word stands alone, and is cut at the border."""
    font = ImageFont.load_default(TEXT_SIZE)
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def save_png(picture: Image.Image, out: str | os.PathLike[str]) -> Path:
    """Write a PNG that appears only when it is complete."""
    out = writable_file(out, *PNG)
    with replacing(out) as unfinished:
        picture.save(unfinished, format="PNG", optimize=True)
    return out
