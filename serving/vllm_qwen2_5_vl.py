"""Qwen2.5-VL in vLLM with visual token pruning: windows, and frames numbered by their seconds."""

from typing import Any

from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vispruner.modeling_vispruner_qwen2_5_vl import WindowOrder

from .vllm_mrope import PrunedGridPrompts, PrunedGrids


class VisPrunerQwen2_5_VLMultiModalProcessor(PrunedGridPrompts, Qwen2_5_VLMultiModalProcessor):
    """Stock, with the placeholders that stay."""


@MULTIMODAL_REGISTRY.register_processor(
    VisPrunerQwen2_5_VLMultiModalProcessor, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class VisPrunerQwen2_5_VLForConditionalGeneration(WindowOrder, PrunedGrids, Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL that keeps the visual tokens its `vispruner_config` says (arXiv 2412.01818)."""

    def seconds_factor(self, inputs: Any, number: int) -> float:
        seconds = inputs.get("second_per_grid_ts")
        if seconds is None:
            return 1.0
        return float(seconds[number]) * self.config.vision_config.tokens_per_second
