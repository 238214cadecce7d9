"""LLaVA-NeXT in vLLM with visual token pruning, tile_mode "paper": an image takes T placeholders per tile."""

from typing import Any

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.config import VllmConfig
from vllm.model_executor.models.llava_next import (
    LlavaDummyInputsBuilder,
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vispruner.configuration_vispruner import VisPrunerOptions
from vispruner.modeling_vispruner_llava_next import paper_order

from .vllm_pruning import TOWER_NAMES, PrunedVision, launch_options, patches_per_tile


def _tile_grid(config: Any, height: int, width: int) -> tuple[int, int]:
    """Return rows and columns of the tiles beside the base tile."""
    return get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, config.vision_config.image_size)


def _require_paper_tiles(options: VisPrunerOptions) -> VisPrunerOptions:
    if options.method != "none" and options.tile_mode != "paper":
        raise ValueError(
            f'vispruner_config.tile_mode must be "paper" in vLLM, got {options.tile_mode!r}: '
            '"native" packing is not served'
        )
    return options


class VisPrunerLlavaNextProcessingInfo(LlavaNextProcessingInfo):
    """Stock, but for the number of visual tokens of an image, from which vLLM works out all the rest."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        options = _require_paper_tiles(launch_options(self.ctx.model_config))
        if options.method == "none":
            return super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        config = self.get_hf_config()
        rows, columns = _tile_grid(config, image_height, image_width)
        return options.budget(patches_per_tile(config)) * (1 + rows * columns)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextMultiModalProcessor, info=VisPrunerLlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class VisPrunerLlavaNextForConditionalGeneration(PrunedVision, LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT that projects only the visual tokens its `vispruner_config` keeps (arXiv 2412.01818)."""

    hf_to_vllm_mapper = LlavaNextForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES
    supports_tower_connector_lora = False  # stock counts the rows of tower and projector from unpruned tiles

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        _require_paper_tiles(launch_options(vllm_config.model_config))
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _process_image_input(self, image_input: Any) -> Any:
        if self.vispruner_options.method == "none" or image_input["type"] == "image_embeds":
            return super()._process_image_input(image_input)
        grids = [_tile_grid(self.config, *size) for size in image_input["image_sizes"].tolist()]
        tiles = [1 + rows * columns for rows, columns in grids]
        images = zip(image_input["pixel_values"], tiles, strict=True)
        pixel_values = torch.cat([image[:count] for image, count in images])  # images of one prompt are padded alike
        features, indices = self.select_features(pixel_values)
        patches = []
        for image, kept, grid in zip(features.split(tiles), indices.split(tiles), grids, strict=True):
            patches.append(image.flatten(0, 1)[paper_order(kept, *grid, self.side)])
        return self.multi_modal_projector(torch.cat(patches)).split([len(image) for image in patches])
