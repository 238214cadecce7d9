"""`vispruner serve-check` against real HTTP servers that count prompts as vLLM does, dense and pruned."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoProcessor

from vispruner.conversion import cli
from vispruner.conversion.serve_check import check_server

FULL = 64


class Engine(ThreadingHTTPServer):
    """Counts what the processor of a repo writes, and of each picture `kept` visual tokens; it has no model."""

    daemon_threads = True

    def __init__(self, repo: Path, kept: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repo, self.kept, self.processor = repo, kept, AutoProcessor.from_pretrained(repo)
        self.seen: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.answers: dict[str, tuple[int, bytes]] = {}  # in the place of what it would say, by path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Engine

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._say(200, {"data": [{"id": "model", "root": str(self.server.repo)}, {"id": "other"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((dict(self.headers), body))
        budget = body.get("mm_processor_kwargs", {}).get("visual_token_num", self.server.kept)
        if budget < 1:
            return self._say(400, {"error": {"message": "vispruner_config.visual_token_num must be an integer >= 1"}})
        (message,) = body["messages"]
        content = [{"type": "image"} if part["type"] == "image_url" else part for part in message["content"]]
        pictures = [opened(part) for part in message["content"] if part["type"] == "image_url"]
        processor = self.server.processor
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        ids = processor(text=prompt, images=pictures or None)["input_ids"][0]
        count = len(ids) - len(pictures) * max(0, FULL - budget)
        choices = [{"message": {"role": "assistant", "content": "a cat"}}]
        return self._say(200, {"choices": choices, "usage": {"prompt_tokens": count}})

    def _say(self, status: int, answer: dict[str, Any]) -> None:
        status, body = self.server.answers.get(self.path, (status, json.dumps(answer).encode()))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def opened(part: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2])))


@contextmanager
def running(repo: Path, kept: int) -> Iterator[Engine]:
    with Engine(repo, kept) as engine:
        thread = threading.Thread(target=engine.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield engine
        finally:
            engine.shutdown()
            thread.join()


@pytest.fixture
def engine(tiny_llava_repo: Path) -> Iterator[Engine]:
    with running(tiny_llava_repo, 9) as engine:
        yield engine


def test_it_says_how_many_visual_tokens_stay(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve-check", engine.url]) == 0
    assert "model: pruning is on: 9 of 64 visual tokens of the picture stay" in capsys.readouterr().out
    assert len(engine.seen) == 2  # with the picture and without


def test_a_dense_server_has_exit_status_1(tiny_llava_repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(tiny_llava_repo, FULL) as engine:
        assert cli.main(["serve-check", engine.url]) == 1
    assert "nothing was pruned: the picture takes 64 of 64 visual tokens" in capsys.readouterr().out


def test_as_json_with_a_photo_and_a_budget_of_the_request(
    engine: Engine, photo: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo.save(tmp_path / "photo.jpg")
    given = ["--image", str(tmp_path / "photo.jpg"), "--visual-token-num", "5", "--question", "Where is it?", "--json"]
    assert cli.main(["serve-check", f"{engine.url}/v1", *given]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kept"], found["visual_tokens"], found["pruned"], found["answer"]) == (5, 64, True, "a cat")
    image, text = engine.seen[-1][1]["messages"][0]["content"]
    assert opened(image).size == photo.size and text["text"] == "Where is it?"
    assert engine.seen[-1][1]["mm_processor_kwargs"] == {"visual_token_num": 5}


def test_a_key_is_sent_where_the_environment_has_one(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    check_server(engine.url)
    assert engine.seen[-1][0]["Authorization"] == "Bearer a-key"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"visual_token_num": 0}, "answers 400: vispruner_config.visual_token_num must be an integer >= 1"),
        ({"model": "another"}, "serves model, other, not another"),
        ({"model": "other"}, "name a folder or Hub id by --repo"),
        ({"image": "nowhere.png"}, "nowhere.png"),
    ],
)
def test_what_goes_wrong_is_said(engine: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        check_server(engine.url, **options)


def test_another_repo_counts_where_the_server_names_none(engine: Engine, tiny_llava_repo: Path) -> None:
    assert check_server(engine.url, model="other", repo=str(tiny_llava_repo)).kept == 9


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        ("/v1/models", (404, b"not found"), "/v1/models answers 404: not found"),
        ("/v1/models", (200, b"<html>"), "is it an OpenAI-compatible server"),
        ("/v1/models", (200, b"{}"), "serves no model"),
        ("/v1/chat/completions", (200, b'{"choices": []}'), r"usage\.prompt_tokens"),
    ],
)
def test_what_is_no_such_server_is_said(
    engine: Engine, path: str, answer: tuple[int, bytes], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.answers[path] = answer
    with pytest.raises(ValueError, match=message):
        check_server(engine.url)
    assert cli.main(["serve-check", engine.url]) == 2
    assert capsys.readouterr().err.startswith("vispruner: error: ")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "ftp://host", "http://"])
def test_an_address_without_a_server_is_said(url: str) -> None:
    with pytest.raises((ValueError, OSError), match=r"does not answer|is no address"):
        check_server(url)
