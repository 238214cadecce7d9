"""How many visual tokens each decoder layer sees: whole numbers on the host, known before anything runs.

The budget of every method is the number of visual tokens that a decoder layer holds, on average over the layers. What
is chosen before the language model holds in all of them; a method within it starts with all and ends with fewer.
"""

from collections.abc import Sequence
from functools import lru_cache


def layer_counts(tokens: int, layers: Sequence[int], counts: Sequence[int], depth: int) -> list[int]:
    """Return how many of an image's visual tokens each of `depth` decoder layers sees.

    layers  the layers before which tokens leave, ascending; counts  how many are left there
    """
    seen, held = [], tokens
    left = dict(zip(layers, counts, strict=True))
    for layer in range(depth):
        held = min(held, left.get(layer, held))
        seen.append(held)
    return seen


def whole_counts(tokens: int, left: Sequence[float]) -> list[int]:
    """Return how many of `tokens` each stage leaves that leaves these parts of them: one at least of what is left."""
    return [max(int(share > 0), int(tokens * share + 1e-9)) for share in left]


@lru_cache(maxsize=1024)
def most_before(layers: tuple[int, ...], left: tuple[float, ...], depth: int, mean: int) -> int:
    """Return with how many tokens an image may begin whose `depth` layers hold no more than `mean` on average.

    layers  the layers before which tokens leave, ascending; left  what part of the tokens is left there
    """
    fewest, most = mean, mean * depth  # the first layer holds them all
    while fewest < most:
        middle = (fewest + most + 1) // 2
        held = sum(layer_counts(middle, layers, whole_counts(middle, left), depth))
        fewest, most = (middle, most) if held <= mean * depth else (fewest, middle - 1)
    return fewest


@lru_cache(maxsize=1024)  # asked for each image of each prompt
def stage_counts(tokens: int, layers: tuple[int, ...], depth: int, mean: float) -> tuple[int, ...]:
    """Return how many visual tokens are left from each of `layers` on, so that `depth` layers hold `mean` on average.

    Each stage keeps the same share of the one before: as many as the mean allows, never more. Where there is one
    stage, that is what FastV keeps for the same cache; the three of PyramidDrop come out as halves.
    Raises ValueError when even one token from the first of `layers` on is too much.
    """
    if mean >= tokens:
        return (tokens,) * len(layers)

    def kept(share: float) -> list[int]:
        return [max(1, round(tokens * share ** (stage + 1))) for stage in range(len(layers))]

    def total(share: float) -> int:
        return sum(layer_counts(tokens, layers, kept(share), depth))

    if total(0.0) > mean * depth:
        least = total(0.0) / depth
        raise ValueError(
            f"vispruner_config asks for {mean:g} visual tokens in a decoder layer on average, but with all {tokens} "
            f"in the first {layers[0]} of {depth} layers {least:.1f} is the least: raise visual_token_num or "
            f"keep_ratio (to {least / tokens:.3f} or more), or let tokens leave earlier by prune_layers"
        )
    low, high = 0.0, 1.0  # the share that keeps as many as the mean allows lies between
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) <= mean * depth else (low, middle)
    return tuple(kept(low))
