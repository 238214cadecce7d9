"""The picture shows exactly the patches that the model keeps, where they lie in what the model sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

import vispruner
from vispruner.conversion.picture import (
    BLUE,
    COLUMN_GAP,
    GAP,
    GONE,
    GREEN,
    ORANGE,
    TEXT_WIDTH,
    WRONG_INK,
    Panel,
    TileView,
    kept_patches_picture,
    open_photo,
    save_png,
    show,
    view_budgets,
    view_kept_patches,
)
from vispruner.conversion.questions import Question, ask
from vispruner.selectors import ENCODER_METHODS, SELECTORS
from vispruner.token_selection import select_vispruner

IMPORTANT, DIVERSE = SELECTORS["vispruner"].kinds
LEFT = GAP + TEXT_WIDTH + COLUMN_GAP  # of the first panel


def views(repo: Path, photo: Image.Image, **options: object) -> tuple[list[TileView], torch.nn.Module]:
    model = vispruner.load(str(repo), **options).eval()
    return view_kept_patches(model, AutoProcessor.from_pretrained(repo), photo), model


def flat(mask: torch.Tensor) -> list[int]:
    return mask.flatten().nonzero()[:, 0].tolist()


def test_kept_and_important_patches_are_those_of_the_selection(tiny_llava_repo: Path, photo: Image.Image) -> None:
    (tile,), model = views(tiny_llava_repo, photo, visual_token_num=20, important_ratio=0.5)
    pixels = AutoProcessor.from_pretrained(tiny_llava_repo).image_processor(photo, return_tensors="pt").pixel_values
    with torch.no_grad():
        output = model.get_image_features(pixel_values=pixels, return_dict=True)
    order = output.saliency[0].argsort(descending=True, stable=True)
    assert flat(tile.kept) == output.kept_indices[0].tolist()
    assert flat(tile.kinds[IMPORTANT]) == sorted(order[:10].tolist())
    assert tile.kept.shape == (8, 8)


def test_important_patches_are_among_the_kept_ones_in_every_tile_mode(
    tiny_llava_next_repo: Path, photo: Image.Image
) -> None:
    for mode in ("paper", "native"):
        tiles, _ = views(tiny_llava_next_repo, photo, visual_token_num=6, tile_mode=mode)
        assert len(tiles) == 5
        assert all(torch.equal(tile.kept, tile.kinds[IMPORTANT] ^ tile.kinds[DIVERSE]) for tile in tiles)
        assert [int(tile.kinds[IMPORTANT].sum()) for tile in tiles] == [3] * 5
        assert [int(tile.kept.sum()) for tile in tiles] == [6] * 5


def test_tiles_stand_as_in_the_image_with_the_base_tile_on_the_left(
    tiny_llava_next_repo: Path, photo: Image.Image
) -> None:
    wide, _ = views(tiny_llava_next_repo, photo.resize((300, 100)), visual_token_num=4)
    tall, _ = views(tiny_llava_next_repo, photo.resize((100, 300)), visual_token_num=4)
    square, _ = views(tiny_llava_next_repo, photo.resize((200, 200)), visual_token_num=4)
    assert [(tile.row, tile.column) for tile in wide] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert [(tile.row, tile.column) for tile in tall] == [(0, 0), (0, 1), (1, 1), (2, 1)]
    assert [(tile.row, tile.column) for tile in square] == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2)]


@pytest.mark.parametrize("method", sorted(set(ENCODER_METHODS) - {"codebook"}))
def test_every_kept_patch_has_one_reason(method: str, tiny_llava_repo: Path, photo: Image.Image) -> None:
    (tile,), _ = views(tiny_llava_repo, photo, visual_token_num=9, method=method, seed=1)
    assert int(tile.kept.sum()) == 9
    assert tuple(tile.kinds) == SELECTORS[method].kinds
    assert torch.equal(sum(mask.int() for mask in tile.kinds.values()), tile.kept.int())


@pytest.mark.parametrize("method", ["visionzip", "tome", "prumerge", "prumerge_plus"])
def test_lines_lead_from_what_was_folded_to_where_it_went(
    method: str, tiny_llava_repo: Path, photo: Image.Image
) -> None:
    (tile,), model = views(tiny_llava_repo, photo, visual_token_num=9, method=method)
    pixels = AutoProcessor.from_pretrained(tiny_llava_repo).image_processor(photo, return_tensors="pt").pixel_values
    with torch.no_grad():
        into = model.get_image_features(pixel_values=pixels, return_dict=True).merged_into[0].tolist()
    kept = set(flat(tile.kept))
    assert list(tile.merges) == [(patch, went) for patch, went in enumerate(into) if went not in (patch, -1)]
    assert tile.merges and {went for _, went in tile.merges} <= kept
    drawn = kept_patches_picture([Panel([tile])])
    without = kept_patches_picture([Panel([replace(tile, merges=())])])
    assert drawn.size == without.size and drawn.tobytes() != without.tobytes()


def test_no_lines_where_nothing_is_folded(tiny_llava_repo: Path, photo: Image.Image) -> None:
    (tile,), _ = views(tiny_llava_repo, photo, visual_token_num=9)
    assert not tile.merges


def test_the_reasons_of_hiprune_are_read_in_the_layers_it_asks_for(tiny_llava_repo: Path, photo: Image.Image) -> None:
    (tile,), model = views(tiny_llava_repo, photo, visual_token_num=30, method="hiprune")
    pixels = AutoProcessor.from_pretrained(tiny_llava_repo).image_processor(photo, return_tensors="pt").pixel_values
    with torch.no_grad():
        output = model.get_image_features(pixel_values=pixels, return_dict=True)
    middle = output.layer_saliency[0, 0]
    (anchor,) = middle.argmax(dim=-1, keepdim=True).tolist()  # a tenth of 30 tokens, in fives
    around = {min(max(anchor + step, 0), 63) for step in (-1, 1, -8, 8)} - {anchor}
    anchors, buffers, registers = map(flat, tile.kinds.values())
    assert anchors == [anchor]
    assert set(buffers) == around
    assert set(registers) == set(flat(tile.kept)) - around - {anchor}
    picture = kept_patches_picture([Panel([tile])])
    legend = colours_of(picture, (0, 0, LEFT, picture.height))
    assert {ORANGE, GREEN, BLUE} <= legend


def test_a_dense_model_keeps_every_patch(tiny_llava_repo: Path, photo: Image.Image) -> None:
    (tile,), _ = views(tiny_llava_repo, photo, method="none")
    assert bool(tile.kept.all())
    assert not tile.pruned


def test_the_tile_is_the_photo_as_the_processor_crops_it(tiny_llava_repo: Path, photo: Image.Image) -> None:
    (tile,), _ = views(tiny_llava_repo, photo, visual_token_num=4)
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    expected = photo.crop((left, top, left + side, top + side)).resize((112, 112), Image.Resampling.BICUBIC)
    difference = torch.tensor(list(tile.image.tobytes()), dtype=torch.float) - torch.tensor(
        list(expected.tobytes()), dtype=torch.float
    )
    assert tile.image.size == (112, 112)
    assert difference.abs().mean() < 3  # resize and crop swap places, so edges differ a little


def test_kept_patches_keep_their_colour_and_dropped_ones_fade() -> None:
    red = Image.new("RGB", (40, 40), (200, 0, 0))
    kept = torch.tensor([[True, False], [False, True]])
    important = torch.tensor([[True, False], [False, False]])
    picture = kept_patches_picture([Panel([TileView(red, kept, {IMPORTANT: important, DIVERSE: kept & ~important})])])
    side = (picture.width - LEFT - GAP) // 2
    centre = {
        (row, column): picture.getpixel((LEFT + column * side + side // 2, GAP + row * side + side // 2))
        for row in (0, 1)
        for column in (0, 1)
    }
    assert centre[0, 0] == centre[1, 1] == (200, 0, 0)
    faded = centre[0, 1]
    assert len(set(faded)) == 1, "a dropped patch has no colour"
    assert faded[0] > 150, "and is nearly white"
    assert picture.getpixel((LEFT, GAP)) == ORANGE
    assert picture.getpixel((LEFT + side, GAP + side)) == BLUE


def test_patches_that_left_within_the_encoder_have_a_tone_of_their_own(tiny_llava_repo: Path) -> None:
    photo = Image.new("RGB", (40, 40), (200, 0, 0))
    stage = {"layer": 0, "keep_ratio": 0.5}
    model = vispruner.load(tiny_llava_repo, visual_token_num=8, encoder_stage=stage)
    (tile,) = view_kept_patches(model, AutoProcessor.from_pretrained(tiny_llava_repo), photo)
    assert int(tile.left.sum()) == 32 and not (tile.left & tile.kept).any()
    picture, plain = (kept_patches_picture([Panel([one])]) for one in (tile, replace(tile, left=None)))
    column = (0, 0, LEFT, picture.height)
    assert GONE in colours_of(picture, column) and GONE not in colours_of(plain, column)
    side = (picture.width - LEFT - GAP) // 8
    early, late = ((~tile.kept & own).nonzero()[0].tolist() for own in (tile.left, ~tile.left))
    tones = [picture.getpixel((LEFT + x * side + side // 2, GAP + y * side + side // 2)) for y, x in (early, late)]
    assert sum(tones[0]) < sum(tones[1]), "darker than what left late"
    model.set_vispruner_config(encoder_stage=None)
    assert view_kept_patches(model, AutoProcessor.from_pretrained(tiny_llava_repo), photo)[0].left is None


def test_an_unpruned_panel_is_the_plain_image() -> None:
    blue = Image.new("RGB", (96, 96), (0, 0, 200))
    picture = kept_patches_picture([Panel([TileView(blue, torch.ones(12, 12, dtype=torch.bool), pruned=False)])])
    panel = picture.crop((LEFT, GAP, picture.width - GAP, GAP + picture.width - GAP - LEFT))
    assert panel.getcolors() == [(panel.width * panel.height, (0, 0, 200))]


def test_the_pixels_of_a_small_picture_stay_pixels() -> None:
    checks = Image.new("RGB", (2, 2))
    checks.putdata([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)])
    small = checks.resize((96, 96), Image.Resampling.NEAREST)
    whole = torch.ones(12, 12, dtype=torch.bool)
    picture = kept_patches_picture([Panel([TileView(small, whole, pruned=False)])])
    panel = picture.crop((LEFT, GAP, picture.width - GAP, GAP + picture.width - GAP - LEFT))
    assert len(panel.getcolors()) == 4


def half_kept() -> TileView:
    return TileView(Image.new("RGB", (28, 28)), torch.tensor([[True, False], [False, True]]))


def colours_of(picture: Image.Image, box: tuple[int, int, int, int]) -> set[tuple[int, int, int]]:
    return {colour for _, colour in picture.crop(box).getcolors(2**24)}


def test_caption_and_legend_stand_left_of_the_panels() -> None:
    plain, captioned = (kept_patches_picture([Panel([half_kept()])], caption) for caption in ("", "a caption"))
    column = (0, 0, LEFT, captioned.height)
    assert captioned.size == plain.size
    assert captioned.crop(column).tobytes() != plain.crop(column).tobytes()
    assert BLUE in colours_of(plain, column)
    assert ORANGE not in colours_of(plain, column), "there are none"


def test_panels_stand_side_by_side_and_every_question_adds_a_row() -> None:
    one = kept_patches_picture([Panel([half_kept()])])
    three = kept_patches_picture([Panel([half_kept()])] * 3)
    assert three.width > 3 * 300
    panels = [Panel([half_kept()], ["yes", "no"])] * 3
    asked = kept_patches_picture(panels, questions=[Question("Is it?"), Question("Is it not?")])
    assert asked.width == three.width
    assert asked.height > three.height
    assert one.height > 300


@pytest.mark.parametrize(("answers", "red"), [(("yes", "no"), True), (("yes", "yes"), False)])
def test_wrong_answers_are_written_in_another_ink_under_their_panel(answers: tuple[str, str], red: bool) -> None:
    panels = [Panel([half_kept()], [answer]) for answer in answers]
    picture = kept_patches_picture(panels, questions=[Question("Is it?", answer="yes")])
    middle = (LEFT + picture.width) // 2
    assert WRONG_INK not in colours_of(picture, (0, 0, middle, picture.height))
    assert (WRONG_INK in colours_of(picture, (middle, 0, picture.width, picture.height))) is red


def test_every_budget_has_its_panel_after_the_unpruned_one(tiny_llava_repo: Path, photo: Image.Image) -> None:
    model = vispruner.load(str(tiny_llava_repo), keep_ratio=0.5).eval()
    processor = AutoProcessor.from_pretrained(tiny_llava_repo)
    before = dict(model.config.vispruner_config)
    panels = view_budgets(model, processor, photo, [20, None, 5])
    assert [int(panel.tiles[0].kept.sum()) for panel in panels] == [64, 20, 32, 5]
    assert [panel.tiles[0].pruned for panel in panels] == [False, True, True, True]
    assert model.config.vispruner_config == before


def test_each_panel_holds_the_answer_under_its_budget(tiny_llava_repo: Path, photo: Image.Image) -> None:
    model = vispruner.load(str(tiny_llava_repo), visual_token_num=5).eval()
    processor = AutoProcessor.from_pretrained(tiny_llava_repo)
    unpruned, pruned = view_budgets(model, processor, photo, [None], [Question("What is this?")])
    assert list(pruned.answers) == [ask(model, processor, photo, "What is this?")]
    model.set_vispruner_config(method="none")
    assert list(unpruned.answers) == [ask(model, processor, photo, "What is this?")]
    assert unpruned.answers != pruned.answers


def test_show_takes_one_budget_or_several(tiny_llava_repo: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give either --visual-token-num"):
        show("photo.jpg", str(tiny_llava_repo), tmp_path / "kept.png", visual_token_num=4, budgets=[8, 4])


def test_show_draws_several_stages_only_of_a_repo_that_has_their_budgets(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'"vispruner\+fastv" names several: build a repo .* stage_token_nums'):
        show(None, None, tmp_path / "kept.png", method="vispruner+fastv")


def test_photo_is_read_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    Image.new("RGB", (30, 20), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert open_photo(tmp_path / "turned.jpg").size == (20, 30)


@pytest.mark.parametrize(("name", "kind"), [("photo.png", "<u2"), ("photo.tif", "<u2"), ("photo.tif", ">u2")])
def test_sixteen_bits_are_brought_to_eight(name: str, kind: str, tmp_path: Path) -> None:
    shades = np.arange(0, 2**16, 257).reshape(16, 16)
    Image.fromarray(shades.astype(kind)).save(tmp_path / name)
    read = np.asarray(open_photo(tmp_path / name))
    assert (read == (shades // 256)[..., None]).all() and read.shape == (16, 16, 3)


@pytest.mark.parametrize("kind", ["int32", "float32"])
def test_pixels_of_no_known_range_are_refused(kind: str, tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), kind)).save(tmp_path / "depth.tif")
    with pytest.raises(OSError, match=r"depth\.tif is not a readable image: its pixels .* save it with 8 bits each"):
        open_photo(tmp_path / "depth.tif")


def test_a_truncated_photo_is_refused_by_name(tmp_path: Path, photo: Image.Image) -> None:
    photo.save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(OSError, match=r"half\.png is not a readable image"):
        open_photo(tmp_path / "half.png")


def test_a_failed_write_leaves_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        save_png(Image.new("RGB", (4, 4)), tmp_path / "kept.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["kept.jpg", "kept"])
def test_only_png_is_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be written to a \.png file"):
        save_png(Image.new("RGB", (4, 4)), tmp_path / name)


def test_the_drawn_selection_is_the_public_one(tiny_llava_repo: Path, photo: Image.Image) -> None:
    (tile,), model = views(tiny_llava_repo, photo, visual_token_num=12)
    pixels = AutoProcessor.from_pretrained(tiny_llava_repo).image_processor(photo, return_tensors="pt").pixel_values
    with torch.no_grad():
        tower = model.model.vision_tower
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        saliency = model.get_image_features(pixel_values=pixels, return_dict=True).saliency
    assert flat(tile.kept) == select_vispruner(hidden, saliency, 12)[0].tolist()
