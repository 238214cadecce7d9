"""One repo's YAML: what is accepted, and that every refusal names the file, the field and the remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from vispruner import ARCHITECTURES
from vispruner.conversion.repo_config import (
    HUB_CONFIGS,
    RepoConfigError,
    find_repo_config,
    hub_config_names,
    load_repo_config,
)

VALID: dict[str, Any] = {
    "repo_id": "someone/llava-pruned",
    "base_model": "llava-hf/llava-1.5-7b-hf",
    "base_revision": "main",
    "architecture": "llava",
    "vispruner_config": {"visual_token_num": 128, "important_ratio": 0.5},
    "weights": "thin",
    "budgets": {"v64": {"visual_token_num": 64}, "half": {"keep_ratio": 0.5}},
    "card": {"license": "llama2", "language": "en"},
}


def write_yaml(folder: Path, **changes: Any) -> Path:
    """Write the valid YAML with some fields changed; a field set to `...` is left out."""
    content = {name: value for name, value in {**VALID, **changes}.items() if value is not ...}
    path = folder / "repo.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_a_valid_file_loads_with_every_pruning_option_filled_in(tmp_path: Path) -> None:
    repo = load_repo_config(write_yaml(tmp_path))
    assert (repo.repo_id, repo.architecture, repo.base_revision) == ("someone/llava-pruned", "llava", "main")
    assert repo.vispruner_config["method"] == "vispruner"
    assert repo.vispruner_config["visual_token_num"] == 128
    assert repo.vispruner_config["keep_ratio"] is None
    assert repo.card == VALID["card"]
    assert (repo.weights, repo.budgets) == ("thin", VALID["budgets"])


def test_weights_and_budgets_may_be_left_out(tmp_path: Path) -> None:
    repo = load_repo_config(write_yaml(tmp_path, weights=..., budgets=...))
    assert (repo.weights, repo.budgets) == (None, {})


@pytest.mark.parametrize("branch", ["v64", "64", "few-tokens", "budget/v64", "v0.25", "V_64"])
def test_names_that_git_takes_are_branches(tmp_path: Path, branch: str) -> None:
    budgets = {branch: {"visual_token_num": 64}}
    assert load_repo_config(write_yaml(tmp_path, budgets=budgets)).budgets == budgets


@pytest.mark.parametrize("name", hub_config_names())
def test_every_shipped_config_is_valid_and_named_like_its_repo(name: str) -> None:
    repo = load_repo_config(name)
    assert repo.repo_id.split("/")[1] == name
    assert repo.card["license"]
    assert repo.path == HUB_CONFIGS / f"{name}.yaml"
    for branch, budget in repo.budgets.items():  # v64: 64 tokens; r125: 0.125 of them
        kind, digits = branch[0], branch[1:]
        assert budget == {"v": {"visual_token_num": int(digits)}, "r": {"keep_ratio": float(f"0.{digits}")}}[kind]
    assert len(repo.budgets) == 2


def test_the_shipped_configs_cover_every_architecture_and_one_base_without_network() -> None:
    repos = [load_repo_config(name) for name in hub_config_names()]
    assert {repo.architecture for repo in repos} == set(ARCHITECTURES)
    assert [repo.repo_id for repo in repos if repo.base_model.startswith("embedded/")] == [
        "someone/photo-llava-vispruner",
        "someone/tiny-llava-divprune",
        "someone/tiny-llava-fastv",
        "someone/tiny-llava-vispruner",
    ]


def test_the_schema_in_the_readme_is_valid_and_names_every_field(tmp_path: Path) -> None:
    readme = (HUB_CONFIGS / "README.md").read_text(encoding="utf-8")
    path = tmp_path / "example.yaml"
    path.write_text(readme.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    repo = load_repo_config(path)
    for name in (*VALID, *repo.vispruner_config):
        assert f"`{name}`" in readme, name


@pytest.mark.parametrize("prefix", ["./", ""])
def test_a_file_is_found_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_yaml(tmp_path)
    assert find_repo_config(f"{prefix}repo.yaml").resolve() == tmp_path / "repo.yaml"


def test_an_unknown_stem_lists_the_known_ones_or_names_the_one_that_was_meant() -> None:
    with pytest.raises(RepoConfigError, match=r"hub_configs; did you mean llava-1\.5-7b-vispruner\?$"):
        load_repo_config("llava-1.5-7b-vispruner-")
    with pytest.raises(RepoConfigError, match=r"the configs are .*tiny-llava-vispruner"):
        load_repo_config("none")


@pytest.mark.parametrize("given", ["absent.yaml", "folder/absent"])
def test_a_path_that_does_not_exist_is_said_to_be_none(given: str) -> None:
    with pytest.raises(RepoConfigError, match=f"{given}: no such file: give the path of a YAML file$"):
        load_repo_config(given)
    with pytest.raises(RepoConfigError, match=r"my/tiny-llava-visprunr.yaml: no such file; did you mean tiny-llava-v"):
        load_repo_config("my/tiny-llava-visprunr.yaml")


BAD_BRANCHES = ["v 64", "-v64", ".v64", "v64.", "v64/", "/v64", "a//b", "a/.b", "a..b", "v64.lock", "a.lock/b", "v~1",
                "v^", "v:64", "v?", "v*", "v[64", "v\\64", "v@{1}", "@", "a\nb", "v64\n", "tüv", "refs/heads/v64",
                "refs/pr/1", "deadbeef", "0123456789abcdef0123456789abcdef01234567"]  # fmt: skip

REFUSED = [
    ({"visual_tokens": 4}, "visual_tokens is not a field: the fields are repo_id"),
    ({"license": "mit"}, "license is not a field here: write it below card"),
    ({"important_ratio": "auto"}, "important_ratio is not a field here: write it below vispruner_config"),
    ({"card": {"seed": 4}}, "card.seed is not a field: the fields are license"),
    ({"base_modle": "a/b"}, "base_modle is not a field.*did you mean base_model"),
    ({"repo_id": ...}, "repo_id is missing: add it"),
    ({"architecture": ...}, "architecture is missing: add it"),
    ({"vispruner_config": ...}, "vispruner_config is missing: add it"),
    ({"base_revision": ...}, "base_revision is missing: give the commit"),
    ({"base_revision": 1234567}, r"base_revision must be text, got 1234567 \(int\): put it in quotes"),
    ({"repo_id": 7}, r"repo_id must be text, got 7 \(int\)"),
    ({"repo_id": "llava-pruned"}, "repo_id must be owner/name"),
    ({"repo_id": "some one/llava"}, "repo_id is not a valid Hub id"),
    ({"architecture": "blip"}, "architecture must be one of .*llava, llava_next.*, got 'blip'"),
    ({"vispruner_config": 128}, "vispruner_config must hold fields"),
    ({"vispruner_config": {}}, "vispruner_config needs a budget"),
    (
        {"vispruner_config": {"visual_token_num": 0}},
        "vispruner_config.visual_token_num must be an integer >= 1, got 0",
    ),
    ({"vispruner_config": {"visual_token_num": -3}}, "visual_token_num must be an integer >= 1, got -3"),
    ({"vispruner_config": {"visual_token_num": "64"}}, "visual_token_num must be an integer >= 1, got '64'"),
    ({"vispruner_config": {"visual_token_num": 64, "keep_ratio": 0.5}}, "exactly one of them"),
    ({"vispruner_config": {"visual_token_nums": 64}}, "unknown fields.*visual_token_nums"),
    ({"vispruner_config": {"method": "best", "visual_token_num": 4}}, "method must be one of .*'none'], got 'best'"),
    (
        {"vispruner_config": {"visual_token_num": 4, "base_model_revision": "main"}},
        "vispruner_config.base_model_revision is written by the build",
    ),
    (
        {"vispruner_config": {"visual_token_num": 4, "weights": "thin"}},
        "vispruner_config.weights is written by the build: set weights beside vispruner_config",
    ),
    (
        {"vispruner_config": {"visual_token_num": 4, "vispruner_version": "1.0"}},
        "vispruner_config.vispruner_version is written by the build: leave it out",
    ),
    ({"weights": "small"}, r"weights must be thin or full, got 'small' \(str\): leave it out"),
    ({"weights": True}, r"weights must be thin or full, got True \(bool\)"),
    ({"base_model": "embedded/tiny-llava"}, "base_model embedded/tiny-llava is not on the Hub.*set weights: full"),
    ({"base_model": "/"}, "base_model / is not on the Hub"),
    ({"budgets": ["v64"]}, "budgets must hold branches, for example {v64"),
    ({"budgets": {64: {"visual_token_num": 64}}}, r"budgets.64 must be text, got 64 \(int\): put it in quotes"),
    ({"budgets": {"main": {"visual_token_num": 64}}}, "budgets.main: .* has the budget of vispruner_config"),
    (
        {"budgets": {"v64": 64}},
        r"budgets.v64 must hold exactly one of visual_token_num, keep_ratio, stage_token_nums, got 64 \(int\)",
    ),
    ({"budgets": {"v64": {}}}, "budgets.v64 must hold exactly one of"),
    ({"budgets": {"v64": {"seed": 4}}}, "budgets.v64 must hold exactly one of"),
    ({"budgets": {"v64": {"visual_token_num": 64, "keep_ratio": 0.5}}}, "budgets.v64 must hold exactly one of"),
    ({"budgets": {"v64": {"visual_token_num": 0}}}, "budgets.v64: .*visual_token_num must be an integer >= 1, got 0"),
    ({"budgets": {"v64": {"visual_token_num": None}}}, "budgets.v64: vispruner_config needs a budget"),
    ({"budgets": {"v64": {"keep_ratio": None}}}, "budgets.v64 has the budget of vispruner_config: give it another"),
    ({"budgets": {"v128": {"visual_token_num": 128}}}, "budgets.v128 has the budget of vispruner_config"),
    (
        {"budgets": {"a": {"keep_ratio": 0.5}, "b": {"keep_ratio": 0.5}}},
        "budgets.b has the budget of budgets.a: give it another one",
    ),
    ({"vispruner_config": {"method": "none"}}, 'budgets.half has no meaning with vispruner_config.method "none"'),
    *(
        ({"budgets": {branch: {"visual_token_num": 64}}}, f"budgets.{re.escape(branch)} is not a good branch name")
        for branch in BAD_BRANCHES
    ),
    ({"card": "llama2"}, "card must hold fields"),
    ({"card": {"licence": "llama2"}}, "card.licence is not a field.*did you mean license"),
    ({"card": {"license": None}}, "card.license must be text"),
    ({"card": {"tags": ["a", 4]}}, r"card.tags must be text, got 4 \(int\)"),
    ({"card": {"citation": 4}}, r"card.citation must be text, got 4 \(int\)"),
    ({"card": {"results": ["a", None]}}, "card.results must be text"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=[reason[:40] for _, reason in REFUSED])
def test_a_wrong_field_is_refused_by_file_and_name(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = write_yaml(tmp_path, **changes)
    with pytest.raises(RepoConfigError, match=f"(?s)repo.yaml: .*{reason}"):
        load_repo_config(path)


@pytest.mark.parametrize("name", ["base_revision", "card"])
def test_an_embedded_base_needs_neither_revision_nor_card(tmp_path: Path, name: str) -> None:
    repo = load_repo_config(write_yaml(tmp_path, base_model="embedded/tiny-llava", weights="full", **{name: ...}))
    assert not getattr(repo, name)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("repo_id: [", "is not valid YAML"),
        ("- repo_id", "must hold the fields repo_id"),
        ("", "must hold the fields repo_id"),
        ("repo_id: a/b\nrepo_id: c/d\n", "repo_id is given twice"),
        ("repo_id: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
        ("base_revision: 2026-02-30\n", "is not valid YAML: day"),
        ("0000-00-00", "is not valid YAML: year"),
        ("weights: !!int x\n", "is not valid YAML"),
        ("weights: !!bool x\n", "is not valid YAML"),
        ("weights: !!timestamp x\n", "is not valid YAML"),
    ],
)
def test_what_is_not_a_mapping_of_fields_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RepoConfigError, match=f"(?s)broken.yaml: .*{reason}"):
        load_repo_config(path)


@pytest.mark.parametrize(
    "text", ["- a\n" * 5000, "a " * 5000, "repo_id: [" + "1, " * 5000 + "]"], ids=["list", "text", "value"]
)
def test_a_wrong_value_never_buries_what_is_said_of_it(tmp_path: Path, text: str) -> None:
    (path := tmp_path / "long.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RepoConfigError, match=r"long.yaml: ") as error:
        load_repo_config(path)
    assert len(str(error.value).replace(str(path), "")) < 300


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.yaml"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(RepoConfigError, match=r"image\.yaml: is not UTF-8 text"):
        load_repo_config(path)
