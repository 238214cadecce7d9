"""Idefics3 with visual token pruning: every tile of a split image is pruned on its own."""

from torch import nn
from transformers import GenerationMixin, Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Model

from .configuration_vispruner import VisPrunerConfigMixin
from .idefics3_encoder import IDEFICS3_IMAGES, Idefics3EncoderMixin
from .pruning_mixin import VisPrunerMixin, forward_of, give_lm_head_its_own_rows


class VisPrunerIdefics3Config(VisPrunerConfigMixin, Idefics3Config):
    """`Idefics3Config` with a `vispruner_config` block."""

    vispruner_config: dict | None = None


class VisPrunerIdefics3Model(Idefics3EncoderMixin, Idefics3Model):
    """`Idefics3Model` whose `get_image_features` returns only the kept visual tokens of each tile."""

    config_class = VisPrunerIdefics3Config

    def __init__(self, config: VisPrunerIdefics3Config) -> None:
        super().__init__(config)
        self.prepare_pruning()


class VisPrunerIdefics3ForConditionalGeneration(VisPrunerMixin, Idefics3ForConditionalGeneration, GenerationMixin):
    """`Idefics3ForConditionalGeneration` that prunes visual tokens by its `vispruner_config` (arXiv 2412.01818)."""

    config_class = VisPrunerIdefics3Config
    modalities = (IDEFICS3_IMAGES,)

    def __init__(self, config: VisPrunerIdefics3Config) -> None:
        super(Idefics3ForConditionalGeneration, self).__init__(config)  # the stock one would build a stock model
        self.model = VisPrunerIdefics3Model(config)
        self.image_token_id = config.image_token_id
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.lm_head.register_forward_pre_hook(give_lm_head_its_own_rows)
        self.vocab_size = config.text_config.vocab_size
        self.post_init()

    forward = forward_of(Idefics3ForConditionalGeneration)
