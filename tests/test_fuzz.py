"""What reads the outside, on random input: it works, or a ValueError or OSError says which file or field is wrong.

FUZZ_SECONDS=600 draws anew, from the next seed, until so much time has passed for each; FUZZ_SEED=1 starts elsewhere.
FUZZ.md records what was tried.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from matrix import ONE, SEVERAL, Model, generate

from vispruner.codebook_file import read_codebook
from vispruner.configuration_vispruner import FIELD_NAMES, VisPrunerOptions, merge_vispruner_config
from vispruner.conversion.checkpoint_io import iter_checkpoint_tensors, read_tensor_headers
from vispruner.conversion.repo_config import CARD_FIELDS, FIELDS, load_repo_config
from vispruner.modeling_vispruner_llava import VisPrunerLlavaConfig

pytestmark = [pytest.mark.fuzz, pytest.mark.slow]
SECONDS, SEED = float(os.environ.get("FUZZ_SECONDS", "0")), int(os.environ.get("FUZZ_SEED", "0"))


def fuzz(examples: int, **drawn: st.SearchStrategy) -> Callable:
    def mark(test: Callable) -> Callable:
        # Fixtures are folders and models that no example leaves changed.
        limits = settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        tried = limits(given(**drawn)(test))

        def until_the_time_is_over(**fixtures: Any) -> None:
            start = time.monotonic()
            for number in itertools.count(SEED):
                seed(number)(tried)(**fixtures)
                if time.monotonic() - start >= SECONDS:
                    break
            print(f"{test.__name__}: {examples} examples of each seed from {SEED} to {number}")

        until_the_time_is_over.__signature__ = inspect.signature(tried)  # type: ignore[attr-defined]
        return until_the_time_is_over

    return mark


def outcome(call: Callable[[], Any], *names: str) -> Any:
    """Return what a call returns, or None where it refuses; it must name what it is about: one of `names`."""
    try:
        return call()
    except (ValueError, OSError) as error:
        assert any(name in str(error) for name in names), f"names nothing: {type(error).__name__}: {error}"
        return None


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 600),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.dates(),
    st.binary(max_size=4),
    st.sampled_from(
        ["vispruner", "none", "fastv", "vispruner+fastv", "a+b+c", "thin", "full", "renumber", "x/y", "."]
    ),
)
keys = st.one_of(st.sampled_from(["license", "visual_token_num", "b64"]), st.text(max_size=6), st.integers())
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=6,
)


json_values = values.map(lambda value: json.loads(json.dumps(value, default=str)))


def fields_of(names: tuple[str, ...], base: dict[str, Any]) -> st.SearchStrategy:
    """Draw a block that is right but for up to four fields, one of them perhaps unknown."""
    changed = st.dictionaries(st.one_of(st.sampled_from(names), st.text(max_size=8)), values, max_size=4)
    left_out = st.sets(st.sampled_from(sorted(base)), max_size=2)
    return st.tuples(changed, left_out).map(
        lambda drawn: {**{key: value for key, value in base.items() if key not in drawn[1]}, **drawn[0]}
    )


RIGHT = {"visual_token_num": 64}
REPO = {
    "repo_id": "someone/model-vispruner",
    "base_model": "someone/model",
    "base_revision": "main",
    "architecture": "llava",
    "vispruner_config": RIGHT,
    "card": {"license": "mit"},
    "budgets": {"b32": 32},
}


# config.json's block


@fuzz(800, block=st.one_of(values, fields_of(FIELD_NAMES, RIGHT)), changes=st.one_of(st.none(), values))
def test_the_block_of_config_json(block: Any, changes: Any) -> None:
    made = outcome(lambda: merge_vispruner_config(block, changes), "vispruner_config")
    if made is not None:
        assert merge_vispruner_config(made, None) == made
        options = VisPrunerOptions.from_dict(made)
        assert all(1 <= options.budget(tokens) <= tokens for tokens in (1, 2, 576, 10**6))
    outcome(lambda: VisPrunerLlavaConfig(vispruner_config=block), "vispruner_config")


@fuzz(150, config=st.dictionaries(st.sampled_from(["vispruner_config", "auto_map", "x_implementation"]), json_values))
def test_config_json_around_the_block(config: dict[str, Any]) -> None:
    outcome(lambda: VisPrunerLlavaConfig.from_dict(config), "vispruner_config", "config.json")


# YAML configs


@fuzz(
    400,
    content=st.one_of(values, fields_of(FIELDS, REPO)),
    card=st.one_of(st.none(), fields_of(CARD_FIELDS, {"license": "mit"})),
    options=st.one_of(st.none(), fields_of(FIELD_NAMES, RIGHT)),
)
def test_a_yaml_config_of_wrong_values(tmp_path: Path, content: Any, card: Any, options: Any) -> None:
    if isinstance(content, dict):
        content = {**content, **({"card": card} if card else {}), **({"vispruner_config": options} if options else {})}
    (path := tmp_path / "config.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    outcome(lambda: load_repo_config(path), str(path))


TOKENS = ["repo_id", ": ", "\n", "  ", "- ", "&a ", "*a", "!!python/object:os.system", "{", "}", "[", "]", "'", '"']
TOKENS += ["? ", "<<: ", "|", ">", "#", "%YAML 1.1", "---", "\t", "\x00", "\ufeff", "1e999", "0x", "2020-01-99"]
TOKENS += [
    "!!binary =",
    "!!int x",
    "!!float x",
    "!!timestamp x",
    "!!set ",
    "!!omap ",
    "0000-00-00",
    "1:99:99",
    "=",
    "~",
]


@fuzz(
    1500,
    content=st.one_of(
        st.binary(max_size=60),
        st.lists(st.sampled_from(TOKENS), max_size=14).map(lambda parts: "".join(parts).encode()),
    ),
)
def test_a_yaml_config_of_wrong_text(tmp_path: Path, content: bytes) -> None:
    (path := tmp_path / "config.yaml").write_bytes(content)
    outcome(lambda: load_repo_config(path), str(path))


# safetensors

headers = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["F32", "F16", "BF16", "U8", "F4", "C64"]), values),
        "shape": st.one_of(st.lists(st.integers(-1, 2**63), max_size=3), values),
        "data_offsets": st.one_of(st.lists(st.integers(-1, 64), max_size=3), values),
        "more": values,
    },
)


def packed(header: bytes, length: int | None, data: bytes) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


files = st.one_of(
    st.binary(max_size=64),
    st.builds(
        packed,
        st.one_of(
            st.binary(max_size=40),
            st.dictionaries(st.sampled_from(["codebook", "w", "__metadata__"]), st.one_of(headers, values)).map(
                lambda value: json.dumps(value, default=str).encode()
            ),
        ),
        st.one_of(st.none(), st.integers(0, 2**64 - 1)),
        st.binary(max_size=48),
    ),
)


@fuzz(800, content=files)
def test_safetensors_headers(tmp_path: Path, content: bytes) -> None:
    (path := tmp_path / "model.safetensors").write_bytes(content)
    names = (str(path), str(tmp_path), path.name)
    found = outcome(lambda: read_tensor_headers(tmp_path), *names)
    held = outcome(lambda: dict(iter_checkpoint_tensors(tmp_path)), *names)
    assert held is None or (found is not None and {name: tuple(t.shape) for name, t in held.items()} == {
        name: header.shape for name, header in found.items()
    })  # fmt: skip
    outcome(lambda: read_codebook(path, 4), str(path))


# Prompts

edits = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), st.integers(0, 60), st.sampled_from(["image", "text", "pad"])),
        st.tuples(st.just("delete"), st.integers(0, 60), st.just("")),
        st.tuples(st.just("mask"), st.integers(0, 60), st.just("")),
        st.tuples(
            st.just("set"), st.integers(0, 60), st.sampled_from(["image", "text", "pad", "outside", "negative"])
        ),
    ),
    max_size=4,
)


def edited(model: Model, inputs: dict[str, Any], drawn: list) -> dict[str, Any]:
    token = model.pruned.config.image_token_id
    ids, mask = inputs["input_ids"][0].tolist(), inputs["attention_mask"][0].tolist()
    written = {"image": token, "text": 15, "pad": 0, "outside": 10**6, "negative": -7}
    for kind, place, what in drawn:
        place %= max(1, len(ids))
        if kind == "insert":
            ids.insert(place, written[what])
            mask.insert(place, int(what != "pad"))
        elif kind == "delete" and len(ids) > 1:
            del ids[place], mask[place]
        elif kind == "mask":
            mask[place] = 0
        elif kind == "set":
            ids[place] = written[what]
    return {**inputs, "input_ids": torch.tensor([ids]), "attention_mask": torch.tensor([mask])}


@pytest.mark.parametrize("model", ["llava", "llava_next"], indirect=True)
@fuzz(120, drawn=edits, several=st.booleans())
def test_prompts(model: Model, drawn: list, several: bool) -> None:
    """Ids outside the vocabulary are an IndexError of torch's embedding, in stock as here."""
    inputs = edited(model, model.prompt(SEVERAL if several else ONE), drawn)
    outside = bool(((inputs["input_ids"] < 0) | (inputs["input_ids"] >= 100)).any())
    before = {name: value.clone() for name, value in inputs.items()}
    try:
        made = outcome(lambda: generate(model.pruned, inputs), "placeholder", "attention_mask", "prompt")
    except IndexError:
        assert outside
        return
    assert all(torch.equal(inputs[name], value) for name, value in before.items())
    if made is not None:
        assert torch.equal(made[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
