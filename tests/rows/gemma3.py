"""Gemma 3: SigLIP without [CLS], 2 x 2 patches averaged to a token, and images that are seen in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

from rows import Image, Part, Reference, left_padded, noise, shortened
from vispruner.selectors import select_tokens

IMAGE, BEGIN, END, PAD = 90, 91, 92, 0
SIZE, SIDE, POOLED = 112, 8, 4  # pixels, patches and tokens along an image


class Gemma3Row:
    model_type = "gemma3"
    stock_class = Gemma3ForConditionalGeneration
    options = {"visual_token_num": 5}
    modalities = ("image",)
    positions = "renumber"

    def config(self) -> Gemma3Config:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
        vision = SiglipVisionConfig(
            **sizes, num_hidden_layers=3, image_size=SIZE, patch_size=SIZE // SIDE, vision_use_head=False
        )
        text = Gemma3TextConfig(
            **sizes,
            vocab_size=100,
            head_dim=16,
            num_hidden_layers=2,
            num_key_value_heads=2,
            query_pre_attn_scalar=16,
            layer_types=["sliding_attention", "full_attention"],
            pad_token_id=PAD,
            bos_token_id=1,
            eos_token_id=2,
        )
        return Gemma3Config(
            vision_config=vision.to_dict(),
            text_config=text.to_dict(),
            mm_tokens_per_image=POOLED**2,
            image_token_index=IMAGE,
            boi_token_index=BEGIN,
            eoi_token_index=END,
            tie_word_embeddings=False,
        )

    def inputs(self, prompts: Sequence[Sequence[Part]]) -> dict[str, torch.Tensor]:
        rows, pixels = [], []
        for prompt in prompts:
            rows.append([1])
            for part in prompt:
                if isinstance(part, Image):
                    rows[-1] += [10, BEGIN, *[IMAGE] * POOLED**2, END, 10]
                    pixels.append(noise((3, SIZE, SIZE), part.seed))
                else:
                    rows[-1] += part
        inputs = left_padded(rows, PAD)
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
        return inputs | ({"pixel_values": torch.stack(pixels)} if pixels else {})

    def shortened(self, inputs: Mapping[str, torch.Tensor], kept: Mapping[int, Sequence[int]]) -> dict[str, Any]:
        short = shortened(inputs, {IMAGE: [POOLED**2] * len(kept[IMAGE])}, kept, PAD)
        return {**short, "token_type_ids": (short["input_ids"] == IMAGE).long()}

    @torch.no_grad()
    def reference(self, stock: Any, inputs: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> Reference:
        items = []
        for pixels in inputs["pixel_values"]:
            outputs = stock.model.vision_tower(pixels[None], output_attentions=True)
            saliency = averaged(outputs.attentions[-1].mean(dim=(1, 2))[0, :, None])[:, 0]
            features = averaged(outputs.last_hidden_state[0])
            kept = select_tokens("vispruner", features[None], saliency[None], options["visual_token_num"])[0]
            projected = stock.model.multi_modal_projector(outputs.last_hidden_state)
            items.append((projected[0, kept], kept))
        return {IMAGE: items}


def averaged(patches: torch.Tensor) -> torch.Tensor:
    """The mean of the 2 x 2 patches that each token is made of: (N, C) -> (N / 4, C)."""
    grid, step = patches.unflatten(0, (SIDE, SIDE)), SIDE // POOLED
    return torch.stack([
        grid[step * row : step * (row + 1), step * column : step * (column + 1)].mean(dim=(0, 1))
        for row in range(POOLED)
        for column in range(POOLED)
    ])  # fmt: skip


ROW = Gemma3Row()
