"""What the rows of the Qwen-VL family share: prompts with (t, h, w) grids, and received attention by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rows import Part, Reference, Video, left_padded, noise, shortened
from vispruner.selectors import select_tokens

PATCH, MERGE, PAD = 14, 2, 0
VISION_START, VISION_END, IMAGE, VIDEO = 90, 91, 92, 93
TIMESTAMP = [60, 61, 62]
TOKEN_IDS = {
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
}
TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
}


class QwenVLRow:
    options = {"keep_ratio": 0.4}
    modalities = ("image", "video")
    positions = "original"
    channels = 3 * 2 * PATCH * PATCH
    has_seconds = False
    has_timestamps = False

    def inputs(self, prompts: Sequence[Sequence[Part]]) -> dict[str, torch.Tensor]:
        rows = []
        pixels: dict[int, list] = {IMAGE: [], VIDEO: []}
        grids: dict[int, list] = {IMAGE: [], VIDEO: []}
        for prompt in prompts:
            rows.append([])
            for part in prompt:
                if isinstance(part, list):
                    rows[-1] += part
                    continue
                token = VIDEO if isinstance(part, Video) else IMAGE
                t = part.frames // 2 if isinstance(part, Video) else 1
                h, w = (side // PATCH for side in part.size)
                rows[-1] += self.written(token, t, h * w // MERGE**2)
                pixels[token].append(noise((t * h * w, self.channels), part.seed))
                grids[token].append((t, h, w))
        inputs = left_padded(rows, PAD)
        ids = inputs["input_ids"]
        inputs["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
        for token, suffix, name in ((IMAGE, "", "image"), (VIDEO, "_videos", "video")):
            if pixels[token]:
                inputs[f"pixel_values{suffix}"] = torch.cat(pixels[token])
                inputs[f"{name}_grid_thw"] = torch.tensor(grids[token])
        if self.has_seconds and pixels[VIDEO]:
            inputs["second_per_grid_ts"] = torch.full((len(pixels[VIDEO]),), 2.0)  # apart from the default, 1
        return inputs

    def written(self, token: int, frames: int, tokens: int) -> list[int]:
        """An image or a video as the processor writes it into a prompt."""
        if token == VIDEO and self.has_timestamps:
            each = [*TIMESTAMP, VISION_START, *[VIDEO] * tokens, VISION_END]
            return [VISION_START, *each * frames, VISION_END]
        return [VISION_START] + [token] * (frames * tokens) + [VISION_END]

    def shortened(self, inputs: Mapping[str, torch.Tensor], kept: Mapping[int, Sequence[int]]) -> dict[str, Any]:
        full = {
            token: [h * w // MERGE**2 for t, h, w in inputs[name].tolist() for _ in range(t)] if name in inputs else []
            for token, name in ((IMAGE, "image_grid_thw"), (VIDEO, "video_grid_thw"))
        }
        return shortened(inputs, full, kept, PAD)

    @torch.no_grad()
    def reference(self, stock: Any, inputs: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> Reference:
        found: Reference = {}
        for token, suffix, name in ((IMAGE, "", "image"), (VIDEO, "_videos", "video")):
            found[token] = []
            if f"{name}_grid_thw" in inputs:
                grids = inputs[f"{name}_grid_thw"]
                frames = self.frames(stock.model.visual, inputs[f"pixel_values{suffix}"], grids)
                for features, saliency in frames:
                    count, ratio = options["visual_token_num"], options["keep_ratio"]
                    budget = max(1, int(len(features) * ratio + 0.5)) if count is None else min(count, len(features))
                    kept = select_tokens("vispruner", features[None], saliency[None], budget)[0]
                    found[token].append((features[kept], kept))
        return found

    def frames(
        self, visual: Any, pixels: torch.Tensor, grids: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per frame the merged features and their saliency, in raster order."""
        seen: dict[str, Any] = {}
        attention = visual.blocks[self.layer(visual)].attn
        hook = attention.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(kwargs, x=args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        merged = visual(pixels, grid_thw=grids).pooler_output
        hook.remove()
        q, k, _ = attention.qkv(seen["x"]).view(len(seen["x"]), 3, attention.num_heads, -1).unbind(1)
        cos, sin = seen["position_embeddings"]
        q, k = (rotated(x, cos, sin).transpose(0, 1) for x in (q, k))  # (heads, patches, d)
        frames, start = [], 0
        for t, h, w in grids.tolist():
            for _ in range(t):
                here = slice(start, start + h * w)
                scores = q[:, here] @ k[:, here].transpose(1, 2) * q.shape[-1] ** -0.5
                received = scores.softmax(-1).mean(dim=(0, 1)).view(-1, MERGE**2).mean(1)
                saliency = torch.empty_like(received)
                saliency[torch.tensor(self.order(visual, h // MERGE, w // MERGE))] = received
                frames.append((merged[start // MERGE**2 : (start + h * w) // MERGE**2], saliency))
                start += h * w
        return frames

    def layer(self, visual: Any) -> int:
        return len(visual.blocks) - 1

    def order(self, visual: Any, rows: int, columns: int) -> list[int]:
        """The raster number of each merged token of a frame, in the order in which the encoder has them."""
        return list(range(rows * columns))


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def windows_first(rows: int, columns: int, side: int) -> list[int]:
    """Raster numbers window by window."""
    return [
        y * columns + x
        for top in range(0, rows, side)
        for left in range(0, columns, side)
        for y in range(top, min(top + side, rows))
        for x in range(left, min(left + side, columns))
    ]
