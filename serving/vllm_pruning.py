"""What the vLLM models share: the launch's `vispruner_config`, the saliency of one layer, and the selection.

The method is the package's own: nothing here knows how tokens are ranked.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from vispruner.choosing import choose
from vispruner.configuration_vispruner import VisPrunerOptions
from vispruner.selector_registry import Selection
from vispruner.visual_attention import SALIENCY_KINDS
from vispruner.visual_features import VisualTokens

from .launch_options import merged_options, readings, side_of_tile

logger = init_logger(f"vllm.{__name__}")  # vLLM shows only what its own loggers say

# What transformers saves lacks a level of the tower's names that vLLM's own LLaVA expects.
TOWER_NAMES = WeightsMapper(
    orig_to_new_regex={re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)"): "vision_tower.vision_model."}
)


def launch_options(model_config: ModelConfig) -> VisPrunerOptions:
    """Return the `vispruner_config` of this launch, that of --hf-overrides laid over the repo's.

    vLLM itself has replaced the repo's by the launch's, so the repo's is read again.
    """
    config, overrides = model_config.hf_config, model_config.hf_overrides
    given = overrides.get("vispruner_config") if isinstance(overrides, dict) else None
    if given is None:
        return merged_options(config, getattr(config, "vispruner_config", None), None)
    repo = get_hf_file_to_dict("config.json", model_config.model, model_config.revision) or {}
    return merged_options(config, repo.get("vispruner_config"), given)


class PrunedVision:
    """Mixin for a vLLM LLaVA: encode with saliency, then select. Goes before the stock class in the bases."""

    config: Any
    vision_tower: Any
    vispruner_options: VisPrunerOptions
    supports_tower_connector_lora = False  # stock counts the rows of tower and projector without pruning

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        options = launch_options(vllm_config.model_config)
        _read_weights_of_base(vllm_config.model_config, options)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.vispruner_options = options
        patches = self.side**2
        logger.info_once("VisPruner keeps %d of %d visual tokens per image or tile", options.budget(patches), patches)

    @property
    def side(self) -> int:
        """Patches along one side of an image or tile."""
        return side_of_tile(self.config)

    @property
    def keeps_all(self) -> bool:
        return self.vispruner_options.budget(self.side**2) == self.side**2

    def select_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, Selection]:
        """Encode images or tiles (B, 3, height, width); return features (B, N, C), and which T of the N stay."""
        layers = self.vision_tower.vision_model.encoder.layers
        wanted = readings(self.config, self.vispruner_options)
        attentions = [layers[reading.layer].self_attn for reading in wanted]
        with _recorded_queries_and_keys([attention.attn for attention in attentions]) as recorded:
            features = super()._image_pixels_to_features(self.vision_tower, pixel_values)  # type: ignore[misc]
        if [len(calls) for calls in recorded] != [1] * len(recorded):
            raise RuntimeError(
                f"{type(attentions[0].attn).__name__} was not called once in every layer that tokens are ranked by: "
                "this version of vLLM is not supported"
            )
        saliency, *others = [
            _saliency(reading.kind, attention, *calls[0])
            for reading, attention, calls in zip(wanted, attentions, recorded, strict=True)
        ]
        further = torch.stack(others, dim=1) if others else None
        tokens = VisualTokens(features, saliency, further, (self.side, self.side))
        budget = self.vispruner_options.budget(features.shape[1])
        return features, choose(self.vispruner_options, tokens, budget, project=self.project)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Turn features (..., C) into visual tokens (..., D), for the selectors that compare those."""
        return self.multi_modal_projector(features)  # type: ignore[attr-defined]


def _read_weights_of_base(model_config: ModelConfig, options: VisPrunerOptions) -> None:
    """Let vLLM read the weights of a thin repo, which holds none, where its config.json says they are."""
    base, revision = options.base_model_name_or_path, options.base_model_revision
    if options.weights == "thin" and base != model_config.model:
        logger.info_once("The weights are those of %s at %s", base, revision)
        model_config.model, model_config.revision = base, revision
        if isinstance(model_config.hf_overrides, dict):  # from now on the repo's own config.json is out of reach
            model_config.hf_overrides = {**model_config.hf_overrides, "vispruner_config": options.to_dict()}


@contextmanager
def _recorded_queries_and_keys(attentions: Sequence[nn.Module]) -> Iterator[list[list[Sequence[torch.Tensor]]]]:
    """Record what vLLM's attention layers are called with: queries, keys, ... by position, (B, 1+N, H * d) each."""
    recorded: list[list[Sequence[torch.Tensor]]] = [[] for _ in attentions]
    with ExitStack() as stack:
        for attention, calls in zip(attentions, recorded, strict=True):
            hook = attention.register_forward_pre_hook(lambda _, arguments, calls=calls: calls.append(arguments[:2]))
            stack.callback(hook.remove)
        yield recorded


def _saliency(kind: str, attention: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return (B, N); under tensor parallelism each rank has some heads, and all must rank by all of them."""
    heads = attention.num_heads_per_partition
    query, key = (states.unflatten(-1, (heads, -1)).transpose(1, 2) for states in (query, key))
    saliency = SALIENCY_KINDS[kind](query, key, attention.scale)
    if attention.tp_size == 1:
        return saliency
    return tensor_model_parallel_all_reduce(saliency.contiguous()) / attention.tp_size
