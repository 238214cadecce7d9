"""VisPruner for Hugging Face vision-language models: load a stock model with fewer visual tokens.

This file is the installed package's front door and is never published; the files beside it are, verbatim.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .call_options import Pruning
    from .configuration_vispruner import VisPrunerOptions, merge_vispruner_config
    from .decoder_attention import visual_importance
    from .encoded_images import EncodedImages
    from .modeling_vispruner_llava import VisPrunerLlavaConfig, VisPrunerLlavaForConditionalGeneration
    from .modeling_vispruner_llava_next import VisPrunerLlavaNextConfig, VisPrunerLlavaNextForConditionalGeneration
    from .selectors import SELECTORS, register_selector, select_tokens
    from .token_selection import select_vispruner

    ARCHITECTURES: dict[str, "Architecture"]

try:
    __version__ = version("vispruner")
except PackageNotFoundError:  # imported from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "ARCHITECTURES",
    "SELECTORS",
    "Architecture",
    "EncodedImages",
    "Pruning",
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
    "visual_importance",
]

FOLDER = Path(__file__).parent
PREFIX = "modeling_vispruner_"

# Importing torch and transformers takes seconds, which `vispruner --help` need not: names are fetched when asked for.
_HOMES = {
    "call_options": ("Pruning",),
    "configuration_vispruner": ("VisPrunerOptions", "merge_vispruner_config"),
    "decoder_attention": ("visual_importance",),
    "encoded_images": ("EncodedImages",),
    "selectors": ("SELECTORS", "register_selector", "select_tokens"),
    "token_selection": ("select_vispruner",),
}


@cache
def _homes() -> dict[str, str]:
    """Return the file of each name that can be imported from here; the classes are read from the files."""
    homes = {name: home for home, names in _HOMES.items() for name in names}
    for file in FOLDER.glob(f"{PREFIX}*.py"):
        classes = re.findall(r"^class (VisPruner\w+)\(", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        homes |= dict.fromkeys(classes, file.stem)
    return homes


def __getattr__(name: str) -> Any:
    if name == "ARCHITECTURES":
        return {model_type: _architecture(model_type) for model_type in _model_types()}
    if (home := _homes().get(name)) is not None:
        return getattr(import_module(f".{home}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_homes(), "__version__"})


@dataclass(frozen=True)
class Architecture:
    """The classes that one `model_type` is loaded with; `base_class` is the part of `model_class` that encodes."""

    config_class: Any
    model_class: Any
    base_class: Any


def _model_types() -> list[str]:
    return sorted(file.stem.removeprefix(PREFIX) for file in FOLDER.glob(f"{PREFIX}*.py"))


@cache
def _architecture(model_type: str) -> Architecture:
    module = import_module(f".{PREFIX}{model_type}", __name__)
    (model_class,) = (
        value
        for name, value in vars(module).items()
        if name.endswith("ForConditionalGeneration") and getattr(value, "__module__", None) == module.__name__
    )
    return Architecture(model_class.config_class, model_class, model_class.base_class)


def architecture_of(model_type: str) -> Architecture:
    """Return the classes for a `model_type`; ValueError lists the supported ones."""
    if model_type not in _model_types():
        raise ValueError(f"model_type {model_type!r} is not supported; the supported ones are {_model_types()}")
    return _architecture(model_type)


def code_files(architecture: str) -> list[Path]:
    """Return the files that a Hub repo of this architecture carries: its modeling file and what that imports."""
    from transformers.dynamic_module_utils import get_relative_import_files

    architecture_of(architecture)
    entry = FOLDER / f"{PREFIX}{architecture}.py"
    return sorted({entry, *(Path(file) for file in get_relative_import_files(entry))})


def auto_map(architecture: str) -> dict[str, str]:
    """Return the `auto_map` of config.json for this architecture."""
    return architecture_of(architecture).model_class.vispruner_auto_map()


def _require_checkpoint(path: Path, subfolder: str) -> None:
    """Refuse what is here and is no folder of a checkpoint; a name that is not here may be a Hub id."""
    if path.is_file():
        raise ValueError(f"{path} is a file: give the folder of a checkpoint, or a Hub id (owner/name)")
    if path.is_dir() and not (path / subfolder / "config.json").is_file():
        raise ValueError(f"{path} has no config.json: give the folder of a checkpoint, or a Hub id (owner/name)")


def load(
    base: str | PathLike[str],
    *,
    visual_token_num: int | None = None,
    keep_ratio: float | None = None,
    method: str | None = None,
    important_ratio: float | Literal["auto"] | None = None,
    position_policy: Literal["renumber", "original"] | None = None,
    vispruner_config: Mapping[str, Any] | None = None,
    drop_unused_vision_layers: bool = False,
    **options: Any,
) -> "PreTrainedModel":
    """Load a stock (or pruned) checkpoint as a pruned model, without building a repo first.

    base              a Hub id or a folder
    visual_token_num  visual tokens kept per image, tile or frame; give this or
    keep_ratio        the fraction kept
    method            name of a selector, "vispruner" if the base says nothing; "none" for the dense model
    important_ratio   method "vispruner": share of the budget for the most attended tokens, or "auto"
    position_policy   "renumber" or "original"
    vispruner_config  any further fields of `vispruner_config`; they may also be given as keywords
    drop_unused_vision_layers  neither load nor run the vision layers above the last one in use; the answers stay the
                               same (of LLaVA's 24 layers it saves the last one)
    options           whatever else `from_pretrained` takes: dtype, device_map, revision, token ...

    Raises ValueError for a model_type that is not supported and for a wrong field, by its name. No code of a repo is
    run, whatever `trust_remote_code` says.
    """
    from transformers import AutoConfig

    from . import configuration_vispruner as configuration

    named = {
        "visual_token_num": visual_token_num,
        "keep_ratio": keep_ratio,
        "method": method,
        "important_ratio": important_ratio,
        "position_policy": position_policy,
    }
    fields = dict(vispruner_config or {})
    fields |= {name: options.pop(name) for name in configuration.FIELD_NAMES if name in options}
    fields |= {name: value for name, value in named.items() if value is not None}
    name = fspath(base)
    if (name.startswith((".", "~", "/")) or name.count("/") > 1) and not Path(name).exists():
        raise FileNotFoundError(f"{name} does not exist: give a checkpoint folder or a Hub id (owner/name)")
    _require_checkpoint(Path(name), options.get("subfolder") or "")
    fields |= {name: fspath(fields[name]) for name in configuration.FILES if isinstance(fields.get(name), PathLike)}
    for option in options:
        if close := difflib.get_close_matches(option, configuration.FIELD_NAMES, n=1, cutoff=0.8):
            raise ValueError(f"load has no keyword {option!r}: did you mean {close[0]}?")
    where = ("revision", "token", "cache_dir", "force_download", "local_files_only", "proxies", "subfolder")
    hub_options = {option: options[option] for option in where if option in options}
    try:
        base_config = AutoConfig.from_pretrained(base, trust_remote_code=False, **hub_options)
    except OSError as error:
        if name in str(error):
            raise
        said = " ".join(str(error).split())
        raise OSError(f"{name} is no folder here, and the Hub does not give it: {said}") from error
    architecture = architecture_of(base_config.model_type)
    options["trust_remote_code"] = False
    if not drop_unused_vision_layers:
        return architecture.model_class.from_pretrained(base, vispruner_config=fields, **options)
    from .selectors import require_last_layer_unread

    config = architecture.config_class.from_pretrained(base, vispruner_config=fields, **hub_options)
    require_last_layer_unread(configuration.VisPrunerOptions.from_dict(config.vispruner_config))
    configuration.drop_unused_vision_layers(config)
    return architecture.model_class.from_pretrained(base, config=config, **options)
