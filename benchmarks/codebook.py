"""Build the codebook of redundant tokens for the embedded checkpoint from drawn scenes, those of the train split.

python benchmarks/codebook.py --scenes 400 --out conversion/assets/tiny-llava-codebook.safetensors
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from outputs import output_file
from PIL import Image
from scenes import generate_scene
from tqdm import tqdm
from transformers import AutoProcessor

import vispruner
from vispruner.conversion.base_checkpoint import resolve_base
from vispruner.conversion.codebook import EMBEDDED, PROTOTYPES, build_codebook, save_codebook
from vispruner.conversion.repo_config import load_repo_config


def scene_pictures(count: int, seed: int = 0) -> Iterator[Image.Image]:
    """Yield the pictures of the first `count` scenes to train on."""
    for index in tqdm(range(count), desc="encoding", unit="scene"):
        yield generate_scene("train", seed, index).image


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenes", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--prototypes", type=int, default=PROTOTYPES, help="default: %(default)s")
    parser.add_argument("--out", type=output_file(".safetensors"), required=True, help="the file to write")
    options = parser.parse_args()
    base = str(resolve_base(load_repo_config(EMBEDDED).base_model))
    model = vispruner.load(base, method="cls_attention", visual_token_num=1).eval()
    processor = AutoProcessor.from_pretrained(base)
    codebook = build_codebook(model, processor, scene_pictures(options.scenes), options.prototypes)
    pictures = f'{options.scenes} scenes: generate_scene("train", 0, 0) and on'
    print(f"wrote {save_codebook(codebook, options.out, {'base_model': EMBEDDED, 'pictures': pictures})}")


if __name__ == "__main__":
    main()
