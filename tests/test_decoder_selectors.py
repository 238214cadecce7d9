"""Methods in the language model against what their authors' code kept on recorded inputs, index for index.

Each recorded layer is computed here by hand: attention from recorded hidden states and weights, or the recorded row.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from vispruner.decoder_attention import (
    DecoderReading,
    find_raters,
    last_row,
    level_rater_rows,
    rater_rows,
    visual_rows,
)
from vispruner.decoder_selectors import (
    _clusters_of,
    least_similar_to_pivots,
    select_dart,
    select_fastv,
    select_pyramiddrop,
    select_sparsevlm,
    select_sparsevlm_v1,
    select_visiondrop,
)
from vispruner.selectors import DECODER_METHODS, SELECTORS, Selection, run_selector

FILE = Path(__file__).parent / "data" / "decoder_selectors.safetensors"
with safe_open(FILE, "pt") as recorded:
    CASES = {name: json.loads(text) for name, text in recorded.metadata().items()}


def cases(method: str) -> Any:
    return pytest.mark.parametrize("name", sorted(name for name in CASES if name.split(".")[0] == method))


def tensors(name: str) -> dict[str, torch.Tensor]:
    with safe_open(FILE, "pt") as file:
        return {key[len(name) + 1 :]: file.get_tensor(key) for key in file.keys() if key.startswith(f"{name}.")}  # noqa: SIM118


def rotary(positions: torch.Tensor, width: int, theta: float = 1e4) -> tuple[torch.Tensor, torch.Tensor]:
    angles = positions[..., None].float() / theta ** (torch.arange(0, width, 2).float() / width)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


@cases("fastv")
def test_fastv(name: str) -> None:
    case, given = CASES[name], tensors(name)
    start, tokens = case["image_start"], case["tokens"]
    saliency = given["last_row"].mean(0)[None, start : start + tokens]
    budget = round(tokens * (1 - case["drop_ratio"]))
    assert torch.equal(select_fastv(torch.zeros(1, tokens, 1), saliency, budget)[0], given["kept"])


@cases("dart")
def test_dart_in_the_recorded_order_of_pivots(name: str) -> None:
    case, given = CASES[name], tensors(name)
    start, tokens = case["image_start"], case["tokens"]
    image, order = slice(start, start + tokens), given["pivot_order"]
    pivots = order[(order >= start) & (order < start + tokens)] - start
    usable = torch.ones(1, len(order), dtype=torch.bool)
    features, kept = given["normed"], given["kept"]
    found = least_similar_to_pivots(features[None, image], pivots[None], features[None, order], usable, len(kept))[0]
    assert torch.equal(found, kept)
    norms = given["keys"].abs().sum((0, 2))
    words = norms.clone()
    words[: start + tokens] = -math.inf
    own = select_dart(
        features[None, image], norms[None, image], len(kept), features[None], words[None],
        case["pivot_image"], case["pivot_text"],
    )[0]  # fmt: skip
    assert set(pivots.tolist()) <= set(own.tolist()) and len(own) == len(kept)
    assert len(set(own.tolist()) & set(kept.tolist())) >= 0.8 * len(kept)  # the order of pivots is another


def stage_reading(
    hidden: torch.Tensor, weights: dict[str, torch.Tensor], stage: int, visual: torch.Tensor, raters: torch.Tensor
) -> DecoderReading:
    query, key = (torch.einsum("bsc,hcd->bhsd", hidden, weights[f"{w}_weights"][stage]) for w in ("query", "key"))
    width = hidden.shape[1]
    cos_sin = rotary(torch.arange(width)[None], query.shape[-1])
    seen = torch.ones(1, width, dtype=torch.bool)
    return DecoderReading(
        query, key, query.shape[-1] ** -0.5, seen, torch.tensor([width - 1]), visual, raters, cos_sin
    )


@pytest.mark.parametrize("name", sorted(name for name in CASES if name.startswith("sparsevlm")))
def test_sparsevlm_through_its_stages(name: str) -> None:
    case, given = CASES[name], tensors(name)
    first, hidden, clusters = case["image_start"], given["hidden"][None], name.startswith("sparsevlm_v1")
    positions = torch.arange(hidden.shape[1])
    tokens, text = case["tokens"], hidden.shape[1] - first - case["tokens"]
    for stage, budget in enumerate(case["table"]):
        visual = torch.zeros(hidden.shape[:2], dtype=torch.bool)
        visual[:, first : first + tokens] = True
        if stage == 0:
            found = find_raters(hidden, visual, torch.ones_like(visual))[0, first + tokens :]
            assert torch.equal(found.nonzero()[:, 0], given["raters"])
        raters = torch.cat([torch.zeros(hidden.shape[1] - text, dtype=torch.bool), found])[None]
        reading = stage_reading(hidden, given, stage, visual, raters)
        if not clusters:  # the gravity is that of the positions they have
            reading = DecoderReading(**{**vars(reading), "rotary": rotary(positions[None], reading.query.shape[-1])})
        saliency = (rater_rows if clusters else level_rater_rows)(reading)[visual][None]
        features, kept = hidden[visual][None], min(budget, tokens - 1)
        select = select_sparsevlm_v1 if clusters else select_sparsevlm
        made = select(features, saliency, kept + (_clusters_of(tokens - kept)[1] if clusters else 0))
        selection = made if isinstance(made, Selection) else Selection(made)
        assert torch.equal(selection.indices[0, :kept], given[f"kept{stage}"])
        hidden = torch.cat([hidden[:, :first], selection.take(features), hidden[:, first + tokens :]], dim=1)
        torch.testing.assert_close(hidden[0], given[f"after{stage}"], rtol=1e-5, atol=1e-5)
        tokens, positions = selection.indices.shape[1], given[f"positions{stage}"]


def test_a_tie_of_densities_goes_to_the_more_attended_token() -> None:
    features = torch.tensor([0.0, 1, 5, 6]).repeat(12)[None, :, None]  # each has a twin: all are as dense as another
    saliency = torch.linspace(1, 0, 48)[None]
    for _ in range(2):
        first, again = (select_sparsevlm_v1(features, saliency, 8) for _ in range(2))
        assert torch.equal(first.indices, again.indices) and first.indices.shape == (1, 8)


def layer_reading(case: dict[str, Any], given: dict[str, torch.Tensor]) -> DecoderReading:
    hidden, heads, width = given["hidden"], case["heads"], case["head_dim"]
    rows, columns, _ = hidden.shape
    normed = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + case["rms_eps"]) * given["norm_weight"]
    cos, sin = rotary(torch.arange(columns), width, case["rope_theta"])
    states = []
    for which in ("query", "key"):
        made = (normed @ given[f"{which}_weight"].T).view(rows, columns, heads, width).transpose(1, 2)
        turned = torch.cat([-made[..., width // 2 :], made[..., : width // 2]], dim=-1)
        states.append(made * cos + turned * sin)
    visual = torch.zeros(rows, columns, dtype=torch.bool)
    for row, (start, tokens) in enumerate(zip(case["image_start"], case["tokens_now"], strict=True)):
        visual[row, start : start + tokens] = True
    last = torch.tensor([n + t - 1 for n, t in zip(case["text_tokens"], case["tokens_now"], strict=True)])
    return DecoderReading(*states, width**-0.5, given["attention_mask"].bool(), last, visual)


@cases("pyramiddrop")
def test_pyramiddrop(name: str) -> None:
    case, given = CASES[name], tensors(name)
    reading = layer_reading(case, given)
    saliency = last_row(reading)
    for row, visual in enumerate(reading.visual):
        if visual.any():
            columns = visual.nonzero()[:, 0]
            budget = int(case["tokens_at_start"][row] * case["ratios"][case["stage"] + 1])
            kept = select_pyramiddrop(
                given["hidden"][row : row + 1, columns], saliency[row : row + 1, columns], budget
            )
            source = given["source"][row]
            assert columns[kept[0]].tolist() == [c for c in source.tolist() if columns[0] <= c <= columns[-1]]


@cases("visiondrop")
def test_visiondrop(name: str) -> None:
    case, given = CASES[name], tensors(name)
    reading = layer_reading(case, given)
    saliency, (dominant, contextual) = visual_rows(reading), case["ratios"][case["stage"] + 1]
    for row, visual in enumerate(reading.visual):
        columns, budget = visual.nonzero()[:, 0], dominant + contextual
        features, keys = given["hidden"][row : row + 1, columns], reading.key[row : row + 1, :, columns].mean(1)
        made = select_visiondrop(features, saliency[row : row + 1, columns], budget, keys, contextual / budget)
        assert torch.equal(made.indices[0, :dominant], given["dominant"][row])
        expected = given["after"][row, columns[0] : columns[0] + budget]
        torch.testing.assert_close(made.take(features)[0], expected, rtol=1e-5, atol=1e-5)


def test_the_mean_over_rows_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(name for name in sorted(CASES) if name.startswith("visiondrop"))
    reading = layer_reading(CASES[case], tensors(case))
    whole = visual_rows(reading)
    monkeypatch.setattr("vispruner.decoder_attention.entries_at_once", lambda device: 1)
    torch.testing.assert_close(visual_rows(reading), whole)


@pytest.mark.parametrize("method", DECODER_METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_every_method_returns(method: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    images, tokens = 3, 40
    features = torch.randn(images, tokens, 16, generator=generator).to(dtype)
    saliency = torch.rand(images, tokens, generator=generator)
    text = torch.randn(images, 9, 16, generator=generator).to(dtype)
    further = {
        "keys": torch.randn(images, tokens, 8, generator=generator).to(dtype),
        "text": text,
        "text_saliency": torch.rand(images, 9, generator=generator),
    }
    needs = SELECTORS[method].needs
    for budget in (1, 2, 7, 39, 40, 50):
        given = {name: value for name, value in further.items() if name in needs}
        made = run_selector(method, features, saliency, budget, **given)
        count = min(budget, tokens)
        assert made.indices.shape == (images, count)
        assert all(len(set(row)) == count for row in made.indices.tolist())
        first = made.indices[:, : count - made.appended]
        assert bool((first.diff(dim=1) > 0).all())
        taken = made.take(features)
        assert taken.dtype == dtype and taken.shape == (images, count, 16) and bool(taken.isfinite().all())
        alone = [
            run_selector(method, features[i : i + 1], saliency[i : i + 1], budget,
                         **{name: value[i : i + 1] for name, value in given.items()}).indices
            for i in range(images)
        ]  # fmt: skip
        assert torch.equal(made.indices, torch.cat(alone))


def test_tokens_that_nothing_is_folded_into_are_the_same_bits() -> None:
    case = next(name for name in sorted(CASES) if name.startswith("visiondrop"))
    reading = layer_reading(CASES[case], tensors(case))
    columns = reading.visual[0].nonzero()[:, 0]
    features = (torch.randn(1, len(columns), 8) * 1e3).to(torch.bfloat16)
    made = select_visiondrop(features, visual_rows(reading)[:1, columns], 12, reading.key[:1, :, columns].mean(1))
    single = 12 - made.appended
    expected = features.gather(1, made.indices[:, :single, None].expand(-1, -1, 8))
    assert torch.equal(made.take(features)[:, :single], expected)
