"""Read and write checkpoint folders: shard by shard, complete or not at all.

Reading checks what an index promises against what the files hold, never runs code from a pickle, and keeps one tensor
(safetensors) or one memory-mapped shard (.bin) open at a time. Writing collects one shard, and `atomic_directory`
lets a folder appear under its name only when everything in it has been written.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import pickle
import pickletools
import re
import secrets
import shutil
import stat
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

try:
    import fcntl
except ImportError:  # Windows has no flock; left-over folders of killed runs are then not recognised
    fcntl = None  # type: ignore[assignment]

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Not to wait, as for a pipe until somebody writes into it; and, on Windows, bytes as they are.
READ_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
MOST_BYTES = 2**26  # of a file that is read whole: tokenizers of the largest vocabularies take half of it
READ_WHOLE = (".json", ".jinja", ".model", ".txt", ".md")
# Of a pickle of tensors, which takes about forty to describe each.
MOST_OPCODES = 2**19
# The records that close a zip: in a large one another and where that one is, then the one that all have.
ZIP64_RECORDS, ZIP_RECORD = struct.Struct("<4sQ2H2I4Q4sIQI"), struct.Struct("<4s4H2IH")
SHARD_PATTERN = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
SHARD_NAME = re.compile(r"\w[\w.+-]*\.(safetensors|bin)", re.ASCII)
SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be read, is not what it says, or cannot be written."""


@dataclass(frozen=True)
class TensorHeader:
    """What a checkpoint says about one tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str


def read_regular(path: str | Path, limit: int = MOST_BYTES) -> bytes:
    """Read a small file whole; CheckpointError for one that is missing, larger, or a pipe or a device."""
    path = Path(path)
    try:
        with os.fdopen(os.open(path, READ_FLAGS), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CheckpointError(f"{path} is not a regular file")
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is not a regular file") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > limit:
        raise CheckpointError(f"{path} is larger than {limit / 2**20:g} MiB, which no such file is")
    return content


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """Return the JSON object in the bytes of a file; CheckpointError names the file."""
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got a {type(value).__name__}")
    return value


def read_json(path: str | Path, limit: int = MOST_BYTES) -> dict[str, Any]:
    """Read a JSON object; a file that is missing, unreadable or something else raises a `CheckpointError`."""
    return parse_json(read_regular(path, limit), Path(path))


def require_readable(folder: str | Path) -> None:
    """Raise CheckpointError for what could be read without end: pipes, devices, and settings of absurd size."""
    for path in sorted(Path(folder).iterdir()):
        try:
            found = path.stat()
        except OSError:  # a link to nothing
            continue
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise CheckpointError(f"{path} is not a regular file")
        if found.st_size > MOST_BYTES and path.suffix in READ_WHOLE:
            raise CheckpointError(f"{path} is larger than {MOST_BYTES / 2**20:g} MiB, which no such file is")


def has_weights(folder: str | Path) -> bool:
    """Say whether the folder holds weight files under the names that transformers looks for."""
    return any((Path(folder) / name).is_file() for name in WEIGHT_FILES)


def checkpoint_shards(folder: str | Path) -> dict[Path, set[str] | None]:
    """List the weight files of a folder, each with the tensor names its index promises (None: there is no index).

    Safetensors win over .bin, as in transformers. A missing shard raises and is named.
    """
    folder = Path(folder)
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        names = sorted(p.name for p in folder.glob("*") if SHARD_PATTERN.fullmatch(p.name))
        if names:
            raise CheckpointError(f"{folder} has shards ({names[0]} ...) but no index file *.index.json for them")
        raise CheckpointError(f"{folder} holds no weights: none of {', '.join(WEIGHT_FILES)} is there")
    if not found.name.endswith(".index.json"):
        return {found: None}
    shards: dict[Path, set[str] | None] = {}
    for name, file in sorted(_weight_map(found).items()):
        promised = shards.setdefault(folder / file, set())
        assert promised is not None
        promised.add(name)
    missing = sorted(path.name for path in shards if not path.is_file())
    if missing:
        raise CheckpointError(f"{folder} is incomplete: {found.name} names {', '.join(missing)}, which is not there")
    return dict(sorted(shards.items()))


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    for file in weight_map.values():
        # A shard lies beside its index; anything else would let a checkpoint read files elsewhere on the machine.
        if not isinstance(file, str) or not SHARD_NAME.fullmatch(file):
            raise CheckpointError(f"{index}: weight_map names {file!r}, which is not a .safetensors or .bin file name")
    return weight_map


def iter_checkpoint_tensors(folder: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every (name, tensor) of a checkpoint folder, one shard after the other, names sorted within a shard.

    Every shard's names are checked against the index first, so that an incomplete folder fails before any work.
    """
    shards = checkpoint_shards(folder)
    read_tensor_headers(folder)
    for path in shards:
        if path.suffix == ".safetensors":
            with _open_safetensors(path) as file:
                for name in sorted(file.keys()):
                    yield name, file.get_tensor(name)
        else:
            tensors = _load_bin(path)
            for name in sorted(tensors):
                yield name, tensors.pop(name)


def read_tensor_headers(folder: str | Path) -> dict[str, TensorHeader]:
    """Read names, shapes and dtypes of a checkpoint folder without its values, and check them against the index."""
    headers: dict[str, TensorHeader] = {}
    for path, promised in checkpoint_shards(folder).items():
        own = safetensors_headers(path) if path.suffix == ".safetensors" else _bin_headers(path)
        if promised is not None and own.keys() != promised:
            absent, surplus = sorted(promised - own.keys()), sorted(own.keys() - promised)
            told = [f"lacks {shorten(absent)}"] * bool(absent) + [f"also holds {shorten(surplus)}"] * bool(surplus)
            raise CheckpointError(f"{path} does not hold what its index says: it {' and '.join(told)}")
        headers.update(own)
    return headers


def shorten(names: list[str], limit: int = 5) -> str:
    """List the first names, and say how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def safetensors_headers(path: Path) -> dict[str, TensorHeader]:
    headers = {}
    with _open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
            view = file.get_slice(name)
            if view.get_dtype() not in SAFETENSORS_DTYPES:
                raise CheckpointError(f"{path}: {name} has dtype {view.get_dtype()}, which is not supported")
            dtype = SAFETENSORS_DTYPES[view.get_dtype()]
            headers[name] = TensorHeader(tuple(view.get_shape()), dtype, path.name)
    return headers


def _bin_headers(path: Path) -> dict[str, TensorHeader]:
    tensors = _load_bin(path, map_location="meta")
    return {name: TensorHeader(tuple(value.shape), value.dtype, path.name) for name, value in tensors.items()}


def _load_bin(path: Path, map_location: str = "cpu") -> dict[str, torch.Tensor]:
    """Unpickle tensors and nothing else; only the zip format of torch >= 1.6 can be memory-mapped."""
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if start != b"PK" and start[:1] != pickle.PROTO:
        raise CheckpointError(f"{path} is truncated or not a PyTorch checkpoint")
    _refuse_bomb(path, is_zip=start == b"PK")
    try:
        tensors = torch.load(path, map_location=map_location, weights_only=True, mmap=start == b"PK")
    except pickle.UnpicklingError as error:
        if "truncated" in str(error):
            raise CheckpointError(f"{path} is truncated or not a PyTorch checkpoint") from None
        reason = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), "")
        raise CheckpointError(
            f"{path} is refused: its pickle holds something else than tensors, which could run code when loaded; "
            f"nothing of it was executed. {reason}".rstrip()
        ) from None
    except Exception as error:  # whatever torch makes of a broken file
        if isinstance(error, MemoryError) or "memory" in str(error):
            raise CheckpointError(f"not enough memory to read {path}: {error}") from error
        raise CheckpointError(f"{path} is truncated or not a PyTorch checkpoint: {error}") from error
    if not isinstance(tensors, dict) or not tensors:
        raise CheckpointError(f"{path} must hold a dict of tensors, got {type(tensors).__name__}")
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise CheckpointError(f"{path}: entry {name!r} is not a dense tensor but {type(value).__name__}")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {name} claims {value.numel()} values, and the file holds fewer")
    return {name: value.detach() for name, value in tensors.items()}


def _refuse_bomb(path: Path, is_zip: bool) -> None:
    """Raise CheckpointError for a file that is small, and whose pickles would take any time or memory to read."""
    try:
        if not is_zip:
            with path.open("rb") as file:  # a number, a version, the system, the tensors, and the names of their bytes
                for _ in range(5):
                    _count_opcodes(path, _Bounded(file))
            return
        _require_one_directory(path)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # torch stores bytes as they are, and only such can be memory-mapped.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise CheckpointError(f"{path} is refused: it is compressed, as torch writes no checkpoint")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise CheckpointError(f"{path} is refused: it claims to hold more bytes than it has")
            for entry in entries:
                if entry.filename.lower().endswith(".pkl"):  # torch finds a name whatever its case
                    with archive.open(entry) as file:
                        _count_opcodes(path, _Bounded(file))
    except CheckpointError:
        raise
    except Exception as error:  # whatever pickletools and zipfile make of a broken file
        raise CheckpointError(f"{path} is truncated or not a PyTorch checkpoint: {error}") from error


def _require_one_directory(path: Path) -> None:
    """Raise CheckpointError unless the list of a zip's entries ends where its closing records begin, as torch has it.

    Those records say where the list is, twice in a large archive. Where they contradict each other, torch and Python's
    zipfile each see an archive of their own.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(size - ZIP64_RECORDS.size - ZIP_RECORD.size, 0))
        tail = file.read()
    end = ZIP_RECORD.unpack(tail[-ZIP_RECORD.size :])
    mark, length, start, comment = end[0], end[5], end[6], end[7]
    before = size - ZIP_RECORD.size
    large = ZIP64_RECORDS.unpack(tail[: ZIP64_RECORDS.size]) if len(tail) > ZIP64_RECORDS.size else ()
    if large and large[10] == b"PK\6\7":
        before -= ZIP64_RECORDS.size
        length, start = large[8], large[9]
        if large[0] != b"PK\6\6" or large[12] != before:
            mark = b""
    if mark != b"PK\5\6" or comment or start + length != before:
        raise CheckpointError(f"{path} is refused: its list of contents is not where torch puts it")


def _count_opcodes(path: Path, file: Any) -> None:
    try:
        for number, _ in enumerate(pickletools.genops(file)):
            if number > MOST_OPCODES:
                raise CheckpointError(f"{path} is refused: its pickle holds far more than tensors need")
    except CheckpointError:
        raise
    except ValueError:  # a byte that no pickle has at this place: torch comes as far, and refuses it
        return


class _Bounded:
    """A file of which no more than a pickle of tensors takes is read."""

    def __init__(self, file: Any) -> None:
        self.file, self.left = file, MOST_BYTES
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        return self._taken(self.file.read(min(size, self.left + 1)))

    def readline(self) -> bytes:
        return self._taken(self.file.readline(self.left + 1))

    def _taken(self, content: bytes) -> bytes:
        self.left -= len(content)
        if self.left < 0:
            raise CheckpointError(f"{self.file.name} is refused: its pickle holds far more than tensors need")
        return content


def write_checkpoint(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: str | Path, max_shard_size: int | str = 5 * 10**9
) -> None:
    """Write tensors as safetensors shards plus index (one file and no index if they fit), holding one shard in memory.

    max_shard_size  bytes, or a string such as "5GB"; a single larger tensor gets a shard of its own
    """
    folder = Path(folder)
    limit = parse_size(max_shard_size)
    weight_map: dict[str, int] = {}
    shard: dict[str, torch.Tensor] = {}
    filled = total = count = 0

    def flush() -> None:
        nonlocal filled, count
        _save_shard(shard, folder / f"shard-{count:05d}.safetensors")
        shard.clear()
        filled, count = 0, count + 1

    for name, tensor in tensors:
        if name in weight_map:
            raise CheckpointError(f"tensor {name} was given twice")
        size = tensor.numel() * tensor.element_size()
        if shard and filled + size > limit:
            flush()
        shard[name] = tensor
        weight_map[name] = count
        filled, total = filled + size, total + size
    if not weight_map:
        raise CheckpointError(f"no tensors to write to {folder}")
    flush()
    _name_shards(folder, weight_map, count, total)


def _name_shards(folder: Path, weight_map: dict[str, int], count: int, total: int) -> None:
    """Give the shards their final names, which carry their number, and write the index."""
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = ["model.safetensors"] if count == 1 else names
    for i, name in enumerate(names):
        os.replace(folder / f"shard-{i:05d}.safetensors", folder / name)
    if count > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {key: names[i] for key, i in sorted(weight_map.items())},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save_shard(shard: dict[str, torch.Tensor], path: Path) -> None:
    seen: set[int] = set()
    ready = {}
    for name, tensor in shard.items():
        # safetensors refuses tensors that share memory; each name gets bytes of its own.
        shares = tensor.numel() > 0 and tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        ready[name] = tensor.clone().contiguous() if shares else tensor.contiguous()
    try:
        save_file(ready, path, metadata={"format": "pt"})
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise CheckpointError(f"cannot write {path}: {error}") from error
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    path.chmod(0o666 & ~_umask())  # safetensors makes the file private to its owner


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def parse_size(size: int | str) -> int:
    """Read a number of bytes: an int, or a string such as "5GB" or "500MB" (powers of ten)."""
    if isinstance(size, int) and not isinstance(size, bool):
        value: float = size
    else:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B", str(size).strip().upper())
        if match is None:
            raise ValueError(f'max_shard_size must be a number of bytes or a string such as "5GB", got {size!r}')
        value = float(match[1]) * 10 ** (3 * " KMGT".index(match[2] or " "))
    if value < 1:
        raise ValueError(f"max_shard_size must be at least one byte, got {size!r}")
    return int(value)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a path to write a file to; the file takes the place of `path` when the block ends without error.

    It is written in a folder of its own beside `path`, whose name nobody can foresee and which nobody else may enter:
    what stands in the way, a link for instance, is replaced and never written through.
    """
    path, work = Path(path), None
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            work = Path(folder)
            yield work / path.name
            os.replace(work / path.name, path)
    except OSError as error:
        told = _explain_write_error(error, path, work)
        if told is None:
            raise
        raise CheckpointError(told) from error


def writable_file(path: str | os.PathLike[str], suffixes: Sequence[str], what: str) -> Path:
    """Return the path of a file that is to be written later; raise, before any long work, where it could not be."""
    out, kind = Path(path).expanduser(), " or ".join(suffixes)
    if out.suffix.lower() not in suffixes:
        raise CheckpointError(f"{what} must be written to a {kind} file, got {out}")
    if out.is_dir():
        raise CheckpointError(f"{out} is a folder: give the name of a {kind} file in it")
    _check_parent(out)
    return out


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """Return the path of a folder that is to be made or replaced later; raise where it could not be."""
    out = Path(path).expanduser()
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} exists and is not a folder")
    _check_parent(out)
    return out


def _check_parent(out: Path) -> None:
    parent = out.parent
    if parent.exists() and not parent.is_dir():
        raise NotADirectoryError(f"{parent} is not a folder, so {out} cannot be written")
    if not parent.exists():
        raise FileNotFoundError(f"the folder of {out} does not exist: make {parent} first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"no permission to write {out}")


def refuse_links(path: str | Path) -> None:
    """Raise CheckpointError when a part of the way to `path` is a link, but for those of the system just below `/`."""
    whole = Path(os.path.abspath(Path(path).expanduser()))
    for part in [*reversed(whole.parents), whole][2:]:
        if part.is_symlink():
            raise CheckpointError(
                f"{part} is a link, through which nothing is replaced: give the folder it means, "
                f"{os.path.realpath(whole)}"
            )


@contextmanager
def atomic_directory(destination: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a new folder to write into; it takes the place of `destination` only when the block ends without error.

    After any failure the folder is removed and `destination` is as it was before. What killed runs left beside it is
    removed first. A non-empty `destination` is refused unless `overwrite`, and then if a part of the way is a link.
    """
    final = Path(destination).expanduser().resolve()
    _check_destination(final, overwrite)
    if final.is_dir() and any(final.iterdir()):
        refuse_links(destination)
    made = [parent for parent in final.parents if not parent.exists()]
    work = handle = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(final)
        work, handle = _make_work_folder(final)
        yield work
        _publish(work, final, overwrite)
    except BaseException as error:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # not empty: somebody else uses it by now
                parent.rmdir()
        told = _explain_write_error(error, final, work)
        if told is None:
            raise
        raise CheckpointError(told) from error
    finally:
        if handle is not None:
            os.close(handle)


def _check_destination(final: Path, overwrite: bool) -> None:
    try:
        if final.exists() and not final.is_dir():
            raise CheckpointError(f"{final} exists and is not a folder")
        if final.is_dir() and any(final.iterdir()) and not overwrite:
            raise CheckpointError(
                f"{final} exists and is not empty; choose another folder, or give --overwrite to replace it"
            )
        with suppress(FileNotFoundError):  # where the folder that one is in is gone
            if final.is_dir() and Path.cwd().is_relative_to(final):
                raise CheckpointError(
                    f"{final} holds the folder that you are in, and would be replaced: choose another one"
                )
    except PermissionError as error:
        raise CheckpointError(f"no permission to read {final}") from error


def _make_work_folder(final: Path) -> tuple[Path, int | None]:
    """Make the sibling folder; a lock on it, which ends with this process, tells it from one left by a killed run."""
    while True:
        work = final.with_name(f".{final.name}.incomplete-{secrets.token_hex(4)}")
        work.mkdir()
        with suppress(BlockingIOError, FileNotFoundError):  # another process took it for left over before the lock
            handle = _lock(work)
            if work.is_dir():
                return work, handle
            if handle is not None:
                os.close(handle)


def _lock(folder: Path) -> int | None:
    """Lock a folder until this process ends; None where that is not possible, BlockingIOError if somebody else has."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return handle


def _remove_stale(final: Path) -> None:
    for folder in final.parent.glob(f".{glob.escape(final.name)}.incomplete-*"):
        with suppress(OSError):  # in use, or not ours to remove
            handle = _lock(folder)
            if handle is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(handle)


def _publish(work: Path, final: Path, overwrite: bool) -> None:
    previous = final.with_name(f".{final.name}.previous-{secrets.token_hex(4)}")
    replaces = overwrite and final.is_dir()
    if replaces:
        os.replace(final, previous)
    try:
        os.replace(work, final)
    except OSError as error:
        if replaces:
            os.replace(previous, final)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise CheckpointError(
                f"{final} was filled by somebody else in the meantime; it is left as it is"
            ) from error
        raise
    if replaces:
        shutil.rmtree(previous, ignore_errors=True)


def _explain_write_error(error: BaseException, final: Path, work: Path | None) -> str | None:
    """Put a failure to write into words; None for any other error."""
    if not isinstance(error, OSError) or isinstance(error, CheckpointError):
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left to write {final}; nothing was left behind"
    where = Path(str(error.filename or ""))
    if work is not None and work not in (where, *where.parents) and where not in (final, *final.parents):
        return None  # a file that was being read
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write {final}; nothing was left behind"
    file = next((parent for parent in final.parents if parent.exists() and not parent.is_dir()), None)
    if file is not None:
        return f"cannot write {final}: {file} is no folder"
    return f"cannot write {final}: {error.strerror or error}"


def same_tensors(tensors: Iterable[tuple[str, torch.Tensor]], folder: str | Path) -> bool:
    """Say whether a safetensors checkpoint holds exactly these tensors, bit for bit, reading one at a time."""
    folder = Path(folder)
    headers = read_tensor_headers(folder)
    names = set()
    with ExitStack() as stack:
        files = {
            file: stack.enter_context(_open_safetensors(folder / file)) for file in {h.file for h in headers.values()}
        }
        for name, tensor in tensors:
            header = headers.get(name)
            if header is None or header.shape != tuple(tensor.shape) or header.dtype != tensor.dtype:
                return False
            if not torch.equal(_bytes(files[header.file].get_tensor(name)), _bytes(tensor)):
                return False
            names.add(name)
    return names == headers.keys()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
