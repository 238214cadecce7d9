"""Thin repos: one whose config.json says `"weights": "thin"` holds none; they are the base's, at the recorded commit.

Only weights are read from the base. Its code never runs, and config and generation config are the thin repo's own.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig
from transformers.utils import cached_file

from .configuration_vispruner import merge_vispruner_config

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "revision", "subfolder")
# What `from_pretrained` of a config would take for fields of its own; they belong to the model's loading.
LOADING_OPTIONS = ("dtype", "torch_dtype", "quantization_config", "trust_remote_code")


@dataclass(frozen=True)
class ThinRepo:
    """A repo without weights, and where they are; `commit` is its own, where transformers has noted it."""

    name: str
    commit: str | None
    base: str
    revision: str

    def __str__(self) -> str:
        return f"{self.base} at revision {self.revision}"

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
    """Return the repo that `from_pretrained` was asked for, with `arguments`, when its config.json says it is thin."""
    if name_or_path is None or arguments.get("gguf_file"):
        return None
    config = arguments.get("config")
    if getattr(config, "name_or_path", None) == str(name_or_path):
        stored = getattr(config, "vispruner_config", None)
    else:  # a config from elsewhere says nothing about the weights of this repo
        where = {name: arguments[name] for name in HUB_OPTIONS if name in arguments}
        stored = config_class.get_config_dict(name_or_path, **where)[0].get("vispruner_config")
    if not stored or stored.get("weights", "full") != "thin":
        return None
    options = merge_vispruner_config(stored, arguments.get("vispruner_config"))
    base, revision = options["base_model_name_or_path"], options["base_model_revision"]
    return ThinRepo(str(name_or_path), getattr(config, "_commit_hash", None), base, revision)
