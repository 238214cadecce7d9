"""Qwen2-VL in vLLM with visual token pruning: its frames are numbered one by one."""

from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .vllm_mrope import PrunedGridPrompts, PrunedGrids


class VisPrunerQwen2VLMultiModalProcessor(PrunedGridPrompts, Qwen2VLMultiModalProcessor):
    """Stock, with the placeholders that stay."""


@MULTIMODAL_REGISTRY.register_processor(
    VisPrunerQwen2VLMultiModalProcessor, info=Qwen2VLProcessingInfo, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class VisPrunerQwen2VLForConditionalGeneration(PrunedGrids, Qwen2VLForConditionalGeneration):
    """vLLM's Qwen2-VL that keeps the visual tokens its `vispruner_config` says (arXiv 2412.01818)."""
