"""Methods whose authors published no code: their rules as their papers were read here, with choices of our own.

Nothing recorded holds them to anything, and their authors' figures need not come out. Ties go to the lowest index.
"""

import math

import torch
from torch.nn import functional as F

from .selector_inputs import checked_budget, checked_unit, most_attended_first, widened
from .selector_registry import DecoderPlace, Then, in_proportion, register_selector, rows_at
from .similarity import cosines, norms_of

APART, CENTRE = 0.5, 0.5  # how much distances count in TopV beside what tokens hold
SOFTNESS, ROUNDS = 0.1, 30  # of Sinkhorn's algorithm
RECOVERED = 0.1  # share of TopV's budget for tokens at even steps


def _fill_evenly(stays: torch.Tensor, budget: int) -> torch.Tensor:
    """Add to the tokens that stay (B, N) others at even steps: the indices (B, budget), ascending."""
    others = (~stays).cumsum(1)  # of these, how many there are up to each token
    room = budget - stays.sum(1, keepdim=True)
    steps = others * room // others[:, -1:].clamp(min=1)
    stays = stays | (F.pad(steps, (1, 0)).diff(dim=1) > 0)
    return (~stays).int().argsort(dim=1, stable=True)[:, :budget]


def _unit(features: torch.Tensor) -> torch.Tensor:
    wide = widened(features)
    return wide / norms_of(wide)


@register_selector(
    "image_text",
    kinds=("alike: resembles the image as a whole, or fills the budget evenly",),
    then=Then("fastv", in_proportion(2), share=0.5),
    experimental=True,
)
def select_image_text(
    features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int, cls_feature: torch.Tensor
) -> torch.Tensor:
    """Keep what resembles the image as a whole, then in the language model what the question attends to (2409.01162).

    features     (B, N, C)  encoder features
    saliency     (B, N)     not looked at
    cls_feature  (B, C)     what the encoder made of [CLS]
    returns      (B, T)     kept indices, ascending; T = min(visual_token_num, N)

    Only the abstract of arXiv 2409.01162 is at hand. Its authors cut where the sorted similarities to [CLS] bend, and
    again in the language model. Here the bend is the point farthest from the chord: up to it the most similar tokens
    stay, as many as the budget holds, and what is left of it goes to others at even steps, so that counts are known
    beforehand. `fastv` then halves them in the second of 32 layers. Text is never dropped.
    """
    budget = checked_budget(features, saliency, visual_token_num)
    similarity = (_unit(features) * _unit(cls_feature)[:, None]).sum(-1)  # rounds in a batch as alone
    order = most_attended_first(similarity)
    front = _until_the_bend(similarity.gather(1, order)).clamp(max=budget)
    rank = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return _fill_evenly(torch.zeros_like(rank).scatter(1, order, rank) < front, budget)


def _until_the_bend(falling: torch.Tensor) -> torch.Tensor:
    """Return how many of the falling numbers (B, N) come up to the one farthest from the chord, itself too: (B, 1)."""
    along = torch.linspace(0, 1, falling.shape[1], dtype=falling.dtype, device=falling.device)
    chord = falling[:, :1] + (falling[:, -1:] - falling[:, :1]) * along
    return (falling - chord).abs().argmax(1, keepdim=True) + 1


@register_selector(
    "todre",
    kinds=("diverse: far from those kept, all together",),
    then=Then("fastv", lambda depth: [round(0.75 * depth)], share=0.0),
    experimental=True,
)
def select_todre(
    features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int, projected: torch.Tensor
) -> torch.Tensor:
    """Keep tokens that are far from each other taken together, and none in the last quarter of the layers (ToDRE v2).

    features   (B, N, C)  not looked at
    saliency   (B, N)     not looked at
    projected  (B, N, D)  features after the projector
    returns    (B, T)     kept indices, ascending; T = min(visual_token_num, N)

    Only the abstract of ToDRE is at hand. Here the token farthest from the mean comes first, then always the one whose
    cosine distances to those kept have the largest sum. Its authors tell by attention in which late layer visual
    tokens have had their say; here all leave after three quarters of the layers. Where `stage_token_nums` lets some
    stay, they are those that `fastv` ranks first.
    """
    budget = checked_budget(features, saliency, visual_token_num)
    unit = checked_unit(projected, saliency)
    closeness = (unit * unit.sum(1, keepdim=True)).sum(-1)  # to all, which ranks as that to their mean does
    picked = torch.zeros_like(closeness, dtype=torch.bool)
    to_kept = torch.zeros_like(closeness)
    for picks in range(budget):
        among = to_kept if picks else closeness
        best = among.masked_fill(picked, float("inf")).argmin(1, keepdim=True)
        picked = picked.scatter(1, best, True)
        to_kept = to_kept + (unit * rows_at(unit, best)).sum(-1)
    return (~picked).int().argsort(dim=1, stable=True)[:, :budget]


@register_selector(
    "topv",
    kinds=("matched: moved at little cost, or recovered evenly",),
    place=DecoderPlace(in_proportion(3), normed=True),
    experimental=True,
)
def select_topv(
    features: torch.Tensor,
    saliency: torch.Tensor,
    visual_token_num: int,
    layer_inputs: torch.Tensor,
    places: torch.Tensor,
) -> torch.Tensor:
    """Keep what optimal transport moves at least cost from a layer's inputs to its outputs (TopV).

    features      (B, N, C)  hidden states behind the third layer, after the model's last norm
    saliency      (B, N)     not looked at
    layer_inputs  (B, N, C)  hidden states before it
    places        (B, N, 3)  image, and how far down and across from its centre, in diagonals
    returns       (B, T)     kept indices, ascending; T = min(visual_token_num, N)

    Only the abstract of TopV and the caption of a figure are at hand. Here moving one token's input to another's
    output costs 1 - cosine, half the distance between them, at most a diagonal, and half that of the one from its
    image's centre. Sinkhorn's algorithm (`ROUNDS` of it) finds the plan, and those stay whose own move costs least. A
    tenth of the budget goes to others at even steps.
    """
    budget = checked_budget(features, saliency, visual_token_num)
    recovered = int(RECOVERED * budget) if budget < saliency.shape[1] else 0
    importance = [
        -_transport_costs(*image) for image in zip(_unit(layer_inputs), _unit(features), places, strict=True)
    ]
    best = most_attended_first(torch.stack(importance))[:, : budget - recovered]
    return _fill_evenly(torch.zeros_like(saliency, dtype=torch.bool).scatter(1, best, True), budget)


def _transport_costs(sources: torch.Tensor, targets: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return what each token's move costs under the plan that moves all (N, C) to all (N, C): (N,)."""
    apart = torch.cdist(places[:, 1:], places[:, 1:], compute_mode="donot_use_mm_for_euclid_dist")
    apart = apart.masked_fill(places[:, :1] != places[:, 0], 1.0).to(sources)
    centre = places[:, 1:].norm(dim=-1, keepdim=True).to(sources)
    cost = 1 - cosines(sources, targets) + APART * apart + CENTRE * centre
    log_kernel, share = -cost / SOFTNESS, -math.log(len(cost))
    rows, columns = torch.zeros_like(cost[:, :1]), torch.zeros_like(cost[:1])
    for _ in range(ROUNDS):
        rows = share - (log_kernel + columns).logsumexp(1, keepdim=True)
        columns = share - (log_kernel + rows).logsumexp(0, keepdim=True)
    return ((log_kernel + rows + columns).exp() * cost).sum(1)
