"""Which tests the quick set, `-m "not slow"`, leaves out although each takes seconds: the one place that decides it.

A few architectures stand there for all, and a few sets of parameters for a test that is asked with many; what they
stand for is marked `core`, as is by hand what takes about a second. All that is `core` is `slow` too. It runs with
`pytest` alone, and with `-m "core or not slow"`, the core tests, which leave out only what is slow by itself.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest
from matrix import EVERY

# Patches behind a [CLS]; tiles of such; one sequence of merged patches, whose tokens have three positions each.
QUICK_ROWS = {"llava", "llava_next", "qwen2_5_vl"}
STAND_FOR_MANY = 6  # sets of parameters, spread over all of a test's
COLLECTED = pytest.StashKey[list[pytest.Item]]()


def architectures_of(item: pytest.Item) -> set[str]:
    """Return the rows of tests/rows that a test's parameters name."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return {name for value in values if isinstance(name := getattr(value, "model_type", value), str) and name in EVERY}


def is_marked(item: pytest.Item, name: str) -> bool:
    return item.get_closest_marker(name) is not None


def stand_for(count: int) -> set[int]:
    """Return which of a test's sets of parameters stand for all: one of each sixth, each time further into it.

    Evenly spaced ones would all have the same value of a parameter whose number of values divides the space.
    """
    starts = [count * number // STAND_FOR_MANY for number in range(STAND_FOR_MANY + 1)]
    sixths = enumerate(pairwise(starts))
    return {start + number * (number - 1) // 2 % max(1, end - start) for number, (start, end) in sixths}


def keep_it_quick(items: list[pytest.Item]) -> None:
    """Mark what others stand for; a test marked `each` is in the quick set for every architecture."""
    many = defaultdict(list)
    for item in items:
        if any(is_marked(item, name) for name in ("slow", "each", "core")):
            continue
        if (rows := architectures_of(item)) and not rows & QUICK_ROWS:
            item.add_marker("core")
        else:
            many[item.nodeid.partition("[")[0]].append(item)
    for asked in many.values():
        chosen = stand_for(len(asked))
        for number, item in enumerate(asked):
            if number not in chosen:
                item.add_marker("core")
    for item in items:
        if is_marked(item, "core"):
            item.add_marker("slow")
