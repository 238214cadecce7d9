"""Ask a running server about a picture, and say how many of its visual tokens it kept: what `serve-check` does.

A server tells only how long a prompt was. So it is asked with the picture and without, and the same two prompts are
counted as the stock processor writes them in full; the text that surrounds both cancels out.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from .picture import open_photo
from .questions import SCENE, load_processor

TIMEOUT = 600.0
QUESTION = "What is this?"
KEY = "OPENAI_API_KEY"  # sent along where it is set, as OpenAI's own client does


@dataclass(frozen=True)
class ServeCheck:
    """What a server made of one picture; `visual_tokens` are those of a full prompt."""

    model: str
    visual_tokens: int
    kept: int
    prompt_tokens: int
    answer: str

    @property
    def pruned(self) -> bool:
        return self.kept < self.visual_tokens

    def said(self) -> str:
        """Return the result in words."""
        if self.pruned:
            verdict = f"pruning is on: {self.kept} of {self.visual_tokens} visual tokens of the picture stay"
        else:
            verdict = (
                f"nothing was pruned: the picture takes {self.kept} of {self.visual_tokens} visual tokens. With vLLM, "
                "see that architectures names a VisPruner class; `transformers serve` counts prompts as they were "
                "sent, so there see its log"
            )
        return f"{self.model}: {verdict}; the prompt has {self.prompt_tokens} tokens"


def check_server(
    url: str,
    image: str | None = None,
    model: str | None = None,
    repo: str | None = None,
    question: str = QUESTION,
    visual_token_num: int | None = None,
    keep_ratio: float | None = None,
) -> ServeCheck:
    """Send one request with a picture, and the same without; ValueError or OSError says what went wrong.

    url    of an OpenAI-compatible server
    repo   whose processor counts full prompts; what the server says that it serves unless given
    """
    picture = open_photo(SCENE if image is None else image)
    served = _models(url)
    if model is None:
        model = next(iter(served))
    elif model not in served:
        raise ValueError(f"{url} serves {', '.join(served)}, not {model}")
    full, visual = _full_counts(repo or served[model], picture, question)
    asked = {"visual_token_num": visual_token_num, "keep_ratio": keep_ratio}
    budget = {name: value for name, value in asked.items() if value is not None}
    body = {"model": model, "max_tokens": 16, "temperature": 0}
    without = _post(url, {**body, "messages": _messages(question)})
    extra = {"mm_processor_kwargs": budget} if budget else {}
    answer = _post(url, {**body, **extra, "messages": _messages(question, picture)})
    took = answer["usage"]["prompt_tokens"] - without["usage"]["prompt_tokens"]
    text = answer["choices"][0]["message"].get("content") or ""
    return ServeCheck(model, visual, visual - (full - took), answer["usage"]["prompt_tokens"], text.strip())


def _messages(question: str, picture: Image.Image | None = None) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if picture is not None:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        data = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": data}})
    return [{"role": "user", "content": content}]


def _full_counts(repo: str, picture: Image.Image, question: str) -> tuple[int, int]:
    """Return how many tokens longer the picture makes a full prompt, and how many of them are visual tokens."""
    try:
        processor = load_processor(repo)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the processor of {repo}, which counts the full prompt, does not load: name a folder or Hub id by --repo "
            f"({error})"
        ) from error
    text, image = {"type": "text", "text": question}, {"type": "image"}

    def tokens(content: list[dict[str, str]], **visual: Any) -> list[int]:
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return processor(text=prompt, return_tensors="pt", **visual)["input_ids"][0].tolist()

    ids = tokens([image, text], images=picture)
    return len(ids) - len(tokens([text])), ids.count(processor.image_token_id)


def _models(url: str) -> dict[str, str]:
    """Return what a server serves: the repo of each name."""
    listed = _exchange(url, "GET", "/v1/models").get("data") or []
    models = {entry["id"]: entry.get("root") or entry["id"] for entry in listed if isinstance(entry.get("id"), str)}
    if not models:
        raise ValueError(f"{url} serves no model")
    return models


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = _exchange(url, "POST", "/v1/chat/completions", json.dumps(body))
    if not isinstance((answer.get("usage") or {}).get("prompt_tokens"), int):
        raise ValueError(f"{url} does not say in usage.prompt_tokens how long a prompt was")
    return answer


def _exchange(url: str, method: str, path: str, body: str | None = None) -> dict[str, Any]:
    """Return the JSON object that a server answers with; ValueError has its message where it refuses."""
    place = urlsplit(url if "//" in url else f"http://{url}")
    if place.scheme not in ("http", "https") or not place.hostname:
        raise ValueError(f"{url} is no address of a server, such as http://localhost:8000")
    kind = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
    connection = kind(place.hostname, place.port, timeout=TIMEOUT)
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {key}"
    try:
        connection.request(method, place.path.rstrip("/").removesuffix("/v1") + path, body, headers)
        response = connection.getresponse()
        status, text = response.status, response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{url} does not answer: {error or type(error).__name__}") from error
    finally:
        connection.close()
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    if status != 200:
        said = answer.get("error", answer) if isinstance(answer, dict) else text[:200]
        said = said.get("message", said) if isinstance(said, dict) else said
        raise ValueError(f"{url}{path} answers {status}: {said}")
    if not isinstance(answer, dict):
        raise ValueError(f"{url}{path} does not answer with a JSON object: is it an OpenAI-compatible server?")
    return answer
