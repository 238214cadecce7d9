"""Selectors of related work that VisPruner is compared with, called in the same way as those of token_selection.py.

Each follows the code that its authors released, as far as that is defined; a docstring says where it differs. Budgets
are this package's, and ties go to the lowest index. Features are compared in float32 at least, whatever their dtype.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .selector_inputs import (
    check_count,
    checked_budget,
    checked_grid,
    checked_layers,
    checked_projected,
    checked_share,
    checked_strength,
    checked_unit,
    every_token,
    most_attended_first,
    widened,
)
from .selector_registry import register_selector
from .similarity import (
    BLOCK,
    MATRIX,
    cosines,
    images_at_once,
    is_traced,
    matrix_fits,
    norms_of,
    row_blocks,
    without_autocast,
)

FEW_TOKENS = 256  # of images on a CPU for which measuring every gain in every step costs less than choosing which
POOL = 256  # best tokens that `picked_apart` picks from, where not all cosines can be held
MOST_ASKED = 512  # gains that `select_scope` measures at a time
LISTED = 2**24  # cosines of `select_scope`, each with an index of twice its size: 192 MiB


def _vtc_cls_layers(layers: int, feature_layer: int) -> list[int]:
    # LLaVA's features come from the second-last layer. Counting from there, not from the last layer, gives the same
    # answer for an encoder whose unused layers were dropped. The authors' start is layer 16 of 24.
    depth = feature_layer + 2
    return list(range(depth))[min(depth * 2 // 3, depth - 2) : -1]


@register_selector(
    "vtc_cls", saliency_layers=_vtc_cls_layers, kinds=("important: attended in many layers",), by_saliency=False
)
def select_vtc_cls(
    features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int, layer_saliency: torch.Tensor
) -> torch.Tensor:
    """Keep the tokens most attended by [CLS] over several encoder layers (VTC-CLS, arXiv 2412.05819).

    features        (B, N, C)     not looked at
    saliency        (B, N)        not looked at
    layer_saliency  (B, L, N)     attention of [CLS] in the last third of the layers, up to the features' one
    returns         (B, T)        kept indices, ascending; T = min(visual_token_num, N)
    """
    budget = checked_budget(features, saliency, visual_token_num)
    layer_saliency = checked_layers(layer_saliency, saliency)
    return most_attended_first(layer_saliency.sum(dim=1))[:, :budget].sort(dim=-1).values


@register_selector("gprune", kinds=("central: many pass to it",), by_saliency=False)
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
    budget = checked_budget(features, saliency, visual_token_num)
    check_count("method_options.iterations", iterations)
    projected = checked_projected(projected, saliency)
    threshold = checked_share("similarity_threshold", similarity_threshold, least=-1)
    arguments = threshold, checked_strength("temperature", temperature), iterations
    score = _image_groups(lambda some: _gathered(some, *arguments), projected)
    return most_attended_first(score)[:, :budget].sort(dim=-1).values


def _gathered(projected: torch.Tensor, threshold: float, temperature: float, iterations: int) -> torch.Tensor:
    """Return how much each token holds in the end, per neighbour: (B, N, D) -> (B, N)."""
    batch, tokens = projected.shape[:2]
    unit = projected / norms_of(projected)
    held = torch.linalg.vector_norm(projected, dim=-1)[:, None]  # (B, 1, N)
    blocks = row_blocks(batch, tokens)
    # What is passed by the first rows is stored, in one piece; that of others is computed every time.
    last = sum(rows.stop - rows.start for rows in blocks if batch * tokens * rows.stop <= MATRIX)
    stored = unit.new_empty(batch, last, tokens)
    neighbours = torch.empty(batch, tokens, dtype=torch.int64, device=unit.device)

    def passes(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        cosine = cosines(unit[:, rows], unit)
        near = cosine >= threshold
        near.diagonal(rows.start, 1, 2).fill_(True)
        return cosine.div_(temperature).masked_fill_(~near, float("-inf")).softmax(dim=-1), near.sum(dim=-1)

    for iteration in range(iterations):
        gathered: torch.Tensor | None = None
        for rows in blocks:
            if iteration and rows.stop <= last:
                shares = stored[:, rows]
            else:
                shares, neighbours[:, rows] = passes(rows)
                if iteration == 0 and rows.stop <= last:
                    stored[:, rows] = shares
            with without_autocast(unit.device):
                passed = held[:, :, rows] @ shares
            gathered = passed if gathered is None else gathered.add_(passed)
        held = gathered
    return held[:, 0] / neighbours


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
    projected = widened(projected)
    prototypes = codebook.detach().to(projected.dtype)
    with without_autocast(projected.device):
        cosine = (projected / norms_of(projected)) @ (prototypes / norms_of(prototypes)).mT
    return cosine.amax(dim=-1)


@register_selector("codebook", kinds=("informative: unlike the codebook",), by_saliency=False)
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
    budget = checked_budget(features, saliency, visual_token_num)
    score = redundancy(checked_projected(projected, saliency), codebook)
    return score.argsort(dim=-1, stable=True)[:, :budget].sort(dim=-1).values


@register_selector("divprune", kinds=("diverse: far from each other",), by_saliency=False)
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
    budget = checked_budget(features, saliency, visual_token_num)
    unit = checked_unit(projected, saliency)
    if budget == saliency.shape[1]:
        return every_token(saliency)
    slope = torch.ones_like(unit[..., 0])
    return picked_apart(unit, torch.zeros_like(slope), slope, budget).sort(dim=-1).values


def picked_apart(
    unit: torch.Tensor, rise: torch.Tensor, slope: torch.Tensor, budget: int, first: torch.Tensor | None = None
) -> torch.Tensor:
    """Pick one token after the other: each next one has most of `rise - slope * closeness to the nearest picked one`.

    unit         (B, N, D)    rows of length 1
    rise, slope  (B, N)
    first        (B, 1)       the first picks; None for those that have most by their closeness to the nearest other
    returns      (B, budget)  in the order of picking
    """
    tokens = unit.shape[1]
    if matrix_fits(1, tokens) or is_traced() or unit.device.type == "meta" or not (slope >= 0).all():
        images = images_at_once(tokens)
        firsts = [None] * len(unit) if first is None else first.split(images)
        parts = zip(unit.split(images), rise.split(images), slope.split(images), firsts, strict=False)
        picks = [_apart_by_tensors(*part, budget) for part in parts]
        return picks[0] if len(picks) == 1 else torch.cat(picks)
    starts = [None] * len(unit) if first is None else first[:, 0].tolist()
    return torch.stack([_apart_by_pools(*image, budget) for image in zip(unit, rise, slope, starts, strict=True)])


def _apart_by_tensors(
    unit: torch.Tensor, rise: torch.Tensor, slope: torch.Tensor, first: torch.Tensor | None, budget: int
) -> torch.Tensor:
    """Pick without a host sync: (B, N, D), (B, N), (B, N) -> (B, budget)."""
    matrix = cosines(unit, unit) if matrix_fits(*unit.shape[:2]) else None
    if first is None:
        first = (rise - slope * _nearest_others(unit, matrix)).argmax(dim=-1, keepdim=True)
    picks, closeness = [first], torch.full_like(rise, float("-inf"))
    is_picked = torch.zeros_like(rise, dtype=torch.bool)
    source = unit if matrix is None else matrix
    while len(picks) < budget:
        row = source.gather(1, picks[-1][:, :, None].expand(-1, -1, source.shape[-1]))
        row = cosines(row, unit) if matrix is None else row
        closeness, is_picked = torch.maximum(closeness, row[:, 0]), is_picked.scatter(1, picks[-1], True)
        score = (rise - slope * closeness).masked_fill(is_picked, float("-inf"))
        picks.append(score.argmax(dim=-1, keepdim=True))
    return torch.cat(picks, dim=-1)


def _nearest_others(unit: torch.Tensor, matrix: torch.Tensor | None = None) -> torch.Tensor:
    """Return the cosine of each token with the nearest other one, (B, N, D) -> (B, N)."""
    nearest = []
    for rows in row_blocks(*unit.shape[:2]):
        block = cosines(unit[:, rows], unit) if matrix is None else matrix[:, rows].clone()
        block.diagonal(rows.start, 1, 2).fill_(float("-inf"))
        nearest.append(block.amax(dim=-1))
    return torch.cat(nearest, dim=1)


def _apart_by_pools(
    unit: torch.Tensor, rise: torch.Tensor, slope: torch.Tensor, first: int | None, budget: int
) -> torch.Tensor:
    """Pick as `_apart_by_tensors` does, in one image (N, D), but compare all tokens with many picks at a time.

    A token only comes closer to those picked, so its score only falls (no slope is negative). So the best of the few
    best is the next, as long as it is better than all others were.
    """
    if first is None:
        first = int((rise - slope * _nearest_others(unit[None])[0]).argmax())
    picks, new = [first], [first]
    closeness = torch.full_like(rise, float("-inf"))
    while len(picks) < budget:
        closeness = torch.maximum(closeness, cosines(unit, unit[new]).amax(dim=-1))
        score = rise - slope * closeness
        score[picks] = float("-inf")
        best_first = score.argsort(descending=True, stable=True)[: POOL + 1]
        pool = best_first[:-1].sort().values  # ascending, because of equally good ones the first is next
        alike = cosines(unit[pool], unit[pool]).cpu().numpy()
        near, left = closeness[pool].cpu().numpy(), score[pool].cpu().numpy() > -float("inf")
        rises, slopes = rise[pool].cpu().numpy(), slope[pool].cpu().numpy()
        limit = (-float(score[best_first[-1]]), int(best_first[-1]))
        new, tokens = [], pool.tolist()
        while len(picks) < budget and left.any():
            now = rises - slopes * near
            now[~left] = -float("inf")
            best = int(now.argmax())
            if new and (-float(now[best]), tokens[best]) > limit:
                break
            new.append(tokens[best])
            picks.append(tokens[best])
            near, left[best] = near.clip(alike[best]), False
    return torch.tensor(picks, device=unit.device)


def _hiprune_layers(layers: int, feature_layer: int) -> list[int]:
    # The authors' middle layer is the ninth of 24 where the features come from the second last.
    return [max(0, (feature_layer + 2) * 3 // 8 - 1), feature_layer]


def _hiprune_rank(middle: torch.Tensor, columns: int, anchor_num: int) -> torch.Tensor:
    """Return 2 at the anchors, 1 at their neighbours and 0 elsewhere: (B, N) -> (B, N)."""
    anchors = most_attended_first(middle)[:, :anchor_num]
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
    by_saliency=False,
)
def select_hiprune(
    features: torch.Tensor,
    saliency: torch.Tensor,
    visual_token_num: int,
    layer_saliency: torch.Tensor,
    grid: tuple[int, int],
    anchor_share: float = 0.1,
) -> torch.Tensor:
    """Keep anchors attended in a middle layer, their neighbours, and tokens attended late (HiPrune, arXiv 2508.00553).

    features        (B, N, C)        not looked at
    saliency        (B, N)           not looked at
    layer_saliency  (B, 2, N)        attention received from all queries, in a middle layer and in the features' one
    grid            (rows, columns)  of the N tokens
    anchor_share                     alpha: share of the budget for anchors with their neighbours, 0 to 1
    returns         (B, T)           kept indices, ascending; T = min(visual_token_num, N)

    As in the authors' code, the left and right neighbours of a token at the edge lie in the adjacent row, and those
    above the first or below the last row are the first or last token. Where neighbours alone exceed the budget, which
    that code does not allow for, anchors come first and then the most attended neighbours. Their code for Qwen2.5-VL
    counts a token twice that is both a neighbour and much attended late, and so keeps fewer; here T are kept.
    """
    budget = checked_budget(features, saliency, visual_token_num)
    middle, late = checked_layers(layer_saliency, saliency, 2).unbind(dim=1)
    _, columns = checked_grid(grid, saliency.shape[1])
    anchor_share = checked_share("anchor_share", anchor_share)
    rank = _hiprune_rank(middle, columns, round(budget * anchor_share / 5))
    order = most_attended_first(late)
    order = order.gather(1, most_attended_first(rank.gather(1, order)))[:, :budget]
    return order.sort(dim=-1).values


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
    budget = checked_budget(features, saliency, visual_token_num)
    saliency_exponent = checked_strength("saliency_exponent", saliency_exponent, or_zero=True)
    if budget == saliency.shape[1]:
        return every_token(saliency)
    features = widened(features)
    unit = features / norms_of(features)
    weight = saliency.detach().to(unit.dtype) ** saliency_exponent
    return _covering(unit, weight, budget).sort(dim=-1).values


def _covering(unit: torch.Tensor, weight: torch.Tensor, budget: int) -> torch.Tensor:
    """Pick one token after the other, in the form that suits: (B, N, C), (B, N) -> (B, budget)."""
    tokens = unit.shape[1]
    at_once = tokens <= FEW_TOKENS if unit.device.type == "cpu" else matrix_fits(1, tokens)
    if is_traced() or unit.device.type == "meta" or at_once or not (weight >= 0).all():
        images = images_at_once(tokens)
        groups = zip(unit.split(images), weight.split(images), strict=True)
        return torch.cat([_covering_by_tensors(*group, budget) for group in groups])
    picks = [_covering_lazily(*image, budget) for image in zip(unit, weight, strict=True)]
    return torch.tensor(picks, device=unit.device)


def _covering_by_tensors(unit: torch.Tensor, weight: torch.Tensor, budget: int) -> torch.Tensor:
    """Measure in every step all gains anew, without a host sync."""
    cosine = cosines(unit, unit)
    covered = torch.zeros_like(cosine[:, :1])  # (B, 1, N): how well the picked ones resemble each token, at least 0
    is_picked = torch.zeros_like(weight, dtype=torch.bool)
    picks: list[torch.Tensor] = []
    while len(picks) < budget:
        gain = weight * (cosine - covered).clamp_min(0).sum(dim=-1)
        picks.append(gain.masked_fill(is_picked, float("-inf")).argmax(dim=-1, keepdim=True))
        is_picked = is_picked.scatter(1, picks[-1], True)
        row = cosine.gather(1, picks[-1][..., None].expand(-1, -1, cosine.shape[-1]))
        covered = torch.maximum(covered, row)
    return torch.cat(picks, dim=-1)


def _covering_lazily(unit: torch.Tensor, weight: torch.Tensor, budget: int) -> list[int]:
    """Pick as `_covering_by_tensors` does, in one image (N, C), (N,)."""
    coverage = _Coverage(unit, weight)
    return [coverage.pick() for _ in range(budget)]


class _Coverage:
    """How well the tokens of one image are covered, and how much each token would add to that, times its weight.

    What it would add, its gain, only falls as more is covered (no weight is negative). So an old gain is a bound, and
    a token whose gain is new and not below any bound is the next.

    Of cosines that are too many to be held, only the first rows are. After a few picks those above what is covered are
    listed for each token: they suffice from there on, and are a small part. Tokens for which there is no room are
    compared anew whenever their gain is asked for.
    """

    def __init__(self, unit: torch.Tensor, weight: torch.Tensor) -> None:
        tokens = len(unit)
        self._unit = unit
        self._held = cosines(unit[: max(1, MATRIX // tokens)], unit)
        self._sum_type = unit.dtype if len(self._held) == tokens else torch.float64
        self._weight = weight.to("cpu", self._sum_type)
        self._covered = torch.zeros_like(weight, device="cpu")
        # What is listed lies in one piece: thousands of small ones would keep freed blocks between them from use.
        self._lists: dict[int, tuple[int, int]] = {}  # from where to where
        self._listed: tuple[Any, Any] = (None, None)  # other tokens, and the cosines with them
        self._picks_before_lists = 0 if len(self._held) == tokens else max(1, tokens**2 // LISTED)
        sums = torch.empty_like(self._weight)
        for start, block in self._blocks():
            sums[start : start + len(block)] = block.clamp_min(0).sum(dim=-1, dtype=self._sum_type)
        self._bound = (self._weight * sums).numpy()
        self._is_gain = self._bound == self._bound

    def _blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield all rows of cosines, some at a time, each time with the number of the first."""
        for rows in row_blocks(1, len(self._unit)):
            held = rows.stop <= len(self._held)
            yield rows.start, (self._held[rows] if held else cosines(self._unit[rows], self._unit)).cpu()

    def _rows(self, tokens: Any) -> torch.Tensor:
        """Return the cosines of some tokens with all, as a new tensor: (K,) -> (K, N)."""
        tokens = torch.as_tensor(tokens, device=self._unit.device)
        if len(self._held) == len(self._unit):
            return self._held.index_select(0, tokens).cpu()
        rows, is_held = self._held.new_empty(len(tokens), len(self._unit)), tokens < len(self._held)
        rows[is_held] = self._held[tokens[is_held]]
        rows[~is_held] = cosines(self._unit[tokens[~is_held]], self._unit)
        return rows.cpu()

    def pick(self) -> int:
        """Return the token that adds most, of several the first, and count it as picked."""
        at_once = 4 if self._lists else 16  # one at a time wastes calls, many waste gains
        while not self._is_gain[best := int(self._bound.argmax())]:
            asked = ~self._is_gain
            at_once = min(at_once, len(asked) - 1)
            asked[(-self._bound).argpartition(at_once)[at_once:]] = False
            asked[best] = True
            self._bound[asked] = self._gains(asked.nonzero()[0])
            self._is_gain |= asked
            at_once = min(2 * at_once, MOST_ASKED, max(16, BLOCK // len(asked)))
        self._bound[best] = -float("inf")
        self._is_gain = self._bound == -float("inf")
        self._cover(best)
        return best

    def _gains(self, tokens: Any) -> Any:
        """Return the gains of some tokens, numpy arrays (K,) both."""
        sums = torch.empty(len(tokens), dtype=self._sum_type)
        unlisted = []
        for place, token in enumerate(tokens.tolist()):
            if token not in self._lists:
                unlisted.append(place)
                continue
            others, cosine = self._list_of(token)
            gain = cosine - self._covered.numpy().take(others)
            sums[place] = float(gain[gain > 0].sum(dtype=float))
        if unlisted:
            gain = self._rows(tokens[unlisted]).sub_(self._covered).clamp_min_(0)
            sums[unlisted] = gain.sum(dim=-1, dtype=self._sum_type)
        return (self._weight[torch.from_numpy(tokens)] * sums).numpy()

    def _cover(self, token: int) -> None:
        if token in self._lists:
            others, cosine = self._list_of(token)
            del self._lists[token]
            covered = self._covered.numpy()
            covered[others] = cosine.clip(covered.take(others))
            return
        torch.maximum(self._covered, self._rows([token])[0], out=self._covered)
        self._picks_before_lists -= 1
        if self._picks_before_lists == 0:
            self._list_uncovered()

    def _list_of(self, token: int) -> tuple[Any, Any]:
        start, stop = self._lists[token]
        others, cosine = self._listed
        return others[start:stop], cosine[start:stop]

    def _list_uncovered(self) -> None:
        room = min(LISTED, len(self._unit) ** 2)
        self._listed = torch.empty(room, dtype=torch.int64).numpy(), self._covered.new_empty(room).numpy()
        start, covered = 0, self._covered.numpy()
        for first, block in self._blocks():
            for token, row in enumerate(block.numpy(), first):
                others = (row > covered).nonzero()[0]
                stop = start + len(others)
                if stop > room:
                    return
                self._lists[token] = start, stop
                listed, cosine = self._list_of(token)
                listed[:] = others
                row.take(others, 0, cosine, "clip")
                start = stop


def _image_groups(choose: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Call `choose` with as many images (B, N, C) at a time as may have their cosines held."""
    chosen = [choose(some) for some in images.split(images_at_once(images.shape[1]))]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen)
