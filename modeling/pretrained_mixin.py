"""Load a pruned model so that no weight is random, and save it so that it never comes back dense."""

import copy
import functools
import os
import shutil
import tempfile
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .base_weights import HUB_OPTIONS, find_thin_repo
from .configuration_vispruner import merge_vispruner_config
from .selectors import require_published
from .stock_versions import warn_if_untested

AUTO_MODEL_CLASSES = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


def stock_class_of(cls: type) -> type:
    """Return the class of transformers that a pruned one is made from."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("transformers.models."))


class PretrainedMixin:
    """For the ForConditionalGeneration class. Modifications against stock:

    * `save_pretrained` writes the code files, `auto_map` and the files that it names
    * `from_pretrained` refuses missing weights, and takes those of a thin repo from its base
    """

    config: Any
    config_class: Any
    model: Any
    _auto_class = "AutoModelForImageTextToText"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Stock `from_pretrained`, but weights that the checkpoint lacks are an error, never random numbers.

        vispruner_config  a dict of fields; a partial one is merged over the stored one
        The weights of a thin repo are loaded from the base that its config.json names.
        """
        warn_if_untested()
        wants_info = kwargs.pop("output_loading_info", False)
        where = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        thin = find_thin_repo(cls.config_class, pretrained_model_name_or_path, kwargs)
        config = kwargs.get("config")
        if "vispruner_config" in kwargs and hasattr(config, "to_dict"):
            changes = kwargs.pop("vispruner_config")
            kwargs["config"] = copy.deepcopy(config)
            kwargs["config"].vispruner_config = merge_vispruner_config(
                getattr(config, "vispruner_config", None), changes
            )
        load = functools.partial(super().from_pretrained, output_loading_info=True)  # type: ignore[misc]
        if thin is None:
            model, info = load(pretrained_model_name_or_path, *model_args, **kwargs)
        else:
            kwargs = thin.loading_arguments(cls.config_class, kwargs)
            with thin.errors_name_the_base(kwargs):
                thin.refuse_adapter(kwargs)
                model, info = load(thin.base, *model_args, **kwargs)
            thin.take_back(model)
        missing = sorted(info["missing_keys"])
        if not kwargs.get("ignore_mismatched_sizes"):
            missing += sorted(str(key) for key in info["mismatched_keys"])
        if missing:
            raise ValueError(
                f"{thin or pretrained_model_name_or_path} lacks weights of {cls.__name__}, which would be random: "
                f"{', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''} ({len(missing)} in all). "
                "Check that the checkpoint is complete and of this architecture"
            )
        model.model.load_files(pretrained_model_name_or_path, **where)
        vars(model.generation_config).pop("vispruner_config", None)  # stock offers it every keyword of this call
        return (model, info) if wants_info else model

    @classmethod
    def vispruner_auto_map(cls) -> dict[str, str]:
        """Return the `auto_map` with which config.json makes the Auto classes load this class."""
        module = cls.__module__.rsplit(".", 1)[-1]
        config_module = cls.config_class.__module__.rsplit(".", 1)[-1]
        stock = stock_class_of(cls).__name__
        answers_as_text_model = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(cls.config_class.model_type) == stock
        names = (*AUTO_MODEL_CLASSES, "AutoModelForCausalLM") if answers_as_text_model else AUTO_MODEL_CLASSES
        models = dict.fromkeys(names, f"{module}.{cls.__name__}")
        return {"AutoConfig": f"{config_module}.{cls.config_class.__name__}", **models}

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Stock `save_pretrained` (and `push_to_hub`); the folder carries its code, so that it never loads dense.

        Raises ValueError, before anything is written, for a method whose code the folder would not carry.
        """
        for method in self.model.methods:
            if method is not None:
                require_published(method)
        self.config.auto_map = self.vispruner_auto_map()
        stored = {**self.config.vispruner_config, "weights": "full"}
        self.config.vispruner_config = {**stored, **self._save_files(save_directory)}
        try:
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.config.vispruner_config = stored

    def _save_files(self, save_directory: Any) -> dict[str, str]:
        """Copy the files that `vispruner_config` names, and return by field the names they have in the folder."""
        paths, config = self.model.paths_of_files, self.config.vispruner_config
        named = {field: path for field, path in paths.items() if config.get(field) is not None}
        if len({os.path.basename(path) for path in named.values()}) < len(named):
            raise ValueError(
                f"vispruner_config: {' and '.join(named)} are files of the same name, of which a repo can hold one: "
                "rename one and give it anew"
            )
        return {field: _copied(path, save_directory) for field, path in named.items()}

    def _get_files_timestamps(self, working_dir: Any) -> dict[str, float]:
        """Stock uploads what is newer than this list; those files are written before stock makes it."""
        stamps = super()._get_files_timestamps(working_dir)  # type: ignore[misc]
        for path in self.model.paths_of_files.values():
            stamps.pop(os.path.basename(path), None)
        return stamps


def _copied(path: str, folder: Any) -> str:
    """Copy a file into a folder, which is made, and return its name there."""
    name = os.path.basename(path)
    os.makedirs(folder, exist_ok=True)
    # In a folder that nobody else can foresee or enter: a link that stands in the way is replaced, not followed.
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder) as inner:
        shutil.copyfile(path, os.path.join(inner, name))
        os.replace(os.path.join(inner, name), os.path.join(folder, name))
    return name
