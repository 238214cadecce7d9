"""What a token is of: for every architecture the cell of the picture, tile or frame that `vispruner show` draws."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Picture
from rows import Image, Row, Video, draw_weights, rows
from tiny_processors import NEED_EXTRA, WRITERS, write_processor
from transformers import AutoProcessor

import vispruner
from vispruner.conversion.picture import open_picture, show, view_kept_patches
from vispruner.selectors import SELECTORS
from vispruner.visual_features import tokens_of

ROWS = {row.model_type: row for row in rows()}
SEEN = [(name, kind) for name, row in ROWS.items() for kind in row.modalities]
WITHOUT_EXTRA = [name for name in ROWS if name in WRITERS and name not in NEED_EXTRA]
PARTS = {"image": Image((56, 84), seed=1), "video": Video(8, (56, 84), seed=4)}
INTERPOLATED = ("llava_onevision",)  # stock scales tokens, so that a cell is only the nearest one
PROBES = 24


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The stock checkpoints of all rows, with processors for those that have one here."""
    made = {}
    for name, row in ROWS.items():
        stock = row.stock_class(row.config()).eval()
        draw_weights(stock)
        stock.save_pretrained(folder := tmp_path_factory.mktemp(name))
        if name in WRITERS:
            write_processor(row, folder)
        made[name] = folder
    return made


def load(row: Row, folder: Path, **options: Any) -> Any:
    return vispruner.load(folder, **(options or row.options)).eval()


def encoded(model: Any, inputs: dict[str, Any], kind: str) -> tuple[list, Any]:
    """Return the views and the features of all items of one kind."""
    found = [m for m in model.modalities if m.pixels in inputs]
    modality = next((m for m in found if m.name == kind), found[0])
    given = {name: inputs[name] for name in modality.described_by if name in inputs}
    with torch.no_grad():
        views = getattr(model.model, f"{modality.name}_views")(inputs[modality.pixels], **given)
        features = getattr(model.model, f"get_{modality.name}_features")(
            inputs[modality.pixels], **given, return_dict=True
        )
    return views, features


@pytest.mark.parametrize(("name", "kind"), SEEN)
def test_every_token_that_can_be_kept_has_a_cell(name: str, kind: str, bases: dict[str, Path]) -> None:
    row = ROWS[name]
    views, features = encoded(load(row, bases[name]), row.inputs([[[11], PARTS[kind], [12]]]), kind)
    cells = [[view.grid[0] * view.grid[1] for view in item] for item in views]
    assert sum(map(sum, cells)) == sum(part.numel() for part in features.saliency)
    for sizes, kept in zip(cells, features.kept_indices, strict=True):
        assert int(kept.min()) >= -1 and int(kept.max()) < sum(sizes)
    for view in (view for item in views for view in item):
        assert view.pixels.dim() == 3 and view.pixels.shape[0] == 3
        assert view.pixels.shape[1] * view.grid[1] == view.pixels.shape[2] * view.grid[0]  # cells are squares
    for item in views:
        assert len({view.place for view in item}) == len(item)


@pytest.fixture
def blind(bases: dict[str, Path]) -> Iterator[Any]:
    """Load models whose patches do not see each other: what attention computes is taken away."""
    yield lambda name: _without_attention(load(ROWS[name], bases[name], method="none"))


def _without_attention(model: Any) -> Any:
    def nothing(module: Any, arguments: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    for name, module in model.model.named_modules():
        if type(module).__name__.endswith("Attention") and not name.startswith(("language_model.", "text_model.")):
            module.register_forward_hook(nothing)
    return model


@pytest.mark.parametrize(("name", "kind"), SEEN)
def test_a_pixel_changes_the_token_of_the_cell_in_which_it_is_shown(name: str, kind: str, blind: Any) -> None:
    row, model = ROWS[name], blind(name)
    inputs = row.inputs([[[11], PARTS[kind], [12]]])
    pixels = next(name for name in inputs if name.startswith("pixel_values"))
    before, features = encoded(model, inputs, kind)
    places = torch.randint(inputs[pixels].numel(), (PROBES,), generator=torch.Generator().manual_seed(0))
    shown = 0
    for probe in range(PROBES):
        changed = inputs[pixels].clone()
        changed.view(-1)[places[probe]] += 5.0
        after, other = encoded(model, {**inputs, pixels: changed}, kind)
        cells = _changed_cells(before, after)
        tokens = _changed_tokens(features, other)
        if cells and tokens:  # padding has cells and no tokens
            assert cells == tokens or (
                name in INTERPOLATED and all(_is_beside(cell, tokens, before) for cell in cells)
            )
            shown += 1
    assert shown >= PROBES // 4


def _changed_cells(before: list, after: list) -> set[tuple[int, int]]:
    cells = set()
    for item, (views, others) in enumerate(zip(before, after, strict=True)):
        first = 0
        for view, other in zip(views, others, strict=True):
            side = view.pixels.shape[1] // view.grid[0]
            for _, y, x in (view.pixels != other.pixels).nonzero().tolist():
                cells.add((item, first + y // side * view.grid[1] + x // side))
            first += view.grid[0] * view.grid[1]
    return cells


def _place(cell: tuple[int, int], views: list) -> tuple[int, int, int]:
    """Return the item, row and column of a cell, counted over tiles that lie beside each other."""
    item, number = cell
    for view in views[item]:
        rows, columns = view.grid
        if number < rows * columns:
            return item, view.place[0] * rows + number // columns, view.place[1] * columns + number % columns
        number -= rows * columns
    raise AssertionError(f"{cell} is in no view")


def _is_beside(cell: tuple[int, int], tokens: set[tuple[int, int]], views: list) -> bool:
    return any(
        max(abs(one - two) for one, two in zip(_place(cell, views), _place(token, views), strict=True)) <= 1
        for token in tokens
    )


def _changed_tokens(features: Any, other: Any) -> set[tuple[int, int]]:
    items = zip(features.kept_indices, tokens_of(features), tokens_of(other), strict=True)
    return {
        (number, int(kept[token]))
        for number, (kept, one, two) in enumerate(items)
        for token in (one != two).any(-1).nonzero()[:, 0]
    }


# The picture


@pytest.mark.parametrize("name", WITHOUT_EXTRA)
def test_a_photo_is_drawn_with_as_many_tokens_as_are_kept(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    _check_picture(name, bases[name], Picture.effect_mandelbrot((96, 64), (-2, -1, 1, 1), 60).convert("RGB"))


@pytest.mark.video
@pytest.mark.parametrize("name", [name for name in ROWS if name in NEED_EXTRA])
def test_photos_and_videos_are_drawn_with_as_many_tokens_as_are_kept(name: str, bases: dict[str, Path]) -> None:
    frame = Picture.effect_mandelbrot((96, 64), (-2, -1, 1, 1), 60).convert("RGB")
    _check_picture(name, bases[name], frame)
    if "video" in ROWS[name].modalities:
        tiles = _check_picture(name, bases[name], [frame.rotate(10 * turn) for turn in range(8)])
        assert len({(tile.row, tile.column) for tile in tiles}) == len(tiles) > 1


@pytest.mark.video
def test_a_reason_that_depends_on_places_is_left_out_where_tiles_were_chosen_from_together(
    bases: dict[str, Path],
) -> None:
    name = "llava_onevision"
    model = load(ROWS[name], bases[name], method="hiprune", visual_token_num=3)
    photo = Picture.effect_mandelbrot((96, 64), (-2, -1, 1, 1), 60).convert("RGB")
    processor = AutoProcessor.from_pretrained(bases[name])
    tiles = view_kept_patches(model, processor, photo)
    assert len(tiles) > 1 and all(tile.pruned and not tile.kinds for tile in tiles)
    frames = view_kept_patches(model, processor, [photo] * 8)
    assert all(tuple(frame.kinds) == SELECTORS["hiprune"].kinds for frame in frames)


def _check_picture(name: str, folder: Path, picture: Any) -> list:
    model, processor = load(ROWS[name], folder), AutoProcessor.from_pretrained(folder)
    tiles = view_kept_patches(model, processor, picture)
    kept = sum(int(tile.kept.sum()) for tile in tiles)
    important = sum(int(next(iter(tile.kinds.values())).sum()) for tile in tiles)
    assert 0 < important < kept < sum(tile.kept.numel() for tile in tiles)
    assert all(torch.equal(tile.kept, sum(tile.kinds.values()) == 1) for tile in tiles)
    return tiles


def test_a_model_that_reads_videos_says_what_show_needs(bases: dict[str, Path], tmp_path: Path) -> None:
    name = next(name for name in ROWS if name in NEED_EXTRA)
    if pytest.importorskip("transformers").utils.is_torchvision_available():
        pytest.skip("torchvision is installed")
    Picture.new("RGB", (32, 32)).save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match=r"pip install 'vispruner\[video\]'"):
        show(tmp_path / "photo.png", str(bases[name]), tmp_path / "out.png", visual_token_num=3)


# Photos and videos on the disk


def test_an_animation_and_a_folder_are_videos_where_the_model_reads_videos(tmp_path: Path) -> None:
    frames = [Picture.new("RGB", (8, 8), (20 * number, 0, 0)) for number in range(12)]
    frames[0].save(tmp_path / "clip.png", save_all=True, append_images=frames[1:])
    (tmp_path / "clip").mkdir()
    for number, frame in enumerate(frames):
        frame.save(tmp_path / "clip" / f"{number:02}.png")
    for path in (tmp_path / "clip.png", tmp_path / "clip"):
        read = open_picture(path, reads_videos=True)
        assert [frame.getpixel((0, 0))[0] for frame in read] == [20 * number for number in (0, 1, 3, 4, 6, 7, 9, 10)]
    assert open_picture(tmp_path / "clip.png", reads_videos=False).getpixel((0, 0)) == (0, 0, 0)
    with pytest.raises(ValueError, match="reads no videos"):
        open_picture(tmp_path / "clip", reads_videos=False)
