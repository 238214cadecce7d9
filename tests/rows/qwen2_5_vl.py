"""Qwen2.5-VL: windows of two by two merged tokens, and one layer before the last that sees the whole image."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from rows._qwen_vl import MERGE, PATCH, TEXT, TOKEN_IDS, QwenVLRow, windows_first

WINDOW = 2  # merged tokens along a side


class Qwen2_5_VLRow(QwenVLRow):
    model_type = "qwen2_5_vl"
    stock_class = Qwen2_5_VLForConditionalGeneration
    has_seconds = True

    def config(self) -> Qwen2_5_VLConfig:
        vision = {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": TEXT["hidden_size"],
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "window_size": WINDOW * MERGE * PATCH,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        }
        return Qwen2_5_VLConfig(vision_config=vision, text_config=dict(TEXT), **TOKEN_IDS)

    def layer(self, visual: Any) -> int:
        return 1

    def order(self, visual: Any, rows: int, columns: int) -> list[int]:
        return windows_first(rows, columns, WINDOW)


ROW = Qwen2_5_VLRow()
