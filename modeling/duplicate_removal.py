"""VisPruner's rounds: which tokens are left when, in each round, the most duplicated of every other one are dropped.

The cosine of two tokens is the same in every round; what changes is who is compared with whom. So rounds are index
arithmetic behind one product of all rows with all rows, in the form that suits the device and the size:

CPU, up to `MOST_IN_A_MATRIX` tokens   the matrix of cosines, in numpy, a call of which costs a tenth of torch's
CPU, more tokens                       no matrix, but for each token a list of those most like it
GPU                                    the matrix and the kernels of duplicate_removal_triton.py
compiled, or a GPU without Triton      the matrix and tensor operations of static shapes
all but CPUs, no matrix so large       cosines computed again in every round, by tensor operations of static shapes

Every form takes the same decisions in the same order. Between similarities that differ in the last bit, the rounding
of a product decides, which follows from processor, type and shape.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .duplicate_removal_triton import MOST_IN_ONE_KERNEL, keep_in_one_kernel, kernel_can_run, slots_left_by_kernels
from .similarity import BLOCK, cosines, fill_with_cosines, images_at_once, is_traced, matrix_fits, norms_of, unit_rows

MOST_IN_A_MATRIX = 2048  # whole rows of a larger one are read more slowly than lists
IN_CACHE = 2**18  # cosines of small images whose rounds run together

CANDIDATES = 64  # that a list names
FEW = 16  # with fewer of them left, a list is made anew on occasion
FEWEST_ROWS = 16  # to multiply at a time: the product of one or two is rounded otherwise


def default_step(tokens: int) -> int:
    """Return the most tokens that fall per round: 8, as in the paper, for every full 1,024 that an image has.

    Full ones, because in proportion it would be 9 for CogVLM's 1,225 tokens, which the paper prunes with 8, and the
    default is to be the paper's wherever that has been used. So up to 2,047 tokens the rounds are the paper's, and
    never more than 256.
    """
    return 8 * max(1, tokens // 1024)


def keep_without_duplicates(
    features: torch.Tensor, order: torch.Tensor, important_num: int, budget: int, step: int
) -> torch.Tensor:
    """Keep the first tokens of `order` and, of the rest, what is left when the most duplicated are dropped.

    features  (B, N, C)
    order     (B, N)     tokens, most attended first; of equally duplicated ones the first are dropped
    step                 most tokens dropped per round
    returns   (B, T)     kept indices, ascending; T = budget
    """
    norms = norms_of(features)
    residual = order[:, important_num:]
    drops = drops_of_rounds(residual.shape[1], budget - important_num, step)
    kernels = kernel_can_run(features.device)
    if features.device.type == "cpu" and not kernels and not is_traced():
        diverse = _diverse_on_cpu(features, norms, residual, drops)
        return _joined(order[:, :important_num], diverse)
    images = images_at_once(residual.shape[1])
    if len(features) <= images:
        return _keep_by_tensors(features, norms, order, important_num, drops, step)
    parts = zip(features.split(images), norms.split(images), order.split(images), strict=True)
    return torch.cat([_keep_by_tensors(*part, important_num, drops, step) for part in parts])


def drops_of_rounds(left: int, keep: int, step: int) -> list[int]:
    """Return how many tokens each round drops, at most `step`, until `keep` are left: known before any is compared."""
    drops = []
    while left > keep:
        drops.append(min(step, left - keep, (left + 1) // 2))
        left -= drops[-1]
    return drops


def _joined(important: torch.Tensor, diverse: torch.Tensor) -> torch.Tensor:
    return torch.cat([important, diverse], dim=-1).sort(dim=-1).values


# Tensor operations of static shapes, without a host sync


def _keep_by_tensors(
    features: torch.Tensor,
    norms: torch.Tensor,
    order: torch.Tensor,
    important_num: int,
    drops: list[int],
    step: int,
) -> torch.Tensor:
    """Keep as `keep_without_duplicates` does, on any device, compiled or not."""
    residual = order[:, important_num:]
    unit = unit_rows(features, norms, residual)
    kernels = kernel_can_run(features.device) and not is_traced()
    if not matrix_fits(*residual.shape):
        slots = slots_left(_compare_again(unit), residual, drops)
    elif not kernels:
        slots = slots_left(_compare_in(cosines(unit, unit)), residual, drops)
    elif order.shape[1] > MOST_IN_ONE_KERNEL:
        slots = slots_left_by_kernels(cosines(unit, unit), drops)
    else:
        budget = order.shape[1] - sum(drops)
        return keep_in_one_kernel(cosines(unit, unit), order, important_num, budget, step)
    return _joined(order[:, :important_num], residual.gather(1, slots))


Compare = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def slots_left(compare: Compare, residual: torch.Tensor, drops: list[int]) -> torch.Tensor:
    """Run the rounds: return which of the tokens of `residual` (B, R) are left, (B, R - sum(drops)), by their place.

    compare  places a (B, P) and b (B, Q) to the highest cosine of each a with any b, (B, P)
    """
    slots = torch.arange(residual.shape[1], device=residual.device).repeat(len(residual), 1)
    for drop in drops:
        a, b = slots[:, 0::2], slots[:, 1::2]
        most_duplicated_first = compare(a, b).argsort(dim=-1, descending=True, stable=True)
        # The survivors' order counts: it decides how the next round splits them.
        slots = torch.cat([a.gather(1, most_duplicated_first[:, drop:]), b], dim=-1)
    return slots


def _compare_in(cosine: torch.Tensor) -> Compare:
    images = torch.arange(len(cosine), device=cosine.device)[:, None, None]
    return lambda a, b: cosine[images, a[:, :, None], b[:, None, :]].amax(dim=-1)


def _compare_again(unit: torch.Tensor) -> Compare:
    def rows(slots: torch.Tensor) -> torch.Tensor:
        return unit.gather(1, slots[:, :, None].expand(-1, -1, unit.shape[-1]))

    def compare(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        others = rows(b)
        at_once = max(1, BLOCK // b.numel())
        return torch.cat([cosines(rows(some), others).amax(dim=-1) for some in a.split(at_once, dim=1)], dim=1)

    return compare


# On a CPU


def _diverse_on_cpu(
    features: torch.Tensor, norms: torch.Tensor, residual: torch.Tensor, drops: list[int]
) -> torch.Tensor:
    """Return what is left: features (B, N, C), norms (B, N, 1), residual (B, R) -> (B, R - sum(drops))."""
    batch, left = residual.shape
    if left > MOST_IN_A_MATRIX:
        return torch.stack([_diverse_by_lists(*image, drops) for image in zip(features, norms, residual, strict=True)])
    images = min(batch, max(1, IN_CACHE // left**2))  # all of an image's matrix stays in cache; of small ones, several
    unit = features.new_empty(images, left, features.shape[-1])
    cosine = features.new_empty(images, left, left)
    diverse = residual.new_empty(batch, left - sum(drops))
    for start in range(0, batch, images):
        part = slice(start, min(start + images, batch))
        some, matrix = unit[: part.stop - start], cosine[: part.stop - start]
        _fill_with_unit_rows(features[part], norms[part], residual[part], some)
        fill_with_cosines(some, matrix)
        values = _widened(matrix).numpy()
        slots = slots_left_on_cpu(values[0], drops)[None] if images == 1 else slots_left_in_several(values, drops)
        torch.gather(residual[part], 1, torch.from_numpy(slots), out=diverse[part])
    return diverse


def _fill_with_unit_rows(features: torch.Tensor, norms: torch.Tensor, tokens: torch.Tensor, out: torch.Tensor) -> None:
    """Fill `out` (B, R, C) with the named rows at length 1: (B, N, C), (B, N, 1), (B, R)."""
    images, count = features.shape[:2]
    place = tokens[0] if images == 1 else (tokens + torch.arange(images)[:, None] * count).flatten()
    unit = torch.index_select(features.flatten(0, 1), 0, place, out=out.flatten(0, 1))
    unit.div_(norms.flatten(0, 1).index_select(0, place))


def _widened(cosine: torch.Tensor) -> torch.Tensor:
    # numpy knows no bfloat16 and is slow in float16; a wider type keeps every comparison as it was.
    return cosine if cosine.dtype in (torch.float32, torch.float64) else cosine.float()


def slots_left_on_cpu(cosine: Any, drops: list[int]) -> Any:
    """`slots_left` on the numpy matrix of one image: (R, R) -> (R - sum(drops),).

    Half of the b of one round are b in the next one, too, and which half is known beforehand. So every other round
    takes over what is the best among these, in the first row of `taken`, and reads the rows of the others alone.
    """
    left, added = len(cosine), 0
    numbers = tokens = slots = torch.arange(left).numpy()
    taken = torch.from_numpy(cosine).new_empty(left // 2 + 1, left).numpy()
    for number, drop in enumerate(drops):
        a, b = slots[0::2], slots[1::2]
        if number % 2:
            others = b[:added]
        else:
            kept = len(a) - drop
            added, staying, others = kept // 2, b[1 - kept % 2 :: 2], b[kept % 2 :: 2]
            taken[0] = _rows(cosine, staying, taken[: len(staying)]).max(0, initial=-float("inf"))
        # Symmetric: the best b for each column, read in whole rows.
        _rows(cosine, others, taken[1 : len(others) + 1])
        best = taken[: len(others) + 1].max(0)
        slots = _in_order(slots, a.take((-best.take(a)).argsort(kind="stable")[drop:]), b)
        left -= drop
        if 2 * left < len(cosine):
            among_staying = taken[0].take(slots)
            cosine, tokens = _rows(cosine, slots).take(slots, 1), tokens.take(slots)
            slots, taken = numbers[:left], taken.reshape(-1)[: (left // 2 + 1) * left].reshape(-1, left)
            taken[0] = among_staying
    return tokens.take(slots)


def _rows(values: Any, numbers: Any, out: Any = None) -> Any:
    return values.take(numbers, 0, out, "clip")  # "raise" would buffer what it takes


def slots_left_in_several(cosine: Any, drops: list[int]) -> Any:
    """`slots_left` on numpy matrices of several images: (B, R, R) -> (B, R - sum(drops))."""
    images, left, width = cosine.shape
    # Slots are numbered through all images, as the rows of their matrices are, and so are the tokens they stand for.
    numbers = torch.arange(images * left).numpy()
    first = numbers[:images, None]
    tokens = slots = numbers.reshape(images, left)
    rows = cosine.reshape(-1, left)
    for drop in drops:
        a, b = slots[:, 0::2], slots[:, 1::2]
        best = _rows(rows, b).max(-2)  # symmetric: the best b for each column, read in whole rows
        least_duplicated = (-best.take(a)).argsort(-1, "stable")[:, drop:]
        slots = _in_order(slots, a.take(least_duplicated + first * a.shape[-1]), b)
        left -= drop
        if 2 * left < width:
            columns = slots - first * width
            rows = rows.take(slots[..., None] * width + columns[:, None, :]).reshape(-1, left)
            tokens, width = tokens.take(slots), left
            slots = numbers[: tokens.size].reshape(images, left)
    return tokens.take(slots) - first * cosine.shape[-1]


def _in_order(slots: Any, survivors: Any, b: Any) -> Any:
    """Return what is left of `slots` (..., L): `survivors` (..., P), then `b` (..., Q)."""
    kept = survivors.shape[-1]
    slots = slots[..., : kept + b.shape[-1]].copy()
    slots[..., :kept], slots[..., kept:] = survivors, b
    return slots


def _diverse_by_lists(
    features: torch.Tensor, norms: torch.Tensor, residual: torch.Tensor, drops: list[int]
) -> torch.Tensor:
    """Return what is left of one image: features (N, C), norms (N, 1), residual (R,) -> (R - sum(drops),)."""
    # Rows stand in random order: else all that equal each other would list the same few tokens, which fall together.
    order = torch.randperm(len(residual), generator=torch.Generator().manual_seed(0))
    tokens = residual[order]
    lists = _MostAlike(features.index_select(0, tokens).div_(norms.index_select(0, tokens)))
    slots = order.argsort().numpy()
    for drop in drops:
        a, b = slots[0::2], slots[1::2]
        most_duplicated_first = (-lists.duplication(a, b)).argsort(kind="stable")
        slots = _in_order(slots, a.take(most_duplicated_first[drop:]), b)
        if 2 * len(slots) < len(tokens):
            tokens = tokens[torch.from_numpy(slots)]
            slots = lists.keep(slots)
    return tokens[torch.from_numpy(slots)]


class _MostAlike:
    """For each row of `unit` (R, C) a list of those most like it, the most alike first, itself among them.

    In any round about half of a list is on the other side, so almost always the best of the other side is on it. If
    not, the row is compared anew, and with it all whose lists have become short: products of many rows cost less.
    """

    def __init__(self, unit: torch.Tensor) -> None:
        self._unit = unit
        listed = [
            block.topk(min(CANDIDATES, len(unit)), dim=-1) for _, block in self._compare(torch.arange(len(unit)))
        ]
        self._rows = torch.cat([some.indices for some in listed]).T.contiguous().numpy()
        self._cosines = torch.cat([some.values for some in listed]).T.contiguous().numpy()
        self._handicap = self._cosines[0, [*range(len(unit)), 0]]  # of each row, and at last of nobody
        self._best = self._cosines.copy()

    def _compare(self, rows: torch.Tensor, there: torch.Tensor | None = None) -> Iterator[tuple[Any, torch.Tensor]]:
        others = self._unit if there is None else self._unit.index_select(0, there)
        for some in rows.split(max(1, BLOCK // len(others))):
            yield some.numpy(), _widened(cosines(self._unit.index_select(0, some), others))

    def duplication(self, a: Any, b: Any) -> Any:
        """Return the highest cosine of each of the rows `a` with any of `b`; there are no others any more."""
        self._handicap.fill(-float("inf"))
        self._handicap[b] = 0
        self._handicap.take(self._rows, None, self._best, "clip")
        self._best += self._cosines
        duplication = self._best.max(0)
        lost = a[duplication.take(a) == -float("inf")]
        if len(lost):
            self._list_anew(lost, a, b, duplication)
        return duplication.take(a)

    def _list_anew(self, lost: Any, a: Any, b: Any, duplication: Any) -> None:
        there = self._handicap == 0
        there[a] = True
        short = there[:-1] & (there.take(self._rows).sum(0) < FEW)
        short[lost] = short[a[:FEWEST_ROWS]] = True
        others = torch.from_numpy(there[:-1].nonzero()[0])
        nobody, numbers = len(short), others.numpy()
        for rows, block in self._compare(torch.from_numpy(short.nonzero()[0]), others):
            duplication[rows] = (block.numpy() + self._handicap.take(numbers)).max(1)
            listed = block.topk(min(CANDIDATES, len(others)), dim=-1)
            self._rows[:, rows], self._cosines[:, rows] = nobody, 0
            self._rows[: listed.values.shape[1], rows] = numbers.take(listed.indices.numpy()).T
            self._cosines[: listed.values.shape[1], rows] = listed.values.numpy().T

    def keep(self, slots: Any) -> Any:
        """Forget all other rows; return the numbers of these from now on."""
        left, numbers = len(slots), torch.arange(len(slots)).numpy()
        renumbered = torch.full((len(self._handicap),), left).numpy()
        renumbered[slots] = numbers
        self._rows = renumbered.take(self._rows.take(slots, 1))
        self._cosines, self._best = self._cosines.take(slots, 1), self._best.take(numbers, 1)
        self._handicap = self._handicap[: left + 1].copy()
        self._unit = self._unit.index_select(0, torch.from_numpy(slots))
        return numbers
