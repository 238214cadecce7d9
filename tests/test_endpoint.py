"""`handler: true`: the repo answers an Inference Endpoint, which calls it as Hugging Face's inference toolkit does."""

from __future__ import annotations

import base64
import functools
import http.server
import importlib.util
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from vispruner import ARCHITECTURES
from vispruner.conversion.build import build_repo
from vispruner.conversion.endpoint_files import SOURCE, endpoint_files, strange_requirements
from vispruner.conversion.questions import SCENE
from vispruner.conversion.repo_config import RepoConfigError, find_repo_config, load_repo_config
from vispruner.conversion.upload_plan import built_files
from vispruner.conversion.verify import verify_repo

QUESTION = "What is in the picture?"


def write_yaml(folder: Path, handler: Any = True) -> Path:
    content = yaml.safe_load(find_repo_config("tiny-llava-vispruner").read_text(encoding="utf-8"))
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**content, "handler": handler}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("endpoint")
    return build_repo(write_yaml(folder), folder / "repo", show_progress=False)


@pytest.fixture(scope="module")
def handler(repo: Path) -> Any:
    """Load handler.py by its path, with its folder on `sys.path`, and call its class with that: the toolkit's way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repo))
        spec = importlib.util.spec_from_file_location("handler", repo / "handler.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "handler", module)
        spec.loader.exec_module(module)
        return module.EndpointHandler(str(repo))


@pytest.fixture(scope="module")
def encoded() -> str:
    return base64.b64encode(SCENE.read_bytes()).decode()


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "scene.png").write_bytes(SCENE.read_bytes())
    serve = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/scene.png"
        server.shutdown()


def stock_answer(handler: Any, **config: Any) -> str:
    """What the same model says without the handler."""
    processor, model = handler.pipeline.processor, handler.pipeline.model
    content = [{"type": "image", "image": Image.open(SCENE)}, {"type": "text", "text": QUESTION}]
    chat = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False, **config)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def request(image: str | None, **parameters: Any) -> dict[str, Any]:
    inputs = {"text": QUESTION} if image is None else {"image": image, "text": QUESTION}
    return {"inputs": inputs, "parameters": {"max_new_tokens": 4, **parameters}}


@pytest.mark.core
def test_the_repo_carries_the_two_files_and_is_verified_and_published_with_them(repo: Path) -> None:
    assert (repo / "handler.py").read_bytes() == SOURCE.read_bytes()
    assert verify_repo(repo).passed
    config = load_repo_config(write_yaml(repo.parent))
    assert {"handler.py", "requirements.txt"} <= {file.path for file in built_files(repo, config)}
    assert '{"inputs": {"image":' in (repo / "README.md").read_text(encoding="utf-8")


def test_without_the_field_there_are_none(tmp_path: Path) -> None:
    built = build_repo(write_yaml(tmp_path, handler=False), tmp_path / "repo", show_progress=False)
    assert not {"handler.py", "requirements.txt"} & {path.name for path in built.iterdir()}
    assert "handler.py" not in (built / "README.md").read_text(encoding="utf-8")


def test_the_field_is_true_or_false(tmp_path: Path) -> None:
    with pytest.raises(RepoConfigError, match="handler must be true or false"):
        load_repo_config(write_yaml(tmp_path, handler="yes"))


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "content", "check"),
    [
        ("handler.py", b"import os\n", "code files"),
        ("requirements.txt", b"transformers>=5.17,<6\nevil\n", "requirements.txt"),
        ("requirements.txt", b"--index-url=somewhere\n", "requirements.txt"),
        ("requirements.txt", b"\xff", "requirements.txt"),
    ],
)
def test_what_no_build_wrote_is_refused(repo: Path, tmp_path: Path, name: str, content: bytes, check: str) -> None:
    for path in repo.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(content)
    failed = {found.name for found in verify_repo(tmp_path).checks if found.status == "fail"}
    assert check in failed


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_what_an_endpoint_installs_is_what_verify_allows(architecture: str) -> None:
    text = endpoint_files(architecture)["requirements.txt"].decode()
    assert text.startswith("transformers>=5.17,<6\n") and not strange_requirements(text)
    assert ("torchvision" in text) == (architecture not in ("llava", "llava_next", "gemma3", "idefics3", "paligemma"))


@pytest.mark.core
def test_it_answers_as_the_model_does_and_says_what_was_kept(handler: Any, encoded: str, url: str) -> None:
    assert type(handler.pipeline.model).__module__.startswith("transformers_modules.")
    expected = [{"generated_text": stock_answer(handler), "visual_tokens": 144, "visual_tokens_kept": 18}]
    for image in (encoded, f"data:image/png;base64,{encoded}", url):
        assert handler(request(image)) == expected


def test_a_request_may_have_a_budget_of_its_own(handler: Any, encoded: str) -> None:
    for parameters, kept in (({"visual_token_num": 36}, 36), ({"keep_ratio": 0.5}, 72), ({}, 18)):
        (answer,) = handler(request(encoded, **parameters))
        assert answer["visual_tokens_kept"] == kept
        config = {"vispruner_config": parameters} if parameters else {}
        assert answer["generated_text"] == stock_answer(handler, **config)


def test_a_request_runs_no_code_of_its_own(handler: Any, encoded: str, tmp_path: Path) -> None:
    """`generate` would load and run what `custom_generate` names."""
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "custom_generate" / "generate.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\ndef generate(model, **_): return _['input_ids']\n"
    )
    with pytest.raises(ValueError, match="custom_generate"):
        handler(request(encoded, custom_generate=str(tmp_path), trust_remote_code=True))
    assert not (tmp_path / "ran").exists()


def test_what_the_last_layers_see_of_a_method_in_the_language_model(handler: Any, encoded: str) -> None:
    model = handler.pipeline.model
    stored = model.config.vispruner_config
    try:
        model.set_vispruner_config(method="fastv", visual_token_num=72, prune_layers=[1])
        (answer,) = handler(request(encoded))
        assert (answer["visual_tokens"], answer["visual_tokens_kept"]) == (144, 48)
    finally:
        model.config.vispruner_config = stored


def test_a_chat_in_either_spelling_is_the_same(handler: Any, encoded: str) -> None:
    expected = handler(request(encoded))
    text = {"type": "text", "text": QUESTION}
    for image in (
        {"type": "image", "image": encoded},
        {"type": "image", "base64": encoded},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
        {"type": "image_url", "image_url": encoded},
    ):
        body = {"inputs": [{"role": "user", "content": [image, text]}], "parameters": {"max_new_tokens": 4}}
        assert handler(body) == expected


def test_without_a_picture_there_are_no_visual_tokens(handler: Any, encoded: str) -> None:
    handler(request(encoded))
    assert handler(request(None))[0]["visual_tokens"] == 0
    chat = {"inputs": [{"role": "user", "content": QUESTION}], "parameters": {"max_new_tokens": 4}}
    assert handler(chat) == handler(request(None))


def test_parameters_may_be_left_out(handler: Any) -> None:
    assert handler({"inputs": {"text": QUESTION}}) == handler({"inputs": {"text": QUESTION}, "parameters": None})


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, "inputs must be an object or a list of messages"),
        ({"inputs": []}, "inputs must be an object or a list of messages"),
        ({"inputs": "a text"}, "inputs must be an object or a list of messages"),
        ({"inputs": {"image": "x"}}, "inputs must hold text"),
        ({"inputs": {"text": "a", "picture": "x"}}, "inputs must hold text"),
        ({"inputs": [{"content": "x"}]}, "a message must be"),
        ({"inputs": [{"role": "user"}]}, "the content of a message"),
        ({"inputs": [{"role": "user", "content": ["x"]}]}, "a part of a message"),
        ({"inputs": [{"role": "user", "content": [{"type": "video"}]}]}, "a part of a message"),
        ({"inputs": {"text": "a"}, "parameters": [1]}, "parameters must be an object"),
        ({"inputs": {"text": "a"}, "parameters": {"visual_token_num": 0}}, "visual_token_num"),
        ({"inputs": {"text": "a"}, "parameters": {"visual_token_num": 3, "keep_ratio": 0.5}}, "keep_ratio"),
        ({"inputs": {"text": "a"}, "parameters": {"no_such_thing": 3}}, "no_such_thing"),
        (
            {"inputs": {"text": "a"}, "parameters": {"custom_generate": "x", "trust_remote_code": True}},
            "may hold max_new",
        ),
        ({"inputs": {"text": "a"}, "parameters": {"trust_remote_code": True}}, "may hold max_new_tokens"),
        ({"inputs": {"text": "a"}, "parameters": {"vispruner_config": {"method": "none"}}}, "may hold max_new_tokens"),
        ({"inputs": {"text": "a"}, "parameters": {"num_return_sequences": 2}}, "may hold max_new_tokens"),
        ({"inputs": {"text": "a"}, "parameters": {"max_new_tokens": 10**9}}, "max_new_tokens must be at most 4096"),
        ({"inputs": {"text": "a"}, "parameters": {"num_beams": 9}}, "num_beams must be at most 8"),
        ({"inputs": {"text": "a"}, "parameters": {"top_k": "all"}}, "top_k must be a number"),
    ],
)
def test_a_wrong_body_is_refused_by_name(handler: Any, body: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        handler(body)


@pytest.mark.parametrize(
    "image", [str(SCENE), "scene.png", "file:///etc/passwd", "", None, 3, {"a": 1}, "data:text/plain;base64,eA=="]
)
def test_a_path_of_the_server_is_never_opened(handler: Any, image: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SCENE.parent)
    with pytest.raises(ValueError, match="an image must be a URL"):
        handler({"inputs": {"image": image, "text": QUESTION}})


def test_a_name_that_is_base64_too_is_not_taken_for_a_path(
    handler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.open(SCENE).save(tmp_path / "c2Nl", format="PNG")
    with pytest.raises(ValueError, match="image"):
        handler(request("c2Nl"))


def test_what_is_no_picture_is_refused(handler: Any) -> None:
    with pytest.raises(ValueError, match="image"):
        handler(request(base64.b64encode(b"no picture").decode()))


def test_a_stock_model_is_refused(handler: Any, monkeypatch: pytest.MonkeyPatch, repo: Path) -> None:
    stock = types.SimpleNamespace(model=object())
    monkeypatch.setitem(type(handler).__init__.__globals__, "pipeline", lambda *_, **__: stock)
    with pytest.raises(RuntimeError, match="prunes nothing"):
        type(handler)(str(repo))
