"""The plugin that vLLM finds by its entry point: it says which classes serve the pruned architectures.

Nothing of vLLM or torch is imported here: vLLM runs this in each of its processes, most of which need no model.
"""

from importlib.util import find_spec

# Module and class by the name in config.json's `architectures`; vLLM imports the module when it serves one of them.
MODELS = {
    "VisPrunerLlavaForConditionalGeneration": ("vispruner.serving.vllm_llava:VisPrunerLlavaForConditionalGeneration"),
    "VisPrunerLlavaNextForConditionalGeneration": (
        "vispruner.serving.vllm_llava_next:VisPrunerLlavaNextForConditionalGeneration"
    ),
}


def register() -> None:
    """Register the pruned architectures with vLLM, once however often it is called; without vLLM do nothing."""
    if find_spec("vllm") is None:
        return
    from vllm import ModelRegistry

    for architecture, place in MODELS.items():
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, place)
