"""YAML files and config.json that would hang a reader, or say something else than they seem to."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attack import Attack, write_yaml

from vispruner.conversion import layout_worker, verify
from vispruner.conversion.build import build_repo
from vispruner.conversion.checkpoint_io import read_tensor_headers
from vispruner.conversion.repo_config import RepoConfigError, load_repo_config
from vispruner.conversion.verify import verify_repo

# The YAML


def laughs(levels: int = 30) -> str:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, levels)]
    return "\n".join(lines) + f"\nrepo_id: *a{levels - 1}\n"


def laughs_in_one_field(levels: int = 30) -> str:
    parts = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, levels)]
    return "repo_id: {" + ", ".join(parts) + "}\n"


YAMLS = [
    (laughs_in_one_field(), r"\*a0 stands for something else: write it out"),
    (laughs(), r"\*a0 stands for something else: write it out"),
    ("repo_id: &a [*a]\n", r"\*a stands for something else"),
    ("repo_id: " + "[" * 100_000, "is nested more than 16 levels deep"),
    ("repo_id: " + "{a: " * 50_000, "is nested more than 16 levels deep"),
    ("- " * 50_000, "is nested more than 16 levels deep"),
    ("repo_id: " + "x" * 2**18, "is larger than 0.25 MiB"),
    ("repo_id: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
]


@pytest.mark.parametrize(("text", "message"), YAMLS, ids=[text[:24] for text, _ in YAMLS])
def test_a_hostile_yaml_is_refused_before_it_is_put_together(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(text)
    with pytest.raises(RepoConfigError, match=f"(?s)hostile.yaml: .*{message}"):
        load_repo_config(path)


@pytest.mark.parametrize("name", ["mallory/x](http://evil)", "a`b", "<script>", "x\n## Trusted", "a|b", "\x1b[2J"])
def test_the_name_of_a_base_is_nothing_but_a_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(RepoConfigError, match="base_model must be a Hub id"):
        load_repo_config(write_yaml(tmp_path, base_model=name))


@pytest.mark.parametrize("revision", ["main`", "x](http://evil)", "a b", "<b>", "main\n", "../main", "\x1b[2J", "-x"])
def test_a_revision_is_nothing_but_a_revision(revision: str, tmp_path: Path) -> None:
    with pytest.raises(RepoConfigError, match="base_revision must be a commit, a branch or a tag"):
        load_repo_config(write_yaml(tmp_path, base_revision=revision))


def test_a_folder_s_name_says_nothing_in_a_card(tiny_llava_repo: Path, tmp_path: Path) -> None:
    """What a link is called need not be what the folder is called."""
    folder = tmp_path / "x` [click](http:evil) <b>"
    shutil.copytree(tiny_llava_repo, folder)
    (tmp_path / "link").symlink_to(folder)
    config = write_yaml(tmp_path, base_model=str(tmp_path / "link"), base_revision=None)
    card = (build_repo(config, tmp_path / "out", show_progress=False) / "README.md").read_text()
    assert "](http:evil)" not in card and "<b>" not in card
    assert "`x_ _click__http_evil_ _b_`" in card


# config.json: verify never raises


def with_value(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            config = config[name]
        config[last] = value

    return change


VALUES = [None, [], {}, "x", -1, 0, 1.5, True, 10**30, [[1]], {"a": 1}]
NAMES = [
    "model_type",
    "architectures",
    "auto_map",
    "vispruner_config",
    "vispruner_config.method",
    "vispruner_config.weights",
    "vispruner_config.codebook",
    "vispruner_config.text_tower",
    "vispruner_config.visual_token_num",
    "vispruner_config.base_model_name_or_path",
]
FITTING = {
    "vispruner_config.codebook": [None],
    "vispruner_config.text_tower": [None],
    "vispruner_config.visual_token_num": [10**30],  # more than there are: all are kept
    "vispruner_config.base_model_name_or_path": [None, "x"],
}
MODEL_NAMES = [
    "text_config",
    "vision_config",
    "text_config.model_type",
    "text_config.num_attention_heads",
    "text_config.num_hidden_layers",
    "text_config.vocab_size",
    "text_config.hidden_act",
    "text_config.rope_parameters",
    "vision_config.patch_size",
    "vision_config.hidden_size",
    "vision_feature_layer",
    "dtype",
    "image_token_index",
]


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that loads is not started: what is tested is what comes before."""
    monkeypatch.setattr(verify, "_run_worker", lambda *arguments: [])


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.core
def test_verify_refuses_what_its_own_fields_cannot_hold_and_never_raises(
    name: str, good_repo: Path, attack_on: Callable[[Path], Attack]
) -> None:
    attack = attack_on(good_repo)
    before = (attack.repo / "config.json").read_text()
    for value in VALUES:
        config = json.loads(before)
        with_value(name, value)(config)
        (attack.repo / "config.json").write_text(json.dumps(config))
        report = verify_repo(attack.repo)
        assert report.table().splitlines()[-1].startswith(("verified", "refused"))
        assert report.passed == (value in FITTING.get(name, [])), (value, report.table())


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_whatever_a_config_asks_for_is_answered(name: str, good_repo: Path, tmp_path: Path) -> None:
    """What verify runs in a process of its own, here in this one because a process takes seconds to start."""
    shapes = {tensor: header.shape for tensor, header in read_tensor_headers(good_repo).items()}
    settings, results = tmp_path / "settings.json", tmp_path / "results.json"
    for value in VALUES:
        if name.endswith("layers") and value == 10**30:
            continue  # see below
        config = json.loads((good_repo / "config.json").read_text())
        with_value(name, value)(config)
        settings.write_text(json.dumps({"config": config, "shapes": shapes}))
        layout_worker.main(str(settings), str(results))
        (kind,) = json.loads(results.read_text())
        assert kind in ("facts", "error")


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_value("text_config.num_attention_heads", 0), "config.json describes no model: "),
        (with_value("text_config.num_hidden_layers", 10**7), "config.json describes no model: no end after 8 s"),
    ],
    ids=["no heads", "endless layers"],
)
@pytest.mark.core
def test_the_time_limit_covers_the_model_that_a_config_asks_for(
    change: Callable[[dict[str, Any]], None],
    message: str,
    good_repo: Path,
    attack_on: Callable[[Path], Attack],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attack = attack_on(good_repo)
    config = json.loads((attack.repo / "config.json").read_text())
    change(config)
    (attack.repo / "config.json").write_text(json.dumps(config))
    if "no end" in message:
        monkeypatch.setattr(verify, "LAYOUT_TIMEOUT", 8)
    (failure,) = verify_repo(attack.repo).failures
    assert (failure.name, failure.detail[: len(message)]) == ("weights", message)


TEXTS = {
    "not an object": "[]",
    "not JSON": "{",
    "deep": "[" * 10**5,
    "deep object": '{"a":' * 10**5,
    "a long number": '{"a": ' + "1" * 10**5 + "}",
    "UTF-16": json.dumps({"model_type": "llava"}).encode("utf-16").decode("latin-1"),
    "empty": "",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_config_that_is_none_is_refused(text: str, good_repo: Path, attack_on: Callable[[Path], Attack]) -> None:
    attack = attack_on(good_repo)
    (attack.repo / "config.json").write_bytes(text.encode("latin-1"))
    (failure,) = verify_repo(attack.repo).failures
    assert failure.name == "config.json"
    assert re.search("is not valid JSON|must hold a JSON object|model_type is None", failure.detail)
