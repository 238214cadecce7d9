"""Reading and writing checkpoint folders: complete or not at all, and never running what is in them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vispruner.conversion import checkpoint_io
from vispruner.conversion.checkpoint_io import (
    CheckpointError,
    TensorHeader,
    atomic_directory,
    iter_checkpoint_tensors,
    parse_size,
    read_tensor_headers,
    same_tensors,
    write_checkpoint,
)


def some_tensors(count: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{i}.weight": torch.randn(10, 25, generator=generator) for i in range(count)}  # 1000 bytes each


class RunsCode:
    """An object whose unpickling would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def write_bin(folder: Path, shards: int = 1, legacy: bool = False) -> dict[str, torch.Tensor]:
    tensors = some_tensors()
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = {name: tensors[name] for name in names[i::shards]}
        torch.save(part, folder / file, _use_new_zipfile_serialization=not legacy)
        weight_map.update(dict.fromkeys(part, file))
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def assert_same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    read = dict(iter_checkpoint_tensors(folder))
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)


class TestRoundTrip:
    def test_one_shard_has_no_index(self, tmp_path: Path) -> None:
        write_checkpoint(some_tensors().items(), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
        assert_same(tmp_path, some_tensors())

    def test_shards_stay_under_the_limit_and_have_an_index(self, tmp_path: Path) -> None:
        write_checkpoint(some_tensors().items(), tmp_path, max_shard_size="2.5KB")
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == [
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
            "model.safetensors.index.json",
        ]
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 6000
        assert index["weight_map"]["layer.5.weight"] == names[2]
        assert_same(tmp_path, some_tensors())

    def test_a_tensor_over_the_limit_gets_a_shard_of_its_own(self, tmp_path: Path) -> None:
        write_checkpoint(some_tensors(3).items(), tmp_path, max_shard_size=10)
        assert len(list(tmp_path.glob("*.safetensors"))) == 3

    def test_files_are_readable_like_any_other(self, tmp_path: Path) -> None:
        write_checkpoint(some_tensors().items(), tmp_path)
        (tmp_path / "plain").touch()
        assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode

    def test_shared_and_strided_tensors_are_written_out(self, tmp_path: Path) -> None:
        base = torch.arange(12.0).reshape(3, 4)
        tensors = {"tied.a": base, "tied.b": base, "turned": base.T, "scalar": torch.tensor(2.0)}
        write_checkpoint(tensors.items(), tmp_path)
        assert_same(tmp_path, tensors)

    def test_a_name_given_twice_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"tensor a was given twice"):
            write_checkpoint([("a", torch.zeros(1)), ("a", torch.ones(1))], tmp_path)

    @pytest.mark.parametrize("shards", [1, 3])
    @pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before-torch-1.6"])
    def test_bin_files_are_read(self, tmp_path: Path, shards: int, legacy: bool) -> None:
        assert_same(tmp_path, write_bin(tmp_path, shards, legacy))

    def test_safetensors_win_over_bin(self, tmp_path: Path) -> None:
        write_bin(tmp_path)
        write_checkpoint([("only", torch.ones(2))], tmp_path)
        assert read_tensor_headers(tmp_path) == {"only": TensorHeader((2,), torch.float32, "model.safetensors")}

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn])
    def test_headers_tell_shape_dtype_and_file(self, tmp_path: Path, dtype: torch.dtype) -> None:
        tensor = torch.zeros(2, 3).to(dtype)
        for folder, write in ((tmp_path / "a", save_file), (tmp_path / "b", torch.save)):
            folder.mkdir()
            file = "model.safetensors" if write is save_file else "pytorch_model.bin"
            write({"x": tensor}, folder / file)
            assert read_tensor_headers(folder) == {"x": TensorHeader((2, 3), dtype, file)}

    def test_same_tensors_compares_bits(self, tmp_path: Path) -> None:
        tensors = {**some_tensors(), "nan": torch.tensor([float("nan")]), "flag": torch.tensor(True)}
        write_checkpoint(tensors.items(), tmp_path, max_shard_size=1500)
        assert same_tensors(tensors.items(), tmp_path)
        assert not same_tensors(list(tensors.items())[:-1], tmp_path)
        assert not same_tensors({**tensors, "more": torch.zeros(1)}.items(), tmp_path)
        assert not same_tensors({**tensors, "flag": torch.tensor(False)}.items(), tmp_path)
        assert not same_tensors({**tensors, "flag": torch.tensor(1)}.items(), tmp_path)


class TestBrokenFolders:
    """Each is refused by the header pass already, so before anything is written anywhere."""

    def refused(self, folder: Path, match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            read_tensor_headers(folder)
        with pytest.raises(CheckpointError, match=match):
            next(iter_checkpoint_tensors(folder))

    def sharded(self, folder: Path) -> Path:
        write_checkpoint(some_tensors().items(), folder, max_shard_size=2500)
        return folder / "model.safetensors.index.json"

    def test_no_weights(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "holds no weights")

    def test_shards_without_index(self, tmp_path: Path) -> None:
        self.sharded(tmp_path).unlink()
        self.refused(tmp_path, r"model-00001-of-00003\.safetensors \.\.\.\) but no index")

    def test_missing_shard_is_named(self, tmp_path: Path) -> None:
        self.sharded(tmp_path)
        (tmp_path / "model-00002-of-00003.safetensors").unlink()
        self.refused(tmp_path, r"incomplete: .* names model-00002-of-00003\.safetensors, which is not there")

    def test_shard_that_lacks_what_the_index_promises(self, tmp_path: Path) -> None:
        self.sharded(tmp_path)
        save_file({"layer.2.weight": torch.zeros(1)}, tmp_path / "model-00002-of-00003.safetensors")
        self.refused(tmp_path, r"model-00002.* lacks layer\.3\.weight")

    def test_shard_with_more_than_the_index_says(self, tmp_path: Path) -> None:
        index = self.sharded(tmp_path)
        content = json.loads(index.read_text())
        del content["weight_map"]["layer.3.weight"]
        index.write_text(json.dumps(content))
        self.refused(tmp_path, r"also holds layer\.3\.weight")

    @pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/etc/passwd", "shard.txt", 3])
    def test_index_that_points_elsewhere(self, tmp_path: Path, file: object) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
        self.refused(tmp_path, "weight_map names")

    @pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": {}}'])
    def test_index_that_is_none(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(text)
        self.refused(tmp_path, r"model\.safetensors\.index\.json")

    @pytest.mark.parametrize("keep", [0, 5, 40, -1])
    def test_truncated_safetensors_is_named(self, tmp_path: Path, keep: int) -> None:
        write_checkpoint(some_tensors().items(), tmp_path)
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        self.refused(tmp_path, r"model\.safetensors is truncated or not a safetensors file")

    @pytest.mark.parametrize("legacy", [False, True])
    @pytest.mark.parametrize("keep", [0, 100, -200])
    def test_truncated_bin_is_named(self, tmp_path: Path, keep: int, legacy: bool) -> None:
        write_bin(tmp_path, legacy=legacy)
        path = tmp_path / "pytorch_model.bin"
        path.write_bytes(path.read_bytes()[:keep])
        self.refused(
            tmp_path, r"pytorch_model\.bin is (truncated or not a PyTorch checkpoint|refused: its list of contents)"
        )

    def test_git_lfs_pointer_instead_of_weights(self, tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
        self.refused(tmp_path, "is (truncated or not a PyTorch checkpoint|refused: its list of contents)")

    @pytest.mark.parametrize("legacy", [False, True])
    def test_pickle_with_code_is_refused_and_not_run(self, tmp_path: Path, legacy: bool) -> None:
        victim = tmp_path / "executed"
        torch.save({"a": RunsCode(victim)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        self.refused(tmp_path, r"pytorch_model\.bin is refused: .* nothing of it was executed")
        assert not victim.exists()

    @pytest.mark.parametrize("content", [[1, 2], {}, {"state_dict": {"a": torch.zeros(1)}}, {"step": 3}])
    def test_bin_that_is_no_dict_of_tensors(self, tmp_path: Path, content: object) -> None:
        torch.save(content, tmp_path / "pytorch_model.bin")
        self.refused(tmp_path, r"pytorch_model\.bin.*(must hold a dict of tensors|is not a dense tensor)")


class TestAtomicDirectory:
    def test_it_appears_only_when_the_block_is_done(self, tmp_path: Path) -> None:
        final = tmp_path / "new" / "parents" / "out"
        with atomic_directory(final) as work:
            (work / "file").write_text("x")
            assert not final.exists()
            assert work.parent == final.parent
        assert [path.name for path in final.parent.iterdir()] == ["out"]
        assert [path.name for path in final.iterdir()] == ["file"]

    def test_an_empty_destination_is_taken(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with atomic_directory(tmp_path / "out") as work:
            (work / "file").touch()
        assert (tmp_path / "out" / "file").exists()

    def test_a_filled_destination_is_refused_and_kept(self, tmp_path: Path) -> None:
        (tmp_path / "old").touch()
        with pytest.raises(CheckpointError, match="not empty"), atomic_directory(tmp_path):
            pass
        assert os.listdir(tmp_path) == ["old"]

    def test_overwrite_replaces_everything(self, tmp_path: Path) -> None:
        final = tmp_path / "out"
        final.mkdir()
        (final / "old").touch()
        with atomic_directory(final, overwrite=True) as work:
            (work / "new").touch()
        assert os.listdir(final) == ["new"]
        assert os.listdir(tmp_path) == ["out"]

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
    def test_a_failure_leaves_everything_as_it_was(self, tmp_path: Path, error: type[BaseException]) -> None:
        final = tmp_path / "kept"
        final.mkdir()
        (final / "old").write_text("old")
        for destination in (final, tmp_path / "never" / "made"):
            with pytest.raises(error), atomic_directory(destination, overwrite=True) as work:
                (work / "half").touch()
                raise error
        assert os.listdir(tmp_path) == ["kept"]
        assert (final / "old").read_text() == "old"

    def test_a_failed_swap_restores_the_old_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        final = tmp_path / "out"
        final.mkdir()
        (final / "old").touch()
        replace = os.replace

        def refuse_new(source: Path, target: Path) -> None:
            if ".incomplete-" in str(source):
                raise OSError(errno.EIO, "Input/output error", str(source))
            replace(source, target)

        monkeypatch.setattr(checkpoint_io.os, "replace", refuse_new)
        with pytest.raises(CheckpointError, match=r"cannot write .*Input/output error"):  # noqa: SIM117
            with atomic_directory(final, overwrite=True):
                pass
        assert os.listdir(tmp_path) == ["out"]
        assert os.listdir(final) == ["old"]

    def test_a_destination_filled_meanwhile_is_kept(self, tmp_path: Path) -> None:
        final = tmp_path / "out"
        with pytest.raises(CheckpointError, match="in the meantime"), atomic_directory(final) as work:
            (work / "ours").touch()
            final.mkdir()
            (final / "theirs").touch()
        assert os.listdir(tmp_path) == ["out"]
        assert os.listdir(final) == ["theirs"]

    def test_what_a_killed_run_left_is_removed(self, tmp_path: Path) -> None:
        stale = tmp_path / ".out.incomplete-0123abcd"
        stale.mkdir()
        (stale / "half").touch()
        foreign = tmp_path / ".other.incomplete-0123abcd"
        foreign.mkdir()
        with atomic_directory(tmp_path / "out"):
            assert not stale.exists()
        assert foreign.exists()

    def test_the_folder_of_a_live_run_is_kept(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="in the meantime"), atomic_directory(tmp_path / "out") as first:
            (first / "a").touch()
            with atomic_directory(tmp_path / "out") as second:
                (second / "b").touch()
                assert first.exists()
        assert os.listdir(tmp_path / "out") == ["b"]
        assert os.listdir(tmp_path) == ["out"]

    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match="is not a folder"), atomic_directory(tmp_path / "file"):
            pass
        with pytest.raises(CheckpointError, match="cannot write"), atomic_directory(tmp_path / "file" / "out"):
            pass

    @pytest.mark.parametrize(
        ("number", "told"),
        [(errno.ENOSPC, "no space left to write"), (errno.EACCES, "no permission to write"), (errno.EROFS, "no perm")],
    )
    def test_write_errors_are_put_into_words(self, tmp_path: Path, number: int, told: str) -> None:
        with pytest.raises(CheckpointError, match=told), atomic_directory(tmp_path / "a" / "out") as work:
            (work / "half").touch()
            raise OSError(number, os.strerror(number), str(work / "half"))
        assert os.listdir(tmp_path) == []

    def test_no_permission_for_the_folder_itself(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: Path, *args: object, **kwargs: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(Path, "mkdir", refuse)
        with pytest.raises(CheckpointError, match="no permission to write"), atomic_directory(tmp_path / "a" / "out"):
            pass

    def test_trouble_with_an_input_is_not_blamed_on_the_output(self, tmp_path: Path) -> None:
        with pytest.raises(PermissionError, match="input"), atomic_directory(tmp_path / "out"):
            raise PermissionError(errno.EACCES, "Permission denied", "/some/input")
        assert os.listdir(tmp_path) == []

    def test_safetensors_errors_keep_their_number(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="No such file") as caught:
            write_checkpoint(some_tensors().items(), tmp_path / "missing")
        assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 kb", 1500), (7, 7), ("12B", 12), ("1TB", 10**12)]
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-1GB", 0, "0B", None, True])
def test_sizes_that_are_none(text: object) -> None:
    with pytest.raises(ValueError, match="max_shard_size"):
        parse_size(text)  # type: ignore[arg-type]
