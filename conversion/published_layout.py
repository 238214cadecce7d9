"""The weight names of a published repo: how a base's names become them, and which of them a model must have."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vispruner import ARCHITECTURES

# Prefix in the base -> prefix in the published repo; the first that fits is taken. They cover the names of the
# llava-hf repos, those that transformers 5 saves (no `vision_model` level in the CLIP tower), those of a loaded model,
# and the published ones themselves.
PUBLISHED_PREFIXES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("vision_tower.vision_model.", "model.vision_tower.vision_model."),
    ("vision_tower.", "model.vision_tower.vision_model."),
    ("model.vision_tower.vision_model.", "model.vision_tower.vision_model."),
    ("model.vision_tower.", "model.vision_tower.vision_model."),
    ("image_newline", "model.image_newline"),
)
# Buffers that old versions of transformers saved and that every model now computes itself.
COMPUTED_BUFFERS = (".rotary_emb.inv_freq", ".embeddings.position_ids")


VISION_LAYER = re.compile(r"model\.vision_tower\.vision_model\.encoder\.layers\.(\d+)\.")


class LayoutError(ValueError):
    """The tensors of a checkpoint are not those of the model."""


@dataclass(frozen=True)
class ModelTensors:
    """The tensors of one model by published name; `tied` ones may be left out of a checkpoint."""

    shapes: dict[str, tuple[int, ...]]
    tied: frozenset[str]


def published_name(name: str) -> str | None:
    """Return the name that a base's tensor has in the published repo; None for a buffer that is not published."""
    if name.endswith(COMPUTED_BUFFERS):
        return None
    for base_prefix, published_prefix in PUBLISHED_PREFIXES:
        if name.startswith(base_prefix):
            return published_prefix + name.removeprefix(base_prefix)
    return name


def published_names(names: Iterable[str]) -> dict[str, str]:
    """Return base name -> published name; LayoutError where two base names become the same one."""
    renamed: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in names:
        published = published_name(name)
        if published is None:
            continue
        if published in taken:
            raise LayoutError(f"{taken[published]} and {name} are both {published}: the checkpoint holds it twice")
        taken[published] = name
        renamed[name] = published
    return renamed


def model_tensors(architecture: str, config: Mapping[str, Any]) -> ModelTensors:
    """Return the tensors of the model that config.json describes, without allocating them."""
    classes: Any = ARCHITECTURES[architecture]
    # A copy: the config classes take what they are given apart.
    model_config = classes.config_class.from_dict(copy.deepcopy(dict(config)))
    with torch.device("meta"):
        model = classes.model_class(model_config)
    shapes = {published_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = {published_name(name) for name in model.all_tied_weights_keys}
    return ModelTensors(
        {name: shape for name, shape in shapes.items() if name is not None},
        frozenset(name for name in tied if name is not None),
    )


def without_dropped_layers(names: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, str]:
    """Leave out of base name -> published name the vision layers above those that config.json has."""
    layers = config["vision_config"].get("num_hidden_layers")
    return {
        name: published
        for name, published in names.items()
        if layers is None or not (layer := VISION_LAYER.match(published)) or int(layer[1]) < layers
    }


def layout_problems(expected: ModelTensors, found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Say which published names are missing, unexpected or of the wrong shape; an empty list is a complete model."""
    missing = sorted(set(expected.shapes) - set(found) - expected.tied)
    unexpected = sorted(set(found) - set(expected.shapes))
    problems = []
    if missing:
        problems.append(f"missing: {_listed(missing)}")
    if unexpected:
        problems.append(f"unexpected: {_listed(unexpected)}")
    wrong = [
        f"{name} is {list(found[name])}, config.json asks for {list(shape)}"
        for name, shape in sorted(expected.shapes.items())
        if name in found and tuple(found[name]) != shape
    ]
    if wrong:
        problems.append(f"wrong shape: {_listed(wrong)}")
    return problems


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
