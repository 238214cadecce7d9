"""Verify a built repo: what it says, what it holds, and, in a fresh process, what it does.

The folder is read once, into a private copy, and every check looks at that copy. What the files say is checked first,
before anything of them is loaded; only a repo that passes is loaded, by `verify_worker` in a process without network
and without the caller's tokens. The weights of a thin repo are those of its base, and downloaded before they are
loaded.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vispruner import ARCHITECTURES, SELECTORS, __version__, architecture_of, auto_map, code_files
from vispruner.clip_text import check_tensors
from vispruner.codebook_file import KEY, read_codebook
from vispruner.configuration_vispruner import FILES, merge_vispruner_config

from . import layout_worker, verify_worker
from .base_checkpoint import (
    IMAGE_PROCESSOR_FILES,
    TOKENIZER_FILES,
    BaseCheckpoint,
    find_hub_base,
    is_commit,
    resolve_base,
)
from .base_comparison import differences_from_base
from .build import engine_auto_map
from .built_folder import (
    CARD,
    CONFIG,
    UNSAFE_SUFFIXES,
    FolderCopy,
    copy_folder,
    folder_digest,
    link_or_copy,
    strange_names,
)
from .checkpoint_io import (
    MOST_BYTES,
    WEIGHT_FILES,
    TensorHeader,
    checkpoint_shards,
    iter_checkpoint_tensors,
    read_json,
    read_tensor_headers,
    safetensors_headers,
)
from .endpoint_files import HANDLER, REQUIREMENTS, SOURCE, strange_requirements
from .foreign_code import MOST_SETTINGS, SETTINGS_FILES, foreign_code
from .isolation import Isolation, isolation
from .plain_text import one_line, printable
from .published_imports import forbidden_imports
from .published_layout import LayoutFacts
from .released_code import digest, released_code
from .repo_config import is_hub_id

Status = Literal["pass", "fail", "not run"]

# The worker's checks, in its order: those that load the weights, and those a model of any size can afford.
LIGHT_CHECKS = ("AutoConfig", "AutoProcessor", "auto classes", "budget")
MODEL_CHECKS = (
    "AutoModelForImageTextToText",
    "weights come from the files",
    "KV length falls",
    "keep-all equals stock",
    "AutoModel",
    "pipeline",
)
WORKER_TIMEOUT = 3600.0
LAYOUT_TIMEOUT = 300.0
MOST_SHOWN = 4000  # characters of one reason


class VerifyError(ValueError):
    """A reason why a repo is refused."""


@dataclass(frozen=True)
class Check:
    """One line of a report."""

    name: str
    status: Status
    detail: str


@dataclass(frozen=True)
class Report:
    """What verify found; a repo passes when no check failed, whether or not all could be run.

    files  name -> sha256 of every file of the folder as it was read, but for those that no build writes and nothing
           reads (`.gitattributes`, licences); what is true of these very bytes need not be of others
    """

    folder: Path
    checks: tuple[Check, ...]
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(check.status != "fail" for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.status == "fail")

    @property
    def digest(self) -> str:
        """One sha256 that stands for all files, and names what was verified."""
        return folder_digest(self.files)

    def table(self) -> str:
        """Return the checks as aligned lines, the digest of what was verified, and the verdict as the last line."""
        width = max(len(check.name) for check in self.checks)
        lines = [
            f"{check.status:<9}{check.name:<{width + 2}}{_indented(check.detail)}".rstrip()
            for check in self.checks
            if self.passed or check.status != "not run"  # of a refused repo the reason is what matters
        ]
        if self.passed and self.files:
            lines.append(f"{'':<9}{'sha256 of all files':<{width + 2}}{self.digest}")
        count = {
            status: sum(check.status == status for check in self.checks) for status in ("pass", "fail", "not run")
        }
        verdict = "verified" if self.passed else "refused"
        skipped = f", {count['not run']} not run" if count["not run"] else ""
        lines.append(
            f"{verdict}: {one_line(str(self.folder))} ({count['pass']} passed, {count['fail']} failed{skipped})"
        )
        return "\n".join(lines)


def _indented(text: str) -> str:
    """Return what others wrote so that no line of it can pass for one of the report's."""
    return printable(text).replace("\n", "\n" + " " * 11)


def verify_repo(
    folder: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    available_memory: int | None = None,
    timeout: float = WORKER_TIMEOUT,
) -> Report:
    """Verify a built repo; never raises for what is wrong with it.

    base              compare every file and every tensor's hash with those of this base (a folder, `embedded/...` or
                      a Hub id)
    available_memory  bytes that loading the model may take; by default what this machine has left. A larger model is
                      checked by names, shapes and hashes only, and the report lists what was not run
    timeout           seconds that the fresh process may take
    """
    path = Path(os.path.realpath(os.path.expanduser(folder)))
    with isolation() as place:
        verification = _Verification(path, place, None if base is None else os.fspath(base))
        verification.check_files()
        verification.check_weights()
        try:
            verification.check_loading(machine_memory() if available_memory is None else available_memory, timeout)
        except Exception as error:  # such as a folder that is gone by now
            verification.note(Check("fresh process", "fail", f"{type(error).__name__}: {error}"))
        return verification.report()


class _Verification:
    """One folder being verified: its private copy, what was read from it, and the checks so far."""

    def __init__(self, folder: Path, place: Isolation, base: str | None) -> None:
        self.folder = folder
        self.place = place
        self.base = base
        self.base_folder: Path | None = None
        self.copy = FolderCopy(folder, place.root / "repo")
        self.config: dict[str, Any] = {}
        self.weights = BaseCheckpoint(self.copy.path)
        self.layout = LayoutFacts([], {}, {}, {}, [], 0)
        self.checks: list[Check] = []

    @property
    def failed(self) -> bool:
        return any(check.status == "fail" for check in self.checks)

    def run(self, name: str, check: Callable[[], str]) -> None:
        """Run one check; whatever it raises is the reason of a refusal."""
        status: Status = "pass"
        try:
            detail = check()
        except (ValueError, OSError, SyntaxError) as error:  # CheckpointError, BuildError and LayoutError are such
            status, detail = "fail", str(error)
        except Exception as error:  # nothing that a folder holds may end this
            status, detail = "fail", f"{type(error).__name__}: {error}"
        self.note(Check(name, status, detail))

    def note(self, check: Check) -> None:
        """Add a check to the report, in which the copy goes by the folder's own name, and no detail is endless."""
        detail = check.detail.replace(str(self.copy.path), str(self.folder))
        shown = detail if len(detail) <= MOST_SHOWN else f"{detail[:MOST_SHOWN]} ..."
        self.checks.append(replace(check, detail=shown))

    def run_all(self, checks: Mapping[str, Callable[[], str]], reason: str = "the checks above failed") -> None:
        """Run checks that do not build on each other, unless one before them failed."""
        if self.failed:
            self.skip(checks, reason)
            return
        for name, check in checks.items():
            self.run(name, check)

    def skip(self, names: Iterable[str], reason: str) -> None:
        self.checks += [Check(name, "not run", reason) for name in names]

    def report(self) -> Report:
        return Report(self.folder, tuple(self.checks), self.copy.hashes())

    def check_files(self) -> None:
        """Check what the files say, without loading any; what the first checks refuse is not looked into."""
        self.run("config.json", self.read)
        self.run_all({"files": self.check_names, "JSON files": self.check_settings}, "config.json failed")
        folder, config = self.copy.path, self.config
        self.run_all(
            {
                "vispruner_config": lambda: _check_options(folder, config),
                "architectures": lambda: _check_architectures(config),
                "auto_map": lambda: _check_auto_map(config),
                "code files": lambda: _check_code_files(folder, config),
                "imports": lambda: _check_imports(folder),
                **(
                    {"requirements.txt": lambda: _check_requirements(folder)}
                    if REQUIREMENTS in self.copy.files
                    else {}
                ),
                "processor files": lambda: _check_processor_files(folder),
                "generation config": lambda: _check_generation_config(folder),
            }
        )

    def read(self) -> str:
        """Copy the folder and read config.json."""
        if not self.folder.is_dir():
            raise VerifyError(
                f"{self.folder} is not a folder: give one that `vispruner build` wrote, or get one from the Hub by "
                "`hf download REPO --local-dir FOLDER`"
            )
        self.copy = copy_folder(self.folder, self.copy.path)
        if CONFIG not in self.copy.files and self.copy.problems:
            raise VerifyError("; ".join(self.copy.problems))
        self.config.update(read_json(self.copy.path / CONFIG, MOST_SETTINGS))
        model_type = self.config.get("model_type")
        if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
            raise VerifyError(f"model_type is {model_type!r}, supported are {', '.join(ARCHITECTURES)}")
        return f"model_type {model_type}"

    def check_names(self) -> str:
        """Require regular files under names that a build writes."""
        card = self.copy.path / CARD
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        strange = strange_names(self.copy.files, text)
        problems = [*self.copy.problems, *(f"{name} is no file that a build writes" for name in strange)]
        if problems:
            raise VerifyError("; ".join(problems))
        return f"{len(self.copy.files)} regular files under names that a build writes"

    def check_settings(self) -> str:
        """Require settings that name no code and no file of anybody else."""
        problems = []
        for name in SETTINGS_FILES:
            if name in self.copy.files:
                settings = read_json(self.copy.path / name, MOST_SETTINGS)
                own = name == "processor_config.json" and settings.get("auto_map") == self.engine_auto_map
                if name == CONFIG or own:  # that of config.json has a check of its own
                    settings.pop("auto_map", None)
                problems += [f"{name}: {entry}" for entry in foreign_code(settings)]
        if problems:
            raise VerifyError(
                f"{'; '.join(problems)}: no build writes that, and transformers could run code or read files by it"
            )
        return "they name no code and no files of others"

    @property
    def engine_auto_map(self) -> dict[str, str] | None:
        return engine_auto_map(self.config["model_type"])

    def check_weights(self) -> None:
        """Check names and shapes, and with a base all files and the values of all tensors."""
        if self.base is not None and not self.failed:
            self.run("files equal the base's", self.compare_files)
        self.run_all({"weights": self.check_layout})
        if self.base is not None and not self.failed:
            self.run("weights equal the base's", self.compare_weights)

    def compare_files(self) -> str:
        """Compare config and processor with what a build writes from the base."""
        self.base_folder = resolve_base(str(self.base))
        problems = differences_from_base(self.copy.path, self.base_folder)
        if problems:
            raise VerifyError(f"not what a build writes from {self.base}: {'; '.join(problems)}")
        return f"config and processor are those of {self.base}"

    def check_layout(self) -> str:
        """Compare names and shapes with the model's: of the files, or of a thin repo's base."""
        folder = self.copy.path
        self.weights = _weights_of(folder, self.config)
        _refuse_stray_weights(self.copy, self.config, self.weights)
        base_names = [] if self.base_folder is None else list(read_tensor_headers(self.base_folder))
        headers = self.weights.tensor_headers()
        is_thin = self.weights.repo_id is not None
        self.layout = _layout_facts(self.config, headers, base_names, are_published=not is_thin)
        whose = f"{self.weights.repo_id} at {self.weights.commit}" if is_thin else ""
        if self.layout.problems:
            raise VerifyError((f"the base {whose} does not fit: " if whose else "") + "; ".join(self.layout.problems))
        if (codebook := _named_files(self.config).get("codebook")) is not None:
            read_codebook(folder / codebook, self.layout.width)
        self.copy.hash_weights()
        if whose:
            return f"thin: {len(self.layout.names)} tensors of {whose}, names and shapes are the model's"
        return f"{len(headers)} tensors, names and shapes are the model's"

    def compare_weights(self) -> str:
        """Compare the hash of every tensor with the base's, one tensor of each in memory at a time."""
        assert self.base_folder is not None
        own = _hashes(self.weights.with_weights().folder, self.layout.names)
        other = _hashes(self.base_folder, self.layout.base_names)
        wrong = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
        if wrong:
            raise VerifyError(f"{len(wrong)} tensors are not those of {self.base}: {', '.join(wrong[:8])}")
        return f"{len(own)} tensors hash as in {self.base}"

    def check_loading(self, free: int, timeout: float) -> None:
        """Load the copy in a fresh process, its weights too where they fit into `free` bytes of memory."""
        needed = 0 if self.failed else memory_needed(self.weights)
        if not self.failed and needed <= free and self.weights.repo_id is not None:
            self.run("base weights", self.download)
        if self.failed:
            self.skip((*LIGHT_CHECKS, *MODEL_CHECKS), "the checks above failed")
            return
        settings = _worker_settings(self.config, self.weights, self.layout, run_models=needed <= free)
        code = [file.sha256 for name, file in self.copy.files.items() if name.endswith(".py")]
        for check in _run_worker(self.place, self.copy.path, settings, timeout, code, free + 4 * needed):
            self.note(check)
        if needed > free:
            self.skip_models(f"needs about {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free")
        if not self.failed and (changed := self.copy.changed()):
            reason = f"{', '.join(changed)} changed while the folder was verified: verify it again"
            self.checks.append(Check("unchanged", "fail", reason))

    def download(self) -> str:
        """Bring the weights of a thin repo's base, and lend them to the fresh process: no other file of any repo."""
        weights = self.weights.with_weights()
        shards = checkpoint_shards(weights.folder)
        self.weights = replace(weights, folder=lend_base(weights, self.place.hub_cache))
        size = sum(path.stat().st_size for path in shards)
        return f"thin: {weights.repo_id} at {weights.commit}, {size / 1e9:.2f} GB, in the local Hub cache"

    def skip_models(self, reason: str) -> None:
        """Say what is not run because the model is too large, and hash what can be hashed."""
        if self.weights.repo_id is None:
            self.run("weights hash", lambda: _check_hashes(self.copy.path, self.layout.tied))
        else:
            self.skip(["weights hash"], "thin: the weights of the base were not downloaded")
        if self.base is None:
            self.skip(["weights equal the base's"], "no base was given")
        self.skip(MODEL_CHECKS, reason)


def _weights_of(folder: Path, config: Mapping[str, Any]) -> BaseCheckpoint:
    """Find the checkpoint that holds a repo's weights: its own folder, or the pinned base of a thin one."""
    options = config.get("vispruner_config") or {}
    if options.get("weights", "full") != "thin":
        return BaseCheckpoint(folder)
    base, revision = options["base_model_name_or_path"], options["base_model_revision"]
    if not is_hub_id(base) or not is_commit(revision):
        raise VerifyError(
            "the repo is thin, so base_model_name_or_path must be a Hub id and base_model_revision a commit, got "
            f"{base} and {revision}: build the repo again"
        )
    return find_hub_base(base, revision)


def lend_base(base: BaseCheckpoint, hub_cache: Path) -> Path:
    """Give another Hub cache the config and the weights of a base, and no other file; return the snapshot there."""
    snapshot = hub_cache / f"models--{str(base.repo_id).replace('/', '--')}" / "snapshots" / str(base.commit)
    snapshot.mkdir(parents=True)
    shards = checkpoint_shards(base.folder)
    indices = [base.folder / name for name in WEIGHT_FILES if (base.folder / name).is_file()]
    for path in {*shards, *indices, base.folder / CONFIG}:
        link_or_copy(path.resolve(), snapshot / path.name)
    return snapshot


def _check_options(folder: Path, config: Mapping[str, Any]) -> str:
    stored = config.get("vispruner_config")
    if stored is None:
        raise VerifyError("config.json has no vispruner_config: the repo says nothing about how many tokens to keep")
    options = merge_vispruner_config(stored, None)
    if options != stored:
        absent = sorted(set(options) - set(stored))
        raise VerifyError(f"vispruner_config lacks {', '.join(absent)}: build the repo again")
    if unknown := [name for name in options["method"].split("+") if name not in ("none", *SELECTORS)]:
        raise VerifyError(f"vispruner_config.method {unknown[0]!r} is not a registered selector")
    files = "" if options["codebook"] is None else f", {_check_codebook(folder, options['codebook'])}"
    files += "" if options["text_tower"] is None else f", {_check_text_tower(folder, config, options['text_tower'])}"
    if options["method"] == "none":
        return "method none" + files
    count, stages = options["visual_token_num"], options["stage_token_nums"]
    budget = f"{count} tokens" if count is not None else f"stages of {stages} tokens"
    if options["keep_ratio"] is not None:
        budget = f"{options['keep_ratio']:.1%}"
    return f"method {options['method']}, {budget}{files}"


def _require_file(folder: Path, field: str, name: str) -> None:
    if not (folder / name).is_file() or Path(name).name != name:
        raise VerifyError(f"vispruner_config.{field} {name} is no file of the repo: build the repo again")


def _check_text_tower(folder: Path, config: Mapping[str, Any], name: str) -> str:
    """Compare names and shapes; the fresh process loads it, and holds it against the vision tower."""
    _require_file(folder, "text_tower", name)
    shapes = {tensor: header.shape for tensor, header in safetensors_headers(folder / name).items()}
    check_tensors(name, shapes, (config.get("vision_config") or {}).get("hidden_size"))
    processor = read_json(folder / "processor_config.json", MOST_SETTINGS)
    own = engine_auto_map(config["model_type"])
    if own is None or processor.get("auto_map") != own:
        raise VerifyError(
            f"vispruner_config.text_tower {name}: processor_config.json does not name the processor that reads the "
            "question for it: build the repo again"
        )
    return f"a text tower of {len(shapes)} tensors"


def _check_codebook(folder: Path, name: str) -> str:
    _require_file(folder, "codebook", name)
    if (folder / name).stat().st_size > MOST_BYTES:
        raise VerifyError(f"vispruner_config.codebook {name} is larger than {MOST_BYTES / 2**20:g} MiB, which none is")
    found = safetensors_headers(folder / name).get(KEY)
    width = found.shape[-1] if found is not None and found.shape else 0  # the model's is looked at with its weights
    return f"a codebook of {len(read_codebook(folder / name, width))} prototypes"


def _named_files(config: Mapping[str, Any]) -> dict[str, str]:
    """Return by field the files that vispruner_config names."""
    stored = config.get("vispruner_config") or {}
    return {field: stored[field] for field in FILES if stored.get(field) is not None}


def _check_architectures(config: Mapping[str, Any]) -> str:
    own = ARCHITECTURES[config["model_type"]].model_class.__name__
    if config.get("architectures") != [own]:
        raise VerifyError(
            f"architectures is {config.get('architectures')}, it must be ['{own}']: engines pick the class by it and "
            "would serve the dense model"
        )
    return own


def _check_auto_map(config: Mapping[str, Any]) -> str:
    expected, found = auto_map(config["model_type"]), config.get("auto_map")
    if not isinstance(found, dict):
        raise VerifyError(f"config.json has no auto_map: it must map {', '.join(expected)}")
    wrong = [
        f"{name} is {found.get(name)!r}, not {value!r}" for name, value in expected.items() if found.get(name) != value
    ]
    wrong += [f"{name} is not an entry of this architecture" for name in found if name not in expected]
    if wrong:
        raise VerifyError("; ".join(wrong))
    return ", ".join(expected)


def _check_code_files(folder: Path, config: Mapping[str, Any]) -> str:
    package_files = {path.name: path for path in code_files(config["model_type"])}
    present = {path.name for path in folder.glob("*.py")}
    problems = [f"{name} is missing" for name in sorted(package_files.keys() - present)]
    if HANDLER in present:
        package_files[HANDLER] = SOURCE
    problems += [f"{name} is not one of the package's files" for name in sorted(present - package_files.keys())]
    problems += [
        f"{name} differs from the installed package's"
        for name in sorted(present & package_files.keys())
        if (folder / name).read_bytes() != package_files[name].read_bytes()
    ]
    options = config.get("vispruner_config")
    version = options.get("vispruner_version") if isinstance(options, dict) else None
    if problems and isinstance(version, str) and version != __version__:
        own = {path.name: digest(path) for path in folder.glob("*.py")}
        if (known := released_code(version)) and own.items() <= known.items():
            return f"{len(own)} files equal those of vispruner {version}, which built the repo"
        problems.append(
            f"vispruner {version} built the repo and this is {__version__}: verify it with that version, or build it "
            "anew"
        )
    if problems:
        raise VerifyError("; ".join(problems))
    return f"{len(package_files)} files equal the installed package's"


def _check_requirements(folder: Path) -> str:
    lines = (folder / REQUIREMENTS).read_text(encoding="utf-8")
    if strange := strange_requirements(lines):
        raise VerifyError(f"{', '.join(strange)} is no line that a build writes, and an endpoint would install it")
    return "what an Inference Endpoint installs"


def _check_imports(folder: Path) -> str:
    files = sorted(folder.glob("*.py"))
    siblings = {path.stem for path in files}
    problems = [f"{path.name} {problem}" for path in files for problem in forbidden_imports(path, siblings)]
    if problems:
        raise VerifyError("; ".join(problems))
    return "only the standard library, torch, transformers and siblings"


def _check_processor_files(folder: Path) -> str:
    for what, files in (("image processor", IMAGE_PROCESSOR_FILES), ("tokenizer", TOKENIZER_FILES)):
        if not any((folder / name).is_file() for name in files):
            raise VerifyError(f"no {what}: none of {', '.join(files)} is there")
    return "image processor and tokenizer"


def _check_generation_config(folder: Path) -> str:
    pad = read_json(folder / "generation_config.json").get("pad_token_id")
    if pad is None:
        raise VerifyError("generation_config.json has no pad_token_id: batches would be padded by a guess")
    return f"pad_token_id {pad}"


def _refuse_stray_weights(copy: FolderCopy, config: Mapping[str, Any], weights: BaseCheckpoint) -> None:
    """Refuse weight files that would be ignored, or that could run code."""
    unsafe = sorted(name for name in copy.files if name.endswith(UNSAFE_SUFFIXES))
    if unsafe:
        raise VerifyError(f"{', '.join(unsafe)} can run code when loaded: only safetensors are published")
    found = {name for name in copy.files if name.endswith(".safetensors")} - {*_named_files(config).values()}
    if weights.repo_id is not None:
        if stray := sorted(found | {*WEIGHT_FILES} & copy.files.keys()):
            raise VerifyError(f"the repo is thin, so {', '.join(stray)} would be ignored: build it anew, thin or full")
    elif unused := sorted(found - {path.name for path in checkpoint_shards(copy.path)}):
        raise VerifyError(f"{', '.join(unused)} is in no index: its tensors would be ignored")


def _layout_facts(
    config: Mapping[str, Any], headers: Mapping[str, TensorHeader], base_names: Sequence[str], are_published: bool
) -> LayoutFacts:
    """Say how the tensors fit the model that config.json describes, without making that model in this process."""
    settings = {
        "config": {name: value for name, value in config.items() if name != "vispruner_config"},
        "shapes": {name: header.shape for name, header in headers.items()},
        "base_names": base_names,
        "are_published": are_published,
    }
    return _facts_of(json.dumps(settings, sort_keys=True))


@functools.lru_cache(maxsize=8)  # the facts depend on nothing else, and a process takes seconds to start
def _facts_of(settings: str) -> LayoutFacts:
    with isolation() as place:
        outcome = place.run(layout_worker.__file__, [], json.loads(settings), LAYOUT_TIMEOUT)
    results: dict[str, Any] = outcome.results if outcome.is_well else {"error": str(outcome)}
    if "error" in results:
        raise VerifyError(f"config.json describes no model: {results['error']}")
    return LayoutFacts(**results["facts"])


def _hashes(folder: Path, names: Mapping[str, str]) -> dict[str, str]:
    """Return published name -> hash of the tensors in a checkpoint that have one."""
    return {
        names[name]: verify_worker.tensor_hash(tensor)
        for name, tensor in iter_checkpoint_tensors(folder)
        if name in names
    }


def _check_hashes(folder: Path, tied: Sequence[str]) -> str:
    """Read every tensor once: all finite, no matrix stored under two names; the digest names these very weights."""
    seen: dict[str, str] = {}
    digest = hashlib.sha256()
    for name, tensor in iter_checkpoint_tensors(folder):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise VerifyError(f"{name} holds values that are not finite")
        own = verify_worker.tensor_hash(tensor)
        digest.update(f"{name} {own}\n".encode())
        is_constant = bool((tensor == tensor.flatten()[0]).all())
        if tensor.ndim > 1 and not is_constant and name not in tied and seen.setdefault(own, name) != name:
            raise VerifyError(f"{name} and {seen[own]} hold the same values: one of them was copied over the other")
    return f"all tensors are finite, sha256 {digest.hexdigest()[:16]}"


def memory_needed(checkpoint: BaseCheckpoint) -> int:
    """Return the bytes that running the model once takes: weights, activations, interpreter."""
    headers = checkpoint.tensor_headers().values()
    weights = sum(header.dtype.itemsize * _count(header.shape) for header in headers)
    return weights + weights // 4 + 2**30


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def machine_memory() -> int:
    """Return the bytes of memory this process may still take: the machine's, or less in a container."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        limits += [
            int(kib) * 1024 for kib in re.findall(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        ]
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").is_file() and (group / "memory.current").is_file():
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            limits.append(int(limit) - int((group / "memory.current").read_text()))
    return max(min(limits), 0)


def _worker_settings(
    config: Mapping[str, Any], weights: BaseCheckpoint, layout: LayoutFacts, run_models: bool
) -> dict[str, Any]:
    model_class = architecture_of(config["model_type"]).model_class
    return {
        "run_models": run_models,
        "class_name": model_class.__name__,
        "renamed_inputs": model_class.renamed_inputs,
        "modalities": [modality._asdict() for modality in model_class.modalities],
        "weights_folder": str(weights.folder),
        "weight_files": [str(path) for path in checkpoint_shards(weights.folder)] if run_models else [],
        "stored_names": layout.loaded,
    }


def _run_worker(
    place: Isolation, folder: Path, settings: Mapping[str, Any], timeout: float, code: Sequence[str], memory: int
) -> list[Check]:
    """Let `verify_worker` load the folder; code: the hashes of what it may run of it."""
    outcome = place.run(verify_worker.__file__, [str(folder)], settings, timeout, code, memory)
    checks = [Check(*result) for result in outcome.results or ()]
    if not outcome.is_well:
        checks.append(Check("fresh process", "fail", str(outcome)))
    return checks
