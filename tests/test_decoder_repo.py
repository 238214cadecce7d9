"""A repo that prunes in the language model, as its users meet it: built, verified, on its card and in a picture."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from bases import write_yaml
from documents import DOCUMENTS
from PIL import Image
from transformers import AutoModelForImageTextToText

import vispruner
from vispruner.conversion.build import build_repo
from vispruner.conversion.picture import show, view_budgets, view_stages
from vispruner.conversion.questions import SCENE, load_processor
from vispruner.conversion.verify import verify_repo

NAME = "tiny-llava-fastv"


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_repo(NAME, tmp_path_factory.mktemp("decoder") / NAME, show_progress=False)


@pytest.mark.core
def test_verify_counts_what_every_layer_caches(repo: Path) -> None:
    report = verify_repo(repo)
    assert report.passed, report.table()
    assert "of 144 image tokens the KV cache holds 144 in 1 layers, 48 in 3 layers" in report.table()


@pytest.mark.core
def test_the_card_says_where_tokens_leave_and_a_budget_that_can_be_met(repo: Path) -> None:
    card = (repo / "README.md").read_text(encoding="utf-8")
    assert "72 visual tokens per image, on average over its layers, instead of all of them" in card
    assert "| layers | of an image of 144 visual tokens: all from layer 0 on, 48 from 1 on |" in card
    assert "dropped between layers of the language model" in card and "without a look at the question" not in card
    assert "model.set_vispruner_config(visual_token_num=90)" in card
    model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True).eval()
    model.set_vispruner_config(visual_token_num=90)
    assert sum(model.model.layer_counts(144)) <= 90 * 4


def test_a_picture_has_a_panel_for_each_stage(repo: Path) -> None:
    model, processor = vispruner.load(repo).eval(), load_processor(str(repo))
    scene = Image.open(SCENE).convert("RGB")
    model.set_vispruner_config(method="pyramiddrop", visual_token_num=80)
    panels = view_stages(model, processor, scene, "What color is the square?")
    kept = [sum(int(tile.kept.sum()) for tile in panel.tiles) for panel in panels]
    (counts,) = zip(*[counts for _, counts in model.last_pruning.stages], strict=True)
    assert kept == list(counts) and [panel.title for panel in panels] == [
        f"from layer {layer} on, " for layer in (1, 2, 3)
    ]
    sets = [torch.cat([tile.kept.flatten() for tile in panel.tiles]) for panel in panels]
    assert all(bool((later <= earlier).all()) for earlier, later in itertools.pairwise(sets))
    model.set_vispruner_config(method="vispruner+fastv", stage_token_nums=[72, 30])
    dense, encoder, decoder = view_budgets(model, processor, scene, [None])
    assert [sum(int(tile.kept.sum()) for tile in panel.tiles) for panel in (dense, encoder, decoder)] == [144, 72, 30]


@pytest.mark.core
def test_a_repo_of_a_calibrated_method_is_built_verified_and_drawn(tmp_path: Path) -> None:
    options = {"method_options": {"cell": 4, "global_threshold": 2.0, "stage_shares": [0.5, 0.5]}}
    config = write_yaml(
        tmp_path,
        base_model="embedded/tiny-llava",
        base_revision=None,
        vispruner_config={"method": "vflowopt", "keep_ratio": 0.25, **options},
        card={"license": "apache-2.0", "language": "en"},
    )
    repo = build_repo(config, tmp_path / "repo", show_progress=False)
    report = verify_repo(repo)
    assert report.passed, report.table()
    card = (repo / "README.md").read_text(encoding="utf-8")
    assert (
        "| attention | from the tokens of the image that are attended most, in the layer that gives the features |"
        in card
    )
    model, processor = vispruner.load(repo).eval(), load_processor(str(repo))
    counts = model.model.layer_counts(model.model.encoder_options.budget(144))
    assert counts == [64, 32, 32, 16] and sum(counts) <= 36 * 4
    panels = view_stages(model, processor, Image.open(SCENE).convert("RGB"), "What color is the square?")
    assert [sum(int(tile.kept.sum()) for tile in panel.tiles) for panel in panels] == [32, 16]


@pytest.mark.core
def test_the_readme_s_command_draws_it(tmp_path: Path) -> None:
    command = "vispruner show --method fastv --visual-token-num 72 --out kept.png"
    assert command in DOCUMENTS
    out, _ = show(None, None, tmp_path / "kept.png", visual_token_num=72, method="fastv")
    assert Image.open(out).width > 1000
