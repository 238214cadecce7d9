"""Start vLLM's OpenAI server in a process of its own, and ask it questions about pictures over HTTP.

Shared by the benchmark of serving and by its test. The client needs nothing but the standard library and Pillow.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

START_TIMEOUT = 600.0
REQUEST_TIMEOUT = 120.0
LOG_TAIL = 20_000  # characters; vLLM says what is wrong long before it ends


class ServerError(RuntimeError):
    """The server did not start, or answered with an error; `status` is the HTTP one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """One answer; ttft and seconds count from the moment the request was sent, gaps from token to token.

    token_ids  those of the text, where the request has `return_token_ids`
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    ttft: float
    seconds: float
    gaps: tuple[float, ...]
    token_ids: list[int]


class OpenAIServer:
    """vLLM's server on a free port of this machine, while the `with` block runs.

    model      a repo folder or a Hub id
    arguments  further ones of the command line
    plugin     whether vLLM may load the vispruner plugin
    """

    def __init__(
        self, model: str | Path, log: Path, arguments: Sequence[str] = (), plugin: bool = True, **environment: str
    ) -> None:
        self.log, self.port = log, _free_port()
        self.command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--served-model-name", "model", "--host", "127.0.0.1", "--port", str(self.port), *arguments),
        ]
        self._environment = {
            **{name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},  # vLLM binds its own
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            **({} if plugin else {"VLLM_PLUGINS": ""}),
            **environment,
        }

    def __enter__(self) -> OpenAIServer:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=self._environment, start_new_session=True
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        for how in (signal.SIGINT, signal.SIGKILL):  # the group: its engine and workers are processes of their own
            try:
                os.killpg(self.process.pid, how)
                self.process.wait(30)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def _wait_until_healthy(self) -> None:
        end = time.monotonic() + START_TIMEOUT
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise ServerError(f"the server ended while starting:\n{self.log_text()[-LOG_TAIL:]}")
            try:
                if self.get("/health") is not None:
                    return
            except (OSError, http.client.HTTPException, ServerError):
                time.sleep(0.2)
        raise ServerError(f"the server was not ready after {START_TIMEOUT:.0f} s:\n{self.log_text()[-LOG_TAIL:]}")

    def log_text(self) -> str:
        """Return what server and engine wrote until now."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> str:
        """Return the body of a GET; ServerError unless its status is 200."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_TIMEOUT)) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read().decode()
            if response.status != 200:
                raise ServerError(body, response.status)
            return body

    def metrics(self) -> dict[str, float]:
        """Return the server's counters and gauges by name, without the `vllm:` prefix; labels are summed over."""
        found: dict[str, float] = {}
        for name, value in re.findall(r"^(?:vllm:)?(\w+)\{[^}]*\} (\S+)$", self.get("/metrics"), re.MULTILINE):
            found[name] = found.get(name, 0.0) + float(value)
        return found

    def ask(self, question: str, visual: Sequence[str] = (), **options: Any) -> Answer:
        """Ask about images and videos (data URLs) and read the streamed answer; greedy, of 16 tokens unless told."""
        started = time.perf_counter()
        text, usage, stamps, ids = "", {}, [], []
        for event in self.stream(question, visual, **options):
            if event["choices"]:
                stamps.append(time.perf_counter() - started)
                text += event["choices"][0]["delta"].get("content") or ""
                ids += event["choices"][0].get("token_ids") or []
            usage = event.get("usage") or usage
        seconds = time.perf_counter() - started
        gaps = tuple(after - before for before, after in pairwise(stamps[1:]))  # the first names the role, no token
        ttft = stamps[0] if stamps else seconds
        return Answer(text.strip(), usage["prompt_tokens"], usage["completion_tokens"], ttft, seconds, gaps, ids)

    def stream(self, question: str, visual: Sequence[str] = (), **options: Any) -> Iterator[dict[str, Any]]:
        """Send one chat request and yield the events of its stream; closing the generator hangs up."""
        with closing(self.send(question, visual, **options)) as connection:
            response = connection.getresponse()
            if response.status != 200:
                raise ServerError(response.read().decode(errors="replace"), response.status)
            for line in response:
                if line.startswith(b"data: {"):
                    event = json.loads(line.removeprefix(b"data: "))
                    if "choices" not in event:
                        raise ServerError(json.dumps(event))
                    yield event

    def send(self, question: str, visual: Sequence[str] = (), **options: Any) -> http.client.HTTPConnection:
        """Send one chat request and return its connection, of which nothing has been read; closing it hangs up."""
        kinds = ["video_url" if url.startswith("data:video") else "image_url" for url in visual]
        content = [*({"type": kind, kind: {"url": url}} for kind, url in zip(kinds, visual, strict=True))]
        body = {
            "model": "model",
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
            "add_special_tokens": True,  # the chat templates of LLaVA leave the first one to the tokenizer
            "temperature": 0,
            "max_tokens": 16,
            "stream": True,
            "stream_options": {"include_usage": True},
            **options,
        }
        return self._posted("/v1/chat/completions", body)

    def post(self, path: str, body: Any) -> Any:
        """Return the JSON that answers a POST, None for an empty answer; ServerError unless its status is 200."""
        with closing(self._posted(path, body)) as connection:
            response = connection.getresponse()
            text = response.read().decode()
            if response.status != 200:
                raise ServerError(text, response.status)
            return json.loads(text) if text else None

    def _posted(self, path: str, body: Any) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_TIMEOUT)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        except BaseException:
            connection.close()
            raise
        return connection


def data_url(image: Image.Image) -> str:
    """Return an image as the PNG data URL that a chat request carries."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def video_url(frames: Sequence[Image.Image]) -> str:
    """Return frames as the data URL of a video: JPEG images in a row."""
    images = []
    for frame in frames:
        buffer = io.BytesIO()
        frame.save(buffer, "JPEG")
        images.append(base64.b64encode(buffer.getvalue()).decode())
    return "data:video/jpeg;base64," + ",".join(images)


def _free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
