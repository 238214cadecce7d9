"""Count what each stage of answering costs, and how fast a device could be at best: FLOPs, bytes, roofline floors.

Operations are matrix products and the patch convolution, a multiply-add being two, attention over the full square:
what PyTorch's FlopCounterMode counts with eager attention, to the last one (`--check` compares, on meta tensors). Left
out on both sides are the rotary angles, which some versions of transformers make by a matrix product.

vision    the whole tower, and with ours the [CLS] row of one layer's attention
select    ours: one matrix of similarities; peer: one of the tokens still in, every round. Of a method in the language
          model: what ranks at each stage, and what it compares then
project   all tokens with stock, peer and methods in the language model, the kept ones with ours
prefill   the language model's layers for text and visual tokens, each layer for those that it sees
logits    one row of logits
decode    one token in the middle of the answer

The roofline floor of a stage is what moving its weights (and when decoding the KV cache) once, or its operations,
take at least at the device's rates, whichever is longer; activations are left out, so it is a true lower bound. The
first token's floor is the sum over the stages that it waits for, since each waits for the one before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaConfig, LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent))
from geometry import GEOMETRIES, budgets_of, config_from_dict, empty_model, load_geometry, patches_of, vispruner_config
from outputs import output_file
from peer import IMPORTANT_RATIO, ROUND, PeerLlavaForConditionalGeneration
from records import write_record
from released_geometries import RELEASED, released_base
from tables_and_plots import markdown_table

from vispruner import VisPrunerLlavaForConditionalGeneration
from vispruner.conversion.ceilings import ceiling_at, halfway
from vispruner.conversion.checkpoint_io import read_json
from vispruner.conversion.prefill_cost import (
    attention_projection_flops,
    feature_width,
    head_width,
    kv_cache_bytes,
    language_model_flops,
    logits_flops,
    projector_flops,
    query_width,
)
from vispruner.pruning_plan import layer_counts, stage_counts
from vispruner.selectors import DECODER_METHODS, SELECTORS
from vispruner.serving.launch_options import ENCODERS
from vispruner.stock_versions import CACHE
from vispruner.visual_features import VisualTokens

STOCK, PEER, OURS = "stock", "peer", "ours"
VISPRUNER = "vispruner"
MODEL_CLASSES: dict[str, Any] = {
    STOCK: LlavaForConditionalGeneration,
    PEER: PeerLlavaForConditionalGeneration,
    OURS: VisPrunerLlavaForConditionalGeneration,
}
# What methods behind the encoder compare all tokens with all by: the width of a token; 0 where nothing is compared.
ALL_WITH_ALL: dict[str, Callable[[LlavaConfig], int]] = {
    "scope": feature_width,
    "divprune": lambda config: config.text_config.hidden_size,
    **dict.fromkeys(("cls_attention", "random", "uniform_grid"), lambda config: 0),
}
PROJECTED = frozenset({"divprune"})
# Methods whose every stage is counted: not those that prune behind the encoder too, nor what another model found.
IN_LAYERS = tuple(
    name for name in DECODER_METHODS if SELECTORS[name].place is not None and not SELECTORS[name].is_told
)
FIRST_TOKEN_STAGES = ("vision", "select", "project", "prefill", "logits")
STAGES = (*FIRST_TOKEN_STAGES, "decode")
TEXT_TOKENS = 64
RATIOS = (0.5, 0.25, 0.11)  # of the ceilings
STAGED = (0.25, 0.5)  # the ratio at which a stage within the encoder is shown, and what that leaves halfway


@dataclass(frozen=True)
class Rates:
    """What a device does at best: dense operations and bytes from memory, per second."""

    flops: float
    bytes: float
    source: str


# Dense bf16 rates, half of the figure "with sparsity" where a data sheet prints only that.
DEVICES = {
    "a100": Rates(312e12, 2.039e12, "NVIDIA A100 80GB SXM data sheet: BF16 312 TFLOPS, 2,039 GB/s"),
    "h100": Rates(989.5e12, 3.35e12, "NVIDIA H100 SXM data sheet: BF16 1,979 TFLOPS with sparsity, 3.35 TB/s"),
    "h200": Rates(989.5e12, 4.8e12, "NVIDIA H200 SXM data sheet: BF16 1,979 TFLOPS with sparsity, 4.8 TB/s"),
}


# Operations


def stage_flops(
    config: LlavaConfig,
    row: str,
    visual_token_num: int,
    batch: int = 1,
    text_tokens: int = TEXT_TOKENS,
    new: int = 2,
    method: str = VISPRUNER,
    raters: int | None = None,
) -> dict[str, int]:
    """Return the operations of every stage for `batch` prompts of one image each, which stands in the text's middle.

    row               stock (which keeps all visual tokens), peer or ours
    visual_token_num  tokens kept per image; for a method in the language model the mean of its layers
    new               length of the answer, in whose middle the decoded token stands
    method            that ours prunes by
    raters            words that rate visual tokens (SparseVLM), which the prompt decides; None: all behind the image
    """
    patches = patches_of(config)
    kept = patches if row == STOCK else min(visual_token_num, patches)
    in_decoder = row == OURS and method in IN_LAYERS
    held = layers_of_method(config, method, kept) if in_decoder else [kept] * config.text_config.num_hidden_layers
    lengths = [text_tokens + count for count in held]
    reads = row == OURS and not in_decoder and kept < patches
    if in_decoder:
        select = ranking_flops(config, method, kept, text_tokens, raters)
    else:
        select = selection_flops(config, row, kept, method)
    compares_projected = row == OURS and method in PROJECTED and kept < patches
    one = {
        "vision": vision_flops(config) + (saliency_flops(config) if reads else 0),
        "select": select + (projector_flops(config, patches) if compares_projected else 0),
        "project": projector_flops(config, kept if row == OURS and not in_decoder else patches),
        "prefill": language_model_flops(config, lengths),
        "logits": logits_flops(config),
        "decode": language_model_flops(config, 1, [length + new // 2 - 1 for length in lengths])
        + logits_flops(config),
    }
    return {stage: batch * flops for stage, flops in one.items()}


def has_known_cost(method: str) -> bool:
    """Whether `stage_flops` knows what a method compares."""
    return method in (VISPRUNER, *ALL_WITH_ALL, *IN_LAYERS)


def layers_of_method(config: LlavaConfig, method: str, visual_token_num: int) -> list[int]:
    """Return how many visual tokens each decoder layer sees under a method in the language model and a mean budget."""
    depth, patches = config.text_config.num_hidden_layers, patches_of(config)
    layers = SELECTORS[method].place.layers(depth)
    return layer_counts(patches, layers, stage_counts(patches, tuple(layers), depth, visual_token_num), depth)


def ranking_flops(
    config: LlavaConfig, method: str, visual_token_num: int, text_tokens: int, raters: int | None = None
) -> int:
    """Return what ranking costs in the language model, at all stages: rows of attention, and what tokens are compared.

    Queries and keys are read where a layer makes them anyway; where the layer to come ranks, its projections run once
    more. Distances of clusters (`sparsevlm_v1`) are no matrix product, and `key_norms` of DART are none.
    """
    place, width = SELECTORS[method].place, config.text_config.hidden_size
    behind = text_tokens - text_tokens // 2
    raters = behind if raters is None else raters
    held = layers_of_method(config, method, visual_token_num)
    total = 0
    if "rater" in place.ranking and held[-1] < held[0]:
        total += 2 * held[0] * behind * width
    for layer in place.layers(len(held)):
        before, left = held[layer - 1], held[layer]
        if left == before:
            continue
        length = text_tokens + before
        rows = {"last_row": 1, "visual_rows": before, "key_norms": 0}.get(place.ranking, raters)
        total += 2 * rows * length * query_width(config)
        if place.ranking == "level_rater_rows":
            total += 2 * rows * length * head_width(config)
        if place.of_layer == "own":
            total += attention_projection_flops(config, length)
        total += _comparing_flops(config, method, before, left, length)
    return total


def _comparing_flops(config: LlavaConfig, method: str, before: int, left: int, length: int) -> int:
    """Return what a method in the language model multiplies to choose `left` of `before` tokens, at one stage."""
    if method == "visiondrop":
        contextual = min(left, round(left * SELECTORS[method].options["contextual_share"]))
        dominant = left - contextual
        return 2 * (before - dominant - contextual) * contextual * head_width(config)
    if method == "dart":
        options = SELECTORS[method].options
        asking = min(options["image_pivots"], left) + min(options["text_pivots"], length)
        return 2 * asking * before * config.text_config.hidden_size
    if method == "topv":  # what the layer was given with what it made of it
        return 2 * before**2 * config.text_config.hidden_size
    return 0


def first_token_flops(flops: dict[str, int]) -> int:
    return sum(flops[stage] for stage in FIRST_TOKEN_STAGES)


def vision_flops(config: LlavaConfig) -> int:
    """Return the operations of all layers of a tower for one image, [CLS] and the patch convolution included."""
    vision = config.vision_config
    width, patches = vision.hidden_size, patches_of(config)
    tokens = patches + 1
    embedding = 2 * patches * width * vision.num_channels * vision.patch_size**2
    of_mlp = vision.intermediate_size if hasattr(vision, "intermediate_size") else width * vision.mlp_ratio
    per_layer = 2 * tokens * (4 * width**2 + 2 * width * of_mlp) + 4 * tokens**2 * width
    return embedding + vision.num_hidden_layers * per_layer


def saliency_flops(config: LlavaConfig) -> int:
    """Return the operations of one [CLS] query against every key."""
    return 2 * (patches_of(config) + 1) * config.vision_config.hidden_size


def selection_flops(config: LlavaConfig, row: str, kept: int, method: str = VISPRUNER) -> int:
    """Return the operations of comparing tokens with each other, for one image: all with all, but for the peer.

    Of the methods behind the encoder those of `ALL_WITH_ALL` are known here, and those that compare nothing.
    """
    patches, width = patches_of(config), feature_width(config)
    if row == OURS and method != VISPRUNER and kept < patches:
        return 2 * patches**2 * ALL_WITH_ALL[method](config)
    important = int(kept * IMPORTANT_RATIO)
    left, diverse = patches - important, kept - important
    if row == STOCK or kept == patches or diverse == 0:
        return 0
    if row == OURS:
        return 2 * left**2 * width
    total = 0
    while left > diverse:
        total += 2 * ((left + 1) // 2) * (left // 2) * width
        left -= min(ROUND, left - diverse, (left + 1) // 2)
    return total


def counted_stage_flops(
    config: LlavaConfig, row: str, visual_token_num: int, batch: int = 1, text_tokens: int = TEXT_TOKENS, new: int = 2
) -> dict[str, int]:
    """Return what FlopCounterMode counts when the row's own model runs each stage on the meta device."""
    patches = patches_of(config)
    kept = patches if row == STOCK else min(visual_token_num, patches)
    model = empty_model(MODEL_CLASSES[row], vispruner_config(config, kept) if row == OURS else config).to("meta")
    model.set_attn_implementation("eager")  # the counter does not know every fused attention
    base, side = model.model, config.vision_config.image_size
    pixels = torch.empty(batch, 3, side, side, device="meta")
    features = torch.empty(batch, patches, feature_width(config), device="meta")
    saliency = torch.empty(batch, patches, device="meta")
    projected = features[:, :kept] if row == OURS else features
    embeds = torch.empty(batch, text_tokens + kept, config.text_config.hidden_size, device="meta")
    encode = {
        STOCK: lambda: base.vision_tower(pixels),
        PEER: lambda: base.encode(pixels),
        OURS: lambda: base.vision_tower(pixels) if kept == patches else base.encode(pixels, None),
    }
    prefilled: dict[str, Any] = {}

    def prefill() -> None:
        prefilled.update(base.language_model(inputs_embeds=embeds, use_cache=True))

    def decode() -> None:
        cache = prefilled[CACHE]
        for layer in cache.layers:  # as if the answer's first half had been decoded
            heads, width = layer.keys.shape[1], layer.keys.shape[3]
            layer.keys = torch.empty(batch, heads, text_tokens + kept + new // 2 - 1, width, device="meta")
            layer.values = layer.keys.clone()
        model.lm_head(base.language_model(inputs_embeds=embeds[:, -1:], **{CACHE: cache}).last_hidden_state)

    chosen = {
        PEER: lambda: base.selection(features, saliency, kept),
        OURS: lambda: base.select(VisualTokens(features, saliency), kept),
    }
    runs = {
        "vision": encode[row],
        "select": lambda: None if row == STOCK or kept == patches else chosen[row](),
        "project": lambda: base.multi_modal_projector(projected),
        "prefill": prefill,
        "logits": lambda: model.lm_head(embeds[:, -1:]),
        "decode": decode,
    }
    return {stage: _counted(run) for stage, run in runs.items()}


def _counted(run: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    angles = sum(sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - angles


# Bytes and the roofline


def weight_bytes(config: LlavaConfig, bytes_per_value: int = 2) -> dict[str, int]:
    """Return the weights each stage reads; the table of input embeddings, of which few rows are read, is in none."""
    model = empty_model(LlavaForConditionalGeneration, config)
    language = model.model.language_model
    parts = {
        "vision": [model.model.vision_tower],
        "select": [],
        "project": [model.model.multi_modal_projector],
        "prefill": [language.layers, language.norm],
        "logits": [model.lm_head],
    }
    read = {
        stage: bytes_per_value * sum(p.numel() for module in modules for p in module.parameters())
        for stage, modules in parts.items()
    }
    return {**read, "decode": read["prefill"] + read["logits"]}


def floors(
    config: LlavaConfig,
    row: str,
    visual_token_num: int,
    rates: Rates,
    batch: int = 1,
    text_tokens: int = TEXT_TOKENS,
    new: int = 2,
    bytes_per_value: int = 2,
    weights: dict[str, int] | None = None,
) -> dict[str, float]:
    """Return the least seconds of every stage at these rates, and of `ttft`, their sum up to the first token."""
    weights = weight_bytes(config, bytes_per_value) if weights is None else weights
    flops = stage_flops(config, row, visual_token_num, batch, text_tokens, new)
    kept = patches_of(config) if row == STOCK else min(visual_token_num, patches_of(config))
    cache = batch * kv_cache_bytes(config, text_tokens + kept + new // 2 - 1, bytes_per_value)
    moved = {**weights, "decode": weights["decode"] + cache}
    least = {stage: max(flops[stage] / rates.flops, moved[stage] / rates.bytes) for stage in STAGES}
    return {**least, "ttft": sum(least[stage] for stage in FIRST_TOKEN_STAGES)}


# Tables


def flops_table(config: LlavaConfig, budgets: Sequence[int], text_tokens: int, bytes_per_value: int) -> str:
    """Return operations by stage for stock and ours at each budget, as Markdown."""
    head = (
        f"GFLOP for one image and {text_tokens} text tokens; x: how many times fewer than stock until the first token"
    )
    columns = "visual tokens|vision|select|project|prefill|first logit|first token|x|decode|KV MiB"
    lines = []
    stock = first_token_flops(stage_flops(config, STOCK, 0, text_tokens=text_tokens))
    for kept in budgets:
        row = STOCK if kept == patches_of(config) else OURS
        flops = stage_flops(config, row, kept, text_tokens=text_tokens)
        first, cache = first_token_flops(flops), kv_cache_bytes(config, text_tokens + kept, bytes_per_value)
        cells = [_gflop(flops[stage]) for stage in FIRST_TOKEN_STAGES]
        cells += [_gflop(first), f"{stock / first:.2f}", _gflop(flops["decode"]), f"{cache / 2**20:.3g}"]
        lines.append([kept, *cells])
    return f"{head}\n\n{markdown_table(columns, lines)}"


def methods_table(
    config: LlavaConfig, methods: Sequence[str], budgets: Sequence[int], text_tokens: int, bytes_per_value: int
) -> str:
    """Return what methods cost at equal KV cache, those in the language model layer by layer, as Markdown."""
    head = (
        f"GFLOP for one image and {text_tokens} text tokens; x: how many times fewer than stock to the first token; "
        "of SparseVLM, all words behind the image rate visual tokens"
    )
    columns = "visual tokens, mean|method|decoder layers hold|choosing|prefill|first token|x|KV MiB"
    lines = []
    stock = first_token_flops(stage_flops(config, STOCK, 0, text_tokens=text_tokens))
    depth = config.text_config.num_hidden_layers
    for budget in budgets:
        for method in methods:
            flops = stage_flops(config, OURS, budget, text_tokens=text_tokens, method=method)
            in_decoder = method in IN_LAYERS
            held = layers_of_method(config, method, budget) if in_decoder else [budget] * depth
            cache = kv_cache_bytes(config, [text_tokens + count for count in held], bytes_per_value)
            runs = ", ".join(f"{len(list(group))} x {count}" for count, group in groupby(held))
            first = first_token_flops(flops)
            cells = [_gflop(flops["select"]), _gflop(flops["prefill"]), _gflop(first)]
            lines.append([budget, f"`{method}`", runs, *cells, f"{stock / first:.2f}", f"{cache / 2**20:.3g}"])
    return f"{head}\n\n{markdown_table(columns, lines)}"


def _gflop(flops: float) -> str:
    return f"{flops / 1e9:,.1f}"


def roofline_table(
    config: LlavaConfig,
    budgets: Sequence[int],
    batches: Sequence[int],
    rates: Rates,
    text_tokens: int,
    bytes_per_value: int,
) -> str:
    """Return the least milliseconds before the first token and per decoded token, as Markdown."""
    head = (
        f"Floor at {rates.flops / 1e12:g} TFLOP/s and {rates.bytes / 1e9:g} GB/s ({rates.source}); x: how many times "
        "lower than stock's"
    )
    columns = "batch|visual tokens|first token ms|x|prefill ms|bound by|decode ms per token"
    lines = []
    weights = weight_bytes(config, bytes_per_value)
    for batch in batches:
        common = (rates, batch, text_tokens, 2, bytes_per_value, weights)
        stock = floors(config, STOCK, 0, *common)
        for kept in budgets:
            row = STOCK if kept == patches_of(config) else OURS
            floor = floors(config, row, kept, *common)
            bound = "weights" if weights["prefill"] / rates.bytes >= floor["prefill"] else "operations"
            first, prefill, decode = (f"{1e3 * floor[stage]:.3g}" for stage in ("ttft", "prefill", "decode"))
            lines.append([batch, kept, first, f"{stock['ttft'] / floor['ttft']:.2f}", prefill, bound, decode])
    return f"{head}\n\n{markdown_table(columns, lines)}"


def efficiency_table(result: dict[str, Any], rates: Rates | None = None) -> str:
    """Return floor / measured for every row of a latency result, as Markdown; without rates, at those it measured."""
    if rates is None:
        probe = result["probe"]
        rates = Rates(probe["flops_per_second"], probe["bytes_per_second"], "measured by latency.py on that machine")
    size = torch.empty(0, dtype=getattr(torch, result["dtype"])).element_size()
    head = (
        f"{result['device_name']}, {result['dtype']}: floor / measured in %, at {rates.flops / 1e12:.3g} TFLOP/s and "
        f"{rates.bytes / 1e9:.3g} GB/s ({rates.source}); x: stock / row"
    )
    columns = "batch|depth|visual tokens|row|vision|prefill|decode|first token|x floor|x seen|share"
    lines = []
    for setting in result["settings"]:
        config = config_from_dict(setting["config"])
        weights, ttft = weight_bytes(config, size), {}
        for row in setting["rows"]:
            common = (rates, setting["batch"], result["text_tokens"], result["new_tokens"], size, weights)
            stock = floors(config, STOCK, 0, *common)
            floor = floors(config, row["row"], row["visual_token_num"], *common)
            seconds = {name: spread["median"] for name, spread in row["seconds"].items()}
            ttft.setdefault(STOCK, seconds["ttft"])
            shares = [f"{100 * floor[s] / seconds[s]:.0f}" for s in ("vision", "prefill", "decode", "ttft")]
            ideal, reached = stock["ttft"] / floor["ttft"], ttft[STOCK] / seconds["ttft"]
            depth = "full" if setting["depth_divisor"] == 1 else f"1/{setting['depth_divisor']}"
            names = [setting["batch"], depth, row["visual_token_num"], row["row"]]
            lines.append([*names, *shares, f"{ideal:.2f}", f"{reached:.2f}", f"{100 * reached / ideal:.0f} %"])
    return f"{head}\n\n{markdown_table(columns, lines)}"


def ceilings_record() -> dict[str, Any]:
    """Return what pruning can give each released model at most, for one picture at every ratio of `RATIOS`."""
    models = {}
    for name in RELEASED:
        base = released_base(name)
        models[name] = {str(ratio): asdict(ceiling_at(base, ratio)) for ratio in RATIOS}
        stage = halfway(base, STAGED[1])
        models[name]["staged"] = None if stage is None else asdict(ceiling_at(base, STAGED[0], stage))
    return {"text_tokens": TEXT_TOKENS, "models": models}


def ceilings_table(record: dict[str, Any]) -> str:
    """Return the table of `ceilings_record` as Markdown."""
    staged = f"{STAGED[0]:.0%}, and {1 - STAGED[1]:.0%} leave halfway"
    at_ratios = [f"{ratio:.0%}" for ratio in RATIOS]
    columns = ["model", "visual tokens", "encoder", *at_ratios, "none", staged, "KV cache left"]
    lines = []
    for name, of_ratio in record["models"].items():
        one = of_ratio[str(RATIOS[0])]
        full, encoder, none = one["visual_tokens"][0], one["encoder"], one["none"]
        gains = [f"{of_ratio[str(ratio)]['first_token']:.1f}x" for ratio in RATIOS]
        caches = " / ".join(f"{of_ratio[str(ratio)]['cache']:.0%}" for ratio in RATIOS)
        halved = "refused" if of_ratio["staged"] is None else f"{of_ratio['staged']['first_token']:.1f}x"
        lines.append([name, f"{full:,}", f"{encoder:.0%}", *gains, f"{none:.1f}x", halved, caches])
    return markdown_table(columns, lines)


def capacity_table(gpu_bytes: int = 80 * 10**9, share: float = 0.92, keep_ratio: float = 0.25) -> str:
    """Return as Markdown what a picture takes of a serving engine's KV cache, in 16 bits, and how many fit a GPU.

    The cache has what `share` of the GPU's bytes leaves beside the weights; each picture comes with `TEXT_TOKENS`.
    """
    fitting = f"pictures in {gpu_bytes / 1e9:.0f} GB, before and after"
    picture = "KV of a picture, before and after"
    columns = ["model", "KV per token", f"visual tokens, {keep_ratio:.0%}", picture, fitting]
    lines = []
    for name, (model_type, _) in RELEASED.items():
        if model_type not in ENCODERS:
            continue
        base = released_base(name)
        config, text = base.config, base.config.get_text_config()
        counts = tuple(map(round, ceiling_at(base, keep_ratio).visual_tokens))
        head = text.vocab_size * text.hidden_size  # where it is the embedding, room for some more pictures is left
        weights = 2 * (sum(weight.numel() for weight in base.parameters()) + head)
        token = kv_cache_bytes(config, 1)
        fit = [int((share * gpu_bytes - weights) / (token * (TEXT_TOKENS + count))) for count in counts]
        cells = [
            f"{token / 1000:.0f} kB",
            " → ".join(f"{count:,}" for count in counts),
            " → ".join(f"{token * count / 1e6:.0f} MB" for count in counts),
            " → ".join(f"{count:,}" for count in fit),
        ]
        lines.append([name, *cells])
    return markdown_table(columns, lines)


def check(config: LlavaConfig, budgets: Sequence[int], text_tokens: int) -> list[str]:
    """Compare every stage of every row with FlopCounterMode; return the differences."""
    different = []
    for row in MODEL_CLASSES:
        for kept in budgets if row != STOCK else budgets[:1]:
            expected = stage_flops(config, row, kept, text_tokens=text_tokens)
            counted = counted_stage_flops(config, row, kept, text_tokens=text_tokens)
            different += [
                f"{row}, {kept} tokens, {stage}: {expected[stage]} by formula, {counted[stage]} counted"
                for stage in STAGES
                if expected[stage] != counted[stage]
            ]
    return different


# The command line


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python benchmarks/flops.py --device h200                  what an H200 could do at best\n"
        "  python benchmarks/flops.py --check --geometry tiny        formulas against PyTorch's counter\n"
        "  python benchmarks/flops.py --methods                      methods at equal cache, layer by layer\n"
        "  python benchmarks/flops.py --ceilings                     what pruning can give each model at most\n"
        "  python benchmarks/flops.py --capacity                     how many pictures the KV cache of a GPU holds\n"
        "  python benchmarks/flops.py --latency benchmarks/results/latency-....json    how close a run came",
    )
    parser.add_argument(
        "--geometry",
        default="llava-1.5-7b",
        metavar="NAME",
        help=f"{', '.join(GEOMETRIES)}, or the config.json of a LLaVA-1.5 model (default: %(default)s)",
    )
    parser.add_argument("--tokens", nargs="+", type=int, metavar="T", help="visual tokens kept (default: 576 ... 16)")
    parser.add_argument(
        "--methods",
        nargs="*",
        choices=[*ALL_WITH_ALL, VISPRUNER, *IN_LAYERS],
        metavar="NAME",
        help="compare methods at equal KV cache instead, by default vispruner and those in the language model",
    )
    parser.add_argument("--text-tokens", type=int, default=TEXT_TOKENS, metavar="N", help="default: %(default)s")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], metavar="B", help="default: 1 8")
    parser.add_argument("--bytes-per-value", type=int, default=2, metavar="N", help="2: fp16, bf16; 4: fp32")
    parser.add_argument("--device", choices=DEVICES, help="rates from a public data sheet, for the roofline")
    parser.add_argument("--flops-per-second", type=float, metavar="X", help="rates of any other device, e.g. 8e11 ...")
    parser.add_argument("--bytes-per-second", type=float, metavar="X", help="... and 3e10; both or neither")
    parser.add_argument("--check", action="store_true", help="compare with FlopCounterMode on meta tensors (a minute)")
    parser.add_argument("--ceilings", action="store_true", help="what pruning can give each released model at most")
    parser.add_argument("--capacity", action="store_true", help="how many pictures the KV cache of a GPU holds")
    parser.add_argument(
        "--json", type=output_file(".json"), metavar="FILE", help="with --ceilings: write them there, too"
    )
    parser.add_argument("--latency", type=Path, metavar="FILE", help="a result of latency.py: print floor / measured")
    parsed = parser.parse_args(arguments)
    if (parsed.flops_per_second is None) != (parsed.bytes_per_second is None):
        parser.error("give both --flops-per-second and --bytes-per-second, or neither")
    if parsed.device is not None and parsed.flops_per_second is not None:
        parser.error("give either --device or the two rates")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    rates = DEVICES[parsed.device] if parsed.device else None
    if parsed.flops_per_second is not None:
        rates = Rates(parsed.flops_per_second, parsed.bytes_per_second, "as given")
    if parsed.ceilings:
        record = ceilings_record()
        print(ceilings_table(record))
        if parsed.json is not None:
            write_record(parsed.json, record)
        return 0
    if parsed.capacity:
        print(capacity_table())
        return 0
    if parsed.latency is not None:
        print(efficiency_table(read_json(parsed.latency), rates))
        return 0
    try:
        config = load_geometry(parsed.geometry)
    except ValueError as error:
        print(f"flops.py: {error}", file=sys.stderr)
        return 2
    budgets = sorted(parsed.tokens or budgets_of(config), reverse=True)
    if parsed.methods is not None:
        halves = [patches_of(config) // 2, 3 * patches_of(config) // 8]
        methods = parsed.methods or [VISPRUNER, *IN_LAYERS]
        try:
            print(methods_table(config, methods, parsed.tokens or halves, parsed.text_tokens, parsed.bytes_per_value))
        except ValueError as error:  # a mean that cannot be met
            print(f"flops.py: {error}", file=sys.stderr)
            return 2
        return 0
    print(flops_table(config, budgets, parsed.text_tokens, parsed.bytes_per_value))
    if rates is not None:
        print()
        print(roofline_table(config, budgets, parsed.batch, rates, parsed.text_tokens, parsed.bytes_per_value))
    if parsed.check:
        different = check(config, budgets, parsed.text_tokens)
        print("\n" + ("\n".join(different) or "Every stage of every row equals what FlopCounterMode counts."))
        return 1 if different else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
