"""Attacks that failed from the start, and must go on failing."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from attack import Attack, refusal_unloaded, write_yaml
from transformers import AutoProcessor

from vispruner.conversion.checkpoint_io import CheckpointError, read_tensor_headers
from vispruner.conversion.model_card import model_card
from vispruner.conversion.repo_config import RepoConfigError, load_repo_config


class Leaving:
    """What a pickle runs when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def more_code(attack: Attack) -> None:
    attack.write_code(attack.repo, "setup.py")


def altered_code(attack: Attack) -> None:
    with (attack.repo / "token_selection.py").open("a") as file:
        file.write(attack.code)


def pickle_beside_the_weights(attack: Attack) -> None:
    torch.save({"x": Leaving(attack.mark)}, attack.repo / "pytorch_model.bin")


def pickle_as_the_weights(attack: Attack) -> None:
    (attack.repo / "model.safetensors").write_bytes(pickle.dumps(Leaving(attack.mark)))


def zip_as_the_weights(attack: Attack) -> None:
    torch.save({"x": Leaving(attack.mark)}, attack.repo / "model.safetensors")


def index_out_of_the_folder(attack: Attack) -> None:
    (attack.repo / "model.safetensors").rename(attack.repo.parent / "model.safetensors")
    names = dict.fromkeys(["lm_head.weight"], "../model.safetensors")
    (attack.repo / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def header_that_lies(attack: Attack) -> None:
    header = {"lm_head.weight": {"dtype": "F32", "shape": [512, 64], "data_offsets": [0, 2**40]}}
    text = json.dumps(header).encode()
    (attack.repo / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


def header_of_any_length(attack: Attack) -> None:
    (attack.repo / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")


HELD: list[tuple[Callable[[Attack], None], str]] = [
    (more_code, "setup.py is not one of the package's files"),
    (altered_code, "token_selection.py differs from the installed package's"),
    (pickle_beside_the_weights, "pytorch_model.bin can run code when loaded"),
    (pickle_as_the_weights, "model.safetensors is truncated or not a safetensors file"),
    (zip_as_the_weights, "model.safetensors is truncated or not a safetensors file"),
    (index_out_of_the_folder, "weight_map names '../model.safetensors'"),
    (header_that_lies, "model.safetensors is truncated or not a safetensors file"),
    (header_of_any_length, "model.safetensors is truncated or not a safetensors file"),
]


@pytest.mark.core
@pytest.mark.parametrize(("spoil", "message"), HELD, ids=[spoil.__name__ for spoil, _ in HELD])
def test_a_folder_is_refused_without_being_loaded(
    spoil: Callable[[Attack], None],
    message: str,
    good_repo: Path,
    attack_on: Callable[[Path], Attack],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert message in refusal_unloaded(spoil, good_repo, attack_on, monkeypatch)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("place", ["value", "key", "whole"])
def test_a_pickle_of_a_base_runs_nothing(
    place: str, legacy: bool, good_repo: Path, attack_on: Callable[[Path], Attack], tmp_path: Path
) -> None:
    attack = attack_on(good_repo)
    evil = Leaving(attack.mark)
    content: Any = {"value": {"x": evil}, "key": {("x", evil): torch.zeros(1)}, "whole": evil}[place]
    folder = tmp_path / "base"
    folder.mkdir()
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is refused"):
        read_tensor_headers(folder)


def test_a_zip_writes_nothing_out_of_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "base"
    folder.mkdir(parents=True)
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")
    with zipfile.ZipFile(folder / "pytorch_model.bin", "a") as archive:
        archive.writestr("../../evil", "x")
    before = sorted(tmp_path.rglob("*"))
    with contextlib.suppress(CheckpointError):
        read_tensor_headers(folder)
    assert sorted(tmp_path.rglob("*")) == before


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{% set x = messages.__class__.__base__ %}{{ x.__subclasses__() }}",
    "{{ (messages | attr('__class__')).__mro__ }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_reaches_nothing(template: str, good_repo: Path, attack_on: Callable[[Path], Attack]) -> None:
    attack = attack_on(good_repo)
    (attack.repo / "chat_template.jinja").write_text(template.replace("MARK", str(attack.mark)))
    processor = AutoProcessor.from_pretrained(attack.repo)
    with pytest.raises(Exception, match=r"unsafe|undefined"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "?"}]}])


@pytest.mark.parametrize(
    "card",
    [
        {"license": "{{ 7 * 7 }}"},
        {"license": "mit", "tags": ["x: y", "---"]},
        {"license": "---"},
        {"license": "mit", "license_name": "base_model: evil/evil"},
    ],
    ids=["jinja", "tags", "end of front matter", "entry"],
)
def test_a_card_s_metadata_holds_what_was_given_and_no_more(card: dict[str, Any], tmp_path: Path) -> None:
    text = model_card(load_repo_config(write_yaml(tmp_path, card=card)), None, thin=False)
    found = re.match(r"---\n(.*?)^---\n(.*)", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    front, body = found.groups()
    metadata = yaml.safe_load(front)
    assert metadata["license"] == card["license"]
    assert metadata["base_model"] == "llava-hf/tiny" and metadata["library_name"] == "transformers"
    assert "49" not in text and body.startswith("\n# pruned\n")


@pytest.mark.parametrize("name", ["license", "license_name", "license_link", "language", "tags"])
def test_a_card_s_metadata_is_one_line_each(name: str, tmp_path: Path) -> None:
    with pytest.raises(RepoConfigError, match=rf"card\.{name} must be one line"):
        load_repo_config(write_yaml(tmp_path, card={name: "mit\n---\n\n# Trusted"}))


def test_a_note_is_text_and_no_template(tmp_path: Path) -> None:
    card = {"license": "mit", "note": "{{ 7 * 7 }} {% include '/etc/passwd' %}"}
    text = model_card(load_repo_config(write_yaml(tmp_path, card=card)), None, thin=False)
    assert "{{ 7 * 7 }} {% include '/etc/passwd' %}" in text


@pytest.mark.parametrize(
    "text",
    [
        "repo_id: !!python/object/apply:os.system [touch x]\n",
        "repo_id: !!python/name:os.system\n",
        "repo_id: a/b\nrepo_id: c/d\n",
        "budgets: {'../x': {visual_token_num: 1}}\n",
    ],
)
def test_yaml_makes_no_objects_and_hides_no_field(text: str, tmp_path: Path) -> None:
    path = write_yaml(tmp_path)
    path.write_text((path.read_text() if text.startswith("budgets") else "") + text)
    with pytest.raises(RepoConfigError):
        load_repo_config(path)
