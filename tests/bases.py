"""Base checkpoints in every layout that is found on the Hub, and the YAML of a repo that is built from one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from vispruner.conversion.checkpoint_io import write_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_BASE = "llava-hf/tiny"  # of thin repos


def write_yaml(folder: Path, **changes: Any) -> Path:
    content = {
        "repo_id": "someone/pruned",
        "base_model": "llava-hf/llava-1.5-7b-hf",
        "base_revision": "main",
        "architecture": "llava",
        "vispruner_config": {"visual_token_num": 16},
        "card": {"license": "llama2", "language": "en"},
        **changes,
    }
    path = folder / "pruned.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**read_json(path), **changes}), encoding="utf-8")


# The layout that every supported version of transformers reads, from the names of the llava-hf repos.
PUBLISHED = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "vision_tower.vision_model.": "model.vision_tower.vision_model.",
    "lm_head.": "lm_head.",
}


def published_name(legacy: str) -> str:
    old = next(prefix for prefix in PUBLISHED if legacy.startswith(prefix))
    return PUBLISHED[old] + legacy.removeprefix(old)


def copy_without_weights(base: Path, folder: Path) -> Path:
    return Path(shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*")))


def legacy_names(base: Path) -> dict[str, torch.Tensor]:
    """The tensors of a stock tiny checkpoint under the names the llava-hf repos use."""
    tensors = load_file(base / "model.safetensors")
    nested = {re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name): name for name in tensors}
    return {legacy: tensors[name] for legacy, name in nested.items()}


def as_saved(base: Path, folder: Path) -> None:
    shutil.copyfile(base / "model.safetensors", folder / "model.safetensors")


def as_saved_in_shards(base: Path, folder: Path) -> None:
    write_checkpoint(load_file(base / "model.safetensors").items(), folder, max_shard_size=300_000)


def legacy_in_shards(base: Path, folder: Path) -> None:
    write_checkpoint(legacy_names(base).items(), folder, max_shard_size=300_000)


def legacy_with_old_buffers(base: Path, folder: Path) -> None:
    buffers = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(65)[None],
    }
    save_file({**legacy_names(base), **buffers}, folder / "model.safetensors", metadata={"format": "pt"})


def legacy_without_metadata(base: Path, folder: Path) -> None:
    save_file(legacy_names(base), folder / "model.safetensors")


def legacy_bin(base: Path, folder: Path) -> None:
    torch.save(legacy_names(base), folder / "pytorch_model.bin")


def legacy_bin_in_shards(base: Path, folder: Path) -> None:
    tensors = legacy_names(base)
    names = sorted(tensors)
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def published(base: Path, folder: Path) -> None:
    tensors = {published_name(name): tensor for name, tensor in legacy_names(base).items()}
    write_checkpoint(tensors.items(), folder, max_shard_size=300_000)


def in_cache(cache: Path, repo_id: str, source: Path, commit: str = COMMIT, branch: str = "main") -> Path:
    """Put a folder into a Hub cache the way a download leaves it there; return its snapshot."""
    root = cache / f"models--{repo_id.replace('/', '--')}"
    shutil.copytree(source, root / "snapshots" / commit)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / branch).write_text(commit)
    return root / "snapshots" / commit
