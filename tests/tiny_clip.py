"""Write a tiny CLIP checkpoint whose vision tower is that of a tiny LLaVA, as CLIP's is that of LLaVA-1.5."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_llava import _tokenizer
from transformers import AutoModelForImageTextToText, CLIPConfig, CLIPModel

POSITIONS = 16  # so that a question of more than 14 tokens has several parts


def write_tiny_clip(folder: Path, llava: Path, seed: int = 0) -> Path:
    """Write a whole CLIP, both towers and the tokenizer, into a new folder."""
    tower = AutoModelForImageTextToText.from_pretrained(llava).model.vision_tower
    tokenizer = _tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(text_config=text, vision_config=tower.config.to_dict(), projection_dim=24)
    model = CLIPModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
        # By their order, since names differ between versions.
        for own, given in zip(model.vision_model.parameters(), tower.parameters(), strict=True):
            own.copy_(given)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
