"""Build the codebook of redundant tokens for a checkpoint of ours, from pictures of the split that it was trained on.

python benchmarks/codebook.py --out conversion/assets/tiny-llava-codebook.safetensors
python benchmarks/codebook.py --dataset photos --out conversion/assets/photo-llava-codebook.safetensors
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from outputs import output_file
from photos import generate_photo
from PIL import Image
from scenes import generate_scene
from tqdm import tqdm
from transformers import AutoProcessor

import vispruner
from vispruner.conversion.base_checkpoint import resolve_base
from vispruner.conversion.codebook import EMBEDDED, PROTOTYPES, build_codebook, save_codebook
from vispruner.conversion.repo_config import load_repo_config

GENERATE = {"scenes": generate_scene, "photos": generate_photo}
CONFIGS = {"scenes": EMBEDDED, "photos": "photo-llava-vispruner"}


def training_pictures(dataset: str, count: int, seed: int = 0) -> Iterator[Image.Image]:
    """Yield the first `count` pictures to train on."""
    for index in tqdm(range(count), desc="encoding", unit="picture"):
        yield GENERATE[dataset]("train", seed, index).image


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", choices=sorted(GENERATE), default="scenes", help="default: %(default)s")
    parser.add_argument("--pictures", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--prototypes", type=int, default=PROTOTYPES, help="default: %(default)s")
    parser.add_argument("--out", type=output_file(".safetensors"), required=True, help="the file to write")
    options = parser.parse_args(arguments)
    try:
        print(f"wrote {write(options.dataset, options.pictures, options.prototypes, options.out)}")
    except ValueError as error:  # too few pictures, or the extra vispruner[photo] is missing
        print(f"codebook.py: {error}", file=sys.stderr)
        return 2
    return 0


def write(dataset: str, count: int, prototypes: int, out: Path) -> Path:
    """Write the codebook of the first `count` pictures to train on."""
    base = str(resolve_base(load_repo_config(CONFIGS[dataset]).base_model))
    model = vispruner.load(base, method="cls_attention", visual_token_num=1).eval()
    pictures = training_pictures(dataset, count)
    codebook = build_codebook(model, AutoProcessor.from_pretrained(base), pictures, prototypes)
    about = f'{count} {dataset}: {GENERATE[dataset].__name__}("train", 0, 0) and on'
    return save_codebook(codebook, out, {"base_model": CONFIGS[dataset], "pictures": about})


if __name__ == "__main__":
    sys.exit(main())
