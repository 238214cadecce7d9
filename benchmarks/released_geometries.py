"""The geometries of the released models that the YAMLs of hub_configs/ name, as their config.json files give them.

Written down by hand, because no Hub could be reached: only what decides the number of operations. A repo's card and
`vispruner build` compute the same from the base's own config.json.
"""

from __future__ import annotations

from typing import Any

import torch
from geometry import GEOMETRIES

from vispruner import architecture_of

SIGLIP_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
VICUNA_7B, VICUNA_13B = ({**GEOMETRIES[name]().to_dict()["text_config"]} for name in ("llava-1.5-7b", "llava-1.5-13b"))
CLIP_L_336 = GEOMETRIES["llava-1.5-7b"]().to_dict()["vision_config"]


def _text(model_type: str, width: int, mlp: int, layers: int, heads: int, keys: int, words: int, **more: Any) -> Any:
    return {
        "model_type": model_type,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": words,
        **more,
    }


QWEN2_7B = (3584, 18944, 28, 28, 4)
RELEASED: dict[str, tuple[str, dict[str, Any]]] = {
    "llava-1.5-7b": ("llava", {"text_config": VICUNA_7B, "vision_config": CLIP_L_336}),
    "llava-1.5-13b": ("llava", {"text_config": VICUNA_13B, "vision_config": CLIP_L_336}),
    "llava-v1.6-vicuna-7b": ("llava_next", {"text_config": VICUNA_7B, "vision_config": CLIP_L_336}),
    "llava-v1.6-vicuna-13b": ("llava_next", {"text_config": VICUNA_13B, "vision_config": CLIP_L_336}),
    "llava-v1.6-mistral-7b": (
        "llava_next",
        {"text_config": _text("mistral", 4096, 14336, 32, 32, 8, 32064), "vision_config": CLIP_L_336},
    ),
    "video-llava-7b": (
        "video_llava",
        {"text_config": VICUNA_7B, "vision_config": {**CLIP_L_336, "image_size": 224}},
    ),
    "llava-onevision-qwen2-0.5b": (
        "llava_onevision",
        {
            "text_config": _text("qwen2", 896, 4864, 24, 14, 2, 152000),
            "vision_config": {**SIGLIP_SO400M, "num_hidden_layers": 26, "vision_use_head": False},
        },
    ),
    "llava-onevision-qwen2-7b": (
        "llava_onevision",
        {
            "text_config": _text("qwen2", *QWEN2_7B, 152128),
            "vision_config": {**SIGLIP_SO400M, "num_hidden_layers": 26, "vision_use_head": False},
        },
    ),
    "internvl3-8b": (
        "internvl",
        {
            "text_config": _text("qwen2", *QWEN2_7B, 151674),
            "vision_config": {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": [448, 448],
                "patch_size": [14, 14],
            },
        },
    ),
    "qwen2-vl-7b": (
        "qwen2_vl",
        {
            "text_config": _text("qwen2_vl_text", *QWEN2_7B, 152064),
            "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4},
        },
    ),
    "qwen2.5-vl-7b": (
        "qwen2_5_vl",
        {
            "text_config": _text("qwen2_5_vl_text", *QWEN2_7B, 152064),
            "vision_config": {
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": 3584,
                "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
            },
        },
    ),
    "qwen3-vl-8b": (
        "qwen3_vl",
        {
            "text_config": _text("qwen3_vl_text", 4096, 12288, 36, 32, 8, 151936, head_dim=128),
            "vision_config": {
                "depth": 27,
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_heads": 16,
                "patch_size": 16,
                "out_hidden_size": 4096,
                "deepstack_visual_indexes": [8, 16, 24],
            },
        },
    ),
    "smolvlm2-2.2b": (
        "smolvlm",
        {
            "text_config": _text("llama", 2048, 8192, 24, 32, 32, 49280),
            "vision_config": {**SIGLIP_SO400M, "model_type": "smolvlm_vision"},
            "scale_factor": 3,
        },
    ),
    "idefics3-8b": (
        "idefics3",
        {
            "text_config": _text("llama", 4096, 14336, 32, 32, 8, 128259),
            "vision_config": {**SIGLIP_SO400M, "model_type": "idefics3_vision", "image_size": 364},
            "scale_factor": 2,
        },
    ),
    "gemma-3-4b": (
        "gemma3",
        {
            "text_config": _text("gemma3_text", 2560, 10240, 34, 8, 4, 262208, head_dim=256),
            "vision_config": {**SIGLIP_SO400M, "image_size": 896, "vision_use_head": False},
            "mm_tokens_per_image": 256,
        },
    ),
    "paligemma2-3b-mix": (
        "paligemma",
        {
            "text_config": _text("gemma2", 2304, 9216, 26, 8, 4, 257216, head_dim=256),
            "vision_config": {**SIGLIP_SO400M, "image_size": 448, "vision_use_head": False, "projection_dim": 2304},
            "projection_dim": 2304,
        },
    ),
}


def released_base(name: str) -> Any:
    """Return the base model of a released geometry, without weights and without pruning."""
    model_type, fields = RELEASED[name]
    architecture = architecture_of(model_type)
    config = architecture.config_class.from_dict({**fields, "vispruner_config": {"method": "none"}})
    for part in (config, config.get_text_config()):  # the defaults of some versions lie beyond the vocabulary
        part.pad_token_id = None
    with torch.device("meta"):
        return architecture.base_class(config)
