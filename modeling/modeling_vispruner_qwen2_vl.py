"""Qwen2-VL with visual token pruning: saliency is read in the last layer of its encoder."""

from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationMixin, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLModel

from .configuration_vispruner import VisPrunerConfigMixin
from .encoded_images import EncodedImages
from .mrope_positions import MRoPEMixin
from .pruned_encoder import inherit_checkpoint_conversion
from .pruning_mixin import give_lm_head_its_own_rows
from .qwen_vl_encoder import QwenVLEncoderMixin


class VisPrunerQwen2VLConfig(VisPrunerConfigMixin, Qwen2VLConfig):
    """`Qwen2VLConfig` with a `vispruner_config` block."""

    vispruner_config: dict | None = None


class VisPrunerQwen2VLModel(QwenVLEncoderMixin, Qwen2VLModel):
    """`Qwen2VLModel` whose image and video features are only the kept visual tokens."""

    config_class = VisPrunerQwen2VLConfig

    def __init__(self, config: VisPrunerQwen2VLConfig) -> None:
        super().__init__(config)
        self.prepare_pruning()


class VisPrunerQwen2VLForConditionalGeneration(MRoPEMixin, Qwen2VLForConditionalGeneration, GenerationMixin):
    """`Qwen2VLForConditionalGeneration` that prunes visual tokens by its `vispruner_config` (arXiv 2412.01818)."""

    config_class = VisPrunerQwen2VLConfig

    def __init__(self, config: VisPrunerQwen2VLConfig) -> None:
        super(Qwen2VLForConditionalGeneration, self).__init__(config)  # the stock one would build a stock model
        self.model = VisPrunerQwen2VLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.lm_head.register_forward_pre_hook(give_lm_head_its_own_rows)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
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
            labels=labels,
            use_cache=use_cache,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            logits_to_keep=logits_to_keep,
            mm_encoder_outputs=mm_encoder_outputs,
            encoded_images=encoded_images,
            **kwargs,
        )
        return self.pruned_forward(super().forward, inputs)


inherit_checkpoint_conversion(VisPrunerQwen2VLForConditionalGeneration, "Qwen2VLForConditionalGeneration")
inherit_checkpoint_conversion(VisPrunerQwen2VLModel, "Qwen2VLModel")
