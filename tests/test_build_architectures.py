"""Publishing every architecture: what is built verifies, and loads for a stranger with the weights of its base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bases import COMMIT, in_cache
from counting import cached_tokens
from huggingface_hub import constants
from rows import Image, Row, draw_weights, rows
from tiny_processors import NEED_EXTRA, WRITERS, write_processor

import vispruner
from vispruner.conversion.build import BuildError, build_repo
from vispruner.conversion.checkpoint_io import iter_checkpoint_tensors
from vispruner.conversion.published_layout import model_layout
from vispruner.conversion.verify import verify_repo

# The LLaVA family has tests of its own in test_build.py and its neighbours.
ROWS = {row.model_type: row for row in rows() if not row.model_type.startswith("llava")} | {
    row.model_type: row for row in rows() if row.model_type == "llava_onevision"
}
BASE = "someone/tiny-"
VERIFIED = [name for name in ROWS if name not in NEED_EXTRA]
PROMPT = [[11, 12, 13], Image((56, 84), seed=1), [14, 15]]

# Run where `vispruner` cannot be imported: the repos have to bring all they need.
LOAD = """
import sys
sys.modules["vispruner"] = None
import torch
from transformers import AutoModelForImageTextToText
for folder in sys.argv[1:]:
    repo, prompt, result = folder.split("@")
    model, report = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, output_loading_info=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    with torch.no_grad():
        torch.save(model.eval()(**torch.load(prompt)).logits, result)
"""


@dataclass(frozen=True)
class Published:
    """A row's stock checkpoint, the repos built of it, and what strangers got from them."""

    row: Row
    base: Path
    full: Path
    thin: Path
    prompt: dict[str, torch.Tensor]
    logits: dict[str, torch.Tensor]


def write_base(row: Row, folder: Path) -> Path:
    stock = row.stock_class(row.config()).eval()
    draw_weights(stock)
    stock.save_pretrained(folder)
    write_processor(row, folder)
    return folder


def write_yaml(row: Row, folder: Path, **changes: Any) -> Path:
    content = {
        "repo_id": f"someone/{row.model_type}-pruned",
        "base_model": f"{BASE}{row.model_type}",
        "base_revision": COMMIT,
        "architecture": row.model_type,
        "vispruner_config": row.options,
        "weights": "full",
        "card": {"license": "apache-2.0", "note": "How saliency is defined here is said by the note."},
        **changes,
    }
    path = folder / f"{row.model_type}.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(autouse=True)
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, Published]:
    """Build a full and a thin repo of every row, and load all of them in one fresh process."""
    folder = tmp_path_factory.mktemp("architectures")
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        for name, row in ROWS.items():
            base = in_cache(cache, f"{BASE}{name}", write_base(row, folder / name))
            config = write_yaml(row, folder)
            repos = {
                what: build_repo(config, folder / f"{name}-{what}", thin=what == "thin", show_progress=False)
                for what in ("full", "thin")
            }
            prompt = row.inputs([PROMPT])
            torch.save(prompt, folder / f"{name}.pt")
            made[name] = Published(row, base, repos["full"], repos["thin"], prompt, {})
    arguments = [
        f"{repo}@{folder / name}.pt@{repo}.logits" for name, it in made.items() for repo in (it.full, it.thin)
    ]
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_MODULES_CACHE": str(folder / "modules")}
    process = subprocess.run(
        [sys.executable, "-c", LOAD, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-4000:]
    for it in made.values():
        it.logits.update({repo.name: torch.load(f"{repo}.logits") for repo in (it.full, it.thin)})
    return made


@torch.no_grad()
def logits(model: Any, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**prompt).logits


def test_every_architecture_has_processor_files_to_be_tested_with() -> None:
    assert set(ROWS) <= set(WRITERS)


@pytest.mark.core
@pytest.mark.parametrize("name", ROWS)
def test_a_stranger_gets_the_pruned_base_from_a_full_and_from_a_thin_repo(
    name: str, published: dict[str, Published]
) -> None:
    it = published[name]
    expected = logits(vispruner.load(it.base, **it.row.options), it.prompt)
    stock = it.row.stock_class.from_pretrained(it.base)
    assert expected.shape == logits(stock, it.prompt).shape
    assert cached_tokens(vispruner.load(it.base, **it.row.options), it.prompt) < cached_tokens(stock, it.prompt)
    assert [torch.equal(found, expected) for found in it.logits.values()] == [True, True]


@pytest.mark.core
@pytest.mark.parametrize("name", ROWS)
def test_a_full_repo_is_the_dense_model_for_who_trusts_no_code(name: str, published: dict[str, Published]) -> None:
    it = published[name]
    stock, report = it.row.stock_class.from_pretrained(it.full, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(logits(stock, it.prompt), logits(it.row.stock_class.from_pretrained(it.base), it.prompt))


@pytest.mark.core
@pytest.mark.parametrize("name", ROWS)
def test_weights_are_published_under_the_models_own_names(name: str, published: dict[str, Published]) -> None:
    """Names of towers that lost their `vision_model` level keep it; no other name is made here."""
    it = published[name]
    model = vispruner.load(it.base, **it.row.options)
    own = {key for key in model.state_dict() if key not in model.all_tied_weights_keys}
    found = dict(iter_checkpoint_tensors(it.full))
    flat = {key if key in own else key.replace(".vision_model.", ".", 1): key for key in found}
    assert own <= set(flat)
    assert all(torch.equal(model.state_dict()[key], found[stored]) for key, stored in flat.items())


@pytest.mark.core
@pytest.mark.parametrize("name", ROWS)
def test_every_tensor_is_found_from_the_names_that_transformers_saves_and_from_published_ones(
    name: str, published: dict[str, Published]
) -> None:
    it = published[name]
    layout = model_layout(name, json.loads((it.full / "config.json").read_text()))
    published_names = [key for key, _ in iter_checkpoint_tensors(it.full)]
    assert layout.published_names(published_names) == {key: key for key in published_names}
    saved = layout.published_names(key for key, _ in iter_checkpoint_tensors(it.base))
    assert sorted(saved.values()) == sorted(published_names)


@pytest.mark.parametrize("name", VERIFIED)
@pytest.mark.core
def test_a_repo_whose_processor_needs_nothing_more_verifies(name: str, published: dict[str, Published]) -> None:
    it = published[name]
    for repo in (it.full, it.thin) if name == VERIFIED[0] else (it.full,):
        report = verify_repo(repo, base=it.base)
        assert {check.status for check in report.checks} == {"pass"}, report.table()


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
@pytest.mark.core
def test_without_torchvision_verify_says_what_to_install(published: dict[str, Published]) -> None:
    report = verify_repo(published["internvl"].full)
    (refused,) = report.failures
    assert refused.name == "AutoProcessor"
    assert "pip install 'vispruner[video]'" in refused.detail
    before = {check.name: check.status for check in report.checks}
    assert before["weights"] == before["AutoConfig"] == "pass"


@pytest.mark.core
@pytest.mark.video
@pytest.mark.parametrize("name", [name for name in ROWS if name in NEED_EXTRA])
def test_with_torchvision_every_check_passes(name: str, published: dict[str, Published]) -> None:
    it = published[name]
    report = verify_repo(it.full, base=it.base)
    assert {check.status for check in report.checks} == {"pass"}, report.table()


@pytest.mark.parametrize("name", ROWS)
def test_layers_are_dropped_only_where_the_config_says_which_are_unused(
    name: str, tmp_path: Path, cache: Path
) -> None:
    row = ROWS[name]
    base = write_base(row, tmp_path / "base")
    config = write_yaml(row, tmp_path)
    if hasattr(row.config(), "vision_feature_layer"):
        build_repo(config, tmp_path / "out", base=base, drop_unused_vision_layers=True, show_progress=False)
        return
    with pytest.raises(BuildError, match=r"uses every layer .*build without drop_unused_vision_layers"):
        build_repo(config, tmp_path / "out", base=base, drop_unused_vision_layers=True, show_progress=False)
    assert not (tmp_path / "out").exists()
