"""SmolVLM and SmolVLM2 with visual token pruning: every tile of an image and every frame of a video on its own."""

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMModel,
)

from .configuration_vispruner import VisPrunerConfigMixin
from .idefics3_encoder import IDEFICS3_IMAGES, Idefics3EncoderMixin
from .prompt_reading import find_placeholders
from .pruned_forward import forward_of
from .pruning_mixin import VisPrunerMixin


class VisPrunerSmolVLMConfig(VisPrunerConfigMixin, SmolVLMConfig):
    """`SmolVLMConfig` with a `vispruner_config` block."""

    vispruner_config: dict | None = None


class VisPrunerSmolVLMModel(Idefics3EncoderMixin, SmolVLMModel):
    """`SmolVLMModel` whose `get_image_features` returns only the kept visual tokens of each tile."""

    config_class = VisPrunerSmolVLMConfig
    modalities = (IDEFICS3_IMAGES,)
    budget_unit = "tile of an image or frame of a video"

    forward = forward_of(SmolVLMModel)

    def real_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        real = super().real_tiles(tiles)
        real[0] |= ~real.any()  # as stock does: something must be encoded
        return real

    def inputs_merger(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, image_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Put visual tokens in the place of placeholders; older stock, which alone asks, has blocks of one size."""
        flags = find_placeholders(
            {"input_ids": input_ids, "inputs_embeds": None if input_ids is not None else inputs_embeds},
            self.placeholder_ids,
            self.get_input_embeddings(),
        )
        mask = flags[self.config.image_token_id][..., None]
        return inputs_embeds.masked_scatter(mask, image_hidden_states.to(inputs_embeds))


class VisPrunerSmolVLMForConditionalGeneration(VisPrunerMixin, SmolVLMForConditionalGeneration, GenerationMixin):
    """`SmolVLMForConditionalGeneration` that prunes visual tokens by its `vispruner_config` (arXiv 2412.01818)."""

    config_class = VisPrunerSmolVLMConfig
    base_class = VisPrunerSmolVLMModel

    def finish_head(self, config: VisPrunerSmolVLMConfig) -> None:
        self.image_token_id, self.vocab_size = config.image_token_id, config.text_config.vocab_size
        self.model.text_model.generation_config = GenerationConfig.from_model_config(config)

    forward = forward_of(SmolVLMForConditionalGeneration)
