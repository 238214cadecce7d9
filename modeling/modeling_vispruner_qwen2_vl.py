"""Qwen2-VL with visual token pruning: saliency is read in the last layer of its encoder."""

from transformers import GenerationMixin, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLModel

from .configuration_vispruner import VisPrunerConfigMixin
from .pruned_encoder import inherit_checkpoint_conversion
from .pruned_forward import forward_of
from .pruning_mixin import VisPrunerMixin
from .qwen_vl_encoder import QwenVLEncoderMixin


class VisPrunerQwen2VLConfig(VisPrunerConfigMixin, Qwen2VLConfig):
    """`Qwen2VLConfig` with a `vispruner_config` block."""

    vispruner_config: dict | None = None


class VisPrunerQwen2VLModel(QwenVLEncoderMixin, Qwen2VLModel):
    """`Qwen2VLModel` whose image and video features are only the kept visual tokens."""

    config_class = VisPrunerQwen2VLConfig

    forward = forward_of(Qwen2VLModel)


class VisPrunerQwen2VLForConditionalGeneration(VisPrunerMixin, Qwen2VLForConditionalGeneration, GenerationMixin):
    """`Qwen2VLForConditionalGeneration` that prunes visual tokens by its `vispruner_config` (arXiv 2412.01818)."""

    config_class = VisPrunerQwen2VLConfig
    base_class = VisPrunerQwen2VLModel

    forward = forward_of(Qwen2VLForConditionalGeneration)


inherit_checkpoint_conversion(VisPrunerQwen2VLForConditionalGeneration, "Qwen2VLForConditionalGeneration")
inherit_checkpoint_conversion(VisPrunerQwen2VLModel, "Qwen2VLModel")
