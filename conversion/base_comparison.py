"""Compare a built folder's config and processor with its base: nothing but what a build changes may differ."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from vispruner import architecture_of

from .base_checkpoint import PROCESSOR_FILES
from .build import OWN_FIELDS, engine_auto_map, stored_generation
from .built_folder import CONFIG
from .checkpoint_io import parse_json, read_json
from .foreign_code import published_settings, without_foreign_code

GENERATION = "generation_config.json"


def differences_from_base(folder: Path, base: Path) -> list[str]:
    """Return what is not as a build from `base` writes it, as sentences."""
    config, base_config = read_json(folder / CONFIG), without_foreign_code(read_json(base / CONFIG))
    problems = [
        f"{name} {problem}"
        for name in PROCESSOR_FILES
        if (problem := _processor_difference(folder / name, base / name, str(config["model_type"])))
    ]
    for name, differs in (
        (CONFIG, _config_differences(config, base_config)),
        (GENERATION, _generation_differences(read_json(folder / GENERATION), stored_generation(base, base_config))),
    ):
        problems += [f"{entry} in {name} is not the base's" for entry in differs]
    return problems


def _processor_difference(path: Path, base: Path, architecture: str) -> str:
    if not (path.is_file() and base.is_file()):
        return "is missing" if base.is_file() else "is in no such base" if path.is_file() else ""
    content, expected = path.read_bytes(), published_settings(base)[0]
    if content == expected:
        return ""
    if path.name == "processor_config.json":
        settings = parse_json(content, path)
        own = engine_auto_map(architecture)
        if own is not None and settings.pop("auto_map", None) == own and settings == parse_json(expected, base):
            return ""
    return "is not the base's"


def _config_differences(own: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Name the fields that differ, but for those that a build writes itself."""
    layers = _vision_layers(own)
    if layers != _vision_layers(expected):
        expected = _with_dropped_layers(expected, layers)
    return _differing(own, expected, OWN_FIELDS)


def _vision_layers(config: dict[str, Any]) -> Any:
    return (config.get("vision_config") or {}).get("num_hidden_layers")


def _with_dropped_layers(base: dict[str, Any], layers: Any) -> dict[str, Any]:
    """Return the config of a build from `base` that leaves out all vision layers but this many."""
    config = architecture_of(base["model_type"]).config_class.from_dict(copy.deepcopy(base))
    before, features = config.vision_config.num_hidden_layers, getattr(config, "vision_feature_layer", None)
    if not isinstance(layers, int) or features is None or layers >= before:
        return base
    indices = [features] if isinstance(features, int) else features
    indices = [index + before - layers if index < 0 else index for index in indices]
    return {
        **base,
        "vision_config": {**base["vision_config"], "num_hidden_layers": layers},
        "vision_feature_layer": indices[0] if isinstance(features, int) else indices,
    }


def _generation_differences(own: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Name the fields that differ; a base without a pad token gets one."""
    return _differing(own, expected, () if expected.get("pad_token_id") is not None else ("pad_token_id",))


def _differing(own: dict[str, Any], expected: dict[str, Any], but: tuple[str, ...]) -> list[str]:
    names = sorted((own.keys() | expected.keys()) - {*but})
    return [name for name in names if name not in own or name not in expected or own[name] != expected[name]]
