"""Time the first token of released geometries where patches also leave within the encoder, beside its ceiling.

Random weights at full width, both towers shallower by the same divisor, one picture and 64 tokens of text, the rows in
turn within every round. What is timed is the base model's forward: encoder, choice, projector and prefill.

dense      nothing is dropped
pruned     a quarter of the visual tokens stays, chosen behind the encoder
staged     the same quarter, but half of the patches leave in the middle of the encoder, where the model lets them
smaller    no choice: the picture has a quarter of the pixels, or of the tiles, rounded up (4 of 13); where the encoder
           takes such a one. LLaVA-OneVision cuts a quarter of the pixels into 5 tiles in place of 10, LLaVA-NeXT
           into 3 in place of 5

The encoder's peak memory is no column: it is that of its first layers, which run on all patches.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

sys.path.insert(0, str(Path(__file__).parent))
from latency import spread
from outputs import output_file
from records import versions, write_record
from released_geometries import RELEASED
from tables_and_plots import markdown_table

from vispruner import architecture_of
from vispruner.conversion.ceilings import TEXT_TOKENS, ceiling, example_inputs, halfway
from vispruner.conversion.checkpoint_io import read_json
from vispruner.stock_versions import CACHE

MODELS = (
    "smolvlm2-2.2b",
    "gemma-3-4b",
    "llava-onevision-qwen2-0.5b",
    "qwen2.5-vl-7b",
    "qwen3-vl-8b",
    "internvl3-8b",
    "llava-1.5-7b",
)
BUDGET, LEFT = 0.25, 0.5
WORD = 5  # any id of the vocabulary that is no placeholder


def shallower_model(name: str, divisor: int) -> Any:
    """Return the base model of a released geometry with random weights and `divisor` times fewer layers."""
    model_type, fields = RELEASED[name]
    fields = copy.deepcopy(fields)
    text, vision = fields["text_config"], fields["vision_config"]
    depth = "depth" if "depth" in vision else "num_hidden_layers"
    layers = max(4, vision[depth] // divisor)
    if "fullatt_block_indexes" in vision:  # one to rank by in the middle, and the last, as there
        vision["fullatt_block_indexes"] = [layers // 2 - 1, layers - 1]
    if "deepstack_visual_indexes" in vision:
        vision["deepstack_visual_indexes"] = [0]
    vision[depth], text["num_hidden_layers"] = layers, max(2, text["num_hidden_layers"] // divisor)
    architecture = architecture_of(model_type)
    config = architecture.config_class.from_dict({**fields, "vispruner_config": {"method": "none"}})
    for part in (config, config.get_text_config()):  # the defaults of some versions lie beyond the vocabulary
        part.pad_token_id = None
    config.image_token_id = min(config.image_token_id, config.get_text_config().vocab_size - 1)  # as for padding
    torch.manual_seed(0)
    with torch.device("meta"):
        model = architecture.base_class(config)
    model = model.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False).normal_(0.0, 0.02)
    model.init_weights()
    return model


def prompt(base: Any, scale: int = 1) -> dict[str, torch.Tensor]:
    """Return one picture, of a `scale`th of the usual sides or tiles, with TEXT_TOKENS of text."""
    given = example_inputs(base)
    if "image_grid_thw" in given and scale > 1:
        unit = base.config.vision_config.spatial_merge_size
        rows = int(given["image_grid_thw"][0, 1]) // scale // unit * unit
        given = {
            "pixel_values": given["pixel_values"][: rows * rows],
            "image_grid_thw": torch.tensor([[1, rows, rows]]),
        }
    elif "image_sizes" in given and scale > 1:
        size, side = given["image_sizes"] // scale, base.config.vision_config.image_size
        tiles = 1 + math.prod(get_anyres_image_grid_shape(size[0].tolist(), base.config.image_grid_pinpoints, side))
        given = {"pixel_values": given["pixel_values"][:, :tiles], "image_sizes": size}
    elif scale > 1:
        tiles = -(-max(given["pixel_values"].shape[:-3]) // scale**2)
        given["pixel_values"] = given["pixel_values"].narrow(given["pixel_values"].dim() - 4, 0, tiles)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(given["pixel_values"].shape, generator=generator)
    described = {name: value for name, value in given.items() if name != "pixel_values"}
    full, _ = base.image_token_counts(pixels, **described)
    ids = torch.full((1, TEXT_TOKENS + sum(full)), WORD)
    ids[0, 2 : 2 + sum(full)] = base.config.image_token_id
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, **described}
    types = {"gemma3": "token_type_ids", "qwen2_5_vl": "mm_token_type_ids", "qwen3_vl": "mm_token_type_ids"}
    if (name := types.get(base.config.model_type)) is not None:
        given[name] = (ids == base.config.image_token_id).long()
    return given


def can_be_smaller(base: Any) -> bool:
    """Whether the encoder takes pictures of any size, or several tiles."""
    return base.packs_images or len(example_inputs(base)["pixel_values"].flatten(0, -4)) > 1


def rows_of(base: Any) -> dict[str, tuple[dict[str, Any], int]]:
    """Return the options and the scale of the picture of every row."""
    pruned = {"method": "vispruner", "keep_ratio": BUDGET, "visual_token_num": None}
    rows: dict[str, tuple[dict[str, Any], int]] = {"dense": ({"method": "none"}, 1), "pruned": (pruned, 1)}
    if (stage := halfway(base, LEFT)) is not None:
        rows["staged"] = ({**pruned, "encoder_stage": stage}, 1)
    return {**rows, "smaller": ({"method": "none"}, 2)} if can_be_smaller(base) else rows


@torch.no_grad()
def measure_model(name: str, divisor: int, rounds: int, progress: tqdm) -> dict[str, Any]:
    base = shallower_model(name, divisor)
    rows = rows_of(base)
    prompts = {scale: prompt(base, scale) for scale in {scale for _, scale in rows.values()}}
    seconds: dict[str, list[float]] = {row: [] for row in rows}
    ceilings, kept = {}, {}
    for number in range(rounds + 1):  # the first is warm-up
        for row, (options, scale) in rows.items():
            inputs = copy.copy(prompts[scale])
            with base.call_with(options):
                clock = time.perf_counter()
                outputs = base(**inputs, use_cache=True)
                took = time.perf_counter() - clock
                if number == 0:
                    ceilings[row] = ceiling(base).first_token
                    kept[row] = int(outputs[CACHE].get_seq_length()) - TEXT_TOKENS
            if number:
                seconds[row].append(took)
            progress.update()
    return {
        "model": name,
        "encoder_share": ceiling(base).encoder,
        "layers": [len(base.vision_layers), base.depth],
        "rows": {
            row: {
                "seconds": spread(times),
                "ratio_to_dense": spread(d / t for d, t in zip(seconds["dense"], times, strict=True)),
                "ceiling": None if row == "smaller" else ceilings[row],
                "visual_tokens": kept[row],
            }
            for row, times in seconds.items()
        },
    }


def settings(divisor: int) -> dict[str, Any]:
    """Return what all models of a record have in common."""
    return {
        "budget": BUDGET,
        "left_halfway": LEFT,
        "depth_divisor": divisor,
        "text_tokens": TEXT_TOKENS,
        "threads": torch.get_num_threads(),
    }


def measure(models: Sequence[str], divisor: int, rounds: int) -> dict[str, Any]:
    """Return what the JSON holds."""
    with tqdm(total=len(models) * 4 * (rounds + 1), unit="forward") as progress:
        found = [measure_model(name, divisor, rounds, progress) for name in models]
    date = datetime.now(timezone.utc).date().isoformat()
    return {**settings(divisor), "date": date, "versions": versions(), "models": found}


def require_room(record: Mapping[str, Any], models: Sequence[str], divisor: int) -> None:
    """Raise ValueError for a record that these models cannot be added to: of other settings, or with one of them."""
    asked = settings(divisor)
    if lacking := [name for name in (*asked, "models") if name not in record]:
        raise ValueError(f"it is no record of encoder_stage.py, which has {', '.join(lacking)}")
    if other := [name for name, value in asked.items() if record[name] != value]:
        raise ValueError(f"it is of another run: it differs in {', '.join(other)}")
    if twice := {model["model"] for model in record["models"]} & set(models):
        raise ValueError(f"it has {min(twice)} already: give other --models, or write a new record")


def with_models_of(record: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """Return an earlier record with the models of a further run."""
    noted = {"models": [model["model"] for model in run["models"]], "date": run["date"], "versions": run["versions"]}
    further = [*record.get("further_runs", []), noted]
    return {**record, "models": [*record["models"], *run["models"]], "further_runs": further}


def table(record: Mapping[str, Any]) -> str:
    """Return the record as Markdown: times as fast as dense, slowest to fastest round, and the ceiling."""
    lines = []
    for model in record["models"]:
        cells = [model["model"], f"{model['encoder_share']:.0%}"]
        for row in ("pruned", "staged", "smaller"):
            if (found := model["rows"].get(row)) is None:
                cells.append("refused" if row == "staged" else "")
                continue
            ratio, most = found["ratio_to_dense"], found["ceiling"]
            limit = "" if most is None else f" of {most:.2f}x"
            cells.append(f"{ratio['median']:.2f}x{limit} ({ratio['low']:.2f} to {ratio['high']:.2f})")
        lines.append(cells)
    return markdown_table(["model", "encoder", "pruned", "staged", "smaller picture"], lines)


PLACES = ("a third", "half", "two thirds")  # of the encoder's layers see all patches, in the records of accuracy.py


def cost_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return as Markdown how many points stages cost VisPruner at the same budgets, from records of accuracy.py.

    Raises ValueError for a record without these stages: it does not say which part of an encoder a layer number is.
    """
    found: dict[tuple[int, float], list[str]] = {}
    names, smaller = [], []
    for record in records:
        of_stage: dict[tuple[int, float], dict[float, float]] = {}
        for row in record["rows"]:
            if row["selector"] == "vispruner":
                of_stage.setdefault(tuple(row.get("encoder_stage", ())), {})[row["budget_percent"]] = row["accuracy"]
        without = of_stage.pop((), {})
        budgets = sorted({budget for points in of_stage.values() for budget in points}, reverse=True)
        layers = sorted({layer for layer, _ in of_stage})
        if len(layers) != len(PLACES) or not without:
            raise ValueError(
                f"the record of {record['dataset']}, seed {record['seed']}, has stages behind the layers {layers}: "
                f"the table is of VisPruner with none, and with one behind {', '.join(PLACES)} of the layers"
            )
        names.append(f"{record['dataset']}, seed {record['seed']}, at {' / '.join(f'{b:.3g}' for b in budgets)} %")
        for (layer, share), points in of_stage.items():
            found.setdefault((layers.index(layer), -share), []).append(_lost(points, without, budgets))
        points = {row["budget_percent"]: row["accuracy"] for row in record["rows"] if row["selector"] == "downsample"}
        smaller.append(_lost(points, without, budgets))
    lines = [[PLACES[place], f"{1 + share:.0%}", *found[place, share]] for place, share in sorted(found)]
    return markdown_table(["see all patches", "then leave", *names], [*lines, ["smaller picture", "", *smaller]])


def _lost(points: Mapping[float, float], without: Mapping[float, float], budgets: Sequence[float]) -> str:
    return " / ".join(f"{100 * (points[b] - without[b]):+.1f}" if b in points else "" for b in budgets)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="A quick look: python benchmarks/encoder_stage.py --models llava-1.5-7b --depth-divisor 12 --rounds 1",
    )
    parser.add_argument(
        "--models", nargs="+", choices=RELEASED, default=MODELS, metavar="NAME", help=f"default: {' '.join(MODELS)}"
    )
    parser.add_argument(
        "--depth-divisor", type=int, default=6, metavar="N", help="how many times fewer layers (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE", help="write all figures here")
    parser.add_argument(
        "--add-to", type=Path, metavar="FILE", help="add the models to this record of the same settings, for --json"
    )
    parser.add_argument(
        "--costs",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="print what stages cost in answers, from these records of "
        "accuracy.py --encoder-stages, and measure nothing",
    )
    parsed = parser.parse_args(arguments)
    if min(parsed.depth_divisor, parsed.rounds, parsed.threads) < 1:
        parser.error("--depth-divisor, --rounds and --threads must be at least 1")
    if parsed.add_to is not None and parsed.json is None:
        parser.error("--add-to is read only: say by --json where the whole record is to be written")
    if twice := [name for name in parsed.models if parsed.models.count(name) > 1]:
        parser.error(f"--models has {twice[0]} twice")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    if parsed.costs:
        try:
            print(cost_table([read_json(path) for path in parsed.costs]))
        except ValueError as error:
            raise SystemExit(f"--costs: {error}") from None
        return 0
    torch.set_num_threads(parsed.threads)
    earlier = None
    if parsed.add_to is not None:
        try:
            require_room(earlier := read_json(parsed.add_to), parsed.models, parsed.depth_divisor)
        except ValueError as error:
            raise SystemExit(f"--add-to {parsed.add_to}: {error}") from None
    record = measure(parsed.models, parsed.depth_divisor, parsed.rounds)
    if earlier is not None:
        record = with_models_of(earlier, record)
    print(table(record))
    if parsed.json is not None:
        write_record(parsed.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
