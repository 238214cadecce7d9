"""Build one published repo: a YAML and a base checkpoint become config, code, processor, card and renamed weights.

Nothing is re-saved through transformers: the base's own files are copied byte for byte, config.json gains four fields,
and weight files change only in the names they carry.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from tqdm import tqdm
from transformers import AutoProcessor

from vispruner import ARCHITECTURES, auto_map, code_files

from .checkpoint_io import (
    atomic_directory,
    checkpoint_shards,
    has_weights,
    iter_checkpoint_tensors,
    read_json,
    read_tensor_headers,
    write_checkpoint,
)
from .published_layout import ModelTensors, layout_problems, model_tensors, published_names
from .repo_config import EMBEDDED_PREFIX, RepoConfig, load_repo_config

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = ("tiny-llava",)

# What a processor and a tokenizer are made of; whatever of it the base has is copied byte for byte.
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "image_processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
CONFIG_FILES = ("config.json", "generation_config.json", *PROCESSOR_FILES)
COPY_BLOCK = 16 * 2**20


class BuildError(ValueError):
    """A base that cannot become a published repo."""


def build_repo(
    config: str | os.PathLike[str] | RepoConfig,
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Path:
    """Build the repo that one YAML describes into the folder `out`, which appears only when it is complete.

    config     a YAML path, the stem of a file in `hub_configs/`, or a loaded RepoConfig
    base       where to read the base from instead of the YAML's `base_model`: a folder or a Hub id
    overwrite  replace a non-empty `out`
    Raises BuildError, RepoConfigError, LayoutError or CheckpointError; `out` is then as it was before.
    """
    repo = config if isinstance(config, RepoConfig) else load_repo_config(config)
    destination = Path(out).expanduser()
    with atomic_directory(destination, overwrite=overwrite) as staging:
        # --base only says where the bytes are; the YAML's revision is one of the YAML's base.
        folder = resolve_base(repo.base_model, repo.base_revision) if base is None else resolve_base(os.fspath(base))
        _refuse_overlap(folder, destination)
        base_config = _read_base_config(folder, repo.architecture)
        processor = _load_processor(folder, base_config)
        revision = (_snapshot_commit(folder) if base is None else None) or repo.base_revision
        config_json = _repo_config_json(base_config, repo, revision)
        names, expected = _check_weights(folder, repo, config_json)
        _write_json(staging / "config.json", config_json)
        _write_json(staging / "generation_config.json", _generation_config(folder, base_config, processor.tokenizer))
        (staging / "README.md").write_text(model_card(repo, revision), encoding="utf-8")
        processor_files = [folder / name for name in PROCESSOR_FILES if (folder / name).is_file()]
        for source in (*code_files(repo.architecture), *processor_files):
            shutil.copyfile(source, staging / source.name)
        write_published_weights(folder, staging, names, show_progress=show_progress)
        written = {name: header.shape for name, header in read_tensor_headers(staging).items()}
        if problems := layout_problems(expected, written):
            raise BuildError(f"the weights just written are not the model's: {'; '.join(problems)}")
    return destination


def resolve_base(name: str, revision: str | None = None) -> Path:
    """Return the folder of a base: a local one, the embedded one (`embedded/tiny-llava`), or a Hub snapshot."""
    if name.startswith(EMBEDDED_PREFIX):
        embedded = name.removeprefix(EMBEDDED_PREFIX)
        if embedded not in EMBEDDED:
            raise BuildError(f"{name} is not embedded in this package; {EMBEDDED_PREFIX}{EMBEDDED[0]} is")
        return ASSETS / embedded
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise BuildError(f"base {name} is a file: give the folder of the checkpoint")
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise BuildError(f"base {name} does not exist: give a checkpoint folder or a Hub id (owner/name)")
    return _hub_snapshot(name, revision)


def _hub_snapshot(repo_id: str, revision: str | None) -> Path:
    at = f" at revision {revision}" if revision else ""
    try:
        patterns = [*CONFIG_FILES, "*.safetensors", "*.safetensors.index.json"]
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
        if not has_weights(folder):
            patterns = [*CONFIG_FILES, "pytorch_model*.bin", "pytorch_model*.bin.index.json"]
            folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise BuildError(f"base {repo_id} is neither a folder nor a valid Hub id: {error}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise BuildError(
            f"base {repo_id}{at} is not a folder here, is not in the local Hub cache, and the Hub cannot be reached: "
            "give a checkpoint folder as the base"
        ) from error
    except HfHubHTTPError as error:
        raise BuildError(f"base {repo_id}{at} cannot be downloaded: {error}") from error
    return folder


def _snapshot_commit(folder: Path) -> str | None:
    """Return the commit of a Hub snapshot, which a branch name resolved to."""
    is_snapshot = folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
    return folder.name if is_snapshot else None


def _refuse_overlap(base: Path, out: Path) -> None:
    base, out = base.resolve(), out.resolve()
    if base == out or out in base.parents or base in out.parents:
        raise BuildError(f"--out {out} and the base {base} lie in one another: build into another folder")


def _read_base_config(folder: Path, architecture: str) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    model_type = config.get("model_type")
    if model_type != architecture:
        hint = f"set architecture: {model_type} in the YAML" if model_type in ARCHITECTURES else "give another base"
        raise BuildError(
            f"the base {folder} has model_type {model_type!r}, the YAML's architecture is {architecture!r}: {hint}"
        )
    vision = config.get("vision_config")
    tower = vision.get("model_type") if isinstance(vision, dict) else None
    if tower != "clip_vision_model":
        raise BuildError(
            f"the base {folder} has a vision tower of type {tower!r}: pruning reads the attention of the [CLS] token, "
            "so vision_config.model_type must be 'clip_vision_model'"
        )
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy != "default":
        raise BuildError(
            f"the base {folder} has vision_feature_select_strategy {strategy!r}: [CLS] is then itself a visual token; "
            "only 'default' can be pruned"
        )
    return config


def _load_processor(folder: Path, base_config: Mapping[str, Any]) -> Any:
    """Load the base's processor; refuse one that is missing, broken or that writes another image token."""
    for what, files in (("image processor", IMAGE_PROCESSOR_FILES), ("tokenizer", TOKENIZER_FILES)):
        if not any((folder / name).is_file() for name in files):
            raise BuildError(
                f"the base {folder} has no {what} (none of {', '.join(files)}): add the files of the original repo"
            )
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a broken processor file raises, its name belongs in the message
        raise BuildError(f"the processor of the base {folder} does not load: {error}") from error
    for part in ("image_processor", "tokenizer"):
        if getattr(processor, part, None) is None:
            raise BuildError(
                f"the processor of the base {folder} has no {part}: it cannot read an image with its text"
            )
    if getattr(processor, "patch_size", None) is None:
        raise BuildError(
            f"processor_config.json of the base {folder} has no patch_size: the processor cannot count visual tokens; "
            "take a newer revision of the base"
        )
    image_token_id = base_config.get("image_token_index", base_config.get("image_token_id"))
    if image_token_id is not None and processor.image_token_id != image_token_id:
        raise BuildError(
            f"the base {folder}: the processor's image token is {processor.image_token_id}, config.json's is "
            f"{image_token_id}: processor and model do not belong together"
        )
    return processor


def _check_weights(
    folder: Path, repo: RepoConfig, config_json: Mapping[str, Any]
) -> tuple[dict[str, str], ModelTensors]:
    """Return base name -> published name and what the model needs, once both fit each other."""
    headers = read_tensor_headers(folder)
    names = published_names(headers)
    try:
        expected = model_tensors(repo.architecture, config_json)
    except ValueError as error:
        raise BuildError(f"{repo.path} with the config.json of {folder} describes no model: {error}") from error
    found = {published: headers[name].shape for name, published in names.items()}
    if problems := layout_problems(expected, found):
        raise BuildError(f"the weights of {folder} are not those of its config.json: {'; '.join(problems)}")
    return names, expected


def _repo_config_json(base_config: Mapping[str, Any], repo: RepoConfig, revision: str | None) -> dict[str, Any]:
    bookkeeping = {"base_model_name_or_path": repo.base_model, "base_model_revision": revision}
    return {
        **base_config,
        "architectures": [ARCHITECTURES[repo.architecture].model_class.__name__],
        "auto_map": auto_map(repo.architecture),
        "vispruner_config": {**repo.vispruner_config, **bookkeeping},
    }


def _generation_config(folder: Path, base_config: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return the base's generation config with a pad token, without which batched generation only guesses one."""
    path = folder / "generation_config.json"
    text = base_config.get("text_config") or {}
    stored = {name: base_config.get(name, text.get(name)) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if path.is_file():
        found = read_json(path)
    else:
        found = {name: stored[name] for name in ("bos_token_id", "eos_token_id") if stored[name] is not None}
    for pad in (found.get("pad_token_id"), tokenizer.pad_token_id, stored["pad_token_id"]):
        if pad is not None:
            return {**found, "pad_token_id": pad}
    end = found.get("eos_token_id", tokenizer.eos_token_id)
    pad = end[0] if isinstance(end, list) else end
    if pad is None:
        raise BuildError(
            f"the base {folder} has neither a pad nor an end token: set pad_token in tokenizer_config.json"
        )
    tqdm.write(f"{folder} names no pad token; generation_config.json gets the end token {pad} as pad_token_id")
    return {**found, "pad_token_id": pad}


def model_card(repo: RepoConfig, revision: str | None) -> str:
    """Return the README.md of a repo: front matter, how to load it, and how to see that it prunes."""
    name = ARCHITECTURES[repo.architecture].model_class.__name__
    options = repo.vispruner_config
    embedded = repo.base_model.startswith(EMBEDDED_PREFIX)
    # Only a Hub id may stand in the front matter: the Hub refuses anything else there.
    on_hub = not embedded and not Path(repo.base_model).expanduser().is_dir()
    front = {
        **{key: value for key, value in repo.card.items() if key != "tags"},
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        **({"base_model": repo.base_model} if on_hub else {}),
        "tags": ["vispruner", "visual-token-pruning", *_as_list(repo.card.get("tags"))],
    }
    if options["method"] == "none":
        budget = "all visual tokens (pruning is switched off)"
    elif options["visual_token_num"] is not None:
        budget = f"{options['visual_token_num']} visual tokens per image or tile"
    else:
        budget = f"{options['keep_ratio']:.1%} of the visual tokens"
    base = f"`{repo.base_model}`" + (f" at `{revision}`" if revision else "")
    return CARD.format(
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        title=repo.repo_id.split("/")[-1],
        repo_id=repo.repo_id,
        base=base,
        budget=budget,
        class_name=name,
    )


CARD = """---
{front}---

# {title}

{base} with VisPruner visual token pruning (arXiv 2412.01818): the same weights, but the language model reads {budget}.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{repo_id}")
model = AutoModelForImageTextToText.from_pretrained("{repo_id}", trust_remote_code=True)
```

Is pruning on? This line raises if it is not:

```python
assert type(model).__name__ == "{class_name}" and model.config.vispruner_config["method"] != "none"
```

Without `trust_remote_code=True` transformers loads the stock model from the same files: it answers, but keeps every
visual token and says nothing about it.

`model.set_vispruner_config(visual_token_num=64)` changes the budget from the next call on.
"""


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def write_published_weights(folder: Path, out: Path, names: Mapping[str, str], show_progress: bool = True) -> None:
    """Write the tensors that `names` lists under their published names, as safetensors.

    A safetensors shard keeps its file name and its bytes; only its header changes, so memory stays at one block. Where
    no name in it changes the whole file is copied. .bin shards are read with `weights_only=True` and written anew.
    """
    shards = checkpoint_shards(folder)
    if any(path.suffix == ".bin" for path in shards):
        tensors = ((names[name], value) for name, value in iter_checkpoint_tensors(folder) if name in names)
        write_checkpoint(_counted(tensors, len(names), show_progress), out)
        return
    total = sum(path.stat().st_size for path in shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=not show_progress) as progress:
        weight_map, size = {}, 0
        for path in shards:
            written = rename_safetensors(path, out / path.name, names, progress)
            weight_map.update(dict.fromkeys(written, path.name))
            size += sum(written.values())
    if len(shards) > 1 or next(iter(shards)).name != "model.safetensors":
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(out / "model.safetensors.index.json", index)


def _counted(
    tensors: Iterator[tuple[str, torch.Tensor]], count: int, show_progress: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    yield from tqdm(tensors, total=count, unit="tensor", desc="weights", disable=not show_progress)


def rename_safetensors(source: Path, target: Path, names: Mapping[str, str], progress: tqdm) -> dict[str, int]:
    """Copy a safetensors file under new tensor names, leaving out the tensors `names` lacks; return bytes per name."""
    with source.open("rb") as reader:
        length = int.from_bytes(reader.read(8), "little")
        header = json.loads(reader.read(length))
        metadata = header.pop("__metadata__", None)
        kept = sorted((entry["data_offsets"][0], name) for name, entry in header.items() if name in names)
        if all(names.get(name) == name for name in header) and metadata == {"format": "pt"}:
            reader.seek(0)
            with target.open("wb") as writer:
                _copy_bytes(reader, writer, source.stat().st_size, progress)
            return {name: end - start for name, (start, end) in ((n, e["data_offsets"]) for n, e in header.items())}
        renamed: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        sizes, position = {}, 0
        for start, name in kept:
            size = header[name]["data_offsets"][1] - start
            renamed[names[name]] = {**header[name], "data_offsets": [position, position + size]}
            sizes[names[name]] = size
            position += size
        encoded = json.dumps(renamed, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # the data stays aligned
        with target.open("wb") as writer:
            writer.write(len(encoded).to_bytes(8, "little") + encoded)
            progress.update(8 + length)
            for start, name in kept:
                reader.seek(8 + length + start)
                _copy_bytes(reader, writer, sizes[names[name]], progress)
    return sizes


def _copy_bytes(reader: BinaryIO, writer: BinaryIO, count: int, progress: tqdm) -> None:
    while count:
        block = reader.read(min(count, COPY_BLOCK))
        if not block:
            raise BuildError(f"{reader.name} ended {count} bytes early: it changed while it was read")
        writer.write(block)
        progress.update(len(block))
        count -= len(block)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
