"""Methods that prune inside the language model, behind some of its layers: FastV, PyramidDrop, SparseVLM and others.

Written from their papers and the authors' released code, rule for rule; a docstring says where one differs. What they
rank by is declared by their `DecoderPlace` and comes as `saliency`; ties go to the lowest index. In 32 layers, as the
models have that they were made for, they prune where their authors do, and in proportion elsewhere.
"""

import torch
from torch.nn import functional as F

from .merging_selectors import CONTEXTUAL_SHARE, contextual_num, fold_into_spaced
from .selector_inputs import check_count, checked_budget, most_attended_first
from .selector_registry import DecoderPlace, Merge, Selection, in_proportion, register_selector, rows_at


@register_selector("fastv", kinds=("important: attended by the question",), place=DecoderPlace(in_proportion(2)))
def select_fastv(features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int) -> torch.Tensor:
    """Keep what the last token of the prompt attends to in the second layer (FastV, arXiv 2403.06764).

    features  (B, N, C)  not looked at
    saliency  (B, N)     attention of the last token, mean over heads
    returns   (B, T)     kept indices, ascending; T = min(visual_token_num, N)

    The authors' demonstration ranks anew with every token it generates; here, as with a cache there, the prompt ranks.
    """
    budget = checked_budget(features, saliency, visual_token_num)
    return most_attended_first(saliency)[:, :budget].sort(dim=-1).values


@register_selector(
    "pyramiddrop",
    kinds=("important: attended by the question",),
    place=DecoderPlace(in_proportion(8, 16, 24), of_layer="own", positions="renumber"),
)
def select_pyramiddrop(features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int) -> torch.Tensor:
    """Keep, at three depths, what the last token of the prompt is about to attend to (PyramidDrop, arXiv 2410.17247).

    features  (B, N, C)  not looked at
    saliency  (B, N)     attention of the last token in the layer to come, mean over heads
    returns   (B, T)     kept indices, ascending; T = min(visual_token_num, N)
    """
    return select_fastv(features, saliency, visual_token_num)


@register_selector(
    "sparsevlm",
    kinds=("important: attended by words about the image",),
    place=DecoderPlace(in_proportion(3, 7, 16), "level_rater_rows"),
)
def select_sparsevlm(features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int) -> torch.Tensor:
    """Keep, at three depths, what words that resemble the image attend to (SparseVLM, arXiv 2410.04417, version 2).

    features  (B, N, C)  not looked at
    saliency  (B, N)     attention of these words in the layer before, freed of what positions give, 14 heads
    returns   (B, T)     kept indices, ascending; T = min(visual_token_num, N)
    """
    return select_fastv(features, saliency, visual_token_num)


@register_selector(
    "sparsevlm_v1",
    kinds=("important: attended by words about the image", "recycled: the middle of a cluster of others"),
    kind_of=lambda kept, saliency: _recycled_kind(kept),
    place=DecoderPlace(in_proportion(3, 7, 16), "rater_rows", positions="renumber"),
)
def select_sparsevlm_v1(features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int) -> Selection:
    """As `sparsevlm` in its first form: what is dropped is clustered, and clusters stay (arXiv 2410.04417, 1.5).

    features  (B, N, C)  hidden states, which clusters are the means of
    saliency  (B, N)     attention of the words in the layer before, mean over heads
    returns              T = min(visual_token_num, N) tokens: the most attended, and behind them the clusters

    The authors add random numbers to break ties of density; here, of two equally dense tokens the more attended one is
    denser.
    """
    budget = checked_budget(features, saliency, visual_token_num)
    tokens = saliency.shape[1]
    if budget == tokens:
        return Selection(torch.arange(tokens, device=saliency.device).expand(len(saliency), -1))
    order = most_attended_first(saliency)
    kept = next(k for k in range(budget, -1, -1) if k == 0 or k + _clusters_of(tokens - k)[1] == budget)
    recycled, clusters = _clusters_of(tokens - kept)
    clusters = budget - kept
    others = order[:, kept : kept + max(recycled, clusters)]
    states = rows_at(features.detach(), others).float()
    centres, nearest = _density_peaks(states, clusters)
    size = F.one_hot(nearest, clusters).sum(1) + 1e-6  # (B, clusters)
    is_centre = torch.zeros_like(others, dtype=torch.bool).scatter(1, centres, True)
    weight = (1 / size).gather(1, nearest).masked_fill(is_centre, 0)
    own = torch.cat([size.new_ones(len(size), kept), 1 / size], dim=1)
    first = order[:, :kept].sort(dim=-1).values
    merge = Merge(others, nearest + kept, weight, own)
    return Selection(torch.cat([first, others.gather(1, centres)], dim=1), merge, appended=clusters)


def _clusters_of(dropped: int) -> tuple[int, int]:
    """Return how many of the dropped tokens are recycled, and into how many clusters."""
    recycled = int(0.3 * dropped) + 1
    return recycled, recycled // 10 + 1


def _density_peaks(states: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find dense tokens far from denser ones: (B, M, C) -> centres (B, clusters), and of each token (B, M)."""
    batch, tokens, width = states.shape
    distance = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist") / width**0.5
    density = (-(distance.sort(dim=-1).values[..., : min(clusters, tokens)] ** 2).mean(-1)).exp()
    place = torch.arange(tokens, device=states.device)
    other, own = density[:, None], density[:, :, None]
    denser = (other > own) | ((other == own) & (place < place[:, None]))
    farthest = distance.flatten(1).amax(1)[:, None, None]
    gap = torch.where(denser, distance, farthest).amin(-1)
    centres = (gap * density).argsort(dim=-1, descending=True, stable=True)[:, :clusters]
    to_centres = distance.gather(2, centres[:, None].expand(-1, tokens, -1))
    return centres, to_centres.argmin(-1).scatter(
        1, centres, torch.arange(clusters, device=centres.device).expand(batch, -1)
    )


def _recycled_kind(kept: torch.Tensor) -> torch.Tensor:
    """Return 1 where kept tokens no longer ascend: what is recycled stands behind the others."""
    ascending = F.pad(kept.diff(dim=1) > 0, (1, 0), value=True)
    return (~ascending).long().cumsum(1).clamp(max=1)


@register_selector(
    "visiondrop",
    kinds=("dominant: attended by the image", "contextual: the middle of others"),
    kind_of=lambda kept, saliency, contextual_share=CONTEXTUAL_SHARE: _contextual_kind(kept, contextual_share),
    place=DecoderPlace(in_proportion(8, 16, 24), "visual_rows", of_layer="own", positions="renumber"),
)
def select_visiondrop(
    features: torch.Tensor,
    saliency: torch.Tensor,
    visual_token_num: int,
    keys: torch.Tensor,
    contextual_share: float = CONTEXTUAL_SHARE,
) -> Selection:
    """Keep what the image itself attends to, and fold the rest into evenly spaced others (VisionDrop, 2506.22283).

    features          (B, N, C)  not looked at
    saliency          (B, N)     attention of all visual tokens in the layer to come, mean over heads and rows
    keys              (B, N, d)  keys of that layer, mean over heads
    contextual_share             share of the budget for tokens that others are folded into, 0 to 1
    returns                      T = min(visual_token_num, N) tokens: dominant ones, and behind them contextual ones

    The authors prune behind the encoder too, by VisionZip; that is a method of its own here.
    """
    budget = checked_budget(features, saliency, visual_token_num)
    batch, tokens = saliency.shape
    contextual = contextual_num(budget, contextual_share)
    dominant = most_attended_first(saliency)[:, : budget - contextual].sort(dim=-1).values
    if contextual == 0 or budget == tokens:
        return Selection(most_attended_first(saliency)[:, :budget].sort(dim=-1).values)
    targets, sources, nearest, weight = fold_into_spaced(keys, dominant, contextual)
    own = torch.ones(batch, budget, device=saliency.device)
    merge = Merge(sources, nearest + dominant.shape[1], weight, own)
    return Selection(torch.cat([dominant, targets], dim=1), merge, appended=contextual)


def _contextual_kind(kept: torch.Tensor, contextual_share: float) -> torch.Tensor:
    contextual = contextual_num(kept.shape[1], contextual_share)
    place = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    return (place >= kept.shape[1] - contextual).long()


@register_selector(
    "dart",
    kinds=("unlike: far from the pivots",),
    place=DecoderPlace(in_proportion(2), "key_norms", normed=True),
)
def select_dart(
    features: torch.Tensor,
    saliency: torch.Tensor,
    visual_token_num: int,
    text: torch.Tensor,
    text_saliency: torch.Tensor,
    image_pivots: int = 4,
    text_pivots: int = 4,
) -> torch.Tensor:
    """Keep what is least like a few pivots, among visual tokens and words (DART, arXiv 2502.11494).

    features       (B, N, C)  hidden states of the second layer, after the model's last norm
    saliency       (B, N)     sum of the absolute values of the keys
    text           (B, L, C)  hidden states of the prompt's columns, likewise
    text_saliency  (B, L)     their keys' sums, -inf where a column is no word behind the image
    image_pivots, text_pivots  how many of each; those with the largest keys
    returns        (B, T)     kept indices, ascending; T = min(visual_token_num, N)

    The authors go through the pivots in the order of a Python set; here the visual ones come first, then the words,
    each by falling norm. Their counts per pivot are equal; what is left over goes to the first ones here.
    """
    budget = checked_budget(features, saliency, visual_token_num)
    for name, count in (("image_pivots", image_pivots), ("text_pivots", text_pivots)):
        check_count(f"method_options.{name}", count)
    pivots = most_attended_first(saliency)[:, : min(image_pivots, budget)]
    words = most_attended_first(text_saliency)[:, :text_pivots]
    is_word = text_saliency.gather(1, words) > float("-inf")
    asking = torch.cat([rows_at(features, pivots), rows_at(text, words)], dim=1)
    usable = torch.cat([torch.ones_like(pivots, dtype=torch.bool), is_word], dim=1)
    return least_similar_to_pivots(features, pivots, asking, usable, budget)


@register_selector(
    "sgl",
    kinds=("important: attended by a smaller model",),
    place=DecoderPlace(lambda depth: [max(1, int(0.4 * depth))], "told"),
)
def select_sgl(features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int) -> torch.Tensor:
    """Keep what another, smaller model attended to while it answered (SGL, arXiv 2412.03324).

    features  (B, N, C)  not looked at
    saliency  (B, N)     what the call says: attention of that model's rows from the last visual token on, summed
    returns   (B, T)     kept indices, ascending; T = min(visual_token_num, N)

    The authors also let the smaller model's answer stand where it is sure of it; here that is left to the caller.
    """
    return select_fastv(features, saliency, visual_token_num)


def least_similar_to_pivots(
    features: torch.Tensor, pivots: torch.Tensor, asking: torch.Tensor, usable: torch.Tensor, budget: int
) -> torch.Tensor:
    """Let each pivot in turn take the tokens least like it that are left.

    features  (B, N, C); pivots (B, P) tokens that stay themselves
    asking    (B, Q, C) features of all pivots, in the order in which they take; usable (B, Q) False for none
    returns   (B, budget) ascending
    """
    unit = F.normalize(features.detach().float(), dim=-1)
    cosine = F.normalize(asking.detach().float(), dim=-1) @ unit.mT  # (B, Q, N)
    rows = []
    for image, own in enumerate(pivots):
        taken = torch.zeros(features.shape[1], dtype=torch.bool, device=features.device)
        taken[own] = True
        takers = usable[image].nonzero()[:, 0].tolist()
        each, more = divmod(budget - len(own), len(takers))
        for number, pivot in enumerate(takers):
            order = cosine[image, pivot].masked_fill(taken, float("inf")).argsort(stable=True)
            taken[order[: each + (number < more)]] = True
        rows.append(taken.nonzero()[:, 0])
    return torch.stack(rows)
