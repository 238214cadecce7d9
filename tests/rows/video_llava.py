"""Video-LLaVA: one tower for images and one for frames; the [CLS] of a frame is a token of the prompt, and stays."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration, VideoLlavaModel

from rows import Image, Part, Reference, Video, left_padded, noise, shortened
from rows.llava import LlavaRow
from vispruner.selectors import select_tokens

IMAGE, VIDEO, PAD = 90, 91, 0
SIZE, PATCHES, FRAMES = 56, 16, 8
PIXELS = "pixel_values" if "pixel_values" in inspect.signature(VideoLlavaModel.forward).parameters else (
    "pixel_values_images"
)  # fmt: skip


class VideoLlavaRow:
    model_type = "video_llava"
    stock_class = VideoLlavaForConditionalGeneration
    options = {"visual_token_num": 5}
    modalities = ("image", "video")
    positions = "renumber"

    def config(self) -> VideoLlavaConfig:
        llava = LlavaRow().config()
        llava.vision_config.image_size = SIZE
        return VideoLlavaConfig(
            vision_config=llava.vision_config.to_dict(),
            text_config=llava.text_config.to_dict(),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_seq_length=PATCHES,
            video_seq_length=FRAMES * (1 + PATCHES),
        )

    def inputs(self, prompts: Sequence[Sequence[Part]]) -> dict[str, torch.Tensor]:
        rows, images, videos = [], [], []
        for prompt in prompts:
            rows.append([1])
            for part in prompt:
                if isinstance(part, Image):
                    rows[-1] += [IMAGE] * PATCHES
                    images.append(noise((3, SIZE, SIZE), part.seed))
                elif isinstance(part, Video):
                    rows[-1] += [VIDEO] * (part.frames * (1 + PATCHES))
                    videos.append(noise((part.frames, 3, SIZE, SIZE), part.seed))
                else:
                    rows[-1] += part
        pixels = {PIXELS: images, "pixel_values_videos": videos}
        return left_padded(rows, PAD) | {name: torch.stack(made) for name, made in pixels.items() if made}

    def shortened(self, inputs: Mapping[str, torch.Tensor], kept: Mapping[int, Sequence[int]]) -> dict[str, Any]:
        images, videos = len(inputs.get(PIXELS, ())), len(inputs.get("pixel_values_videos", ()))
        full = {IMAGE: [PATCHES] * images, VIDEO: [1 + PATCHES] * (videos * FRAMES)}
        return shortened(inputs, full, kept, PAD)

    @torch.no_grad()
    def reference(self, stock: Any, inputs: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> Reference:
        found: Reference = {}
        for image in inputs.get(PIXELS, ()):
            tokens, kept = chosen(stock, stock.model.image_tower, image, options["visual_token_num"])
            found.setdefault(IMAGE, []).append((tokens[kept], kept - 1))
        for frame in inputs.get("pixel_values_videos", torch.empty(0, 0)).flatten(0, 1):
            tokens, kept = chosen(stock, stock.model.video_tower, frame, options["visual_token_num"])
            kept = torch.tensor([0, *kept.tolist()])
            found.setdefault(VIDEO, []).append((tokens[kept], kept))
        return found


def chosen(stock: Any, tower: Any, pixels: torch.Tensor, budget: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All projected tokens of a picture, [CLS] first, and which of its patches stay, counted from that [CLS]."""
    outputs = tower(pixels[None], output_hidden_states=True, output_attentions=True)
    states, saliency = outputs.hidden_states[-2], outputs.attentions[-2][:, :, 0, 1:].mean(1)
    kept = select_tokens("vispruner", states[:, 1:], saliency, budget)[0]
    return stock.model.multi_modal_projector(states)[0], 1 + kept


ROW = VideoLlavaRow()
