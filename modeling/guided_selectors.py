"""Selectors that read the question: they keep what a prompt's words are about, and are given these words.

A question is given in one of two forms. `text` are the words as the language model embeds them, which any
architecture has; projected features are compared with them. `text_embeds` are what a CLIP text tower makes of it,
which the authors compare with CLIP's `image_embeds`; a repo that carries that tower gives both (`clip_text.py`).
"""

import torch

from .diversity_selectors import picked_of_pool
from .merging_selectors import kind_of_rest
from .related_selectors import FEW_TOKENS, POOL
from .selector_inputs import checked_budget, checked_rows, checked_unit, every_token, most_attended_first, widened
from .selector_registry import Merge, Selection, register_selector
from .similarity import cosines, is_traced, norms_of, refuse_unless, without_autocast

LEAST = 1e-6  # of the relevance, so that no token counts nothing: the authors' number


@register_selector("cdpruner", kinds=("relevant: about the question, and unlike each other",), by_saliency=False)
def select_cdpruner(
    features: torch.Tensor,
    saliency: torch.Tensor,
    visual_token_num: int,
    projected: torch.Tensor,
    text: torch.Tensor | None = None,
    text_saliency: torch.Tensor | None = None,
    image_embeds: torch.Tensor | None = None,
    text_embeds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Keep tokens that are about the question and unlike each other (CDPruner, arXiv 2506.10967).

    features       (B, N, C)  not looked at
    saliency       (B, N)     not looked at
    projected      (B, N, D)  features after the projector
    text           (B, L, D)  the words of the question, as the language model embeds them
    text_saliency  (B, L)     -inf where a row of `text` is no word
    image_embeds   (B, N, E)  the tokens in CLIP's common space; with `text_embeds`, in place of `text`
    text_embeds    (B, M, E)  the question's M parts in that space, or (B, E)
    returns        (B, T)     kept indices, ascending; T = min(visual_token_num, N)

    Each next token adds most to the determinant of r S r, of the rows and columns of those kept: S are the cosines of
    projected features, r is the relevance, brought to 0 to 1 in each image. Where no token adds anything any more, the
    most relevant ones follow; the authors' code fails there. They bring the relevance of a whole batch to one range,
    so that a picture's tokens depend on its neighbours in the batch; here they do not. Of CLIP, tokens less like the
    question are the more relevant ones, as in their code. That the words are compared as the language model embeds
    them, by the mean of their cosines, is a choice of ours.
    """
    budget = checked_budget(features, saliency, visual_token_num)
    unit = checked_unit(projected, saliency)
    relevance = _relevance("cdpruner", unit, saliency, text, text_saliency, image_embeds, text_embeds, normed=True)
    if budget == saliency.shape[1]:
        return every_token(saliency)
    least, most = relevance.amin(dim=-1, keepdim=True), relevance.amax(dim=-1, keepdim=True)
    relevance = (relevance - least + LEAST) / (most - least).clamp(min=LEAST)
    rows = unit * relevance[..., None]
    if is_traced() or rows.device.type != "cpu" or saliency.shape[1] <= FEW_TOKENS:
        return _most_spanning(rows, relevance, budget).sort(dim=-1).values
    picks = [_spanning_by_pools(*image, budget) for image in zip(rows, relevance, strict=True)]
    return torch.tensor(picks, device=rows.device).sort(dim=-1).values


def _most_spanning(rows: torch.Tensor, relevance: torch.Tensor, budget: int) -> torch.Tensor:
    """Pick, one after the other, the row (B, N, D) that adds most volume to those picked: (B, budget).

    That is the greedy search for the largest determinant of their inner products. Once nothing is left of any row but
    rounding, the rows of most `relevance` (B, N) are picked.
    """
    batch, tokens = relevance.shape
    left = (rows * rows).sum(dim=-1)  # squared length of what is not spanned yet
    noise = tokens * torch.finfo(left.dtype).eps * left.amax(dim=-1, keepdim=True)
    factors = left.new_zeros(batch, budget, tokens)  # rows of the Cholesky factor
    is_picked = torch.zeros_like(left, dtype=torch.bool)
    picks: list[torch.Tensor] = []
    for number in range(budget):
        most = left.masked_fill(is_picked, float("-inf"))
        spare = relevance.masked_fill(is_picked, float("-inf"))
        is_spanned = most.amax(dim=-1, keepdim=True) <= noise
        pick = torch.where(is_spanned, spare, most).argmax(dim=-1, keepdim=True)
        row = rows.gather(1, pick[..., None].expand(-1, -1, rows.shape[-1]))
        before = factors[:, :number]
        of_pick = before.gather(2, pick[:, None].expand(-1, number, -1))
        inner = cosines(row, rows)[:, 0] - (of_pick * before).sum(dim=1)
        length = left.gather(1, pick).clamp(min=0).sqrt()
        factors[:, number] = torch.where(is_spanned, 0, inner / length.masked_fill(is_spanned, 1))
        left = left - factors[:, number] ** 2
        is_picked = is_picked.scatter(1, pick, True)
        picks.append(pick)
    return torch.cat(picks, dim=-1)


def _spanning_by_pools(rows: torch.Tensor, relevance: torch.Tensor, budget: int) -> list[int]:
    """Pick as `_most_spanning` does, in one image (N, D), but update all tokens for many picks at a time.

    What is left of a row only falls as others are picked. So the best of the few best is the next, as long as it is
    better than all others were.
    """
    left = (rows * rows).sum(dim=-1)
    noise = len(rows) * torch.finfo(left.dtype).eps * float(left.amax())
    factors, picks = left.new_empty(budget, len(rows)), list[int]()
    while len(picks) < budget:
        best_first = left.argsort(descending=True, stable=True)[: min(POOL, len(rows) // 8) + 1]
        pool = best_first[:-1].sort().values
        last, before = best_first[-1], factors[: len(picks)]
        among = cosines(rows[pool], rows[pool]) - cosines(before[:, pool].mT, before[:, pool].mT)
        limit = (-float(left[last]), int(last))
        new = picked_of_pool(among, left[pool], pool.tolist(), limit, budget - len(picks), floor=noise)
        if not new:
            return picks + _most_relevant_of_the_rest(relevance, picks, budget)
        chosen = torch.tensor(new)
        inner = cosines(rows[chosen], rows) - cosines(before[:, chosen].mT, before.mT)
        with without_autocast(rows.device):
            factor, failed = torch.linalg.cholesky_ex(inner[:, chosen])
            if failed:  # of the last ones nothing but rounding is left
                return picks + _most_relevant_of_the_rest(relevance, picks, budget)
            added = torch.linalg.solve_triangular(factor, inner, upper=False)
        factors[len(picks) : len(picks) + len(new)] = added
        picks += new
        left = left - (added * added).sum(dim=0)
        left[chosen] = -float("inf")
    return picks


def _most_relevant_of_the_rest(relevance: torch.Tensor, picks: list[int], budget: int) -> list[int]:
    spare = relevance.clone()
    spare[picks] = -float("inf")
    return spare.argsort(descending=True, stable=True)[: budget - len(picks)].tolist()


@register_selector(
    "trim",
    kinds=("relevant: about the question", "rest: the mean of all others"),
    kind_of=kind_of_rest,
    by_saliency=False,
)
def select_trim(
    features: torch.Tensor,
    saliency: torch.Tensor,
    visual_token_num: int,
    projected: torch.Tensor,
    text: torch.Tensor | None = None,
    text_saliency: torch.Tensor | None = None,
    image_embeds: torch.Tensor | None = None,
    text_embeds: torch.Tensor | None = None,
) -> Selection:
    """Keep the tokens most about the question, and the mean of all others (TRIM, arXiv 2409.10994).

    features       (B, N, C)  not looked at; these are what is averaged
    saliency       (B, N)     not looked at
    projected      (B, N, D)  features after the projector
    text           (B, L, D)  the words of the question, as the language model embeds them
    text_saliency  (B, L)     -inf where a row of `text` is no word
    image_embeds   (B, N, E)  the tokens in CLIP's common space; with `text_embeds`, in place of `text`
    text_embeds    (B, M, E)  the question's M parts in that space, or (B, E)
    returns                   T = min(visual_token_num, N) tokens, one of which is the mean of those that fall

    The authors take as many as the relevance has outliers, or a share; here the budget says how many, and the mean
    stands in the place of the last token that falls, where theirs comes behind all. Of CLIP, tokens less like the
    question are the more relevant ones, as in their code. That the words are compared as the language model embeds
    them, by the mean of their cosines, is a choice of ours.
    """
    budget = checked_budget(features, saliency, visual_token_num)
    unit = checked_unit(projected, saliency)
    relevance = _relevance("trim", unit, saliency, text, text_saliency, image_embeds, text_embeds, normed=False)
    if budget == saliency.shape[1]:
        return Selection(every_token(saliency))
    order = most_attended_first(relevance)
    kept, fallen = order[:, : budget - 1], order[:, budget - 1 :]
    place = fallen.amax(dim=1, keepdim=True)
    weight = relevance.new_full(fallen.shape, 1 / fallen.shape[1])
    own = torch.nn.functional.pad(relevance.new_ones(kept.shape), (0, 1))
    merge = Merge(fallen, torch.full_like(fallen, budget - 1), weight, own)
    return Selection(torch.cat([kept, place], dim=1), merge).ascending()


def _relevance(
    method: str,
    unit: torch.Tensor,
    saliency: torch.Tensor,
    text: torch.Tensor | None,
    text_saliency: torch.Tensor | None,
    image_embeds: torch.Tensor | None,
    text_embeds: torch.Tensor | None,
    normed: bool,
) -> torch.Tensor:
    """Return how much each token has to do with the question, (B, N): more is more relevant.

    unit    (B, N, D) projected features of length 1
    normed  whether vectors of CLIP are brought to length 1
    """
    if image_embeds is not None and text_embeds is not None:
        images = checked_rows("image_embeds", image_embeds, saliency)
        words = widened(text_embeds)
        words = words[:, None] if words.ndim == 2 else words
        _require_question("text_embeds", words, len(saliency), images.shape[-1])
        if normed:
            images, words = images / norms_of(images), words / norms_of(words)
        return -cosines(images, words).mean(dim=-1)
    if text is None or text_saliency is None:
        raise ValueError(
            f'vispruner_config.method "{method}" needs the question: text and text_saliency, or image_embeds and '
            "text_embeds of CLIP"
        )
    words = widened(text)
    _require_question("text", words, len(saliency), unit.shape[-1])
    is_word = (text_saliency > float("-inf")).to(words.dtype)
    if is_word.shape != words.shape[:2]:
        raise ValueError(f"text_saliency must be {tuple(words.shape[:2])}, got {tuple(is_word.shape)}")
    refuse_unless(
        (is_word.sum(1) > 0).all(),
        "text has no word: the prompt of an image asks nothing (in training, what stands before the first label asks)",
    )
    mean = (words / norms_of(words) * is_word[..., None]).sum(dim=1, keepdim=True) / is_word.sum(1)[:, None, None]
    return (unit * mean).sum(dim=-1)


def _require_question(name: str, words: torch.Tensor, images: int, width: int) -> None:
    if words.ndim != 3 or len(words) != images or words.shape[-1] != width or words.shape[1] == 0:
        raise ValueError(
            f"{name} must hold the question of each of {images} images in {width} numbers a word, "
            f"got {tuple(words.shape)}"
        )
