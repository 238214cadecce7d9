"""Qwen2-VL: every layer of the encoder sees the whole image; saliency comes from the last."""

from __future__ import annotations

from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from rows._qwen_vl import MERGE, PATCH, TEXT, TOKEN_IDS, QwenVLRow


class Qwen2VLRow(QwenVLRow):
    model_type = "qwen2_vl"
    stock_class = Qwen2VLForConditionalGeneration

    def config(self) -> Qwen2VLConfig:
        vision = {
            "depth": 3,
            "embed_dim": 32,
            "hidden_size": TEXT["hidden_size"],
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
        }
        return Qwen2VLConfig(vision_config=vision, text_config=dict(TEXT), **TOKEN_IDS)


ROW = Qwen2VLRow()
