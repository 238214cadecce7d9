"""SmolVLM and SmolVLM2 with visual token pruning: every tile of an image and every frame of a video on its own."""

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMModel,
)

from .configuration_vispruner import VisPrunerConfigMixin
from .idefics3_encoder import IDEFICS3_IMAGES, Idefics3EncoderMixin
from .pruning_mixin import VisPrunerMixin, forward_of, give_lm_head_its_own_rows


class VisPrunerSmolVLMConfig(VisPrunerConfigMixin, SmolVLMConfig):
    """`SmolVLMConfig` with a `vispruner_config` block."""

    vispruner_config: dict | None = None


class VisPrunerSmolVLMModel(Idefics3EncoderMixin, SmolVLMModel):
    """`SmolVLMModel` whose `get_image_features` returns only the kept visual tokens of each tile."""

    config_class = VisPrunerSmolVLMConfig
    budget_unit = "tile of an image or frame of a video"

    def __init__(self, config: VisPrunerSmolVLMConfig) -> None:
        super().__init__(config)
        self.prepare_pruning()

    def real_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        real = super().real_tiles(tiles)
        real[0] |= ~real.any()  # as stock does: something must be encoded
        return real


class VisPrunerSmolVLMForConditionalGeneration(VisPrunerMixin, SmolVLMForConditionalGeneration, GenerationMixin):
    """`SmolVLMForConditionalGeneration` that prunes visual tokens by its `vispruner_config` (arXiv 2412.01818)."""

    config_class = VisPrunerSmolVLMConfig
    modalities = (IDEFICS3_IMAGES,)

    def __init__(self, config: VisPrunerSmolVLMConfig) -> None:
        super(SmolVLMForConditionalGeneration, self).__init__(config)  # the stock one would build a stock SmolVLMModel
        self.model = VisPrunerSmolVLMModel(config)
        self.image_token_id = config.image_token_id
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.lm_head.register_forward_pre_hook(give_lm_head_its_own_rows)
        self.vocab_size = config.text_config.vocab_size
        self.model.text_model.generation_config = GenerationConfig.from_model_config(config)
        self.post_init()

    forward = forward_of(SmolVLMForConditionalGeneration)
