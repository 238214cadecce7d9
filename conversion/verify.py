"""Verify a built repo: what it says, what it holds, and, in a fresh process, what it does.

Static checks come first and run here. Only a repo that passes them is loaded, by `verify_worker` in a process of its
own. The weights of a thin repo are those of its base: where they are to be loaded, they are downloaded first.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants

from vispruner import ARCHITECTURES, SELECTORS, auto_map, code_files
from vispruner.codebook_file import read_codebook
from vispruner.configuration_vispruner import merge_vispruner_config

from . import verify_worker
from .base_checkpoint import (
    IMAGE_PROCESSOR_FILES,
    TOKENIZER_FILES,
    BaseCheckpoint,
    find_base,
    is_commit,
    resolve_base,
)
from .checkpoint_io import (
    WEIGHT_FILES,
    TensorHeader,
    checkpoint_shards,
    iter_checkpoint_tensors,
    read_json,
    read_tensor_headers,
)
from .published_layout import ModelLayout, layout_problems, model_layout, without_dropped_layers
from .repo_config import is_hub_id

Status = Literal["pass", "fail", "not run"]

ALLOWED_PACKAGES = frozenset({"torch", "transformers"})
OPTIONAL_PACKAGES = frozenset({"triton"})  # allowed inside `try:`
UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

# The worker's checks, in its order: those that load the weights, and those a model of any size can afford.
LIGHT_CHECKS = ("AutoConfig", "AutoProcessor", "auto classes")
MODEL_CHECKS = (
    "AutoModelForImageTextToText",
    "weights come from the files",
    "KV length falls",
    "keep-all equals stock",
    "AutoModel",
    "pipeline",
)
WORKER_TIMEOUT = 3600.0


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
    """What verify found; a repo passes when no check failed, whether or not all could be run."""

    folder: Path
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.status != "fail" for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.status == "fail")

    def table(self) -> str:
        """Return the checks as aligned lines, and the verdict as the last one."""
        width = max(len(check.name) for check in self.checks)
        lines = [f"{check.status:<9}{check.name:<{width + 2}}{check.detail}".rstrip() for check in self.checks]
        count = {
            status: sum(check.status == status for check in self.checks) for status in ("pass", "fail", "not run")
        }
        verdict = "verified" if self.passed else "refused"
        skipped = f", {count['not run']} not run" if count["not run"] else ""
        lines.append(f"{verdict}: {self.folder} ({count['pass']} passed, {count['fail']} failed{skipped})")
        return "\n".join(lines)


def verify_repo(
    folder: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    available_memory: int | None = None,
    timeout: float = WORKER_TIMEOUT,
) -> Report:
    """Verify a built repo; never raises for what is wrong with it.

    base              compare every tensor's hash with those of this base (a folder, `embedded/...` or a Hub id)
    available_memory  bytes that loading the model may take; by default what this machine has left. A larger model is
                      checked by names, shapes and hashes only, and the report lists what was not run
    timeout           seconds that the fresh process may take
    """
    folder = Path(folder).expanduser().resolve()
    checks = list(_static_checks(folder))
    if all(check.status == "pass" for check in checks) and base is not None:
        checks.append(_run("weights equal the base's", lambda: _compare_with_base(folder, os.fspath(base))))
    if all(check.status == "pass" for check in checks):
        weights = _weights_of(folder)
        needed, free = memory_needed(weights), machine_memory() if available_memory is None else available_memory
        if needed <= free and weights.repo_id is not None:
            checks.append(_run("base weights", lambda: _download(weights)))
    if any(check.status == "fail" for check in checks):
        checks += [Check(name, "not run", "the checks above failed") for name in (*LIGHT_CHECKS, *MODEL_CHECKS)]
        return Report(folder, tuple(checks))
    checks += _run_worker(folder, _worker_settings(folder, weights, run_models=needed <= free), timeout)
    if needed > free:
        if weights.repo_id is None:
            checks.append(_run("weights hash", lambda: _check_hashes(folder)))
        else:
            checks.append(Check("weights hash", "not run", "thin: the weights of the base were not downloaded"))
        if base is None:
            checks.append(Check("weights equal the base's", "not run", "no base was given"))
        reason = f"needs about {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"
        checks += [Check(name, "not run", reason) for name in MODEL_CHECKS]
    return Report(folder, tuple(checks))


def _weights_of(folder: Path) -> BaseCheckpoint:
    """Find the checkpoint that holds a repo's weights: its own folder, or the pinned base of a thin one."""
    options = read_json(folder / "config.json").get("vispruner_config") or {}
    if options.get("weights", "full") != "thin":
        return BaseCheckpoint(folder)
    base, revision = options["base_model_name_or_path"], options["base_model_revision"]
    if not is_hub_id(base) or not is_commit(revision):
        raise VerifyError(
            "the repo is thin, so base_model_name_or_path must be a Hub id and base_model_revision a commit, got "
            f"{base} and {revision}: build the repo again"
        )
    return find_base(base, revision)


def _download(weights: BaseCheckpoint) -> str:
    size = sum(path.stat().st_size for path in checkpoint_shards(weights.with_weights().folder))
    return f"thin: {weights.repo_id} at {weights.commit}, {size / 1e9:.2f} GB, in the local Hub cache"


def _static_checks(folder: Path) -> Iterator[Check]:
    """Check what the files say; later checks need the config, so they are not run without one."""
    later: dict[str, Callable[[], str]] = {
        "vispruner_config": lambda: _check_options(folder, config),
        "architectures": lambda: _check_architectures(config),
        "auto_map": lambda: _check_auto_map(config),
        "code files": lambda: _check_code_files(folder, config["model_type"]),
        "imports": lambda: _check_imports(folder),
        "processor files": lambda: _check_processor_files(folder),
        "generation config": lambda: _check_generation_config(folder),
        "weights": lambda: _check_weights(folder, config),
    }
    config: dict[str, Any] = {}
    first = _run("config.json", lambda: _check_config(folder, config))
    yield first
    for name, check in later.items():
        yield _run(name, check) if first.status == "pass" else Check(name, "not run", "config.json failed")


def _run(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, "pass", check())
    except (ValueError, OSError, SyntaxError) as error:  # CheckpointError, BuildError and LayoutError are ValueErrors
        return Check(name, "fail", str(error))


def _check_config(folder: Path, config: dict[str, Any]) -> str:
    if not folder.is_dir():
        raise VerifyError(f"{folder} is not a folder")
    config.update(read_json(folder / "config.json"))
    if config.get("model_type") not in ARCHITECTURES:
        raise VerifyError(f"model_type is {config.get('model_type')!r}, supported are {', '.join(ARCHITECTURES)}")
    return f"model_type {config['model_type']}"


def _check_options(folder: Path, config: Mapping[str, Any]) -> str:
    stored = config.get("vispruner_config")
    if stored is None:
        raise VerifyError("config.json has no vispruner_config: the repo says nothing about how many tokens to keep")
    options = merge_vispruner_config(stored, None)
    if options != stored:
        absent = sorted(set(options) - set(stored))
        raise VerifyError(f"vispruner_config lacks {', '.join(absent)}: build the repo again")
    if options["method"] not in ("none", *SELECTORS):
        raise VerifyError(f"vispruner_config.method {options['method']!r} is not a registered selector")
    codebook = "" if options["codebook"] is None else f", {_check_codebook(folder, config)}"
    if options["method"] == "none":
        return "method none" + codebook
    count = options["visual_token_num"]
    return (
        f"method {options['method']}, "
        + (f"{count} tokens" if count is not None else f"{options['keep_ratio']:.1%}")
        + codebook
    )


def _check_codebook(folder: Path, config: Mapping[str, Any]) -> str:
    name = str(_codebook_name(config))
    if not (folder / name).is_file() or Path(name).name != name:
        raise VerifyError(f"vispruner_config.codebook {name} is no file of the repo: build the repo again")
    stock = ARCHITECTURES[config["model_type"]].config_class.from_dict(copy.deepcopy(dict(config)))
    return f"a codebook of {len(read_codebook(folder / name, stock.get_text_config().hidden_size))} prototypes"


def _codebook_name(config: Mapping[str, Any]) -> str | None:
    return (config.get("vispruner_config") or {}).get("codebook")


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


def _check_code_files(folder: Path, architecture: str) -> str:
    package_files = {path.name: path for path in code_files(architecture)}
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}
    problems = [f"{name} is missing" for name in sorted(package_files.keys() - present)]
    problems += [f"{name} is not one of the package's files" for name in sorted(present - package_files.keys())]
    problems += [
        f"{name} differs from the installed package's"
        for name in sorted(present & package_files.keys())
        if (folder / name).read_bytes() != package_files[name].read_bytes()
    ]
    if problems:
        raise VerifyError("; ".join(problems))
    return f"{len(package_files)} files equal the installed package's"


def _check_imports(folder: Path) -> str:
    files = sorted(folder.rglob("*.py"))
    siblings = {path.stem for path in folder.glob("*.py")}
    problems = [f"{path.name} {problem}" for path in files for problem in forbidden_imports(path, siblings)]
    if problems:
        raise VerifyError("; ".join(problems))
    return "only the standard library, torch, transformers and siblings"


def forbidden_imports(path: Path, siblings: set[str]) -> list[str]:
    """List the imports of one file that a Hub repo may not have, as sentences with their line numbers."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source, filename=path.name)
    guarded = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.Try)
        for statement in block.body
        for node in ast.walk(statement)
    }
    problems = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.ImportFrom):
            if node.level > 1 or node.module is None or node.module not in siblings:
                written = "." * node.level + (node.module or "")
                problems.append(f"line {node.lineno} imports from {written}: only `from .sibling import name` loads")
            continue
        else:
            continue
        for name in names:
            package = name.partition(".")[0]
            known = package in ALLOWED_PACKAGES or package in sys.stdlib_module_names
            if not known and not (package in OPTIONAL_PACKAGES and id(node) in guarded):
                problems.append(f"line {node.lineno} imports {name}: not the standard library, torch or transformers")
    # transformers looks for relative imports in the text, docstrings included, and wants a file for each.
    for sibling in re.findall(r"^\s*(?:from|import)\s+\.(\S+)", source, flags=re.MULTILINE):
        if sibling not in siblings:
            problems.append(f"has a line that reads like an import of .{sibling}, which is no file of the repo")
    return problems


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


def _check_weights(folder: Path, config: Mapping[str, Any]) -> str:
    unsafe = sorted(path.name for path in folder.rglob("*") if path.suffix in UNSAFE_SUFFIXES)
    if unsafe:
        raise VerifyError(f"{', '.join(unsafe)} can run code when loaded: only safetensors are published")
    weights = _weights_of(folder)
    if weights.repo_id is not None:
        return _check_base_weights(folder, config, weights)
    headers = read_tensor_headers(folder)
    unused = sorted(
        {path.name for path in folder.glob("*.safetensors")}
        - {path.name for path in checkpoint_shards(folder)}
        - {_codebook_name(config)}
    )
    if unused:
        raise VerifyError(f"{', '.join(unused)} is in no index: its tensors would be ignored")
    if problems := layout_problems(_layout(config), {name: header.shape for name, header in headers.items()}):
        raise VerifyError("; ".join(problems))
    return f"{len(headers)} tensors, names and shapes are the model's"


def _check_base_weights(folder: Path, config: Mapping[str, Any], base: BaseCheckpoint) -> str:
    """Check a thin repo by what the headers of its base say; unlike in a full repo, they may have other names."""
    stray = sorted(
        path.name
        for path in folder.iterdir()
        if (path.suffix == ".safetensors" or path.name in WEIGHT_FILES) and path.name != _codebook_name(config)
    )
    if stray:
        raise VerifyError(f"the repo is thin, so {', '.join(stray)} would be ignored: build it again, thin or full")
    headers = base.tensor_headers()
    layout = _layout(config)
    names = without_dropped_layers(layout.published_names(headers), config)
    found = {published: headers[name].shape for name, published in names.items()}
    if problems := layout_problems(layout, found):
        raise VerifyError(f"the base {base.repo_id} at {base.commit} does not fit: {'; '.join(problems)}")
    return f"thin: {len(found)} tensors of {base.repo_id} at {base.commit}, names and shapes are the model's"


def _layout(config: Mapping[str, Any]) -> ModelLayout:
    """Return the layout of the model whatever its pruning options, which have a check of their own."""
    return model_layout(config["model_type"], {**config, "vispruner_config": {"method": "none"}})


def _compare_with_base(folder: Path, base: str) -> str:
    """Compare the hash of every tensor with the base's, one tensor of each in memory at a time."""
    config = read_json(folder / "config.json")
    places = (_weights_of(folder).with_weights().folder, resolve_base(base))
    own, other = (_hashes(where, config) for where in places)
    wrong = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
    if wrong:
        raise VerifyError(f"{len(wrong)} tensors are not those of {base}: {', '.join(wrong[:8])}")
    return f"{len(own)} tensors hash as in {base}"


def _hashes(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return published name -> hash of every tensor of a checkpoint, but for layers that `config` leaves out."""
    names = without_dropped_layers(_layout(config).published_names(read_tensor_headers(folder)), config)
    return {
        names[name]: verify_worker.tensor_hash(tensor)
        for name, tensor in iter_checkpoint_tensors(folder)
        if name in names
    }


def _check_hashes(folder: Path) -> str:
    """Read every tensor once: all finite, no matrix stored under two names; the digest names these very weights."""
    seen: dict[str, str] = {}
    digest = hashlib.sha256()
    tied = _layout(read_json(folder / "config.json")).tied
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


def _worker_settings(folder: Path, weights: BaseCheckpoint, run_models: bool) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    architecture = ARCHITECTURES[config["model_type"]]
    return {
        "run_models": run_models,
        "thin": weights.repo_id is not None,
        "class_name": architecture.model_class.__name__,
        "renamed_inputs": architecture.model_class.renamed_inputs,
        "modalities": [modality._asdict() for modality in architecture.model_class.modalities],
        "weights_folder": str(weights.folder),
        "weight_files": [str(path) for path in checkpoint_shards(weights.folder)] if run_models else [],
        "stored_names": _loaded_to_stored(weights.tensor_headers(), config),
    }


def _loaded_to_stored(headers: Mapping[str, TensorHeader], config: Mapping[str, Any]) -> dict[str, str]:
    """Return how a loaded model's tensors are called in the files."""
    layout = _layout(config)
    names = without_dropped_layers(layout.published_names(headers), config)
    return {layout.loaded[published]: name for name, published in names.items() if published in layout.loaded}


def _run_worker(folder: Path, settings: Mapping[str, Any], timeout: float) -> list[Check]:
    """Run `verify_worker` from an empty folder, with caches of its own, no network and no access to this package."""
    with tempfile.TemporaryDirectory(prefix="vispruner-verify-") as name:
        scratch = Path(name)
        worker = Path(shutil.copy(verify_worker.__file__, scratch))
        settings_file, results_file = scratch / "settings.json", scratch / "results.json"
        settings_file.write_text(json.dumps(settings), encoding="utf-8")
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(scratch / "home"),
            # A thin repo's weights are in the user's cache, to which nothing is written offline.
            "HF_HUB_CACHE": constants.HF_HUB_CACHE if settings["thin"] else str(scratch / "hub"),
            "HF_MODULES_CACHE": str(scratch / "modules"),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, str(worker), str(folder), str(settings_file), str(results_file)]
        try:
            process = subprocess.run(
                command, cwd=scratch, env=environment, capture_output=True, text=True, timeout=timeout, check=False
            )
            ended, errors = f"exit status {process.returncode}", process.stderr
        except subprocess.TimeoutExpired as error:
            ended, errors = f"no end after {timeout:g} s", str(error.stderr or "")
        results = json.loads(results_file.read_text(encoding="utf-8")) if results_file.is_file() else []
    checks = [Check(*result) for result in results]
    if ended != "exit status 0":
        last = errors.strip().splitlines()[-1:] or ["it printed nothing"]
        checks.append(Check("fresh process", "fail", f"{ended}: {last[0]}"))
    return checks
