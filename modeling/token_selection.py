"""Selectors: pure functions that choose which visual tokens of an encoded image stay, and the registry naming them.

Every selector is called as `select(features, saliency, visual_token_num, **options)` and returns the kept indices,
ascending, exactly min(visual_token_num, N) per image. It knows no model and no config object, never changes its inputs
and draws random numbers only from the seed or generator it is given. To add a method, write such a function below and
put `@register_selector("its name")` on it: its further parameters are the inputs it needs (see `FURTHER_INPUTS`) and
the options that `select_tokens` hands to it. Selectors of related work are in related_selectors.py.
"""

import inspect
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeGuard

import torch

from .duplicate_removal import default_step, keep_without_duplicates
from .similarity import refuse_unless


class Selector(NamedTuple):
    """A registered method and what it declares.

    options          the names of its options
    needs            which of `FURTHER_INPUTS` it is to be given
    saliency_layers  which encoder layers it wants `layer_saliency` of, as a function of how many layers there are and
                     of the one that produces the features, all counted from 0
    saliency_kind    what that is: "cls", the attention of the [CLS] query, or "received", the mean over all queries
    kinds            why it keeps a token, a line for each reason: "name: what that is"
    kind_of          where it has several, which it was: called with `kept` (B, T) and `saliency` (B, N), then by name
                     with `layer_saliency`, `grid` and options of its own, it returns places in `kinds`, (B, T) int64
    """

    function: Callable[..., torch.Tensor]
    options: frozenset[str]
    needs: frozenset[str] = frozenset()
    saliency_layers: Callable[[int, int], list[int]] | None = None
    saliency_kind: Literal["cls", "received"] = "cls"
    kinds: tuple[str, ...] = ()
    kind_of: Callable[..., torch.Tensor] | None = None


SELECTORS: dict[str, Selector] = {}

_INPUTS = ["features", "saliency", "visual_token_num"]

# What a selector is given when its signature has a parameter of this name:
#   projected       (B, N, D)        features after the projector
#   grid            (rows, columns)  of the N tokens, which are in raster order
#   layer_saliency  (B, L, N)        saliency of the L encoder layers that the selector asks for, in its order
#   codebook        (M, D)           prototypes of redundant projected features
FURTHER_INPUTS = frozenset({"projected", "grid", "layer_saliency", "codebook"})


def register_selector(
    name: str,
    *,
    saliency_layers: Callable[[int, int], list[int]] | None = None,
    saliency_kind: Literal["cls", "received"] = "cls",
    kinds: tuple[str, ...] = (),
    kind_of: Callable[..., torch.Tensor] | None = None,
) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Name a selector, so that `vispruner_config.method` can ask for it; for the keywords see `Selector`."""

    def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        parameters = list(inspect.signature(function).parameters)
        if parameters[:3] != _INPUTS:
            raise TypeError(f"selector {name!r} must take {', '.join(_INPUTS)} first, got {', '.join(parameters)}")
        further = frozenset(parameters[3:])
        if ("layer_saliency" in further) != (saliency_layers is not None):
            raise TypeError(f"selector {name!r} must both take layer_saliency and say saliency_layers, or neither")
        if (kind_of is not None) != (len(kinds) > 1):
            raise TypeError(f"selector {name!r} must say kind_of where it has several kinds, and only there")
        asked = set() if kind_of is None else set(list(inspect.signature(kind_of).parameters)[2:])
        if unknown := sorted(asked - {"layer_saliency", "grid"} - (further - FURTHER_INPUTS)):
            raise TypeError(f"kind_of of selector {name!r} asks for {', '.join(unknown)}, which it is not given")
        if name in SELECTORS:
            raise ValueError(f"a selector named {name!r} is registered already; choose another name")
        needs = further & FURTHER_INPUTS
        SELECTORS[name] = Selector(function, further - needs, needs, saliency_layers, saliency_kind, kinds, kind_of)
        return function

    return register


def select_tokens(
    method: str, features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int, **options: object
) -> torch.Tensor:
    """Run the selector registered as `method`.

    features  (B, N, C)  encoder features
    saliency  (B, N)     attention each token receives, higher is more important
    options              the inputs of `FURTHER_INPUTS` that the selector needs, and its options: it gets those it
                         names and the others are left out, so the caller may pass every option of vispruner_config
                         whatever the method; one that no selector names is an error
    returns   (B, T)     kept indices, ascending; T = min(visual_token_num, N)
    """
    if method not in SELECTORS:
        raise ValueError(f"vispruner_config.method must be one of {sorted(SELECTORS)}, got {method!r}")
    selector = SELECTORS[method]
    if missing := [name for name in sorted(selector.needs) if options.get(name) is None]:
        raise ValueError(
            f'vispruner_config.method "{method}" needs {", ".join(missing)}, which this architecture does not give'
        )
    known = FURTHER_INPUTS.union(*(other.options for other in SELECTORS.values()))
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"no registered selector takes the option(s) {unknown}; check the spelling")
    chosen = {name: value for name, value in options.items() if name in selector.options | selector.needs}
    return selector.function(features, saliency, visual_token_num, **chosen)


def kinds_of_kept(
    method: str, kept: torch.Tensor, saliency: torch.Tensor, **options: object
) -> dict[str, torch.Tensor]:
    """Say why each token stays that the selector registered as `method` kept, to be shown.

    kept      (B, T)  what the selector returned
    saliency  (B, N)  what it was given
    options           what else it was given
    returns           by kind, in the order of `Selector.kinds`, the tokens (B, T) of `kept` that are of it, every
                      token in one; empty where the method names no kind
    """
    selector = SELECTORS[method]
    if selector.kind_of is None:
        return {kind: torch.ones_like(kept, dtype=torch.bool) for kind in selector.kinds}
    named = inspect.signature(selector.kind_of).parameters
    kind = selector.kind_of(kept, saliency, **{name: value for name, value in options.items() if name in named})
    return {name: kind == number for number, name in enumerate(selector.kinds)}


def _vispruner_kind(kept: torch.Tensor, saliency: torch.Tensor, important_ratio: float = 0.5) -> torch.Tensor:
    # The most attended of all are those of the kept ones, also where a model chose from less than all of them.
    important = important_tokens(saliency.gather(1, kept), kept.shape[1], important_ratio)
    return torch.ones_like(kept).scatter(1, important, 0)


@register_selector("vispruner", kinds=("important: most attended", "diverse: least alike"), kind_of=_vispruner_kind)
def select_vispruner(
    features: torch.Tensor,
    saliency: torch.Tensor,
    visual_token_num: int,
    important_ratio: float = 0.5,
    dedup_step: int | None = None,
) -> torch.Tensor:
    """Keep the most attended tokens, then the least redundant of the rest (arXiv 2412.01818, sec. 4).

    features         (B, N, C)  encoder features compared for similarity, in their own dtype
    saliency         (B, N)     attention each token receives, higher is more important
    important_ratio             fraction of the budget given to the most attended tokens, 0 to 1
    dedup_step                  most tokens dropped per round of duplicate removal, 8 in the paper; None is 8 for every
                                full 1,024 tokens, so the paper's up to 2,047 and at most 256 rounds beyond
    returns          (B, T)     kept indices, ascending; T = min(visual_token_num, N)

    Raises ValueError for a wrong shape, dtype or option, and for NaN saliency or features whose norm is not finite (on
    CUDA, or while compiling, the latter two are asserted on the device instead, because a check would wait for it).
    """
    budget = _checked_budget(features, saliency, visual_token_num)
    important_num = _important_num(budget, important_ratio)
    if dedup_step is not None:
        _check_count("dedup_step", dedup_step)
    batch, tokens = saliency.shape
    if budget == tokens:
        return torch.arange(tokens, device=saliency.device).repeat(batch, 1)
    order = _most_attended_first(saliency)
    if important_num == budget:
        return order[:, :budget].sort(dim=-1).values
    step = default_step(tokens) if dedup_step is None else dedup_step
    return keep_without_duplicates(features.detach(), order, important_num, budget, step)


def important_tokens(saliency: torch.Tensor, visual_token_num: int, important_ratio: float = 0.5) -> torch.Tensor:
    """Return the tokens that `select_vispruner` keeps for their attention alone.

    saliency  (B, N)
    returns   (B, int(T * important_ratio))  most attended first; T = min(visual_token_num, N)
    """
    _check_saliency(saliency)
    _check_visual_token_num(visual_token_num)
    important_num = _important_num(min(visual_token_num, saliency.shape[1]), important_ratio)
    return _most_attended_first(saliency)[:, :important_num]


def _important_num(budget: int, important_ratio: float) -> int:
    is_number = isinstance(important_ratio, int | float) and not isinstance(important_ratio, bool)
    if not (is_number and 0 <= important_ratio <= 1):
        raise ValueError(f"vispruner_config.important_ratio must be a number from 0 to 1, got {important_ratio!r}")
    return int(budget * important_ratio)


@register_selector("cls_attention", kinds=("important: most attended",))
def select_cls_attention(features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int) -> torch.Tensor:
    """Keep the most attended tokens: `select_vispruner` with important_ratio=1.

    features  (B, N, C)  not looked at
    saliency  (B, N)     attention each token receives, higher is more important
    returns   (B, T)     kept indices, ascending; T = min(visual_token_num, N)
    """
    budget = _checked_budget(features, saliency, visual_token_num)
    return _most_attended_first(saliency)[:, :budget].sort(dim=-1).values


@register_selector("random", kinds=("drawn: at random",))
def select_random(
    features: torch.Tensor,
    saliency: torch.Tensor,
    visual_token_num: int,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Keep tokens drawn without replacement, each image its own draw: the baseline that ignores the image.

    features   (B, N, C)  not looked at
    saliency   (B, N)     not looked at
    seed                  every call with it draws the same tokens; exactly one of seed and generator must be given
    generator             a CPU generator, advanced by one draw per image
    returns    (B, T)     kept indices, ascending; T = min(visual_token_num, N)
    """
    budget = _checked_budget(features, saliency, visual_token_num)
    if (seed is None) == (generator is None):
        given = "neither" if seed is None else "both"
        raise ValueError(f'method "random" needs exactly one of vispruner_config.seed and a generator, got {given}')
    if generator is None:
        if not _is_int(seed):
            raise ValueError(f"vispruner_config.seed must be an integer, got {seed!r}")
        generator = torch.Generator().manual_seed(seed)
    elif generator.device.type != "cpu":
        raise ValueError(f"generator must live on the CPU, so that every device draws alike; got {generator.device}")
    batch, tokens = saliency.shape
    kept = torch.empty(batch, budget, dtype=torch.int64)
    for row in kept:
        row.copy_(torch.randperm(tokens, generator=generator)[:budget])
    return kept.sort(dim=-1).values.to(saliency.device)


@register_selector("uniform_grid", kinds=("spaced: evenly",))
def select_uniform_grid(features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int) -> torch.Tensor:
    """Keep tokens evenly spaced over the image: the baseline that knows only where tokens lie.

    The N tokens are taken as a square grid in raster order, or as a line where N is no square.

    features  (B, N, C)  not looked at
    saliency  (B, N)     not looked at
    returns   (B, T)     kept indices, ascending, the same for every image; T = min(visual_token_num, N)
    """
    budget = _checked_budget(features, saliency, visual_token_num)
    batch, tokens = saliency.shape
    side = math.isqrt(tokens)
    height, width = (side, side) if side * side == tokens else (1, tokens)
    rows = min(height, max(math.ceil(budget / width), round(math.sqrt(budget))))
    kept = []
    for k, row in enumerate(_evenly_placed(rows, height)):
        columns = (k + 1) * budget // rows - k * budget // rows
        kept += [row * width + column for column in _evenly_placed(columns, width)]
    return torch.tensor(kept, device=saliency.device).repeat(batch, 1)


def _evenly_placed(count: int, length: int) -> list[int]:
    return [(2 * k + 1) * length // (2 * count) for k in range(count)]


def _most_attended_first(saliency: torch.Tensor) -> torch.Tensor:
    return saliency.argsort(dim=-1, descending=True, stable=True)


def _checked_budget(features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int) -> int:
    """Check what every selector is given, and return how many tokens it keeps per image."""
    _check_saliency(saliency)
    _check_visual_token_num(visual_token_num)
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
    return min(visual_token_num, saliency.shape[1])


def _check_saliency(saliency: torch.Tensor) -> None:
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


def _check_visual_token_num(visual_token_num: int) -> None:
    _check_count("visual_token_num", visual_token_num, ' (use method="none" to disable pruning)')


def _check_count(field: str, value: int, remedy: str = "") -> None:
    if not _is_int(value):
        raise ValueError(f"vispruner_config.{field} must be an integer >= 1, got {value!r}{remedy}")
    if value < 1:
        raise ValueError(f"vispruner_config.{field} must be >= 1, got {value}{remedy}")


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


# Registers the methods of related work. They are built on the functions above, hence the import at the end, and with a
# star because nothing is there yet when that file is the first of the two to be imported.
from .related_selectors import *  # noqa: E402, F403
