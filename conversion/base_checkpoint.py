"""Find the base of a build: a folder, the embedded checkpoint, or a Hub repo of which only what is needed is fetched.

A thin repo is built without the base's weights: the headers of its safetensors files, read over the network, say
which tensors it has.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    SafetensorsParsingError,
)
from tqdm import tqdm

from .checkpoint_io import (
    SAFETENSORS_DTYPES,
    CheckpointError,
    TensorHeader,
    checkpoint_shards,
    has_weights,
    read_tensor_headers,
)
from .repo_config import EMBEDDED_CONFIGS, EMBEDDED_PREFIX, PHOTO_LLAVA, is_hub_id

ASSETS = Path(__file__).parent / "assets"

# What a processor and a tokenizer are made of; whatever of it the base has is copied byte for byte.
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
CONFIG_FILES = ("config.json", "generation_config.json", *PROCESSOR_FILES)
SAFETENSORS_FILES = ("*.safetensors", "*.safetensors.index.json")
UNPRINTABLE = "*[!!-~]*"  # names with a blank or with what a terminal might obey, which no weights have
BIN_FILES = ("pytorch_model*.bin", "pytorch_model*.bin.index.json")

# The library behind huggingface_hub 1.x is httpx, behind 2.x httpx2; what cannot be connected to raises its HTTPError.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]


class BuildError(ValueError):
    """A base that cannot become a published repo."""


@dataclass(frozen=True)
class BaseCheckpoint:
    """A base whose small files lie in `folder`; `repo_id` and `commit` are set where it is a Hub repo."""

    folder: Path
    repo_id: str | None = None
    commit: str | None = None

    def weights_size(self) -> int:
        """Return the bytes of its weight files, without downloading them."""
        if self.repo_id is None or self._weights_are_here():
            return sum(path.stat().st_size for path in checkpoint_shards(self.folder))
        with hub_errors_explained(self.repo_id, self.commit):
            files = HfApi().model_info(self.repo_id, revision=self.commit, files_metadata=True).siblings or []
        sizes = {suffix: sum(f.size or 0 for f in files if f.rfilename.endswith(suffix)) for suffix in _SUFFIXES}
        return sizes[".safetensors"] or sizes[".bin"]

    def tensor_headers(self) -> dict[str, TensorHeader]:
        """Return names, shapes and dtypes of its tensors; only .bin files have to be downloaded for that."""
        if self.repo_id is None or self._weights_are_here():
            return read_tensor_headers(self.folder)
        with hub_errors_explained(self.repo_id, self.commit):
            try:
                return _hub_headers(self.repo_id, self.commit)
            except NotASafetensorsRepoError:
                tqdm.write(
                    f"{self.repo_id} has no safetensors files: its .bin files are downloaded, because only whole ones "
                    "say which tensors they hold"
                )
        return read_tensor_headers(self.with_weights().folder)

    def with_weights(self) -> BaseCheckpoint:
        """Return it with its weight files in the folder too."""
        if self.repo_id is not None:
            folder = _hub_snapshot(self.repo_id, self.commit, (*CONFIG_FILES, *SAFETENSORS_FILES))
            if not has_weights(folder):
                _hub_snapshot(self.repo_id, self.commit, (*CONFIG_FILES, *BIN_FILES))
        return self

    def _weights_are_here(self) -> bool:
        """Say whether an earlier download brought all weight files."""
        try:
            return bool(checkpoint_shards(self.folder))
        except CheckpointError:
            return False


_SUFFIXES = (".safetensors", ".bin")


def find_base(name: str, revision: str | None = None) -> BaseCheckpoint:
    """Find a base by name: a local folder, an embedded one (`embedded/tiny-llava`), or a Hub id at a revision.

    The weights of a Hub repo are not downloaded yet, and the commit is the one that the revision stands for now.
    """
    if name.startswith(EMBEDDED_PREFIX):
        if name not in EMBEDDED_CONFIGS:
            raise BuildError(f"{name} is not embedded in this package; {' and '.join(EMBEDDED_CONFIGS)} are")
        return BaseCheckpoint(_embedded_folder(name))
    folder = Path(name).expanduser()
    refuse_ambiguous(name)
    if folder.is_dir():
        return BaseCheckpoint(folder)
    if folder.exists():
        raise BuildError(f"base {name} is a file: give the folder of the checkpoint")
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise BuildError(f"base {name} does not exist: give a checkpoint folder or a Hub id (owner/name)")
    return find_hub_base(name, revision)


def _embedded_folder(name: str) -> Path:
    folder = ASSETS / name.removeprefix(EMBEDDED_PREFIX)
    if name != PHOTO_LLAVA:
        return folder
    from .photo_tower import whole_checkpoint  # imports models, which no other base needs

    return whole_checkpoint(folder)


def refuse_ambiguous(name: str) -> None:
    """Raise BuildError for a Hub id that is also a folder here, of which nobody can say who put it there."""
    if is_hub_id(name) and Path(name).is_dir():
        raise BuildError(f"{name} is a Hub id, and there is a folder of that name here: write ./{name} for the folder")


def refuse_unsafe(name: str) -> None:
    """Raise BuildError for a repo that is to be loaded, where a folder or an eavesdropper could come between."""
    refuse_ambiguous(name)
    if is_hub_id(name):
        require_private_line(constants.ENDPOINT, get_token())


def find_hub_base(repo_id: str, revision: str | None = None) -> BaseCheckpoint:
    """Find a base on the Hub and nowhere else: a folder of that name, wherever it lies, is never taken for it."""
    folder = _hub_snapshot(repo_id, revision, CONFIG_FILES)
    return BaseCheckpoint(folder, repo_id, snapshot_commit(folder) or revision)


def resolve_base(name: str, revision: str | None = None) -> Path:
    """Return the folder of a base with its weights: a local one, the embedded one, or a Hub snapshot."""
    return find_base(name, revision).with_weights().folder


def resolve_commit(repo_id: str, revision: str) -> str:
    """Return the commit that a revision of a Hub repo stands for; BuildError where only the Hub could say."""
    if is_commit(revision):
        return revision
    commit = snapshot_commit(_hub_snapshot(repo_id, revision, ("config.json",)))
    if commit is None:
        raise BuildError(f"{repo_id} has no known commit at revision {revision}: give the commit as base_revision")
    return commit


def is_commit(revision: str | None) -> bool:
    """Tell a full commit hash from a branch or a tag."""
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def snapshot_commit(folder: Path) -> str | None:
    """Return the commit of a Hub snapshot, which a branch name resolved to."""
    return folder.name if folder.parent.name == "snapshots" and is_commit(folder.name) else None


def _hub_snapshot(repo_id: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    with hub_errors_explained(repo_id, revision):
        # Said outright: huggingface_hub 1.x asks the Hub for the file list of a commit even when it is offline.
        offline = constants.HF_HUB_OFFLINE
        folder = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=UNPRINTABLE,
            local_files_only=offline,
        )
        return Path(folder)


@functools.cache  # a commit never changes
def _hub_headers(repo_id: str, commit: str | None) -> dict[str, TensorHeader]:
    """Read the headers of a Hub repo's safetensors files, and check them against its index."""
    found = HfApi().get_safetensors_metadata(repo_id, revision=commit)
    headers = {}
    for file, content in found.files_metadata.items():
        for name, tensor in content.tensors.items():
            if tensor.dtype not in SAFETENSORS_DTYPES:
                raise BuildError(f"{repo_id}: {name} in {file} has dtype {tensor.dtype}, which is not supported")
            if found.weight_map.get(name) != file:
                raise BuildError(f"{repo_id}: {file} holds {name}, which the index of the repo does not say")
            headers[name] = TensorHeader(tuple(tensor.shape), SAFETENSORS_DTYPES[tensor.dtype], file)
    if absent := sorted(found.weight_map.keys() - headers.keys()):
        raise BuildError(f"{repo_id}: the index names {absent[0]} ({len(absent)} such in all), which is in no file")
    return headers


def require_private_line(endpoint: str, token: str | None) -> None:
    """Raise BuildError where a token would be sent in the clear to another machine."""
    address = urlsplit(endpoint)
    if token and address.scheme != "https" and address.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise BuildError(
            f"{endpoint} is not https, and your token would be sent to it for everybody on the way to read: give an "
            "endpoint with https, or log out (`hf auth logout`, and unset HF_TOKEN) where no account is needed"
        )


@contextmanager
def hub_errors_explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn what can go wrong while a base is read from the Hub into a BuildError that names it."""
    require_private_line(constants.ENDPOINT, get_token())
    base = f"base {repo_id}" + (f" at revision {revision}" if revision else "")
    try:
        yield
    except HFValidationError as error:
        raise BuildError(f"{base} is neither a folder nor a valid Hub id: {error}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise BuildError(
            f"{base} is not a folder here, is not in the local Hub cache, and the Hub cannot be reached: "
            "give a checkpoint folder as the base"
        ) from error
    except SafetensorsParsingError as error:
        raise BuildError(f"{base} has a broken safetensors file: {error}") from error
    except HTTP_ERROR as error:  # HfHubHTTPError is one too
        raise BuildError(f"{base} cannot be downloaded: {error}") from error
