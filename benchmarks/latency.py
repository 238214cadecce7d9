"""Measure how fast pruned LLaVA answers, beside stock and beside VisPruner as research code does it.

Random weights of a real geometry: speed does not depend on what weights say. Three rows share the very same ones:
  stock   LlavaForConditionalGeneration of transformers
  peer    VisPruner with eager attention maps, similarities computed in every round, all tokens projected (peer.py)
  ours    vispruner.VisPrunerLlavaForConditionalGeneration
Every figure comes from `generate`, called as users call it: full prompt and pixels in, greedy tokens out.

TTFT       seconds from the call until the first new token is on the host
stages     what of it vision, select, project, prefill (the language model) and the first logits took, seen by hooks;
           `other` is the rest: preparing generate, shortening and merging the prompt, picking the token
decode     seconds per later token: the median of the answer
e2e        seconds for the whole answer of --new-tokens tokens
ratio      stock / row within one round, then the median; rows are interleaved in a new random order every round
FLOP ideal the ratio of operations (flops.py) before the first token; `share` is the ratio's share of it
at stock's rates   the share of another ideal: that every stage of stock did its fewer operations as fast as it did
           all of them in this run. On a CPU the vision tower's operations take longer than the language model's
memory     one extra run: on CUDA by max_memory_allocated, on the CPU by following every tensor that torch makes
           (scratch space inside operations is not seen); above what was held before the call, so without weights
KV         bytes of the cache after the prompt and all new tokens but the last
images at a cap    how many images' prompts and answers fit beside the weights of the whole geometry; images/s is that
           of the measured batch, and with --at-cap that of the largest batch that fits

Pruning alone. In bfloat16 on the CPU two costs of PyTorch (2.13, too) are no part of pruning, and ours avoids them. It
copies the whole of lm_head's weights, once for every prompt of the batch, when it multiplies a slice, the last row of
a longer tensor (0.3 to 0.4 s each for a 7B model here). And it multiplies the 577 rows of one picture slowly, so that
ours appends a few. So here all rows hand lm_head a row of its own, and ours appends nothing. --as-is leaves all as it
is, which is what users of each of them get.

With --methods the rows are stock and ours with each of the methods instead, and `select` is all that a method costs
behind the encoder: the choice, and for those that compare projected features the projection of all tokens. What a
method in the language model ranks by and chooses is a part of `prefill`; its budget is the mean of the decoder layers,
so that rows compare at equal KV cache. A codebook is drawn at random. `downsample` is stock with a picture so small
that it has no more patches than that. How well they choose is not measured here but by accuracy.py.

Checked in every run: the class, the length of the KV cache, its bytes, and that peer and ours keep as many tokens.

On the CPU the default is bfloat16 and --batches "1 8/8": one image at full depth, and eight images through an eighth
of both depths, which takes about as long. Of each tower's layers four differ and are read in turn (all 32 of the
language model would take 13 GB); they do not fit in a cache. Allow 15 minutes on four cores, and leave the machine
alone meanwhile.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import linear
from tqdm import tqdm
from transformers import LlavaConfig
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
from flops import (
    FIRST_TOKEN_STAGES,
    IN_LAYERS,
    MODEL_CLASSES,
    OURS,
    PEER,
    STOCK,
    VISPRUNER,
    first_token_flops,
    has_known_cost,
    layers_of_method,
    stage_flops,
)
from geometry import GEOMETRIES, RandomWeights, budgets_of, load_geometry, patches_of, shallower, vispruner_config
from outputs import output_folder
from records import RESULTS, versions, write_record
from stages import Observation, observe
from tables_and_plots import BLACK, BLUE, ORANGE, markdown_table, new_figure, save_figure

from vispruner.conversion.checkpoint_io import read_json
from vispruner.conversion.prefill_cost import kv_cache_bytes
from vispruner.llava_encoder import transformer_of
from vispruner.selectors import ENCODER_METHODS, SELECTORS
from vispruner.visual_features import VisualTokens

DISTINCT_ON_CPU = 4
CAP_MARGIN = 0.9
TIMES = ("ttft", "e2e", *FIRST_TOKEN_STAGES, "other", "decode")
BARS = {192: 0.9, 128: 0.9, 64: 0.9}
DOWNSAMPLE = "downsample"
PROTOTYPES = 64


class BenchmarkError(ValueError):
    """What was asked for cannot be measured, or a model did not do what it promises."""


@dataclass(frozen=True)
class Plan:
    """What to measure, as the command line says it.

    methods      compare these with each other; empty for VisPruner beside its peer
    batches      (images, what both depths are divided by)
    rounds       runs of every row; in the first `long_rounds` of them the answer is whole, then one token
    """

    geometry: str
    config: LlavaConfig
    device: torch.device
    dtype: torch.dtype
    attention: str
    budgets: tuple[int, ...]
    methods: tuple[str, ...]
    batches: tuple[tuple[int, int], ...]
    text_tokens: int
    new_tokens: int
    rounds: int
    long_rounds: int
    warmups: int
    distinct_layers: int | None
    cap_bytes: int
    at_cap: bool
    max_batch: int
    as_is: bool
    meters: bool
    seed: int

    @property
    def benchmark(self) -> str:
        """The name of the record."""
        in_decoder = not set(self.methods).isdisjoint(IN_LAYERS)
        return "latency" + "-methods" * bool(self.methods) + "-decoder" * in_decoder + "-as-is" * self.as_is

    @property
    def pruning_alone(self) -> bool:
        """Whether what is not pruning's is left out, see above: nothing of it happens elsewhere."""
        return self.dtype == torch.bfloat16 and self.device.type == "cpu" and not self.as_is


@dataclass(frozen=True)
class Row:
    """One of the rows of a comparison; `method` is what ours chooses by, or for stock a smaller picture."""

    name: str
    visual_token_num: int
    method: str | None = None


def rows_of(plan: Plan) -> list[Row]:
    full = patches_of(plan.config)
    if plan.methods:
        budgets = [budget for budget in plan.budgets if budget < full]
        chosen = [Row(OURS, budget, method) for budget in budgets for method in plan.methods]
        smaller = [Row(STOCK, math.isqrt(budget) ** 2, DOWNSAMPLE) for budget in budgets]
        return [Row(STOCK, full), *chosen, *smaller]
    return [Row(STOCK, full), *(Row(name, budget) for budget in plan.budgets for name in (PEER, OURS))]


class Models:
    """The three models of one depth and the prompts they answer."""

    def __init__(self, plan: Plan, config: LlavaConfig, weights: RandomWeights) -> None:
        self.plan, self.config = plan, config
        full = patches_of(config)
        self.models = {
            name: weights.model(model_class, vispruner_config(config, full) if name == OURS else config)
            for name, model_class in MODEL_CLASSES.items()
        }
        for model in self.models.values():
            model.model.language_model.set_attn_implementation(plan.attention)
            if plan.pruning_alone:
                model.lm_head.register_forward_pre_hook(compact)
        if plan.pruning_alone:
            transformer_of(
                self.models[OURS].model.vision_tower
            ).embeddings._forward_hooks.clear()  # what appends tokens
        for name in (STOCK, OURS):
            self.models[name].model.vision_tower.set_attn_implementation(plan.attention)
        self.models[STOCK].model.vision_tower.register_forward_pre_hook(take_any_size, with_kwargs=True)
        if any("codebook" in SELECTORS[method].needs for method in plan.methods):
            self._give_random_codebook()

    def _give_random_codebook(self) -> None:
        generator = torch.Generator().manual_seed(self.plan.seed)
        codebook = torch.randn(PROTOTYPES, self.config.text_config.hidden_size, generator=generator)
        with tempfile.TemporaryDirectory() as folder:
            save_file({"codebook": codebook}, file := Path(folder) / "codebook.safetensors")
            self.models[OURS].set_vispruner_config(codebook=str(file))

    def inputs(self, batch: int, patches: int | None = None) -> dict[str, torch.Tensor]:
        """Return prompts of one image and `text_tokens` other tokens each, and pixels: of all patches or fewer."""
        plan, config = self.plan, self.config
        patches = patches_of(config) if patches is None else patches
        generator = torch.Generator().manual_seed(plan.seed)
        text = torch.randint(3, min(config.image_token_id, 30000), (batch, plan.text_tokens), generator=generator)
        image = torch.full((batch, patches), config.image_token_id)
        ids = torch.cat([text[:, : plan.text_tokens // 2], image, text[:, plan.text_tokens // 2 :]], dim=1)
        side = math.isqrt(patches) * config.vision_config.patch_size
        pixels = torch.randn(batch, 3, side, side, generator=generator)
        return {
            "input_ids": ids.to(plan.device),
            "attention_mask": torch.ones_like(ids).to(plan.device),
            "pixel_values": pixels.to(plan.device, plan.dtype),
        }

    def run(self, row: Row, inputs: dict[str, torch.Tensor], new_tokens: int, memory: bool = False) -> Observation:
        """Answer, and raise BenchmarkError unless the row's own class kept what it should and cached no more."""
        model = self.models[row.name]
        if row.name == OURS:
            model.set_vispruner_config(
                visual_token_num=row.visual_token_num, method=row.method or VISPRUNER, seed=self.plan.seed
            )
        elif row.name == PEER:
            model.model.visual_token_num = row.visual_token_num
        seen = observe(model, inputs, new_tokens, memory)
        held = held_by_layer(self.config, row)
        lengths = [self.plan.text_tokens + count + new_tokens - 1 for count in held]
        size = len(inputs["input_ids"]) * kv_cache_bytes(self.config, lengths, self.plan.dtype.itemsize)
        found = (type(model), seen.kept, seen.cache_length, seen.cache_bytes, seen.tokens.shape[1])
        wanted = (MODEL_CLASSES[row.name], held[0], lengths[0], size, new_tokens)
        if found != wanted:
            raise BenchmarkError(
                f"{row.name} at {row.visual_token_num} tokens: (class, kept tokens, cached tokens, cached bytes, new "
                f"tokens) are {found}, where {wanted} are right"
            )
        return seen


def held_by_layer(config: LlavaConfig, row: Row) -> list[int]:
    """Return how many visual tokens of an image each decoder layer holds."""
    if row.method in IN_LAYERS:
        return layers_of_method(config, row.method, row.visual_token_num)
    return [row.visual_token_num] * config.text_config.num_hidden_layers


def compact(module: torch.nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """A forward pre-hook: hand over a tensor of its own instead of a slice of a longer one."""
    return (arguments[0].clone(memory_format=torch.contiguous_format),)


def take_any_size(module: torch.nn.Module, arguments: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A forward pre-hook: have a CLIP tower interpolate its position embeddings where a picture is smaller."""
    pixels = arguments[0] if arguments else named["pixel_values"]
    smaller = pixels.shape[-1] != module.config.image_size
    return arguments, {**named, "interpolate_pos_encoding": True} if smaller else named


# What is measured


def measure(plan: Plan) -> dict[str, Any]:
    """Measure every row of every batch size; return all figures, as they go into the JSON file."""
    began = time.perf_counter()
    weights = RandomWeights(plan.dtype, plan.device, plan.distinct_layers, plan.seed)
    rows = rows_of(plan)
    runs = plan.warmups + plan.rounds + 1
    settings = []
    with tqdm(total=runs * len(rows) * len(plan.batches), unit="run", desc="models") as progress:
        for batch, divisor in plan.batches:
            config = plan.config if divisor == 1 else shallower(plan.config, divisor)
            models = Models(plan, config, weights)
            settings.append(_measure_setting(plan, models, rows, batch, divisor, progress))
    return {
        "benchmark": plan.benchmark,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": plan.device.type,
        "device_name": device_name(plan.device),
        "threads": torch.get_num_threads() if plan.device.type == "cpu" else None,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "attention": plan.attention,
        "first_logits": "of a compact row, in all rows" if plan.pruning_alone else "as they are",
        "geometry": plan.geometry,
        "distinct_layers": plan.distinct_layers,
        "allocated_weight_bytes": weights.nbytes,
        "text_tokens": plan.text_tokens,
        "new_tokens": plan.new_tokens,
        "load_average": os.getloadavg(),
        "rounds": plan.rounds,
        "rounds_with_whole_answer": plan.long_rounds,
        "memory_cap_bytes": plan.cap_bytes,
        "memory": MEMORY[plan.device.type],
        "probe": probe(plan.device, plan.dtype),
        "versions": versions("accelerate"),
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "settings": settings,
    }


MEMORY = {
    "cpu": "live tensors made during the call, seen by a TorchDispatchMode; no scratch space inside operations",
    "cuda": "torch.cuda.max_memory_allocated above what was allocated before the call",
}


def _measure_setting(
    plan: Plan, models: Models, rows: list[Row], batch: int, divisor: int, progress: tqdm
) -> dict[str, Any]:
    whole = models.inputs(batch)
    fewer = {row: models.inputs(batch, row.visual_token_num) for row in rows if row.method == DOWNSAMPLE}
    order = random.Random(plan.seed)

    def run(row: Row, new_tokens: int, memory: bool = False) -> Observation:
        progress.set_description(f"batch {batch}, {row.method or row.name} {row.visual_token_num}")
        seen = models.run(row, fewer.get(row, whole), new_tokens, memory)
        progress.update()
        return seen

    metered = [run(row, 2, memory=plan.meters) for row in rows]  # warms up, too
    for _ in range(plan.warmups):
        for row in rows:
            run(row, 2)
    rounds: list[list[Observation]] = []
    for number in range(plan.rounds):
        new_tokens = plan.new_tokens if number < plan.long_rounds else 1
        seen: dict[Row, Observation] = {}
        for row in order.sample(rows, len(rows)):
            seen[row] = run(row, new_tokens)
        rounds.append([seen[row] for row in rows])
    setting: dict[str, Any] = {
        "batch": batch,
        "depth_divisor": divisor,
        "config": geometry_fields(models.config),
        "rows": [],
    }
    stock_times = [times(seen) for seen, *_ in rounds]
    for place, row in enumerate(rows):
        observed = [times(observations[place]) for observations in rounds]
        result = _row_result(plan, models, row, batch, observed, stock_times, metered[place])
        setting["rows"].append(result)
        if row.method != DOWNSAMPLE and (row.method is None or has_known_cost(row.method)):
            result |= _ideal(plan, models.config, row, batch, result)
    if not plan.methods:
        setting["selections"] = compare_selections(plan, models)
        if divisor == 1:
            _add_images_at_cap(plan, models, setting)
    return setting


def times(seen: Observation) -> dict[str, float]:
    """Return the seconds of one run by name; decode and e2e only where the answer has several tokens."""
    found = {"ttft": seen.ttft, **seen.stages}
    if seen.decode:
        found |= {"decode": statistics.median(seen.decode), "e2e": seen.end_to_end}
    return found


def _row_result(
    plan: Plan,
    models: Models,
    row: Row,
    batch: int,
    observed: list[dict[str, float]],
    stock: list[dict[str, float]],
    metered: Observation,
) -> dict[str, Any]:
    ratios = {
        name: spread(a[name] / b[name] for a, b in zip(stock, observed, strict=True) if name in a)
        for name in ("ttft", "prefill", "e2e", "decode")
    }
    held = held_by_layer(models.config, row)
    lengths = [plan.text_tokens + count + plan.new_tokens - 1 for count in held]
    return {
        "row": row.name,
        "class": f"{MODEL_CLASSES[row.name].__module__}.{MODEL_CLASSES[row.name].__name__}",
        "visual_token_num": row.visual_token_num,
        "method": row.method or (VISPRUNER if row.name == OURS else None),
        "prompt_length": plan.text_tokens + held[0],
        "held_by_layer": held,
        "kv_length": lengths[0],
        "kv_bytes": batch * kv_cache_bytes(models.config, lengths, plan.dtype.itemsize),
        "seconds": {name: spread(run[name] for run in observed if name in run) for name in TIMES},
        "ratio_to_stock": ratios,
        "images_per_second": batch / statistics.median(run["e2e"] for run in observed if "e2e" in run),
        "peak_bytes": metered.peak,
        "operations": metered.operations,
    }


def _ideal(plan: Plan, config: LlavaConfig, row: Row, batch: int, result: dict[str, Any]) -> dict[str, Any]:
    """Return a row's operations, and how many times sooner than stock's they let its first token come."""
    sizes = (batch, plan.text_tokens, plan.new_tokens)
    flops = stage_flops(config, row.name, row.visual_token_num, *sizes, method=row.method or VISPRUNER)
    dense = stage_flops(config, STOCK, 0, *sizes)
    ideal = first_token_flops(dense) / first_token_flops(flops)
    share = result["ratio_to_stock"]["ttft"]["median"] / ideal
    return {"flops": flops, "flop_ideal": ideal, "share_of_flop_ideal": share}


def share_at_stocks_rates(row: dict[str, Any], stock: dict[str, Any]) -> float:
    """Return a row's ratio to stock as a share of the ratio if all stages ran at stock's operations per second.

    Stock chooses nothing, so choosing takes no time there.
    """
    stages = [stage for stage in FIRST_TOKEN_STAGES if stock["flops"][stage]]
    spent = {stage: stock["seconds"][stage]["median"] for stage in stages}
    needed = sum(seconds * row["flops"][stage] / stock["flops"][stage] for stage, seconds in spent.items())
    return row["ratio_to_stock"]["ttft"]["median"] * needed / sum(spent.values())


def spread(values: Iterable[float]) -> dict[str, Any]:
    runs = list(values)
    return {"median": statistics.median(runs), "low": min(runs), "high": max(runs), "runs": runs}


@torch.no_grad()
def compare_selections(plan: Plan, models: Models) -> dict[str, Any]:
    """Have peer and ours select from the same features: the share of tokens that both keep, by budget.

    In half precision products are rounded differently when matrices differ in size, and one swapped rank changes all
    that follows; with exact arithmetic (features of +-1, as here) any difference is an error.
    """
    vision = models.config.vision_config
    generator = torch.Generator().manual_seed(plan.seed)
    features = torch.zeros(2, patches_of(models.config), vision.hidden_size)
    exact = 4 ** int(math.log(vision.hidden_size, 4))  # a row of so many +-1 has a power of two for its norm
    features[..., :exact] = torch.randint(0, 2, (*features.shape[:2], exact), generator=generator) * 2.0 - 1
    saliency = torch.rand(2, patches_of(models.config), generator=generator).to(plan.device)
    features = features.to(plan.device)
    alike = {}
    for budget in plan.budgets[1:]:
        models.models[OURS].set_vispruner_config(visual_token_num=budget)
        kept = [
            models.models[PEER].model.selection(features, saliency, budget),
            models.models[OURS].model.select(VisualTokens(features, saliency), budget).indices,
        ]
        alike[str(budget)] = float((kept[0] == kept[1]).float().mean())
        if alike[str(budget)] != 1.0:
            raise BenchmarkError(f"peer and ours keep different tokens of exact features at {budget}: {alike}")
    return alike


def _add_images_at_cap(plan: Plan, models: Models, setting: dict[str, Any]) -> None:
    """Add to every row how many images fit under the memory cap, and with --at-cap how fast so many are answered."""
    weights = plan.dtype.itemsize * sum(p.numel() for p in _all_parameters(models.models[STOCK]))
    for row in setting["rows"]:
        later = kv_cache_bytes(models.config, plan.new_tokens, plan.dtype.itemsize)
        per_image = row["peak_bytes"]["all"] / setting["batch"] + later
        fit = max(0, int((plan.cap_bytes - weights) * CAP_MARGIN / per_image))
        row["bytes_per_image"], row["images_at_cap"] = round(per_image), fit
        batch = min(fit, plan.max_batch)
        if plan.at_cap and batch > 0:
            inputs, what = models.inputs(batch), Row(row["row"], row["visual_token_num"])
            runs = [models.run(what, inputs, plan.new_tokens).end_to_end for _ in range(3)]
            row["batch_at_cap"] = batch
            row["images_per_second_at_cap"] = batch / statistics.median(runs[1:])


def _all_parameters(model: Any) -> Iterator[torch.Tensor]:
    """Yield the parameters of every layer, shared or not: what the model holds when it is not a benchmark's."""
    return (parameter for _, parameter in model.named_parameters(remove_duplicate=False))


# Circumstances


def probe(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> dict[str, float]:
    """Return the rates this device reaches: a large matrix product, and reading weights for a single row."""
    size = 4096 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    many = [torch.randn(4 * size, size, device=device, dtype=dtype) for _ in range(8)]
    single = torch.randn(1, size, device=device, dtype=dtype)
    turn = cycle(many)
    product = _best_seconds(lambda: linear(left, right), device, seconds)
    read = _best_seconds(lambda: linear(single, next(turn)), device, seconds)
    return {"flops_per_second": 2 * size**3 / product, "bytes_per_second": many[0].nbytes / read}


def _best_seconds(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    best, until = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < until:
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = re.findall(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def geometry_fields(config: LlavaConfig) -> dict[str, Any]:
    """Return the fields of config.json that say what is computed, so that flops.py can read them back."""
    common = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {
        "model_type": "llava",
        "image_token_id": config.image_token_id,
        "vision_feature_layer": config.vision_feature_layer,
        "text_config": {
            "model_type": config.text_config.model_type,
            **{name: getattr(config.text_config, name) for name in (*common, "num_key_value_heads", "vocab_size")},
        },
        "vision_config": {
            "model_type": config.vision_config.model_type,
            **{name: getattr(config.vision_config, name) for name in (*common, "image_size", "patch_size")},
        },
    }


# Tables


def tables(result: dict[str, Any]) -> str:
    """Return all figures as Markdown."""
    head = (
        f"{result['geometry']}, {result['dtype']}, {result['device_name']}"
        + (f", {result['threads']} threads" if result["threads"] else "")
        + f", {result['text_tokens']} text tokens, {result['new_tokens']} new ones, {result['rounds']} rounds; "
        + ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "transformers"))
        + f"; {result['date'][:10]}"
    )
    parts = [head]
    for setting in result["settings"]:
        depth = "" if setting["depth_divisor"] == 1 else f", 1/{setting['depth_divisor']} of both depths"
        parts.append(f"**Batch {setting['batch']}{depth}**")
        if has_methods(result):
            parts.append(method_table(setting))
            continue
        parts.append(speed_table(setting, result["new_tokens"]))
        parts += [stage_table(setting), memory_table(setting, result["memory_cap_bytes"])]
    return "\n\n".join(parts if has_methods(result) else [*parts, bars(result)])


def has_methods(result: dict[str, Any]) -> bool:
    return result["benchmark"].startswith("latency-methods")


def method_table(setting: dict[str, Any]) -> str:
    """Return what each method costs and gains, beside stock."""
    columns = "tokens|method|vision ms|select ms|TTFT s|x (low, high)|e2e s|x (low, high)|KV MiB|select, operations"
    cells = []
    for row in setting["rows"]:
        seconds, ratio, whole = row["seconds"], row["ratio_to_stock"]["ttft"], row["ratio_to_stock"]["e2e"]
        cells.append(
            [
                row["visual_token_num"],
                row["method"] or row["row"],
                f"{1e3 * seconds['vision']['median']:.0f}",
                f"{1e3 * seconds['select']['median']:.1f}",
                f"{seconds['ttft']['median']:.2f}",
                f"{ratio['median']:.2f} ({ratio['low']:.2f}, {ratio['high']:.2f})",
                f"{seconds['e2e']['median']:.2f}",
                f"{whole['median']:.2f} ({whole['low']:.2f}, {whole['high']:.2f})",
                f"{row['kv_bytes'] / 2**20:.3g}",
                row["operations"].get("select", 0),
            ]
        )
    return markdown_table(columns, cells)


def speed_table(setting: dict[str, Any], new_tokens: int) -> str:
    """Return TTFT, decode and end-to-end times with their ratios to stock."""
    columns = "tokens|row|TTFT s (low, high)|x|FLOP ideal|share|at stock's rates|prefill x|decode s"
    cells = []
    for row in setting["rows"]:
        seconds, ratio = row["seconds"], row["ratio_to_stock"]
        ttft, e2e = seconds["ttft"], seconds["e2e"]
        cells.append(
            [
                row["visual_token_num"],
                row["row"],
                f"{ttft['median']:.3g} ({ttft['low']:.3g}, {ttft['high']:.3g})",
                f"{ratio['ttft']['median']:.2f}",
                f"{row['flop_ideal']:.2f}",
                f"{100 * row['share_of_flop_ideal']:.0f} %",
                f"{100 * share_at_stocks_rates(row, setting['rows'][0]):.0f} %",
                f"{ratio['prefill']['median']:.2f}",
                f"{seconds['decode']['median']:.3g}",
                f"{e2e['median']:.3g}",
                f"{ratio['e2e']['median']:.2f}",
            ]
        )
    return markdown_table(f"{columns}|e2e {new_tokens} s|x", cells)


def stage_table(setting: dict[str, Any]) -> str:
    """Return milliseconds by stage up to the first token."""
    names = (*FIRST_TOKEN_STAGES, "other")
    cells = []
    for row in setting["rows"]:
        times = (f"{1e3 * row['seconds'][name]['median']:.3g}" for name in names)
        cells.append([row["visual_token_num"], row["row"], *times])
    return markdown_table(["visual tokens", "row", *(f"{name} ms" for name in names)], cells)


def memory_table(setting: dict[str, Any], cap: int) -> str:
    """Return the peak bytes, those of the KV cache, and what fits under the cap."""
    columns = ["visual tokens", "row", "vision peak MiB", "peak MiB", "KV MiB", "images/s"]
    if has_cap := "images_at_cap" in setting["rows"][0]:
        columns.append(f"images in {cap / 2**30:g} GiB")
    if at_cap := any("batch_at_cap" in row for row in setting["rows"]):
        columns.append("images/s at that batch")
    cells = []
    for row in setting["rows"]:
        vision, peak = (row["peak_bytes"][name] / 2**20 for name in ("vision", "all"))
        line = [row["visual_token_num"], row["row"], f"{vision:.3g}", f"{peak:.4g}"]
        line += [f"{row['kv_bytes'] / 2**20:.4g}", f"{row['images_per_second']:.3g}"]
        line += [row["images_at_cap"]] if has_cap else []
        last = f"{row.get('images_per_second_at_cap', 0):.3g} ({row.get('batch_at_cap', 0)})"
        cells.append([*line, last] if at_cap else line)
    return markdown_table(columns, cells)


def bars(result: dict[str, Any]) -> str:
    """Return whether TTFT is near the FLOP ideal and nowhere slower than the peer's, a line each."""
    lines = []
    for setting in result["settings"]:
        where = f"batch {setting['batch']}, depth 1/{setting['depth_divisor']}"
        by_row = {(row["row"], row["visual_token_num"]): row for row in setting["rows"]}
        full = setting["rows"][0]["visual_token_num"]
        for (name, budget), row in by_row.items():
            if name != OURS:
                continue
            if budget in BARS and budget < full:
                share, own = row["share_of_flop_ideal"], share_at_stocks_rates(row, setting["rows"][0])
                lines.append(
                    f"{_verdict(share >= BARS[budget])} {where}, {budget}: {share:.1%} of the FLOP ideal, "
                    f"{own:.1%} of that at stock's rates"
                )
            peer, ours = by_row[PEER, budget]["seconds"]["ttft"], row["seconds"]["ttft"]
            ahead = peer["median"] / ours["median"]
            overlap = "" if ours["low"] > peer["high"] or ahead >= 1 else " (their runs overlap)"
            lines.append(f"{_verdict(ahead >= 1)} {where}, {budget}: TTFT {ahead:.3f}x as fast as the peer{overlap}")
    return "\n".join(f"- {line}" for line in lines)


def _verdict(holds: bool) -> str:
    return "holds:" if holds else "MISSED:"


# The plot

COLOURS = {OURS: BLUE, PEER: ORANGE}


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw how many times sooner than stock the first token comes, against the tokens kept, and the FLOP ideal."""
    settings = result["settings"]
    figure = new_figure(figsize=(1 + 5 * len(settings), 4.2), layout="tight")
    axes = figure.subplots(1, len(settings), squeeze=False, sharey=True)
    for axis, setting in zip(axes[0], settings, strict=True):
        for name, marker in ((OURS, "o"), (PEER, "s")):
            rows = [row for row in setting["rows"] if row["row"] == name]
            ratios = [row["ratio_to_stock"]["ttft"] for row in rows]
            middle = [ratio["median"] for ratio in ratios]
            errors = [
                [m - r["low"] for m, r in zip(middle, ratios, strict=True)],
                [r["high"] - m for m, r in zip(middle, ratios, strict=True)],
            ]
            tokens = [row["visual_token_num"] for row in rows]
            axis.errorbar(tokens, middle, yerr=errors, label=name, color=COLOURS[name], marker=marker, capsize=2)
            if name == OURS:
                axis.plot(tokens, [row["flop_ideal"] for row in rows], "--", color=BLACK, label="FLOP ideal")
        axis.set_xscale("log", base=2)
        axis.minorticks_off()
        axis.set_xticks(tokens, [str(count) for count in tokens])
        depth = "" if setting["depth_divisor"] == 1 else f", 1/{setting['depth_divisor']} of both depths"
        axis.set(xlabel="visual tokens kept", title=f"batch {setting['batch']}{depth}")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("time to first token: stock / row")
    axes[0][0].legend()
    figure.suptitle(f"{result['geometry']}, {result['dtype']}, {result['device_name']}", fontsize=10)
    save_figure(figure, path)


# The command line


def _batch(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)(?:/([1-9]\d*))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f'"{text}" is neither a number of images nor IMAGES/DEPTH_DIVISOR')
    return int(match[1]), int(match[2] or 1)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python benchmarks/latency.py                          everything, into benchmarks/results\n"
        "  python benchmarks/latency.py --quick                  a tiny geometry, seconds, nothing written\n"
        "  python benchmarks/latency.py --methods                every method at 64 tokens, ten minutes on a CPU\n"
        "  python benchmarks/latency.py --methods vispruner fastv --batches 1/8 --budgets 288 216 --new-tokens 16\n"
        "  python benchmarks/latency.py --device cuda --geometry llava-1.5-13b\n"
        "  python benchmarks/latency.py --batches 1/8 --budgets 64 --rounds 3 --out .    one budget, shallow\n"
        "  python benchmarks/latency.py --show benchmarks/results/latency-....json     its tables, and the plot anew",
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="default here: %(default)s")
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=dtypes, help="default: bfloat16; float32 with --quick")
    parser.add_argument(
        "--geometry",
        metavar="NAME",
        help=f"{', '.join(GEOMETRIES)}, or the config.json of a LLaVA-1.5 model (default: llava-1.5-7b)",
    )
    parser.add_argument("--attention", default="sdpa", help="of stock, ours and all language models (%(default)s)")
    parser.add_argument("--budgets", nargs="+", type=int, metavar="T", help="visual tokens kept (default: 576 ... 16)")
    parser.add_argument(
        "--methods",
        nargs="*",
        choices=[*ENCODER_METHODS, *IN_LAYERS],
        metavar="NAME",
        help="compare these methods, by default all behind the encoder, at --budgets (default: 64) with answers of 2 "
        "tokens",
    )
    parser.add_argument(
        "--batches",
        nargs="+",
        type=_batch,
        metavar="B[/D]",
        help="images at once, and what both depths are divided by (default: 1 8/8 on the CPU, 1 8 on CUDA)",
    )
    parser.add_argument(
        "--no-memory", action="store_true", help="with --methods: do not meter memory and operations, which is slow"
    )
    parser.add_argument("--text-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="an answer (default: 16 on the CPU, 64 on CUDA)")
    parser.add_argument("--rounds", type=int, metavar="N", help="runs of a row (default: 3 on the CPU, 20 on CUDA)")
    parser.add_argument(
        "--long-rounds",
        type=int,
        metavar="N",
        help="rounds with the whole answer, the others stop at its first token (default: 2 on the CPU, 5 on CUDA)",
    )
    parser.add_argument(
        "--distinct-layers",
        type=int,
        metavar="N",
        help=f"layers of each tower that differ; 0: all (default: {DISTINCT_ON_CPU} on the CPU, all on CUDA)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default here: torch's)")
    parser.add_argument("--memory-cap-gib", type=float, default=24.0, metavar="X", help="default: %(default)s")
    parser.add_argument(
        "--at-cap",
        action=argparse.BooleanOptionalAction,
        help="also measure the largest batch that fits under the cap (default: on CUDA)",
    )
    parser.add_argument("--max-batch", type=int, default=64, metavar="N", help="for --at-cap (default: %(default)s)")
    parser.add_argument("--as-is", action="store_true", help="leave in what is not pruning's, see above")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="smoke run: a tiny geometry, 2 rounds, no files")
    parser.add_argument(
        "--out", type=output_folder, metavar="DIR", help="of JSON and PNG (default: benchmarks/results)"
    )
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing; print this result, draw it again")
    parsed = parser.parse_args(arguments)
    for name in ("rounds", "text_tokens", "max_batch"):
        if getattr(parsed, name) is not None and getattr(parsed, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if parsed.new_tokens is not None and parsed.new_tokens < 2:
        parser.error("--new-tokens must be at least 2: the first token is TTFT's")
    if parsed.text_tokens < 2:
        parser.error("--text-tokens must be at least 2: text stands before and after the image")
    return parsed


def plan_of(parsed: argparse.Namespace) -> Plan:
    """Return what to measure, the defaults of the device and of --quick filled in. Raises ValueError."""
    device = torch.device(parsed.device)
    cuda = device.type == "cuda"
    if device.type not in MEMORY:
        raise BenchmarkError(f"--device must be cpu or cuda, got {parsed.device}")
    if cuda:
        if not torch.cuda.is_available():
            raise BenchmarkError("--device cuda: torch sees no CUDA device")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    name = parsed.geometry or ("tiny" if parsed.quick else "llava-1.5-7b")
    config = load_geometry(name)
    methods = () if parsed.methods is None else tuple(parsed.methods or ENCODER_METHODS)
    rounds = parsed.rounds or (2 if parsed.quick else 20 if cuda else 3)
    long_rounds = parsed.long_rounds or (1 if methods else 5 if cuda else 2)
    distinct = parsed.distinct_layers if parsed.distinct_layers is not None else (0 if cuda else DISTINCT_ON_CPU)
    dtype = getattr(torch, parsed.dtype or ("float32" if parsed.quick else "bfloat16"))
    usual = [max(1, patches_of(config) // 9)] if methods else budgets_of(config)
    budgets = sorted({patches_of(config), *(parsed.budgets or usual)}, reverse=True)
    if budgets[0] > patches_of(config) or budgets[-1] < 1:
        raise BenchmarkError(f"--budgets must be from 1 to the {patches_of(config)} tokens of an image")
    if parsed.no_memory and not methods:
        raise BenchmarkError("--no-memory goes with --methods: the other tables are of memory, too")
    if methods and len(budgets) == 1:
        raise BenchmarkError("--methods needs a budget below all tokens of an image: no method chooses among all")
    return Plan(
        geometry=name,
        config=config,
        device=device,
        dtype=dtype,
        attention=parsed.attention,
        budgets=tuple(budgets),
        methods=methods,
        batches=tuple(parsed.batches or ([(1, 1), (8, 1)] if cuda else [(1, 1), (8, 2 if parsed.quick else 8)])),
        text_tokens=parsed.text_tokens,
        new_tokens=parsed.new_tokens or (2 if methods else 4 if parsed.quick else 64 if cuda else 16),
        rounds=rounds,
        long_rounds=min(long_rounds, rounds),
        warmups=2 if cuda else 0,
        distinct_layers=distinct or None,
        cap_bytes=int(parsed.memory_cap_gib * 2**30),
        at_cap=cuda if parsed.at_cap is None else parsed.at_cap,
        max_batch=parsed.max_batch,
        as_is=parsed.as_is,
        meters=not parsed.no_memory,
        seed=parsed.seed,
    )


def result_name(result: dict[str, Any]) -> str:
    device = result["device_name"] + (f" {result['threads']} threads" if result["threads"] else "")
    path = Path(result["geometry"])
    geometry = path.name if path.suffix != ".json" else path.absolute().parent.name
    parts = (result["benchmark"], result["device"], device, geometry, result["dtype"])
    return re.sub(r"[^a-z0-9.]+", "-", "-".join(parts).lower())


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    logging.set_verbosity_error()
    if parsed.show is not None:
        result = read_json(parsed.show)
        print(tables(result))
        if not has_methods(result):
            plot(result, parsed.show.with_suffix(".png"))
        return 0
    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    try:
        result = measure(plan_of(parsed))
    except ValueError as error:
        print(f"latency.py: {error}", file=sys.stderr)
        return 2
    print(tables(result))
    if parsed.out is not None or not parsed.quick:
        file = (parsed.out or RESULTS) / f"{result_name(result)}.json"
        write_record(file, result)
        if not has_methods(result):
            plot(result, file.with_suffix(".png"))
        print(f"\nwritten: {file}" + ("" if has_methods(result) else " and its .png"), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
