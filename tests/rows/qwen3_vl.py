"""Qwen3-VL: features of two encoder layers go past the prompt (deepstack); timestamps part the frames of a video."""

from __future__ import annotations

from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from rows._qwen_vl import MERGE, PATCH, TEXT, TOKEN_IDS, QwenVLRow


class Qwen3VLRow(QwenVLRow):
    model_type = "qwen3_vl"
    stock_class = Qwen3VLForConditionalGeneration
    has_timestamps = True

    def config(self) -> Qwen3VLConfig:
        vision = {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": TEXT["hidden_size"],
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        }
        return Qwen3VLConfig(vision_config=vision, text_config={**TEXT, "head_dim": 16}, **TOKEN_IDS)


ROW = Qwen3VLRow()
