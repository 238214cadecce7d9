"""Recorded results of authors' code: methods in the language model, and those that fold tokens together."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

FILE = Path(__file__).parent / "data" / "decoder_selectors.safetensors"
with safe_open(FILE, "pt") as recorded:
    CASES = {name: json.loads(text) for name, text in recorded.metadata().items()}


def cases(method: str) -> Any:
    return pytest.mark.parametrize("name", sorted(name for name in CASES if name.split(".")[0] == method))


def tensors(name: str) -> dict[str, torch.Tensor]:
    with safe_open(FILE, "pt") as file:
        return {key[len(name) + 1 :]: file.get_tensor(key) for key in file.keys() if key.startswith(f"{name}.")}  # noqa: SIM118
