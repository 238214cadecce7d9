"""Write the processor files of a tiny model of each architecture, as its Hub repos have them: by hand.

The stock classes cannot be made without torchvision where they read videos too; their files can.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from rows import PLAIN, Row
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vispruner.stock_versions import TAKES_FEATURES

HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
UNKNOWN = PLAIN.stop
TEMPLATE = """\
{%- for message in messages -%}
    {%- for part in message['content'] -%}
        {%- if part['type'] == 'image' -%}{{- 'IMAGE' -}}
        {%- elif part['type'] == 'video' -%}{{- 'VIDEO' -}}
        {%- else -%}{{- ' ' + part['text'] -}}{%- endif -%}
    {%- endfor -%}
{%- endfor -%}
"""

# Each function below returns: `tokens`, special ones by id; `files`, what they hold by name; `prompt`, how an image
# and a video are written; `names` by which the processor asks the tokenizer for special tokens.


def _internvl(row: Row, config: Any) -> dict[str, Any]:
    ids = import_module("rows.internvl")
    side = {"height": ids.SIDE, "width": ids.SIDE}
    image = {"image_processor_type": "GotOcr2ImageProcessor", "size": side, "crop_to_patches": True, **HALF}
    return {
        "tokens": {ids.IMAGE: "<IMG_CONTEXT>", ids.START: "<img>", ids.END: "</img>", ids.END + 5: "<video>"},
        "files": {
            "preprocessor_config.json": {**image, "min_patches": 1, "max_patches": ids.MOST_TILES},
            "video_preprocessor_config.json": {"video_processor_type": "InternVLVideoProcessor", "size": side, **HALF},
            "processor_config.json": {"processor_class": "InternVLProcessor", "image_seq_length": ids.TOKENS},
        },
        "prompt": ("<IMG_CONTEXT>", "<video>"),
        "names": {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    }


def _idefics3(row: Row, config: Any, name: str = "Idefics3") -> dict[str, Any]:
    ids = import_module("rows.idefics3")
    places = [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
    return {
        "tokens": {
            ids.IMAGE: "<image>",
            ids.AROUND: "<fake_token_around_image>",
            ids.GLOBAL: "<global-img>",
            98: "<end_of_utterance>",
            99: "<video>",
            **{ids.MARKER + number: place for number, place in enumerate(places)},
        },
        "files": {
            "preprocessor_config.json": {
                "image_processor_type": f"{name}ImageProcessor",
                "size": {"longest_edge": ids.LONGEST},
                "max_image_size": {"longest_edge": ids.SIDE},
                **HALF,
            },
            "processor_config.json": {"processor_class": f"{name}Processor", "image_seq_len": ids.TOKENS},
        },
        "prompt": ("<image>", "<video>"),
        "names": {},
    }


def _smolvlm(row: Row, config: Any) -> dict[str, Any]:
    written = _idefics3(row, config, "SmolVLM")
    side = {"longest_edge": import_module("rows.idefics3").SIDE}
    written["files"]["video_preprocessor_config.json"] = {
        "video_processor_type": "SmolVLMVideoProcessor",
        "size": side,
        "max_image_size": side,
        "video_sampling": {"max_frames": 64, "fps": 1, "video_size": side},
        **HALF,
    }
    return written


def _qwen(row: Row, config: Any, name: str = "Qwen2_5_VL") -> dict[str, Any]:
    vision = config.vision_config
    side = vision.patch_size * vision.spatial_merge_size
    sizes = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "size": {"shortest_edge": 4 * side**2, "longest_edge": 64 * side**2},
        **HALF,
    }
    kind = "Qwen3VL" if name == "Qwen3VL" else "Qwen2VL"
    return {
        "tokens": {
            config.image_token_id: "<|image_pad|>",
            config.video_token_id: "<|video_pad|>",
            config.vision_start_token_id: "<|vision_start|>",
            config.vision_end_token_id: "<|vision_end|>",
        },
        "files": {
            "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor", **sizes},
            "video_preprocessor_config.json": {"video_processor_type": f"{kind}VideoProcessor", **sizes},
            "processor_config.json": {"processor_class": f"{name}Processor"},
        },
        "prompt": tuple(f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")),
        "names": {},
    }


def _llava_onevision(row: Row, config: Any) -> dict[str, Any]:
    side = config.vision_config.image_size
    size = {"height": side, "width": side}
    patches = (side // config.vision_config.patch_size) ** 2
    return {
        "tokens": {config.image_token_id: "<image>", config.video_token_id: "<video>"},
        "files": {
            "preprocessor_config.json": {
                "image_processor_type": "LlavaOnevisionImageProcessor",
                "size": size,
                "image_grid_pinpoints": config.image_grid_pinpoints,
                **HALF,
            },
            "video_preprocessor_config.json": {
                "video_processor_type": "LlavaOnevisionVideoProcessor",
                "size": size,
                **HALF,
            },
            "processor_config.json": {
                "processor_class": "LlavaOnevisionProcessor",
                "num_image_tokens": patches,
                "vision_feature_select_strategy": config.vision_feature_select_strategy,
                "vision_aspect_ratio": config.vision_aspect_ratio,
            },
        },
        "prompt": ("<image>", "<video>"),
        "names": {},
    }


def _video_llava(row: Row, config: Any) -> dict[str, Any]:
    side = config.vision_config.image_size
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, **HALF}
    return {
        "tokens": {config.image_token_index: "<image>", config.video_token_index: "<video>"},
        "files": {
            "preprocessor_config.json": {"image_processor_type": "VideoLlavaImageProcessor", **sizes},
            "video_preprocessor_config.json": {"video_processor_type": "VideoLlavaVideoProcessor", **sizes},
            "processor_config.json": {
                "processor_class": "VideoLlavaProcessor",
                "patch_size": config.vision_config.patch_size,
                "vision_feature_select_strategy": config.vision_feature_select_strategy,
                "num_additional_image_tokens": 1,
            },
        },
        "prompt": ("<image>", "<video>"),
        "names": {},
    }


def _gemma3(row: Row, config: Any) -> dict[str, Any]:
    side = config.vision_config.image_size
    special = {
        config.image_token_index: "<image_soft_token>",
        config.boi_token_index: "<start_of_image>",
        config.eoi_token_index: "<end_of_image>",
    }
    image = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": side, "width": side}, **HALF}
    return {
        "tokens": special,
        "files": {
            "preprocessor_config.json": image,
            "processor_config.json": {
                "processor_class": "Gemma3Processor",
                "image_seq_length": config.mm_tokens_per_image,
            },
        },
        "prompt": ("<start_of_image>", ""),
        "names": dict(zip(("image_token", "boi_token", "eoi_token"), special.values(), strict=True)),
    }


def _paligemma(row: Row, config: Any) -> dict[str, Any]:
    vision = config.vision_config
    return {
        "tokens": {config.image_token_index: "<image>"},
        "files": {
            "preprocessor_config.json": {
                "image_processor_type": "SiglipImageProcessor",
                "size": {"height": vision.image_size, "width": vision.image_size},
                "image_seq_length": (vision.image_size // vision.patch_size) ** 2,
                **HALF,
            },
            "processor_config.json": {"processor_class": "PaliGemmaProcessor"},
        },
        "prompt": ("<image>", ""),
        "names": {},
    }


WRITERS: dict[str, Callable[[Row, Any], dict[str, Any]]] = {
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "llava_onevision": _llava_onevision,
    "paligemma": _paligemma,
    "qwen2_5_vl": _qwen,
    "qwen2_vl": lambda row, config: _qwen(row, config, "Qwen2VL"),
    "qwen3_vl": lambda row, config: _qwen(row, config, "Qwen3VL"),
    "smolvlm": _smolvlm,
    "video_llava": _video_llava,
}
# Without torchvision (and num2words) these cannot be loaded: they read videos, or 5.17 wants it for their images.
NEED_EXTRA = ("internvl", "llava_onevision", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "smolvlm", "video_llava")
NEED_EXTRA += () if TAKES_FEATURES else ("idefics3",)


def write_processor(row: Row, folder: Path) -> None:
    """Write tokenizer, image processor, video processor and chat template beside the weights of a row's tiny model."""
    config = row.config()
    written = WRITERS[row.model_type](row, config)
    image, video = written["prompt"]
    _tokenizer(config, written["tokens"], written["names"]).save_pretrained(folder)
    for name, content in written["files"].items():
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    template = TEMPLATE.replace("IMAGE", image).replace("VIDEO", video)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _tokenizer(config: Any, special: dict[int, str], names: dict[str, str]) -> PreTrainedTokenizerFast:
    text = config.get_text_config()
    tokens = {number: f"w{number}" for number in range(text.vocab_size)}
    pad, bos, eos = (getattr(text, f"{name}_token_id") for name in ("pad", "bos", "eos"))
    ends = {pad: "<pad>", bos: "<s>", eos: "</s>"}
    tokens |= {UNKNOWN: "<unk>", **ends, **special}
    words = Tokenizer(models.WordLevel({token: number for number, token in tokens.items()}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens=names,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special.values())})
    return tokenizer
