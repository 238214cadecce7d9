"""Methods in the language model against what their authors' code kept on recorded inputs, index for index.

Each recorded layer is computed here by hand: attention from recorded hidden states and weights, or the recorded row.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import write_yaml
from decoder_vectors import CASES, cases, tensors
from documents import python_block, run_python_block
from PIL import Image
from transformers import AutoConfig, LlavaForConditionalGeneration

import vispruner
from vispruner.conversion.base_checkpoint import resolve_base
from vispruner.conversion.build import build_repo
from vispruner.conversion.questions import SCENE, load_processor
from vispruner.conversion.repo_config import RepoConfigError
from vispruner.decoder_attention import (
    DecoderReading,
    find_raters,
    last_row,
    level_rater_rows,
    rater_rows,
    visual_importance,
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


@cases("sgl")
def test_what_a_small_model_says_of_visual_tokens(name: str) -> None:
    case, given = CASES[name], tensors(name)
    start, width = case["image_start"], given["attention0"].shape[-1]
    steps = [[layer[None] for layer in given[f"attention{step}"]] for step in range(case["steps"] + 1)]
    is_visual = torch.zeros(1, width, dtype=torch.bool)
    is_visual[:, start : start + case["tokens"]] = True
    found = visual_importance(steps, is_visual)
    torch.testing.assert_close(found[0], given["importance"], rtol=1e-5, atol=1e-6)
    if case["steps"] == 0:
        assert torch.equal(visual_importance(steps[0], is_visual), found)
    budget = int(case["tokens"] * case["keep_ratio"])
    kept = run_selector("sgl", torch.zeros(1, case["tokens"], 1), found, budget).indices
    assert torch.equal(kept[0], given["kept"])


@pytest.fixture(scope="module")
def two_sizes() -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """The toy model, it again with half of its layers, and a prompt for both."""
    folder = resolve_base("embedded/tiny-llava")
    config = AutoConfig.from_pretrained(folder)
    config.text_config.num_hidden_layers = 2
    small = LlavaForConditionalGeneration.from_pretrained(folder, config=config, attn_implementation="eager").eval()
    model = vispruner.load(folder, method="vispruner", visual_token_num=72).eval()
    text = "<image>\nWhat color is the square?"
    picture = Image.open(SCENE).convert("RGB")
    return small, model, dict(load_processor(str(folder))(images=picture, text=text, return_tensors="pt"))


@pytest.mark.core
def test_sgl_runs_as_the_readme_says(two_sizes: tuple[Any, Any, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    small, model, inputs = two_sizes
    small.save_pretrained(tmp_path / "small")
    here = {"path/to/small-llava": str(tmp_path / "small")}
    given = {"model": model, "inputs": inputs, "vispruner": vispruner}
    given["LlavaForConditionalGeneration"] = LlavaForConditionalGeneration
    ran = run_python_block(python_block("visual_importance"), tmp_path, here, given)
    columns = (inputs["input_ids"][0] == small.config.image_token_id).nonzero()[:, 0]
    slow = torch.zeros(len(columns))
    for step, layers in enumerate(ran["first"].attentions):
        for heads in layers:
            rows = heads[0][:, columns[-1] :] if step == 0 else heads[0]
            slow += rows[..., columns].flatten(0, 1).sum(0)
    torch.testing.assert_close(ran["importance"][0], slow, rtol=1e-4, atol=1e-4)

    outputs = model(**inputs, visual_importance=ran["importance"], vispruner_config=ran["guided"])
    (stage,) = outputs.past_key_values.vispruner_stages
    (count,) = dict(model.last_pruning.stages)[1]
    assert stage.layer == 1 and count == 48  # of 4 layers; 144 in one and 48 in three are 72 on average
    kept = [place for place, column in enumerate(columns) if column in stage.columns[0]]
    assert kept == sorted(slow.argsort(descending=True)[:count].tolist())


def test_sgl_says_what_it_lacks(two_sizes: tuple[Any, Any, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    _, model, inputs = two_sizes
    guided = {"method": "sgl", "keep_ratio": 0.5}
    for importance, message in (
        (None, "pass visual_importance, which vispruner.visual_importance makes"),
        (torch.ones(1, 143), r"must be \(1, 144\), a number for each visual token"),
        (torch.full((1, 144), math.nan), "visual_importance holds NaN"),
    ):
        for run in (model, model.generate):
            with pytest.raises(ValueError, match=message):
                run(**inputs, visual_importance=importance, vispruner_config=guided)
    with pytest.raises(ValueError, match=r'says nothing to vispruner_config.method "vispruner": take it out'):
        model(**inputs, visual_importance=torch.ones(1, 144))
    with pytest.raises(ValueError, match='"sgl" ranks all tokens of an image: use it alone'):
        model.set_vispruner_config(method="vispruner+sgl", stage_token_nums=[72, 36])
    told = vispruner.load(resolve_base("embedded/tiny-llava"), **guided)
    with pytest.raises(ValueError, match='method "sgl" ranks by what another model found, which no repo carries'):
        told.save_pretrained(tmp_path / "saved")
    config = write_yaml(tmp_path, base_model="embedded/tiny-llava", base_revision=None, vispruner_config=guided)
    with pytest.raises(RepoConfigError, match='method "sgl" ranks by what another model found'):
        build_repo(config, tmp_path / "built")
    assert {path.name for path in tmp_path.iterdir()} == {"pruned.yaml"}


def test_rows_of_a_batch_tell_of_their_own_visual_tokens() -> None:
    """By hand: the last row of two, the last of three, and none."""
    attention = torch.arange(2 * 3 * 4 * 4).reshape(3, 2, 4, 4).float()
    is_visual = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]]).bool()
    first = attention[0, :, 2:, 1:3].sum((0, 1))
    second = attention[1, :, 3][:, [1, 3]].sum(0)
    expected = torch.stack([first, second, torch.zeros(2)])
    assert torch.equal(visual_importance([attention], is_visual), expected)


@pytest.mark.parametrize(
    ("attentions", "message"),
    [(None, "eager"), ((None, None), "eager"), ([], "eager"), ((torch.zeros(2, 1, 4, 4),), "do not fit a prompt")],
)
def test_what_tells_nothing_is_refused(attentions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        visual_importance(attentions, torch.ones(1, 4, dtype=torch.bool))


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
        "projected": torch.randn(images, tokens, 12, generator=generator).to(dtype),
        "layer_inputs": torch.randn(images, tokens, 16, generator=generator).to(dtype),
        "places": torch.rand(images, tokens, 3, generator=generator),
        "cls_feature": torch.randn(images, 16, generator=generator).to(dtype),
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
