"""`transformers serve` on a built repo: OpenAI chat requests over HTTP are answered pruned, by the stock server."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bases import in_cache
from huggingface_hub import constants
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils.import_utils import is_serve_available

import vispruner
from vispruner.conversion.build import budget_config, build_repo
from vispruner.conversion.questions import SCENE, ask, scene_questions
from vispruner.conversion.repo_config import DEMO_CONFIG

needs_server = pytest.mark.skipif(
    not is_serve_available(), reason="`transformers serve` needs `pip install 'vispruner[serve]'`"
)

FULL, KEPT = 144, 4  # so few that some answers differ from those of the whole picture
SHORTENED = re.compile(r"a prompt of (\d+) tokens is shortened to (\d+)")
SERVE = 'import sys; sys.modules["vispruner"] = None; from transformers.cli.transformers import main; main()'
QUESTIONS = [question.text for question in scene_questions()]


@dataclass(frozen=True)
class Server:
    """A running `transformers serve` and what it printed so far."""

    repo: Path
    port: int
    log: Path

    def post(self, content: list[dict[str, Any]], **settings: Any) -> str:
        """Put one chat message to it; return the body of the answer."""
        messages = [{"role": "user", "content": content}]
        body = {"model": str(self.repo), "messages": messages, "max_tokens": 16, "temperature": 0, **settings}
        request = urllib.request.Request(
            f"http://localhost:{self.port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return answer.read().decode()

    def ask(self, question: str, images: int = 1) -> dict[str, Any]:
        return json.loads(self.post([*[picture()] * images, {"type": "text", "text": question}]))

    def shortened(self) -> list[tuple[int, int]]:
        """The prompts that it shortened so far, as lengths before and after."""
        return [(int(full), int(kept)) for full, kept in SHORTENED.findall(self.log.read_text())]


def picture() -> dict[str, Any]:
    data = base64.b64encode(SCENE.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def text_of(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"].strip()


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_repo("tiny-llava-vispruner", tmp_path_factory.mktemp("built") / "repo", show_progress=False)
    config = json.loads((folder / "config.json").read_text())
    config["vispruner_config"]["visual_token_num"] = KEPT
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@contextmanager
def serving(repo: Path, log: Path, *options: str) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = ["--device", "cpu", "--port", str(port), "--log-level", "info", *options]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, "serve", *settings, str(repo)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            cwd=log.parent,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until_healthy(process, port, log)
            yield Server(repo, port, log)
        finally:
            process.terminate()
            process.wait(timeout=600)


def wait_until_healthy(process: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + 600
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)


@pytest.fixture(scope="module")
def server(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with serving(repo, folder / "log.txt", "--trust-remote-code") as server:
        yield server


@pytest.fixture(scope="module")
def expected(repo: Path) -> dict[str, list[str]]:
    """What the repo answers in this process, pruned and with every visual token."""
    processor = AutoProcessor.from_pretrained(repo)
    model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True).eval()
    with Image.open(SCENE) as opened:
        scene = opened.convert("RGB")
    answers = {"pruned": [ask(model, processor, scene, question) for question in QUESTIONS]}
    model.set_vispruner_config(method="none")
    answers["dense"] = [ask(model, processor, scene, question) for question in QUESTIONS]
    return answers


@pytest.mark.parametrize("architecture", sorted(vispruner.ARCHITECTURES))
def test_every_class_is_known_to_take_images(architecture: str) -> None:
    """By this table of class names `transformers serve` and pipelines tell what a model takes."""
    name = vispruner.ARCHITECTURES[architecture].model_class.__name__
    assert name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()


@needs_server
def test_answers_are_those_of_the_pruned_repo(server: Server, expected: dict[str, list[str]]) -> None:
    assert expected["pruned"] != expected["dense"]
    assert [text_of(server.ask(question)) for question in QUESTIONS] == expected["pruned"]


@needs_server
@pytest.mark.parametrize("images", [1, 2])
def test_the_prompt_is_shortened_by_what_was_dropped(server: Server, images: int) -> None:
    """`usage` counts the prompt as the client sent it; the server's log says what the model saw of it."""
    before = len(server.shortened())
    usage = server.ask(QUESTIONS[0], images)["usage"]
    assert server.shortened()[before:] == [
        (usage["prompt_tokens"], usage["prompt_tokens"] - images * (FULL - KEPT)),
    ]


@needs_server
def test_a_streamed_answer_is_the_same(server: Server, expected: dict[str, list[str]]) -> None:
    body = server.post([picture(), {"type": "text", "text": QUESTIONS[0]}], stream=True)
    chunks = [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line.startswith("data: {")]
    pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]]
    assert "".join(pieces).strip() == expected["pruned"][0]


@needs_server
def test_a_prompt_without_an_image_is_left_alone(server: Server) -> None:
    before = len(server.shortened())
    assert server.ask(QUESTIONS[0], images=0)["usage"]["completion_tokens"] > 0
    assert len(server.shortened()) == before


@needs_server
def test_a_broken_image_is_an_error_and_the_server_lives(server: Server, expected: dict[str, list[str]]) -> None:
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(urllib.error.HTTPError):
        server.post([broken, {"type": "text", "text": QUESTIONS[0]}])
    assert text_of(server.ask(QUESTIONS[0])) == expected["pruned"][0]


@needs_server
def test_without_trust_remote_code_nothing_is_pruned(
    repo: Path, expected: dict[str, list[str]], tmp_path: Path
) -> None:
    """Stock code reads the repo as a stock checkpoint, so the log is where to see that pruning is on."""
    with serving(repo, tmp_path / "log.txt") as server:
        assert [text_of(server.ask(question)) for question in QUESTIONS] == expected["dense"]
        assert not server.shortened()


@pytest.mark.core
def test_a_branch_behind_the_name_is_the_budget_that_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `transformers serve someone/tiny@v4` loads, asked of the part of it that loads models."""
    manager = pytest.importorskip("transformers.cli.serving.model_manager")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = build_repo(DEMO_CONFIG, tmp_path / "repo", show_progress=False)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for number, (branch, kept) in enumerate({"main": 18, "v4": 4}.items()):
        other = budget_config(config, {"visual_token_num": kept})
        (folder / "config.json").write_text(json.dumps(other), encoding="utf-8")
        in_cache(tmp_path / "cache", "someone/tiny", folder, commit=f"{number}" * 40, branch=branch)
    models = manager.ModelManager(device="cpu", trust_remote_code=True)
    budgets = {}
    for name in ("someone/tiny", "someone/tiny@v4"):
        model = models._load_model(models.process_model_name(name))
        budgets[name] = model.config.vispruner_config["visual_token_num"]
    assert budgets == {"someone/tiny": 18, "someone/tiny@v4": 4}
