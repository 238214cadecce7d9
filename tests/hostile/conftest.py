"""Shared by the hostile suite: a good repo to spoil, and a mark that appears when code of the attacker ran."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from attack import Attack, write_yaml
from huggingface_hub import constants

from vispruner.conversion.build import build_repo


@pytest.fixture(scope="session")
def good_repo(tiny_llava_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    return build_repo(write_yaml(folder), folder / "repo", base=tiny_llava_repo, thin=False, show_progress=False)


@pytest.fixture(scope="session")
def good_thin_repo(tiny_llava_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good-thin")
    return build_repo(write_yaml(folder), folder / "repo", base=tiny_llava_repo, thin=True, show_progress=False)


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache, the one that this process uses."""
    folder = tmp_path_factory.mktemp("hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def attack_on(tmp_path: Path, cache: Path) -> Iterator[Callable[[Path], Attack]]:
    """Copy a repo to be spoiled; when the test is over, no code of the attacker may have run."""
    mark = tmp_path / "mark"

    def prepare(repo: Path) -> Attack:
        copy = Path(shutil.copytree(repo, tmp_path / "repo"))
        return Attack(copy, tmp_path / "elsewhere", cache, mark)

    yield prepare
    assert not mark.exists(), "code of the attacker ran"
