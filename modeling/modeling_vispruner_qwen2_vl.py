"""Qwen2-VL with visual token pruning: saliency is read in the last layer of its encoder."""

from torch import nn
from transformers import GenerationMixin, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLModel

from .configuration_vispruner import VisPrunerConfigMixin
from .mrope_positions import MRoPEMixin
from .pruned_encoder import inherit_checkpoint_conversion
from .pruning_mixin import forward_of, give_lm_head_its_own_rows
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

    forward = forward_of(Qwen2VLForConditionalGeneration)


inherit_checkpoint_conversion(VisPrunerQwen2VLForConditionalGeneration, "Qwen2VLForConditionalGeneration")
inherit_checkpoint_conversion(VisPrunerQwen2VLModel, "Qwen2VLModel")
