"""Measure what pruning changes when vLLM serves: requests per second, time to first token, KV and encoder cache.

Two models, each served dense and with several budgets, all servers up at once and loaded in turn:
  trained   the embedded checkpoint, 144 visual tokens, asked the questions of drawn scenes; every answer is judged
  wide      random weights, 576 visual tokens as LLaVA-1.5 has, 512 wide, 8 layers; every answer is 16 tokens long

requests/s    of `--requests` chat requests over HTTP, `--concurrency` at a time, one new PNG each: nothing is cached
TTFT          seconds from sending a request until its first token arrives; median and 99th percentile of the requests
ratio         row / stock within one round, then the median: a round loads every server once, in random order
KV cache      the largest share in use, asked for 20 times a second, as tokens; blocks hold 32
encoder cache bytes that one image takes of it, and how many images it holds (vLLM gives it one batch's tokens)

Checked in every run: that each prompt of a pruned row is shorter than stock's by exactly the tokens dropped.

vLLM has to be installed (.ci/vllm-cpu says how). Leave the machine alone meanwhile: eleven minutes on four cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from latency import device_name
from openai_server import Answer, OpenAIServer, data_url
from outputs import output_file
from records import RESULTS, versions, write_record
from scenes import generate_scene
from tables_and_plots import markdown_table

from vispruner import conversion
from vispruner.conversion.build import build_repo
from vispruner.conversion.checkpoint_io import read_json
from vispruner.conversion.questions import is_right

EMBEDDED = Path(conversion.__file__).parent / "assets" / "tiny-llava"
BLOCK, BATCHED_TOKENS, ANSWER_TOKENS = 32, 4096, 16
COMMON = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--block-size", str(BLOCK)),
    *("--max-num-batched-tokens", str(BATCHED_TOKENS), "--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"),
)
TEXT = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
VISION = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4}


class BenchmarkError(ValueError):
    """A server did not do what its row promises."""


@dataclass(frozen=True)
class Model:
    """What is served in some rows: a folder, its visual tokens, the width of its prompt, and the budgets to try.

    side  of the pictures that are sent, in pixels; None sends them as they are drawn
    kind  what stands in the names of classes
    """

    name: str
    folder: Path
    visual_tokens: int
    width: int
    budgets: tuple[int, ...]
    arguments: tuple[str, ...] = ()
    trained: bool = True
    side: int | None = None
    kind: str = "Llava"


@dataclass
class Row:
    """One server; `rounds` is what was measured in each round."""

    model: Model
    visual_token_num: int | None
    server: OpenAIServer
    rounds: list[dict[str, float]] = field(default_factory=list)

    @property
    def kept(self) -> int:
        return self.model.visual_tokens if self.visual_token_num is None else self.visual_token_num


@dataclass(frozen=True)
class Request:
    """One chat request: a picture of its own, and a question about it with its true answer."""

    url: str
    question: str
    answer: str


def trained_model(work: Path) -> Model:
    """Build the embedded checkpoint's repo: its weights have the names that stock vLLM reads."""
    folder = build_repo("tiny-llava-vispruner", work / "trained", show_progress=False)
    return Model("trained", folder, 144, 128, (36, 18))


def wide_model(work: Path) -> Model:
    folder = write_llava(work / "wide", TEXT, VISION)
    return Model("wide", folder, 576, TEXT["hidden_size"], (128, 64), ("--load-format", "dummy"), trained=False)


def write_llava(folder: Path, text: dict[str, int], vision: dict[str, int]) -> Path:
    """Write the config and processor of a model of 576 visual tokens that vLLM fills with random weights."""
    shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"].update(text, num_key_value_heads=text["num_attention_heads"], head_dim=64)
    config["vision_config"].update(vision, image_size=336, patch_size=14)
    config["image_seq_length"] = 576
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    processor = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    processor["patch_size"] = 14
    processor["image_processor"].update(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    (folder / "processor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return folder


MODELS = {"trained": trained_model, "wide": wide_model}


def server_of(model: Model, budget: int | None, work: Path, cores: int, *arguments: str) -> OpenAIServer:
    """Return a server of a model, dense or with a budget, that is still to be started."""
    chosen = ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores]))
    stock = f"{model.kind}ForConditionalGeneration"
    config: dict[str, Any] = {"architectures": [stock]}
    if budget is not None:
        config = {"architectures": [f"VisPruner{stock}"], "vispruner_config": {"visual_token_num": budget}}
    arguments = (*COMMON, *model.arguments, *arguments, "--hf-overrides", json.dumps(config))
    log = work / f"{model.name}-{budget or 'stock'}.log"
    return OpenAIServer(model.folder, log, arguments, VLLM_CPU_OMP_THREADS_BIND=chosen)


@contextmanager
def served(model: Model, work: Path, cores: int) -> Iterator[list[Row]]:
    """Serve a model dense and with each of its budgets, all at once; an idle server takes no time of the cores."""
    with ExitStack() as stack:
        rows = []
        for budget in tqdm((None, *model.budgets), desc=f"starting {model.name}", unit="server"):
            rows.append(Row(model, budget, stack.enter_context(server_of(model, budget, work, cores))))
        yield rows


def make_requests(count: int, seed: int, side: int | None = None) -> list[Request]:
    """Return questions about as many pictures; those of one seed are the same, of another all new."""
    found = []
    for index in range(count):
        scene = generate_scene("test", 1000 + seed, index)
        question = scene.questions[index % len(scene.questions)]
        image = scene.image if side is None else scene.image.resize((side, side))
        found.append(Request(data_url(image), question.text, question.answer))
    return found


def load(row: Row, requests: Sequence[Request], concurrency: int) -> list[Answer]:
    """Send all requests to one server and note what it took."""
    options = {} if row.model.trained else {"max_tokens": ANSWER_TOKENS, "ignore_eos": True}
    kv = _KVUse(row.server)
    started = time.perf_counter()
    with kv, ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(lambda r: row.server.ask(r.question, [r.url], **options), requests))
    seconds = time.perf_counter() - started
    waits = sorted(answer.ttft for answer in answers)
    row.rounds.append(
        {
            "requests_per_second": len(requests) / seconds,
            "ttft_p50": statistics.median(waits),
            "ttft_p99": waits[math.ceil(0.99 * len(waits)) - 1],
            "kv_cache_peak": kv.peak,
        }
    )
    return answers


class _KVUse:
    """Asks a server 20 times a second which share of its KV cache is in use, while the `with` block runs."""

    def __init__(self, server: OpenAIServer) -> None:
        self._server, self._done, self.peak = server, threading.Event(), 0.0
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: Any) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.peak = max(self.peak, self._server.metrics()["kv_cache_usage_perc"])


def run_rounds(rows: list[Row], rounds: int, count: int, concurrency: int, seed: int) -> dict[int, float]:
    """Load every server once a round, in random order; return the share of right answers by kept tokens."""
    order, right = random.Random(seed), dict.fromkeys([row.kept for row in rows], 0)
    for row in rows:  # what a server allocates or compiles at its first requests is nobody's measurement
        load(row, make_requests(2 * concurrency, seed + rounds), concurrency)
        row.rounds.clear()
    for number in tqdm(range(rounds), desc=rows[0].model.name, unit="round"):
        requests = make_requests(count, seed + number)
        prompts: dict[int, list[int]] = {}
        for row in order.sample(rows, len(rows)):
            answers = load(row, requests, concurrency)
            prompts[row.kept] = [answer.prompt_tokens for answer in answers]
            right[row.kept] += sum(is_right(a.text, r.answer) for a, r in zip(answers, requests, strict=True))
        require_shorter_prompts(rows, prompts)
    return {kept: count_right / (rounds * count) for kept, count_right in right.items()}


def require_shorter_prompts(rows: list[Row], prompts: dict[int, list[int]]) -> None:
    """Raise BenchmarkError unless every prompt, by kept tokens, is shorter than stock's by those that were dropped."""
    full = rows[0].model.visual_tokens
    for kept, lengths in prompts.items():
        dropped = {stock - length for stock, length in zip(prompts[full], lengths, strict=True)}
        if dropped != {full - kept}:
            raise BenchmarkError(f"prompts of the row with {kept} tokens are shorter by {dropped}, not {full - kept}")


def describe(row: Row, stock: Row, accuracy: float) -> dict[str, Any]:
    """Return a row's medians, its ratios to stock within each round, and what an image takes of the caches."""
    medians = {name: statistics.median(found[name] for found in row.rounds) for name in row.rounds[0]}
    ratios = {
        name: statistics.median(
            ours[name] / theirs[name] for ours, theirs in zip(row.rounds, stock.rounds, strict=True)
        )
        for name in ("requests_per_second", "ttft_p50", "ttft_p99")
    }
    capacity = _kv_capacity(row.server)
    return {
        "model": row.model.name,
        "visual_token_num": row.visual_token_num,
        "visual_tokens": row.kept,
        **medians,
        "ratio_to_stock": ratios,
        "kv_cache_capacity_tokens": capacity,
        "kv_cache_peak_tokens": round(capacity * medians["kv_cache_peak"]),
        "encoder_cache_bytes_per_image": row.kept * row.model.width * 4,
        "encoder_cache_images": BATCHED_TOKENS // row.kept,
        "accuracy": accuracy if row.model.trained else None,
        "rounds": row.rounds,
    }


def _kv_capacity(server: OpenAIServer) -> int:
    (line,) = [line for line in server.log_text().splitlines() if "KV cache size: " in line]
    return int(line.split("KV cache size: ")[1].split(" tokens")[0].replace(",", ""))


def table(record: dict[str, Any]) -> str:
    """Return the record as a Markdown table."""
    columns = "model|visual tokens|requests/s|TTFT p50|TTFT p99|KV cache, peak|images in the encoder cache"
    lines = []
    for row in record["rows"]:
        ratio = row["ratio_to_stock"]
        cells = [
            f"{row['requests_per_second']:.0f} ({ratio['requests_per_second']:.2f}x)",
            *(f"{1000 * row[name]:.0f} ms ({ratio[name]:.2f}x)" for name in ("ttft_p50", "ttft_p99")),
            f"{row['kv_cache_peak_tokens']} tokens",
            str(row["encoder_cache_images"]),
        ]
        dense = ", dense" if row["visual_token_num"] is None else ""
        lines.append([row["model"], f"{row['visual_tokens']}{dense}", *cells])
    return markdown_table(columns, lines)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start the servers, load them, and return the record."""
    started, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            with served(MODELS[name](Path(folder)), Path(folder), arguments.cores) as servers:
                share = run_rounds(
                    servers, arguments.rounds, arguments.requests, arguments.concurrency, arguments.seed
                )
                rows += [describe(row, servers[0], share[row.kept]) for row in servers]
    return {
        "benchmark": "serving",
        **run_fields(arguments, started),
        "requests": arguments.requests,
        "concurrency": arguments.concurrency,
        "rows": rows,
    }


def run_fields(arguments: argparse.Namespace, started: float) -> dict[str, Any]:
    """Return what a record says of a run that started then: machine, options and versions."""
    import vllm  # its package has another name on the CPU

    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device_name": device_name(torch.device("cpu")),
        "cores": arguments.cores,
        "note": arguments.note,
        "rounds": arguments.rounds,
        "seed": arguments.seed,
        "arguments": list(COMMON),
        "versions": versions() | {"vllm": vllm.__version__},
        "minutes": round((time.monotonic() - started) / 60, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: both")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="of a row and round (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=16, metavar="N", help="requests at a time (%(default)s)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--cores", type=int, default=cores, metavar="N", help="of every engine (all %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of pictures and order (%(default)s)")
    parser.add_argument("--note", help="put into the record, e.g. that other jobs were running")
    default = str(RESULTS / "serving-vllm-cpu.json")
    parser.add_argument("--out", type=output_file(".json"), default=default, help="default: %(default)s")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the table of a record, and measure nothing")
    arguments = parser.parse_args(argv)
    if arguments.table is not None:
        print(table(read_json(arguments.table)))
        return 0
    record = measure(arguments)
    write_record(arguments.out, record)
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
