"""What every selector does with what it is given: check it, and rank by it. Knows no method."""

from typing import TypeGuard

import torch

from .similarity import norms_of, refuse_unless


def checked_budget(features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int) -> int:
    """Check what every selector is given, and return how many tokens it keeps per image."""
    budget = checked_count(saliency, visual_token_num)
    if features.ndim != 3 or not features.is_floating_point():
        raise ValueError(
            f"features must be a floating-point tensor (B, N, C), got {features.dtype} {tuple(features.shape)}"
        )
    if features.shape[:2] != saliency.shape:
        raise ValueError(
            "features (B, N, C) and saliency (B, N) must agree in B and N, "
            f"got {tuple(features.shape)} and {tuple(saliency.shape)}"
        )
    if features.device != saliency.device:
        raise ValueError(
            f"features and saliency must be on one device, got {features.device} and {saliency.device}; move one"
        )
    return budget


def checked_count(saliency: torch.Tensor, visual_token_num: int) -> int:
    """Check what ranks and the budget, and return how many tokens stay of each image."""
    if saliency.ndim != 2 or saliency.shape[1] == 0 or not saliency.is_floating_point():
        raise ValueError(
            "saliency must be a floating-point tensor (B, N) with at least one token, "
            f"got {saliency.dtype} {tuple(saliency.shape)}"
        )
    refuse_unless(
        (saliency == saliency).all(),  # NaN alone differs from itself
        "saliency holds NaN: the vision encoder's attention is not finite; check pixel_values, "
        "or load the model in bfloat16 or float32",
    )
    check_count("visual_token_num", visual_token_num, ' (use method="none" to disable pruning)')
    return min(visual_token_num, saliency.shape[1])


def check_count(field: str, value: int, remedy: str = "") -> None:
    if not is_int(value):
        raise ValueError(f"vispruner_config.{field} must be an integer >= 1, got {value!r}{remedy}")
    if value < 1:
        raise ValueError(f"vispruner_config.{field} must be >= 1, got {value}{remedy}")


def is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def checked_grid(grid: tuple[int, int], tokens: int) -> tuple[int, int]:
    rows, columns = grid
    if rows * columns != tokens or columns < 1:
        raise ValueError(f"grid must be the (rows, columns) of the {tokens} tokens, got {grid}")
    return rows, columns


def checked_projected(projected: torch.Tensor, saliency: torch.Tensor) -> torch.Tensor:
    return checked_rows("projected", projected, saliency)


def checked_unit(projected: torch.Tensor, saliency: torch.Tensor) -> torch.Tensor:
    """Check projected features (B, N, D) and bring each token to length 1."""
    projected = checked_projected(projected, saliency)
    return projected / norms_of(projected)


def checked_layers(layer_saliency: torch.Tensor, saliency: torch.Tensor, layers: int | None = None) -> torch.Tensor:
    batch, tokens = saliency.shape
    shape = tuple(layer_saliency.shape)
    fits = len(shape) == 3 and (shape[0], shape[2]) == (batch, tokens) and shape[1] >= 1
    if not fits or layers not in (None, shape[1]) or not layer_saliency.is_floating_point():
        raise ValueError(
            f"layer_saliency must be a floating-point tensor ({batch}, {layers or 'L'}, {tokens}), "
            f"got {layer_saliency.dtype} {shape}"
        )
    refuse_unless(
        (layer_saliency == layer_saliency).all(),  # NaN alone differs from itself
        "layer_saliency holds NaN: the vision encoder's attention is not finite; check pixel_values, "
        "or load the model in bfloat16 or float32",
    )
    return widened(layer_saliency)


def checked_rows(name: str, rows: torch.Tensor, saliency: torch.Tensor) -> torch.Tensor:
    if rows.ndim != 3 or rows.shape[:2] != saliency.shape or not rows.is_floating_point():
        raise ValueError(
            f"{name} must be a floating-point tensor (B, N, D) of the {tuple(saliency.shape)} tokens, "
            f"got {rows.dtype} {tuple(rows.shape)}"
        )
    return widened(rows)


def checked_share(option: str, value: float, least: int = 0) -> float:
    """Check an option that is a part of something, or with `least` -1 a cosine."""
    if not (is_number(value) and least <= value <= 1):
        raise ValueError(f"vispruner_config.method_options.{option} must be a number from {least} to 1, got {value!r}")
    return float(value)


def checked_strength(option: str, value: float, or_zero: bool = False) -> float:
    """Check an option that is any number above 0, or 0 too."""
    if not (is_number(value) and (0 < value < float("inf") or (or_zero and value == 0))):
        what = "0 or above" if or_zero else "above 0"
        raise ValueError(f"vispruner_config.method_options.{option} must be a number {what}, got {value!r}")
    return float(value)


def most_attended_first(saliency: torch.Tensor) -> torch.Tensor:
    return saliency.argsort(dim=-1, descending=True, stable=True)


def every_token(saliency: torch.Tensor) -> torch.Tensor:
    return torch.arange(saliency.shape[1], device=saliency.device).repeat(len(saliency), 1)


def widened(features: torch.Tensor) -> torch.Tensor:
    return features.detach().to(torch.promote_types(features.dtype, torch.float32))
