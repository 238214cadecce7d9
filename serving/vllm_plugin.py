"""The plugin that vLLM finds by its entry point: it says which classes serve the pruned architectures.

Nothing of vLLM or torch is imported here: vLLM runs this in each of its processes, most of which need no model.
"""

from importlib.util import find_spec

# Module and class by the name in config.json's `architectures`; vLLM imports the module when it serves one of them.
_PLACES = {
    "Gemma3": "vllm_gemma3",
    "Idefics3": "vllm_idefics3",
    "InternVL": "vllm_internvl",
    "Llava": "vllm_llava",
    "LlavaNext": "vllm_llava_next",
    "LlavaOnevision": "vllm_llava_onevision",
    "Qwen2VL": "vllm_qwen2_vl",
    "Qwen2_5_VL": "vllm_qwen2_5_vl",
    "Qwen3VL": "vllm_qwen3_vl",
    "SmolVLM": "vllm_idefics3",
}
MODELS = {
    f"VisPruner{name}ForConditionalGeneration": f"vispruner.serving.{place}:VisPruner{name}ForConditionalGeneration"
    for name, place in _PLACES.items()
}


def register() -> None:
    """Register the pruned architectures with vLLM, once however often it is called; without vLLM do nothing."""
    if find_spec("vllm") is None:
        return
    from vllm import ModelRegistry

    for architecture, place in MODELS.items():
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, place)
