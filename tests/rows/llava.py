"""LLaVA-1.5: an image is 64 patches behind a [CLS] token, ranked by its attention in the last layer but one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig

from rows import Image, Part, Reference, left_padded, noise, shortened
from rows._tiles import with_attention_maps
from vispruner.selectors import select_tokens

IMAGE, PAD, PATCHES = 90, 0, 64
TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class LlavaRow:
    model_type = "llava"
    stock_class = LlavaForConditionalGeneration
    options = {"visual_token_num": 9}
    modalities = ("image",)
    positions = "renumber"
    registers = 0  # tokens between [CLS] and the patches, for which stock's prompt has placeholders, too

    def vision_config(self) -> Any:
        return CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=112,
            patch_size=14,
            projection_dim=32,
        )

    def text_config(self) -> Any:
        return LlamaConfig(**TEXT, num_key_value_heads=2)

    def config(self) -> LlavaConfig:
        tokens = self.registers + PATCHES
        vision, text = self.vision_config(), self.text_config()
        return LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=tokens)

    def inputs(self, prompts: Sequence[Sequence[Part]]) -> dict[str, torch.Tensor]:
        rows, pixels = [], []
        for prompt in prompts:
            rows.append([1])
            for part in prompt:
                if isinstance(part, Image):
                    rows[-1] += [IMAGE] * (self.registers + PATCHES)
                    pixels.append(noise((3, 112, 112), part.seed))
                else:
                    rows[-1] += part
        return {**left_padded(rows, PAD), **({"pixel_values": torch.stack(pixels)} if pixels else {})}

    def shortened(self, inputs: Mapping[str, torch.Tensor], kept: Mapping[int, Sequence[int]]) -> dict[str, Any]:
        return shortened(inputs, {IMAGE: [self.registers + PATCHES] * len(kept[IMAGE])}, kept, PAD)

    @torch.no_grad()
    def reference(self, stock: Any, inputs: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> Reference:
        tower, items, behind = with_attention_maps(stock.model.vision_tower), [], 1 + self.registers
        for pixels in inputs["pixel_values"]:
            outputs = tower(pixels[None], output_hidden_states=True, output_attentions=True)
            features = outputs.hidden_states[-2][:, behind:]
            saliency = outputs.attentions[-2][:, :, 0, behind:].mean(1)
            kept = select_tokens("vispruner", features, saliency, options["visual_token_num"])[0]
            items.append((stock.model.multi_modal_projector(features)[0, kept], self.registers + kept))
        return {IMAGE: items}


class Mistral:
    """Another language model, with fewer heads for keys than for queries, and SDPA attention in both models."""

    attention = "sdpa"

    def text_config(self) -> Any:
        return MistralConfig(**TEXT, num_key_value_heads=1, sliding_window=None)


class LlavaMistralRow(Mistral, LlavaRow):
    options = {"visual_token_num": 6}


ROW = LlavaRow()
VARIANTS = {"llava-mistral": LlavaMistralRow()}
