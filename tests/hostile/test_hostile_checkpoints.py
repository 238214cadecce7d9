"""Checkpoints that would take any time or memory, lead out of their folder, or hold less than they say."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attack import write_yaml

from vispruner.conversion import checkpoint_io, convert
from vispruner.conversion.base_checkpoint import BuildError
from vispruner.conversion.build import build_repo
from vispruner.conversion.checkpoint_io import CheckpointError, read_tensor_headers
from vispruner.conversion.convert import convert_llava
from vispruner.conversion.published_layout import LayoutError

DATA = Path(__file__).parent.parent / "data" / "original_llava"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An original LLaVA checkpoint to be spoiled."""
    folder = Path(shutil.copytree(DATA / "llava-v1.5-tiny", tmp_path / "source"))
    shutil.copy(DATA / "tokenizer.model", folder)
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def zip_with(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", b"3\n")


def compressed_zip(source: Path) -> None:
    zip_with(source / "pytorch_model.bin", b"\x80\x02" + b"]" * 10**8 + b".", zipfile.ZIP_DEFLATED)
    assert (source / "pytorch_model.bin").stat().st_size < 10**6


def many_marks_in_a_zip(source: Path) -> None:
    zip_with(source / "pytorch_model.bin", b"\x80\x02" + b"(" * 5 * 10**7)


def many_marks_under_a_name_in_capitals(source: Path) -> None:
    """torch finds it; a look at the names that end in .pkl does not."""
    with zipfile.ZipFile(source / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/DATA.PKL", b"\x80\x02" + b"(" * 10**6)
        archive.writestr("archive/version", b"3\n")


def two_archives_in_one(source: Path) -> None:
    """Records at the end by which torch finds the first archive and Python's zipfile the second one."""
    path = source / "pytorch_model.bin"
    zip_with(path, b"\x80\x02" + b"(" * 10**6)
    first = path.read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/x.txt", b"x" * 10**7)
    second = path.read_bytes()
    end = struct.Struct("<4s4H2IH")
    (_, _, _, _, count, length, start, _), rest = end.unpack(first[-end.size :]), first[: -end.size]
    (_, _, _, _, other_count, other_length, other_start, _) = end.unpack(second[-end.size :])
    listing = bytearray(second[other_start : other_start + other_length])
    struct.pack_into("<I", listing, 42, len(rest))
    body = rest + second[:other_start]
    large = struct.Struct("<4sQ2H2I4Q")
    true = large.pack(b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)
    there = len(body + true)
    shown = large.pack(b"PK\6\6", 44, 45, 45, 0, 0, other_count, other_count, other_length, there)
    records = struct.pack("<4sIQI", b"PK\6\7", 0, len(body), 1)
    records += end.pack(b"PK\5\6", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0)
    path.write_bytes(body + true + bytes(listing) + shown + records)
    assert zipfile.ZipFile(path).namelist() == ["archive/x.txt"]


def pickle_that_takes_from_nothing(source: Path) -> None:
    zip_with(source / "pytorch_model.bin", b"\x80\x02(.")


def many_marks(source: Path) -> None:
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    (source / "pytorch_model.bin").write_bytes(head + b"\x80\x02" + b"(" * 5 * 10**7)


def one_endless_string(source: Path) -> None:
    size = 2**27
    data = b"\x80\x02X" + size.to_bytes(4, "little") + b"a" * size + b"."
    (source / "pytorch_model.bin").write_bytes(data)


def tensor_of_a_billion(source: Path) -> None:
    torch.save({"lm_head.weight": torch.zeros(1).expand(10**9)}, source / "pytorch_model.bin")


def pipe_for_the_config(source: Path) -> None:
    (source / "config.json").unlink()
    os.mkfifo(source / "config.json")


def pipe_for_the_tokenizer(source: Path) -> None:
    (source / "tokenizer_config.json").unlink()
    os.mkfifo(source / "tokenizer_config.json")


def device_for_the_tokenizer(source: Path) -> None:
    (source / "special_tokens_map.json").unlink()
    (source / "special_tokens_map.json").symlink_to("/dev/zero")


def endless_tokenizer(source: Path) -> None:
    with (source / "tokenizer.json").open("wb") as file:
        file.truncate(2**27)


def empty_tokenizer(source: Path) -> None:
    (source / "tokenizer.model").write_bytes(b"")


def deep_config(source: Path) -> None:
    (source / "config.json").write_text("[" * 10**5)


def tower_up_the_tree(source: Path) -> None:
    edit(source / "config.json", mm_vision_tower="../../../etc")


def tower_in_a_folder(source: Path) -> None:
    edit(source / "config.json", mm_vision_tower=str(DATA / "clip"))


def endless_layers(source: Path) -> None:
    edit(source / "config.json", num_hidden_layers=10**7)


def deep_pinpoints(source: Path) -> None:
    shutil.copytree(DATA / "llava-v1.6-tiny", source, dirs_exist_ok=True)
    edit(source / "config.json", image_grid_pinpoints="[" * 10**4)


CHECKPOINTS: list[tuple[Callable[[Path], None], str]] = [
    (compressed_zip, "it is compressed, as torch writes no checkpoint"),
    (many_marks_in_a_zip, "its pickle holds far more than tensors need"),
    (many_marks_under_a_name_in_capitals, "its pickle holds far more than tensors need"),
    (two_archives_in_one, "its list of contents is not where torch puts it"),
    (pickle_that_takes_from_nothing, "is truncated or not a PyTorch checkpoint"),
    (many_marks, "its pickle holds far more than tensors need"),
    (one_endless_string, "its pickle holds far more than tensors need"),
    (tensor_of_a_billion, "claims 1000000000 values, and the file holds fewer"),
    (pipe_for_the_config, "config.json is not a regular file"),
    (pipe_for_the_tokenizer, "tokenizer_config.json is not a regular file"),
    (device_for_the_tokenizer, "special_tokens_map.json is not a regular file"),
    (endless_tokenizer, "tokenizer.json is larger than 64 MiB"),
    (empty_tokenizer, "has 3 tokens, and config.vocab_size is 400: tokenizer.model is empty"),
    (deep_config, "config.json is not valid JSON"),
    (tower_up_the_tree, "config.mm_vision_tower is '../../../etc', which is no Hub id.*--vision-tower"),
    (tower_in_a_folder, "which is no Hub id.*--vision-tower"),
    (endless_layers, "asks for num_hidden_layers 10000000, and the weights are"),
    (deep_pinpoints, "image_grid_pinpoints must be a list of pairs"),
]


@pytest.mark.parametrize(("spoil", "message"), CHECKPOINTS, ids=[spoil.__name__ for spoil, _ in CHECKPOINTS])
def test_a_hostile_checkpoint_is_refused_and_leaves_nothing(
    spoil: Callable[[Path], None], message: str, source: Path, tmp_path: Path
) -> None:
    spoil(source)
    tower = None if spoil in (tower_up_the_tree, tower_in_a_folder) else DATA / "clip"
    with pytest.raises(CheckpointError, match=message):
        convert_llava(source, tmp_path / "out", tower)
    assert not (tmp_path / "out").exists()


def test_a_folder_is_not_taken_for_the_tower_that_a_config_names(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(DATA / "clip", tmp_path / "openai" / "clip")
    monkeypatch.chdir(tmp_path)
    edit(source / "config.json", mm_vision_tower="openai/clip")
    asked: list[str] = []
    monkeypatch.setattr(convert, "snapshot_download", lambda name, allow_patterns: asked.append(name) or DATA / "clip")
    convert_llava(source, tmp_path / "out", show_progress=False)
    assert asked == ["openai/clip"]


@pytest.mark.core
def test_checkpoints_of_real_size_are_far_below_the_limits(tmp_path: Path) -> None:
    """A shard of a thousand tensors, more than any file of a published checkpoint holds."""
    tensors = {f"model.layers.{number}.self_attn.q_proj.weight": torch.zeros(1) for number in range(1000)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert read_tensor_headers(tmp_path).keys() == tensors.keys()
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert read_tensor_headers(tmp_path).keys() == tensors.keys()
    with zipfile.ZipFile(io.BytesIO(_zipped(tensors))) as archive:
        opcodes = sum(1 for _ in checkpoint_io.pickletools.genops(archive.read("archive/data.pkl")))
    assert opcodes * 10 < checkpoint_io.MOST_OPCODES


def _zipped(tensors: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def pipe_in_the_base(base: Path) -> None:
    os.mkfifo(base / "vocab.txt")


def endless_layers_in_the_base(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    edit(base / "config.json", text_config={**config["text_config"], "num_hidden_layers": 10**7})


def endless_layers_by_another_name_in_the_base(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    edit(base / "config.json", text_config={**config["text_config"], "model_type": "gpt2", "n_layer": 10**7})


def shard_that_moves_the_cursor(base: Path) -> None:
    (base / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "\x1b[2J.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def deep_settings_in_the_base(base: Path) -> None:
    nested: dict[str, Any] = {}
    for _ in range(100):
        nested = {"a": nested}
    edit(base / "tokenizer_config.json", nested=nested)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (pipe_in_the_base, "vocab.txt is not a regular file"),
        (endless_layers_in_the_base, "asks for num_hidden_layers 10000000"),
        (endless_layers_by_another_name_in_the_base, "asks for n_layer 10000000"),
        (shard_that_moves_the_cursor, r"weight_map names '\\x1b\[2J.safetensors', which is not"),
        (deep_settings_in_the_base, "is nested more than 32 levels deep"),
    ],
)
def test_a_hostile_base_is_refused_and_leaves_nothing(
    spoil: Callable[[Path], None], message: str, tiny_llava_repo: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_llava_repo, tmp_path / "base"))
    spoil(base)
    with pytest.raises((BuildError, CheckpointError, LayoutError), match=message):
        build_repo(write_yaml(tmp_path), tmp_path / "out", base=base, thin=False, show_progress=False)
    assert not (tmp_path / "out").exists()
