"""LLaVA-OneVision in vLLM with visual token pruning: base tile and packed tiles of an image, frames of a video."""

import math
from typing import Any

import torch
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vispruner.modeling_vispruner_llava_onevision import PackedTiles, channels_of, tokens_in
from vispruner.visual_features import VisualTokens

from .vllm_prompts import PrunedPrompts
from .vllm_pruning import TOWER_NAMES, Asked, PrunedTower


class VisPrunerLlavaOnevisionMultiModalProcessor(PrunedPrompts, LlavaOnevisionMultiModalProcessor):
    """Stock, with the placeholders that stay."""


@MULTIMODAL_REGISTRY.register_processor(
    VisPrunerLlavaOnevisionMultiModalProcessor,
    info=LlavaOnevisionProcessingInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class VisPrunerLlavaOnevisionForConditionalGeneration(
    PrunedTower, PackedTiles, LlavaOnevisionForConditionalGeneration
):
    """vLLM's LLaVA-OneVision that keeps the visual tokens its `vispruner_config` says (arXiv 2412.01818)."""

    hf_to_vllm_mapper = LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper | TOWER_NAMES

    def _process_image_input(self, image_input: Any) -> Any:
        if not isinstance(image_input, Asked):
            return super()._process_image_input(image_input)
        packings = [self.packing_of(size) for size in image_input.inputs["image_sizes"].tolist()]
        tiles = [packing.tiles for packing in packings]
        images = zip(image_input.inputs["pixel_values"], tiles, strict=True)
        tokens = self.encode(torch.cat([image[:count] for image, count in images]))
        budgets = [self.budgets_of(*both) for both in zip(packings, image_input.options, strict=True)]
        chosen = self.choose_packed(tokens, packings, budgets)
        parts = zip(tokens.features.split(tiles), packings, chosen, strict=True)
        return [self.tokens_at(*part) for part in parts]

    def _process_video_pixels(self, inputs: Any) -> Any:
        """Prune every frame after pooling; the newline behind a video stays."""
        if not isinstance(inputs, Asked):
            return super()._process_video_pixels(inputs)
        videos = list(inputs.inputs["pixel_values_videos"])
        frames, side = [len(video) for video in videos], math.ceil(self.side / 2)
        tokens = self.encode(torch.cat(videos))
        pooled = tokens_in(self.apply_pooling(channels_of(tokens)), tokens, (side, side))
        visual, kept = self.apply_pooling(self.project(tokens.features)), []
        for video, (number, options) in zip(visual.split(frames), enumerate(inputs.options), strict=True):
            own = _frames(pooled, sum(frames[:number]), frames[number])
            chosen = self.select(own, options.budget(side**2)).take(video)
            kept.append(torch.cat([chosen.flatten(0, 1), self.image_newline[None].to(chosen)]))
        return kept


def _frames(tokens: VisualTokens, start: int, count: int) -> VisualTokens:
    """Return the tokens of one video among the frames of several."""
    own = slice(start, start + count)
    layers = None if tokens.layer_saliency is None else tokens.layer_saliency[own]
    further = {name: given[own] for name, given in tokens.further.items()}
    return VisualTokens(
        tokens.features[own], tokens.saliency[own], layers, tokens.grid, further=further, videos=(0,) * count
    )
