"""What the vLLM models share: the launch's `vispruner_config`, the saliency of one layer, and the selection.

The method is the package's own: nothing here knows how tokens are ranked.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from vispruner.configuration_vispruner import VisPrunerOptions, merge_vispruner_config
from vispruner.pruned_encoder import VisPrunerModelMixin, VisualTokens
from vispruner.token_selection import SELECTORS
from vispruner.visual_attention import cls_saliency

logger = init_logger(f"vllm.{__name__}")  # vLLM shows only what its own loggers say

HOW_TO_SET = '--hf-overrides \'{"vispruner_config": {"visual_token_num": 128}}\''

# What transformers 5 saves lacks a level of the tower's names that vLLM's own LLaVA expects.
TOWER_NAMES = WeightsMapper(
    orig_to_new_regex={re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)"): "vision_tower.vision_model."}
)


def launch_options(model_config: ModelConfig) -> VisPrunerOptions:
    """Return the `vispruner_config` of this launch: that of the repo with the one of --hf-overrides laid over it.

    Raises ValueError for a config that cannot be served pruned. vLLM itself replaces the repo's by the launch's.
    """
    config, overrides = model_config.hf_config, model_config.hf_overrides
    given = overrides.get("vispruner_config") if isinstance(overrides, dict) else None
    stored = getattr(config, "vispruner_config", None)
    if given is not None:
        repo = get_hf_file_to_dict("config.json", model_config.model, model_config.revision) or {}
        stored = repo.get("vispruner_config")
    if given is None and stored is None:
        raise ValueError(f"{model_config.model} has no vispruner_config: say how many tokens to keep, {HOW_TO_SET}")
    options = VisPrunerOptions.from_dict(merge_vispruner_config(stored, given))
    if options.method != "none":
        _check(config, options)
    return options


def _check(config: Any, options: VisPrunerOptions) -> None:
    if options.method not in SELECTORS:
        raise ValueError(
            f"vispruner_config.method must be one of {[*sorted(SELECTORS), 'none']}, got {options.method!r}"
        )
    if options.position_policy == "original":
        raise ValueError(
            'vispruner_config.position_policy "original" cannot be served: vLLM numbers the tokens of a prompt itself '
            '(use null or "renumber")'
        )
    tower, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
    if tower != "clip_vision_model":
        raise ValueError(
            f"vision_config.model_type must be clip_vision_model, got {tower!r}: tokens are ranked by the attention "
            "of a [CLS] token, which it lacks"
        )
    if strategy != "default":
        raise ValueError(f'vision_feature_select_strategy must be "default" (no [CLS]), got {strategy!r}')
    if not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"vision_feature_layer must be one layer, got {config.vision_feature_layer}: vLLM's tower has one output"
        )
    layers = config.vision_config.num_hidden_layers
    built = config.vision_feature_layer % (layers + 1)  # vLLM builds the tower up to the layer that features come from
    if built == 0:
        raise ValueError("vision_feature_layer 0 is the embedding, which no attention layer produces")
    wanted = built - 1 if options.attention_layer is None else options.attention_layer
    if not -layers <= wanted < layers or wanted % layers >= built:
        raise ValueError(
            f"vispruner_config.attention_layer must be one of the first {built} encoder layers, got {wanted}: features "
            f"come from those, and vLLM builds no more of the {layers}"
        )


def patches_per_tile(config: Any) -> int:
    """Return N, the visual tokens of one image or tile before pruning."""
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2


class PrunedVision:
    """Mixin for a vLLM LLaVA: encode with saliency, then select. Goes before the stock class in the bases."""

    config: Any
    vision_tower: Any
    vispruner_options: VisPrunerOptions
    select = VisPrunerModelMixin.select

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        options = launch_options(vllm_config.model_config)
        _read_weights_of_base(vllm_config.model_config, options)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.vispruner_options = options
        patches = patches_per_tile(self.config)
        logger.info_once("VisPruner keeps %d of %d visual tokens per image or tile", options.budget(patches), patches)

    @property
    def keeps_all(self) -> bool:
        patches = patches_per_tile(self.config)
        return self.vispruner_options.budget(patches) == patches

    @property
    def side(self) -> int:
        """Patches along one side of an image or tile."""
        return self.config.vision_config.image_size // self.config.vision_config.patch_size

    def select_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode images or tiles (B, 3, height, width); return their features (B, N, C) and the kept indices (B, T)."""
        wanted, layers = self.vispruner_options.attention_layer, self.config.vision_config.num_hidden_layers
        encoder = self.vision_tower.vision_model.encoder
        attention = encoder.layers[-1 if wanted is None else wanted % layers].self_attn
        with _recorded_queries_and_keys(attention.attn) as recorded:
            features = super()._image_pixels_to_features(self.vision_tower, pixel_values)  # type: ignore[misc]
        if len(recorded) != 1:
            raise RuntimeError(
                f"{type(attention.attn).__name__} was called {len(recorded)} times instead of once, so tokens cannot "
                "be ranked: this version of vLLM is not supported"
            )
        tokens = VisualTokens(features, _saliency(attention, *recorded[0]), grid=(self.side, self.side))
        return features, self.select(tokens, self.vispruner_options.budget(features.shape[1]))

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Turn features (..., C) into visual tokens (..., D), for the selectors that compare those."""
        return self.multi_modal_projector(features)  # type: ignore[attr-defined]


def _read_weights_of_base(model_config: ModelConfig, options: VisPrunerOptions) -> None:
    """Let vLLM read the weights of a thin repo, which holds none, where its config.json says they are."""
    if options.weights == "thin" and options.base_model_name_or_path != model_config.model:
        logger.info_once("Weights come from %s at %s", options.base_model_name_or_path, options.base_model_revision)
        model_config.model, model_config.revision = options.base_model_name_or_path, options.base_model_revision


@contextmanager
def _recorded_queries_and_keys(attention: nn.Module) -> Iterator[list[Sequence[torch.Tensor]]]:
    """Record what vLLM's attention layer is called with: queries, keys, values by position, (B, 1+N, H * d) each."""
    recorded: list[Sequence[torch.Tensor]] = []
    handle = attention.register_forward_pre_hook(lambda _, arguments: recorded.append(arguments[:2]))
    try:
        yield recorded
    finally:
        handle.remove()


def _saliency(attention: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return (B, N); under tensor parallelism each rank has some heads, and all must rank by all of them."""
    heads = attention.num_heads_per_partition
    query, key = (states.unflatten(-1, (heads, -1)).transpose(1, 2) for states in (query, key))
    saliency = cls_saliency(query, key, attention.scale)
    if attention.tp_size == 1:
        return saliency
    return tensor_model_parallel_all_reduce(saliency) / attention.tp_size
