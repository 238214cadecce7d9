"""Video-LLaVA beyond the property matrix: two towers, frames with [CLS], and the two names that images go by."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from counting import cached_tokens
from matrix import ASK, CLIP, HELLO, MIXED, ONE, Model, answers, logits, pair
from rows import Video, noise
from rows.video_llava import IMAGE, PATCHES, PIXELS, ROW, SIZE, VIDEO
from transformers import VideoLlavaImageProcessor, VideoLlavaProcessor

import vispruner
from vispruner.conversion.repo_config import load_repo_config

NAMES = ("pixel_values", "pixel_values_images")
MODEL = "video_llava"


def test_frames_are_ranked_by_the_video_tower_and_images_by_the_image_tower(model: Model) -> None:
    pictures, base = noise((2, 3, SIZE, SIZE), 1), model.pruned.model
    images, frames = base.get_image_features(pictures), base.get_video_features(pictures[None])
    for tower, found in (("image_tower", images), ("video_tower", frames)):
        attention = getattr(model.stock.model, tower)(pictures, output_attentions=True).attentions[-2]
        torch.testing.assert_close(found.saliency, attention[:, :, 0, 1:].mean(1))
    assert not torch.allclose(images.saliency, frames.saliency)


def test_a_frame_keeps_its_cls_on_top_of_the_budget(model: Model) -> None:
    frames = model.pruned.model.get_video_features(noise((2, 3, 3, SIZE, SIZE), 1))
    assert frames.pooler_output.shape[:2] == (6, 1 + 5)
    assert frames.full_counts == [1 + PATCHES] * 6
    for kept, places in zip(frames.kept_indices, frames.placeholders, strict=True):
        assert kept[0] == -1 and (kept[1:] >= 0).all()
        assert torch.equal(places, kept + 1)


@pytest.mark.parametrize("frames", [1, 5])
def test_videos_need_not_have_8_frames(model: Model, frames: int) -> None:
    inputs = model.prompt([HELLO, Video(frames, (SIZE, SIZE), seed=1), ASK])
    assert model.counts(inputs)[1][VIDEO] == [6] * frames
    assert cached_tokens(model.pruned, inputs) == inputs["input_ids"].shape[1] - frames * (PATCHES - 5)


@pytest.mark.parametrize("name", NAMES)
def test_images_go_by_either_name(model: Model, name: str) -> None:
    inputs = model.prompt(ONE, MIXED)
    renamed = {name if key == PIXELS else key: value for key, value in inputs.items()}
    assert torch.equal(logits(model.pruned, renamed), logits(model.pruned, inputs))
    assert torch.equal(answers(model.pruned, renamed), answers(model.pruned, inputs))
    features = model.pruned.model.get_image_features(**{name: inputs[PIXELS]})
    assert torch.equal(features.pooler_output, model.pruned.model.get_image_features(inputs[PIXELS]).pooler_output)


def test_images_by_both_names_are_refused(model: Model) -> None:
    inputs = model.prompt(ONE)
    pixels = inputs.pop(PIXELS)
    for call in (model.pruned, model.pruned.generate):
        with pytest.raises(ValueError, match="two names of the same thing: pass one"):
            call(**inputs, **dict.fromkeys(NAMES, pixels))


def test_full_prompts_are_those_of_the_stock_processor(model: Model) -> None:
    processor = SimpleNamespace(
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        image_token="i",
        video_token="v",
    )
    sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    picture = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    images = VideoLlavaImageProcessor(**sizes)(images=[picture], return_tensors="pt")
    videos = {"pixel_values_videos": noise((1, 8, 3, SIZE, SIZE), 1)}
    written = VideoLlavaProcessor.replace_image_token(processor, images, 0)
    filmed = VideoLlavaProcessor.replace_video_token(processor, videos, 0)
    full, _ = model.pruned.model.count_visual_tokens({PIXELS: next(iter(images.values())), **videos})
    assert full == {IMAGE: [len(written)], VIDEO: [len(filmed) // 8] * 8}
    ids = torch.tensor([[1, *HELLO, *[IMAGE] * len(written), *[VIDEO] * len(filmed), *ASK]])
    prompt = {"input_ids": ids, **images, **videos}
    assert cached_tokens(model.pruned, prompt) == ids.shape[1] - 9 * (PATCHES - 5)


def test_both_towers_end_at_the_layer_that_is_used(model: Model) -> None:
    slim = vispruner.load(model.folder, drop_unused_vision_layers=True, **ROW.options, attn_implementation="eager")
    assert [len(slim.model.image_tower.encoder.layers), len(slim.model.video_tower.encoder.layers)] == [2, 2]
    for prompt in (ONE, CLIP):
        assert torch.equal(logits(slim.eval(), model.prompt(prompt)), logits(model.pruned, model.prompt(prompt)))


def test_the_papers_budgets_are_the_nearest_counts_per_frame() -> None:
    repo = load_repo_config("video-llava-7b-vispruner")
    per_frame = [repo.vispruner_config, *repo.budgets.values()]
    assert [budget["visual_token_num"] for budget in per_frame] == [round(total / 8) for total in (455, 227, 114)]


def test_a_dense_model_that_keeps_cls_of_images_says_so() -> None:
    _, dense = pair(ROW, {"vision_feature_select_strategy": "full"}, method="none")
    pictures = noise((2, 3, SIZE, SIZE), 1)
    assert dense.visual_token_counts(pictures) == ([1 + PATCHES] * 2, [1 + PATCHES] * 2)
    features = dense.model.get_image_features(pictures)
    assert features.pooler_output.shape[1] == 1 + PATCHES
    assert [kept.tolist() for kept in features.kept_indices] == [list(range(-1, PATCHES))] * 2
