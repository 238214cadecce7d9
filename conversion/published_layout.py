"""The weight names of a published repo: how a base's names become them, and which of them a model must have.

What a base calls its tensors is transformers' own knowledge: a name is followed to the tensor of the model that it is
loaded into, and published under that tensor's name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, rename_source_key

from vispruner import architecture_of

# Buffers that old versions of transformers saved and that every model now computes itself.
COMPUTED_BUFFERS = (".rotary_emb.inv_freq", ".embeddings.position_ids")
# CLIP and SigLIP towers have lost this level; vLLM and older transformers read names only with it.
TOWER_LEVEL = "vision_model"
# DINOv2 towers have had their attention renamed; the names that the Hub has are read by older transformers, too.
RENAMED = {
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
}

# What a model is made of many times, in the words of all models: `num_hidden_layers`, `n_layer`, `depth` ...
COUNT_OF_PARTS = re.compile(r"(n|num)_(\w+_)?(layers?|blocks?)|(encoder|decoder)_layers|depth")
MOST_PARTS = 4096

VISION_LAYER = re.compile(r"model\.\w+\.(?:vision_model\.)?encoder\.layers?\.(\d+)\.")


class LayoutError(ValueError):
    """The tensors of a checkpoint are not those of the model."""


@dataclass(frozen=True)
class ModelLayout:
    """The tensors of one model by published name, and the way there from the names of its bases.

    shapes  published name -> shape
    tied    published names that may be left out of a checkpoint
    loaded  published name -> name in the state dict of this version of transformers
    towers  beginning of the names of a part whose names have changed -> how, see `_change`
    """

    shapes: dict[str, tuple[int, ...]]
    tied: frozenset[str]
    loaded: dict[str, str]
    model: PreTrainedModel = field(repr=False)
    towers: dict[str, str]

    def published_names(self, names: Iterable[str]) -> dict[str, str]:
        """Return base name -> published name, without the buffers that are not published.

        LayoutError where two base names become the same one, or where tensors would have to be computed anew.
        """
        transforms = get_model_conversion_mapping(self.model)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        state = dict.fromkeys(self.loaded.values(), True)
        renamed: dict[str, str] = {}
        taken: dict[str, str] = {}
        for name in names:
            if name.endswith(COMPUTED_BUFFERS):
                continue
            loaded, converted = rename_source_key(name, renamings, converters, self.model.base_model_prefix, state)
            if converted is not None:
                raise LayoutError(f"{name} is not stored as the model has it: save the base anew with transformers")
            published = _published(loaded, self.towers)
            if published in taken:
                raise LayoutError(f"{taken[published]} and {name} are both {published}: the checkpoint holds it twice")
            taken[published] = name
            renamed[name] = published
        return renamed


def model_layout(architecture: str, config: Mapping[str, Any]) -> ModelLayout:
    """Return the layout of the model that config.json describes, whose tensors are not allocated."""
    classes: Any = architecture_of(architecture)
    # A copy: the config classes take what they are given apart.
    model_config = classes.config_class.from_dict(copy.deepcopy(dict(config)))
    with torch.device("meta"):
        model = classes.model_class(model_config)
    towers = {f"{name}.": change for name, module in model.named_modules() if (change := _change(module))}
    state = model.state_dict()
    loaded = {_published(name, towers): name for name in state if not name.endswith(COMPUTED_BUFFERS)}
    return ModelLayout(
        shapes={published: tuple(state[name].shape) for published, name in loaded.items()},
        tied=frozenset(_published(name, towers) for name in model.all_tied_weights_keys),
        loaded=loaded,
        model=model,
        towers=towers,
    )


@dataclass(frozen=True)
class LayoutFacts:
    """How tensors fit the model that a config.json describes; plain data, which one process can tell another.

    problems    what is missing, unexpected or of the wrong shape, as sentences
    names       name in the files -> published name
    base_names  the same for the files of a base that they are compared with
    loaded      name in the state dict of this version of transformers -> name in the files
    tied        published names that may be left out of a checkpoint
    width       of the language model
    """

    problems: list[str]
    names: dict[str, str]
    base_names: dict[str, str]
    loaded: dict[str, str]
    tied: list[str]
    width: int


def layout_facts(
    config: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    base_names: Iterable[str] = (),
    are_published: bool = True,
) -> LayoutFacts:
    """Compare tensors of these names and shapes with the model, whatever its pruning options.

    are_published  they are a built repo's own, and not those of a base, which may have other names

    Raises LayoutError, and whatever the classes of transformers raise for a config.json that describes no model.
    """
    layout = model_layout(str(config["model_type"]), {**config, "vispruner_config": {"method": "none"}})
    names = {name: name for name in shapes}
    if not are_published:
        names = without_dropped_layers(layout.published_names(shapes), config)
    return LayoutFacts(
        problems=layout_problems(layout, {published: tuple(shapes[name]) for name, published in names.items()}),
        names=names,
        base_names=without_dropped_layers(layout.published_names(base_names), config),
        loaded={layout.loaded[published]: name for name, published in names.items() if published in layout.loaded},
        tied=sorted(layout.tied),
        width=layout.model.config.get_text_config().hidden_size,
    )


def refuse_endless(config: Mapping[str, Any], tensors: int) -> None:
    """Raise LayoutError for a config.json that asks for more layers than there are tensors, before they are made."""
    for part in (config, *(part for part in config.values() if isinstance(part, Mapping))):
        for name, value in part.items():
            if isinstance(value, int) and COUNT_OF_PARTS.fullmatch(str(name)) and value > min(tensors, MOST_PARTS):
                raise LayoutError(f"config.json asks for {name} {value}, and the weights are {tensors} tensors")


def _change(module: torch.nn.Module) -> str | None:
    """Say how the names of a module's tensors differ from the Hub's: "level" or "attention"."""
    if not isinstance(module, PreTrainedModel):
        return None
    changes = get_checkpoint_conversion_mapping(type(module).__name__) or []
    if any(isinstance(change, PrefixChange) and change.prefix_to_remove == TOWER_LEVEL for change in changes):
        return "level"
    sources = [source for change in changes for source in change.source_patterns]
    return "attention" if "attention.attention.query" in sources else None


def _published(loaded: str, towers: Mapping[str, str]) -> str:
    for tower, change in towers.items():
        if not loaded.startswith(tower):
            continue
        if change == "level":
            return f"{tower}{TOWER_LEVEL}.{loaded.removeprefix(tower).removeprefix(f'{TOWER_LEVEL}.')}"
        for new, old in RENAMED.items():
            loaded = loaded.replace(new, old)
    return loaded


def without_dropped_layers(names: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, str]:
    """Leave out of base name -> published name the vision layers above those that config.json has."""
    layers = (config.get("vision_config") or {}).get("num_hidden_layers")
    return {
        name: published
        for name, published in names.items()
        if layers is None or not (layer := VISION_LAYER.match(published)) or int(layer[1]) < layers
    }


def layout_problems(expected: ModelLayout, found: Mapping[str, tuple[int, ...]]) -> list[str]:
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
