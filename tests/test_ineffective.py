"""A repo that prunes nothing is never published as pruned: build, verify, publish and demo refuse its budget."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import write_yaml
from rows import rows

import vispruner
from vispruner.conversion.build import BuildError, build_repo
from vispruner.conversion.cli import main
from vispruner.conversion.demo import run_demo
from vispruner.conversion.verify import LIGHT_CHECKS, verify_repo
from vispruner.conversion.verify_worker import keeps_everything

FULL = 64  # visual tokens of one image of the tiny LLaVA
ROWS = {row.model_type: row for row in rows()}
TILE_SIZED = [name for name in ROWS if not name.startswith("qwen")]


def refusal(name: str) -> str:
    return rf"{re.escape(name)} .* keeps all {FULL} visual tokens of .*image, so nothing would be pruned: set it"


@pytest.fixture(scope="module")
def good(tiny_llava_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    return build_repo(write_yaml(folder), folder / "out", base=tiny_llava_repo, show_progress=False)


INEFFECTIVE: dict[str, dict[str, Any]] = {
    "count": {"visual_token_num": 999},
    "exactly all": {"visual_token_num": FULL},
    "ratio": {"keep_ratio": 1.0},
    "ratio that rounds to all": {"keep_ratio": 0.9999},
    "method of the paper's peers": {"keep_ratio": 1.0, "method": "divprune"},
    "in the language model": {"visual_token_num": FULL, "method": "fastv", "prune_layers": [1]},
    "in the language model, ratio": {"keep_ratio": 1.0, "method": "fastv", "prune_layers": [1]},
    "stages": {"stage_token_nums": [FULL], "method": "fastv", "prune_layers": [1]},
    "both": {"stage_token_nums": [FULL, FULL], "method": "vispruner+fastv", "prune_layers": [1]},
}


@pytest.mark.parametrize("options", INEFFECTIVE.values(), ids=INEFFECTIVE)
def test_a_build_refuses_what_keeps_everything(options: dict[str, Any], tiny_llava_repo: Path, tmp_path: Path) -> None:
    budget = next(name for name in options if name in ("visual_token_num", "keep_ratio", "stage_token_nums"))
    config = write_yaml(tmp_path, vispruner_config=options)
    with pytest.raises(BuildError, match=refusal(f"vispruner_config.{budget}")):
        build_repo(config, tmp_path / "out", base=tiny_llava_repo, show_progress=False)
    assert list(tmp_path.iterdir()) == [config]


@pytest.mark.parametrize("budget", [{"visual_token_num": 500}, {"keep_ratio": 1.0}], ids=str)
def test_a_build_refuses_a_branch_that_keeps_everything(
    budget: dict[str, Any], tiny_llava_repo: Path, tmp_path: Path
) -> None:
    config = write_yaml(tmp_path, budgets={"v9": {"visual_token_num": 9}, "all": budget})
    with pytest.raises(BuildError, match=refusal(f"budgets.all.{next(iter(budget))}")):
        build_repo(config, tmp_path / "out", base=tiny_llava_repo, show_progress=False)


def test_what_prunes_one_token_or_says_that_it_prunes_none_is_built(tiny_llava_repo: Path, tmp_path: Path) -> None:
    for options in ({"visual_token_num": FULL - 1}, {"method": "none"}):
        config = write_yaml(tmp_path, vispruner_config=options)
        build_repo(config, tmp_path / "out", base=tiny_llava_repo, show_progress=False, overwrite=True)


@pytest.mark.parametrize("name", ["count", "ratio", "in the language model"])
@pytest.mark.parametrize("memory", [None, 2**20], ids=["run", "too large to run"])
@pytest.mark.core
def test_verify_refuses_what_keeps_everything(name: str, memory: int | None, good: Path, tmp_path: Path) -> None:
    repo = Path(shutil.copytree(good, tmp_path / "repo"))
    config = json.loads((repo / "config.json").read_text())
    config["vispruner_config"] = vispruner.merge_vispruner_config(config["vispruner_config"], INEFFECTIVE[name])
    (repo / "config.json").write_text(json.dumps(config))
    report = verify_repo(repo, available_memory=memory)
    (failure,) = report.failures
    assert failure.name == "budget" and failure.name in LIGHT_CHECKS
    assert re.search(refusal(next(iter(INEFFECTIVE[name]))), failure.detail)


def test_a_demo_refuses_such_a_budget_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"visual_token_num 500 keeps all 144 visual tokens"):
        run_demo(tmp_path / "new" / "demo", visual_token_num=500)
    assert not (tmp_path / "new").exists()


def test_a_demo_of_a_repo_that_is_not_there_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--repo", str(tmp_path / "where"), "--out", str(tmp_path / "demo")]) == 2
    assert "where is no folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Any:
    row = ROWS[request.param]
    classes = vispruner.ARCHITECTURES[request.param]
    config = classes.config_class.from_dict(row.config().to_dict(), vispruner_config=row.options)
    with torch.device("meta"):
        return classes.model_class(config)


@pytest.mark.parametrize("model", TILE_SIZED, indirect=True)
def test_every_architecture_knows_how_many_tokens_a_tile_has(model: Any) -> None:
    assert keeps_everything(model, None) is None
    model.set_vispruner_config(visual_token_num=10**6)
    problem = keeps_everything(model, None)
    tokens = int(re.search(r"keeps all (\d+) visual tokens", str(problem))[1])  # type: ignore[index]
    model.set_vispruner_config(visual_token_num=tokens)
    assert keeps_everything(model, None) is not None
    model.set_vispruner_config(visual_token_num=tokens - 1)
    assert keeps_everything(model, None) is None


class Sized:
    """An image processor as Qwen's: images of any size, up to so many pixels."""

    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 100}


@pytest.mark.parametrize("model", [name for name in ROWS if name.startswith("qwen")], indirect=True)
def test_qwen_is_refused_only_where_the_largest_image_would_be_kept_whole(model: Any) -> None:
    vision = model.config.vision_config
    most = Sized.size["longest_edge"] // (vision.patch_size * vision.spatial_merge_size) ** 2
    for budget, is_refused in ((most, True), (most - 1, False), (10 * most, True)):
        model.set_vispruner_config(visual_token_num=budget)
        assert (keeps_everything(model, Sized) is not None) == is_refused


@pytest.mark.parametrize("model", ["llava_next", "llava_onevision"], indirect=True)
def test_a_budget_of_layers_counts_against_the_largest_image_of_several_tiles(model: Any) -> None:
    sizes = torch.tensor(model.config.image_grid_pinpoints)
    full, _ = model.model.image_token_counts(None, image_sizes=sizes)
    model.set_vispruner_config(method="fastv", prune_layers=[1], stage_token_nums=[max(full) - 1])
    assert keeps_everything(model, None) is None
    model.set_vispruner_config(visual_token_num=max(full))
    assert keeps_everything(model, None) is not None
