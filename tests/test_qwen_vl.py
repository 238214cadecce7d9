"""What only the Qwen-VL family has: (time, height, width) positions, frames, windows, deepstack, grids of any size.

The properties that every architecture has are in test_architectures.py.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matrix import ASK, HELLO, SEVERAL, TOLERANCE, Model, answers, generate, greedy_reference, logits, made
from PIL import Image as Picture
from rows import Image, Video, rows
from rows._qwen_vl import IMAGE, MERGE, PATCH, VIDEO
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import vispruner

ROWS = {row.model_type: row for row in rows() if row.model_type in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")}
every_model = pytest.mark.parametrize("model", ROWS, indirect=True)

ONE = [HELLO, Image((56, 84), seed=1), ASK]
BIG_BESIDE_CLIP = [HELLO, Image((84, 112), seed=2), [18], Video(8, (56, 56), seed=3), ASK]


def image_features(model: Model, inputs: dict[str, Any], which: Any = None) -> Any:
    return (which or model.pruned).model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])


def without(inputs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in names}


def continued(inputs: dict[str, Any], ids: torch.Tensor) -> dict[str, Any]:
    """A later turn: `ids` begin with the prompt of `inputs`."""
    more = ids.shape[1] - inputs["input_ids"].shape[1]
    types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, more))
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}


@every_model
def test_a_count_is_the_budget_of_each_image_and_of_each_frame(model: Model) -> None:
    model.pruned.set_vispruner_config(visual_token_num=3)
    inputs = model.prompt([HELLO, Image((84, 112), seed=2), Image((56, 56), seed=4), Video(8, (56, 84), seed=3)])
    full, kept = model.counts(inputs)
    assert (full[IMAGE], full[VIDEO]) == ([12, 4], [6] * 4)
    assert (kept[IMAGE], kept[VIDEO]) == ([3, 3], [3] * 4)
    videos = model.pruned.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    assert [len(frame) for frame in videos.pooler_output] == kept[VIDEO]
    assert all(frame.max() < 6 for frame in videos.kept_indices)


@every_model
def test_frames_that_all_stay_beside_a_pruned_image_equal_the_reference(model: Model) -> None:
    model.pruned.set_vispruner_config(visual_token_num=5)
    inputs = model.prompt(BIG_BESIDE_CLIP)
    full, kept = model.counts(inputs)
    assert full == {IMAGE: [12], VIDEO: [4] * 4} and kept == {IMAGE: [5], VIDEO: [4] * 4}
    new, first = greedy_reference(model, inputs)
    assert answers(model.pruned, inputs)[0].tolist() == new
    torch.testing.assert_close(logits(model.pruned, inputs)[0, -1], first, **TOLERANCE)


@every_model
def test_positions_are_never_numbered_anew(model: Model) -> None:
    for policy in (None, "original"):
        model.pruned.set_vispruner_config(position_policy=policy)
    with pytest.raises(ValueError, match="position_policy must be null or \"original\", got 'renumber'"):
        model.pruned.set_vispruner_config(position_policy="renumber")
    with pytest.raises(ValueError, match="position_policy"):
        vispruner.load(model.folder, keep_ratio=0.5, position_policy="renumber")


@every_model
@pytest.mark.parametrize("given", [False, True], ids=["numbered here", "given"])
def test_forward_goes_on_from_its_own_cache(model: Model, given: bool) -> None:
    """Stock numbers what follows by the length of the cache and by how far that is from the next position."""
    inputs = model.prompt(ONE)
    expected = generate(model.pruned, inputs, return_dict_in_generate=True, output_logits=True)
    logits(model.pruned, model.prompt(SEVERAL, ONE, ONE))  # what another batch left behind must not matter
    if given:
        inputs["position_ids"], _ = model.stock.model.get_rope_index(**without(inputs, "pixel_values"))
    with torch.no_grad():
        outputs = model.pruned(**inputs)
        for step in expected.logits[1:]:
            new = outputs.logits[:, -1:].argmax(-1)
            outputs = model.pruned(input_ids=new, past_key_values=outputs.past_key_values)
            torch.testing.assert_close(outputs.logits[:, -1], step, **TOLERANCE)


@every_model
def test_generate_keeps_positions_but_not_places(model: Model) -> None:
    """Stock hands its language model four rows: the place among the tokens, then time, height and width."""
    seen = []
    handle = model.pruned.model.language_model.register_forward_pre_hook(
        lambda module, arguments, keywords: seen.append(keywords["position_ids"]), with_kwargs=True
    )
    inputs = model.prompt(ONE)
    generate(model.pruned, inputs, max_new_tokens=2)
    handle.remove()
    stays = image_features(model, inputs).kept_indices[0].tolist()
    place = (inputs["input_ids"][0] == IMAGE).cumsum(0) - 1
    columns = [
        column
        for column, token in enumerate(inputs["input_ids"][0].tolist())
        if token != IMAGE or int(place[column]) in stays
    ]
    positions, _ = model.stock.model.get_rope_index(**without(inputs, "pixel_values"))
    assert seen[0][0, 0].tolist() == list(range(len(columns)))
    assert torch.equal(seen[0][1:], positions[..., columns])
    assert seen[1][..., -1].flatten().tolist() == [len(columns), *[int(positions.max()) + 1] * 3]


@every_model
def test_positions_may_be_given_for_a_batch_of_another_size(model: Model) -> None:
    logits(model.pruned, model.prompt(ONE, SEVERAL, ONE))
    inputs = model.prompt(ONE, SEVERAL)
    positions, _ = model.stock.model.get_rope_index(**without(inputs, "pixel_values"))
    expected = logits(model.pruned, inputs)
    assert torch.equal(logits(model.pruned, {**inputs, "position_ids": positions}), expected)


@every_model
def test_a_later_turn_goes_on_from_the_cache(model: Model) -> None:
    inputs = model.prompt(BIG_BESIDE_CLIP)
    first = generate(model.pruned, inputs, return_dict_in_generate=True)
    later = continued(inputs, torch.cat([first.sequences, torch.tensor([[21, 22, 23]])], dim=1))
    expected = generate(model.pruned, later)
    before = first.past_key_values.get_seq_length()
    assert torch.equal(generate(model.pruned, {**later, "past_key_values": first.past_key_values}), expected)
    assert first.past_key_values.get_seq_length() > before


@every_model
def test_an_image_may_come_behind_cached_text(model: Model) -> None:
    first = generate(model.pruned, model.prompt([HELLO]), return_dict_in_generate=True)
    inputs = model.prompt([first.sequences[0].tolist(), Image((56, 84), seed=1), ASK])
    expected = generate(model.pruned, inputs)
    assert torch.equal(generate(model.pruned, {**inputs, "past_key_values": first.past_key_values}), expected)


@every_model
def test_sampling_several_sequences_draws_the_same_from_both_prompt_forms(model: Model) -> None:
    inputs = model.prompt(ONE, SEVERAL)
    drawn = []
    for form in (inputs, model.row.shortened(inputs, model.counts(inputs)[1])):
        torch.manual_seed(0)
        drawn.append(answers(model.pruned, form, do_sample=True, num_return_sequences=3))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0][0], drawn[0][1])


@every_model
def test_right_padding_gives_the_same(model: Model) -> None:
    inputs = model.prompt(ONE, SEVERAL)
    seen = inputs["attention_mask"].sum(1).tolist()
    right = dict(inputs)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        right[name] = torch.stack([row.roll(count) for row, count in zip(inputs[name], seen, strict=True)])
    found = logits(model.pruned, right)[torch.arange(2), torch.tensor(seen) - 1]
    torch.testing.assert_close(found, logits(model.pruned, inputs)[:, -1], **TOLERANCE)


@every_model
def test_encoded_images_of_which_all_is_kept_equal_stock(model: Model) -> None:
    model.pruned.set_vispruner_config(keep_ratio=1.0)
    inputs = model.prompt(SEVERAL)
    images = model.pruned.encode_images(inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
    rest = {**without(inputs, "pixel_values"), "encoded_images": images}
    assert torch.equal(logits(model.pruned, rest), logits(model.stock, inputs))
    assert torch.equal(generate(model.pruned, rest), generate(model.stock, inputs))


@every_model
@pytest.mark.parametrize("keep_ratio", [0.4, 1.0])
def test_encoded_images_may_stand_beside_a_video_that_is_not(model: Model, keep_ratio: float) -> None:
    model.pruned.set_vispruner_config(keep_ratio=keep_ratio)
    inputs = model.prompt(BIG_BESIDE_CLIP)
    images = model.pruned.encode_images(inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
    rest = {**without(inputs, "pixel_values"), "encoded_images": images}
    assert torch.equal(logits(model.pruned, rest), logits(model.pruned, inputs))
    assert torch.equal(generate(model.pruned, rest), generate(model.pruned, inputs))


@every_model
@pytest.mark.parametrize("name", ["image_grid_thw"])
def test_what_positions_depend_on_must_be_passed_with_encoded_images(model: Model, name: str) -> None:
    inputs = model.prompt(ONE)
    images = model.pruned.encode_images(inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
    for call in (model.pruned, model.pruned.generate):
        with pytest.raises(ValueError, match=f"{name} (is|are) missing"):
            call(**without(inputs, "pixel_values", name), encoded_images=images)


@every_model
def test_pixels_without_a_grid_are_refused(model: Model) -> None:
    inputs = without(model.prompt(ONE), "image_grid_thw")
    for call in (model.pruned, model.pruned.generate):
        with pytest.raises(ValueError, match="image_grid_thw is missing"):
            call(**inputs)
    with pytest.raises(ValueError, match="image_grid_thw or video_grid_thw is missing"):
        model.pruned.get_image_features(inputs["pixel_values"])


@every_model
def test_an_image_keeps_the_same_tokens_whatever_is_encoded_with_it(model: Model) -> None:
    together = image_features(model, model.prompt(SEVERAL))
    for number, part in enumerate(part for part in SEVERAL if isinstance(part, Image)):
        alone = image_features(model, model.prompt([part]))
        assert torch.equal(together.kept_indices[number], alone.kept_indices[0])
        torch.testing.assert_close(together.saliency[number], alone.saliency[0], **TOLERANCE)
        torch.testing.assert_close(together.saliency[number].sum() * MERGE**2, torch.tensor(1.0))


@every_model
def test_the_kept_tokens_are_rows_of_stock_features(model: Model) -> None:
    inputs = model.prompt(SEVERAL)
    pruned, stock = image_features(model, inputs), image_features(model, inputs, model.stock)
    for tokens, kept, whole in zip(pruned.pooler_output, pruned.kept_indices, stock.pooler_output, strict=True):
        assert torch.equal(tokens, whole[kept])


def test_deepstack_features_lose_the_same_tokens(tmp_path: Path) -> None:
    model = made("qwen3_vl", tmp_path)
    inputs = model.prompt(SEVERAL)
    pruned, stock = image_features(model, inputs), image_features(model, inputs, model.stock)
    sizes = [len(image) for image in stock.pooler_output]
    assert len(pruned.deepstack_features) == len(stock.deepstack_features) == 2
    for level, whole in zip(pruned.deepstack_features, stock.deepstack_features, strict=True):
        whole = whole if isinstance(whole, torch.Tensor) else torch.cat(whole)
        for tokens, kept, image in zip(level, pruned.kept_indices, whole.split(sizes), strict=True):
            assert torch.equal(tokens, image[kept])
    images = model.pruned.encode_images(inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
    assert [tuple(image.shape[:2]) for image in images.deepstack] == [(2, count) for count in images.kept_counts]


def test_qwen2_5_ranks_in_the_last_layer_that_sees_the_whole_image(tmp_path: Path) -> None:
    config = ROWS["qwen2_5_vl"].config()
    config.vision_config.fullatt_block_indexes = [0, 1, 7]  # as in a base of which the last layers were taken off
    model = made("qwen2_5_vl", tmp_path, config)
    assert model.pruned.model.feature_layer == 1
    expected = image_features(model, model.prompt(ONE)).saliency[0]
    model.pruned.set_vispruner_config(attention_layer=1)
    assert torch.equal(image_features(model, model.prompt(ONE)).saliency[0], expected)
    model.pruned.set_vispruner_config(attention_layer=0)
    assert not torch.allclose(image_features(model, model.prompt(ONE)).saliency[0], expected)


def test_qwen2_5_does_not_rank_within_windows(tmp_path: Path) -> None:
    model = made("qwen2_5_vl", tmp_path)
    with pytest.raises(ValueError, match=r"attention_layer must be one of \[1\], which attend over the whole image"):
        model.pruned.set_vispruner_config(attention_layer=-1)
    config = ROWS["qwen2_5_vl"].config()
    config.vision_config.fullatt_block_indexes = [7]
    with pytest.raises(ValueError, match="fullatt_block_indexes names no layer"):
        made("qwen2_5_vl", tmp_path / "windows", config)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_both_ways_to_name_the_weights_load_whole(name: str, tmp_path: Path) -> None:
    """Published bases, and what stock and pruned models save, have `visual.*` and `model.layers.*`."""
    model = made(name, tmp_path / "base")
    model.pruned.save_pretrained(tmp_path / "saved")
    older, saved = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "saved"))
    assert set(older) == set(saved) and {key.split(".")[0] for key in older} == {"visual", "model", "lm_head"}
    newer = {re.sub(r"^model\.", "model.language_model.", key): value for key, value in older.items()}
    newer = {re.sub(r"^visual\.", "model.visual.", key): value for key, value in newer.items()}
    assert set(newer) == {key for key, _ in model.pruned.named_parameters()}
    save_file(newer, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    again = vispruner.load(tmp_path / "base", **model.row.options, attn_implementation="eager").eval()
    assert torch.equal(logits(again, model.prompt(ONE)), logits(model.pruned, model.prompt(ONE)))


@pytest.mark.core
@pytest.mark.parametrize("name", ROWS)
def test_tied_embeddings_stay_tied(name: str, tmp_path: Path) -> None:
    config = ROWS[name].config()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model = made(name, tmp_path / "base", config)
    model.pruned.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "saved", trust_remote_code=True, attn_implementation="eager"
    ).eval()
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded, model.prompt(ONE)), logits(model.pruned, model.prompt(ONE)))


@every_model
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(model: Model) -> None:
    inputs = model.prompt(ONE)
    found = []
    for checkpointing in (False, True):
        trained = copy.deepcopy(model.pruned).train()
        if checkpointing:
            trained.gradient_checkpointing_enable()
        loss = trained(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        loss.backward()
        found.append((loss, trained.model.visual.blocks[0].attn.qkv.weight.grad))
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed, **TOLERANCE)


@every_model
@pytest.mark.parametrize("size", [(56, 84), (112, 56), (84, 112)])
def test_tests_write_images_as_the_stock_image_processor_does(model: Model, size: tuple[int, int]) -> None:
    picture = Picture.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2, size={"shortest_edge": 1, "longest_edge": 10**6}
    )
    processed = processor(images=[picture], return_tensors="pt")
    inputs = model.prompt([HELLO, Image(size, seed=1), ASK])
    for name in ("pixel_values", "image_grid_thw"):
        assert inputs[name].shape == processed[name].shape
    assert torch.equal(inputs["image_grid_thw"], processed["image_grid_thw"])
    assert (inputs["input_ids"] == IMAGE).sum() == processed["image_grid_thw"].prod() // processor.merge_size**2
    full, kept = model.pruned.visual_token_counts(
        processed["pixel_values"], image_grid_thw=processed["image_grid_thw"]
    )
    assert full == [int((inputs["input_ids"] == IMAGE).sum())] and kept < full
