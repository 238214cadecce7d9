"""Blocks of pixels that leave before the encoder: the rule itself, and Qwen-VL beside an encoder of full length.

How many stay depends on the picture. The reference encodes all patches, but nobody attends to those that should have
left.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import (
    CLIP,
    MIXED,
    NEW,
    ONE,
    ROWS,
    SEVERAL,
    TEXT,
    TOLERANCE,
    Model,
    answers,
    attending_by,
    generate,
    lent,
    logits,
    made,
    masked_run,
)
from PIL import Image as Picture
from PIL import ImageDraw
from rows import noise
from rows._qwen_vl import IMAGE, MERGE, PATCH, VIDEO
from tiny_processors import write_processor
from transformers import AttentionInterface, BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import vispruner
from vispruner.conversion import cli
from vispruner.conversion.build import build_repo
from vispruner.conversion.ceilings import ceiling, ceiling_of_config
from vispruner.conversion.picture import GONE, LEFT_BEFORE, Panel, kept_patches_picture, show, view_kept_patches
from vispruner.conversion.verify import verify_repo
from vispruner.pixel_prediction import cells_to_encode
from vispruner.selectors import ENCODER_METHODS, SELECTORS, select_tokens

GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
STAGE = {"pixel_tolerance": 0}
BLOCK = MERGE**2


# The rule


def by_definition(cells: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Which cells (rows, columns, P) stay: one after the other, each foretold from what stands for its neighbours."""
    rows, columns = cells.shape[:2]
    stays = torch.zeros(rows, columns, dtype=torch.bool)
    stands: dict[tuple[int, int], torch.Tensor] = {}

    def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
        return float((one - other).abs().max()) <= tolerance

    for row, column in itertools.product(range(rows), range(columns)):
        left, above, corner = (
            stands.get(place) for place in ((row, column - 1), (row - 1, column), (row - 1, column - 1))
        )
        foretold = above if left is None else left
        if corner is not None and alike(corner, left) and not alike(corner, above):
            foretold = above
        stays[row, column] = foretold is None or not alike(cells[row, column], foretold)
        stands[row, column] = cells[row, column] if stays[row, column] else foretold
    return stays


@pytest.mark.parametrize("tolerance", [0, 0.5, 1, 2.5])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 2), (5, 9), (9, 4)])
def test_cells_stay_that_are_not_foretold(size: tuple[int, int], tolerance: float) -> None:
    drawn = torch.randint(4, (12, *size, 3), generator=torch.Generator().manual_seed(sum(size))).float()
    drawn[:6, ..., 1:] = 0  # so that many are alike
    found = cells_to_encode(drawn, tolerance)
    assert torch.equal(found, torch.stack([by_definition(cells, tolerance) for cells in drawn]))
    assert found[:, 0, 0].all()


def test_nothing_differs_by_more_than_the_tolerance_from_a_cell_that_stays() -> None:
    """A slope falls by less than the tolerance from cell to cell, and still does not leave as a whole."""
    slope = torch.arange(16.0).expand(1, 6, -1)[..., None] + noise((1, 6, 16, 5), 1) * 0.1
    stays = cells_to_encode(slope, 2.5)
    distances = (slope[:, :, :, None, None] - slope[:, None, None]).abs().amax(-1)
    nearest = distances.masked_fill(~stays[:, None, None], float("inf")).flatten(3).amin(-1)
    assert 1 < stays.sum() < stays.numel() / 2 and nearest.max() <= 2.5


def test_of_a_rectangle_only_corners_stay() -> None:
    page = torch.ones(1, 8, 10, 4)
    page[:, 2:6, 3:8] = 0
    assert cells_to_encode(page)[0].nonzero().tolist() == [[0, 0], [2, 3], [2, 8], [6, 3]]


def test_one_colour_is_one_cell_and_noise_is_all() -> None:
    assert cells_to_encode(torch.full((3, 4, 5, 6), 0.3)).flatten(1).sum(1).tolist() == [1, 1, 1]
    assert cells_to_encode(noise((3, 4, 5, 6), 0)).all()
    assert cells_to_encode(torch.full((1, 2, 2, 3), float("nan"))).all(), "what is no number foretells nothing"


def test_the_smallest_difference_counts() -> None:
    cells = torch.zeros(1, 1, 2, 1000)
    cells[0, 0, 1, 700] = torch.finfo(torch.float32).tiny
    assert cells_to_encode(cells).all()


@pytest.mark.parametrize("one, other, tolerance, dtype", [
    (1.0, 1.0004, 0.0003, torch.float32),  # alike in half precision
    (2.140625, -0.00390625, 2.142, torch.bfloat16),  # whose difference bfloat16 rounds down
])  # fmt: skip
def test_differences_are_taken_in_full_precision(
    one: float, other: float, tolerance: float, dtype: torch.dtype
) -> None:
    assert cells_to_encode(torch.tensor([one, other], dtype=dtype).view(1, 1, 2, 1), tolerance).all()


# In the models


@pytest.fixture(scope="module")
def known() -> dict[str, Model]:
    return {}


@pytest.fixture(params=GRIDS)
def model(request: pytest.FixtureRequest, known: dict[str, Model], tmp_path: Path) -> Iterator[Model]:
    name = request.param
    if name not in known:
        known[name] = made(name, tmp_path / "base", keep_ratio=1.0, encoder_stage=STAGE)
    yield from lent(known[name])


def repetitive(inputs: dict[str, Any], kinds: int = 2) -> dict[str, Any]:
    """The same pictures and frames with cells of so many kinds in each, and only the last image as it was."""
    changed = dict(inputs)
    for name in ("image", "video"):
        pixels = "pixel_values" if name == "image" else "pixel_values_videos"
        if pixels not in inputs:
            continue
        sizes = [h * w for t, h, w in inputs[f"{name}_grid_thw"].tolist() for _ in range(t)]
        frames = list(inputs[pixels].split(sizes))
        for number, frame in enumerate(frames[: -1 if name == "image" and len(frames) > 1 else None]):
            cells = frame.unflatten(0, (-1, BLOCK))
            which = torch.randint(
                min(kinds, len(cells)), (len(cells),), generator=torch.Generator().manual_seed(number)
            )
            frames[number] = cells[which].flatten(0, 1)
        changed[pixels] = torch.cat(frames)
    return changed


def staying_in(inputs: dict[str, Any], name: str, tolerance: float = 0) -> list[torch.Tensor]:
    """By image or frame which of its tokens stay, in raster order."""
    pixels = inputs["pixel_values" if name == "image" else "pixel_values_videos"]
    grids = [(h // MERGE, w // MERGE) for t, h, w in inputs[f"{name}_grid_thw"].tolist() for _ in range(t)]
    parts = pixels.split([rows * columns * BLOCK for rows, columns in grids])
    cells = [part.reshape(*grid, -1) for part, grid in zip(parts, grids, strict=True)]
    return [by_definition(frame, tolerance).flatten() for frame in cells]


class FullLength:
    """Attention of an encoder of full length in which nobody attends to the patches that do not stay.

    saliency  by layer the mean attention of each patch that stays from the others of its picture that do
    """

    def __init__(self, model: Any, stays: torch.Tensor) -> None:
        self.numbers = {id(attention): number for number, attention in enumerate(model.model.vision_attentions)}
        self.stays, self.of_layer = stays, {number: [] for number in self.numbers.values()}

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        here = self.of_layer[self.numbers[id(module)]]
        first = sum(map(len, here))
        if first == len(self.stays):
            here.clear()
            first = 0
        seen = self.stays[first : first + key.shape[2]]
        weights = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        weights = weights.masked_fill(~seen, torch.finfo(weights.dtype).min).softmax(-1)
        here.append(weights[0].mean(0)[seen].sum(0) / seen.sum().clamp(min=1))
        return (weights @ value).transpose(1, 2), weights

    def saliency(self, layer: int) -> torch.Tensor:
        """Of merged tokens, in the encoder's order."""
        return torch.cat(self.of_layer[layer]).view(-1, BLOCK).mean(1)


def in_encoders_order(model: Model, staying: list[torch.Tensor], inputs: dict[str, Any], name: str) -> torch.Tensor:
    grids = [(h // MERGE, w // MERGE) for t, h, w in inputs[f"{name}_grid_thw"].tolist() for _ in range(t)]
    orders = [model.row.order(model.stock.model.visual, *grid) for grid in grids]
    tokens = torch.cat([own[order] for own, order in zip(staying, orders, strict=True)])
    return tokens.repeat_interleave(BLOCK)


def dense(model: Model) -> Any:
    other = copy.deepcopy(model.pruned)
    other.set_vispruner_config(method="none")
    return other


def encoded(model: Any, inputs: dict[str, Any], modality: str = "image") -> Any:
    return model.model.encode_prompt(**inputs)[modality]


@torch.no_grad()
@pytest.mark.parametrize("ratio", [1.0, 0.3])
@pytest.mark.parametrize("name", ["image", "video"])
def test_what_stays_is_encoded_as_in_an_encoder_of_full_length(model: Model, name: str, ratio: float) -> None:
    inputs = repetitive(model.prompt(SEVERAL if name == "image" else CLIP))
    model.pruned.set_vispruner_config(keep_ratio=ratio)
    staying, plain = staying_in(inputs, name), dense(model)
    counts = [int(own.sum()) for own in staying]
    assert min(counts) < min(map(len, staying)) and len(set(counts)) > 1
    oracle = FullLength(plain, in_encoders_order(model, staying, inputs, name))
    full, ours = encoded(attending_by(oracle, plain), inputs, name), encoded(model.pruned, inputs, name)
    scores = oracle.saliency(plain.model.feature_layer).split([len(own) for own in staying])
    frames = plain.model.frames_of(inputs[f"{name}_grid_thw"])
    for item, (stays, saliency, grid) in enumerate(zip(staying, scores, frames, strict=True)):
        raster = torch.empty_like(saliency)
        raster[model.row.order(plain.model.visual, *grid)] = saliency
        numbers, features = stays.nonzero()[:, 0], full.pooler_output[item]
        budget = min(len(numbers), max(1, int(len(stays) * ratio + 0.5)))
        kept = numbers[select_tokens("vispruner", features[numbers][None], raster[numbers][None], budget)[0]]
        assert torch.equal(ours.remain[item], stays)
        assert torch.equal(ours.kept_indices[item], kept) and torch.equal(ours.placeholders[item], kept)
        torch.testing.assert_close(ours.saliency[item][numbers], raster[numbers], **TOLERANCE)
        torch.testing.assert_close(ours.pooler_output[item], features[kept], **TOLERANCE)
        for level, whole in zip(ours.deepstack_features or [], full.deepstack_features or [], strict=True):
            torch.testing.assert_close(level[item], whole[item][kept], **TOLERANCE)


@pytest.mark.parametrize("prompt", [ONE, CLIP], ids=["image", "video"])
def test_answers_are_those_of_the_full_prompt_of_which_nobody_sees_what_left(model: Model, prompt: list) -> None:
    name, token = ("image", IMAGE) if prompt is ONE else ("video", VIDEO)
    inputs = repetitive(model.prompt(prompt))
    staying = staying_in(inputs, name)
    dropped = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    dropped[inputs["input_ids"] == token] = ~torch.cat(staying)
    stock, oracle = (
        copy.deepcopy(model.stock),
        FullLength(dense(model), in_encoders_order(model, staying, inputs, name)),
    )
    attentions = [block.attn for block in stock.model.visual.blocks]
    oracle.numbers = {id(attention): number for number, attention in enumerate(attentions)}
    AttentionInterface.register("nobody_looks", oracle)
    for attention in attentions:
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation = "nobody_looks"
    new, first = masked_run(stock, inputs, dropped, {})
    result = generate(model.pruned, inputs, return_dict_in_generate=True, output_logits=True)
    torch.testing.assert_close(result.logits[0][0], first, **TOLERANCE)
    assert result.sequences[0, inputs["input_ids"].shape[1] :].tolist() == new
    torch.testing.assert_close(logits(model.pruned, inputs)[0, -1], first, **TOLERANCE)
    assert result.past_key_values.get_seq_length() == int((~dropped).sum()) + NEW - 1
    assert model.pruned.last_pruning.kept_counts == tuple(int(own.sum()) for own in staying)


def batch(model: Model) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Prompts with pictures of which different numbers stay, one by one and in one batch."""
    prompts = [ONE, SEVERAL, TEXT, CLIP, MIXED]
    alone = [repetitive(model.prompt(prompt), kinds=2 + number) for number, prompt in enumerate(prompts)]
    together = model.prompt(*prompts)
    for name in ("pixel_values", "pixel_values_videos"):
        together[name] = torch.cat([inputs[name] for inputs in alone if name in inputs])
    return alone, together


@pytest.mark.core
@pytest.mark.parametrize("ratio", [1.0, 0.4])
def test_rows_of_a_batch_answer_as_alone(model: Model, ratio: float) -> None:
    model.pruned.set_vispruner_config(keep_ratio=ratio)
    alone, inputs = batch(model)
    together, beams = answers(model.pruned, inputs), answers(model.pruned, inputs, num_beams=2)
    for row, own in enumerate(alone):
        assert torch.equal(together[row], answers(model.pruned, own)[0])
        assert torch.equal(beams[row], answers(model.pruned, own, num_beams=2)[0])
    assert len({tuple(model.counts(own)[1][IMAGE]) for own in alone}) > 2


def test_forward_goes_on_from_its_own_cache_as_generate_does(model: Model) -> None:
    inputs = repetitive(model.prompt(ONE))  # behind a video stock's own forward goes on otherwise than its generate
    expected = generate(model.pruned, inputs, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        outputs = model.pruned(**inputs)
        assert outputs.logits.shape[1] == inputs["input_ids"].shape[1]
        for step in expected.logits[1:]:
            new = outputs.logits[:, -1:].argmax(-1)
            outputs = model.pruned(input_ids=new, past_key_values=outputs.past_key_values)
            torch.testing.assert_close(outputs.logits[:, -1], step, **TOLERANCE)


@pytest.mark.parametrize("ratio", [1.0, 0.4])
def test_a_prompt_as_short_as_the_model_counts_is_the_same_prompt(model: Model, ratio: float) -> None:
    model.pruned.set_vispruner_config(keep_ratio=ratio)
    _, inputs = batch(model)
    full, kept = model.counts(inputs)
    described = {"image_grid_thw": inputs["image_grid_thw"]}
    assert model.pruned.visual_token_counts(inputs["pixel_values"], **described) == (full[IMAGE], kept[IMAGE])
    short = model.row.shortened(inputs, kept)
    assert short["input_ids"].shape[1] < inputs["input_ids"].shape[1]
    assert torch.equal(answers(model.pruned, short), answers(model.pruned, inputs))
    with pytest.raises(ValueError, match=r"pixel_tolerance: how many .* depends on the picture, so pass pixel_values"):
        model.pruned.visual_token_counts(None, **described)


def test_the_budget_is_the_most(model: Model) -> None:
    model.pruned.set_vispruner_config(visual_token_num=5)
    inputs = repetitive(model.prompt(SEVERAL, CLIP))
    full, kept = model.counts(inputs)
    for token, name in ((IMAGE, "image"), (VIDEO, "video")):
        assert kept[token] == [min(5, int(own.sum())) for own in staying_in(inputs, name)]
    assert min(kept[VIDEO]) < 5 == max(kept[IMAGE]) < min(full[IMAGE])


def test_every_layer_runs_on_fewer_rows_and_nothing_is_left_behind(model: Model) -> None:
    inputs, seen = repetitive(model.prompt(SEVERAL)), []
    attentions = model.pruned.model.vision_attentions
    hooks = [
        attention.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
        )
        for attention in attentions
    ]
    answers(model.pruned, inputs)
    for hook in hooks:
        hook.remove()
    assert seen == [BLOCK * sum(int(own.sum()) for own in staying_in(inputs, "image"))] * len(attentions)
    assert seen[0] < len(inputs["pixel_values"])
    assert not any(layer._forward_pre_hooks for layer in model.pruned.model.vision_layers)


@pytest.mark.parametrize("ratio", [1.0, 0.4])
def test_noise_is_what_there_is_without(model: Model, ratio: float) -> None:
    """Bit for bit: stock where the budget keeps all, else the model without the stage."""
    inputs = model.prompt(MIXED)
    model.pruned.set_vispruner_config(keep_ratio=ratio)
    without = copy.deepcopy(model.pruned)
    without.set_vispruner_config(encoder_stage=None)
    expected = model.stock if ratio == 1 else without
    assert torch.equal(logits(model.pruned, inputs), logits(expected, inputs))
    assert torch.equal(answers(model.pruned, inputs), answers(expected, inputs))


def test_of_one_colour_one_token_stays(model: Model) -> None:
    inputs = {name: torch.full_like(v, 0.25) if "pixel" in name else v for name, v in model.prompt(MIXED).items()}
    assert model.counts(inputs)[1] == {IMAGE: [1], VIDEO: [1] * 4}
    assert answers(model.pruned, inputs).shape == (1, NEW)
    assert [len(own) for own in encoded(model.pruned, inputs, "video").pooler_output] == [1] * 4


def test_method_none_encodes_all(model: Model) -> None:
    inputs = repetitive(model.prompt(ONE))
    model.pruned.set_vispruner_config(method="none")
    assert torch.equal(logits(model.pruned, inputs), logits(model.stock, inputs))


def test_a_tolerance_lets_more_leave(model: Model) -> None:
    inputs = repetitive(model.prompt(ONE))
    inputs["pixel_values"] = inputs["pixel_values"] + 0.01 * noise(inputs["pixel_values"].shape, 5).clamp(-1, 1)
    assert model.counts(inputs)[1][IMAGE] == model.counts(inputs)[0][IMAGE]
    model.pruned.set_vispruner_config(encoder_stage={"pixel_tolerance": 0.03})
    (stays,) = staying_in(inputs, "image", 0.03)
    assert model.counts(inputs)[1][IMAGE] == [int(stays.sum())] and not stays.all()
    assert torch.equal(encoded(model.pruned, inputs).kept_indices[0], stays.nonzero()[:, 0])


@pytest.mark.parametrize("tolerance, mean, spread", [
    (0.01, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    (0.02, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
], ids=["Qwen3-VL", "Qwen2-VL, Qwen2.5-VL"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_documented_tolerances_let_any_level_be_the_next_one(
    tolerance: float, mean: Sequence[float], spread: Sequence[float], dtype: torch.dtype
) -> None:
    levels = (torch.arange(256.0)[:, None] / 255 - torch.tensor(mean)) / torch.tensor(spread)
    pairs = torch.stack([levels[:-1], levels[1:]], dim=1).mT.reshape(-1, 1, 2, 1).to(dtype)
    assert cells_to_encode(pairs, tolerance).sum() == len(pairs)
    apart = torch.stack([levels[:-3], levels[3:]], dim=1).mT.reshape(-1, 1, 2, 1).to(dtype)
    assert cells_to_encode(apart, tolerance).all()
    text = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert f"`pixel_tolerance: {tolerance}`" in text


@pytest.mark.core
def test_pixels_count_as_the_encoder_gets_them(model: Model) -> None:
    """Who casts them to the model's type and who leaves that to the model is told the same."""
    pruned = copy.deepcopy(model.pruned).to(torch.bfloat16)
    inputs = repetitive(model.prompt(ONE))
    inputs["pixel_values"] = inputs["pixel_values"] * (1 + 1e-4 * noise(inputs["pixel_values"].shape, 5).clamp(-1, 1))
    cast = {**inputs, "pixel_values": inputs["pixel_values"].to(torch.bfloat16)}
    assert pruned.model.count_visual_tokens(inputs) == pruned.model.count_visual_tokens(cast)
    assert torch.equal(answers(pruned, inputs), answers(pruned, cast))


def test_pixels_with_a_dimension_more_are_the_same_pixels(model: Model) -> None:
    """As stock takes them."""
    inputs = repetitive(model.prompt(MIXED))
    batched = {name: value[None] if name.startswith("pixel_values") else value for name, value in inputs.items()}
    assert model.counts(batched) == model.counts(inputs)
    assert torch.equal(answers(model.pruned, batched), answers(model.pruned, inputs))


@pytest.mark.parametrize("prompt", [SEVERAL, CLIP], ids=["image", "video"])
def test_pixels_that_their_grids_do_not_describe_are_refused_by_name(model: Model, prompt: list) -> None:
    inputs = model.prompt(prompt)
    name = "pixel_values" if prompt is SEVERAL else "pixel_values_videos"
    patches = len(inputs[name])
    inputs[name] = inputs[name][:-BLOCK]
    with pytest.raises(ValueError, match=rf"hold {patches - BLOCK} patches, but image_grid_thw .* says {patches}"):
        answers(model.pruned, inputs)


def test_images_encoded_once_answer_the_same_and_hold_to_their_tolerance(model: Model) -> None:
    inputs = repetitive(model.prompt(SEVERAL))
    expected = answers(model.pruned, inputs)
    given = {name: inputs[name] for name in inputs if name != "pixel_values"}
    images = model.pruned.encode_images(inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
    assert images.kept_counts == tuple(int(own.sum()) for own in staying_in(inputs, "image"))
    assert torch.equal(answers(model.pruned, {**given, "encoded_images": images}), expected)
    model.pruned.set_vispruner_config(encoder_stage={"pixel_tolerance": 0.5})
    with pytest.raises(ValueError, match="encoder_stage"):
        answers(model.pruned, {**given, "encoded_images": images})


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen2_5_vl"], indirect=True)
def test_a_compiled_model_answers_as_it_does_uncompiled(model: Model) -> None:
    """A short prompt with the positions of the full one, as for any budget."""
    given: list[torch.Tensor] = []
    hook = model.pruned.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs["position_ids"]), with_kwargs=True
    )
    inputs = repetitive(model.prompt(ONE))
    logits(model.pruned, inputs)
    hook.remove()
    short = {**model.row.shortened(inputs, model.counts(inputs)[1]), "position_ids": given[0][-3:]}
    expected = model.pruned.model(**short).last_hidden_state
    torch._dynamo.reset()
    compiled = torch.compile(model.pruned.model.forward, backend="eager")
    torch.testing.assert_close(compiled(**short).last_hidden_state, expected, **TOLERANCE)


def test_training_goes_through(model: Model) -> None:
    pruned, inputs = copy.deepcopy(model.pruned).train(), repetitive(model.prompt(ONE))
    pruned(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert pruned.model.vision_layers[0].attn.qkv.weight.grad.abs().sum() > 0


def test_it_is_saved_and_loaded(model: Model, tmp_path: Path) -> None:
    model.pruned.save_pretrained(tmp_path / "saved")
    again = vispruner.load(tmp_path / "saved", attn_implementation="eager").eval()
    inputs = repetitive(model.prompt(ONE))
    assert again.config.vispruner_config["encoder_stage"] == STAGE
    assert torch.equal(answers(again, inputs), answers(model.pruned, inputs))


OF_PARTS = [
    name
    for name in sorted(ENCODER_METHODS)
    if not {"grid", "codebook", "videos", "cls_feature"} & (SELECTORS[name].needs | SELECTORS[name].uses)
    and SELECTORS[name].then is None
    and SELECTORS[name].saliency_kind != "cls"
]


@torch.no_grad()
@pytest.mark.parametrize("method", OF_PARTS)
@pytest.mark.parametrize("model", ["qwen2_5_vl"], indirect=True)
def test_every_method_chooses_among_what_stays(model: Model, method: str) -> None:
    model.pruned.set_vispruner_config(method=method, seed=0, keep_ratio=0.4)
    inputs = repetitive(model.prompt(SEVERAL))
    features = encoded(model.pruned, inputs)
    for kept, stays in zip(features.kept_indices, staying_in(inputs, "image"), strict=True):
        assert stays[kept].all() and torch.equal(kept, kept.unique())
        assert len(kept) == min(int(stays.sum()), int(len(stays) * 0.4 + 0.5))


# A real picture, from the processor on


def drawn_page() -> Picture.Image:
    """White, 6 x 8 cells, with a black bar that covers parts of three cells."""
    page = Picture.new("RGB", (8 * PATCH * MERGE, 6 * PATCH * MERGE), "white")
    side = PATCH * MERGE
    ImageDraw.Draw(page).rectangle((3 * side + 5, 2 * side + 5, 5 * side + 10, 2 * side + 12), fill="black")
    return page


def of_a_page(model: Model) -> tuple[Any, dict[str, Any]]:
    sizes = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
    processor = Qwen2VLImageProcessorPil(**sizes, size={"shortest_edge": 1, "longest_edge": 10**6})
    return processor, {k: torch.as_tensor(v) for k, v in processor(drawn_page(), return_tensors="pt").items()}


def test_of_a_page_what_is_drawn_stays_and_where_white_begins_anew(model: Model) -> None:
    _, pixels = of_a_page(model)
    with torch.no_grad():
        features = model.pruned.model.get_image_features(**pixels)
    places = [divmod(number, 8) for number in features.kept_indices[0].tolist()]
    # Ink and the first white behind it; and below its left edge, which seems to run on.
    assert places == [(0, 0), (2, 3), (2, 4), (2, 5), (2, 6), (3, 3)]
    assert model.pruned.visual_token_counts(**pixels) == ([48], [6])


# What cannot be, and what is said of it


@pytest.mark.parametrize("name", [name for name in ROWS if name not in GRIDS])
def test_other_architectures_refuse_it_by_name(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    with pytest.raises(ValueError, match=r"encoder_stage"):
        made(name, tmp_path / "base", **row.options, encoder_stage=STAGE)
    pruned = made(name, tmp_path / "plain").pruned
    if pruned.model.stage_hindrance is None:
        with pytest.raises(
            ValueError, match=r"encoder_stage\.pixel_tolerance is for the Qwen-VL models.*set encoder_stage"
        ):
            pruned.set_vispruner_config(encoder_stage=STAGE)


@pytest.mark.parametrize("change, named", [
    ({"method": "fastv", "prune_layers": [2]}, r"encoder_stage needs a method that chooses behind the encoder"),
    (
        {"method": "vispruner+fastv", "stage_token_nums": [4, 2], "prune_layers": [2]},
        r'pixel_tolerance leaves .* not "vispruner\+fastv"',
    ),
    ({"method": "hiprune"}, r'method "hiprune" needs grid'),
    ({"method": "uniform_grid"}, r'method "uniform_grid" needs grid'),
    ({"method": "vidcom2"}, r'method "vidcom2" needs videos'),
    ({"encoder_stage": {"pixel_tolerance": -1}}, r"encoder_stage\.pixel_tolerance must be a number from 0 on, got -1"),
    ({"encoder_stage": {"pixel_tolerance": None}}, r"encoder_stage\.pixel_tolerance must be a number from 0 on"),
    ({"encoder_stage": {"pixel_tolerance": float("nan")}}, r"encoder_stage\.pixel_tolerance must be a number from 0"),
    ({"encoder_stage": {"pixel_tolerance": True}}, r"encoder_stage\.pixel_tolerance must be a number from 0 on"),
    ({"encoder_stage": {**STAGE, "layer": 1}}, r'encoder_stage must be null, .* or {"pixel_tolerance": t}'),
])  # fmt: skip
def test_what_cannot_be_is_refused_by_name(model: Model, change: dict[str, Any], named: str) -> None:
    before = dict(model.pruned.config.vispruner_config)
    with pytest.raises(ValueError, match=named):
        model.pruned.set_vispruner_config(**change)
    assert model.pruned.config.vispruner_config == before


@pytest.mark.parametrize("kinds", [2, None], ids=["page", "photograph"])
def test_gradient_checkpointing_is_refused(model: Model, kinds: int | None) -> None:
    """At once, not at the first picture of which something leaves."""
    pruned, inputs = copy.deepcopy(model.pruned).train(), model.prompt(ONE)
    inputs = inputs if kinds is None else repetitive(inputs, kinds)
    pruned.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"encoder_stage: gradient checkpointing"):
        pruned(**inputs, labels=inputs["input_ids"])


class PageProcessor:
    """As much of a Qwen-VL processor as a picture of kept patches asks for; stock's needs torchvision."""

    def __init__(self, model: Model) -> None:
        self.image_processor, self.row = of_a_page(model)[0], model.row

    def apply_chat_template(self, *conversation: Any, **options: Any) -> str:
        return ""

    def __call__(self, text: str, images: Picture.Image, return_tensors: str) -> BatchFeature:
        pixels = self.image_processor(images, return_tensors=return_tensors)
        _, h, w = pixels["image_grid_thw"][0].tolist()
        ids = torch.tensor([[11, *self.row.written(IMAGE, 1, h * w // BLOCK), 12]])
        return BatchFeature({**pixels, "input_ids": ids, "mm_token_type_ids": (ids == IMAGE).long()})


@pytest.mark.parametrize("ratio", [1.0, 0.07])
def test_a_picture_shows_what_left_and_why(model: Model, ratio: float) -> None:
    model.pruned.set_vispruner_config(keep_ratio=ratio)
    (tile,) = view_kept_patches(model.pruned, PageProcessor(model), drawn_page())
    assert tile.left_as == LEFT_BEFORE and int((~tile.left).sum()) == 6 and not (tile.left & tile.kept).any()
    assert int(tile.kept.sum()) == min(6, int(48 * ratio + 0.5))
    marked = torch.stack(list(tile.kinds.values())).any(0)
    assert torch.equal(marked, tile.kept if ratio < 1 else torch.zeros_like(tile.kept)), "nothing was chosen"
    picture = kept_patches_picture([Panel([tile])])
    within = kept_patches_picture([Panel([dataclasses.replace(tile, left_as="left within the encoder")])])
    assert GONE in {colour for _, colour in picture.crop((0, 0, 372, picture.height)).getcolors(2**24)}
    assert picture.tobytes() != within.tobytes(), "it says why"


def test_show_says_that_the_picture_decides(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions: list[str] = []
    monkeypatch.setattr("vispruner.conversion.picture.load_model", lambda *_, **__: model.pruned)
    monkeypatch.setattr("vispruner.conversion.picture.load_processor", lambda _: PageProcessor(model))
    monkeypatch.setattr(
        "vispruner.conversion.picture.kept_patches_picture",
        lambda panels, caption, questions: captions.append(caption) or drawn_page(),
    )
    drawn_page().save(tmp_path / "page.png")
    PageProcessor.video_processor = None  # type: ignore[attr-defined]
    show(tmp_path / "page.png", str(model.folder), tmp_path / "kept.png")
    model.pruned.set_vispruner_config(encoder_stage=None)
    show(tmp_path / "page.png", str(model.folder), tmp_path / "kept.png")
    assert ["; how many patches stay depends on the picture" in caption for caption in captions] == [True, False]


def write_yaml(model: Model, folder: Path, tolerance: float = 0, **budget: Any) -> Path:
    if not (model.folder / "preprocessor_config.json").exists():
        write_processor(model.row, model.folder)
    content = {
        "repo_id": "someone/pruned",
        "base_model": str(model.folder),
        "architecture": model.row.model_type,
        "vispruner_config": {**budget, "encoder_stage": {"pixel_tolerance": tolerance}},
        "weights": "full",
        "card": {"license": "apache-2.0", "note": "How saliency is defined here is said by the note."},
    }
    path = folder / "pixels.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return path


@pytest.mark.parametrize("tolerance, how", [(0, "bit for bit"), (0.25, "to within 0.25")])
@pytest.mark.parametrize("budget", [{"keep_ratio": 1.0}, {"keep_ratio": 0.25}, {"visual_token_num": 3}])
@pytest.mark.parametrize("model", ["qwen2_5_vl"], indirect=True)
def test_the_card_says_that_the_picture_decides(
    model: Model, tmp_path: Path, budget: dict, tolerance: float, how: str
) -> None:
    built = build_repo(write_yaml(model, tmp_path, tolerance, **budget), tmp_path / "built", show_progress=False)
    card = (built / "README.md").read_text(encoding="utf-8")
    assert f"blocks of patches leave whose pixels a neighbour foretells {how}; how many depends on the picture" in card
    words = "3 visual tokens" if "visual_token_num" in budget else f"{100 * budget['keep_ratio']:g} % of the visual"
    assert f"reads at most {words}" in card and f"| at most {words}" in card


@pytest.mark.video
@pytest.mark.parametrize("model", ["qwen2_5_vl"], indirect=True)
def test_a_repo_in_which_pixels_alone_decide_is_verified(model: Model, tmp_path: Path) -> None:
    built = build_repo(write_yaml(model, tmp_path, keep_ratio=1.0), tmp_path / "built", show_progress=False)
    report = verify_repo(built, base=model.folder)
    assert {check.status for check in report.checks} == {"pass"}, report.table()


@pytest.mark.core
def test_the_methods_of_a_repo_say_that_the_picture_decides(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml = str(write_yaml(model, tmp_path, keep_ratio=0.5))
    assert cli.main(["methods", "--for", yaml, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    refused = {row["name"]: row["refused"] for row in said["methods"]}
    assert "keeps its budget at most: how many, the picture says" in said["count_by_picture"]
    for name in ("hiprune", "uniform_grid", "evs", "vidcom2", "fastv", "todre"):
        assert refused[name], name
    assert refused["vispruner"] is None and refused["divprune"] is None
    assert cli.main(["methods", "--for", yaml]) == 0
    assert said["count_by_picture"] in capsys.readouterr().out
    assert cli.main(["methods", "--for", model.row.model_type, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["count_by_picture"] is None


def test_no_ceiling_counts_it(model: Model) -> None:
    model.pruned.set_vispruner_config(keep_ratio=0.25)
    with_stage = ceiling(model.pruned.model)
    model.pruned.set_vispruner_config(encoder_stage=None)
    without = ceiling(model.pruned.model)
    assert with_stage == without
    content = {**model.pruned.config.to_dict(), "vispruner_config": {"keep_ratio": 0.25, "encoder_stage": STAGE}}
    assert ceiling_of_config(content) == without
