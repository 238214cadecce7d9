"""SmolVLM: as Idefics3, and the frames of a video are tiles of their own."""

from __future__ import annotations

from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from rows.idefics3 import Idefics3Row


class SmolVLMRow(Idefics3Row):
    model_type = "smolvlm"
    stock_class = SmolVLMForConditionalGeneration
    config_class = SmolVLMConfig
    modalities = ("image", "video")


ROW = SmolVLMRow()
