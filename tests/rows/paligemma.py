"""PaliGemma: SigLIP without [CLS], a token per patch, prompts that are seen in both directions up to their answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

from rows import Image, Part, Reference, left_padded, noise, shortened
from vispruner.selectors import select_tokens

IMAGE, PAD = 90, 0
SIZE, PATCHES = 56, 16


class PaliGemmaRow:
    model_type = "paligemma"
    stock_class = PaliGemmaForConditionalGeneration
    options = {"visual_token_num": 5}
    modalities = ("image",)
    positions = "renumber"
    type_of_new_tokens = 1

    def config(self) -> PaliGemmaConfig:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
        vision = SiglipVisionConfig(
            **sizes, num_hidden_layers=3, image_size=SIZE, patch_size=14, projection_dim=32, vision_use_head=False
        )
        text = GemmaConfig(
            **sizes,
            vocab_size=100,
            head_dim=16,
            num_hidden_layers=2,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            pad_token_id=PAD,
            bos_token_id=1,
            eos_token_id=2,
        )
        return PaliGemmaConfig(
            vision_config=vision.to_dict(),
            text_config=text.to_dict(),
            image_token_index=IMAGE,
            projection_dim=32,
            tie_word_embeddings=False,
        )

    def inputs(self, prompts: Sequence[Sequence[Part]]) -> dict[str, torch.Tensor]:
        rows, pixels = [], []
        for prompt in prompts:
            rows.append([1])
            for part in prompt:
                if isinstance(part, Image):
                    rows[-1] += [IMAGE] * PATCHES
                    pixels.append(noise((3, SIZE, SIZE), part.seed))
                else:
                    rows[-1] += part
        inputs = left_padded(rows, PAD)
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        return inputs | ({"pixel_values": torch.stack(pixels)} if pixels else {})

    def shortened(self, inputs: Mapping[str, torch.Tensor], kept: Mapping[int, Sequence[int]]) -> dict[str, Any]:
        short = shortened(inputs, {IMAGE: [PATCHES] * len(kept[IMAGE])}, kept, PAD)
        return {**short, "token_type_ids": torch.zeros_like(short["input_ids"])}

    @torch.no_grad()
    def reference(self, stock: Any, inputs: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> Reference:
        items = []
        for pixels in inputs["pixel_values"]:
            outputs = stock.model.vision_tower(pixels[None], output_attentions=True)
            features, saliency = outputs.last_hidden_state, outputs.attentions[-1].mean(dim=(1, 2))
            kept = select_tokens("vispruner", features, saliency, options["visual_token_num"])[0]
            items.append((stock.model.multi_modal_projector(features)[0, kept], kept))
        return {IMAGE: items}


ROW = PaliGemmaRow()
