"""What vLLM was started with, as the front end and every worker read it: the same options in all of them."""

from importlib.metadata import requires
from typing import Any

import vllm
from packaging.requirements import Requirement
from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from vispruner.configuration_vispruner import VisPrunerOptions

from .launch_options import merged_options, readings, require_known_overrides

logger = init_logger(f"vllm.{__name__}")  # vLLM shows only what its own loggers say


def launch_options(model_config: ModelConfig) -> VisPrunerOptions:
    """Return the `vispruner_config` of this launch, that of --hf-overrides laid over the repo's.

    vLLM itself has replaced the repo's by the launch's, so the repo's is read again.
    """
    require_known_engine()
    config, overrides = model_config.hf_config, model_config.hf_overrides
    given = None
    if isinstance(overrides, dict):
        require_known_overrides(overrides)
        given = overrides.get("vispruner_config")
    if given is None:
        return merged_options(config, getattr(config, "vispruner_config", None), None)
    repo = get_hf_file_to_dict("config.json", model_config.model, model_config.revision) or {}
    return merged_options(config, repo.get("vispruner_config"), given)


def require_known_engine() -> None:
    """Raise ValueError for a vLLM that the extra `vllm` of this package would not install."""
    for requirement in map(Requirement, requires("vispruner") or []):
        known = requirement.specifier
        if requirement.name == "vllm" and not known.contains(vllm.__version__, prereleases=True):
            raise ValueError(
                f"vLLM {vllm.__version__} is not one that this version of vispruner can serve pruned models with: "
                f"install vllm{known}, or another version of vispruner"
            )


def refuse_bypasses(vllm_config: VllmConfig, options: VisPrunerOptions) -> None:
    """Raise ValueError for what would encode pictures without the attention that tokens are ranked by, or dense."""
    model_config, compilation = vllm_config.model_config, vllm_config.compilation_config
    if getattr(compilation, "cudagraph_mm_encoder", False):
        raise ValueError(
            "compilation_config.cudagraph_mm_encoder runs the vision encoder where no visual token is dropped: start "
            "the server without it"
        )
    if options.method == "none" or not readings(model_config.hf_config, options).all:
        return
    bypasses = {
        '--mm-encoder-tp-mode "data"': getattr(model_config.multimodal_config, "mm_encoder_tp_mode", None) == "data",
        "compilation_config.compile_mm_encoder": getattr(compilation, "compile_mm_encoder", False),
    }
    for name, is_on in bypasses.items():
        if is_on:
            raise ValueError(
                f"{name} runs the vision encoder where its attention cannot be read, by which "
                f'vispruner_config.method "{options.method}" ranks visual tokens: start the server without it, or '
                'with a method that reads none, such as "divprune"'
            )


def read_weights_of_base(model_config: ModelConfig, options: VisPrunerOptions) -> None:
    """Let vLLM read the weights of a thin repo, which holds none, where its config.json says they are."""
    base, revision = options.base_model_name_or_path, options.base_model_revision
    if options.weights == "thin" and base != model_config.model:
        logger.info_once("The weights are those of %s at %s", base, revision)
        model_config.model, model_config.revision = base, revision
        overrides: Any = model_config.hf_overrides
        if isinstance(overrides, dict):  # from now on the repo's own config.json is out of reach
            model_config.hf_overrides = {**overrides, "vispruner_config": options.to_dict()}
