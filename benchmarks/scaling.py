"""Measure how the cost of choosing visual tokens grows with their number and with the number of images.

Every method chooses a quarter of N tokens (--kept 4) on one thread of a CPU. Its measure is one product of all rows
with all rows, N x N x C in float32, which any method that compares all tokens needs: both are run in turn, and a
ratio is taken within a turn. Times are of the processor, so that waiting for it on a busy machine does not count.

products    multiplications in matrix products, as a share of N x N x C: the same on every machine
operations  of torch, less views; what numpy does in between is not counted
peak MiB    memory beyond the inputs, as the operating system saw it, of a process that does nothing else (Linux only)
exponent    of N in a power of N fitted to the times of all sizes; of N^2.2 the double takes 4.6 times as long

Then, each for one setting:
  images     time of B small images together, against B times one (--batches)
  attention  what reading the attention that patches receive takes, against one SDPA call of that layer: heads of
             Qwen2.5-VL's encoder, of which --heads are measured
  first token   the share of choosing in the time to the first token of Qwen2.5-VL-7B, whose operations are computed
             and taken to run as fast as the product did

What methods are given is drawn at random: "random" rows without structure, or "smooth" ones, whose neighbours resemble
each other as in photos. Projected features are as wide as the others here (--width gives another width).

Examples:
  python benchmarks/scaling.py --quick                               # a look at every table, some seconds
  python benchmarks/scaling.py --sizes 576 2592 --methods vispruner scope
  python benchmarks/scaling.py --json out.json --plot out.png        # the recorded run, an hour
  python benchmarks/scaling.py --memory out.json --methods scope     # measure peak MiB anew, in that record
"""

from __future__ import annotations

import argparse
import ctypes
import math
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import Qwen2_5_VLConfig

sys.path.insert(0, str(Path(__file__).parent))
from outputs import output_file
from records import write_record
from selection import FEATURE_LAYER, HEAD, LAYERS, PROTOTYPES, WORDS, Form, interleave, machine, summary
from tables_and_plots import BLACK, markdown_table, new_figure, save_figure

from vispruner.conversion.checkpoint_io import read_json
from vispruner.conversion.prefill_cost import language_model_flops, logits_flops
from vispruner.selectors import ENCODER_METHODS, SELECTORS, select_tokens
from vispruner.visual_attention import received_attention

PRODUCT = "the product"
SIZES = [256, 576, 1296, 2592, 5184, 10368, 16384]
# What chooses behind the encoder; some go on in the language model, which is not measured here.
MEASURABLE = (*ENCODER_METHODS, *(name for name, selector in SELECTORS.items() if selector.then is not None))
BARS = {5184: 4, 10368: 6}  # most times the product that a method may take, and the exponent at most
MOST_EXPONENT = 2.2
QUICK = {"sizes": [64, 128, 256], "channels": 64, "repeats": 1, "batches": [1, 4], "patches": [64, 256], "heads": 1}
FIRST_TOKEN_SIZE = 5184
FEWEST_SHOWN = 576  # tokens, in the documentation


# Inputs


def smooth(tokens: int, channels: int, generator: torch.Generator) -> torch.Tensor:
    """Draw rows (N, C) whose neighbours in a square resemble each other, with some noise."""
    side = math.isqrt(tokens - 1) + 1
    coarse = torch.randn(1, channels, 6, 6, generator=generator)
    fine = F.interpolate(coarse, (side, side), mode="bilinear").flatten(2).mT[0, :tokens]
    return fine + 0.3 * torch.randn(fine.shape, generator=generator)


def inputs(batch: int, tokens: int, args: argparse.Namespace, features: str) -> dict[str, Any]:
    """Return all that any method takes, for B images of N tokens."""
    generator = torch.Generator().manual_seed(args.seed)

    def rows(width: int) -> torch.Tensor:
        if features == "random":
            return torch.randn(batch, tokens, width, generator=generator)
        return torch.stack([smooth(tokens, width, generator) for _ in range(batch)])

    given = {"features": rows(args.channels), "saliency": torch.rand(batch, tokens, generator=generator)}
    width = args.width or args.channels
    given["projected"] = given["features"] if width == args.channels else rows(width)
    columns = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    return given | {
        "codebook": torch.randn(PROTOTYPES, width, generator=generator),
        "grid": (tokens // columns, columns),
        "seed": args.seed,
        "visual_token_num": max(1, tokens // args.kept),
        "keys": rows(HEAD),
        "cls_query": torch.randn(batch, args.channels, generator=generator),
        "raw_keys": given["features"],
        "text": torch.randn(batch, WORDS, width, generator=generator),
        "text_saliency": torch.zeros(batch, WORDS),
        "cls_feature": torch.randn(batch, args.channels, generator=generator),
    }


def form_of(method: str, given: dict[str, Any]) -> Form:
    wanted = SELECTORS[method].saliency_layers
    if wanted is not None:
        batch, tokens = given["saliency"].shape
        layers = torch.rand(batch, len(wanted(LAYERS, FEATURE_LAYER)), tokens, generator=torch.Generator())
        given = given | {"layer_saliency": layers}
    return lambda: select_tokens(method, **given)


# What can be counted


class Counts(TorchDispatchMode):
    """While active, count the operations that compute or copy something, and multiplications in matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.multiplications = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = [value.alias_info for value in operation._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        name = operation._schema.name
        self.operations += not is_view and "empty" not in name
        if name in ("aten::mm", "aten::bmm", "aten::matmul"):
            self.multiplications += args[0].numel() * args[1].shape[-1]
        return operation(*args, **(kwargs or {}))


class PeakMemory:
    """While active, let the operating system note the most memory this process had beyond what it began with."""

    mib: float | None = None

    def __enter__(self) -> PeakMemory:
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # else what was freed earlier would be taken again unseen
            Path("/proc/self/clear_refs").write_text("5")
            self._before = self._read("VmRSS")
        return self

    def __exit__(self, *exception: Any) -> None:
        if sys.platform == "linux":
            self.mib = round((self._read("VmHWM") - self._before) / 1024, 1)

    def _read(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def peak_of(form: Form) -> float | None:
    """Return the most memory that a call takes in a process forked for it: nothing freed before lies about there."""
    if sys.platform != "linux":
        return None
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)

    def run() -> None:
        with PeakMemory() as memory:
            form()
        there.send(memory.mib)

    process = fork.Process(target=run)
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise SystemExit("a process whose memory was measured ended early; was it killed for it?") from None
    finally:
        process.join()


# Sizes


def measure_sizes(args: argparse.Namespace, features: str) -> list[dict[str, Any]]:
    rows = []
    runs = len(args.sizes) * (args.repeats + 2) * (len(args.methods) + 1)
    with tqdm(total=runs, desc=f"{features} features", unit="run") as progress:
        for tokens in args.sizes:
            given = inputs(1, tokens, args, features)
            matrix = given["features"][0]
            forms: dict[str, Form] = {PRODUCT: lambda x=matrix: x @ x.T}
            forms |= {method: form_of(method, given) for method in args.methods}
            counted = {}
            for name, form in forms.items():
                progress.set_postfix_str(f"{tokens} tokens, {name}", refresh=False)
                with Counts() as counts:
                    form()
                counted[name] = counts, peak_of(form)
                progress.update()
            times = interleave(forms, args.repeats, progress, "cpu", time.process_time)
            rows.append(_size_row(tokens, given, counted, times))
    return rows


def _size_row(tokens: int, given: dict[str, Any], counted: dict[str, Any], times: dict[str, list]) -> dict[str, Any]:
    whole = tokens**2 * given["features"].shape[-1]
    return {
        "tokens": tokens,
        "kept": given["visual_token_num"],
        "milliseconds": {name: summary(values) for name, values in times.items()},
        "ratio": {
            name: summary([value / product for value, product in zip(values, times[PRODUCT], strict=True)])
            for name, values in times.items()
            if name != PRODUCT
        },
        "products": {name: round(counts.multiplications / whole, 3) for name, (counts, _) in counted.items()},
        "operations": {name: counts.operations for name, (counts, _) in counted.items()},
        "peak_mib": {name: mib for name, (_, mib) in counted.items()},
    }


def exponents(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Fit the exponent of N to the times of each method by least squares of the logarithms."""
    if len(rows) < 2:
        return {}
    sizes = [math.log(row["tokens"]) for row in rows]
    return {
        name: round(
            statistics.linear_regression(
                sizes, [math.log(max(row["milliseconds"][name]["median"], 1e-4)) for row in rows]
            ).slope,
            2,
        )
        for name in rows[0]["milliseconds"]
    }


def measure_memory(record: dict[str, Any], args: argparse.Namespace) -> None:
    """Put the peaks of some methods into a record, all else of which stays; say when and with what."""
    settings = argparse.Namespace(**record["settings"])
    rows = [(kind, row) for kind, rows in record["sizes"].items() for row in rows]
    for kind, row in tqdm(rows, desc="memory", unit="size"):
        given = inputs(1, row["tokens"], settings, kind)
        for method in args.methods:
            row["peak_mib"][method] = peak_of(form_of(method, given))
    about = {
        "methods": list(args.methods),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    record["peak_mib_measured_again"] = about


# Images, attention, and the first token


def measure_batches(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time many small images together, against as many times one."""
    rows = []
    runs = len(args.batch_sizes) * (args.repeats + 1) * len(args.methods) * len(args.batches)
    with tqdm(total=runs, desc="images", unit="run") as progress:
        for tokens in args.batch_sizes:
            forms = {}
            for batch in args.batches:
                given = inputs(batch, tokens, args, "random")
                forms |= {(method, batch): form_of(method, given) for method in args.methods}
            times = interleave(forms, args.repeats, progress, "cpu", time.process_time)  # type: ignore[arg-type]
            medians = {name: statistics.median(values) for name, values in times.items()}
            rows += [
                {
                    "tokens": tokens,
                    "images": batch,
                    "milliseconds": {method: round(medians[method, batch], 4) for method in args.methods},
                }
                for batch in args.batches
            ]
    return rows


def measure_attention(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time reading the attention that patches receive, against one call of the layer's own attention."""
    rows = []
    generator = torch.Generator().manual_seed(args.seed)
    with tqdm(total=2 * len(args.patches) * (args.repeats + 1), desc="attention", unit="run") as progress:
        for patches in args.patches:
            q, k, v = torch.randn(3, 1, args.heads, patches, 80, generator=generator)
            forms: dict[str, Form] = {
                "sdpa": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
                "received": lambda q=q, k=k: received_attention(q, k),
            }
            with PeakMemory() as memory:
                forms["received"]()
            times = interleave(forms, args.repeats, progress, "cpu", time.process_time)
            pairs = zip(times["received"], times["sdpa"], strict=True)
            rows.append(
                {"patches": patches, "heads": args.heads, "peak_mib": memory.mib}
                | {"milliseconds": {name: summary(values) for name, values in times.items()}}
                | {"ratio": summary([received / sdpa for received, sdpa in pairs])}
            )
    return rows


def first_token_flops(tokens: int, kept: int, text_tokens: int = 64) -> int:
    """Return the operations of Qwen2.5-VL-7B up to the first token: encoder, merger, language model, logits."""
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064}
    config = Qwen2_5_VLConfig(text_config=text | {"num_attention_heads": 28, "num_key_value_heads": 4})
    patches, width, mlp, layers, whole, window = 4 * tokens, 1280, 3420, 32, 4, 64
    weights = 4 * width**2 + 3 * width * mlp
    attention = 4 * width * patches * (whole * patches + (layers - whole) * window)
    merger = 2 * tokens * (4 * width) * (4 * width + text["hidden_size"])
    encoder = 2 * patches * weights * layers + attention + merger
    return encoder + language_model_flops(config, kept + text_tokens) + logits_flops(config)


def first_token(args: argparse.Namespace, row: dict[str, Any]) -> dict[str, Any]:
    """Say which share of the time to the first token choosing is, if all else ran as fast as the product."""
    flops = first_token_flops(row["tokens"], row["kept"])
    rest = flops / (2 * row["tokens"] ** 2 * args.channels)  # in products
    shares = {method: ratio["median"] / (ratio["median"] + rest) for method, ratio in row["ratio"].items()}
    return {
        "model": "Qwen2.5-VL-7B",
        "tokens": row["tokens"],
        "kept": row["kept"],
        "gflop": round(flops / 1e9),
        "share": {method: round(share, 5) for method, share in shares.items()},
    }


# The report


def print_tables(result: dict[str, Any]) -> None:
    for features, rows in result["sizes"].items():
        print(f"\nTimes as long as the product of all rows with all rows; {features} features")
        sizes = [f"{row['tokens']:>8}" for row in rows]
        last, fitted = rows[-1], result["exponents"][features]
        print(f"{'N':14}" + "".join(sizes) + f"  exponent  and at {last['tokens']}: products operations peak MiB")
        for name in last["milliseconds"]:
            middle = [row["milliseconds"][name] if name == PRODUCT else row["ratio"][name] for row in rows]
            cells = "".join(f"{value['median']:8.2f}" for value in middle)
            peak = last["peak_mib"][name]
            print(
                f"{name + (', ms' if name == PRODUCT else ''):15}{cells}{fitted.get(name, math.nan):10.2f}"
                f"{last['products'][name]:22.2f}{last['operations'][name]:11d}{'' if peak is None else peak:>9}"
            )
    for tokens in sorted({row["tokens"] for row in result["batches"]}):
        rows = [row for row in result["batches"] if row["tokens"] == tokens]
        print(f"\nMilliseconds for images of {tokens} tokens, all together")
        print(f"{'images':14}" + "".join(f"{row['images']:>9}" for row in rows))
        for name in rows[0]["milliseconds"]:
            print(f"{name:14}" + "".join(f"{row['milliseconds'][name]:9.2f}" for row in rows))
    print()
    for row in result["attention"]:
        print(
            f"{row['patches']} patches: reading the attention they receive takes {row['ratio']['median']:.2f} times "
            f"the layer's own, and {row['peak_mib']} MiB"
        )
    if share := result["first_token"]:
        cells = [f"{name} {part:.2%}" for name, part in share["share"].items()]
        print(f"\nof the first token's time, {share['model']}, {share['tokens']} tokens: " + "  ".join(cells))


def markdown(result: dict[str, Any]) -> str:
    """Return the table of the docs: how many times the product each method takes, random / smooth features."""
    kinds = list(result["sizes"].values())
    last = kinds[0][-1]["tokens"]
    places = [place for place, row in enumerate(kinds[0]) if row["tokens"] >= FEWEST_SHOWN]
    heads = ["method", *(f"{kinds[0][place]['tokens']:,}" for place in places), "exponent", f"MiB at {last:,}"]
    lines = []
    for method in kinds[0][-1]["ratio"]:
        cells = [" / ".join(f"{rows[place]['ratio'][method]['median']:.2g}" for rows in kinds) for place in places]
        cells.append(" / ".join(f"{fitted[method]:.1f}" for fitted in result["exponents"].values()))
        cells.append(f"{max(rows[-1]['peak_mib'][method] or 0 for rows in kinds):.0f}")
        lines.append([f"`{method}`", *cells])
    return markdown_table(heads, lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw seconds and times the product against the number of tokens, both axes logarithmic."""
    features, rows = next(iter(result["sizes"].items()))
    sizes = [row["tokens"] for row in rows]
    figure = new_figure(figsize=(11, 4.4), layout="tight")
    left, right = figure.subplots(1, 2)
    for name in rows[0]["milliseconds"]:
        seconds = [row["milliseconds"][name]["median"] / 1000 for row in rows]
        style = {"color": BLACK, "linestyle": "--"} if name == PRODUCT else {"marker": "o", "markersize": 3}
        (line,) = left.plot(sizes, seconds, label=name, **style)
        if name != PRODUCT:
            right.plot(
                sizes, [row["ratio"][name]["median"] for row in rows], marker="o", markersize=3, color=line.get_color()
            )
    for tokens, most in BARS.items():
        right.plot([tokens], [most], marker="_", markersize=18, color=BLACK)
    right.axhline(1, color=BLACK, linestyle="--", linewidth=1)
    for axis, label in ((left, "seconds, one thread"), (right, "times one N x N x C product; bars: at most")):
        axis.set(xscale="log", yscale="log", xlabel="visual tokens N, a quarter kept", ylabel=label)
        axis.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    left.legend(fontsize=7)
    figure.suptitle(f"{features} features, C = {result['settings']['channels']}, {result['machine']['device_name']}")
    save_figure(figure, path)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help=f"N (default {SIZES})")
    parser.add_argument("--kept", type=int, default=4, help="keep one of so many tokens (default 4)")
    parser.add_argument("--channels", type=int, default=1280, help="C, width of the features (default 1280)")
    parser.add_argument("--width", type=int, help="width of projected features (default: the same)")
    parser.add_argument("--features", nargs="+", choices=["random", "smooth"], default=["random", "smooth"])
    parser.add_argument(
        "--methods", nargs="+", choices=sorted(MEASURABLE), default=list(ENCODER_METHODS), metavar="METHOD"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each form (default 3)")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 64], help="images at once (default 1 8 64)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 256], help="their tokens (default 64 256)")
    parser.add_argument(
        "--patches", type=int, nargs="*", default=[1024, 4096, 16384, 40000], help="that receive attention"
    )
    parser.add_argument("--heads", type=int, default=2, help="of the encoder that are measured (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    parser.add_argument("--quick", action="store_true", help="small sizes, once, to see that all works")
    parser.add_argument("--json", type=output_file(".json"), help="write all numbers here")
    parser.add_argument("--memory", type=Path, metavar="RECORD", help="measure peak memory alone, into this record")
    parser.add_argument("--plot", type=output_file(".png"), help="draw the times here, as PNG")
    args = parser.parse_args(arguments)
    if args.quick:
        vars(args).update(QUICK)
    if min(args.sizes) < 4 or args.kept < 2 or min(args.repeats, args.threads, args.heads, args.channels) < 1:
        parser.error("--sizes must be at least 4, --kept at least 2, and all other counts at least 1")
    args.sizes = sorted(set(args.sizes))
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "memory", "plot")}
    if args.memory:
        record = read_json(args.memory)
        with torch.inference_mode():
            measure_memory(record, args)
        write_record(args.memory, record)
        return
    about = machine(argparse.Namespace(device="cpu"))
    with torch.inference_mode():
        sizes = {features: measure_sizes(args, features) for features in args.features}
        result: dict[str, Any] = {
            "machine": about,
            "settings": settings,
            "sizes": sizes,
            "exponents": {features: exponents(rows) for features, rows in sizes.items()},
            "batches": measure_batches(args) if args.batches else [],
            "attention": measure_attention(args),
        }
    wanted = [row for row in sizes[args.features[0]] if row["tokens"] == FIRST_TOKEN_SIZE]
    result["first_token"] = first_token(args, wanted[0]) if wanted else None
    result["machine"]["load_average_after"] = [round(load, 2) for load in os.getloadavg()]
    print_tables(result)
    if args.json:
        write_record(args.json, result)
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
