"""Which tests the quick set, `-m "not slow"`, leaves out although each takes seconds: the one place that decides it.

A few architectures stand there for all; what others stand for is marked `core`, as is by hand what takes some seconds.
All that is `core` is `slow` too. It runs with `pytest` alone, and with `-m "core or not slow"`, the core tests, which
leave out only what is slow by itself.
"""

from __future__ import annotations

import pytest
from matrix import EVERY

# Patches behind a [CLS]; tiles of such; one sequence of merged patches, whose tokens have three positions each.
QUICK_ROWS = {"llava", "llava_next", "qwen2_5_vl"}
COLLECTED = pytest.StashKey[list[pytest.Item]]()


def architectures_of(item: pytest.Item) -> set[str]:
    """Return the rows of tests/rows that a test's parameters name."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return {name for value in values if isinstance(name := getattr(value, "model_type", value), str) and name in EVERY}


def is_marked(item: pytest.Item, name: str) -> bool:
    return item.get_closest_marker(name) is not None


def keep_it_quick(items: list[pytest.Item]) -> None:
    """Mark what others stand for; a test marked `each` is in the quick set for every architecture."""
    for item in items:
        rows = architectures_of(item)
        if rows and not rows & QUICK_ROWS and not any(is_marked(item, name) for name in ("slow", "each", "core")):
            item.add_marker("core")
        if is_marked(item, "core"):
            item.add_marker("slow")
