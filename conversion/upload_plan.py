"""What publishing one build changes on one branch: the files on both sides, their hashes, and the summary of it.

Small files are read once, and the bytes that were hashed are those that are sent. Weights are sent from where they
are, and whether they still are what was hashed is asked before the commit that makes them part of the repo.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from tqdm import tqdm

from vispruner import code_files

from .base_checkpoint import CONFIG_FILES
from .built_folder import (
    CARD,
    CONFIG,
    HASH_BLOCK,
    INDEX,
    NEUTRAL_FILES,
    UNSAFE_SUFFIXES,
    Stamp,
    is_unchanged,
    opened_regular,
)
from .checkpoint_io import SHARD_PATTERN, WEIGHT_FILES, checkpoint_shards, has_weights
from .endpoint_files import HANDLER, REQUIREMENTS
from .hub_access import ExitCode, PublishError
from .model_card import card_files
from .plain_text import one_line
from .repo_config import RepoConfig

PICTURE_SUFFIX = ".png"


@dataclass(frozen=True)
class LocalFile:
    """One file to publish: its bytes, or of weights where they are, with the stamp of the file that was hashed."""

    path: str
    source: Path | bytes
    size: int
    sha256: str
    blob_id: str
    stamp: Stamp = ()

    def text(self) -> str:
        assert isinstance(self.source, bytes)
        return self.source.decode()

    def is_as_hashed(self) -> bool:
        """Say whether what is to be sent still is what was hashed."""
        return isinstance(self.source, bytes) or is_unchanged(self.source, self.stamp)


@dataclass(frozen=True)
class RemoteFile:
    """One file as the Hub lists it; only a large one has a sha256, a small one has the id of its git blob."""

    path: str
    size: int
    sha256: str | None
    blob_id: str

    def holds(self, file: LocalFile) -> bool:
        if self.sha256 is not None:
            return self.sha256 == file.sha256
        return self.blob_id == file.blob_id


@dataclass(frozen=True)
class RemoteBranch:
    """A branch of the repo on the Hub and the files at its newest commit."""

    commit: str
    files: dict[str, RemoteFile]


@dataclass(frozen=True)
class BranchPlan:
    """What one commit would do to one branch; `kept` are files that no build made and that stay."""

    branch: str
    exists: bool
    added: tuple[LocalFile, ...]
    changed: tuple[LocalFile, ...]
    removed: tuple[RemoteFile, ...]
    unchanged: int
    kept: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        return self.exists and not (self.added or self.changed or self.removed)

    def paths(self) -> list[str]:
        """Return what the commit touches."""
        return [*(file.path for file in (*self.added, *self.changed)), *(file.path for file in self.removed)]

    def operations(self) -> list[CommitOperationAdd | CommitOperationDelete]:
        """Return the commit: weights first, config and card last, then what goes."""
        found: list[CommitOperationAdd | CommitOperationDelete] = []
        for file in sorted((*self.added, *self.changed), key=_place_in_commit):
            operation = CommitOperationAdd(file.path, file.source)
            operation.upload_info.sha256 = bytes.fromhex(file.sha256)  # known already: nothing is read twice for it
            found.append(operation)
        return found + [CommitOperationDelete(file.path) for file in self.removed]


def plan_branch(
    branch: str,
    files: Iterable[LocalFile],
    remote: RemoteBranch | None,
    is_ours: Callable[[str], bool] | None = None,
) -> BranchPlan:
    """Compare what a branch shall hold with what it holds; what is there besides goes where `is_ours` says so.

    is_ours  by its path, default: a file that builds write
    """
    files, is_ours = list(files), is_ours or made_by_a_build
    there = remote.files if remote is not None else {}
    names = {file.path for file in files}
    gone = [file for path, file in sorted(there.items()) if path not in names]
    added = tuple(file for file in files if file.path not in there)
    changed = tuple(file for file in files if file.path in there and not there[file.path].holds(file))
    return BranchPlan(
        branch=branch,
        exists=remote is not None,
        added=added,
        changed=changed,
        removed=tuple(file for file in gone if is_ours(file.path)),
        unchanged=len(files) - len(added) - len(changed),
        kept=tuple(file.path for file in gone if not is_ours(file.path)),
    )


def built_files(folder: Path, repo: RepoConfig) -> list[LocalFile]:
    """List and hash the files of a built repo: exactly those that a build of this YAML writes."""
    names = {path.name for path in code_files(repo.architecture)} | {CARD, *CONFIG_FILES}
    names |= {HANDLER, REQUIREMENTS} if repo.handler else set()
    names |= {path.name for path in (*card_files(repo), *repo.files.values())}
    if has_weights(folder):
        names |= {path.name for path in checkpoint_shards(folder)} | {INDEX}
    present = {path.name: path for path in sorted(folder.iterdir())}
    strange = [name for name, path in present.items() if name not in names or path.is_symlink() or not path.is_file()]
    if strange:
        raise PublishError(
            ExitCode.BAD_INPUT,
            f"{folder} holds {', '.join(strange)}, which the build did not write: nothing else is ever uploaded, so "
            "remove it",
        )
    total = sum(path.stat().st_size for path in present.values() if path.suffix == ".safetensors")
    with tqdm(total=total, unit="B", unit_scale=True, desc="hashing", leave=False) as progress:
        return sorted((local_file(name, path, progress) for name, path in present.items()), key=_place_in_commit)


def local_file(path: str, source: Path | bytes, progress: tqdm | None = None) -> LocalFile:
    """Hash one file the two ways the Hub does, as a large file and as a git blob; keep all but weights in memory."""
    if isinstance(source, bytes):
        return _in_memory(path, source)
    with opened_regular(source) as (file, stamp):
        if source.suffix != ".safetensors":
            return _in_memory(path, file.read())
        size = os.fstat(file.fileno()).st_size
        large, blob = hashlib.sha256(), _git_blob(size)
        while block := file.read(HASH_BLOCK):
            large.update(block)
            blob.update(block)
            if progress is not None:
                progress.update(len(block))
    return LocalFile(path, source, size, large.hexdigest(), blob.hexdigest(), stamp)


def _in_memory(path: str, content: bytes) -> LocalFile:
    blob = _git_blob(len(content))
    blob.update(content)
    return LocalFile(path, content, len(content), hashlib.sha256(content).hexdigest(), blob.hexdigest())


def _git_blob(size: int) -> Any:
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)  # git's name of a file, and no proof of anything


def _place_in_commit(file: LocalFile) -> tuple[int, str]:
    if file.path.endswith(".safetensors"):
        return 0, file.path
    return (2 if file.path in (CONFIG, CARD) else 1), file.path


def made_by_a_build(path: str) -> bool:
    """Say whether a file's name is one that builds write, now or in an older version, or weights in its place."""
    return "/" not in path and (
        path in (CARD, REQUIREMENTS, *CONFIG_FILES, *WEIGHT_FILES)
        or path.endswith((".py", PICTURE_SUFFIX, *UNSAFE_SUFFIXES))
        or SHARD_PATTERN.fullmatch(path) is not None
    )


def describe(plan: BranchPlan, budget: str = "", main: BranchPlan | None = None) -> list[str]:
    """Return the lines of the summary about one branch; one that changes as `main` does takes one line more."""
    return [one_line(line) for line in _lines(plan, budget, main)]  # names come from the Hub, too


def _lines(plan: BranchPlan, budget: str, main: BranchPlan | None) -> list[str]:
    about = f"{plan.branch} ({budget})" if budget else plan.branch
    if plan.is_empty:
        return [f"  {about}: nothing to do, {plan.unchanged} files are the same"]
    rows = [("add", file) for file in plan.added] + [("change", file) for file in plan.changed]
    is_alike = main is not None and set(plan.paths()) - {CONFIG} == set(main.paths()) - {CONFIG}
    if main is not None and is_alike:
        if len(plan.paths()) > 1:
            about += f": what {main.branch} gets, but for"
        rows = [row for row in rows if row[1].path == CONFIG]
    width = max([len(file.path) for _, file in rows] + [len(file.path) for file in plan.removed] + [1])
    lines = [f"  {about}:" if plan.exists else f"  new branch {about}:"]
    for action, file in rows:
        lines.append(f"    {action:<7}{file.path:<{width}}  {_size(file.size):>9}  sha256 {file.sha256[:16]}")
    if is_alike:
        return lines
    for gone in plan.removed:
        lines.append(f"    {'remove':<7}{gone.path:<{width}}  {_size(gone.size):>9}")
    lines += [f"    {'keep':<7}{path:<{width}}  no build made it" for path in plan.kept if path not in NEUTRAL_FILES]
    sent = f"{len(rows)} files, {_size(sum(file.size for _, file in rows))} to send"
    lines.append(f"    {sent}; {plan.unchanged} the same, {len(plan.removed)} removed")
    return lines


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
