"""What original LLaVA checkpoints look like, as data: tensor names, config fields, prompt formats.

`KEY_MAP` and `TOWER_KEY_MAP` are (pattern, replacement) pairs, matched against whole names, the first match wins. The
names on the right are the ones that every supported version of transformers reads without a mapping of its own.
"""

from __future__ import annotations

import re

KEY_MAP = (
    (r"lm_head\.weight", "lm_head.weight"),
    (r"model\.image_newline", "model.image_newline"),
    (r"model\.mm_projector\.0\.(weight|bias)", r"model.multi_modal_projector.linear_1.\1"),
    (r"model\.mm_projector\.2\.(weight|bias)", r"model.multi_modal_projector.linear_2.\1"),
    (r"model\.vision_tower\.(?:vision_tower\.)?vision_model\.(.+)", r"model.vision_tower.vision_model.\1"),
    (r"model\.(embed_tokens|layers|norm)\.(.+)", r"model.language_model.\1.\2"),
)

TOWER_KEY_MAP = (
    (r"vision_model\.(.+)", r"model.vision_tower.vision_model.\1"),
    # CLIPVisionModel as newer transformers save it, without the inner name
    (r"((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..+)", r"model.vision_tower.vision_model.\1"),
)

# Buffers that old versions saved and every version recomputes, and the text half of a full CLIP model.
IGNORED_KEYS = (
    r".*\.rotary_emb\.inv_freq",
    r"(?:.*\.)?embeddings\.position_ids",
)
TOWER_IGNORED_KEYS = (
    *IGNORED_KEYS,
    r"text_model\..+",
    r"text_projection\.weight",
    r"visual_projection\.weight",
    r"logit_scale",
)

TOWER_PREFIX = "model.vision_tower."
VOCABULARY_KEYS = ("model.language_model.embed_tokens.weight", "lm_head.weight")

# config.model_type of the original code -> model_type of the text model
TEXT_MODEL_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}

TEXT_CONFIG_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pretraining_tp",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "sliding_window",
)

VISION_CONFIG_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
    "initializer_range",
    "initializer_factor",
)

SELECT_STRATEGIES = {"patch": "default", "cls_patch": "full"}

_CONTENT_MACRO = """\
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
        {%- for part in content if part['type'] == 'text' -%}
            {{- part['text'] + ('' if loop.last else ' ') -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
"""

_VICUNA_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{- render(message['content']) + ' ' -}}
    {%- elif message['role'] == 'user' -%}
        {{- 'USER: ' + render(message['content']) + ' ' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- 'ASSISTANT: ' + render(message['content']) + '</s>' -}}
    {%- else -%}
        {{- raise_exception('role must be system, user or assistant, got ' + message['role']) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""

_MISTRAL_TEMPLATE = """\
{%- set pending = namespace(system='') -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- set pending.system = '<<SYS>>\\n' + render(message['content']) + '\\n<</SYS>>\\n\\n' -%}
    {%- elif message['role'] == 'user' -%}
        {{- '[INST] ' + pending.system + render(message['content']) + ' [/INST]' -}}
        {%- set pending.system = '' -%}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ' + render(message['content']) + ' </s> ' -}}
    {%- else -%}
        {{- raise_exception('role must be system, user or assistant, got ' + message['role']) -}}
    {%- endif -%}
{%- endfor -%}
"""

CHAT_TEMPLATES = {
    "llama": _CONTENT_MACRO + _VICUNA_TEMPLATE,
    "mistral": _CONTENT_MACRO + _MISTRAL_TEMPLATE,
}


def rename(name: str, key_map: tuple[tuple[str, str], ...], ignored: tuple[str, ...]) -> str | None:
    """Give the published name of a tensor, or None for one to leave out; an unknown name raises KeyError."""
    if any(re.fullmatch(pattern, name) for pattern in ignored):
        return None
    for pattern, replacement in key_map:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    raise KeyError(name)
