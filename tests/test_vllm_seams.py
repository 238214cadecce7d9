"""Every seam between the plugin and vLLM, checked by signature in the source of a vLLM that need not run here.

By default the one that is installed. VLLM_SOURCE names another, a wheel or an unpacked source distribution: what
`pip download --no-deps vllm==0.33.0` fetches (340 MB) passes.
"""

from __future__ import annotations

import ast
import os
import zipfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from vispruner import serving

pytestmark = pytest.mark.vllm

SERVING = sorted(Path(serving.__file__).parent.glob("vllm_*.py"))
MODELS, PROCESSING = "model_executor/models", "multimodal/processing"
EMBEDDING = ("input_ids", "multimodal_embeddings", "is_multimodal")

# What the plugin overrides or calls: by file and class, of each method the parameters that it relies on, in order.
METHODS = {
    (f"{PROCESSING}/processor.py", "BaseMultiModalProcessor"): {
        "apply": ("inputs", "timing_ctx"),
        "get_dummy_inputs": ("seq_len", "mm_counts", "mm_options"),
        "_apply_hf_processor_main": ("mm_items", "hf_kwargs"),
        "_get_mm_fields_config": ("hf_inputs", "hf_processor_mm_kwargs"),
        "_get_prompt_updates": ("mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"),
    },
    (f"{PROCESSING}/processor.py", "PromptUpdate"): {"_resolve_content": ("item_idx",)},
    ("multimodal/parse.py", "ImageProcessorItems"): {"get_image_size": ("item_idx",)},
    ("multimodal/parse.py", "VideoProcessorItems"): {"get_frame_size": ("item_idx",), "get_num_frames": ("item_idx",)},
    ("model_executor/layers/attention/mm_encoder_attention.py", "MMEncoderAttention"): {
        "forward_native": ("query", "key", "value")
    },
    (f"{MODELS}/llava.py", "LlavaForConditionalGeneration"): {
        "_parse_and_validate_image_input": (),
        "_process_image_input": ("image_input",),
    },
    (f"{MODELS}/llava_next.py", "LlavaNextForConditionalGeneration"): {
        "_parse_and_validate_image_input": (),
        "_process_image_input": ("image_input",),
    },
    (f"{MODELS}/llava_onevision.py", "LlavaOnevisionForConditionalGeneration"): {
        "_parse_and_validate_image_input": (),
        "_parse_and_validate_video_input": (),
        "_process_image_input": ("image_input",),
        "_process_video_pixels": ("inputs",),
        "apply_pooling": ("image_features",),
    },
    (f"{MODELS}/interns1.py", "InternS1ForConditionalGeneration"): {
        "_parse_and_validate_image_input": (),
        "_parse_and_validate_video_input": (),
        "_process_vision_input": ("image_input",),
        "pixel_shuffle": ("x", "scale_factor"),
    },
    (f"{MODELS}/idefics3.py", "Idefics3ForConditionalGeneration"): {
        "_parse_and_validate_image_input": (),
        "_process_image_input": ("image_input",),
    },
    (f"{MODELS}/idefics3.py", "Idefics3Model"): {
        "image_pixels_to_features": ("pixel_values", "pixel_attention_mask"),
        "get_patch_attention_mask": ("pixel_attention_mask",),
    },
    (f"{MODELS}/idefics3.py", "Idefics3Connector"): {"pixel_shuffle": ("x", "scale_factor")},
    (f"{MODELS}/gemma3_mm.py", "Gemma3ForConditionalGeneration"): {
        "_parse_and_validate_image_input": (),
        "_process_image_input": ("image_input",),
    },
    **{
        (f"{MODELS}/{file}.py", f"{name}ForConditionalGeneration"): {
            "_parse_and_validate_image_input": (),
            "_parse_and_validate_video_input": (),
            "_process_image_input": ("image_input",),
            "_process_video_input": ("video_input",),
            "embed_multimodal": (),
            "get_mrope_input_positions": ("input_tokens", "mm_features"),
            "forward": ("input_ids", "positions", "intermediate_tensors", "inputs_embeds"),
        }
        for file, name in (("qwen2_vl", "Qwen2VL"), ("qwen2_5_vl", "Qwen2_5_VL"), ("qwen3_vl", "Qwen3VL"))
    },
    (f"{MODELS}/qwen3_vl.py", "Qwen3VLForConditionalGeneration "): {"embed_input_ids": EMBEDDING},
    (f"{MODELS}/interfaces.py", "SupportsMultiModal"): {"embed_input_ids": EMBEDDING, "embed_multimodal": ()},
}
# What is written in a class that the plugin reads or hooks: pieces of its source, spaces apart.
WRITTEN = {
    **{
        (f"{MODELS}/{file}.py", name): "self.attn(query_states, key_states, value_states)"
        for file, name in (
            ("clip", "CLIPAttention"),
            ("siglip", "SiglipAttention"),
            ("idefics2_vision_model", "Idefics2VisionAttention"),
        )
    },
    (f"{MODELS}/interns1_vit.py", "InternSdpaAttention"): "self.attn(q, k, v)",
    (f"{MODELS}/qwen2_vl.py", "Qwen2VisionAttention"): "self.attn(query=q, key=k, value=v,",
    (f"{MODELS}/qwen2_5_vl.py", "Qwen2_5_VisionAttention"): "self.attn(query=q, key=k, value=v,",
    (f"{MODELS}/qwen3_vl.py", "Qwen3_VisionBlock"): "self.attn = Qwen2_5_VisionAttention(",
    ("model_executor/layers/attention/mm_encoder_attention.py", "MMEncoderAttention"): "self.num_heads = num_heads",
    (f"{PROCESSING}/inputs.py", "ProcessorInputs"): "hf_processor_mm_kwargs: Mapping[str, object]",
    (f"{PROCESSING}/processor.py", "PromptUpdateDetails"): "is_embed: Callable[[list[int]], torch.Tensor] | None",
    ("config/multimodal.py", "MultiModalConfig"): "video_pruning_rate: float | None",
    ("config/compilation.py", "CompilationConfig"): "cudagraph_mm_encoder: bool = False",
    ("config/compilation.py", "CompilationConfig "): "compile_mm_encoder: bool = False",
    ("config/model.py", "ModelConfig"): "hf_overrides:",
}


def root() -> Path:
    if given := os.environ.get("VLLM_SOURCE"):
        return Path(given)
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed, and VLLM_SOURCE names none")
    return Path(next(iter(spec.submodule_search_locations))).parent


@cache
def text_of(name: str) -> str | None:
    """Return the source of a file of vLLM, from a wheel or a folder."""
    place = root()
    if place.suffix == ".whl":
        with zipfile.ZipFile(place) as wheel:
            return wheel.read(f"vllm/{name}").decode() if f"vllm/{name}" in wheel.namelist() else None
    path = place / "vllm" / name
    return path.read_text(encoding="utf-8") if path.is_file() else None


@cache
def classes_of(name: str) -> dict[str, ast.ClassDef]:
    source = text_of(name)
    assert source is not None, f"vLLM has no {name}"
    return {node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)}


def imports() -> list[tuple[str, str]]:
    """What the plugin imports of vLLM: module and name."""
    found = {
        (node.module, alias.name)
        for file in SERVING
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
    }
    return sorted((str(module), name) for module, name in found)


def bound_names(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)  # of a table of what is imported lazily
    return names


@pytest.mark.parametrize(("module", "name"), imports())
def test_what_is_imported_is_there(module: str, name: str) -> None:
    path = "/".join(module.split(".")[1:])
    source = text_of(f"{path}.py") or text_of(f"{path}/__init__.py".lstrip("/"))
    assert source is not None, f"vLLM has no module {module}"
    assert name in bound_names(source)


@pytest.mark.parametrize(
    ("file", "name", "method", "parameters"),
    [(*place, method, wanted) for place, methods in METHODS.items() for method, wanted in methods.items()],
)
def test_a_method_takes_what_the_plugin_gives_it(
    file: str, name: str, method: str, parameters: tuple[str, ...]
) -> None:
    body = classes_of(file)[name.strip()].body
    found = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == method]
    assert found, f"{name}.{method} is not there"
    arguments = found[-1].args
    taken = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    own = [argument for argument in taken if argument in parameters]
    assert own == list(parameters)
    required = len(arguments.args) - len(arguments.defaults)
    others = set(taken[:required]) - {"self", *parameters}
    assert method == "forward_native" or not others, f"{name}.{method} wants {others} too"


@pytest.mark.parametrize(("file", "name", "piece"), [(*place, piece) for place, piece in WRITTEN.items()])
def test_a_class_is_written_as_the_plugin_reads_it(file: str, name: str, piece: str) -> None:
    node, source = classes_of(file)[name.strip()], text_of(file) or ""
    lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
    packed = "".join("".join(lines).split())
    assert "".join(piece.split()) in packed
