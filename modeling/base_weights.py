"""Thin repos: one whose config.json says `"weights": "thin"` holds none; they are the base's, at the recorded commit.

Only weights are read from the base. Its code never runs, and config and generation config are the thin repo's own.
The base that config.json names is a Hub repo at a commit, and no folder is taken for it; whoever loads the model can
name another one.
"""

import copy
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig
from transformers.utils import cached_file, is_peft_available

from .configuration_vispruner import merge_vispruner_config
from .stock_versions import known_commit

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder")
# What `from_pretrained` of a config would take for fields of its own; they belong to the model's loading.
LOADING_OPTIONS = ("dtype", "torch_dtype", "quantization_config", "trust_remote_code")
BASE_FIELDS = ("base_model_name_or_path", "base_model_revision")
TELL_BY_NAME = (
    "Whoever means another base names it: vispruner_config={'base_model_name_or_path': ...}, a Hub id or a path such "
    "as ./folder"
)
HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class ThinRepo:
    """A repo without weights, and where they are; `commit` is its own, where transformers has noted it."""

    name: str
    commit: str | None
    base: str
    revision: str

    def __str__(self) -> str:
        return f"{self.base} at revision {self.revision}"

    def require_hub_base(self) -> None:
        """Raise ValueError unless the base is a Hub repo at a commit, and no folder here could be taken for it."""
        if not HUB_ID.fullmatch(self.base) or not COMMIT.fullmatch(self.revision):
            raise ValueError(
                f"{self.name} is a thin repo, and its config.json names {self} as its base: that must be a Hub id "
                f"(owner/name) at a commit of 40 digits. {TELL_BY_NAME}"
            )
        if os.path.exists(self.base):
            raise ValueError(
                f"{self.name} is a thin repo, and in the working directory there is a folder with the name of its "
                f"base, {self.base}, which would be loaded in its place: start somewhere else. {TELL_BY_NAME}"
            )

    def loading_arguments(self, config_class: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """Turn the arguments that `from_pretrained` got for this repo into those for its base."""
        arguments = {name: value for name, value in arguments.items() if name != "_commit_hash"}
        if arguments.pop("subfolder", None):
            raise ValueError(f"{self.name} is a thin repo, which lies at the top of its repo: leave out subfolder")
        where = {name: arguments.pop(name) for name in HUB_OPTIONS if name in arguments}
        config = arguments.pop("config", None)
        if hasattr(config, "to_dict"):
            config = copy.deepcopy(config)
        else:
            held = {name: arguments.pop(name) for name in LOADING_OPTIONS if name in arguments}
            source = self.name if config is None else config
            config, arguments = config_class.from_pretrained(source, return_unused_kwargs=True, **where, **arguments)
            arguments.update(held)
        config._commit_hash = None  # else older transformers look for the thin repo's commit in the base
        # The loaded model has its weights: what is saved from it is a full repo.
        stored = getattr(config, "vispruner_config", None)
        config.vispruner_config = merge_vispruner_config(stored, {"weights": "full"})
        # Given, so that neither the base's is taken nor the base searched for code that replaces `generate`.
        if arguments.get("generation_config") is None:
            arguments["generation_config"] = GenerationConfig.from_pretrained(self.name, **where)
        # Where no adapter was asked for, stock looks for one beside the weights: at that commit, and no other.
        adapter = arguments.pop("adapter_kwargs", None) or {}
        if "_adapter_model_path" not in adapter:
            adapter = {**adapter, "revision": self.revision}
        return {**arguments, **where, "config": config, "revision": self.revision, "adapter_kwargs": adapter}

    def refuse_adapter(self, arguments: dict[str, Any]) -> None:
        """Raise ValueError for a base that is an adapter of another, whose weights stock would load instead."""
        if not is_peft_available() or "_adapter_model_path" in arguments["adapter_kwargs"]:
            return
        quietly = {
            f"_raise_exceptions_for_{kind}": False for kind in ("gated_repo", "missing_entries", "connection_errors")
        }
        where = {name: arguments[name] for name in HUB_OPTIONS if name in arguments}
        where |= known_commit(self.revision)
        if cached_file(self.base, "adapter_config.json", **quietly, **where) is not None:
            raise ValueError(f"{self.name} is a thin repo, and its base {self} holds an adapter, which is not loaded")

    @contextmanager
    def errors_name_the_base(self, arguments: dict[str, Any]) -> Iterator[None]:
        """Say of a base that cannot be read which one it is and what to do; look for it before its weights."""
        where = {name: arguments[name] for name in HUB_OPTIONS if name in arguments and name != "force_download"}
        try:
            cached_file(self.base, "config.json", **where)  # for weights, stock takes no access for no such file
            yield
        except OSError as error:
            if error.errno is not None:  # of this machine, such as a full disk
                raise
            raise OSError(
                f"{self.name} is a thin repo: its weights are those of {self}, which cannot be read. Check that this "
                "base still exists and that you may read it (token=..., terms to accept), go online if it is not in "
                "the cache yet, or say where else these weights are: vispruner_config={'base_model_name_or_path': "
                f"...}}, a folder or a Hub id. The reason was: {error}"
            ) from error

    def take_back(self, model: Any) -> None:
        """Let the model be called by the thin repo's name, where its code is; the base alone would load dense."""
        model.name_or_path = model.config.name_or_path = self.name
        model.config._commit_hash = self.commit


def find_thin_repo(config_class: Any, name_or_path: Any, arguments: dict[str, Any]) -> ThinRepo | None:
    """Return the repo that `from_pretrained` was asked for, with `arguments`, when its config.json says it is thin.

    Raises ValueError for a base that is no Hub repo at a commit, unless the caller names it.
    """
    if name_or_path is None or arguments.get("gguf_file"):
        return None
    config = arguments.get("config")
    where = {name: arguments[name] for name in HUB_OPTIONS if name in arguments}
    if getattr(config, "name_or_path", None) == str(name_or_path):
        stored = getattr(config, "vispruner_config", None)
    else:  # a config from elsewhere says nothing about the weights of this repo
        stored = config_class.get_config_dict(name_or_path, **where)[0].get("vispruner_config")
    if not stored or stored.get("weights", "full") != "thin":
        return None
    changes = arguments.get("vispruner_config") or {}
    options = merge_vispruner_config(stored, changes)
    repo = ThinRepo(
        name=str(name_or_path),
        commit=getattr(config, "_commit_hash", None),
        base=options["base_model_name_or_path"],
        revision=options["base_model_revision"],
    )
    # What a caller gave to an Auto class is in the config by now: it is what the file of the repo does not say.
    written = config_class.get_config_dict(name_or_path, **where)[0].get("vispruner_config") or {}
    if not changes.keys() & {*BASE_FIELDS} and all(written.get(name) == options[name] for name in BASE_FIELDS):
        repo.require_hub_base()
    return repo
