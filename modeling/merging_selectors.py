"""Methods that fold tokens together behind the encoder: VisionZip, ToMe, PruMerge, PruMerge+ and VFlowOpt.

Each returns a `Selection`: what stays, ascending, and what is folded into it. A token that stands for several takes
the place, the placeholder and the position of one of them, its anchor. What is no token of the grid (the [CLS] token,
a sum of what is left over) takes those of a token that does not stay. The authors put such rows first or last, and
merged ones behind the others; here all are in the order of the picture. Ties go to the lowest index.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.nn import functional as F

from .selector_inputs import (
    check_count,
    checked_budget,
    checked_grid,
    checked_rows,
    checked_share,
    is_number,
    most_attended_first,
    widened,
)
from .selector_registry import Merge, Selection, Then, in_proportion, register_selector, rows_at
from .similarity import cosines, norms_of, refuse_unless, row_blocks

# Of the tokens that VisionZip keeps, how many others are folded into: 10 of 64, 20 of 128 and 30 of 192 in its README.
CONTEXTUAL_SHARE = 0.15625

# What the authors of VFlowOpt found for LLaVA-OneVision-7B, by the share of the visual tokens that a decoder layer
# holds on average: lmms_eval/models/llava_onevision_training_free.py of github.com/sihany077/VFlowOpt at 129eeef,
# rounded. What the encoder leaves there (0.723, 0.265 and 0.117 of the tokens) follows from that share.
VFLOWOPT_PUBLISHED: Mapping[float, Mapping[str, Any]] = MappingProxyType(
    {
        0.5: {"global_threshold": 28.683, "cell": 11.757, "stage_shares": [0.7487, 0.487]},
        0.25: {"global_threshold": 34.760, "cell": 15.581, "stage_shares": [0.9833, 0.8773]},
        0.1: {"global_threshold": 39.265, "cell": 17.387, "stage_shares": [1.0, 0.6011]},
    }
)


def contextual_num(budget: int, contextual_share: float) -> int:
    """Return how many of the tokens that stay others are folded into."""
    return min(budget, round(budget * checked_share("contextual_share", contextual_share)))


def fold_into_spaced(
    keys: torch.Tensor, dominant: torch.Tensor, contextual: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take evenly spaced ones of the tokens that are not dominant; each other one is folded into the most alike.

    keys     (B, N, d)
    dominant (B, D)
    returns  targets (B, contextual), ascending; sources (B, E); which target each goes into (B, E); and the weights
             (B, E) by which their mean is added to it
    """
    batch, tokens = keys.shape[:2]
    is_rest = torch.ones(batch, tokens, dtype=torch.bool, device=keys.device).scatter(1, dominant, False)
    rest = (~is_rest).int().argsort(dim=1, stable=True)[:, : tokens - dominant.shape[1]]
    if contextual == 0:
        return rest[:, :0], rest[:, :0], rest[:, :0], keys[:, :0, 0]
    step = max(1, rest.shape[1] // contextual)
    runs = rest[:, : step * contextual].unflatten(1, (contextual, step))
    targets, sources = runs[..., 0], torch.cat([runs[..., 1:].flatten(1), rest[:, step * contextual :]], dim=1)
    unit = F.normalize(keys.detach().float(), dim=-1)
    nearest = cosines(rows_at(unit, sources), rows_at(unit, targets)).argmax(-1)
    size = unit.new_zeros(batch, contextual).scatter_add(1, nearest, torch.ones_like(nearest, dtype=unit.dtype))
    return targets, sources, nearest, (1 / size.clamp(min=1)).gather(1, nearest)


def _everything(saliency: torch.Tensor) -> Selection:
    return Selection(torch.arange(saliency.shape[1], device=saliency.device).repeat(len(saliency), 1))


def _is_taken(tokens: int, *taken: torch.Tensor) -> torch.Tensor:
    """Return (B, tokens) True where a token is in any of `taken` (B, K)."""
    together = torch.cat(taken, dim=1)
    flags = torch.zeros(len(together), tokens, dtype=torch.bool, device=together.device)
    return flags.scatter(1, together, True)


def _visionzip_kind(
    kept: torch.Tensor,
    saliency: torch.Tensor,
    merged_into: torch.Tensor,
    contextual_share: float = CONTEXTUAL_SHARE,
) -> torch.Tensor:
    is_cls = merged_into.gather(1, kept) != kept
    contextual = min(contextual_num(kept.shape[1], contextual_share), int((~is_cls[0]).sum()))
    dominant = kept.shape[1] - contextual - int(is_cls[0].sum())
    is_dominant = _is_taken(saliency.shape[1], most_attended_first(saliency)[:, :dominant]).gather(1, kept)
    return torch.where(is_cls, 0, torch.where(is_dominant, 1, 2))


@register_selector(
    "visionzip",
    kinds=("[CLS]: the image as a whole", "dominant: most attended", "contextual: with others folded in"),
    kind_of=_visionzip_kind,
)
def select_visionzip(
    features: torch.Tensor,
    saliency: torch.Tensor,
    visual_token_num: int,
    keys: torch.Tensor,
    cls_feature: torch.Tensor | None = None,
    contextual_share: float = CONTEXTUAL_SHARE,
) -> Selection:
    """Keep [CLS] and what it attends to, and fold the rest into evenly spaced others (VisionZip, arXiv 2412.04467).

    features          (B, N, C)  not looked at
    saliency          (B, N)     attention each token receives, higher is more important
    keys              (B, N, d)  keys of the layer that ranks, mean over heads
    cls_feature       (B, C)     the feature of [CLS], which is one of the T; None where there is none
    contextual_share             share of the budget for tokens that others are folded into, 0 to 1
    returns                      T = min(visual_token_num, N) tokens

    The mean of what is folded into a token is added to it, not averaged with it. The authors put [CLS] before the
    others and contextual tokens behind them; here all stand in the order of the picture.
    """
    budget = checked_budget(features, saliency, visual_token_num)
    keys = checked_rows("keys", keys, saliency)
    batch, tokens = saliency.shape
    cls_num = 0 if cls_feature is None else 1
    contextual = min(contextual_num(budget, contextual_share), budget - cls_num)
    if budget == tokens:
        return _everything(saliency)
    dominant = most_attended_first(saliency)[:, : budget - cls_num - contextual]
    targets, sources, nearest, weight = fold_into_spaced(keys, dominant, contextual)
    indices, own = torch.cat([dominant, targets], dim=1), torch.ones(batch, budget, device=saliency.device)
    merge = Merge(sources, nearest + dominant.shape[1], weight, own)
    if cls_feature is None:
        return Selection(indices, merge).ascending()
    place = _is_taken(tokens, indices).int().argmin(dim=1, keepdim=True)  # of the first token that does not stay
    own[:, -1] = 0  # nothing of the token whose place it is
    of_cls = torch.full_like(place, tokens), torch.full_like(place, budget - 1), torch.ones_like(own[:, :1])
    source, target, weight = (torch.cat(pair, dim=1) for pair in zip(merge[:3], of_cls, strict=True))
    kept = torch.cat([indices, place], dim=1)
    return Selection(kept, Merge(source, target, weight, own), extra=cls_feature[:, None]).ascending()


def _merged_kind(kept: torch.Tensor, saliency: torch.Tensor, merged_into: torch.Tensor) -> torch.Tensor:
    place = torch.arange(merged_into.shape[1], device=kept.device)
    others = merged_into.masked_fill(merged_into == place, -1)
    return (others[:, None] == kept[..., None]).any(-1).long()


@register_selector(
    "tome",
    kinds=("single: alike to no other", "merged: the mean of tokens alike"),
    kind_of=_merged_kind,
    by_saliency=False,
)
def select_tome(
    features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int, keys: torch.Tensor
) -> Selection:
    """Average tokens that are alike, pair by pair, until T are left (ToMe, arXiv 2210.09461).

    features  (B, N, C)  not looked at
    saliency  (B, N)     not looked at
    keys      (B, N, d)  keys of the layer that ranks, mean over heads
    returns              T = min(visual_token_num, N) means, each at the place of the first token in it

    The authors merge within the encoder, some tokens in every layer. How tables of pruning methods ran it is not told;
    here all steps follow each other behind the encoder, each folding as many pairs as it can.
    """
    budget = checked_budget(features, saliency, visual_token_num)
    metric = checked_rows("keys", keys, saliency)
    batch, tokens = saliency.shape
    if budget == tokens:
        return _everything(saliency)
    place = torch.arange(tokens, device=saliency.device).expand(batch, -1)
    row, size = place, torch.ones(batch, tokens, device=saliency.device, dtype=metric.dtype)
    while (left := metric.shape[1]) > budget:
        pairs = min(left // 2, left - budget)
        step = tome_step(metric, pairs)
        row = step.gather(1, row)
        metric, size = tome_means(metric, size, step, left - pairs)
    first = torch.full((batch, budget), tokens, device=row.device).scatter_reduce(1, row, place, "amin")
    weight = (1 / size).gather(1, row).masked_fill(first.gather(1, row) == place, 0)
    return Selection(first, Merge(place, row, weight, 1 / size)).ascending()


def tome_step(metric: torch.Tensor, pairs: int, class_token: bool = False) -> torch.Tensor:
    """Fold as many tokens at even places, those most alike to one at an odd place, into that one.

    metric       (B, n, d)  compared by cosine
    class_token  whether token 0 is never folded into another
    returns      (B, n)     the row that each token goes into, of n - pairs: first those at even places that stay, by
                            falling likeness (in order where there is a class token), then all at odd places
    """
    unit = metric / norms_of(metric)
    even, odd = unit[:, ::2], unit[:, 1::2]
    best, partner = [], []
    for some in row_blocks(*even.shape[:2]):
        likeness = cosines(even[:, some], odd)
        best.append(likeness.amax(-1))
        partner.append(likeness.argmax(-1))
    alike = torch.cat(best, dim=1)
    if class_token:
        alike[:, 0] = float("-inf")
    order = alike.argsort(dim=1, descending=True, stable=True)
    folded, staying = order[:, :pairs], order[:, pairs:]
    if class_token:
        staying = staying.sort(dim=1).values
    number = torch.arange(metric.shape[1], device=metric.device)
    rows = number.repeat(len(metric), 1)
    rows[:, 1::2] = staying.shape[1] + number[: odd.shape[1]]
    row = torch.empty_like(order).scatter(1, staying, number[: staying.shape[1]].expand_as(staying))
    rows[:, ::2] = row.scatter(1, folded, staying.shape[1] + torch.cat(partner, dim=1).gather(1, folded))
    return rows


def tome_means(
    tokens: torch.Tensor, size: torch.Tensor, rows: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average tokens (B, n, C), each standing for `size` (B, n), into `count` rows: (B, count, C) and their sizes."""
    sizes = size.new_zeros(len(size), count).scatter_add(1, rows, size)
    sums = tokens.new_zeros(len(tokens), count, tokens.shape[2])
    sums = sums.scatter_add(1, rows[..., None].expand_as(tokens), tokens * size[..., None])
    return sums / sizes[..., None], sizes


def kind_of_rest(kept: torch.Tensor, saliency: torch.Tensor, merged_into: torch.Tensor) -> torch.Tensor:
    """Return 1 for what stands in the place of a token that fell, 0 for tokens that stay."""
    return (merged_into.gather(1, kept) != kept).long()


@register_selector(
    "prumerge",
    kinds=("merged: attended, with tokens alike", "rest: the sum of all others"),
    kind_of=kind_of_rest,
    by_saliency=False,
)
def select_prumerge(
    features: torch.Tensor,
    saliency: torch.Tensor,
    visual_token_num: int,
    cls_query: torch.Tensor,
    raw_keys: torch.Tensor,
    neighbours: int = 32,
) -> Selection:
    """Keep what [CLS] attends to in the last layer, tokens alike added to each (LLaVA-PruMerge, arXiv 2403.15388).

    features    (B, N, C)    not looked at
    saliency    (B, N)       not looked at
    cls_query   (B, d)       the query of [CLS] in the encoder's last layer, heads side by side
    raw_keys    (B, 1+N, d)  its keys likewise, that of [CLS] first; it is left out of the softmax where it is missing
    neighbours               how many tokens alike are added to each, by their attention
    returns                  T = min(visual_token_num, N) tokens, one of which is the sum of all that are no centre

    The authors take as many as the attention has outliers, see `outlier_num`; here the budget says how many, and they
    stand in the order of the picture.
    """
    budget = checked_budget(features, saliency, visual_token_num)
    attention, keys = _last_attention(cls_query, raw_keys, saliency)
    if budget == saliency.shape[1]:
        return _everything(saliency)
    return _with_neighbours(attention, keys, most_attended_first(attention)[:, : budget - 1], neighbours)


@register_selector(
    "prumerge_plus",
    kinds=("merged: attended or evenly spaced, with tokens alike", "rest: the sum of all others"),
    kind_of=kind_of_rest,
    by_saliency=False,
)
def select_prumerge_plus(
    features: torch.Tensor,
    saliency: torch.Tensor,
    visual_token_num: int,
    cls_query: torch.Tensor,
    raw_keys: torch.Tensor,
    neighbours: int = 32,
    attended_share: float = 0.25,
) -> Selection:
    """As `prumerge`, with evenly spaced tokens besides the most attended ones (LLaVA-PruMerge+, arXiv 2403.15388).

    features        (B, N, C)    not looked at
    saliency        (B, N)       not looked at
    cls_query       (B, d)       as there
    raw_keys        (B, 1+N, d)  as there
    neighbours                   as there
    attended_share               share of the budget for the most attended tokens
    returns                      T = min(visual_token_num, N) tokens, one of which is the sum of all that are no centre

    The authors take as many as the attention has outliers, and about three times as many between them. Here the
    others are spaced as theirs are for so many attended ones; some are left out evenly where those are too many, and
    the next most attended tokens come on top where they are too few.
    """
    budget = checked_budget(features, saliency, visual_token_num)
    attention, keys = _last_attention(cls_query, raw_keys, saliency)
    batch, tokens = saliency.shape
    if budget == tokens:
        return _everything(saliency)
    order = most_attended_first(attention)
    attended = round((budget - 1) * checked_share("attended_share", attended_share))
    is_spaced = torch.zeros(batch, tokens, dtype=torch.bool, device=order.device)
    is_spaced[:, : tokens - 1 : max(1, tokens // max(1, attended) // 3)] = True
    is_spaced.scatter_(1, order[:, :attended], False)
    wanted, there = budget - 1 - attended, is_spaced.sum(1, keepdim=True).clamp(min=1)
    number = is_spaced.cumsum(1)  # of each, from 1
    is_spaced &= (number * wanted // there) > ((number - 1) * wanted // there)
    rank = order.argsort(dim=1) + tokens * (~is_spaced)  # those spaced first, then by attention
    rank = rank.scatter(1, order[:, :attended], torch.arange(-attended, 0, device=order.device).expand(batch, -1))
    centres = rank.argsort(dim=1, stable=True)[:, : budget - 1]
    return _with_neighbours(attention, keys, centres, neighbours)


def outlier_num(attention: torch.Tensor) -> int:
    """Return how many of the values (N,) lie above the third quartile by 1.5 times the distance to the first.

    So many tokens PruMerge takes of an image by itself; a prompt must be written before that is known, so the
    methods here take a budget.
    """
    first, third = (torch.quantile(attention.double(), q) for q in (0.25, 0.75))
    return int((attention.double() > third + 1.5 * (third - first)).sum())


def _last_attention(
    cls_query: torch.Tensor, raw_keys: torch.Tensor, saliency: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how much [CLS] attends to each token with all heads as one (B, N), and the tokens' keys (B, N, d)."""
    batch, tokens = saliency.shape
    if raw_keys.ndim != 3 or raw_keys.shape[1] not in (tokens, tokens + 1) or len(raw_keys) != batch:
        raise ValueError(f"raw_keys must be (B, 1+N, d) of the {(batch, tokens)} tokens, got {tuple(raw_keys.shape)}")
    if cls_query.shape != (batch, raw_keys.shape[2]):
        raise ValueError(f"cls_query must be {(batch, raw_keys.shape[2])}, got {tuple(cls_query.shape)}")
    keys = widened(raw_keys)
    logits = cosines(widened(cls_query)[:, None], keys)[:, 0] / keys.shape[-1] ** 0.5
    attention = logits.softmax(-1)[:, -tokens:]
    refuse_unless(
        (attention == attention).all(), "cls_query or raw_keys are not finite: load the model in bfloat16 or float32"
    )
    return attention, keys[:, -tokens:]


def _with_neighbours(attention: torch.Tensor, keys: torch.Tensor, centres: torch.Tensor, neighbours: int) -> Selection:
    """Add to each centre the tokens alike, by their attention, and make one token of all that are no centre."""
    check_count("method_options.neighbours", neighbours)
    batch, tokens = attention.shape
    unit = keys / norms_of(keys)
    likeness = cosines(rows_at(unit, centres), unit).scatter(2, centres[..., None], float("-inf"))
    count = min(neighbours, tokens - 1)
    alike = likeness.argsort(dim=-1, descending=True, stable=True)[..., :count]
    target = torch.arange(centres.shape[1], device=centres.device)[None, :, None].expand_as(alike)
    is_centre = _is_taken(tokens, centres)
    place = tokens - 1 - is_centre.int().flip(1).argmin(dim=1, keepdim=True)  # of the last that is no centre
    every = torch.arange(tokens, device=centres.device).expand(batch, -1)
    source = torch.cat([alike.flatten(1), every], dim=1)
    weight = torch.cat([attention.gather(1, alike.flatten(1)), attention.masked_fill(is_centre, 0)], dim=1)
    target = torch.cat([target.flatten(1), torch.full_like(every, centres.shape[1])], dim=1)
    own = F.pad(attention.new_ones(centres.shape), (0, 1))
    return Selection(torch.cat([centres, place], dim=1), Merge(source, target, weight, own)).ascending()


@register_selector(
    "vflowopt",
    kinds=("important: attended by the tokens attended most", "recycled: the mean of others of its cell"),
    kind_of=_merged_kind,
    merge_on="projected",
    main_kind="global",
    then=Then("cls_attention", in_proportion(9, 18, depth=28), share="stage_shares", ranking="told"),
)
def select_vflowopt(
    features: torch.Tensor,
    saliency: torch.Tensor,
    visual_token_num: int,
    grid: tuple[int, int] | None = None,
    global_threshold: float = 34.760,
    cell: float = 15.581,
    stage_shares: Sequence[float] = (0.9833, 0.8773),
) -> Selection:
    """Keep what global tokens attend to, recycle the rest, and go on by that map in layers (VFlowOpt, 2508.05211).

    features          (B, N, C)  not looked at
    saliency          (B, N)     the map: attention of the tokens that get most of it, `global_attention`
    grid                         (rows, columns); where tokens are none, nothing is recycled
    global_threshold             which tokens the map is the mean of: those that get so many times the mean; else all
    cell                         rows and columns of the grid over which dropped tokens become one
    stage_shares                 what part of the tokens before it each of two layers of the language model leaves
    returns                      T = min(visual_token_num, N) tokens

    The tokens with the lowest map are folded together, those of each cell at the place of its highest, weighted by the
    map, as many of them as leave T. Before layers 9 and 18 of 28 those with the lowest map leave. How many tokens the
    authors keep depends on the picture (`vflowopt_num`), and they choose from all tiles at once; here the budget says
    how many, of each tile. Their map may add the entropy of patches, which their settings weigh 0, so it is left out.
    They recycle nothing of single tiles and frames; here as everywhere. `stage_shares` and the rest are theirs for
    LLaVA-OneVision at a quarter of the tokens (`VFLOWOPT_PUBLISHED` has others); `vispruner calibrate` finds those of
    a model.
    """
    budget = checked_budget(features, saliency, visual_token_num)
    if budget == saliency.shape[1]:
        return _everything(saliency)
    if grid is None:
        return Selection(most_attended_first(saliency)[:, :budget].sort(dim=-1).values)
    return recycle(saliency, cells_of(checked_grid(grid, saliency.shape[1]), cell, saliency.device), budget)


def cells_of(grid: tuple[int, int], cell: float, device: torch.device | None = None) -> torch.Tensor:
    """Return the number of the cell, of `cell` rows and columns, that each token (N,) of a grid lies in; below N."""
    if not is_number(cell) or not 1 <= cell < float("inf"):
        raise ValueError(f"vispruner_config.method_options.cell must be a number from 1 on, got {cell!r}")
    down, across = ((torch.arange(count) / cell).long() for count in grid)
    return (down[:, None] * (across[-1] + 1) + across).flatten().to(device, non_blocking=True)


def recycle(saliency: torch.Tensor, cells: torch.Tensor, budget: int) -> Selection:
    """Fold as many tokens with the lowest saliency (B, N) together, cell by cell, as leave `budget` of them.

    cells  (N,) the cell of each token, a number below N; of more cells than the budget the lowest ones fall
    A group is the mean of its tokens, weighted by saliency, at the place of the highest.
    """
    tokens, cells = saliency.shape[1], cells.expand(saliency.shape)
    order = most_attended_first(saliency)
    place = torch.arange(tokens, device=order.device).expand_as(order)
    rank, none = order.argsort(dim=1), torch.zeros_like(order)
    # From the lowest on, each token opens the group of its cell or joins it: T are left when N - T have joined.
    opens = none.scatter_reduce(1, cells, rank, "amax").gather(1, cells) == rank
    joined = (~opens).gather(1, order).flip(1).cumsum(1).flip(1).gather(1, rank)
    is_low = joined <= tokens - budget
    highest = (none + tokens).scatter_reduce(1, cells, rank.masked_fill(~is_low, tokens), "amin").gather(1, cells)
    stays = ~is_low | (rank == highest)
    indices = rank.masked_fill(~stays, tokens).argsort(dim=1, stable=True)[:, :budget].sort(dim=1).values
    target = none.scatter(1, indices, place[:, :budget])
    anchor = order.gather(1, highest.clamp(max=tokens - 1))
    wide = saliency.to(torch.promote_types(saliency.dtype, torch.float32))
    wide = wide.clamp(min=torch.finfo(wide.dtype).tiny)  # so that nothing is divided by 0
    total = torch.zeros_like(wide).scatter_add(1, cells, wide * is_low).gather(1, cells)
    share = torch.where(is_low, wide / total, 1)
    weight = share * (~stays & (indices.gather(1, target.gather(1, anchor)) == anchor))
    return Selection(indices, Merge(place, target.gather(1, anchor), weight, share.gather(1, indices)))


def vflowopt_num(saliency: torch.Tensor, cells: torch.Tensor, keep_share: float, cell: float) -> int:
    """Return how many of the tokens with a map `saliency` (N,) VFlowOpt's authors keep, which depends on the picture.

    cells  (N,) the cell of each token; keep_share  what part they ask for; cell  rows and columns of a cell
    """
    low = round(len(saliency) * (1 - keep_share)) + int(len(saliency) / cell**2)
    lowest = saliency.argsort(stable=True)[:low]
    return len(saliency) - low + len(cells[lowest].unique())
