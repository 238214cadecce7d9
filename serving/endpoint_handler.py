"""Answer the requests of a Hugging Face Inference Endpoint: handler.py of a repo that was built with `handler: true`.

    {"inputs": {"image": "https://...", "text": "What is this?"}, "parameters": {"max_new_tokens": 50}}

`inputs` may also be a chat, a list of messages. Images in it are `{"type": "image", "image": ...}` or, as OpenAI's
clients send them, `{"type": "image_url", "image_url": {"url": ...}}`. An image is a URL or base64, with or without
`data:image/...;base64,` in front. It is never a path, which would be one of the server. `parameters` are the few of
`generate` that `PARAMETERS` names, since others make it run code; `visual_token_num` or `keep_ratio` among them is the
budget of this request alone. The endpoint answers a ValueError with status 400 and its text.
"""

from __future__ import annotations

import base64
from typing import Any

from transformers import pipeline

BUDGETS = ("visual_token_num", "keep_ratio")
DEFAULTS = {"max_new_tokens": 256}
MOST = {"max_new_tokens": 4096, "num_beams": 8}  # an endpoint answers one request at a time
PARAMETERS = (
    *MOST,
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    *BUDGETS,
)
EXAMPLE = '{"inputs": {"image": "<URL or base64>", "text": "What is this?"}}'


class EndpointHandler:
    """Called by the endpoint: once with the repository's folder, then with the body of each request."""

    def __init__(self, path: str = "") -> None:
        self.pipeline = pipeline("image-text-to-text", model=path, trust_remote_code=True, device_map="auto")
        if not hasattr(self.pipeline.model, "set_vispruner_config"):
            raise RuntimeError(f"{path or 'the repository'} loaded as a stock model, which prunes nothing")

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the answer to one request, its visual tokens, and how many of them were kept.

        data  `inputs` and, optionally, `parameters`
        """
        messages = conversation(data.get("inputs"))
        arguments = {**DEFAULTS, **checked_parameters(data.get("parameters"))}
        if budget := {name: arguments.pop(name) for name in BUDGETS if name in arguments}:
            arguments["vispruner_config"] = budget
        (answer,) = self.pipeline(text=messages, return_full_text=False, generate_kwargs=arguments)
        has_image = any(part["type"] == "image" for message in messages for part in message["content"])
        pruning = self.pipeline.model.last_pruning if has_image else None
        full, kept = ((), ()) if pruning is None else (pruning.full_counts, pruning.kept_counts)
        if pruning is not None and pruning.stages:  # what prunes in the language model: what its last layers see
            _, kept = pruning.stages[-1]
        return [
            {"generated_text": answer["generated_text"], "visual_tokens": sum(full), "visual_tokens_kept": sum(kept)}
        ]


def checked_parameters(parameters: Any) -> dict[str, Any]:
    """Return the parameters of a request, numbers and switches alone; ValueError for what is none of `PARAMETERS`."""
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, dict):
        raise ValueError(f"parameters must be an object, such as {DEFAULTS}, got {parameters!r:.80}")
    for name, value in parameters.items():
        if name not in PARAMETERS:
            raise ValueError(f"parameters may hold {', '.join(PARAMETERS)}, got {name!r:.80}")
        if not isinstance(value, bool | int | float):
            raise ValueError(f"parameters.{name} must be a number, true or false, got {value!r:.80}")
        if value > MOST.get(name, value):
            raise ValueError(f"parameters.{name} must be at most {MOST[name]}, got {value}")
    return parameters


def conversation(inputs: Any) -> list[dict[str, Any]]:
    """Return `inputs` as a chat whose images are URLs or checked base64; ValueError for anything else."""
    if isinstance(inputs, dict):
        unknown = set(inputs) - {"image", "text"}
        if unknown or not isinstance(inputs.get("text"), str):
            raise ValueError(f"inputs must hold text, and image if there is one, or be a list of messages: {EXAMPLE}")
        images = [{"type": "image", "image": inputs["image"]}] if "image" in inputs else []
        inputs = [{"role": "user", "content": [*images, {"type": "text", "text": inputs["text"]}]}]
    if not isinstance(inputs, list) or not inputs:
        raise ValueError(f"inputs must be an object or a list of messages: {EXAMPLE}")
    return [_message(message) for message in inputs]


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f'a message must be {{"role": "user", "content": ...}}, got {message!r:.80}')
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ValueError(f"the content of a message must be text or a list of parts, got {content!r:.80}")
    return {"role": message["role"], "content": [_part(part) for part in content]}


def _part(part: Any) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image":
        return {"type": "image", "image": _image(part.get("image", part.get("url", part.get("base64"))))}
    if kind == "image_url":
        given = part.get("image_url")
        return {"type": "image", "image": _image(given.get("url") if isinstance(given, dict) else given)}
    raise ValueError(f"a part of a message must be of type text, image or image_url, got {part!r:.80}")


def _image(given: Any) -> str:
    if isinstance(given, str) and given.startswith(("https://", "http://")):
        return given
    try:
        head, _, encoded = given.rpartition(",") if isinstance(given, str) else ("", "", "")
        if not encoded or (head and not head.startswith("data:image/")):
            raise ValueError
        base64.b64decode(encoded, validate=True)
    except ValueError:
        raise ValueError(f"an image must be a URL that begins with http, or base64, got {given!r:.80}") from None
    return f"data:image/png;base64,{encoded}"  # without this, transformers might take it for a path
