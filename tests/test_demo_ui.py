"""The demo in the browser: what the page asks of a model, the same through Gradio's HTTP, and by hand in Chromium."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from browser import open_page
from PIL import Image
from rows import draw_weights, rows
from tiny_processors import NEED_EXTRA, WRITERS, write_processor

from vispruner.configuration_vispruner import merge_vispruner_config
from vispruner.conversion import demo_app
from vispruner.conversion.build import build_repo
from vispruner.conversion.cli import main
from vispruner.conversion.demo_app import Session, figures, serve
from vispruner.conversion.picture import BLUE, ORANGE, open_photo
from vispruner.conversion.questions import SCENE, ask, model_inputs
from vispruner.conversion.repo_config import DEMO_CONFIG, load_repo_config

QUESTION = "What color is the square?"
ROWS = {row.model_type: row for row in rows()}
DRAWN = "querySelector('#drawn img')"
SHOWN = "e => e && e.complete && e.src"


@pytest.fixture(scope="module")
def toy() -> Session:
    return Session(None)


@pytest.mark.core
def test_the_page_starts_with_the_budget_of_the_model(toy: Session, tiny_llava_repo: Path) -> None:
    assert toy.percent() == 12.5  # 18 of 144
    assert Session(str(tiny_llava_repo)).percent() == 25.0  # a stock checkpoint stores none
    assert Session(str(tiny_llava_repo), visual_token_num=16).percent() == 25.0  # of 64
    assert Session(str(tiny_llava_repo), visual_token_num=5).percent() == 7.8


def test_both_answers_are_those_of_the_model_and_figures_are_read_off_the_calls(toy: Session) -> None:
    stock, pruned = toy.answer(str(SCENE), QUESTION, 12.5, "vispruner")
    with Image.open(SCENE) as scene:
        picture = scene.convert("RGB")
    assert pruned.answer == ask(toy.model, toy.processor, picture, QUESTION) == "orange"
    assert (stock.visual_tokens, pruned.visual_tokens) == ("144", "18")
    assert stock.kv_tokens - pruned.kv_tokens == 144 - 18
    text = toy.model.config.get_text_config()
    size = 2 * text.num_hidden_layers * text.num_key_value_heads * text.hidden_size // text.num_attention_heads * 4
    assert (stock.kv_bytes, pruned.kv_bytes) == (157 * size, 31 * size)
    assert min(stock.first_token, stock.whole, pruned.first_token, pruned.whole) > 0


def test_the_table_of_figures() -> None:
    runs = [demo_app.Run("", "144", 157.0, 2**20, 0.2, 0.4), demo_app.Run("", "18", 31.0, 2**18, 0.1, 0.3)]
    assert figures(*runs).splitlines()[2:7] == [
        "| visual tokens | 144 | 18 |  |",
        "| KV cache of the prompt, tokens a layer | 157 | 31 | 0.20 |",
        "| KV cache of the prompt, KiB | 1,024 | 256 | 0.25 |",
        "| first token, ms | 200 | 100 | 0.50 |",
        "| whole answer, ms | 400 | 300 | 0.75 |",
    ]


def test_tokens_that_leave_in_the_language_model_are_told_by_layer(toy: Session) -> None:
    stock, pruned = toy.answer(str(SCENE), QUESTION, 50, "fastv")
    assert re.fullmatch(r"144, \d+ from layer \d+ on", pruned.visual_tokens)
    assert stock.kv_tokens - pruned.kv_tokens == pytest.approx(72, abs=1)  # half of them, on average over layers


@pytest.mark.core
def test_every_method_on_offer_draws_and_none_changes_the_model(toy: Session) -> None:
    offered = toy.methods()
    assert offered[0] == "vispruner" and {"divprune", "fastv", "cdpruner", "random"} <= set(offered)
    assert not {"codebook", "sgl", "none"} & set(offered)  # a file, another model's attention, the stock model
    before = dict(toy.model.config.vispruner_config)
    plain = toy.draw(str(SCENE), QUESTION, 100, "vispruner")
    for method in offered:
        drawn = toy.draw(str(SCENE), QUESTION, 50, method)
        assert drawn is not None and plain is not None and not np.array_equal(np.asarray(drawn), np.asarray(plain))
    assert toy.model.config.vispruner_config == before


def test_what_cannot_be_asked_is_said(toy: Session) -> None:
    assert toy.draw(None, QUESTION, 50, "vispruner") is None
    with pytest.raises(ValueError, match="there is no picture: upload one"):
        toy.answer(None, QUESTION, 50, "vispruner")
    with pytest.raises(ValueError, match="there is no question"):
        toy.answer(str(SCENE), " ", 50, "vispruner")
    with pytest.raises(ValueError, match="raise visual_token_num or keep_ratio"):
        toy.draw(str(SCENE), QUESTION, 1, "fastv")


@pytest.mark.parametrize("name", [name for name in ROWS if name in WRITERS and name not in NEED_EXTRA])
def test_other_architectures_in_a_folder(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    stock = row.stock_class(row.config()).eval()
    draw_weights(stock)
    stock.save_pretrained(tmp_path)
    write_processor(row, tmp_path)
    session = Session(str(tmp_path))
    method = session.methods()[0]
    assert session.percent() == 25.0
    assert session.draw(str(SCENE), "what", 50, method) is not None
    dense, pruned = session.answer(str(SCENE), "what", 50, method)
    dropped = int(dense.visual_tokens) - int(pruned.visual_tokens)
    assert 0 < dropped == dense.kv_tokens - pruned.kv_tokens
    counted = Session(str(tmp_path), visual_token_num=2)
    _, few = counted.answer(str(SCENE), "what", counted.percent(), method)
    inputs = model_inputs(counted.model, counted.processor, open_photo(SCENE), "what")
    counted.model.generate(**inputs, max_new_tokens=1)
    assert int(few.visual_tokens) == sum(counted.model.last_pruning.kept_counts)


@pytest.mark.parametrize(
    ("options", "first", "percent"),
    [
        ({"method": "none"}, "vispruner", 12.5),  # the budget stays, and rests
        ({"method": "divprune", "keep_ratio": 0.1}, "divprune", 10.0),
        ({"method": "vispruner+fastv", "stage_token_nums": [72, 18]}, "vispruner", 25.0),
        ({"method": "fastv", "visual_token_num": 72}, "fastv", 50.0),
    ],
)
def test_a_repo_with_another_method_can_be_shown(
    options: dict[str, Any], first: str, percent: float, tmp_path: Path
) -> None:
    config = load_repo_config(DEMO_CONFIG)
    whole = merge_vispruner_config(config.vispruner_config, options)
    build_repo(replace(config, vispruner_config=whole, budgets={}, card={}), tmp_path / "repo", show_progress=False)
    session = Session(str(tmp_path / "repo"))
    assert (session.methods()[0], session.percent()) == (first, percent)
    assert session.draw(str(SCENE), QUESTION, max(percent, 50), first) is not None


def test_without_gradio_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "--ui"]) == 2
    assert 'pip install "vispruner[ui]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ui", "--base", "x"], "--base is not for --ui"),
        (["--ui", "--out", "x"], "--out is not for --ui"),
        (["--port", "7860"], "--port is of the page"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_on_zerogpu_both_calls_ask_for_a_gpu(monkeypatch: pytest.MonkeyPatch, toy: Session) -> None:
    class Spaces:
        asked: list[str] = []

        @classmethod
        def GPU(cls, function: Any) -> Any:
            cls.asked.append(function.__name__)
            return lambda *arguments: ("on a GPU", function(*arguments))

    monkeypatch.setitem(sys.modules, "spaces", Spaces)
    where, drawn = demo_app._on_gpu(toy.draw)(None, QUESTION, 50, "vispruner")
    assert (where, drawn, Spaces.asked) == ("on a GPU", None, ["draw"])


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    gradio = pytest.importorskip("gradio")
    _, local, _ = serve(block=False)
    threads = torch.get_num_threads()
    yield local
    assert torch.get_num_threads() == threads
    gradio.close_all()


@pytest.mark.ui
def test_the_page_answers_over_http(url: str, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    client = Client(url, verbose=False)
    given = [handle_file(str(SCENE)), QUESTION, 12.5, "vispruner"]
    stock, pruned, table = client.predict(*given, api_name="/answer")
    assert (stock, pruned) == ("orange", "orange") and "| visual tokens | 144 | 18 |" in table
    drawn, *cleared = client.predict(*given, api_name="/draw")
    with Image.open(drawn) as picture:
        assert picture.width > 600
    assert cleared == ["", "", ""]


@pytest.mark.ui
def test_no_picture_of_the_machine_is_shown_that_nobody_uploaded(url: str, tmp_path: Path) -> None:
    """Gradio looks at paths that carry its mark alone."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "secret.png")
    body = json.dumps({"data": [{"path": str(tmp_path / "secret.png")}, QUESTION, 50, "vispruner"]}).encode()
    headers = {"Content-Type": "application/json"}
    with urlopen(Request(f"{url}gradio_api/call/draw", body, headers)) as response:
        event = json.load(response)["event_id"]
    with urlopen(f"{url}gradio_api/call/draw/{event}") as response:
        said = response.read().decode()
    assert "event: error" in said and "uploaded" in said and "drawn" not in said


@pytest.mark.ui
@pytest.mark.browser
def test_by_hand_in_chromium(url: str, tmp_path: Path, photo: Image.Image) -> None:
    """Open, answer, slide, choose a method, upload a photo and a broken file, take an example."""
    shot = os.environ.get("DEMO_SCREENSHOT", tmp_path / "demo.png")  # docs/demo.png was taken so
    photo.save(tmp_path / "cat.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG and no more")
    with open_page(url) as (page, asked):
        drawn = page.locator("#drawn img")

        def next_picture(after: str | None) -> str | None:
            page.wait_for_function(f"b => {{ const s = ({SHOWN})(document.{DRAWN}); return s && s != b }}", arg=after)
            return drawn.get_attribute("src")

        first = next_picture(None)
        page.get_by_role("button", name="Answer, stock and pruned").click()
        page.wait_for_function("document.querySelector('#pruned textarea').value != ''")
        assert page.locator("#stock textarea").input_value() == "orange"
        assert page.locator("#pruned textarea").input_value() == "orange"
        assert re.search(r"visual tokens\s+144\s+18", page.locator("#figures").inner_text())
        page.screenshot(path=shot)

        slider = page.locator("input[type=range]")
        slider.fill("50")
        second = next_picture(first)
        page.wait_for_function("document.querySelector('#pruned textarea').value == ''")  # of another budget
        page.get_by_label("Method, of those that this model can take").click()
        page.get_by_role("option", name="divprune").click()
        third = next_picture(second)

        page.set_input_files("input[type=file]", tmp_path / "cat.png")
        fourth = next_picture(third)
        page.set_input_files("input[type=file]", tmp_path / "broken.png")
        page.get_by_text("broken.png is not a readable image").first.wait_for()
        drawn.wait_for(state="detached")
        assert str(tmp_path) not in page.inner_text("body")

        page.get_by_text("What color is the triangle?").click()  # it lives on
        next_picture(fourth)
        page.get_by_role("button", name="Answer, stock and pruned").click()
        page.wait_for_function("document.querySelector('#pruned textarea').value == 'orange'")
    assert {re.match(r"(?:data|blob):|https?://[^/]+/", address)[0] for address in asked} <= {url, "data:", "blob:"}
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    for colour in (ORANGE, BLUE):
        assert (np.abs(pixels - colour).max(axis=-1) < 12).sum() > 500, f"no frames of colour {colour} were shown"
