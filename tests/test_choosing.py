"""Choices are made in one place, and seen there by whoever looks on, in the encoder and in the language model."""

from __future__ import annotations

import ast
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import ROWS, pair
from rows import Image

from vispruner.choosing import Choice, choose, watch_choices
from vispruner.configuration_vispruner import VisPrunerOptions
from vispruner.selector_registry import Merge, Selection, in_a_row
from vispruner.visual_features import VisualTokens

ROOT = Path(__file__).parent.parent
OPTIONS = VisPrunerOptions(visual_token_num=3)


def tokens(images: int = 2, count: int = 9) -> VisualTokens:
    generator = torch.Generator().manual_seed(images * count)
    return VisualTokens(
        torch.randn(images, count, 8, generator=generator), torch.rand(images, count, generator=generator)
    )


def test_a_choice_is_seen_before_and_after_it_is_made_and_not_outside_the_block() -> None:
    seen: list[Choice] = []
    given = tokens()
    with watch_choices(after=seen.append, before=seen.append):
        selection = choose(OPTIONS, given, 3)
    choose(OPTIONS, given, 3)
    assert [choice.selection is None for choice in seen] == [True, False]
    assert all(choice.tokens is given and choice.layer is None for choice in seen)
    assert seen[1].selection is selection


def test_watchers_nest_and_an_error_ends_them() -> None:
    outer: list[Choice] = []
    inner: list[Choice] = []
    with watch_choices(outer.append):
        with pytest.raises(ValueError, match="saliency"), watch_choices(inner.append):
            choose(OPTIONS, tokens(), 3)
            choose(OPTIONS, VisualTokens(torch.zeros(1, 9, 8), torch.zeros(9)), 3)
        choose(OPTIONS, tokens(), 3)
    assert (len(outer), len(inner)) == (2, 1)


def test_another_thread_is_not_watched() -> None:
    seen: list[Choice] = []
    with watch_choices(seen.append):
        thread = threading.Thread(target=choose, args=(OPTIONS, tokens(), 3))
        thread.start()
        thread.join()
    assert seen == []


def test_choices_of_both_places_are_seen_and_say_which_they_are() -> None:
    row = ROWS["llava"]
    stages = {"method": "vispruner+fastv", "visual_token_num": None, "stage_token_nums": [9, 4], "prune_layers": [1]}
    _, pruned = pair(row, **stages)
    seen: list[Choice] = []
    inputs: dict[str, Any] = row.inputs([[[11, 12], Image((56, 84), seed=1), [14, 15]]])
    with pruned.model.watch_choices(seen.append), torch.no_grad():
        pruned(**inputs)
    assert [(choice.layer, choice.selection.indices.shape[1]) for choice in seen] == [(None, 9), (1, 4)]
    assert seen[1].tokens.features.shape[1] == 9


def test_selections_in_a_row_take_what_each_takes_by_itself() -> None:
    given = [tokens(1, count).features for count in (9, 5, 7)]
    places = [torch.tensor([[1, 4]]), torch.tensor([[0, 2, 3]]), torch.tensor([[6]])]
    half = torch.full((1, 3), 0.5)
    merge = Merge(torch.tensor([[1, 4, 4]]), torch.tensor([[0, 2, 1]]), half, half)
    of_each = [Selection(places[0]), Selection(places[1], merge), Selection(places[2])]
    joined = in_a_row(of_each, [9, 5, 7])
    expected = [one.take(part) for one, part in zip(of_each, given, strict=True)]
    assert torch.equal(joined.take(torch.cat(given, dim=1)), torch.cat(expected, dim=1))
    assert not torch.equal(expected[1], given[1][:, [0, 2, 3]])
    plain = in_a_row([Selection(index) for index in places], [9, 5, 7])
    assert plain.merge is None and plain.indices.tolist() == [[1, 4, 9, 11, 12, 20]]


@pytest.mark.core
def test_no_other_file_runs_a_method_or_gathers_tokens() -> None:
    """`run_selector` is called in choosing.py alone, and nobody assigns to `select` or `choose` to look on."""
    callers, assigned = set(), []
    folders = ("modeling", "conversion", "serving", "benchmarks")
    for path in (path for folder in folders for path in (ROOT / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "run_selector":
                callers.add(path.name)
            if isinstance(node, ast.Assign):
                targets = [target.attr for target in node.targets if isinstance(target, ast.Attribute)]
                assigned += [f"{path.name}: {name}" for name in targets if name in ("select", "choose")]
            if isinstance(node, ast.ImportFrom) and "rows_at" in [alias.name for alias in node.names]:
                is_family = path.name.startswith("decoder_") or path.name.endswith("_selectors.py")
                assert is_family, f"{path.name} gathers beside Selection.take"
    assert callers == {"choosing.py"}
    assert assigned == []
