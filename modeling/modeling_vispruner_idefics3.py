"""Idefics3 with visual token pruning: every tile of a split image is pruned on its own."""

from transformers import GenerationMixin, Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Model

from .configuration_vispruner import VisPrunerConfigMixin
from .idefics3_encoder import IDEFICS3_IMAGES, Idefics3EncoderMixin
from .pruned_forward import forward_of
from .pruning_mixin import VisPrunerMixin


class VisPrunerIdefics3Config(VisPrunerConfigMixin, Idefics3Config):
    """`Idefics3Config` with a `vispruner_config` block."""

    vispruner_config: dict | None = None


class VisPrunerIdefics3Model(Idefics3EncoderMixin, Idefics3Model):
    """`Idefics3Model` whose `get_image_features` returns only the kept visual tokens of each tile."""

    config_class = VisPrunerIdefics3Config
    modalities = (IDEFICS3_IMAGES,)

    forward = forward_of(Idefics3Model)


class VisPrunerIdefics3ForConditionalGeneration(VisPrunerMixin, Idefics3ForConditionalGeneration, GenerationMixin):
    """`Idefics3ForConditionalGeneration` that prunes visual tokens by its `vispruner_config` (arXiv 2412.01818)."""

    config_class = VisPrunerIdefics3Config
    base_class = VisPrunerIdefics3Model

    def finish_head(self, config: VisPrunerIdefics3Config) -> None:
        self.image_token_id, self.vocab_size = config.image_token_id, config.text_config.vocab_size

    forward = forward_of(Idefics3ForConditionalGeneration)
