"""Find and read the file of the codebook of redundant visual tokens, for selectors that compare tokens with one.

Other files that a repo carries beside its weights are found the same way.
"""

import os
from typing import Any

import torch
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file

KEY = "codebook"  # the one tensor in such a file


class CodebookError(ValueError):
    """A codebook that cannot be built, or a file that is none for this model."""


def find_codebook(codebook: str, repo: str | None, hub_options: dict[str, Any]) -> str:
    """Return the path of the file that `vispruner_config.codebook` means: a bare name lies in the model's repo."""
    return find_file("codebook", codebook, repo, hub_options, "vispruner codebook")


def find_file(field: str, named: str, repo: str | None, hub_options: dict[str, Any], maker: str) -> str:
    """Return the path of the file that a field of `vispruner_config` names; `maker` is the command that makes such."""
    if os.path.basename(named) != named:
        path = os.path.expanduser(named)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"vispruner_config.{field}: there is no file {path}")
        return path
    reason: object = "this model comes from no repo"
    if repo:
        try:
            return str(cached_file(repo, named, **hub_options))
        except OSError as error:
            reason = error
    raise FileNotFoundError(
        f"vispruner_config.{field}: {named} is not in {repo or 'a repo'}; give ./{named} for a file in the "
        f"working directory, or make one with `{maker}`. The reason was: {reason}"
    )


def read_codebook(path: str | os.PathLike[str], width: int) -> torch.Tensor:
    """Return the prototypes (M, width) that a file holds; CodebookError when it is none for a model of that width."""
    if os.path.splitext(path)[1] != ".safetensors":
        raise CodebookError(f"{path} is no codebook: it must be a .safetensors file")
    try:
        tensors = load_state_dict(path)
    except Exception as error:  # the reader of safetensors has errors of its own
        raise CodebookError(f"{path} is no codebook, since it cannot be read as safetensors: {error}") from error
    if list(tensors) != [KEY]:
        raise CodebookError(f"{path} is no codebook: it must hold one tensor, {KEY!r}, got {sorted(tensors)}")
    codebook = tensors[KEY].clone()  # else it would be a view of the file
    if codebook.ndim != 2 or len(codebook) == 0 or not codebook.is_floating_point():
        raise CodebookError(
            f"{path}: a codebook is a floating-point (M, D) with M >= 1, got {codebook.dtype} {tuple(codebook.shape)}"
        )
    if codebook.shape[1] != width:
        raise CodebookError(
            f"{path} was made for another model: its prototypes are {codebook.shape[1]} wide, visual tokens {width}"
        )
    if not codebook.isfinite().all():
        raise CodebookError(f"{path} holds NaN or infinity: build it again")
    return codebook
