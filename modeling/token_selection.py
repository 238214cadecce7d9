"""Selectors: pure functions that choose which visual tokens of an encoded image stay, and the registry naming them.

Every selector is called as `select(features, saliency, visual_token_num, **options)` and returns the kept indices,
ascending, exactly min(visual_token_num, N) per image. It knows no model and no config object, never changes its inputs
and draws random numbers only by the seed it is given. To add a method, write such a function below and
put `@register_selector("its name")` on it: its further parameters are the inputs it needs (see `FURTHER_INPUTS`) and
the options that `select_tokens` hands to it. Selectors of related work are in related_selectors.py.
"""

import math

import torch

from .duplicate_removal import default_step, keep_without_duplicates
from .selector_inputs import check_count, checked_budget, checked_count, checked_grid, is_int, most_attended_first
from .selector_registry import register_selector
from .similarity import norms_of, without_autocast

AUTO = "auto"  # of `important_ratio`
LEAST_RATIO, MOST_RATIO = 0.1, 0.9  # that this may mean


def _vispruner_kind(kept: torch.Tensor, saliency: torch.Tensor, important_ratio: float | str = 0.5) -> torch.Tensor:
    if important_ratio == AUTO:
        # How many there were is not known any more: those are shown that no dropped one is attended more than.
        dropped = torch.ones_like(saliency, dtype=torch.bool).scatter(1, kept, False)
        bound = saliency.masked_fill(~dropped, float("-inf")).amax(dim=-1, keepdim=True)
        return (saliency.gather(1, kept) < bound).to(torch.int64)
    # The most attended of all are those of the kept ones, also where a model chose from less than all of them.
    important = important_tokens(saliency.gather(1, kept), kept.shape[1], float(important_ratio))
    return torch.ones_like(kept).scatter(1, important, 0)


@register_selector("vispruner", kinds=("important: most attended", "diverse: least alike"), kind_of=_vispruner_kind)
def select_vispruner(
    features: torch.Tensor,
    saliency: torch.Tensor,
    visual_token_num: int,
    important_ratio: float | str = 0.5,
    dedup_step: int | None = None,
) -> torch.Tensor:
    """Keep the most attended tokens, then the least redundant of the rest (arXiv 2412.01818, sec. 4).

    features         (B, N, C)  encoder features compared for similarity, in their own dtype
    saliency         (B, N)     attention each token receives, higher is more important
    important_ratio             fraction of the budget given to the most attended tokens, 0 to 1; or "auto", see
                                `adaptive_ratio`
    dedup_step                  most tokens dropped per round of duplicate removal, 8 in the paper; None is 8 for every
                                full 1,024 tokens, so the paper's up to 2,047 and at most 256 rounds beyond
    returns          (B, T)     kept indices, ascending; T = min(visual_token_num, N)

    Raises ValueError for a wrong shape, dtype or option, and for NaN saliency or features whose norm is not finite (on
    CUDA, or while compiling, the latter two are asserted on the device instead, because a check would wait for it).
    """
    budget = checked_budget(features, saliency, visual_token_num)
    important_num = None if important_ratio == AUTO else _important_num(budget, important_ratio, ' or "auto"')
    if dedup_step is not None:
        check_count("dedup_step", dedup_step)
    batch, tokens = saliency.shape
    if budget == tokens:
        return torch.arange(tokens, device=saliency.device).repeat(batch, 1)
    order, features = most_attended_first(saliency), features.detach()
    step = default_step(tokens) if dedup_step is None else dedup_step
    if important_num is not None:
        return _keep(features, order, important_num, budget, step)
    kept = torch.empty_like(order[:, :budget])
    for number, images in _images_by_important_num(features, budget).items():
        kept[images] = _keep(features[images], order[images], number, budget, step)
    return kept


def _keep(features: torch.Tensor, order: torch.Tensor, important_num: int, budget: int, step: int) -> torch.Tensor:
    if important_num == budget:
        return order[:, :budget].sort(dim=-1).values
    return keep_without_duplicates(features, order, important_num, budget, step)


def _images_by_important_num(features: torch.Tensor, budget: int) -> dict[int, list[int]]:
    """Return which images have how many important tokens under "auto"; where features are no numbers, half each."""
    ratios = [0.5] * len(features) if features.device.type == "meta" else adaptive_ratio(features).tolist()
    images: dict[int, list[int]] = {}
    for image, ratio in enumerate(ratios):
        images.setdefault(int(budget * ratio), []).append(image)
    return images


def adaptive_ratio(features: torch.Tensor) -> torch.Tensor:
    """Return what `important_ratio` "auto" means: the less, so the more diversity, the higher the effective rank.

    It is 1 - ln(effective rank) / ln(min(N, C)), clamped to 0.1 to 0.9: a fraction of the rank that the features could
    have, by its logarithm. That pictures of a high effective rank need diversity and others attention was found by
    AgilePruner (ICLR 2026), whose code is not released; the formula is ours.

    features  (B, N, C)  encoder features, each image judged alone and whatever its scale
    returns   (B,)       in float64; reading it waits for the device
    """
    most = max(2, min(features.shape[1:]))
    return (1 - effective_rank(features).log() / math.log(most)).clamp(LEAST_RATIO, MOST_RATIO)


def effective_rank(features: torch.Tensor) -> torch.Tensor:
    """Return the exponential of the entropy of the singular values as shares: (B, N, C) -> (B,), 1 to min(N, C)."""
    norms_of(features.detach())
    # In float64, for small singular values are roots of what is lost beside the large ones; some devices have none.
    wide = features.detach().to("cpu" if features.device.type == "mps" else features.device).double()
    wide = wide if wide.shape[1] <= wide.shape[2] else wide.mT
    with without_autocast(wide.device):
        values = torch.linalg.eigvalsh(wide @ wide.mT).clamp_min(0).sqrt()
    shares = values / values.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum(dim=-1).exp().to(features.device)


def important_tokens(saliency: torch.Tensor, visual_token_num: int, important_ratio: float = 0.5) -> torch.Tensor:
    """Return the tokens that `select_vispruner` keeps for their attention alone.

    saliency  (B, N)
    returns   (B, int(T * important_ratio))  most attended first; T = min(visual_token_num, N)
    """
    important_num = _important_num(checked_count(saliency, visual_token_num), important_ratio)
    return most_attended_first(saliency)[:, :important_num]


def _important_num(budget: int, important_ratio: float | str, otherwise: str = "") -> int:
    is_number = isinstance(important_ratio, int | float) and not isinstance(important_ratio, bool)
    if not is_number or not 0 <= float(important_ratio) <= 1:
        raise ValueError(
            f"vispruner_config.important_ratio must be a number from 0 to 1{otherwise}, got {important_ratio!r}"
        )
    return int(budget * float(important_ratio))


@register_selector("cls_attention", kinds=("important: most attended",))
def select_cls_attention(features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int) -> torch.Tensor:
    """Keep the most attended tokens: `select_vispruner` with important_ratio=1.

    features  (B, N, C)  not looked at
    saliency  (B, N)     attention each token receives, higher is more important
    returns   (B, T)     kept indices, ascending; T = min(visual_token_num, N)
    """
    budget = checked_budget(features, saliency, visual_token_num)
    return most_attended_first(saliency)[:, :budget].sort(dim=-1).values


@register_selector("random", kinds=("drawn: at random",), by_saliency=False)
def select_random(
    features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int, seed: int | None = None
) -> torch.Tensor:
    """Keep tokens drawn without replacement, each image its own draw: the baseline that ignores the image.

    features   (B, N, C)  not looked at
    saliency   (B, N)     not looked at
    seed                  every call with it draws the same tokens, on every device; it must be given
    returns    (B, T)     kept indices, ascending; T = min(visual_token_num, N)
    """
    budget = checked_budget(features, saliency, visual_token_num)
    if not is_int(seed):
        raise ValueError(f'method "random" draws by vispruner_config.seed, which must be an integer, got {seed!r}')
    generator = torch.Generator().manual_seed(seed)
    batch, tokens = saliency.shape
    kept = torch.empty(batch, budget, dtype=torch.int64)
    for row in kept:
        row.copy_(torch.randperm(tokens, generator=generator)[:budget])
    return kept.sort(dim=-1).values.to(saliency.device)


@register_selector("uniform_grid", kinds=("spaced: evenly",), by_saliency=False)
def select_uniform_grid(
    features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int, grid: tuple[int, int] | None = None
) -> torch.Tensor:
    """Keep tokens evenly spaced over the image: the baseline that knows only where tokens lie.

    features  (B, N, C)        not looked at
    saliency  (B, N)           not looked at
    grid      (rows, columns)  of the N tokens; None takes them as a square, or as a line where N is no square
    returns   (B, T)           kept indices, ascending, the same for every image; T = min(visual_token_num, N)
    """
    budget = checked_budget(features, saliency, visual_token_num)
    batch, tokens = saliency.shape
    height, width = _square_or_line(tokens) if grid is None else checked_grid(grid, tokens)
    # As far apart down as across; but no more rows than there are, and no fewer than hold the budget.
    rows = min(height, budget, max(math.ceil(budget / width), round(math.sqrt(budget * height / width))))
    kept = []
    for k, row in enumerate(_evenly_placed(rows, height)):
        columns = (k + 1) * budget // rows - k * budget // rows
        kept += [row * width + column for column in _evenly_placed(columns, width)]
    return torch.tensor(kept, device=saliency.device).repeat(batch, 1)


def _square_or_line(tokens: int) -> tuple[int, int]:
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else (1, tokens)


def _evenly_placed(count: int, length: int) -> list[int]:
    return [(2 * k + 1) * length // (2 * count) for k in range(count)]
