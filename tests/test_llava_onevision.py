"""LLaVA-OneVision beyond the property matrix: how images are packed, scaled down and shared out among two pools."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from counting import cached_tokens
from matrix import ASK, CLIP, HELLO, Model, answers, logits, require_the_reference
from PIL import Image as Pictures
from rows import Image, Video, draw_weights
from rows.llava_onevision import GRIDS, ROW, SIDE, TILE, LlavaOnevisionRow, grid_of
from transformers import LlavaOnevisionProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

import vispruner

WIDE, TALL, SQUARE = (60, 170), (400, 130), (84, 84)
NEWLINE = -1


def build(folder: Path, most_tiles: int) -> Model:
    row = LlavaOnevisionRow()
    row.most_tiles = most_tiles
    stock = row.stock_class(row.config()).eval()
    draw_weights(stock)
    stock.save_pretrained(folder)
    stock = row.stock_class.from_pretrained(folder, attn_implementation="eager").eval()
    return Model(row, folder, stock, vispruner.load(folder, **row.options, attn_implementation="eager").eval())


@pytest.fixture(scope="module", params=[1, 9], ids=["anyres_max_1", "anyres_max_9"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return build(tmp_path_factory.mktemp("onevision") / "base", request.param)


@pytest.fixture(autouse=True)
def same_options(model: Model) -> Any:
    before = dict(model.pruned.config.vispruner_config)
    yield
    model.pruned.config.vispruner_config = before


@pytest.mark.parametrize("size", [WIDE, TALL, SQUARE, (196, 196), (300, 301)])
def test_one_image_of_any_shape_equals_the_reference(model: Model, size: tuple[int, int]) -> None:
    require_the_reference(model, [HELLO, Image(size, seed=1), ASK])


def test_only_a_low_limit_scales_a_grid_down(model: Model) -> None:
    (packing,) = model.pruned.model.packings(torch.tensor([WIDE]))
    assert packing.scaled == (model.row.most_tiles == 1)


@pytest.mark.parametrize("prompt", [[HELLO, Image(TALL, seed=1), ASK], CLIP], ids=["image", "video"])
def test_a_ratio_is_of_each_pool(model: Model, prompt: list) -> None:
    model.pruned.set_vispruner_config(keep_ratio=0.3)
    require_the_reference(model, prompt)


@pytest.mark.parametrize("size", [WIDE, TALL, SQUARE, (7, 900), (501, 499)])
def test_a_full_prompt_has_as_many_placeholders_as_the_stock_processor_writes(
    model: Model, size: tuple[int, int]
) -> None:
    processor = SimpleNamespace(
        num_image_tokens=SIDE**2,
        image_processor=SimpleNamespace(image_grid_pinpoints=GRIDS),
        vision_aspect_ratio=model.stock.config.vision_aspect_ratio,
    )
    processor._get_unpadded_features = LlavaOnevisionProcessor._get_unpadded_features.__get__(processor)
    expected = LlavaOnevisionProcessor._get_number_of_features(processor, *size, TILE, TILE)
    pixels = torch.empty(1, 5, 3, TILE, TILE)
    full, kept = model.pruned.visual_token_counts(pixels, torch.tensor([size]))
    assert full == [expected]
    (packing,) = model.pruned.model.packings(torch.tensor([size]))
    rest = expected - SIDE**2 - packing.newlines
    assert kept == [6 + min(6 * (packing.tiles - 1), rest) + packing.newlines]


@pytest.mark.parametrize("size", [WIDE, TALL, SQUARE])
def test_kept_indices_name_the_patch_that_a_token_comes_from_or_is_nearest_to(
    model: Model, size: tuple[int, int]
) -> None:
    (packing,) = model.pruned.model.packings(torch.tensor([size]))
    assert packing.order[: SIDE**2].tolist() == list(range(SIDE**2))
    rows, columns = packing.rest(SIDE**2)
    assert len(packing.order) == SIDE**2 + rows * (columns + 1)
    grid = packing.order[SIDE**2 :].view(rows, columns + 1)
    assert (grid[:, -1] == NEWLINE).all()
    across = grid_of(size)[1]
    tile, patch = grid[:, :-1] // SIDE**2 - 1, grid[:, :-1] % SIDE**2
    y, x = tile // across * SIDE + patch // SIDE, tile % across * SIDE + patch % SIDE
    assert torch.equal(y, y[:, :1].expand_as(y)) and torch.equal(x, x[:1].expand_as(x))
    steps = torch.cat([y[:, 0].diff(), x[0].diff()])
    assert (steps == 1).all() if not packing.scaled else (steps >= 1).all() and (steps > 1).any()


def test_images_that_share_a_prompt_are_base_tiles_only_where_batch_num_images_says_so(model: Model) -> None:
    inputs = model.prompt([HELLO, Image(WIDE, seed=1), [18], Image(TALL, seed=2), ASK])
    assert model.counts(inputs)[1][90] == [7, 7]
    alone = {**inputs, "batch_num_images": torch.tensor([1, 1])}
    del inputs["batch_num_images"]
    full, kept = model.counts(inputs)
    assert (full, kept) == model.counts(alone)
    assert all(count > SIDE**2 + 1 for count in full[90]) and all(count > 7 for count in kept[90])


def test_the_stock_image_processor_and_its_batch_num_images(model: Model) -> None:
    noise = np.random.default_rng(0)
    pictures = [
        Pictures.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in (WIDE, TALL, SQUARE)
    ]
    sides = {"height": TILE, "width": TILE}
    processor = LlavaOnevisionImageProcessorPil(size=sides, image_grid_pinpoints=GRIDS)
    images = processor(images=[pictures[:1], pictures[1:]], return_tensors="pt")
    full = [len(model.row.layout(WIDE, *grid_of(WIDE))), SIDE**2 + 1, SIDE**2 + 1]
    prompts = [[1, *HELLO, *[90] * full[0], *ASK], [1, *HELLO, *[90] * sum(full[1:]), *ASK]]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), **images}
    assert model.counts(inputs)[0][90] == full
    assert cached_tokens(model.pruned, inputs) < width
    model.pruned.set_vispruner_config(method="none")
    assert torch.equal(logits(model.pruned, inputs), logits(model.stock, inputs))


def test_tile_mode_says_nothing_here(model: Model) -> None:
    inputs = model.prompt([HELLO, Image(WIDE, seed=1), ASK])
    expected = answers(model.pruned, inputs)
    model.pruned.set_vispruner_config(tile_mode="native", position_policy="original")
    original = logits(model.pruned, inputs)
    model.pruned.set_vispruner_config(tile_mode="paper")
    assert torch.equal(logits(model.pruned, inputs), original)
    model.pruned.set_vispruner_config(position_policy=None)
    assert torch.equal(answers(model.pruned, inputs), expected)


def test_a_video_keeps_as_many_tokens_of_each_frame_and_its_newline(model: Model) -> None:
    inputs = model.prompt([HELLO, Video(3, (56, 56), seed=1), ASK])
    video = model.pruned.model.get_video_features(inputs["pixel_values_videos"], return_dict=True)
    (kept,), (places,) = video.kept_indices, video.placeholders
    assert (kept[:-1] // 16).bincount().tolist() == [6, 6, 6]
    assert kept[-1] == NEWLINE and places.tolist() == [*kept[:-1].tolist(), 48]
    assert torch.equal(video.pooler_output[0, -1], model.stock.model.image_newline)


def test_gradients_reach_the_encoder_and_the_newline_through_kept_tokens(model: Model) -> None:
    inputs = model.prompt([HELLO, Image(WIDE, seed=1), ASK], CLIP)
    model.pruned(**inputs, labels=inputs["input_ids"]).loss.backward()
    base = model.pruned.model
    for parameter in (base.image_newline, base.vision_tower.get_input_embeddings().weight):
        assert parameter.grad.abs().sum() > 0
    model.pruned.zero_grad()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_select_strategy": "default"}, 'vision_feature_select_strategy must be "full" .all patches.'),
        (
            {"vision_config": {"model_type": "clip_vision_model"}},
            "vision_config.model_type must be siglip_vision_model",
        ),
    ],
)
def test_what_cannot_be_ranked_is_refused(changes: dict[str, Any], message: str) -> None:
    config = ROW.config().to_dict() | changes
    architecture = vispruner.ARCHITECTURES["llava_onevision"]
    config = architecture.config_class.from_dict(config, vispruner_config={"visual_token_num": 4})
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        architecture.model_class(config)


def test_another_aspect_ratio_than_the_configured_one_is_refused(model: Model) -> None:
    inputs = model.prompt([HELLO, Image(WIDE, seed=1), ASK])
    same = model.pruned.config.vision_aspect_ratio
    assert torch.isfinite(model.pruned(**inputs, vision_aspect_ratio=same).logits).all()
    with pytest.raises(ValueError, match="vision_aspect_ratio is 'anyres_max_4', but"):
        model.pruned(**inputs, vision_aspect_ratio="anyres_max_4")


def test_sizes_that_do_not_fit_are_refused(model: Model) -> None:
    pixels = torch.empty(2, 1, 3, TILE, TILE)
    with pytest.raises(ValueError, match="image_sizes is missing: pass the processor's image_sizes"):
        model.pruned.visual_token_counts(pixels)
    with pytest.raises(ValueError, match="batch_num_images counts 3 images, but image_sizes has 2"):
        model.pruned.visual_token_counts(pixels, torch.tensor([WIDE, TALL]), batch_num_images=torch.tensor([1, 2]))
