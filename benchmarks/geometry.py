"""LLaVA geometries and models with random weights for measuring speed: every model of a comparison shares one set.

A language model of 32 layers need not hold 32 different ones: a few distinct layers, read in turn, cost the same time
as long as together they are larger than the processor's caches. Every layer stays a module of its own, with its own
index, KV-cache slot and hooks; only its parameters are another layer's.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, PreTrainedModel

from vispruner import VisPrunerLlavaConfig

BUDGETS = (576, 192, 128, 64, 32, 16)
CLIP_L_336 = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)


def _vicuna(width: int, mlp_width: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32064,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        pad_token_id=0,
    )


def _tiny_config() -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=112,
        patch_size=14,
        projection_dim=64,
    )
    text = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=0,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=511)


GEOMETRIES = {
    "llava-1.5-7b": lambda: LlavaConfig(
        vision_config=CLIP_L_336, text_config=_vicuna(4096, 11008, 32, 32), image_token_id=32000
    ),
    "llava-1.5-13b": lambda: LlavaConfig(
        vision_config=CLIP_L_336, text_config=_vicuna(5120, 13824, 40, 40), image_token_id=32000
    ),
    # CLIP before a language model of half a billion weights: one that a busy machine can time, too.
    "llava-0.5b": lambda: LlavaConfig(
        vision_config=CLIP_L_336, text_config=_vicuna(1024, 2816, 24, 16), image_token_id=32000
    ),
    "tiny": _tiny_config,
}


def load_geometry(name: str) -> LlavaConfig:
    """Return a named geometry, or that of a config.json (or of a folder that holds one) of a LLaVA-1.5 model."""
    if name in GEOMETRIES:
        return GEOMETRIES[name]()
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise ValueError(f"geometry {name!r} is neither one of {', '.join(GEOMETRIES)} nor a config.json")
    return config_from_dict(json.loads(path.read_text(encoding="utf-8")))


def config_from_dict(fields: dict[str, Any]) -> LlavaConfig:
    """Rebuild a LlavaConfig from config.json's fields; only geometry is read, so a pruned repo's is as good."""
    if fields.get("model_type") != "llava":
        raise ValueError(f"the geometry must be of model_type llava, got {fields.get('model_type')!r}")
    return LlavaConfig.from_dict({name: fields[name] for name in fields if name not in ("auto_map", "architectures")})


def shallower(config: LlavaConfig, divisor: int) -> LlavaConfig:
    """Return the geometry with both towers' depths divided, at least 1 and 2 layers deep."""
    smaller = LlavaConfig.from_dict(config.to_dict())
    smaller.text_config.num_hidden_layers = max(1, config.text_config.num_hidden_layers // divisor)
    smaller.vision_config.num_hidden_layers = max(2, config.vision_config.num_hidden_layers // divisor)
    return smaller


def patches_of(config: LlavaConfig) -> int:
    """Return the visual tokens of one image."""
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2


def budgets_of(config: LlavaConfig) -> list[int]:
    """Return the budgets to measure, from all patches down: 576, 192 ... 16, or the same shares of other images."""
    patches = patches_of(config)
    return sorted({max(1, round(budget * patches / BUDGETS[0])) for budget in BUDGETS}, reverse=True)


def vispruner_config(config: LlavaConfig, visual_token_num: int) -> VisPrunerLlavaConfig:
    fields = {name: value for name, value in config.to_dict().items() if name != "vispruner_config"}
    return VisPrunerLlavaConfig.from_dict(fields, vispruner_config={"visual_token_num": visual_token_num})


class RandomWeights:
    """One set of random parameters, drawn when first asked for, that any number of models and depths read.

    distinct_layers  how many layers of each tower differ; layer i reads what layer i % distinct_layers reads
    """

    def __init__(
        self, dtype: torch.dtype, device: torch.device, distinct_layers: int | None = None, seed: int = 0
    ) -> None:
        self.dtype, self.device, self.distinct_layers = dtype, device, distinct_layers
        self._generator = torch.Generator(device).manual_seed(seed)
        self._drawn: dict[str, nn.Parameter] = {}

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self._drawn.values())

    def model(self, model_class: Any, config: Any) -> PreTrainedModel:
        """Return a model of this class in evaluation mode whose parameters are this set's."""
        model = empty_model(model_class, config)
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], self._parameter(name, parameter.shape))
        return model.to(self.device)

    def _parameter(self, name: str, shape: torch.Size) -> nn.Parameter:
        if self.distinct_layers is not None:
            name = re.sub(r"\.layers\.(\d+)\.", lambda m: f".layers.{int(m[1]) % self.distinct_layers}.", name)
        if name not in self._drawn:
            tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
            if "norm" in name or name.endswith("bias"):
                tensor.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                tensor.normal_(std=0.02, generator=self._generator)
            self._drawn[name] = nn.Parameter(tensor, requires_grad=False)
        return self._drawn[name]


def empty_model(model_class: Any, config: Any) -> PreTrainedModel:
    """Return a model in evaluation mode whose parameters are on the meta device and whose buffers are real."""
    with init_empty_weights(include_buffers=False):
        model = model_class(copy.deepcopy(config))  # its own, because choosing an attention changes the config
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()
