"""Which entries of a JSON file lead to code or files elsewhere, and which only look as if they did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vispruner.conversion import base_checkpoint
from vispruner.conversion.base_checkpoint import PROCESSOR_FILES
from vispruner.conversion.foreign_code import SETTINGS_FILES, foreign_code, published_settings, without_foreign_code

LEADING: list[tuple[dict[str, Any], list[str]]] = [
    ({"auto_map": {"AutoModel": "evil.Evil"}}, ["auto_map", "auto_map.AutoModel"][:1]),
    ({"text_config": {"auto_map": ["evil.Evil", None]}}, ["text_config.auto_map"]),
    ({"parts": [{"deep": [{"auto_map": {}}]}]}, ["parts.deep.auto_map"]),
    ({"attn_implementation": "owner/kernel"}, ["attn_implementation"]),
    ({"attn_implementation": {"text_config": "owner/kernel@main:layer"}}, ["attn_implementation.text_config"]),
    ({"_attn_implementation_internal": "paged|owner/kernel"}, ["_attn_implementation_internal"]),
    ({"any_new_key": "owner/name"}, ["any_new_key"]),
    ({"any_new_key": "/tmp/evil"}, ["any_new_key"]),
    ({"any_new_key": "/tmp/evil folder/x (1)"}, ["any_new_key"]),
    ({"any_new_key": "~/evil"}, ["any_new_key"]),
    ({"any_new_key": "../evil"}, ["any_new_key"]),
    ({"any_new_key": "..\\evil"}, ["any_new_key"]),
    ({"any_new_key": "C:\\evil folder"}, ["any_new_key"]),
    ({"any_new_key": "https://example.org/x?y=z"}, ["any_new_key"]),
    ({"any_new_key": "evil--module.Class"}, ["any_new_key"]),
    ({"any_new_list": ["fine", "owner/name"]}, ["any_new_list"]),
    ({"vocab_file": "bare-name"}, ["vocab_file"]),
    ({"fast_tokenizer_files": ["tokenizer.5.0.json"]}, ["fast_tokenizer_files"]),
    ({"trust_remote_code": True}, ["trust_remote_code"]),
    ({"quantization_config": {}}, ["quantization_config"]),
    ({"attribute_map": {"x": "auto_map"}, "x": {"AutoModel": "evil.Evil"}}, ["attribute_map"]),
    ({"vision_config": {"backbone": "evil"}}, ["vision_config.backbone"]),
]
HARMLESS: list[dict[str, Any]] = [
    {"_name_or_path": "lmsys/vicuna-7b-v1.5", "name_or_path": "/home/author/model"},
    {"vispruner_config": {"base_model_name_or_path": "llava-hf/llava-1.5-7b-hf", "base_model_revision": "refs/pr/1"}},
    {"auto_map": None, "quantization_config": None, "vocab_file": None, "trust_remote_code": False},
    {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]", "image_token": "a/b"},
    {"added_tokens_decoder": {"7": {"content": "and/or", "special": False}}, "additional_special_tokens": ["[/INST]"]},
    {"chat_template": "{% for m in messages %}{{ m }}/{% endfor %}", "model_max_length": 4096},
    {"dtype": "bfloat16", "torch_dtype": "float32", "attn_implementation": "flash_attention_2", "hidden_act": "silu"},
    {"think": "</think>", "slash": "/", "dashes": "--", "rescale_factor": 0.00392156862745098, "drop_path": 0.1},
]


@pytest.mark.parametrize(("settings", "entries"), LEADING, ids=[json.dumps(settings)[:60] for settings, _ in LEADING])
def test_what_leads_elsewhere_is_named_and_left_out(settings: dict[str, Any], entries: list[str]) -> None:
    assert entries[0] in foreign_code({"kept": 1, **settings})
    assert foreign_code(without_foreign_code({"kept": 1, **settings})) == []
    assert without_foreign_code({"kept": 1, **settings})["kept"] == 1


@pytest.mark.parametrize("settings", HARMLESS, ids=[json.dumps(settings)[:60] for settings in HARMLESS])
def test_what_is_only_a_name_or_a_text_stays(settings: dict[str, Any]) -> None:
    assert foreign_code(settings) == []
    assert without_foreign_code(settings) == settings


def test_every_file_of_settings_that_a_build_copies_is_looked_into() -> None:
    lists_of_tokens = {"tokenizer.json", "vocab.json", "added_tokens.json"}
    assert {name for name in PROCESSOR_FILES if name.endswith(".json")} - {*SETTINGS_FILES} == lists_of_tokens


def test_the_embedded_base_says_nothing_about_code() -> None:
    folder = Path(base_checkpoint.ASSETS) / "tiny-llava"
    found = [published_settings(path) for path in sorted(folder.iterdir()) if path.name in SETTINGS_FILES]
    assert len(found) > 3
    assert [left_out for _, left_out in found] == [[]] * len(found)
