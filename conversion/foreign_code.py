"""Find the entries of a repo's JSON files by which transformers would run code, or read files, from somewhere else.

`build` leaves them out of what it copies from a base, and `verify` refuses a folder that has them. Two rules: some
keys have no place in a published repo, whatever they hold; and no other entry may hold a path or the name of a repo,
but for those that only say what something is called.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import dynamic_module_utils

from .checkpoint_io import CheckpointError, parse_json, read_regular

# The JSON files that transformers reads settings from; the others are lists of tokens.
SETTINGS_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
)
CODE_KEYS = frozenset(
    {
        "_commit_hash",
        "allow_all_kernels",
        "attribute_map",  # gives any other key the meaning of one of these
        "audio_tokenizer",
        "auto_map",
        "backbone",
        "code_revision",
        "compression_config",
        "configuration_files",
        "custom_generate",
        "custom_pipelines",
        "fusion_config",
        "kernel_config",
        "peft_config",
        "quantization_config",
        "sub_configs",
        "trust_remote_code",
        "use_kernels",
    }
)
MOST_SETTINGS = 2**23  # bytes of such a file; the longest lists of tokens take an eighth of it
FILE_KEY = re.compile(r".*_(file|files|path|paths|dir)")
# Keys whose values are only shown: what something is called, and text for people and models.
NAME_KEYS = frozenset({"_name_or_path", "name_or_path", "base_model_name_or_path", "base_model_revision"})
TEXT_KEYS = frozenset(
    {"content", "chat_template", "template", "additional_special_tokens", "extra_special_tokens", "stop_strings"}
)
# A path, a URL, the name of a repo, or `repo--module.Class`: the characters of such names alone, with a separator; or
# anything that begins as a path does.
PLACE = re.compile(r"(?=.*\w)(?=.*([\\/]|--))[\w.@:|~+?&=%#,\\/-]+|(~|\.{0,2}[\\/]|\w:[\\/]).*\w.*")
MOST_NESTED = 32


def foreign_code(settings: dict[str, Any]) -> list[str]:
    """Name the entries that lead to code or files elsewhere, such as `text_config.auto_map`."""
    return [".".join(path) for path in _leading_elsewhere(settings)]


def without_foreign_code(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a copy that lacks those entries; of a list, the whole entry that holds it goes."""
    result = copy.deepcopy(settings)
    for path in _leading_elsewhere(settings):
        block = result
        for name in path[:-1]:
            if not isinstance(block.get(name), dict):
                block.pop(name, None)
                break
            block = block[name]
        else:
            block.pop(path[-1], None)
    return result


def published_settings(path: Path) -> tuple[bytes, list[str]]:
    """Return what a build writes for one file of a base, and which entries it leaves out.

    The bytes are the base's own unless something is left out.
    """
    if path.name not in SETTINGS_FILES:
        return read_regular(path), []
    content = read_regular(path, MOST_SETTINGS)
    settings = parse_json(content, path)
    left_out = foreign_code(settings)
    if left_out:
        content = (json.dumps(without_foreign_code(settings), indent=2, ensure_ascii=False) + "\n").encode()
    return content, left_out


@contextmanager
def own_code_only() -> Iterator[None]:
    """Let transformers refuse to run a repo's code where it would ask whether to, until the block ends."""
    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # to wait for an answer: it does not ask then
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


def _leading_elsewhere(settings: dict[str, Any]) -> list[tuple[str, ...]]:
    return sorted({path for path, value in _entries(settings) if _leads_elsewhere(path, value)})


def _entries(settings: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every value with its path; what a list holds counts as values of the entry that is the list."""
    waiting: list[tuple[tuple[str, ...], int, Any]] = [((), 0, settings)]
    while waiting:
        path, depth, value = waiting.pop()
        if depth > MOST_NESTED:
            raise CheckpointError(f"{'.'.join(path[:3])} ... is nested more than {MOST_NESTED} levels deep")
        if path:
            yield path, value
        if isinstance(value, dict):
            waiting += [((*path, key), depth + 1, inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(path, depth + 1, inner) for inner in value]


def _leads_elsewhere(path: tuple[str, ...], value: Any) -> bool:
    key = path[-1]
    if key in CODE_KEYS:
        return value is not None and value is not False
    if not isinstance(value, str) or key in NAME_KEYS | TEXT_KEYS or key.endswith("_token"):
        return False
    return FILE_KEY.fullmatch(key) is not None or PLACE.fullmatch(value) is not None
