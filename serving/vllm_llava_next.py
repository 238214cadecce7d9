"""LLaVA-NeXT in vLLM with visual token pruning, tile_mode "paper": an image takes T placeholders per tile."""

from typing import Any

import torch
from vllm.model_executor.models.llava_next import (
    LlavaDummyInputsBuilder,
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vispruner.modeling_vispruner_llava_next import paper_order

from .kept_counts import tile_grid
from .vllm_prompts import PrunedPrompts
from .vllm_pruning import TOWER_NAMES, Asked, PrunedTower


class VisPrunerLlavaNextMultiModalProcessor(PrunedPrompts, LlavaNextMultiModalProcessor):
    """Stock, with the placeholders that stay."""


@MULTIMODAL_REGISTRY.register_processor(
    VisPrunerLlavaNextMultiModalProcessor, info=LlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class VisPrunerLlavaNextForConditionalGeneration(PrunedTower, LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT that projects only the visual tokens its `vispruner_config` keeps (arXiv 2412.01818)."""

    hf_to_vllm_mapper = LlavaNextForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES

    def _process_image_input(self, image_input: Any) -> Any:
        if not isinstance(image_input, Asked):
            return super()._process_image_input(image_input)
        grids = [tile_grid(self.config, *size) for size in image_input.inputs["image_sizes"].tolist()]
        tiles = [1 + rows * columns for rows, columns in grids]
        images = zip(image_input.inputs["pixel_values"], tiles, strict=True)
        tokens = self.encode(torch.cat([image[:count] for image, count in images]))  # images may be padded alike
        kept: dict[int, torch.Tensor] = {}
        for budget, numbers, part in self.by_budget(tokens, tiles, image_input.options):
            selection, own = self.select(part, budget), [tiles[number] for number in numbers]
            parts = zip(selection.fold(part.features).split(own), selection.indices.split(own), strict=True)
            for number, (image, chosen) in zip(numbers, parts, strict=True):
                kept[number] = image.flatten(0, 1)[paper_order(chosen, *grids[number], self.side)]
        ordered = [kept[number] for number in range(len(tiles))]
        return self.project(torch.cat(ordered)).split([len(image) for image in ordered])
