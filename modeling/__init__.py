"""VisPruner for Hugging Face vision-language models: load a stock model with fewer visual tokens.

This file is the installed package's front door and is never published; the files beside it are, verbatim.
"""

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .configuration_vispruner import (
        VisPrunerLlavaConfig,
        VisPrunerLlavaNextConfig,
        VisPrunerOptions,
        merge_vispruner_config,
    )
    from .modeling_vispruner_llava import VisPrunerLlavaForConditionalGeneration
    from .modeling_vispruner_llava_next import VisPrunerLlavaNextForConditionalGeneration
    from .token_selection import SELECTORS, register_selector, select_tokens, select_vispruner

    ARCHITECTURES: dict[str, "Architecture"]

try:
    __version__ = version("vispruner")
except PackageNotFoundError:  # imported from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "ARCHITECTURES",
    "SELECTORS",
    "Architecture",
    "VisPrunerLlavaConfig",
    "VisPrunerLlavaForConditionalGeneration",
    "VisPrunerLlavaNextConfig",
    "VisPrunerLlavaNextForConditionalGeneration",
    "VisPrunerOptions",
    "auto_map",
    "code_files",
    "load",
    "merge_vispruner_config",
    "register_selector",
    "select_tokens",
    "select_vispruner",
]


# Importing torch and transformers takes seconds, which `vispruner --help` need not: names are fetched when asked for.
_HOMES = {
    "configuration_vispruner": (
        "VisPrunerLlavaConfig",
        "VisPrunerLlavaNextConfig",
        "VisPrunerOptions",
        "merge_vispruner_config",
    ),
    "modeling_vispruner_llava": ("VisPrunerLlavaForConditionalGeneration",),
    "modeling_vispruner_llava_next": ("VisPrunerLlavaNextForConditionalGeneration",),
    "token_selection": ("SELECTORS", "register_selector", "select_tokens", "select_vispruner"),
}


def __getattr__(name: str) -> Any:
    if name == "ARCHITECTURES":
        return {model_type: _architecture(model_type) for model_type in _model_types()}
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{home}", __name__), name)
    if name.startswith("VisPruner"):
        for architecture in map(_architecture, _model_types()):
            for known in (architecture.model_class, architecture.config_class):
                if known.__name__ == name:
                    return known
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True)
class Architecture:
    """The classes that one `model_type` is loaded with; `base_class` is the part of `model_class` that encodes."""

    config_class: Any
    model_class: Any
    base_class: Any


def _model_types() -> list[str]:
    prefix = "modeling_vispruner_"
    return sorted(file.stem.removeprefix(prefix) for file in Path(__file__).parent.glob(f"{prefix}*.py"))


@cache
def _architecture(model_type: str) -> Architecture:
    module = import_module(f".modeling_vispruner_{model_type}", __name__)
    model_class, base_class = (
        next(
            value
            for name, value in vars(module).items()
            if name.startswith("VisPruner") and name.endswith(kind) and value.__module__ == module.__name__
        )
        for kind in ("ForConditionalGeneration", "Model")
    )
    return Architecture(model_class.config_class, model_class, base_class)


def architecture_of(model_type: str) -> Architecture:
    """Return the classes for a `model_type`; ValueError lists the supported ones."""
    if model_type not in _model_types():
        raise ValueError(f"model_type {model_type!r} is not supported; the supported ones are {_model_types()}")
    return _architecture(model_type)


def code_files(architecture: str) -> list[Path]:
    """Return the files that a Hub repo of this architecture carries: its modeling file and what that imports."""
    from transformers.dynamic_module_utils import get_relative_import_files

    architecture_of(architecture)
    entry = Path(__file__).parent / f"modeling_vispruner_{architecture}.py"
    return sorted({entry, *(Path(file) for file in get_relative_import_files(entry))})


def auto_map(architecture: str) -> dict[str, str]:
    """Return the `auto_map` of config.json for this architecture."""
    return architecture_of(architecture).model_class.vispruner_auto_map()


def load(base: str | PathLike[str], *, drop_unused_vision_layers: bool = False, **options: Any) -> "PreTrainedModel":
    """Load a stock (or pruned) checkpoint as a pruned model, without building a repo first.

    Keywords that are fields of `vispruner_config` (visual_token_num=64, keep_ratio=0.1, ...) go there; all others
    (dtype, device_map, revision, token ...) go to `from_pretrained`. Raises ValueError for an unsupported model_type.

    drop_unused_vision_layers  neither load nor run the vision layers above the last one in use; the answers stay the
                               same (of LLaVA's 24 layers it saves the last one)
    """
    from transformers import AutoConfig

    from . import configuration_vispruner as configuration

    vispruner_config = {name: options.pop(name) for name in configuration.FIELD_NAMES if name in options}
    if "vispruner_config" in options:
        vispruner_config = {**(options.pop("vispruner_config") or {}), **vispruner_config}
    if isinstance(vispruner_config.get("codebook"), PathLike):
        vispruner_config["codebook"] = fspath(vispruner_config["codebook"])
    where = ("revision", "token", "cache_dir", "force_download", "local_files_only", "proxies", "subfolder")
    hub_options = {name: options[name] for name in where if name in options}
    base_config = AutoConfig.from_pretrained(base, trust_remote_code=False, **hub_options)
    architecture = architecture_of(base_config.model_type)
    if not drop_unused_vision_layers:
        return architecture.model_class.from_pretrained(base, vispruner_config=vispruner_config, **options)
    config = architecture.config_class.from_pretrained(base, vispruner_config=vispruner_config, **hub_options)
    configuration.drop_unused_vision_layers(config)
    return architecture.model_class.from_pretrained(base, config=config, **options)
