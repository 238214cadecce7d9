"""What a Hub repo may contain: files that load from one flat folder with only torch and transformers installed."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bases import write_yaml
from PIL import Image
from transformers import AutoProcessor

import vispruner
from vispruner import ARCHITECTURES, SELECTORS, code_files, register_selector
from vispruner.conversion.build import build_repo

PACKAGE = Path(vispruner.__file__).parent
ALLOWED = frozenset(sys.stdlib_module_names) | {"torch", "transformers"}
OPTIONAL = frozenset({"triton"})  # where it is not installed, `try:` catches that


def forbidden_imports(source: str, siblings: set[str]) -> Iterator[str]:
    """Yield what in `source` would not load from a Hub repo whose other files are `siblings`."""
    tree = ast.parse(source)
    tried = {id(statement) for block in ast.walk(tree) if isinstance(block, ast.Try) for statement in block.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            allowed = ALLOWED | OPTIONAL if id(node) in tried else ALLOWED
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] not in allowed)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0 and node.module.split(".")[0] not in ALLOWED:
                yield node.module
            if node.level and (node.level > 1 or node.module not in siblings):
                yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # transformers looks for relative imports line by line, inside strings too.
            yield from (
                line.strip() for line in node.value.splitlines() if line.strip().startswith(("from .", "import ."))
            )


def relative_imports(file: Path) -> set[str]:
    nodes = ast.walk(ast.parse(file.read_text()))
    return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_published_files_import_only_what_every_user_has(architecture: str) -> None:
    files = code_files(architecture)
    siblings = {file.stem for file in files}
    assert {file.name: list(forbidden_imports(file.read_text(), siblings)) for file in files} == {
        file.name: [] for file in files
    }


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import numpy as np", ["numpy"]),
        ("import triton.language as tl", ["triton.language"]),
        ("try:\n    import triton, numpy\nexcept ImportError:\n    import triton", ["numpy", "triton"]),
        ("def f():\n    from PIL import Image", ["PIL"]),
        ("import vispruner", ["vispruner"]),
        ("from vispruner.token_selection import select_tokens", ["vispruner.token_selection"]),
        ("from . import sibling", ["."]),
        ("from .missing import name", [".missing"]),
        ("from .sub.sibling import name", [".sub.sibling"]),
        ("from ..sibling import name", ["..sibling"]),
        ('"""Some prose\n    from .sibling import name\n"""', ["from .sibling import name"]),
        ("from .sibling import name\nimport math, torch.nn\nfrom transformers.utils import logging", []),
    ],
)
def test_the_rule_itself_finds_each_forbidden_form(source: str, found: list[str]) -> None:
    assert list(forbidden_imports(source, {"sibling"})) == found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_code_files_are_the_modeling_file_and_all_it_reaches(architecture: str) -> None:
    files = {file.stem: file for file in code_files(architecture)}
    reached, queue = set(), [f"modeling_vispruner_{architecture}"]
    while queue:
        stem = queue.pop()
        if stem not in reached:
            reached.add(stem)
            queue += relative_imports(PACKAGE / f"{stem}.py")
    assert set(files) == reached
    assert all(file == PACKAGE / file.name for file in files.values())
    assert "__init__" not in files
    assert {stem for stem in files if stem.startswith("modeling_")} == {f"modeling_vispruner_{architecture}"}


def test_every_file_of_the_package_is_published_by_some_architecture() -> None:
    published = {file.name for architecture in ARCHITECTURES for file in code_files(architecture)}
    assert {file.name for file in PACKAGE.glob("*.py")} == published | {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_auto_map_names_classes_that_the_published_files_define(architecture: str) -> None:
    defined = {
        f"{file.stem}.{node.name}"
        for file in code_files(architecture)
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    auto_map = vispruner.auto_map(architecture)
    # Stock loads Gemma 3 as a text model too.
    further = {"AutoModelForCausalLM"} if architecture == "gemma3" else set()
    usual = {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"}
    assert set(auto_map) == usual | further
    assert set(auto_map.values()) <= defined
    models = {target for name, target in auto_map.items() if name != "AutoConfig"}
    assert models == {f"modeling_vispruner_{architecture}.{ARCHITECTURES[architecture].model_class.__name__}"}


def test_code_files_refuse_an_unknown_architecture() -> None:
    with pytest.raises(
        ValueError, match=r"'blip' is not supported; the supported ones are \[.*'llava', 'llava_next'.*\]"
    ):
        code_files("blip")


@pytest.fixture
def every_other() -> Iterator[str]:
    """A method as a contributor writes it: a function and a decorator, nothing else."""

    @register_selector("every_other")
    def select_every_other(features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int) -> torch.Tensor:
        return (torch.arange(visual_token_num, device=features.device) * 2).repeat(len(features), 1)

    yield "every_other"
    del SELECTORS["every_other"]


def test_a_new_method_is_a_function_and_a_decorator(
    every_other: str, tiny_llava_repo: Path, photo: Image.Image
) -> None:
    model = vispruner.load(tiny_llava_repo, method=every_other, visual_token_num=8)
    inputs = AutoProcessor.from_pretrained(tiny_llava_repo)(text="<image> Where?", images=photo, return_tensors="pt")
    features = model.get_image_features(inputs["pixel_values"], return_dict=True)
    assert torch.equal(features.kept_indices[0], torch.arange(0, 16, 2))
    outputs = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert outputs.past_key_values.get_seq_length() == inputs["input_ids"].shape[1] - (64 - 8) + 3 - 1


def test_a_method_that_no_repo_carries_is_neither_saved_nor_built(
    every_other: str, tiny_llava_repo: Path, tmp_path: Path
) -> None:
    model = vispruner.load(tiny_llava_repo, method=every_other, visual_token_num=8)
    refusal = r'vispruner_config.method "every_other" was registered by test_published_code, which no repo carries'
    with pytest.raises(ValueError, match=refusal):
        model.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    config = write_yaml(tmp_path, vispruner_config={"method": every_other, "visual_token_num": 8})
    with pytest.raises(ValueError, match=refusal):
        build_repo(config, tmp_path / "built", base=tiny_llava_repo)
    model.set_vispruner_config(method="divprune")
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "related_selectors.py").is_file()


def test_a_method_is_gone_once_unregistered(tiny_llava_repo: Path, photo: Image.Image) -> None:
    inputs = AutoProcessor.from_pretrained(tiny_llava_repo)(text="<image> Where?", images=photo, return_tensors="pt")
    with pytest.raises(ValueError, match=r"vispruner_config.method must be one of .*'vispruner'.*, got 'every_other'"):
        vispruner.load(tiny_llava_repo, method="every_other", visual_token_num=8).generate(**inputs, max_new_tokens=1)
