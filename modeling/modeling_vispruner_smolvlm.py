"""SmolVLM and SmolVLM2 with visual token pruning: every tile of an image and every frame of a video on its own."""

from typing import Any

import torch
from torch import nn
from transformers import (
    Cache,
    GenerationConfig,
    GenerationMixin,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMModel,
)

from .configuration_vispruner import VisPrunerConfigMixin
from .encoded_images import EncodedImages
from .idefics3_encoder import IDEFICS3_IMAGES, Idefics3EncoderMixin
from .pruning_mixin import VisPrunerMixin, give_lm_head_its_own_rows


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

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        encoded_images: EncodedImages | None = None,
        **kwargs: Any,
    ) -> Any:
        """Stock forward on the shortened prompt; the logits have its length W <= S. Loss is over its `labels`."""
        inputs = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            pixel_attention_mask=pixel_attention_mask,
            mm_encoder_outputs=mm_encoder_outputs,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            encoded_images=encoded_images,
            **kwargs,
        )
        return self.pruned_forward(super().forward, inputs)
