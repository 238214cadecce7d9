"""Measure what `vispruner convert` takes for a 7B checkpoint, and `vispruner build --thin` for a base of 72B.

convert  a checkpoint of the original code: 13 GB in .bin shards, two bytes a weight. The language model has the true
         shapes of LLaVA-1.5-7B; vocabulary and vision tower are those of tests/data, tiny beside it. Shards are made
         here, and everything is deleted afterwards: it takes twice the checkpoint on the disk of --work.
thin     a base of 72 billion weights in 5 GB shards that have true headers and no content (holes take no disk):
         a thin build reads headers alone.

Both run in a process of their own. Peak memory is that of the process without what it maps from files, as often as it
could be read (Linux only); seconds depend on the disk and on what else the machine does, so look at memory and bytes.

Examples:
  python benchmarks/large_checkpoints.py --layers 1 --width 256             # both, some megabytes
  python benchmarks/large_checkpoints.py --json out.json                    # the recorded run, some minutes
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlavaConfig, LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent))
from outputs import output_file, output_folder
from records import write_record

ORIGINAL = Path(__file__).parent.parent / "tests" / "data" / "original_llava"
EMBEDDED = Path(__file__).parent.parent / "conversion" / "assets" / "tiny-llava"
SHARD = 5 * 10**9
THIN_WIDTHS = {"hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64, "num_key_value_heads": 8}

Groups = list[dict[str, tuple[int, ...]]]  # per shard the shapes of its tensors


def in_shards(shapes: dict[str, tuple[int, ...]], most: int = SHARD) -> Groups:
    """Part tensors of two bytes a weight so that no shard has more than `most` bytes."""
    groups, filled = [{}], 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if groups[-1] and filled + size > most:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += size
    return groups


def write_index(folder: Path, groups: Groups, stem: str, suffix: str) -> list[Path]:
    """Write the index of a sharded checkpoint; return the paths of its shards."""
    files = [f"{stem}-{number:05d}-of-{len(groups):05d}{suffix}" for number in range(1, len(groups) + 1)]
    weight_map = {name: file for file, group in zip(files, groups, strict=True) for name in group}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return [folder / file for file in files]


def original_checkpoint(folder: Path, layers: int, width: int) -> int:
    """Write a checkpoint as the original code has it, in .bin shards; return the bytes of its tensors."""
    shutil.copytree(ORIGINAL / "llava-v1.5-tiny", folder)
    shutil.copyfile(ORIGINAL / "tokenizer.model", folder / "tokenizer.model")
    config = json.loads((folder / "config.json").read_text())
    mlp, heads = 43 * width // 16, max(1, width // 128)
    config |= {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "torch_dtype": "float16"}
    config |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    (folder / "config.json").write_text(json.dumps(config))
    tiny = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    sizes = {tiny["lm_head.weight"].shape[1]: width, tiny["model.layers.0.mlp.up_proj.weight"].shape[0]: mlp}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in tiny.items():
        if "mm_projector" in name:
            shape = tuple(tensor.shape) if tensor.ndim == 2 and ".0." in name else (width,) * tensor.ndim
            shapes[name] = (width, *shape[1:])
        elif "layers.0." in name:
            shape = tuple(sizes.get(size, size) for size in tensor.shape)
            shapes |= {name.replace("layers.0.", f"layers.{layer}."): shape for layer in range(layers)}
        elif "layers." not in name:
            shapes[name] = tuple(sizes.get(size, size) for size in tensor.shape)
    groups = in_shards(shapes)
    for path, group in zip(write_index(folder, groups, "pytorch_model", ".bin"), groups, strict=True):
        torch.save({name: torch.zeros(shape, dtype=torch.float16) for name, shape in group.items()}, path)
    return 2 * sum(torch.Size(shape).numel() for shape in shapes.values())


def hollow_checkpoint(folder: Path, layers: int, widths: dict[str, int], vocabulary: int, shard: int = SHARD) -> int:
    """Write a LLaVA whose safetensors shards have true headers and no content; return the number of weights."""
    shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    text = {**config["text_config"], **widths, "num_hidden_layers": layers, "vocab_size": vocabulary}
    text["head_dim"] = widths["hidden_size"] // widths["num_attention_heads"]
    config |= {"text_config": text, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig.from_dict(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    groups = in_shards(shapes, shard)
    for path, group in zip(write_index(folder, groups, "model", ".safetensors"), groups, strict=True):
        header, position = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in group.items():
            end = position + 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
            position = end
        encoded = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            file.truncate(8 + len(encoded) + position)
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def measured(*command: str) -> dict[str, Any]:
    """Run `vispruner` with these arguments; return its seconds, its peak memory and the bytes it wrote."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "vispruner.conversion", *command], stdout=subprocess.DEVNULL)
    peak = written = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            output = Path(f"/proc/{process.pid}/io").read_text()
        except OSError:  # it has just ended, or this is not Linux
            continue
        peak = max(peak, *(int(kib) for kib in re.findall(r"RssAnon:\s+(\d+)", status)), 0)
        written = max(written, *(int(count) for count in re.findall(r"wchar: (\d+)", output)), 0)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"vispruner {' '.join(command)} failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_mib": round(peak / 1024),
        "written_bytes": written,
    }


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def measure_convert(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    tensors = original_checkpoint(work / "original", args.layers, args.width)
    largest = max(path.stat().st_size for path in (work / "original").iterdir())
    row = {"tensor_bytes": tensors, "largest_shard_bytes": largest}
    row |= measured("convert", str(work / "original"), str(work / "out"), "--vision-tower", str(ORIGINAL / "clip"))
    return row | {"result_bytes": size_of(work / "out")}


def measure_thin(work: Path, args: argparse.Namespace) -> dict[str, Any]:
    small = {name: size // 128 for name, size in THIN_WIDTHS.items()} | {"num_key_value_heads": 1}
    small["num_attention_heads"] = 2
    whole = args.width >= 4096
    weights = hollow_checkpoint(
        work / "base", 80 if whole else args.layers, THIN_WIDTHS if whole else small, 152064 if whole else 512
    )
    config = {"repo_id": "someone/pruned", "base_model": "someone/base", "base_revision": "0" * 40}
    config |= {
        "architecture": "llava",
        "vispruner_config": {"visual_token_num": 18},
        "card": {"license": "apache-2.0"},
    }
    (work / "pruned.yaml").write_text(yaml.safe_dump(config))
    files = list((work / "base").glob("*.safetensors"))
    row = {"weights": weights, "weight_files": len(files), "weight_bytes": sum(path.stat().st_size for path in files)}
    row |= measured(
        "build", str(work / "pruned.yaml"), "--thin", "--base", str(work / "base"), "--out", str(work / "out")
    )
    return row | {"result_bytes": size_of(work / "out")}


CASES: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "convert": measure_convert,
    "thin": measure_thin,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--layers", type=int, default=32, help="of the checkpoint to convert (default 32)")
    parser.add_argument("--width", type=int, default=4096, help="its hidden size (default 4096); less: a smoke run")
    parser.add_argument("--work", type=output_folder, help="folder for what is made (default: the system's)")
    parser.add_argument("--json", type=output_file(".json"), help="write all figures here")
    args = parser.parse_args(arguments)
    result: dict[str, Any] = {"settings": {"layers": args.layers, "width": args.width}}
    for case in args.cases:
        with tempfile.TemporaryDirectory(dir=args.work) as work:
            result[case] = CASES[case](Path(work), args)
        print(case, result[case], flush=True)
    result["load_average_after"] = [round(load, 2) for load in os.getloadavg()]
    if args.json:
        write_record(args.json, result)


if __name__ == "__main__":
    main(sys.argv[1:])
