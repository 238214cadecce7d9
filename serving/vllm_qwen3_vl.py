"""Qwen3-VL in vLLM with visual token pruning: deepstack features stay with their tokens."""

from typing import Any

from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .vllm_mrope import PrunedGridPrompts, PrunedGrids


class VisPrunerQwen3VLMultiModalProcessor(PrunedGridPrompts, Qwen3VLMultiModalProcessor):
    """Stock, with the placeholders that stay."""


@MULTIMODAL_REGISTRY.register_processor(
    VisPrunerQwen3VLMultiModalProcessor, info=Qwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class VisPrunerQwen3VLForConditionalGeneration(PrunedGrids, Qwen3VLForConditionalGeneration):
    """vLLM's Qwen3-VL that keeps the visual tokens its `vispruner_config` says (arXiv 2412.01818)."""

    def seconds_factor(self, inputs: Any, number: int) -> float:
        """Frames stand apart, each behind its time as text, and begin where that ends."""
        return 0.0
