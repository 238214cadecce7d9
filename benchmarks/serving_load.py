"""Measure when pruning pays in vLLM: one to 32 requests at a time, at three budgets and unpruned.

Two models with random weights, small enough for two CPU cores. The share of the encoder in the work for the first
token is near that of the model they stand for, since pruning behind the encoder cannot touch it:
  llava  576 visual tokens of 336 x 336 pixels as LLaVA-1.5; CLIP's encoder is small beside the language model
  qwen   256 visual tokens of 448 x 448 pixels as Qwen2.5-VL: windows, M-RoPE, a large encoder

at a time     requests that are under way: each client sends its next one when it has its answer
requests/s    of chat requests over HTTP, one new PNG each, 16 tokens answered; nothing is cached
ratio         row / stock within one round, then the median, with the lowest and the highest round
TTFT          seconds from sending a request until its first token; percentiles of all rounds' requests together
inter-token   seconds from one token of an answer to the next, likewise

Two servers of a model are up at once, stock and pruned; the latter's requests name their budgets. Every round loads
each row at every level, in random order within a level.
Checked in every run: that each prompt of a pruned row is shorter than stock's by exactly the tokens dropped.

An engine has one core; clients and front ends have the others, too. vLLM has to be installed (.ci/vllm-cpu says how):
  python benchmarks/serving_load.py                                            # a quarter of an hour on two cores
  python benchmarks/serving_load.py --show benchmarks/results/serving-load-vllm-cpu.json     # its tables and plot anew
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLConfig

sys.path.insert(0, str(Path(__file__).parent))
from latency import spread
from openai_server import Answer
from outputs import output_file
from records import RESULTS, write_record
from tables_and_plots import BLACK, BLUE, ORANGE, RED, markdown_table, new_figure, save_figure

from serving import (
    EMBEDDED,
    Model,
    Request,
    Row,
    make_requests,
    require_shorter_prompts,
    run_fields,
    server_of,
    write_llava,
)
from vispruner import architecture_of
from vispruner.conversion.ceilings import TEXT_TOKENS, encoder_flops
from vispruner.conversion.checkpoint_io import read_json
from vispruner.conversion.prefill_cost import language_model_flops, logits_flops

REQUESTS = {1: 4, 2: 6, 4: 8, 8: 16, 16: 24, 32: 32}  # of a row and round, by how many are under way
BLOCKS = ("--num-gpu-blocks-override", "768")  # of 32 tokens: every dense prompt of the highest level fits
DUMMY = ("--load-format", "dummy")

LLAVA_TEXT = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
LLAVA_VISION = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2}
QWEN_TEXT = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
}
QWEN_VISION = {
    "depth": 5,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_heads": 2,
    "out_hidden_size": QWEN_TEXT["hidden_size"],
    "window_size": 112,
    "fullatt_block_indexes": [4],
}
QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: {% for part in message['content'] %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def llava(work: Path) -> Model:
    folder = write_llava(work / "llava", LLAVA_TEXT, LLAVA_VISION)
    width = LLAVA_TEXT["hidden_size"]
    return Model("llava", folder, 576, width, (288, 144, 36), DUMMY, trained=False, side=336)


def qwen(work: Path) -> Model:
    """Write config and processor of a small Qwen2.5-VL, with the words of the embedded checkpoint."""
    folder, side = work / "qwen", 448
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN_TOKENS)})
    tokenizer.save_pretrained(folder)
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(QWEN_TOKENS))
    text = {**QWEN_TEXT, "vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2}
    Qwen2_5_VLConfig(
        vision_config=QWEN_VISION,
        text_config=text,
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    ).save_pretrained(folder)
    sizes = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    sizes |= {"size": {"shortest_edge": side**2, "longest_edge": side**2}}
    for name, content in {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor", **sizes},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen2VLVideoProcessor", **sizes},
        "processor_config.json": {"processor_class": "Qwen2_5_VLProcessor"},
    }.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE, encoding="utf-8")
    arguments = (*DUMMY, "--limit-mm-per-prompt", json.dumps({"image": 1, "video": 0}))
    width = QWEN_TEXT["hidden_size"]
    return Model("qwen", folder, 256, width, (128, 64, 16), arguments, trained=False, side=side, kind="Qwen2_5_VL")


MODELS = {"llava": llava, "qwen": qwen}


def encoder_share(model: Model) -> float:
    """Return the share of encoder and projector in the unpruned work for the first token, as ceilings.py counts."""
    config = AutoConfig.from_pretrained(model.folder)
    architecture = architecture_of(config.model_type)
    content = {**config.to_dict(), "vispruner_config": {"method": "none"}}
    with torch.device("meta"):
        base = architecture.base_class(architecture.config_class.from_dict(content))
        inputs: dict[str, Any] = {"pixel_values": torch.empty(1, 3, model.side, model.side)}
    if base.packs_images:
        rows, width = model.side // config.vision_config.patch_size, 3 * 2 * config.vision_config.patch_size**2
        inputs = {"pixel_values": torch.empty(rows**2, width, device="meta")}
        inputs["image_grid_thw"] = torch.tensor([[1, rows, rows]])
    encoder = sum(encoder_flops(base, inputs))
    return encoder / (encoder + language_model_flops(config, TEXT_TOKENS + model.visual_tokens) + logits_flops(config))


@dataclass
class Point:
    """What was seen of one server with so many requests at a time: `rates` are requests/s, of each round."""

    rates: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def figures(self, stock: Point) -> dict[str, Any]:
        """Return what the record says of it."""
        ratios = [ours / theirs for ours, theirs in zip(self.rates, stock.rates, strict=True)]
        return {
            "requests": len(self.waits),
            "requests_per_second": spread(self.rates),
            "ratio_to_stock": spread(ratios),
            "ttft_p50": statistics.median(self.waits),
            "ttft_p99": percentile_99(self.waits),
            "inter_token_p50": statistics.median(self.gaps),
            "inter_token_p99": percentile_99(self.gaps),
        }


def percentile_99(values: Sequence[float]) -> float:
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


@contextmanager
def served(model: Model, work: Path, cores: int) -> Iterator[list[Row]]:
    """Serve a model dense and pruned; rows of the latter ask for their budgets by request."""
    most = max(model.budgets)
    with (
        server_of(model, None, work, cores, *BLOCKS) as stock,
        server_of(model, most, work, cores, *BLOCKS, "--trust-request-mm-kwargs") as pruned,
    ):
        yield [Row(model, None, stock), *(Row(model, budget, pruned) for budget in model.budgets)]


def load(row: Row, requests: Sequence[Request], at_a_time: int, point: Point) -> list[int]:
    """Send requests to one server, note what it took, and return the lengths of the prompts."""
    budget = None if row.visual_token_num is None else {"visual_token_num": row.visual_token_num}
    options = {"max_tokens": 16, "ignore_eos": True, "mm_processor_kwargs": budget}
    started = time.perf_counter()
    with ThreadPoolExecutor(at_a_time) as pool:
        answers: list[Answer] = list(pool.map(lambda r: row.server.ask(r.question, [r.url], **options), requests))
    point.rates.append(len(requests) / (time.perf_counter() - started))
    point.waits += [answer.ttft for answer in answers]
    point.gaps += [gap for answer in answers for gap in answer.gaps]
    return [answer.prompt_tokens for answer in answers]


def run_rounds(rows: list[Row], arguments: argparse.Namespace) -> dict[tuple[int, int], Point]:
    """Load every server at every level once a round; return what was seen, by kept tokens and level."""
    points: dict[tuple[int, int], Point] = defaultdict(Point)
    order, model, seed = random.Random(arguments.seed), rows[0].model, arguments.seed
    for row in rows[:2]:  # what a server allocates at its first requests is nobody's measurement
        load(row, make_requests(max(arguments.levels), seed, model.side), max(arguments.levels), Point())
    for _ in tqdm(range(arguments.rounds), desc=model.name, unit="round"):
        for level in arguments.levels:
            seed += 1
            requests = make_requests(REQUESTS[level], seed, model.side)
            prompts = {
                row.kept: load(row, requests, level, points[row.kept, level]) for row in order.sample(rows, len(rows))
            }
            require_shorter_prompts(rows, prompts)
    return points


def describe(rows: list[Row], points: dict[tuple[int, int], Point], levels: Sequence[int]) -> dict[str, Any]:
    """Return what the record says of a model."""
    model, stock = rows[0].model, rows[0].kept
    return {
        "visual_tokens": model.visual_tokens,
        "side": model.side,
        "encoder_share": encoder_share(model),
        "rows": [
            {
                "visual_tokens": row.kept,
                "dense": row.visual_token_num is None,
                "levels": {str(level): points[row.kept, level].figures(points[stock, level]) for level in levels},
            }
            for row in rows
        ],
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start the servers of each model, load them, and return the record."""
    started, models = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            with served(MODELS[name](Path(folder)), Path(folder), arguments.cores) as rows:
                models[name] = describe(rows, run_rounds(rows, arguments), arguments.levels)
    return {
        "benchmark": "serving load",
        **run_fields(arguments, started),
        "levels": arguments.levels,
        "text": {"llava": LLAVA_TEXT, "qwen": QWEN_TEXT},
        "vision": {"llava": LLAVA_VISION, "qwen": QWEN_VISION},
        "models": models,
    }


# What is shown of a record


def tables(record: dict[str, Any]) -> list[str]:
    """Return the record as Markdown: requests/s, time to first token, and from token to token."""
    of_requests = _table(record, lambda row, own: _rate(own, row["dense"]))
    of_first = _table(record, lambda row, own: f"{1000 * own['ttft_p50']:.0f} / {1000 * own['ttft_p99']:.0f}")
    of_later = _table(record, lambda row, own: f"{1000 * own['inter_token_p99']:.0f}")
    return [of_requests, of_first, of_later]


def _rate(own: dict[str, Any], is_dense: bool) -> str:
    rate, ratio = own["requests_per_second"]["median"], own["ratio_to_stock"]
    within = "" if is_dense else f" ({ratio['median']:.2f}x, {ratio['low']:.2f} to {ratio['high']:.2f})"
    return f"{rate:.1f}{within}"


def _table(record: dict[str, Any], cell: Callable[[dict[str, Any], dict[str, Any]], str]) -> str:
    lines = []
    for name, model in record["models"].items():
        for row in model["rows"]:
            dense = ", dense" if row["dense"] else ""
            cells = [cell(row, row["levels"][str(level)]) for level in record["levels"]]
            lines.append([name, f"{row['visual_tokens']}{dense}", *cells])
    return markdown_table(["model", "visual tokens", *(f"{level} at a time" for level in record["levels"])], lines)


def verdict(record: dict[str, Any]) -> str:
    """Say where pruning pays: where every round was faster than stock, and where it was not."""
    lines = []
    for name, model in record["models"].items():
        for row in model["rows"]:
            if not row["dense"]:
                ratios = {level: row["levels"][str(level)]["ratio_to_stock"] for level in record["levels"]}
                sure = [str(level) for level, ratio in ratios.items() if ratio["low"] > 1]
                best = max(ratio["median"] for ratio in ratios.values())
                where = f"faster in every round at {', '.join(sure)}" if sure else "at no level faster in every round"
                lines.append(
                    f"- {name}, {row['visual_tokens']} of {model['visual_tokens']}: {where}; {best:.2f}x at best."
                )
    return "\n".join(lines)


COLOURS = (BLACK, BLUE, ORANGE, RED)


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw requests/s, time to first token and from token to token against the requests at a time."""
    levels, models = record["levels"], record["models"]
    figure = new_figure(figsize=(14, 4 * len(models)), layout="tight")
    axes = figure.subplots(len(models), 3, squeeze=False)
    for of_model, (name, model) in zip(axes, models.items(), strict=True):
        for row, colour in zip(model["rows"], COLOURS, strict=True):
            points = [row["levels"][str(level)] for level in levels]
            label = f"{row['visual_tokens']} tokens{', dense' if row['dense'] else ''}"
            rates = [point["requests_per_second"] for point in points]
            of_model[0].plot(levels, [rate["median"] for rate in rates], color=colour, marker="o", label=label)
            ends = ([rate[end] for rate in rates] for end in ("low", "high"))
            of_model[0].fill_between(levels, *ends, color=colour, alpha=0.12)
            for name_of, axis, style in (
                ("ttft_p50", of_model[1], "-"),
                ("ttft_p99", of_model[1], "--"),
                ("inter_token_p99", of_model[2], "--"),
            ):
                milliseconds = [1000 * point[name_of] for point in points]
                axis.plot(levels, milliseconds, style, color=colour, marker="o", markersize=4)
                axis.set_yscale("log")
        labels = ("requests/s", "ms to the first token: p50, dashed p99", "ms from token to token, p99")
        for axis, label in zip(of_model, labels, strict=True):
            axis.set(xscale="log", xlabel="requests at a time", ylabel=label, title=name)
            axis.set_xticks(levels, [str(level) for level in levels])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        of_model[0].legend(fontsize=8)
    figure.suptitle(
        f"vLLM {record['versions']['vllm']}, {record['device_name']}, {record['cores']} for an engine", fontsize=10
    )
    save_figure(figure, path, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: both")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--levels", type=int, nargs="+", choices=REQUESTS, default=list(REQUESTS), help="at a time")
    parser.add_argument("--cores", type=int, default=1, metavar="N", help="of every engine (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of pictures and order (%(default)s)")
    parser.add_argument("--note", help="put into the record, e.g. that other jobs were running")
    default = str(RESULTS / "serving-load-vllm-cpu.json")
    parser.add_argument("--out", type=output_file(".json"), default=default, help="and .png (%(default)s)")
    parser.add_argument("--show", type=Path, metavar="JSON", help="print and draw a record anew, and measure nothing")
    arguments = parser.parse_args(argv)
    if arguments.show is not None:
        record, path = read_json(arguments.show), arguments.show
    else:
        record, path = measure(arguments), arguments.out
        write_record(path, record)
    plot(record, path.with_suffix(".png"))
    print("\n\n".join([*tables(record), verdict(record)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
