"""Build and write the codebook of redundant visual tokens that the method `codebook` compares tokens with.

The recipe is this project's and not that of the method's authors. The half of a picture's tokens with the least
saliency counts as redundant. From those of all pictures, prototypes are picked one by one, each the token that makes
the prototypes resemble all the others best: no training, no random numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save
from tqdm import tqdm
from transformers import PreTrainedModel

import vispruner
from vispruner.choosing import Choice
from vispruner.codebook_file import KEY, CodebookError
from vispruner.related_selectors import select_scope
from vispruner.selector_registry import Selection

from .checkpoint_io import replacing, writable_file
from .picture import existing_picture, open_photo, require_picture
from .questions import load_model, load_processor, where_and_how

CODEBOOK = ([".safetensors"], "a codebook")
EMBEDDED = "tiny-llava-vispruner"
PROTOTYPES = 64
REDUNDANT_SHARE = 0.5
MOST_COMPARED = 4096  # tokens, all with each other
PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


def write_codebook(
    images: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    repo: str | None = None,
    prototypes: int = PROTOTYPES,
) -> Path:
    """Build the codebook of the model in `repo` from picture files, or folders of them, and write it to `out`.

    repo   a built repo or any stock checkpoint, folder or Hub id; its own code is never run. None: the embedded one
    """
    out = _writable_codebook(out)
    _require_prototypes(prototypes)
    files = list(chain.from_iterable(_picture_files(image) for image in images))
    for file in files:
        require_picture(file)
    source, _ = where_and_how(repo)
    model = load_model(source, method="cls_attention", visual_token_num=1)
    photos = tqdm((open_photo(file) for file in files), total=len(files), desc="encoding", unit="picture")
    codebook = build_codebook(model, load_processor(source), photos, prototypes)
    about = {"base_model": EMBEDDED if repo is None else Path(repo).name, "pictures": str(len(files))}
    return save_codebook(codebook, out, about)


def _writable_codebook(out: str | os.PathLike[str]) -> Path:
    path = writable_file(out, *CODEBOOK)
    if path.name.startswith("model"):
        raise CodebookError(f"{path} is a name of weights, which vispruner_config.codebook refuses: take another name")
    return path


def _require_prototypes(count: int) -> None:
    if count < 1:
        raise CodebookError(f"a codebook needs at least one prototype, got {count}")


def _picture_files(image: str | os.PathLike[str]) -> list[Path]:
    path = existing_picture(os.path.expanduser(image))
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
    if not files:
        raise CodebookError(f"{path} holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))})")
    return files


@torch.no_grad()
def build_codebook(
    model: PreTrainedModel, processor: Any, pictures: Iterable[Image.Image], prototypes: int = PROTOTYPES
) -> torch.Tensor:
    """Return prototypes (M, D) of the projected features that `model` has for the redundant tokens of `pictures`.

    D is the language model's width. Deterministic; of many tokens an even sample is compared.
    """
    _require_prototypes(prototypes)
    pool: list[torch.Tensor] = []
    with _redundant_tokens(model) as redundant:
        for picture in pictures:
            inputs = processor.image_processor(images=picture.convert("RGB"), return_tensors="pt").to(model.device)
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            model.get_image_features(**inputs)
            pool += redundant
            redundant.clear()
    count = sum(len(tokens) for tokens in pool)
    if count < prototypes:
        raise CodebookError(f"{prototypes} prototypes need as many redundant tokens, got {count}: give more pictures")
    tokens = torch.cat(pool)
    if count > MOST_COMPARED:
        tokens = tokens[torch.arange(MOST_COMPARED) * count // MOST_COMPARED]
    picks = select_scope(tokens[None], torch.ones(1, len(tokens)), prototypes)[0]
    return tokens[picks]


@contextmanager
def _redundant_tokens(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Note the redundant tokens (n, D) of everything that the model selects from, in float32 on the CPU."""
    base: Any = model.model
    stored = model.config.vispruner_config
    noted: list[torch.Tensor] = []

    def note(choice: Choice) -> None:
        tokens = choice.tokens
        count = int(tokens.saliency.shape[1] * REDUNDANT_SHARE)
        least_attended = Selection(tokens.saliency.argsort(dim=-1, stable=True)[:, :count])
        projected = base.project(tokens.features) if tokens.projected is None else tokens.projected
        noted.append(least_attended.take(projected).flatten(0, 1).float().cpu())

    model.set_vispruner_config(method="cls_attention", visual_token_num=1)
    try:
        with base.watch_choices(after=note):
            yield noted
    finally:
        model.config.vispruner_config = stored


def save_codebook(codebook: torch.Tensor, out: str | os.PathLike[str], about: dict[str, str]) -> Path:
    """Write a safetensors file that appears only when it is complete; `about` is kept in its metadata, as JSON."""
    out = _writable_codebook(out)
    recipe = f"the {REDUNDANT_SHARE:.0%} least attended tokens of each picture, covered greedily by cosine"
    about = {"recipe": recipe, "vispruner_version": vispruner.__version__, **about}
    # One entry, because safetensors writes several in any order, and the same codebook must give the same bytes.
    content = save({KEY: codebook.contiguous()}, metadata={KEY: json.dumps(about, sort_keys=True)})
    with replacing(out) as unfinished:
        unfinished.write_bytes(content)
    return out
