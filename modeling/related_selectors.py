"""Selectors of related work that VisPruner is compared with, called in the same way as those of token_selection.py.

Each follows the code that its authors released, as far as that is defined; a docstring says where it differs. Budgets
are this package's, and ties go to the lowest index. Features are compared in float32 at least, whatever their dtype.
"""

import torch

from .token_selection import (
    _check_count,
    _checked_budget,
    _most_attended_first,
    _norms,
    _refuse_unless,
    register_selector,
    without_autocast,
)


def _vtc_cls_layers(layers: int, feature_layer: int, start_layer: int | None = None) -> list[int]:
    # LLaVA's features come from the second-last layer. Counting from there, not from the last layer, gives the same
    # answer for an encoder whose unused layers were dropped. The authors' start is layer 16 of 24.
    depth = feature_layer + 2
    start = min(depth * 2 // 3, depth - 2) if start_layer is None else start_layer
    return list(range(depth))[start:-1]


@register_selector("vtc_cls", saliency_layers=_vtc_cls_layers, kinds=("important: attended in many layers",))
def select_vtc_cls(
    features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int, layer_saliency: torch.Tensor
) -> torch.Tensor:
    """Keep the tokens most attended by [CLS] over several encoder layers (VTC-CLS, arXiv 2412.05819).

    features        (B, N, C)     not looked at
    saliency        (B, N)        not looked at
    layer_saliency  (B, L, N)     attention of [CLS] in the last third of the layers, up to the features' one
    returns         (B, T)        kept indices, ascending; T = min(visual_token_num, N)
    """
    budget = _checked_budget(features, saliency, visual_token_num)
    layer_saliency = _checked_layers(layer_saliency, saliency)
    return _most_attended_first(layer_saliency.sum(dim=1))[:, :budget].sort(dim=-1).values


@register_selector("gprune", kinds=("central: many pass to it",))
def select_gprune(
    features: torch.Tensor,
    saliency: torch.Tensor,
    visual_token_num: int,
    projected: torch.Tensor,
    similarity_threshold: float = 0.5,
    temperature: float = 0.03,
    iterations: int = 5,
) -> torch.Tensor:
    """Keep the tokens that gather most when each passes its norm on to similar ones (G-Prune, arXiv 2501.02268).

    features              (B, N, C)  not looked at
    saliency              (B, N)     not looked at
    projected             (B, N, D)  features after the projector
    similarity_threshold             least cosine of two tokens that are neighbours
    temperature                      of the softmax that says how much of a token goes to which neighbour
    iterations                       how many times everything is passed on
    returns               (B, T)     kept indices, ascending; T = min(visual_token_num, N)

    A token without direction is its own only neighbour.
    """
    budget = _checked_budget(features, saliency, visual_token_num)
    _check_count("iterations", iterations)
    projected = _checked_projected(projected, saliency)
    cosine = _cosine_of_all(projected)
    itself = torch.eye(saliency.shape[1], dtype=torch.bool, device=saliency.device)
    neighbours = (cosine >= similarity_threshold) | itself
    passes = (cosine / temperature).masked_fill(~neighbours, float("-inf")).softmax(dim=-1)
    held = torch.linalg.vector_norm(projected, dim=-1)[:, None]  # (B, 1, N)
    with without_autocast(projected.device):
        for _ in range(iterations):
            held = held @ passes
    score = held[:, 0] / neighbours.sum(dim=-1)
    return _most_attended_first(score)[:, :budget].sort(dim=-1).values


def redundancy(projected: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Return how close each token is to a prototype of redundant ones, at most 1.

    projected  (B, N, D)  features after the projector
    codebook   (M, D)     prototypes
    returns    (B, N)     cosine with the closest prototype, in float32 at least
    """
    if codebook.ndim != 2 or len(codebook) == 0 or not codebook.is_floating_point():
        raise ValueError(
            "codebook must be a floating-point tensor (M, D) with at least one prototype, "
            f"got {codebook.dtype} {tuple(codebook.shape)}"
        )
    if codebook.shape[1] != projected.shape[2] or codebook.device != projected.device:
        raise ValueError(
            f"codebook must be made for this model: its prototypes are {codebook.shape[1]} wide on {codebook.device}, "
            f"the projected features {projected.shape[2]} on {projected.device}"
        )
    projected = _widened(projected)
    prototypes = codebook.detach().to(projected.dtype)
    with without_autocast(projected.device):
        cosine = (projected / _norms(projected)) @ (prototypes / _norms(prototypes)).mT
    return cosine.amax(dim=-1)


@register_selector("codebook", kinds=("informative: unlike the codebook",))
def select_codebook(
    features: torch.Tensor,
    saliency: torch.Tensor,
    visual_token_num: int,
    projected: torch.Tensor,
    codebook: torch.Tensor,
) -> torch.Tensor:
    """Keep the tokens least like a codebook of redundant ones (Beyond Intermediate States, arXiv 2503.20540).

    features   (B, N, C)  not looked at
    saliency   (B, N)     not looked at
    projected  (B, N, D)  features after the projector
    codebook   (M, D)     prototypes of redundant projected features
    returns    (B, T)     kept indices, ascending; T = min(visual_token_num, N)

    The authors' other mode keeps whatever `redundancy` puts below a threshold; here the budget is given.
    """
    budget = _checked_budget(features, saliency, visual_token_num)
    score = redundancy(_checked_projected(projected, saliency), codebook)
    return score.argsort(dim=-1, stable=True)[:, :budget].sort(dim=-1).values


@register_selector("divprune", kinds=("diverse: far from each other",))
def select_divprune(
    features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int, projected: torch.Tensor
) -> torch.Tensor:
    """Keep tokens far from each other: each next one farthest from those kept (DivPrune, arXiv 2503.02175).

    features   (B, N, C)  not looked at
    saliency   (B, N)     not looked at
    projected  (B, N, D)  features after the projector
    returns    (B, T)     kept indices, ascending; T = min(visual_token_num, N)

    The authors' code may pick a token twice where others equal it; here it is picked once.
    """
    budget = _checked_budget(features, saliency, visual_token_num)
    cosine = _cosine_of_all(_checked_projected(projected, saliency))
    tokens = saliency.shape[1]
    if budget == tokens:
        return _every_token(saliency)
    itself = torch.eye(tokens, dtype=torch.bool, device=cosine.device)
    # The first is the one whose nearest other token is farthest away.
    picks = [cosine.masked_fill(itself, float("-inf")).amax(dim=-1).argmin(dim=-1, keepdim=True)]
    closeness = torch.full_like(cosine[:, 0], float("-inf"))
    while len(picks) < budget:
        closeness = torch.maximum(closeness, _row_of(cosine, picks[-1])).scatter(1, picks[-1], float("inf"))
        picks.append(closeness.argmin(dim=-1, keepdim=True))
    return torch.cat(picks, dim=-1).sort(dim=-1).values


def _hiprune_layers(layers: int, feature_layer: int) -> list[int]:
    # The authors' middle layer is the ninth of 24 where the features come from the second last.
    return [max(0, (feature_layer + 2) * 3 // 8 - 1), feature_layer]


def _hiprune_rank(middle: torch.Tensor, columns: int, anchor_num: int) -> torch.Tensor:
    """Return 2 at the anchors, 1 at their neighbours and 0 elsewhere: (B, N) -> (B, N)."""
    anchors = _most_attended_first(middle)[:, :anchor_num]
    neighbours = torch.cat([anchors + step for step in (-1, 1, -columns, columns)], dim=-1)
    rank = torch.zeros_like(middle, dtype=torch.int64).scatter(1, neighbours.clamp(0, middle.shape[1] - 1), 1)
    return rank.scatter(1, anchors, 2)


def _hiprune_kind(
    kept: torch.Tensor,
    saliency: torch.Tensor,
    layer_saliency: torch.Tensor,
    grid: tuple[int, int],
    anchor_share: float = 0.1,
) -> torch.Tensor:
    anchor_num = round(kept.shape[1] * anchor_share / 5)
    return 2 - _hiprune_rank(layer_saliency[:, 0], grid[1], anchor_num).gather(1, kept)


@register_selector(
    "hiprune",
    saliency_layers=_hiprune_layers,
    saliency_kind="received",
    kinds=("anchor: attended midway", "buffer: beside an anchor", "register: attended late"),
    kind_of=_hiprune_kind,
)
def select_hiprune(
    features: torch.Tensor,
    saliency: torch.Tensor,
    visual_token_num: int,
    layer_saliency: torch.Tensor,
    grid: tuple[int, int],
    anchor_share: float = 0.1,
    repick: bool = False,
) -> torch.Tensor:
    """Keep anchors attended in a middle layer, their neighbours, and tokens attended late (HiPrune, arXiv 2508.00553).

    features        (B, N, C)        not looked at
    saliency        (B, N)           not looked at
    layer_saliency  (B, 2, N)        attention received from all queries, in a middle layer and in the features' one
    grid            (rows, columns)  of the N tokens
    anchor_share                     alpha: share of the budget for anchors with their neighbours, 0 to 1
    repick                           do as the authors' code for Qwen2.5-VL, which counts a token twice that is both a
                                     neighbour and much attended late: takes one image, and may keep fewer than T
    returns         (B, T)           kept indices, ascending; T = min(visual_token_num, N)

    As in the authors' code, the left and right neighbours of a token at the edge lie in the adjacent row, and those
    above the first or below the last row are the first or last token. Where neighbours alone exceed the budget, which
    that code does not allow for, anchors come first and then the most attended neighbours.
    """
    budget = _checked_budget(features, saliency, visual_token_num)
    middle, late = _checked_layers(layer_saliency, saliency, 2).unbind(dim=1)
    columns = _checked_columns(grid, saliency)
    if not 0 <= anchor_share <= 1:
        raise ValueError(f"vispruner_config.anchor_share must be a number from 0 to 1, got {anchor_share!r}")
    rank = _hiprune_rank(middle, columns, round(budget * anchor_share / 5))
    order = _most_attended_first(late)
    order = order.gather(1, _most_attended_first(rank.gather(1, order)))[:, :budget]
    return _picked_twice(order, rank > 0, late) if repick else order.sort(dim=-1).values


def _picked_twice(order: torch.Tensor, is_first: torch.Tensor, late: torch.Tensor) -> torch.Tensor:
    """Pick the first ones in `order` and the rest among all tokens: (1, T), (1, N), (1, N) -> (1, T or fewer)."""
    if len(late) != 1:
        raise ValueError(f"repick keeps a different number of tokens in each image: give one image, got {len(late)}")
    first = order[is_first.gather(1, order)]
    # The authors' attention is summed over the queries, so 1 on average, when they lower it by 1.
    lowered = late * late.shape[1] - is_first.to(late.dtype)
    again = _most_attended_first(lowered)[0, : order.shape[1] - len(first)]
    return torch.cat([first, again]).unique()[None]


@register_selector("scope", kinds=("covering: resembles many",))
def select_scope(
    features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int, saliency_exponent: float = 1.0
) -> torch.Tensor:
    """Keep tokens that together resemble all others, weighted by their own attention (SCOPE, arXiv 2510.24214).

    features           (B, N, C)  encoder features
    saliency           (B, N)     attention each token receives
    saliency_exponent             alpha: how much attention counts; 0 for not at all
    returns            (B, T)     kept indices, ascending; T = min(visual_token_num, N)
    """
    budget = _checked_budget(features, saliency, visual_token_num)
    if budget == saliency.shape[1]:
        return _every_token(saliency)
    cosine = _cosine_of_all(_widened(features))
    weight = saliency.detach().to(cosine.dtype) ** saliency_exponent
    covered = torch.zeros_like(cosine[:, :1])  # (B, 1, N): how well the picked ones resemble each token, at least 0
    is_picked = torch.zeros_like(saliency, dtype=torch.bool)
    picks: list[torch.Tensor] = []
    while len(picks) < budget:
        gain = weight * (cosine - covered).clamp_min(0).sum(dim=-1)
        picks.append(gain.masked_fill(is_picked, float("-inf")).argmax(dim=-1, keepdim=True))
        is_picked = is_picked.scatter(1, picks[-1], True)
        covered = torch.maximum(covered, _row_of(cosine, picks[-1])[:, None])
    return torch.cat(picks, dim=-1).sort(dim=-1).values


def _every_token(saliency: torch.Tensor) -> torch.Tensor:
    return torch.arange(saliency.shape[1], device=saliency.device).repeat(len(saliency), 1)


def _row_of(matrix: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Return one row of each matrix: (B, N, N) at (B, 1) -> (B, N)."""
    return matrix.gather(1, row[..., None].expand(-1, -1, matrix.shape[-1]))[:, 0]


def _widened(features: torch.Tensor) -> torch.Tensor:
    return features.detach().to(torch.promote_types(features.dtype, torch.float32))


def _cosine_of_all(features: torch.Tensor) -> torch.Tensor:
    """Compare all tokens of each image with each other: (B, N, C) -> (B, N, N)."""
    unit = features / _norms(features)
    with without_autocast(features.device):
        return unit @ unit.mT


def _checked_projected(projected: torch.Tensor, saliency: torch.Tensor) -> torch.Tensor:
    if projected.ndim != 3 or not projected.is_floating_point() or projected.shape[:2] != saliency.shape:
        raise ValueError(
            f"projected must be a floating-point tensor (B, N, D) of the {tuple(saliency.shape)} tokens, "
            f"got {projected.dtype} {tuple(projected.shape)}"
        )
    return _widened(projected)


def _checked_layers(layer_saliency: torch.Tensor, saliency: torch.Tensor, layers: int | None = None) -> torch.Tensor:
    batch, tokens = saliency.shape
    shape = tuple(layer_saliency.shape)
    fits = len(shape) == 3 and (shape[0], shape[2]) == (batch, tokens) and shape[1] >= 1
    if not fits or layers not in (None, shape[1]) or not layer_saliency.is_floating_point():
        raise ValueError(
            f"layer_saliency must be a floating-point tensor ({batch}, {layers or 'L'}, {tokens}), "
            f"got {layer_saliency.dtype} {shape}"
        )
    _refuse_unless(
        (layer_saliency == layer_saliency).all(),  # NaN alone differs from itself
        "layer_saliency holds NaN: the vision encoder's attention is not finite; check pixel_values, "
        "or load the model in bfloat16 or float32",
    )
    return _widened(layer_saliency)


def _checked_columns(grid: tuple[int, int], saliency: torch.Tensor) -> int:
    rows, columns = grid
    if rows * columns != saliency.shape[1] or columns < 1:
        raise ValueError(f"grid must be the (rows, columns) of the {saliency.shape[1]} tokens, got {grid}")
    return columns
