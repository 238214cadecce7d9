"""Selectors of related work that weigh how varied the kept tokens are, called as those of token_selection.py.

Each follows the code that its authors released, as far as that is defined; a docstring says what is a choice of ours.
Budgets are this package's, ties go to the lowest index, and features are compared in float32 at least.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch

from .related_selectors import FEW_TOKENS, POOL, picked_apart
from .selector_inputs import (
    check_count,
    checked_budget,
    checked_projected,
    checked_share,
    checked_strength,
    checked_unit,
    every_token,
    most_attended_first,
    widened,
)
from .selector_registry import register_selector
from .similarity import BLOCK, cosines, images_at_once, is_traced, norms_of, row_blocks, without_autocast


@register_selector("mmr", kinds=("diverse: attended, and far from each other",))
def select_mmr(
    features: torch.Tensor,
    saliency: torch.Tensor,
    visual_token_num: int,
    projected: torch.Tensor,
    importance_weight: float = 0.5,
) -> torch.Tensor:
    """Keep tokens that are attended and unlike those kept: maximal marginal relevance (IDPruner, arXiv 2602.13315).

    features           (B, N, C)  not looked at
    saliency           (B, N)     attention each token receives, brought to 0 to 1 in each image
    projected          (B, N, D)  features after the projector
    importance_weight             lambda: how much attention counts, the cosine to the nearest kept token counts
                                  1 - lambda; from 0 to 1
    returns            (B, T)     kept indices, ascending; T = min(visual_token_num, N)

    The first is the most attended. The rule is the authors'; that attention ranks is a choice of ours, for they train
    a scorer, and their figures hold for that one alone.
    """
    budget = checked_budget(features, saliency, visual_token_num)
    weight = checked_share("importance_weight", importance_weight)
    unit = checked_unit(projected, saliency)
    if budget == saliency.shape[1]:
        return every_token(saliency)
    attention = saliency.detach().to(unit.dtype)
    lowest, highest = attention.amin(dim=-1, keepdim=True), attention.amax(dim=-1, keepdim=True)
    span = (highest - lowest).masked_fill(highest == lowest, 1)
    importance = (attention - lowest) / span
    first = importance.argmax(dim=-1, keepdim=True)
    slope = torch.full_like(importance, 1 - weight)
    return picked_apart(unit, weight * importance, slope, budget, first).sort(dim=-1).values


@register_selector("adts", kinds=("diverse: far from each other, the attended farther",))
def select_adts(
    features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int, projected: torch.Tensor
) -> torch.Tensor:
    """Keep tokens far from each other, distances weighted by attention (ADTS of FlashVID, arXiv 2602.08024).

    features   (B, N, C)  not looked at
    saliency   (B, N)     attention each token receives: what its distances are multiplied by
    projected  (B, N, D)  features after the projector
    returns    (B, T)     kept indices, ascending; T = min(visual_token_num, N)

    The authors' first version; each frame of a video is chosen from alone, as in theirs. They go on to fold the rest
    into tokens of other frames, which is no part of this.
    """
    budget = checked_budget(features, saliency, visual_token_num)
    unit = checked_unit(projected, saliency)
    if budget == saliency.shape[1]:
        return every_token(saliency)
    attention = saliency.detach().to(unit.dtype)
    return picked_apart(unit, attention, attention, budget).sort(dim=-1).values


VARIANCE_WEIGHT = 0.09  # HoloV's alpha
LEAST_VARIANCE = 1e-6  # what it adds to a variance that it divides by


@register_selector("holov", kinds=("important: most attended of its strip",))
def select_holov(
    features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int, projected: torch.Tensor, strips: int = 16
) -> torch.Tensor:
    """Keep in each strip of the picture its most attended tokens, as many as it deserves (HoloV, arXiv 2510.02912).

    features   (B, N, C)  not looked at
    saliency   (B, N)     attention each token receives
    projected  (B, N, D)  features after the projector
    strips                into how many runs of the raster order an image is cut, 16 as for LLaVA; at most N
    returns    (B, T)     kept indices, ascending; T = min(visual_token_num, N)

    A strip deserves in proportion to the mean of attention plus 0.09 times the variance of its cosines. As the authors
    scale that variance to the attention's mean, it hardly counts: shares follow attention. Where a strip has fewer
    tokens than it deserves, their code makes up for them by rows of zeros; here by the most attended tokens that are
    left anywhere. A strip of one token is scaled as the others are.
    """
    budget = checked_budget(features, saliency, visual_token_num)
    check_count("method_options.strips", strips)
    unit = checked_unit(projected, saliency)
    tokens = saliency.shape[1]
    if budget == tokens:
        return every_token(saliency)
    strips = min(strips, tokens)
    deserved = _deserved(unit, saliency.detach().to(unit.dtype), strips, budget)
    lengths = _strip_lengths(tokens, strips)
    strip = torch.arange(strips, device=unit.device).repeat_interleave(
        torch.tensor(lengths, device=unit.device), output_size=tokens
    )
    start = torch.tensor([sum(lengths[:number]) for number in range(strips)], device=unit.device)
    order = most_attended_first(saliency)
    by_strip = order.gather(1, strip[order].argsort(dim=-1, stable=True))
    place = torch.arange(tokens, device=unit.device) - start[strip]  # in the order of attention, within its strip
    first = (place < deserved[:, strip]).int()
    is_first = torch.zeros_like(first).scatter(1, by_strip, first)
    order = order.gather(1, most_attended_first(is_first.gather(1, order)))
    return order[:, :budget].sort(dim=-1).values


def _strip_lengths(tokens: int, strips: int) -> list[int]:
    return [tokens // strips + (number < tokens % strips) for number in range(strips)]


def _deserved(unit: torch.Tensor, attention: torch.Tensor, strips: int, budget: int) -> torch.Tensor:
    """Return how many tokens each strip may keep, more than it has where it should: (B, N, D), (B, N) -> (B, P)."""
    lengths = _strip_lengths(unit.shape[1], strips)
    scores = []
    for rows, weights in zip(unit.split(lengths, dim=1), attention.split(lengths, dim=1), strict=True):
        variance = _variance_of_cosines(rows)
        scores.append(weights.mean(dim=-1) * (1 + VARIANCE_WEIGHT * variance / (variance + LEAST_VARIANCE)))
    score = torch.stack(scores, dim=-1).clamp_min(0)
    total = score.sum(dim=-1, keepdim=True)
    share = score / total.masked_fill(total == 0, 1)
    whole = (share * budget).floor().to(torch.int64)
    rank = most_attended_first(share).argsort(dim=-1)
    return whole + (rank < budget - whole.sum(dim=-1, keepdim=True)).to(torch.int64)


def _variance_of_cosines(rows: torch.Tensor) -> torch.Tensor:
    """Return the mean over tokens of the variance of their cosines to the others: (B, K, D) -> (B,).

    A token's own place counts as a cosine of 0, which is summed over but not divided by, as in the authors' code.
    """
    count = rows.shape[1]
    if count == 1:
        return torch.zeros_like(rows[:, 0, 0])
    cosine = cosines(rows, rows)
    cosine.diagonal(0, 1, 2).zero_()
    mean = cosine.sum(dim=-1, keepdim=True) / (count - 1)
    return ((cosine - mean) ** 2).sum(dim=-1).div_(count - 1).mean(dim=-1)


# PruneSID


@register_selector("prunesid", kinds=("varied: attended, of different groups",))
def select_prunesid(features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int) -> torch.Tensor:
    """Keep of each group of alike tokens the attended that differ from each other (PruneSID, arXiv 2603.09480).

    features  (B, N, C)  encoder features; their length counts, for they pass through a sigmoid
    saliency  (B, N)     attention each token receives
    returns   (B, T)     kept indices, ascending; T = min(visual_token_num, N)

    There are T / 4 groups, one for each principal component of the features: a token is of the one it loads on most.
    In each group a token is set back that is too much like a more attended one, the more budget the less easily. A
    group then keeps at least one token, and otherwise as many as it has left of T, those set back last.

    The authors' components are drawn at random (`pca_lowrank`), here they are those of an exact decomposition: what is
    kept agrees with theirs as far as theirs agrees with itself. Their [CLS] takes one of the T places, here none.
    """
    budget = checked_budget(features, saliency, visual_token_num)
    features = widened(features)
    batch, tokens, width = features.shape
    unit = features / norms_of(features)
    if budget == tokens:
        return every_token(saliency)
    attention = saliency.detach().to(unit.dtype)
    groups = max(1, min(budget // 4, tokens, width))
    group = _principal_component(torch.sigmoid(features), groups)
    stays = _unlike_more_attended(unit, group, attention, budget / 32 * _mean_cosine(unit))
    none = torch.zeros(batch, groups, dtype=torch.int64, device=unit.device)
    size = none.scatter_add(1, group, torch.ones_like(group))
    quota = _quotas(size, none.scatter_add(1, group, stays.to(torch.int64)), budget, budget)
    order = most_attended_first(attention)
    order = order.gather(1, most_attended_first(stays.gather(1, order).int()))
    order = order.gather(1, group.gather(1, order).argsort(dim=-1, stable=True))
    own = group.gather(1, order)
    place = torch.arange(tokens, device=unit.device) - (size.cumsum(dim=-1) - size).gather(1, own)
    is_kept = torch.zeros_like(group, dtype=torch.int32).scatter(1, order, (place < quota.gather(1, own)).int())
    return most_attended_first(is_kept)[:, :budget]


def _principal_component(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return on which of so many principal components each token loads most: (B, N, C) -> (B, N)."""
    values = values - values.mean(dim=-1, keepdim=True)
    tokens, width = values.shape[1:]
    turned = values if tokens <= width else values.mT  # whichever has the smaller matrix of products
    strength, vectors = torch.linalg.eigh(cosines(turned, turned))
    strength, vectors = strength[..., -count:].flip(-1), vectors[..., -count:].flip(-1)
    if tokens > width:
        root = strength.clamp_min(torch.finfo(values.dtype).tiny).sqrt()
        vectors = cosines(values, vectors.mT) / root[:, None]
    noise = strength[:, :1] * max(tokens, width) * torch.finfo(values.dtype).eps
    return vectors.abs().mul((strength > noise)[:, None]).argmax(dim=-1)


def _mean_cosine(unit: torch.Tensor) -> torch.Tensor:
    """Return the mean cosine of two different tokens of each image: (B, N, C) -> (B,)."""
    tokens = unit.shape[1]
    alone = (unit**2).sum(dim=(1, 2))
    return ((unit.sum(dim=1) ** 2).sum(dim=-1) - alone) / (tokens * (tokens - 1))


def _quotas(size: torch.Tensor, stays: torch.Tensor, budget: int, kept: int) -> torch.Tensor:
    """Return how many tokens each group keeps, `kept` in all: (B, G) tokens and (B, G) that are not set back.

    At least one each, at most five for every started 64 of the budget and what is not set back, unless there are too
    few of these; what is between goes by the number of those not set back, then to the groups with most of them.
    """
    fewest = size.clamp(max=1)
    most = torch.minimum(size, stays).clamp(max=5 * -(-budget // 64))
    more = torch.zeros_like(size[:, :1])  # the least number by which all must be raised to suffice, bit by bit
    for bit in reversed(range(budget.bit_length())):
        tried = more + (1 << bit) - 1
        enough = torch.minimum(most + tried, size).sum(dim=-1, keepdim=True) >= budget
        more = torch.where(enough, more, more + (1 << bit))
    most = torch.minimum(most + more, size)
    others = kept - fewest.sum(dim=-1, keepdim=True)
    until = _rounded_quotient(stays.cumsum(dim=-1) * others, stays.sum(dim=-1, keepdim=True).clamp_min(1))
    quota = torch.minimum(fewest + until.diff(dim=-1, prepend=torch.zeros_like(until[:, :1])), most)
    order = most_attended_first(stays)
    room = (most - quota).gather(1, order)
    left = kept - quota.sum(dim=-1, keepdim=True) - (room.cumsum(dim=-1) - room)
    return quota.scatter_add(1, order, torch.minimum(left.clamp_min(0), room))


def _rounded_quotient(number: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    whole, rest = number // by, 2 * (number % by)
    return whole + ((rest > by) | ((rest == by) & (whole % 2 == 1))).to(number.dtype)  # half to even


def _unlike_more_attended(
    unit: torch.Tensor, group: torch.Tensor, attention: torch.Tensor, threshold: torch.Tensor
) -> torch.Tensor:
    """Say which tokens are attended and no more than `threshold` (B,) like a more attended one of their group, if
    that one is not set back itself: (B, N, C), (B, N), (B, N) -> (B, N).
    """
    if unit.device.type == "cpu" and not is_traced():
        return _unlike_on_cpu(unit, group, attention, threshold)
    images = images_at_once(unit.shape[1])
    parts = zip(*(given.split(images) for given in (unit, group, attention, threshold)), strict=True)
    return torch.cat([_unlike_by_tensors(*part) for part in parts])


def _unlike_by_tensors(
    unit: torch.Tensor, group: torch.Tensor, attention: torch.Tensor, threshold: torch.Tensor
) -> torch.Tensor:
    batch, tokens = group.shape
    order = most_attended_first(attention)
    unit = unit.gather(1, order[..., None].expand_as(unit))
    group, attended = group.gather(1, order), attention.gather(1, order) > 0
    blocked = []
    for rows in row_blocks(batch, tokens):
        alike = cosines(unit[:, rows], unit) > threshold[:, None, None]
        alike &= group[:, rows, None] == group[:, None]
        blocked.append(alike.tril(rows.start - 1))
    by = torch.cat(blocked, dim=1)
    stays = attended
    for _ in range(tokens if unit.device.type != "meta" else 1):  # after k times the first k are decided
        again = attended & ~(by & stays[:, None]).any(dim=-1)
        if not is_traced() and unit.device.type != "meta" and torch.equal(again, stays):
            break
        stays = again
    return torch.zeros_like(stays).scatter(1, order, stays)


def _unlike_on_cpu(
    unit: torch.Tensor, group: torch.Tensor, attention: torch.Tensor, threshold: torch.Tensor
) -> torch.Tensor:
    batch, tokens = group.shape
    order = most_attended_first(attention)
    by_group = order.gather(1, group.gather(1, order).argsort(dim=-1, stable=True)).numpy()
    numbers, attended = group.numpy(), (attention > 0).numpy()
    stays = torch.zeros_like(group, dtype=torch.bool).numpy()
    near = _near_by_images(unit, threshold)
    for image in range(batch):
        start = 0
        while start < tokens:
            stop = start + int((numbers[image] == numbers[image, by_group[image, start]]).sum())
            members = by_group[image, start:stop]
            stays[image, _unlike_earlier(members[attended[image, members]], near(image))] = True
            start = stop
    return torch.from_numpy(stays)


Near = Callable[[Any, Any], Any]


def _near_by_images(unit: torch.Tensor, threshold: torch.Tensor) -> Callable[[int], Near]:
    """Return what says of an image which of its tokens (K,) are more than `threshold` like which others (L,)."""
    tokens = unit.shape[1]
    if tokens > FEW_TOKENS:

        def compared(image: int, some: Any, others: Any) -> Any:
            rows, columns = unit[image, torch.from_numpy(some)], unit[image, torch.from_numpy(others)]
            return (cosines(rows, columns) > threshold[image]).numpy()

        return lambda image: partial(compared, image)
    images = max(1, BLOCK // tokens**2)
    parts = zip(unit.split(images), threshold.split(images), strict=True)
    held = [(cosines(some, some) > limit[:, None, None]).numpy() for some, limit in parts]
    return lambda image: lambda some, others: held[image // images][image % images][some[:, None], others]


def _unlike_earlier(members: Any, near: Near) -> Any:
    """Return those of `members` (K,) that none of these before them is near to."""
    chosen, count = members.copy(), 0
    some = max(1, BLOCK // max(1, len(members)))
    for start in range(0, len(members), some):
        part = members[start : start + some]
        if count:
            part = part[~near(part, chosen[:count]).any(1)]
        alike, left = near(part, part), part == part
        for place in range(len(part)):
            if left[place]:
                left[place + 1 :] &= ~alike[place, place + 1 :]
        part = part[left]
        chosen[count : count + len(part)] = part
        count += len(part)
    return chosen[:count]


# OTPrune


@register_selector("otprune", kinds=("diverse: spread like all tokens",), by_saliency=False)
def select_otprune(
    features: torch.Tensor,
    saliency: torch.Tensor,
    visual_token_num: int,
    projected: torch.Tensor,
    strength: float = 0.01,
) -> torch.Tensor:
    """Keep tokens that together are spread like all of them (OTPrune, arXiv 2602.20205).

    features   (B, N, C)  not looked at
    saliency   (B, N)     not looked at
    projected  (B, N, D)  features after the projector, each channel brought to length 1 over the tokens of an image
    strength              gamma: how much a second token of a kind is worth less; above 0
    returns    (B, T)     kept indices, ascending; T = min(visual_token_num, N)

    Each next token adds most to the determinant of I + gamma (V V') (V V')', of the rows and columns of those kept.
    """
    budget = checked_budget(features, saliency, visual_token_num)
    strength = checked_strength("strength", strength)
    projected = checked_projected(projected, saliency)
    spread = projected / norms_of(projected.mT).mT
    batch, tokens, width = spread.shape
    if budget == tokens:
        return every_token(saliency)
    # The matrix is I + F S F', F and S of the smaller of two sizes. Once some are picked it is that with a smaller S.
    if tokens <= width:
        rows = cosines(spread, spread)
        inner = strength * torch.eye(tokens, dtype=rows.dtype, device=rows.device).expand(batch, -1, -1)
    else:
        rows, inner = spread, strength * cosines(spread.mT, spread.mT)
    if is_traced() or rows.device.type != "cpu" or tokens <= FEW_TOKENS:
        return _adding_by_tensors(rows, inner, budget).sort(dim=-1).values
    picks = [_adding_by_pools(*image, budget) for image in zip(rows, inner, strict=True)]
    return torch.tensor(picks, device=rows.device).sort(dim=-1).values


def _gains(rows: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """Return by what each token multiplies the determinant: (..., N, R), (..., R, R) -> (..., N)."""
    return 1 + (cosines(rows, inner) * rows).sum(dim=-1)


def _adding_by_tensors(rows: torch.Tensor, inner: torch.Tensor, budget: int) -> torch.Tensor:
    """Pick one token after the other, without a host sync: (B, N, R), (B, R, R) -> (B, budget)."""
    gain = _gains(rows, inner)
    is_picked = torch.zeros_like(gain, dtype=torch.bool)
    picks: list[torch.Tensor] = []
    while len(picks) < budget:
        picks.append(gain.masked_fill(is_picked, float("-inf")).argmax(dim=-1, keepdim=True))
        is_picked = is_picked.scatter(1, picks[-1], True)
        row = rows.gather(1, picks[-1][..., None].expand(-1, -1, rows.shape[-1]))
        pushed = cosines(row, inner)  # (B, 1, R)
        own = gain.gather(1, picks[-1])
        gain = gain - cosines(pushed, rows)[:, 0] ** 2 / own
        inner = inner - pushed.mT * pushed / own[..., None]
    return torch.cat(picks, dim=-1)


def _adding_by_pools(rows: torch.Tensor, inner: torch.Tensor, budget: int) -> list[int]:
    """Pick as `_adding_by_tensors` does, in one image (N, R), (R, R), but update all tokens for many picks at a time.

    What a token adds only falls as others are picked. So the best of the few best is the next, as long as it is better
    than all others were.
    """
    gain = _gains(rows, inner)
    picks: list[int] = []
    while len(picks) < budget:
        best_first = gain.argsort(descending=True, stable=True)[: POOL + 1]
        pool = best_first[:-1].sort().values  # ascending, because of equally good ones the first is next
        limit = (-float(gain[best_first[-1]]), int(best_first[-1]))
        some = rows[pool]
        left = cosines(cosines(some, inner), some)
        new = picked_of_pool(left, gain[pool], pool.tolist(), limit, budget - len(picks), identity=1)
        picks += new
        gain, inner = _after_picking(rows, inner, gain, torch.tensor(new))
    return picks


def picked_of_pool(
    left: torch.Tensor,
    worth: torch.Tensor,
    tokens: list[int],
    limit: tuple[float, int],
    most: int,
    identity: float = 0,
    floor: float = -float("inf"),
) -> list[int]:
    """Pick the best of P tokens, one after the other, as long as each is better than all that are not among them.

    left      (P, P) what is left of their inner products, changed in place
    worth     (P,) what each adds, changed in place
    tokens    their numbers, ascending
    limit     -worth and number of the best of the others; the first pick is better in any case
    most      how many are wanted
    identity  what the matrix whose determinant grows has on its diagonal beside these products
    floor     what adds no more is never picked
    """
    inner, value = left.numpy(), worth.numpy()
    picks: list[int] = []
    while len(picks) < most:
        best = int(value.argmax())
        if value[best] <= floor or (picks and (-float(value[best]), tokens[best]) > limit):
            break
        picks.append(tokens[best])
        column, own = inner[:, best].copy(), identity + inner[best, best]
        value -= column**2 / own
        value[best] = -float("inf")
        inner -= column[:, None] * (column / own)
    return picks


def _after_picking(
    rows: torch.Tensor, inner: torch.Tensor, gain: torch.Tensor, new: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gains (N,) and inner matrix (R, R) once the tokens `new` (K,) are picked, whose gains are -inf."""
    with without_autocast(rows.device):
        pushed = rows[new] @ inner  # (K, R)
        factor = torch.linalg.cholesky(pushed @ rows[new].T + torch.eye(len(new), dtype=rows.dtype))
        pushed = torch.linalg.solve_triangular(factor, pushed, upper=False)
        gain = gain - (rows @ pushed.T).square_().sum(dim=-1)
        gain[new] = -float("inf")
        return gain, inner - pushed.T @ pushed


# Of videos


@register_selector("evs", kinds=("changed: unlike its place in the frame before",))
def select_evs(
    features: torch.Tensor,
    saliency: torch.Tensor,
    visual_token_num: int,
    projected: torch.Tensor,
    videos: Sequence[int] | None = None,
    grid: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Keep of each frame the tokens least like those at their place in the frame before (Efficient Video Sampling).

    features   (B, N, C)   not looked at
    saliency   (B, N)      attention each token receives; of the first frame of a video, or an image, the most attended
                           are kept
    projected  (B, N, D)   features after the projector
    videos     B integers  which video each frame is of, the frames of each one after the other; None for images
    grid                   not looked at; it says that token n of each frame lies at one place
    returns    (B, T)      kept indices, ascending; T = min(visual_token_num, N)

    The rule is that of vLLM, which keeps all of the first frame and shares the rest out among the others; that every
    frame keeps as many, known beforehand, and what the first one keeps, are choices of ours.
    """
    budget = checked_budget(features, saliency, visual_token_num)
    unit = checked_unit(projected, saliency)
    lengths = _lengths_of_videos(videos, len(unit))
    change = -(unit[1:] * unit[:-1]).sum(dim=-1)
    score = torch.cat([torch.zeros_like(unit[:1, :, 0]), change])
    first = torch.tensor([place == 0 for length in lengths for place in range(length)], device=unit.device)
    score = torch.where(first[:, None], saliency.detach().to(score.dtype), score)
    return most_attended_first(score)[:, :budget].sort(dim=-1).values


WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)  # of VidCom2's Gaussian kernels


@register_selector("vidcom2", kinds=("distinct: unlike its frame and its video",), by_saliency=False)
def select_vidcom2(
    features: torch.Tensor,
    saliency: torch.Tensor,
    visual_token_num: int,
    projected: torch.Tensor,
    videos: Sequence[int] | None = None,
) -> torch.Tensor:
    """Keep of each frame the tokens least like the mean of the frame and of its video (VidCom2, arXiv 2505.14454).

    features   (B, N, C)   not looked at
    saliency   (B, N)      not looked at
    projected  (B, N, D)   features after the projector, compared in that half of the channels which varies least
    videos     B integers  which video each frame is of, the frames of each one after the other; None for images
    returns    (B, T)      kept indices, ascending; T = min(visual_token_num, N)

    The authors give a frame more tokens the less it is like its video; that every frame keeps as many, known
    beforehand, is a choice of ours.
    """
    budget = checked_budget(features, saliency, visual_token_num)
    projected = checked_projected(projected, saliency)
    norms_of(projected)
    if budget == saliency.shape[1]:
        return every_token(saliency)
    if videos is None:
        likeness = _likeness(projected[:, None])[:, 0]
    else:
        parts = projected.split(_lengths_of_videos(videos, len(projected)))
        likeness = torch.cat([_likeness(frames[None])[0] for frames in parts])
    return likeness.argsort(dim=-1, stable=True)[:, :budget].sort(dim=-1).values


def _likeness(frames: torch.Tensor) -> torch.Tensor:
    """Return how much each token is like the means of its frame and its video: (V, F, N, D) -> (V, F, N)."""
    half = max(1, frames.shape[-1] // 2)
    steady = frames.var(dim=(1, 2), correction=0).argsort(dim=-1, stable=True)[:, :half]
    rows = frames.gather(-1, steady[:, None, None].expand(*frames.shape[:3], -1))
    rows = rows / norms_of(rows)
    of_frame = rows.mean(dim=2, keepdim=True)
    likeness = torch.zeros_like(rows[..., 0])
    for mean in (rows.mean(dim=(1, 2), keepdim=True), of_frame):
        distance = ((rows - mean) ** 2).sum(dim=-1)
        for width in WIDTHS:
            likeness = likeness + torch.exp(distance / (-2 * width))
    return likeness


def _lengths_of_videos(videos: Sequence[int] | None, frames: int) -> list[int]:
    """Return how many of the frames, in order, each video has; every one is a video of its own where there is none."""
    if videos is None:
        return [1] * frames
    numbers = list(videos)
    lengths = [len(list(group)) for _, group in groupby(numbers)]
    if len(numbers) != frames or len(lengths) != len(set(numbers)):
        raise ValueError(
            f"videos must name the video of each of {frames} frames, those of one video together, got {numbers}"
        )
    return lengths
