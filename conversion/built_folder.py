"""What a built folder may hold, and a private copy of it, so that what is checked is what runs.

Regular files at the top of the folder, each under a name that `build` writes, and nothing else: no links, no folders,
no devices. They are read once, hashed while they are copied, and everything later looks at the copy. Weights, which
hold no code, are too large for that: the copy links to them, and in the end they must be what they were.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from .base_checkpoint import CONFIG_FILES
from .checkpoint_io import MOST_BYTES, READ_FLAGS, read_json, read_regular
from .endpoint_files import REQUIREMENTS

CARD, CONFIG = "README.md", "config.json"
INDEX = "model.safetensors.index.json"
UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# Files that the Hub or its web pages make, and licences: nobody's build, nothing reads them, and they may stay.
NEUTRAL_FILES = (".gitattributes", ".gitignore", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
CLIENT_NOTES = ".cache"  # where `hf download --local-dir` remembers what it downloaded
HASH_BLOCK = 2**20
MOST_FILES = 1000
MOST_COPIED = 2**28  # bytes of all files but weights

Stamp = tuple[int, ...]


@dataclass(frozen=True)
class ReadFile:
    """One file as it was read: by what a change since can be told, and its hash, of weights once that is known."""

    stamp: Stamp
    sha256: str = ""


@dataclass(frozen=True)
class FolderCopy:
    """A built folder and its private copy.

    files     what could be read, by name
    problems  what has no place in such a folder, as sentences
    """

    source: Path
    path: Path
    files: dict[str, ReadFile] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def hash_weights(self) -> None:
        """Hash the weights, once they are known to be as large as the model asks for; OSError if they changed."""
        for name, found in self.files.items():
            if not found.sha256:
                with opened_regular(self.source / name) as (file, stamp):
                    if stamp != found.stamp:
                        raise OSError(f"{name} changed while it was read: verify the folder again")
                    self.files[name] = ReadFile(stamp, hash_of(file))

    def hashes(self) -> dict[str, str]:
        """Return name -> sha256 of all that a build writes."""
        return {name: file.sha256 for name, file in sorted(self.files.items()) if name not in NEUTRAL_FILES}

    def changed(self) -> list[str]:
        """Name what is no longer what was read: changed, replaced, gone or new."""
        now = {entry.name: _stamp(entry.stat(follow_symlinks=False)) for entry in os.scandir(self.source)}
        now.pop(CLIENT_NOTES, None)
        before = {name: file.stamp for name, file in self.files.items()}
        return sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))


def folder_digest(hashes: Mapping[str, str]) -> str:
    """Return one hash for all files: that of the list which `sha256sum *` prints of what a build writes."""
    lines = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def copy_folder(folder: Path, target: Path) -> FolderCopy:
    """Read a folder into the new folder `target`, which nobody else may write to; nothing is followed out of it."""
    target.mkdir()
    copy = FolderCopy(folder, target)
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries)
    left = MOST_COPIED
    for name in names[:MOST_FILES]:
        left -= _take(copy, name, left)
    if len(names) > MOST_FILES:
        copy.problems.append(f"there are {len(names)} entries, of which {MOST_FILES} were looked at")
    return copy


@contextmanager
def verified_copy(folder: Path, files: Mapping[str, str]) -> Iterator[Path]:
    """Give a private copy of a folder, to load what was verified and nothing that came into its place since.

    files  name -> sha256, as verify reports them
    """
    with tempfile.TemporaryDirectory(prefix="vispruner-") as name:
        copy = copy_folder(Path(os.path.realpath(folder)), Path(name) / "repo")
        copy.hash_weights()
        if copy.problems or copy.hashes() != dict(files):
            raise ValueError(f"{folder} changed since it was verified: verify it again")
        yield copy.path


def _take(copy: FolderCopy, name: str, left: int) -> int:
    """Copy one entry of the folder, or note why it has no place there; return the bytes copied, at most `left`."""
    found = (copy.source / name).lstat()
    if name == CLIENT_NOTES and stat.S_ISDIR(found.st_mode):
        return 0
    if not stat.S_ISREG(found.st_mode):
        copy.problems.append(f"{name} is {_kind(found.st_mode)}")
        return 0
    with opened_regular(copy.source / name) as (file, stamp):
        if name.endswith(".safetensors"):
            link_or_copy(copy.source / name, copy.path / name)
            copy.files[name] = ReadFile(stamp)
            return 0
        content = file.read(min(left, MOST_BYTES) + 1)
        if len(content) > min(left, MOST_BYTES):
            copy.problems.append(f"{name} is larger than {min(left, MOST_BYTES) / 2**20:g} MiB, which no such file is")
            return 0
        (copy.path / name).write_bytes(content)
        copy.files[name] = ReadFile(stamp, hashlib.sha256(content).hexdigest())
        return len(content)


@contextmanager
def opened_regular(path: Path) -> Iterator[tuple[BinaryIO, Stamp]]:
    """Open a file that is no link, and give its stamp; OSError for anything else under that name."""
    with os.fdopen(os.open(path, READ_FLAGS | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path} is not a regular file")
        yield file, _stamp(found)


def hash_of(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(HASH_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def is_unchanged(path: Path, stamp: Stamp) -> bool:
    """Say whether there still is the very file that had this stamp, and nobody wrote to it."""
    try:
        return _stamp(path.lstat()) == stamp
    except OSError:
        return False


def _stamp(found: os.stat_result) -> Stamp:
    # The time of the last change of a file's data or place is kept by the system: no program can set it back.
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def link_or_copy(source: Path, target: Path) -> None:
    """Let `target` be the file `source`, without its bytes where the system can do that."""
    try:
        target.symlink_to(source)
    except OSError:  # Windows asks for a right of its own
        shutil.copyfile(source, target)


def _kind(mode: int) -> str:
    if stat.S_ISLNK(mode):
        return "a link; copy the folder with `cp -rL`, or download it with `hf download --local-dir`"
    return "a folder" if stat.S_ISDIR(mode) else "not a regular file"


def holds_a_build(folder: Path) -> bool:
    """Say whether a folder holds a built repo and nothing else, so that another build may take its place."""
    with os.scandir(folder) as entries:
        found = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    if not found.get(CONFIG) or not all(found.values()) or "vispruner_config" not in read_json(folder / CONFIG):
        return False
    card = read_regular(folder / CARD).decode(errors="replace") if CARD in found else ""
    return not strange_names(found, card)


def strange_names(names: Iterable[str], card: str) -> list[str]:
    """Return which of these names no build writes; which code and weights belong there is left to checks of their own.

    card  the text of README.md, whose pictures may be there
    """
    known = {CARD, INDEX, REQUIREMENTS, *CONFIG_FILES, *NEUTRAL_FILES}
    return [
        name
        for name in names
        if name not in known
        and not name.endswith((".py", ".safetensors", *UNSAFE_SUFFIXES))
        and not (name.endswith(".png") and f"]({name})" in card)
    ]
