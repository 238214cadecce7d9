"""What differs between versions of transformers. No other file names a version or asks which one is installed.

Each entry says which versions it is about, and what may be deleted when the oldest of them is no longer supported.
What a version has is asked of the installed code, never concluded from its number: patch releases and forks differ.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import Idefics3Model, LlavaForConditionalGeneration, VideoLlavaModel
from transformers.generation import utils as generation_utils
from transformers.utils import logging, output_capturing
from transformers.utils.hub import cached_files
from transformers.utils.import_utils import torch_compilable_check

logger = logging.get_logger(f"transformers.{__name__}")

OLDEST_SUPPORTED = "5.17"
NEWEST_TESTED = "5.24"


def versions() -> str:
    """Name what an error report needs: the installed transformers, and the newest that this code was tested with."""
    return f"transformers {transformers.__version__}, tested up to {NEWEST_TESTED}"


def _known_name(names: Sequence[str], stock: type) -> str:
    """Return the first of several names that `forward` of a stock class takes."""
    taken = inspect.signature(stock.forward).parameters  # type: ignore[attr-defined]
    found = next((name for name in names if name in taken), None)
    if found is None:
        raise ImportError(
            f"{stock.__name__}.forward takes neither {' nor '.join(names)}: this VisPruner code does not work with "
            f"{versions()}. Install transformers {NEWEST_TESTED}, or update what this code came from"
        )
    return found


# What `forward`, `generate` and their outputs call the KV cache: until 5.23 "past_key_values". 5.24 renamed
# it and warns of the old name, which goes in 5.40. Callers may use either. When 5.23 is dropped, CACHE is "cache".
CACHE_NAMES = ("cache", "past_key_values")
CACHE = _known_name(CACHE_NAMES, LlavaForConditionalGeneration)

# From 5.18 on, `forward` takes images that were encoded before, as `mm_encoder_outputs`. When 5.17 is dropped, this is
# true, and whatever asks for its opposite goes.
TAKES_FEATURES = "mm_encoder_outputs" in inspect.signature(LlavaForConditionalGeneration.forward).parameters

# From 5.23 on, a prefill in chunks hands each chunk the features of its own images; before, every chunk got all of
# them, and answers were wrong without a word. When 5.22 is dropped, this is true.
SLICES_FEATURES = hasattr(generation_utils, "_slice_mm_encoder_output")

# From 5.23 on, an encoder can be asked for some of its hidden states; before, it keeps all. When 5.22 is dropped, this
# is true.
KEEPS_NAMED_HIDDEN_STATES = hasattr(output_capturing, "select_hidden_states")

# From 5.20 on, Idefics3 and SmolVLM join the tiles of a prompt in `pooler_output`; before, it is one tensor of tiles.
# Either is taken. When 5.19 is dropped, this is true.
JOINS_TILES = "num_real_images_per_batch" in inspect.unwrap(Idefics3Model.get_image_features).__code__.co_varnames

# Until 5.17, gradient checkpointing recomputes a layer with its hooks; from 5.18 on, without. decoder_pruning.py keeps
# for that what it did before each layer. When 5.17 is dropped, that goes: all that is named `taken` there.

# Video-LLaVA's images: until 5.20 the second name, since 5.21 the first; its processor has used both. When 5.20 is
# dropped, VIDEO_LLAVA_IMAGES is "pixel_values".
VIDEO_LLAVA_IMAGE_NAMES = ("pixel_values", "pixel_values_images")
VIDEO_LLAVA_IMAGES = _known_name(VIDEO_LLAVA_IMAGE_NAMES, VideoLlavaModel)


def known_commit(commit: str | None) -> dict[str, Any]:
    """Return what tells `cached_file` that a revision is a commit, so that it remembers which files that has not.

    Until 5.17; later versions see it. When 5.17 is dropped, this goes.
    """
    return {"_commit_hash": commit} if "_commit_hash" in inspect.signature(cached_files).parameters else {}


def by_stock_name(inputs: Mapping[str, Any], names: Sequence[str], stock_name: str) -> dict[str, Any]:
    """Return `inputs` with what goes by one of several `names` under the one that the installed version has for it.

    Raises ValueError when more than one of them is given.
    """
    given = [name for name in names if inputs.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are two names of the same thing: pass one of them")
    others = {name: value for name, value in inputs.items() if name not in names}
    return {**others, stock_name: inputs[given[0]]} if given else others


def merge_features(
    inputs: Mapping[str, Any], tokens: Mapping[int, Sequence[torch.Tensor]], embed: nn.Module
) -> dict[str, Any]:
    """Return `inputs` with the embedded prompt (B, S, D) in place of ids, visual tokens in the place of placeholders.

    tokens  per placeholder id the visual tokens (n, D) of each image, in reading order
    Until 5.17, where `forward` takes no features (`TAKES_FEATURES`).
    """
    others = {name: value for name, value in inputs.items() if name != "input_ids"}
    ids = inputs.get("input_ids")
    embeds = inputs["inputs_embeds"] if ids is None else embed(ids)
    for token, images in tokens.items():
        visual = torch.cat(list(images)).to(embeds.device, embeds.dtype)
        if ids is None:
            mask = (embeds == embed(torch.tensor(token, device=embeds.device))).all(-1)
        else:
            mask = (ids == token).to(embeds.device)
        count = mask.sum()
        torch_compilable_check(
            count == len(visual),
            lambda: f"the prompt has {count} placeholders for {len(visual)} visual tokens",  # noqa: B023
        )
        embeds = embeds.masked_scatter(mask[..., None], visual)
    return {**others, "inputs_embeds": embeds}


def is_untested() -> bool:
    """True when a newer minor version of transformers is installed than any that this code was tested with."""
    return _release(transformers.__version__) > _release(NEWEST_TESTED)


def warn_if_untested() -> None:
    """Say once that `is_untested`, and what to do."""
    if is_untested():
        logger.warning_once(
            f"This VisPruner code was tested with transformers up to {NEWEST_TESTED}; {transformers.__version__} is "
            f"installed. If answers look wrong, install transformers {NEWEST_TESTED}, or update what this code came "
            "from: `pip install -U vispruner`, or a newer revision of the repo"
        )


def _release(version: str) -> tuple[int, int]:
    """Return major and minor number: "5.24.1" and "5.24.0.dev0" -> (5, 24)."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise ValueError(f"transformers has a version that is none: {version!r}")
    return int(found[1]), int(found[2])
