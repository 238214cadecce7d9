"""Measure what choosing the visual tokens costs, against comparing them anew in every round as research code does.

Runs are interleaved: every repeat runs each form once, in turn, so that a noisy machine troubles all of them alike. A
ratio is taken within a repeat, and its median reported. All forms must choose the same tokens before they are timed.

per round   the reference: all images at once, and in each round the similarities of the tokens still in
ours        `select_vispruner` as it runs on this device
tensors     `select_vispruner` where it compiles into one graph or finds no Triton: similarities once, rounds as tensor
            operations
Stages (--stages) time the parts of `ours` on a CPU beside what they replaced:
  normalise     norms, the check that they are finite, and the residual tokens divided by them
  product       the matrix of similarities; "whole" multiplies all of it, ours one half
  rounds        index arithmetic; "gather" reads each round's pairs as a tensor operation
The study (--study) asks whether the product could be smaller still. It draws smooth images, counts which pairs the
rounds ever compared, and by how much the choice changes with less work: bfloat16, fewer channels, larger rounds.

The methods (--methods, instead of all that) are every registered one at the first of the budgets, with the inputs
that a CLIP tower of 24 layers and a language model --width wide would give. On a CPU it is the time of the processor,
so that waiting for it on a busy machine does not count. What methods are given is not timed: those that compare
projected features have all tokens projected first. "operations" are those of torch on meta tensors, less views: about
the kernels that a GPU is given where nothing is compiled.

Against an earlier version (--against FOLDER, its `modeling/`, instead of all that), its `select_vispruner` and this
one choose in turn, in one process, and must choose the same. On a CPU it is the time of the processor, too; the ratio
is ours to theirs.

Examples:
  python benchmarks/selection.py                                    # the recorded run, about five minutes
  python benchmarks/selection.py --batches 1 --repeats 5            # a first look
  python benchmarks/selection.py --stages --study --json out.json
  python benchmarks/selection.py --methods --budgets 64 --json methods.json
  git archive COMMIT modeling | tar -x -C earlier && python benchmarks/selection.py --against earlier/modeling
  python benchmarks/selection.py --device cuda --dtype float16
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from outputs import output_file
from peer import select_per_round
from records import write_record

from vispruner import duplicate_removal, similarity, token_selection
from vispruner.duplicate_removal import drops_of_rounds
from vispruner.duplicate_removal_triton import kernel_can_run
from vispruner.selector_inputs import most_attended_first
from vispruner.selectors import ENCODER_METHODS, SELECTORS, select_tokens
from vispruner.token_selection import select_vispruner

IMPORTANT_RATIO, STEP = 0.5, 8
LAYERS, FEATURE_LAYER = 24, 22  # of LLaVA's tower, counted from 0
PROTOTYPES = 64
HEAD = 64  # width of the keys, mean over heads
WORDS = 16  # of a question
Form = Callable[[], Any]


def select_by_tensors(features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int) -> torch.Tensor:
    """Choose as `select_vispruner` does while it is compiled."""
    important_num = int(visual_token_num * IMPORTANT_RATIO)
    order = most_attended_first(saliency)
    drops = drops_of_rounds(order.shape[1] - important_num, visual_token_num - important_num, STEP)
    cosine = cosine_matrix(features, order[:, important_num:])
    slots = duplicate_removal.slots_left(duplicate_removal._compare_in(cosine), order[:, important_num:], drops)
    diverse = order[:, important_num:].gather(1, slots)
    return torch.cat([order[:, :important_num], diverse], dim=-1).sort(dim=-1).values


def cosine_matrix(features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    unit = similarity.unit_rows(features, similarity.norms_of(features), tokens)
    return similarity.cosines(unit, unit)


# Timing


def interleave(
    forms: dict[str, Form], repeats: int, progress: tqdm, device: str, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Run every form in turn, once to warm up and then `repeats` times; return milliseconds by form."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for repeat in range(repeats + 1):
        for name, form in forms.items():
            _wait(device)
            start = clock()
            form()
            _wait(device)
            if repeat:
                times[name].append((clock() - start) * 1000)
            progress.update()
    return times


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    quarter = len(ordered) // 4
    spread = {"min": ordered[0], "lower_quartile": ordered[quarter], "median": statistics.median(ordered)}
    spread |= {"upper_quartile": ordered[-1 - quarter], "max": ordered[-1]}
    return {name: round(value, 4) for name, value in spread.items()}


def draw(batch: int, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(args.seed)
    features = torch.randn(batch, args.tokens, args.channels, generator=generator)
    saliency = torch.rand(batch, args.tokens, generator=generator)
    dtype = getattr(torch, args.dtype)
    return features.to(args.device, dtype), saliency.to(args.device)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the forms for every batch size and budget."""
    rows = []
    total = len(args.batches) * len(args.budgets) * (args.repeats + 1) * 3
    with tqdm(total=total, desc="selections", unit="run") as progress:
        for batch in args.batches:
            features, saliency = draw(batch, args)
            for budget in args.budgets:
                forms: dict[str, Form] = {
                    "per round": lambda f=features, s=saliency, t=budget: select_per_round(f, s, t),
                    "ours": lambda f=features, s=saliency, t=budget: select_vispruner(f, s, t, dedup_step=STEP),
                    "tensors": lambda f=features, s=saliency, t=budget: select_by_tensors(f, s, t),
                }
                same = _same_choice(forms, args)
                times = interleave(forms, args.repeats, progress, args.device)
                pairs = zip(times["per round"], times["ours"], strict=True)
                rows.append(
                    {"batch": batch, "visual_token_num": budget, "same_tokens": same}
                    | {"milliseconds": {name: summary(values) for name, values in times.items()}}
                    | {"ratio": summary([reference / ours for reference, ours in pairs])}
                )
    return rows


def _same_choice(forms: dict[str, Form], args: argparse.Namespace) -> bool:
    """Demand the same tokens of every form, where rounding cannot tell them apart: in float32 on a CPU."""
    chosen = {name: form() for name, form in forms.items()}
    same = all(torch.equal(kept, chosen["per round"]) for kept in chosen.values())
    if not same and args.device == "cpu" and args.dtype in ("float32", "float64"):
        raise SystemExit("the forms chose different tokens; nothing was timed")
    return same


def measure_stages(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the parts of the CPU's form for one image."""
    features, saliency = draw(1, args)
    rows = []
    for budget in tqdm(args.budgets, desc="stages", unit="budget"):
        important_num = budget // 2
        residual = most_attended_first(saliency)[:, important_num:]
        drops = drops_of_rounds(residual.shape[1], budget - important_num, STEP)
        norms = similarity.norms_of(features)
        unit = (features / norms)[0, residual[0]]
        rounded, cosine, half = unit.bfloat16(), unit @ unit.T, unit.new_empty(len(unit), len(unit))
        values = cosine.float().numpy()
        stages: dict[str, Form] = {
            "normalise": lambda r=residual: features[0, r[0]].div_(similarity.norms_of(features)[0, r[0]]),
            "product, whole": lambda x=unit: x @ x.T,
            "product": lambda x=unit[None], out=half[None]: similarity.fill_with_cosines(x, out),
            "product, bfloat16": lambda x=rounded: x @ x.T,
            "rounds, gather": lambda c=cosine[None], r=residual, d=drops: duplicate_removal.slots_left(
                duplicate_removal._compare_in(c), r, d
            ),
            "rounds": lambda c=values, d=drops: duplicate_removal.slots_left_on_cpu(c, d),
        }
        with tqdm(total=len(stages) * (args.repeats + 1), leave=False, unit="run") as progress:
            times = interleave(stages, args.repeats, progress, "cpu")
        bits = torch.equal(half, cosine)
        rows.append(
            {"visual_token_num": budget, "rounds": len(drops), "half_product_equals_whole_bit_for_bit": bits}
            | {"milliseconds": {name: summary(values) for name, values in times.items()}}
        )
    return rows


# Every registered method


class Operations(TorchDispatchMode):
    """While active, count the operations that compute or copy something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = [value.alias_info for value in operation._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        self.count += not is_view and "empty" not in operation._schema.name
        return operation(*args, **(kwargs or {}))


def method_form(method: str, args: argparse.Namespace, device: str) -> Form:
    """Return a call of a method with all that it needs, drawn at random, on a device."""
    features, saliency = draw(1, args)
    generator = torch.Generator().manual_seed(args.seed)
    dtype, side = getattr(torch, args.dtype), int(args.tokens**0.5)
    read = SELECTORS[method].saliency_layers
    layers = 0 if read is None else len(read(LAYERS, FEATURE_LAYER))
    drawn = {
        "projected": torch.randn(1, args.tokens, args.width, generator=generator).to(dtype),
        "layer_saliency": torch.rand(1, layers, args.tokens, generator=generator),
        "codebook": torch.randn(PROTOTYPES, args.width, generator=generator).to(dtype),
        "keys": torch.randn(1, args.tokens, HEAD, generator=generator).to(dtype),
        "cls_feature": torch.randn(1, args.channels, generator=generator).to(dtype),
        "cls_query": torch.randn(1, args.channels, generator=generator).to(dtype),
        "raw_keys": torch.randn(1, 1 + args.tokens, args.channels, generator=generator).to(dtype),
        "text": torch.randn(1, WORDS, args.width, generator=generator).to(dtype),
        "text_saliency": torch.zeros(1, WORDS),
    }
    inputs: dict[str, Any] = {name: value.to(device) for name, value in drawn.items()}
    inputs |= {"grid": (side, args.tokens // side), "seed": args.seed}
    features, saliency = features.to(device), saliency.to(device)
    return lambda: select_tokens(method, features, saliency, args.budgets[0], **inputs)


def measure_methods(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time one image under every registered method, in turn, and count what each asks of torch."""
    forms = {method: method_form(method, args, args.device) for method in ENCODER_METHODS}
    with tqdm(total=len(forms) * (args.repeats + 1), desc="methods", unit="run") as progress:
        clock = time.process_time if args.device == "cpu" else time.perf_counter
        times = interleave(forms, args.repeats, progress, args.device, clock)
    rows = []
    for method, values in times.items():
        form = method_form(method, args, "meta")
        with Operations() as operations:
            form()
        rows.append(
            {"method": method, "visual_token_num": args.budgets[0], "needs": sorted(SELECTORS[method].needs)}
            | {"milliseconds": summary(values), "operations": operations.count}
        )
    return rows


# An earlier version


def earlier_selector(folder: Path) -> Callable[..., torch.Tensor]:
    """Return `select_vispruner` of the published files in a folder; the installed ones stay as they are."""
    package = ModuleType("earlier")
    package.__path__ = [str(folder)]
    sys.modules["earlier"] = package  # its files import each other by it
    return importlib.import_module("earlier.token_selection").select_vispruner


def measure_against(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the choice beside that of an earlier version, for every batch size and budget."""
    earlier = earlier_selector(args.against)
    rows = []
    total = len(args.batches) * len(args.budgets) * 2 * (args.repeats + 1)
    with tqdm(total=total, desc="selections", unit="run") as progress:
        for batch in args.batches:
            features, saliency = draw(batch, args)
            for budget in args.budgets:
                forms: dict[str, Form] = {
                    "earlier": lambda f=features, s=saliency, t=budget: earlier(f, s, t, dedup_step=STEP),
                    "ours": lambda f=features, s=saliency, t=budget: select_vispruner(f, s, t, dedup_step=STEP),
                }
                if not torch.equal(forms["earlier"](), forms["ours"]()):
                    raise SystemExit(f"the earlier version chose different tokens ({batch} images, {budget} kept)")
                clock = time.process_time if args.device == "cpu" else time.perf_counter
                times = interleave(forms, args.repeats, progress, args.device, clock)
                pairs = zip(times["ours"], times["earlier"], strict=True)
                rows.append(
                    {"batch": batch, "visual_token_num": budget}
                    | {"milliseconds": {name: summary(values) for name, values in times.items()}}
                    | {"ratio": summary([ours / theirs for ours, theirs in pairs])}
                )
    return rows


# Could the product be smaller?


def smooth_image(args: argparse.Namespace, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw features (1, N, C) whose neighbouring patches resemble each other, as in photos, and saliency (1, N)."""
    side = int(args.tokens**0.5)
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, args.channels, 6, 6, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear").flatten(2).mT
    return fine + 0.3 * torch.randn(fine.shape, generator=generator), torch.rand(1, side * side, generator=generator)


def pairs_compared(features: torch.Tensor, saliency: torch.Tensor, budget: int) -> float:
    """Return which share of the residual tokens' pairs any round compares."""
    residual = saliency.argsort(dim=-1, descending=True, stable=True)[0, budget // 2 :]
    unit = torch.nn.functional.normalize(features[0, residual], dim=-1)
    cosine = unit @ unit.T
    seen = torch.zeros_like(cosine, dtype=torch.bool)
    slots = torch.arange(len(residual))
    for drop in drops_of_rounds(len(residual), budget - budget // 2, STEP):
        a, b = slots[0::2], slots[1::2]
        seen[a[:, None], b[None, :]] = True
        ranking = cosine[a[:, None], b[None, :]].amax(dim=-1).argsort(descending=True, stable=True)
        slots = torch.cat([a[ranking[drop:]], b])
    return float((seen | seen.T).sum()) / (len(residual) * (len(residual) - 1))


def study(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Say by how much the choice of diverse tokens changes where the product costs less."""
    rows = []
    for budget in tqdm(sorted({*args.budgets, 256, 384, 512}, reverse=True), desc="study", unit="budget"):
        if budget >= args.tokens:
            continue
        shares, same = [], {"bfloat16": [], "256 channels": [], "step 16": [], "step 32": []}
        for seed in range(args.images):
            features, saliency = smooth_image(args, seed)
            shares.append(pairs_compared(features, saliency, budget))
            cheaper = {
                "bfloat16": select_vispruner(features.bfloat16(), saliency, budget, dedup_step=STEP),
                "256 channels": select_vispruner(features[..., :256], saliency, budget, dedup_step=STEP),
                "step 16": select_vispruner(features, saliency, budget, dedup_step=16),
                "step 32": select_vispruner(features, saliency, budget, dedup_step=32),
            }
            exact = select_vispruner(features, saliency, budget, dedup_step=STEP)
            important = set(token_selection.important_tokens(saliency, budget)[0].tolist())
            diverse = set(exact[0].tolist()) - important
            for name, kept in cheaper.items():
                same[name].append(len(diverse & set(kept[0].tolist())) / len(diverse))
        rows.append(
            {"visual_token_num": budget, "images": args.images, "pairs_ever_compared": statistics.mean(shares)}
            | {"diverse_tokens_in_common": {name: statistics.mean(values) for name, values in same.items()}}
        )
    return rows


# The report


def print_tables(result: dict[str, Any]) -> None:
    what = "processor time of each method, ms" if "methods" in result else "ms; the ratio is per round / ours"
    what = "ms; the ratio is ours / earlier" if "against" in result else what
    print(f"\n{what}: median (min to max)")
    for row in result.get("methods", []):
        print(f"{row['method']:15s} {_cell(row['milliseconds']):28s} {row['operations']:5d} operations")
    for row in result.get("against", []):
        cells = [f"{name} {_cell(times)}" for name, times in row["milliseconds"].items()]
        ratio, place = row["ratio"], f"B {row['batch']:3d}  T {row['visual_token_num']:3d}"
        print(
            f"{place}  {'  '.join(cells)}  {ratio['median']:.3f}x "
            f"({ratio['lower_quartile']:.3f} to {ratio['upper_quartile']:.3f}, the middle half)"
        )
    for row in result.get("selection", []):
        cells = [f"{name} {_cell(times)}" for name, times in row["milliseconds"].items()]
        ratio = row["ratio"]
        print(
            f"B {row['batch']:3d}  T {row['visual_token_num']:3d}  " + "  ".join(cells) + f"  {ratio['median']:.1f}x "
            f"({ratio['min']:.1f} to {ratio['max']:.1f})" + ("" if row["same_tokens"] else "  rounded differently")
        )
    for row in result.get("stages", []):
        cells = [f"{name} {_cell(times)}" for name, times in row["milliseconds"].items()]
        print(f"T {row['visual_token_num']:3d}  {row['rounds']} rounds  " + "  ".join(cells))
    for row in result.get("study", []):
        common = [f"{name} {share:.1%}" for name, share in row["diverse_tokens_in_common"].items()]
        print(
            f"T {row['visual_token_num']:3d}  pairs ever compared {row['pairs_ever_compared']:.1%}; diverse tokens in"
        )
        print("       common with the exact choice: " + ", ".join(common))


def _cell(times: dict[str, float]) -> str:
    return f"{times['median']:.2f} ({times['min']:.2f} to {times['max']:.2f})"


def machine(args: argparse.Namespace) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if args.device != "cpu" else torch.backends.cpu.get_cpu_capability()
    form = "loop" if args.device == "cpu" else "kernel" if kernel_can_run(torch.device(args.device)) else "tensors"
    return {
        "device": args.device,
        "device_name": name,
        "form": form,
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "load_average_before": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="images at once (default 1 16)")
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 64, 32], help="T (default 128 64 32)")
    parser.add_argument("--tokens", type=int, default=576, help="N, visual tokens of an image (default 576)")
    parser.add_argument("--channels", type=int, default=1024, help="C, the vision tower's width (default 1024)")
    parser.add_argument("--dtype", default="float32", choices=["float16", "bfloat16", "float32", "float64"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default 1)")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each form (default 15)")
    parser.add_argument("--seed", type=int, default=0, help="of the random features (default 0)")
    parser.add_argument("--methods", action="store_true", help="time every registered method instead")
    parser.add_argument("--width", type=int, default=4096, help="of projected features, for --methods (default 4096)")
    parser.add_argument(
        "--against", type=Path, metavar="FOLDER", help="time an earlier `modeling/` beside this instead"
    )
    parser.add_argument("--commit", help="of that earlier version, to be noted in the record")
    parser.add_argument("--stages", action="store_true", help="also time the parts of the CPU's form")
    parser.add_argument("--study", action="store_true", help="also ask whether the product could be smaller")
    parser.add_argument("--images", type=int, default=20, help="images in the study (default 20)")
    parser.add_argument("--json", type=output_file(".json"), help="write all numbers here")
    args = parser.parse_args(arguments)
    if max(args.budgets) >= args.tokens or min(args.budgets) < 1:
        parser.error("--budgets must lie between 1 and --tokens - 1: keeping every token selects nothing")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if args.against and (args.methods or not (args.against / "token_selection.py").is_file()):
        parser.error(f"--against, without --methods, takes the folder of token_selection.py, got {args.against}")
    if args.repeats < 1 or args.images < 1 or args.threads < 1:
        parser.error("--repeats, --images and --threads must be at least 1")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "against", "commit")}
    with torch.inference_mode():
        result: dict[str, Any] = {"machine": machine(args), "settings": settings}
        if args.methods:
            result["methods"] = measure_methods(args)
        elif args.against:
            result["earlier"] = args.commit
            result["against"] = measure_against(args)
        else:
            result["selection"] = measure(args)
            if args.stages and args.device == "cpu":
                result["stages"] = measure_stages(args)
            if args.study:
                result["study"] = study(args)
    result["machine"]["load_average_after"] = [round(load, 2) for load in os.getloadavg()]
    print_tables(result)
    if args.json:
        write_record(args.json, result)


if __name__ == "__main__":
    main(sys.argv[1:])
