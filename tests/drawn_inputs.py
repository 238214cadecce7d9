"""Inputs that selectors are tried on: exact ones, where ties are frequent, and drawn ones, where nothing ties."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from oracle import vispruner_oracle
from safetensors.torch import safe_open

from vispruner.selectors import select_tokens

RECORDED = Path(__file__).parent / "data" / "selection.safetensors"
with safe_open(RECORDED, "pt") as recorded:
    RECORDED_CASES = {name: json.loads(case) for name, case in sorted(recorded.metadata().items())}
SIZES = [1, 2, 3, 4, 5, 8, 9, 16, 25, 33, 36, 49]
FEW_SIZES = [1, 2, 3, 4, 6, 9, 12, 16, 25]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def exact_images(batch, tokens, channels=16, seed=0, levels=4, dtype=torch.float32):
    """Features whose cosines are exact in every dtype, on every device: entries +-1, some rows scaled by 2 or zeroed.

    Saliency has only a few levels, and 16 channels allow only 17 cosines, so nearly every decision is a tie.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (batch, tokens, channels), generator=generator) * 2 - 1
    scale = torch.tensor([0, 1, 1, 1, 2])[torch.randint(0, 5, (batch, tokens, 1), generator=generator)]
    saliency = torch.randint(0, levels, (batch, tokens), generator=generator)
    return (signs * scale).to(dtype), saliency.to(dtype)


def random_images(batch, tokens, channels=24, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, tokens, channels, generator=generator, dtype=torch.float64)
    return features.to(dtype), torch.rand(batch, tokens, generator=generator, dtype=torch.float64).to(dtype)


def oracle(features, saliency, *args, **options):
    rows = [
        vispruner_oracle(f, s, *args, **options) for f, s in zip(features.tolist(), saliency.tolist(), strict=True)
    ]
    return torch.tensor(rows)


def exact_inputs(batch, tokens, channels=16, seed=0, dtype=torch.float32):
    """All that any selector needs, such that cosines and sums are exact in every dtype and ties are frequent."""
    generator = torch.Generator().manual_seed(seed)

    def signs(*shape):
        return torch.randint(0, 2, (*shape, channels), generator=generator) * 2 - 1

    def levels(*shape):
        return torch.randint(0, 4, shape, generator=generator).to(dtype)

    scale = torch.tensor([0, 1, 1, 1, 2])[torch.randint(0, 5, (batch, tokens, 1), generator=generator)]
    rows = next(rows for rows in range(int(tokens**0.5), 0, -1) if tokens % rows == 0)
    return {
        "features": (signs(batch, tokens) * scale).to(dtype),
        "saliency": levels(batch, tokens),
        "projected": (signs(batch, tokens) * scale).to(dtype),
        "layer_saliency": levels(batch, 2, tokens),
        "grid": (rows, tokens // rows),
        "codebook": signs(3).to(dtype),
    }


def generic_inputs(batch, tokens, channels=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    return exact_inputs(batch, tokens, channels, seed, torch.float64) | {
        "features": torch.randn(batch, tokens, channels, **draw) + torch.randn(batch, 1, channels, **draw),
        "saliency": torch.rand(batch, tokens, **draw),
        "projected": torch.randn(batch, tokens, channels, **draw) + torch.randn(batch, 1, channels, **draw),
        "layer_saliency": torch.rand(batch, 2, tokens, **draw),
        "codebook": torch.randn(3, channels, **draw),
    }


def image(inputs, number):
    """The inputs of one image of a batch, as a batch of one."""
    alone = {"grid", "codebook"}
    return {name: value if name in alone else value[number : number + 1] for name, value in inputs.items()}


def select(method, inputs, budget, **options):
    return select_tokens(method, visual_token_num=budget, **inputs, **options)
