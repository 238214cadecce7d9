"""The quick set has a part of every file and of every architecture, and CI loses nothing of what it leaves out."""

from __future__ import annotations

import re
import subprocess
from itertools import product
from pathlib import Path

import pytest
from matrix import ROWS
from quick_set import COLLECTED, STAND_FOR_MANY, architectures_of, is_marked, keep_it_quick, stand_for

ROOT = Path(__file__).parent.parent
# Files of which nothing is in the quick set, and why.
NOTHING_QUICK = {
    "test_end_to_end.py": "from a checkpoint of the authors to a published repo, in processes",
    "test_fuzz.py": "drawn inputs for as long as it is given",
    "test_lmms_eval.py": "runs a harness",
    "test_published_repo.py": "whole repos, in processes",
    "test_vllm.py": "serves",
    "test_vllm_architectures.py": "serves",
    "test_vllm_refusals.py": "serves",
}


@pytest.fixture
def collected(request: pytest.FixtureRequest) -> list[pytest.Item]:
    """All tests, those too that `-m` leaves out."""
    if {Path(name).resolve() for name in request.config.args} - {ROOT, ROOT / "tests"}:
        pytest.skip("asked of a part of the tests")
    return request.config.stash[COLLECTED]


def is_quick(item: pytest.Item) -> bool:
    return not is_marked(item, "slow")


def test_every_file_has_a_part_in_it(collected: list[pytest.Item]) -> None:
    files, quick = ({item.path.name for item in items} for items in (collected, filter(is_quick, collected)))
    assert files - quick == files & set(NOTHING_QUICK)


@pytest.mark.parametrize("name", ROWS)
def test_every_architecture_has_a_part_in_it(name: str, collected: list[pytest.Item]) -> None:
    tests = [item for item in collected if name in architectures_of(item)]
    assert any(map(is_quick, tests)) and not all(map(is_quick, tests))


def test_what_it_leaves_out_is_slow(collected: list[pytest.Item]) -> None:
    assert all(is_marked(item, "slow") for item in collected if is_marked(item, "core"))


@pytest.mark.parametrize("place", [".ci/run", ".ci/versions", ".github/workflows/weekly.yml"])
def test_other_versions_meet_every_architecture(place: str) -> None:
    assert 'pytest -m "core or not slow"' in (ROOT / place).read_text()


def test_what_the_oldest_transformers_is_not_asked_is_there() -> None:
    command = re.search(r"^without=.*?\)$", (ROOT / ".ci/run").read_text(), re.MULTILINE | re.DOTALL)
    shown = subprocess.run(["bash", "-c", f"{command[0]}; echo $without"], capture_output=True, text=True, check=True)
    files = [option.removeprefix("--ignore=") for option in shown.stdout.split()]
    assert len(files) > 20 and [file for file in files if not (ROOT / file).exists()] == []


class Item:
    """A test with one parameter."""

    def __init__(self, value: object, *markers: str) -> None:
        self.nodeid = f"tests/test_any.py::test_any[{value}]"
        self.callspec = type("CallSpec", (), {"params": {"model": value}})
        self.markers = list(markers)

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.markers else None

    def add_marker(self, name: str) -> None:
        self.markers.append(name)


@pytest.mark.parametrize(
    ("item", "markers"),
    [
        (Item("gemma3"), ["core", "slow"]),
        (Item(ROWS["gemma3"]), ["core", "slow"]),
        (Item("llava_next-paper"), ["core", "slow"]),
        (Item("llava"), []),
        (Item(ROWS["qwen2_5_vl"]), []),
        (Item("visionzip"), []),
        (Item(3), []),
        (Item("gemma3", "each"), ["each"]),
        (Item("gemma3", "slow"), ["slow"]),
        (Item("llava", "core"), ["core", "slow"]),
    ],
)
def test_the_rule(item: Item, markers: list[str]) -> None:
    keep_it_quick([item])  # type: ignore[list-item]
    assert item.markers == markers


def test_six_sets_of_parameters_stand_for_a_hundred() -> None:
    items = [Item(number) for number in range(100)] + [Item("gemma3", "each")]
    keep_it_quick(items)  # type: ignore[arg-type]
    assert [number for number, item in enumerate(items) if "slow" not in item.markers] == [0, 16, 34, 53, 72, 93, 100]


def test_they_have_several_values_of_each_of_two_parameters() -> None:
    for others, fastest in product(range(2, 31), range(2, 13)):
        chosen = stand_for(others * fastest)
        assert len(chosen) == min(STAND_FOR_MANY, others * fastest)
        assert min(len({number % fastest for number in chosen}), len({number // fastest for number in chosen})) > 1


@pytest.mark.parametrize("count", range(1, STAND_FOR_MANY + 1))
def test_few_sets_of_parameters_are_all_quick(count: int) -> None:
    assert stand_for(count) == set(range(count))
