"""LLaVA-NeXT in vLLM with visual token pruning, tile_mode "paper": an image takes T placeholders per tile."""

from functools import cached_property
from typing import Any

import torch
from vllm.model_executor.models.llava_next import (
    LlavaDummyInputsBuilder,
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vispruner.configuration_vispruner import VisPrunerOptions
from vispruner.modeling_vispruner_llava_next import paper_order

from .launch_options import tile_grid, tokens_of_tiles
from .vllm_pruning import TOWER_NAMES, PrunedVision, launch_options


class VisPrunerLlavaNextProcessingInfo(LlavaNextProcessingInfo):
    """Stock, but for the number of visual tokens of an image, from which vLLM works out all the rest."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        if self.vispruner_options.method == "none":
            return super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        return tokens_of_tiles(self.get_hf_config(), self.vispruner_options, image_height, image_width)

    @cached_property
    def vispruner_options(self) -> VisPrunerOptions:
        return launch_options(self.ctx.model_config)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextMultiModalProcessor, info=VisPrunerLlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class VisPrunerLlavaNextForConditionalGeneration(PrunedVision, LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT that projects only the visual tokens its `vispruner_config` keeps (arXiv 2412.01818)."""

    hf_to_vllm_mapper = LlavaNextForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES

    def _process_image_input(self, image_input: Any) -> Any:
        if self.vispruner_options.method == "none" or image_input["type"] == "image_embeds":
            return super()._process_image_input(image_input)
        grids = [tile_grid(self.config, *size) for size in image_input["image_sizes"].tolist()]
        tiles = [1 + rows * columns for rows, columns in grids]
        images = zip(image_input["pixel_values"], tiles, strict=True)
        pixel_values = torch.cat([image[:count] for image, count in images])  # images of one prompt are padded alike
        features, selection = self.select_features(pixel_values)
        parts = zip(selection.fold(features).split(tiles), selection.indices.split(tiles), grids, strict=True)
        kept = [image.flatten(0, 1)[paper_order(chosen, *grid, self.side)] for image, chosen, grid in parts]
        return self.multi_modal_projector(torch.cat(kept)).split([len(image) for image in kept])
