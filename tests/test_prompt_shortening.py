"""The integer work of pruning, column by column: whole prompts of every form against lists and loops."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from vispruner.prompt_shortening import (
    IGNORED,
    CachedPrompt,
    KeptColumns,
    any_of,
    every_column,
    holds_unbroken_images,
    joined_counts,
    keep_columns,
    last_placeholders,
    read_layout,
    rows_of_images,
)

IMAGE, VIDEO, TEXT, PAD = 7, 8, 1, 0
CPU = torch.device("cpu")


@dataclass
class Prompt:
    """rows of ids, the padding around them, and per id and image how many placeholders there are and which stay."""

    rows: list[list[int]]
    mask: list[list[int]] | None
    counts: dict[int, list[int]]
    kept: dict[int, list[list[int]]]
    left: bool

    @property
    def flags(self) -> dict[int, torch.Tensor]:
        return {token: torch.tensor(self.rows) == token for token in (IMAGE, VIDEO)}

    @property
    def attention_mask(self) -> torch.Tensor | None:
        return None if self.mask is None else torch.tensor(self.mask)

    def shortened(self) -> KeptColumns:
        kept = {token: [torch.tensor(k, dtype=torch.long) for k in images] for token, images in self.kept.items()}
        mask = self.attention_mask
        return keep_columns(self.flags, self.counts, kept, mask, read_layout(self.flags, mask))

    def copies(self) -> list[list[int]]:
        """Return how often each column stays."""
        seen, made = {IMAGE: 0, VIDEO: 0}, []
        stays = {
            token: [k.count(place) for full, k in zip(self.counts[token], self.kept[token], strict=True)
                    for place in range(full)]
            for token in self.counts
        }  # fmt: skip
        for row in self.rows:
            made.append([])
            for token in row:
                made[-1].append(stays[token][seen[token]] if token in stays else 1)
                seen[token] = seen.get(token, 0) + 1
        return made


def draw(seed: int, most_rows: int = 3, side: str | None = None, repeats: bool = True) -> Prompt:
    """Draw rows with up to two images each, of up to four placeholders, padding on the `side` or none."""
    rng = random.Random(seed)
    rows: list[list[int]] = []
    counts: dict[int, list[int]] = {IMAGE: [], VIDEO: []}
    kept: dict[int, list[list[int]]] = {IMAGE: [], VIDEO: []}
    for _ in range(rng.randint(1, most_rows)):
        row = [TEXT]
        for _ in range(rng.randint(0, 2)):
            token, full = rng.choice([IMAGE, VIDEO]), rng.randint(1, 4)
            stay = sorted(rng.sample(range(full), rng.randint(1, full)))
            counts[token].append(full)
            kept[token].append(sorted(stay + stay[:1] * (repeats and rng.random() < 0.2)))
            row += [token] * full + [TEXT] * rng.randint(1, 2)
        rows.append(row)
    side = rng.choice(["left", "right", "none"]) if side is None else side
    width = max(map(len, rows)) + (side != "none" and rng.random() < 0.3)
    if side == "none":
        rows = [row + [TEXT] * (width - len(row)) for row in rows]
        return Prompt(rows, None, counts, kept, True)
    pads = [[0] * (width - len(row)) for row in rows]
    masks = [
        [*pad, *[1] * len(row)] if side == "left" else [*[1] * len(row), *pad]
        for row, pad in zip(rows, pads, strict=True)
    ]
    rows = [[*pad, *row] if side == "left" else [*row, *pad] for row, pad in zip(rows, pads, strict=True)]
    return Prompt(rows, masks, counts, kept, side == "left" or all(mask[-1] for mask in masks))


PROMPTS = [draw(seed, side=side) for side in ("left", "right", "none") for seed in range(25)]


def expected(prompt: Prompt) -> tuple[list[list[int]], list[list[bool]], list[list[int]], list[list[int]]]:
    """Return index, valid, shift and grown of `KeptColumns`."""
    copies = prompt.copies()
    grown = [[sum(row[: c + 1]) - c - 1 for c in range(len(row))] for row in copies]
    changes = {row[-1] for row in grown}
    if len(changes) > 1 and prompt.mask is not None:
        copies = [
            [c * m for c, m in zip(row, mask, strict=True)] for row, mask in zip(copies, prompt.mask, strict=True)
        ]
    columns = [[c for c, count in enumerate(row) for _ in range(count)] for row in copies]
    width = max(map(len, columns))
    index, valid, shift = [], [], []
    for row, ids in zip(columns, prompt.rows, strict=True):
        more, edge = width - len(row), (0 if prompt.left else len(ids) - 1)
        is_any = [token in (IMAGE, VIDEO) for token in ids]
        counted = [sum(is_any[c] for c in row[: w + 1]) - sum(is_any[: c + 1]) for w, c in enumerate(row)]
        parts = [([edge] * more, row), ([False] * more, [True] * len(row)), ([0] * more, counted)]
        for made, (padding, rest) in zip((index, valid, shift), parts, strict=True):
            made.append([*padding, *rest] if prompt.left else [*rest, *padding])  # type: ignore[arg-type]
    return index, valid, shift, grown


@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_the_columns_are_those_that_lists_give(number: int) -> None:
    columns = PROMPTS[number].shortened()
    index, valid, shift, grown = expected(PROMPTS[number])
    assert columns.index.tolist() == index
    assert (columns.valid is None) == all(map(all, valid))
    assert columns.valid is None or columns.valid.tolist() == valid
    assert columns.shift.tolist() == shift and columns.grown.tolist() == grown
    assert (columns.length, columns.full_length) == (len(index[0]), len(grown[0]))
    assert columns.dropped == len(grown[0]) - len(index[0])


def test_the_drawn_prompts_have_all_that_is_to_be_tried() -> None:
    made = [prompt.shortened() for prompt in PROMPTS]
    assert {columns.valid is None for columns in made} == {True, False}
    assert any(columns.dropped < 0 for columns in made) and any(columns.dropped > 2 for columns in made)
    assert {prompt.left for prompt in PROMPTS} == {True, False}
    assert any(max(map(max, prompt.copies())) > 1 for prompt in PROMPTS)


@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_tensors_are_taken_and_spread_as_loops_do(number: int) -> None:
    columns = PROMPTS[number].shortened()
    index, valid, _, _ = expected(PROMPTS[number])
    batch, full = len(index), columns.full_length
    ids = torch.arange(1, batch * full + 1).view(batch, full)
    short = [[ids[b, c].item() if ok else -5 for c, ok in zip(index[b], valid[b], strict=True)] for b in range(batch)]
    assert columns.take(ids, -5).tolist() == short
    assert columns.take(ids.expand(3, -1, -1), -5).tolist() == [short] * 3
    embeds = torch.stack([ids, -ids], dim=-1)
    assert torch.equal(columns.take_embedded(embeds)[..., 1], -ids.gather(1, columns.index))
    mask = columns.mask(torch.ones_like(ids))
    assert mask is not None and mask.tolist() == [[int(ok) for ok in row] for row in valid]
    none = columns.mask(None)
    assert none is None if columns.valid is None else none is not None and none.tolist() == mask.tolist()
    # Back again: the last copy counts, and padding that was added goes where the full prompt has its own.
    source = sources(columns, index, valid)
    value = torch.arange(1, batch * columns.length + 1).view(batch, -1)
    back = [[0 if w < 0 else value[b, w].item() for w in row] for b, row in enumerate(source)]
    assert columns.spread(value).tolist() == back
    wide = value[:, None, :, None].expand(-1, 2, -1, 3)
    assert columns.spread(wide, dim=2)[:, 1, :, 2].tolist() == back
    targets = ids * 10
    wanted = [[IGNORED] * full for _ in range(batch)]
    for b, row in enumerate(source):
        for c, w in enumerate(row):
            if w >= 0:
                is_last = w + 1 == columns.length or not valid[b][w + 1]
                wanted[b][c] = targets[b, max(0, (full if is_last else index[b][w + 1]) - 1)].item()
    assert columns.targets(targets).tolist() == wanted


def sources(columns: KeptColumns, index: list[list[int]], valid: list[list[bool]]) -> list[list[int]]:
    """Return the column of the short prompt that each of the full one became, -1 for none."""
    made = []
    for row, ok in zip(index, valid, strict=True):
        first, last = ok.index(True), len(ok) - 1 - ok[::-1].index(True)
        source = [-1] * columns.full_length
        for w, c in enumerate(row):
            edge = first if w < first else last
            place = c if ok[w] else w + row[edge] - edge
            if 0 <= place < columns.full_length:
                source[place] = max(source[place], w)
        made.append(source)
    return made


@pytest.mark.parametrize("seed", range(20))
def test_positions_are_counted_anew_in_each_packed_sample(seed: int) -> None:
    """The samples of a packed row start at 0 again; those of an unpacked one are the row."""
    prompt = draw(seed, most_rows=1, side="none")
    (ids,) = prompt.rows
    starts = [c for c, token in enumerate(ids) if token == TEXT and (c == 0 or random.Random(seed + c).random() < 0.5)]
    first = seed % 3  # positions need not begin at 0
    positions = torch.tensor([[first + c - max(s for s in starts if s <= c) for c in range(len(ids))]])
    columns = prompt.shortened()
    counted, anew = [], []
    for c in columns.index[0].tolist():
        sample = max(s for s in starts if s <= c)
        anew.append(first + counted.count(sample))
        counted.append(sample)
    if columns.length:
        assert columns.renumbered(positions).tolist() == [anew]


@pytest.mark.parametrize("seed", range(20))
def test_two_prompts_with_text_between_are_one(seed: int) -> None:
    first, then = draw(seed, most_rows=1, side="none"), draw(seed + 1000, most_rows=1, side="none")
    between = seed % 3
    whole = Prompt(
        [first.rows[0] + [TEXT] * between + then.rows[0]],
        None,
        {token: first.counts[token] + then.counts[token] for token in first.counts},
        {token: first.kept[token] + then.kept[token] for token in first.kept},
        True,
    )
    same(first.shortened().then(between, then.shortened()), whole.shortened())


def same(one: KeptColumns, other: KeptColumns) -> None:
    for name in ("index", "valid", "shift", "grown"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), name


@pytest.mark.parametrize("padded", ["first", "then", "both"])
def test_padding_of_two_prompts_stays_where_it_was(padded: str) -> None:
    plain = draw(0, most_rows=1, side="none").shortened()
    plain = KeptColumns(*(tensor.expand(2, -1) for tensor in (plain.index,)), None,
                        plain.shift.expand(2, -1), plain.grown.expand(2, -1))  # fmt: skip
    with_padding = next(c for p in PROMPTS if (c := p.shortened()).valid is not None and len(c.index) == 2)
    one, two = {
        "first": (with_padding, plain),
        "then": (plain, with_padding),
        "both": (with_padding, with_padding),
    }[padded]
    joined = one.then(2, two)
    ok = [torch.ones_like(c.index, dtype=torch.bool) if c.valid is None else c.valid for c in (one, two)]
    assert joined.valid is not None
    assert joined.valid.tolist() == torch.cat([ok[0], torch.ones(2, 2, dtype=torch.bool), ok[1]], 1).tolist()
    assert joined.index[:, one.length :].tolist() == (
        torch.cat([torch.arange(2).expand(2, -1) + one.full_length, two.index + one.full_length + 2], 1).tolist()
    )


@pytest.mark.parametrize("seed", range(30))
def test_shortening_what_was_shortened_is_shortening_at_once(seed: int) -> None:
    """First some placeholders leave, then some of those that stayed, as a cascade of stages does."""
    prompt = draw(seed, side=("none", "left", "right")[seed % 3], repeats=False)
    outer = prompt.shortened()
    rng = random.Random(seed)
    inner = {
        t: [sorted(rng.sample(range(len(k)), rng.randint(1, len(k)))) for k in prompt.kept[t]] for t in prompt.kept
    }
    once = Prompt(
        prompt.rows,
        prompt.mask,
        prompt.counts,
        {t: [[k[i] for i in some] for k, some in zip(prompt.kept[t], inner[t], strict=True)] for t in prompt.kept},
        prompt.left,
    )
    rows = outer.take(torch.tensor(prompt.rows), PAD).tolist()
    mask = outer.mask(prompt.attention_mask)
    counts = {token: [len(k) for k in prompt.kept[token]] for token in prompt.kept}
    again = Prompt(rows, None if mask is None else mask.tolist(), counts, inner, prompt.left).shortened()
    both, at_once = outer.of(again), once.shortened()
    stays = {
        name: [
            [c for w, c in enumerate(row) if made.valid is None or made.valid[b, w]]
            for b, row in enumerate(made.index.tolist())
        ]
        for name, made in (("both", both), ("at once", at_once))
    }
    text = [[c for c in row if prompt.rows[b][c] != PAD] for b, row in enumerate(stays["both"])]
    assert text == [[c for c in row if prompt.rows[b][c] != PAD] for b, row in enumerate(stays["at once"])]
    if not any(PAD in row for row in prompt.rows) and both.valid is None and at_once.valid is None:
        same(both, at_once)


def test_a_column_that_only_stands_in_for_padding_does_not_stay() -> None:
    index, valid = torch.tensor([[0, 0, 2], [0, 1, 2]]), torch.tensor([[False, True, True], [True, True, True]])
    zeros = torch.zeros(2, 3, dtype=torch.long)
    outer = KeptColumns(index, valid, zeros, torch.tensor([[0, -1, -1], [0, 0, 0]]))
    inner = KeptColumns(torch.tensor([[0, 2], [1, 2]]), None, zeros[:, :2], torch.tensor([[0, -1, -1], [-1, -1, -1]]))
    both = outer.of(inner)
    assert both.valid is not None and both.valid.tolist() == [[False, True], [True, True]]
    assert both.index.tolist() == [[0, 2], [1, 2]]
    assert both.grown.tolist() == [[-1, -2, -2], [-1, -1, -1]]


# What is read of a prompt


def test_the_layout_of_a_prompt_is_what_its_rows_hold() -> None:
    for prompt in PROMPTS:
        layout = read_layout(prompt.flags, prompt.attention_mask)
        assert layout.placeholders == {t: [row.count(t) for row in prompt.rows] for t in (IMAGE, VIDEO)}
        assert layout.seen == [sum(row) for row in prompt.mask or [[1] * len(row) for row in prompt.rows]]
        assert layout.outside == [0] * len(prompt.rows)
        assert layout.padded_left == prompt.left


def test_placeholders_in_the_outer_padding_are_counted_and_refused_where_rows_are_padded_anew() -> None:
    flags = {IMAGE: torch.tensor([[0, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0]]).bool()}
    mask = torch.tensor([[0, 0, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1]])
    layout = read_layout(flags, mask)
    assert (layout.outside, layout.seen, layout.padded_left) == ([2, 0], [3, 6], False)
    kept = {IMAGE: [torch.tensor([0])]}
    with pytest.raises(ValueError, match="must not lie in the padding of attention_mask"):
        keep_columns(flags, {IMAGE: [4]}, kept, mask, layout)
    assert keep_columns(flags, {IMAGE: [4]}, kept, None, read_layout(flags)).valid is not None


def test_images_are_given_to_rows_in_reading_order() -> None:
    assert rows_of_images([3, 0, 4], [1, 2, 4]) == [0, 0, 2]
    assert rows_of_images([0, 2], [2]) == [1]
    assert rows_of_images([2], []) == []
    with pytest.raises(ValueError, match="the placeholders of image 1 are spread over two rows"):
        rows_of_images([3, 2], [2, 3])


def test_an_image_is_unbroken_where_nothing_stands_between_its_placeholders() -> None:
    flags = torch.tensor([[0, 1, 1, 0, 1], [0, 1, 0, 0, 0]]).bool()
    assert holds_unbroken_images(flags, [2, 1, 1])
    assert not holds_unbroken_images(flags, [3, 1])
    assert not holds_unbroken_images(flags, [1, 2, 1])


def test_the_last_placeholders_stay_and_the_first_repeats() -> None:
    stays = last_placeholders({IMAGE: [4, 2], VIDEO: [3]}, {IMAGE: [2, 3], VIDEO: [3]}, CPU)
    assert {token: [k.tolist() for k in images] for token, images in stays.items()} == {
        IMAGE: [[2, 3], [0, 0, 1]],
        VIDEO: [[0, 1, 2]],
    }


def test_small_parts() -> None:
    assert any_of([torch.tensor([True, False, False]), torch.tensor([False, False, True])]).tolist() == [
        True,
        False,
        True,
    ]
    columns = every_column(2, 3, CPU)
    assert columns.index.tolist() == [[0, 1, 2]] * 2 and columns.valid is None
    assert columns.shift.tolist() == columns.grown.tolist() == [[0] * 3] * 2
    assert joined_counts({IMAGE: [1], VIDEO: []}, {IMAGE: [2], VIDEO: [3]}) == {IMAGE: [1, 2], VIDEO: [3]}


def test_a_cached_prompt_knows_in_which_forms_it_may_come_again() -> None:
    columns = draw(3, side="left").shortened()
    cached = CachedPrompt({IMAGE: [4, 2]}, {IMAGE: [1, 1]}, "renumber", columns=columns)
    assert cached.dropped == columns.dropped and cached.uniform == (columns.valid is None)
    assert cached.may_have({IMAGE: [6]}) and cached.may_have({IMAGE: [1, 1]}) and not cached.may_have({IMAGE: [5]})
    bare = CachedPrompt({IMAGE: [4], VIDEO: [3]}, {IMAGE: [1], VIDEO: [2]}, "original")
    assert (bare.dropped, bare.uniform, bare.skipped) == (0, True, 0)
    assert not bare.may_have({IMAGE: [4], VIDEO: [4]})
    assert not CachedPrompt({}, {}, "renumber", columns=next(
        c for p in PROMPTS if (c := p.shortened()).valid is not None)).uniform  # fmt: skip


def test_padding_that_was_added_has_position_0() -> None:
    padded = [columns for prompt in PROMPTS if (columns := prompt.shortened()).valid is not None]
    for columns in padded:
        positions = columns.renumbered(torch.arange(5, 5 + columns.full_length).expand(len(columns.index), -1))
        assert columns.valid is not None and set(positions[~columns.valid].tolist()) == {0}
