"""Write the file that `vispruner_config.text_tower` names: what of a CLIP compares questions with patches."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPConfig

from vispruner.clip_text import (
    ABOUT,
    CONFIG_FIELDS,
    TEXT_PREFIXES,
    TOKENIZER,
    VISION_NORM,
    VISUAL_PROJECTION,
    TextTowerError,
    read_text_tower,
)

from .base_checkpoint import resolve_base
from .checkpoint_io import iter_checkpoint_tensors, read_json, replacing, writable_file

TEXT_TOWER = ([".safetensors"], "a text tower")
COMPUTED = ".position_ids"  # a buffer that old checkpoints hold


def write_text_tower(clip: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write the text side of a CLIP checkpoint to `out`; the same checkpoint gives the same bytes.

    clip  the checkpoint that the vision tower of a LLaVA came from: a folder or a Hub id. None of its code is run
    """
    path = writable_file(out, *TEXT_TOWER)
    if path.name.startswith("model"):
        raise TextTowerError(
            f"{path} is a name of weights, which vispruner_config.text_tower refuses: take another name"
        )
    folder = resolve_base(os.fspath(clip))
    config = read_json(folder / "config.json")
    if config.get("model_type") != "clip":
        raise TextTowerError(
            f"{clip} is a {config.get('model_type')} checkpoint: give a whole CLIP, with both towers (model_type clip)"
        )
    tensors = _tensors(folder)
    tensors |= {name: _as_bytes(text) for name, text in ((ABOUT, _about(folder, config)), (TOKENIZER, _words(folder)))}
    with replacing(path) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})
        read_text_tower(unfinished)
    return path


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    wanted = (VISUAL_PROJECTION, VISION_NORM)
    return {
        name: tensor.contiguous()
        for name, tensor in iter_checkpoint_tensors(folder)
        if (name.startswith(TEXT_PREFIXES) or name in wanted) and not name.endswith(COMPUTED)
    }


def _about(folder: Path, config: dict[str, Any]) -> str:
    """Say what shapes do not: of the tower, and which ids its tokenizer puts around a text."""
    text = CLIPConfig.from_dict(config).text_config
    tokenizer = _tokenizer(folder)
    about = {name: getattr(text, name) for name in CONFIG_FIELDS}
    return json.dumps({**about, "begins": tokenizer.bos_token_id, "ends": tokenizer.eos_token_id}, sort_keys=True)


def _words(folder: Path) -> str:
    return _tokenizer(folder).backend_tokenizer.to_str()


def _tokenizer(folder: Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a broken tokenizer file raises
        raise TextTowerError(f"the tokenizer of {folder} does not load: {error}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None or None in (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    ):
        raise TextTowerError(f"the tokenizer of {folder} is not one of CLIP's: it must begin and end a text by tokens")
    return tokenizer


def _as_bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
