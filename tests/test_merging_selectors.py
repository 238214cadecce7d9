"""Methods that fold tokens together behind the encoder, against what their authors' code made of recorded inputs.

Indices are equal, merged rows agree to 1e-4 (recorded noise of the sums: 3e-6).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_vectors import CASES, cases, tensors
from matrix import TEXT, made

import vispruner
from vispruner.choosing import Choice, watch_choices
from vispruner.merging_selectors import (
    VFLOWOPT_PUBLISHED,
    cells_of,
    outlier_num,
    recycle,
    select_prumerge,
    select_prumerge_plus,
    select_tome,
    select_visionzip,
    tome_means,
    tome_step,
    vflowopt_num,
)
from vispruner.selectors import SELECTORS, Selection, Selector, kinds_of_kept, run_selector, select_tokens
from vispruner.visual_attention import global_attention, received_attention

METHODS = ["visionzip", "tome", "prumerge", "prumerge_plus", "vflowopt"]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@cases("visionzip")
def test_visionzip(name: str) -> None:
    case, given = CASES[name], tensors(name)
    dominant, contextual = case["dominant"], case["contextual"]
    budget, hidden = 1 + dominant + contextual, given["hidden"]
    features, saliency = hidden[:, 1:], given["cls_row"].mean(1)[:, 1:]
    made = select_visionzip(
        features, saliency, budget, given["key_mean"][:, 1:], hidden[:, 0], contextual_share=contextual / budget
    )
    assert made.indices.shape == (1, budget) and bool((made.indices.diff(dim=1) > 0).all())
    into = made.merged_into(case["tokens"])
    kinds = kinds_of_kept("visionzip", made.indices, saliency, merged_into=into, contextual_share=contextual / budget)
    of_cls, of_dominant, of_contextual = kinds.values()
    assert torch.equal(made.indices[of_dominant], given["dominant"][0])
    rows = made.take(features)
    close(torch.cat([rows[of_cls], rows[of_dominant], rows[of_contextual]]), given["merged"][0])
    assert torch.equal(rows[of_cls], hidden[:, 0]) and torch.equal(
        rows[of_dominant], hidden[:, 1:][:, given["dominant"][0]][0]
    )


@cases("tome")
def test_tome_step_by_step(name: str) -> None:
    case, given = CASES[name], tensors(name)
    x, metric = given["x"][None], given["metric"][None]
    row, size = torch.arange(case["tokens"])[None], torch.ones(1, case["tokens"])
    for pairs in case["steps"]:
        count = x.shape[1]
        pairs = min(pairs, (count - case["class_token"]) // 2)
        step = tome_step(metric, pairs, case["class_token"])
        row = step.gather(1, row)
        (x, _), (metric, size) = (tome_means(rows, size, step, count - pairs) for rows in (x, metric))
    assert torch.equal(row[0], given["source"])
    close(x[0], given["merged"])
    close(size[0], given["size"])


@cases("tome")
def test_tome_without_a_class_token_is_the_selector(name: str) -> None:
    case, given = CASES[name], tensors(name)
    if case["class_token"]:
        return
    x, source = given["x"][None], given["source"]
    made = select_tome(x, torch.zeros(x.shape[:2]), len(given["merged"]), given["metric"][None])
    anchors = torch.stack([(source == row).nonzero()[0, 0] for row in range(len(given["merged"]))])
    assert torch.equal(made.indices[0], anchors.sort().values)
    close(made.take(x)[0], given["merged"][anchors.argsort()])
    assert torch.equal(made.merged_into(case["tokens"])[0], anchors[source])


@cases("prumerge")
def test_prumerge(name: str) -> None:
    case, given = CASES[name], tensors(name)
    features, query, keys, kept = (given[key] for key in ("features", "cls_query", "keys", "kept"))
    attention = (query @ keys.T / len(query) ** 0.5).softmax(-1)[1:]
    options = {"neighbours": case["neighbours"]}
    outliers = outlier_num(attention)
    if case["plus"]:
        options["attended_share"] = outliers / len(kept)
    else:
        assert outliers == len(kept)
    select = select_prumerge_plus if case["plus"] else select_prumerge
    made = select(features[None], attention[None], len(kept) + 1, query[None], keys[None], **options)
    is_rest = kinds_of_kept("prumerge", made.indices, attention[None], merged_into=made.merged_into(len(features)))[
        "rest: the sum of all others"
    ]
    assert torch.equal(made.indices[~is_rest], kept.sort().values)
    rows = made.take(features[None])
    close(rows[~is_rest], given["merged"][:-1][kept.argsort()])
    close(rows[is_rest], given["merged"][-1:])


@cases("vflowopt_map")
def test_the_map_of_vflowopt(name: str) -> None:
    case, attention = CASES[name], tensors(name)["attention"]
    heads, tokens, _ = attention.shape
    query, key = attention.log()[None], torch.eye(tokens).expand(1, heads, tokens, tokens)  # which attend just so
    assert case["alpha_v"] == 0  # so that entropies count for nothing
    close(global_attention(query, key, 1.0, threshold=case["t"])[0], tensors(name)["map"])


@cases("vflowopt")
def test_vflowopt_in_all_its_places(name: str) -> None:
    case, given = CASES[name], tensors(name)
    columns, base = case["columns_with_newline"], cells_of((27, 27), case["m"])
    rest = cells_of(((len(given["map"]) - len(base)) // columns, columns), case["m"])
    cells, budget = torch.cat([base, rest + base.max() + 1]), len(given["kept"])
    assert vflowopt_num(given["map"], cells, case["r_v"], case["m"]) == budget
    made = recycle(given["map"][None], cells, budget)
    assert torch.equal(made.indices[0], given["kept"])
    rows = made.take(given["features"][None])[0]
    close(rows, given["merged"])
    assert made.merge is not None
    single = made.merge.own[0] == 1
    assert 0 < int(single.sum()) < budget and torch.equal(rows[single], given["features"][given["kept"][single]])
    left, ranks = torch.arange(budget), given["kept_map"]
    assert torch.equal(ranks, given["map"][given["kept"]])
    for stage in ("llm_kept0", "llm_kept1"):
        count = len(given[stage])
        kept = run_selector("cls_attention", ranks[None, :, None], ranks[None], count).indices[0]
        left, ranks = left[kept], ranks[kept]
        assert torch.equal(left, given[stage])


def recycled_slowly(saliency: list[float], cells: list[int], budget: int) -> dict[int, list[int]]:
    """From the lowest on, one token after the other goes into the group of its cell, until `budget` are left."""
    groups: dict[int, list[int]] = {}
    order = sorted(range(len(saliency)), key=lambda token: (saliency[token], -token))
    while order and len(order) + len(groups) > budget:
        token = order.pop(0)
        groups.setdefault(cells[token], []).append(token)
    found = {token: [token] for token in order} | {group[-1]: group for group in groups.values()}
    best = sorted(found, key=lambda token: (-saliency[token], token))[:budget]
    return {token: sorted(found[token]) for token in sorted(best)}


@pytest.mark.parametrize("budget", [1, 2, 5, 6, 7, 20, 41, 42])
@pytest.mark.parametrize("cell", [1, 2.5, 3, 100])
def test_as_many_are_recycled_as_leave_the_budget(budget: int, cell: float) -> None:
    saliency = torch.randint(0, 9, (3, 42), generator=torch.Generator().manual_seed(budget)).float()
    cells, across = cells_of((6, 7), cell), int(6 / cell) + 1
    assert cells.tolist() == [int(row / cell) * across + int(column / cell) for row in range(6) for column in range(7)]
    made = recycle(saliency, cells, budget)
    into = made.merged_into(42)
    eye = made.take(torch.eye(42).expand(3, -1, -1))
    for row in range(3):
        expected = recycled_slowly(saliency[row].tolist(), cells.tolist(), budget)
        assert made.indices[row].tolist() == list(expected)
        for place, (anchor, group) in enumerate(expected.items()):
            weights = saliency[row][group].clamp(min=torch.finfo(torch.float32).tiny)
            close(eye[row, place][group], weights / weights.sum())
            assert int((eye[row, place] > 0).sum()) == len(group)
            assert all(int(into[row, token]) in (anchor, -1) for token in group)


def test_without_a_grid_nothing_is_recycled() -> None:
    given = inputs(2, 30)
    del given["grid"]
    made = run_selector("vflowopt", visual_token_num=9, **given)
    assert made.merge is None
    assert torch.equal(made.indices, given["saliency"].argsort(dim=1, descending=True)[:, :9].sort(dim=1).values)


def test_where_no_token_is_global_all_are() -> None:
    query, key = torch.randn(2, 2, 3, 12, 8, generator=torch.Generator().manual_seed(0))
    everywhere = received_attention(query, key)
    close(global_attention(query, key, threshold=12.0), everywhere)
    close(global_attention(query, key, threshold=0), everywhere)
    assert not torch.allclose(global_attention(query, key, threshold=1.0), everywhere, atol=1e-4)


def test_padding_is_not_global() -> None:
    query, key = torch.randn(2, 2, 3, 12, 8, generator=torch.Generator().manual_seed(0))
    seen = torch.arange(12).expand(2, -1) < 9
    for threshold in (0.0, 1.1, 50.0):
        short = global_attention(query[:, :, :9], key[:, :, :9], threshold=threshold)
        close(global_attention(query, key, seen=seen, threshold=threshold), torch.nn.functional.pad(short, (0, 3)))


def test_what_the_authors_found_keeps_what_they_say() -> None:
    """Their mean over the 28 layers of LLaVA-OneVision-7B is the share they name; the default is that of a quarter."""
    left = {0.5: 0.7233201448753168, 0.25: 0.2651026358526424, 0.1: 0.11661529508161146}  # behind the encoder
    for share, found in VFLOWOPT_PUBLISHED.items():
        first, second = found["stage_shares"]
        assert left[share] * (9 + 9 * first + 10 * first * second) / 28 == pytest.approx(share, abs=1e-3)
    options = {**SELECTORS["vflowopt"].options}
    assert {**options, "stage_shares": list(options["stage_shares"])} == VFLOWOPT_PUBLISHED[0.25]


def test_all_recorded_cases_of_these_methods_are_replayed() -> None:
    assert sum(name.split(".")[0] in (*METHODS, "vflowopt_map") for name in CASES) == 16


def inputs(images: int, tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(images, *shape, generator=generator).to(dtype)

    return {
        "features": draw(tokens, 16),
        "saliency": torch.rand(images, tokens, generator=generator),
        "keys": draw(tokens, 8),
        "cls_feature": draw(16),
        "cls_query": draw(24),
        "raw_keys": draw(1 + tokens, 24),
        "grid": (5, tokens // 5),
    }


def part_of(value: Any, image: int) -> Any:
    return value[image : image + 1] if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [True, False], ids=["cls", "no cls"])
def test_what_every_method_returns(method: str, dtype: torch.dtype, cls: bool) -> None:
    images, tokens = 3, 40
    given = inputs(images, tokens, dtype)
    if not cls:
        del given["cls_feature"]
    if method == "vflowopt" and not cls:
        given["cell"] = 1.0  # every token its own
    for budget in (1, 2, 3, 7, 20, 39, 40, 50):
        made = run_selector(method, visual_token_num=budget, **given)
        count = min(budget, tokens)
        assert made.indices.shape == (images, count) and made.appended == 0
        assert bool((made.indices.diff(dim=1) > 0).all())
        taken, into = made.take(given["features"]), made.merged_into(tokens)
        assert taken.dtype == dtype and taken.shape == (images, count, 16) and bool(taken.isfinite().all())
        if budget >= tokens:
            assert torch.equal(taken, given["features"])
        for row, kept in zip(into, made.indices, strict=True):
            assert set(row.tolist()) - {-1} <= set(kept.tolist())
        single = made.merge is None or (made.merge.own == 1)
        if made.merge is not None:
            folded = torch.zeros_like(single).scatter_reduce(1, made.merge.target, made.merge.weight != 0, "amax")
            single = single & ~folded
            same = given["features"].gather(1, made.indices[..., None].expand(-1, -1, 16))
            assert torch.equal(taken[single], same[single])
        alone = [
            run_selector(method, visual_token_num=budget, **{name: part_of(value, i) for name, value in given.items()})
            for i in range(images)
        ]
        assert torch.equal(made.indices, torch.cat([one.indices for one in alone]))
        parts = [one.take(given["features"][i : i + 1]) for i, one in enumerate(alone)]
        torch.testing.assert_close(taken, torch.cat(parts))


@pytest.mark.parametrize("method", METHODS)
def test_select_tokens_returns_what_is_folded_too(method: str) -> None:
    made = select_tokens(method, visual_token_num=9, **inputs(2, 30))
    assert isinstance(made, Selection) and made.merge is not None


def test_visionzip_says_of_every_token_where_it_went() -> None:
    given = inputs(2, 30)
    made = run_selector("visionzip", visual_token_num=12, contextual_share=0.5, **given)
    into = made.merged_into(30)
    kinds = kinds_of_kept("visionzip", made.indices, given["saliency"], merged_into=into, contextual_share=0.5)
    assert [int(mask.sum()) for mask in kinds.values()] == [2, 10, 12]  # of two images
    contextual = [set(kept[mask].tolist()) for kept, mask in zip(made.indices, list(kinds.values())[2], strict=True)]
    for row, kept, targets in zip(into.tolist(), made.indices.tolist(), contextual, strict=True):
        assert {into for token, into in enumerate(row) if token not in kept} <= targets and -1 not in row


def test_tokens_alike_become_their_mean() -> None:
    features = torch.tensor([1.0, 5, 1, 9, 5, 3])[None, :, None]
    keys = torch.eye(4)[[0, 0, 1, 1, 2, 3]][None]
    made = select_tome(features, torch.zeros(1, 6), 4, keys)
    assert made.indices.tolist() == [[0, 2, 4, 5]] and made.take(features).flatten().tolist() == [3, 5, 5, 3]
    into = made.merged_into(6)
    assert into.tolist() == [[0, 0, 2, 2, 4, 5]]
    kinds = kinds_of_kept("tome", made.indices, torch.zeros(1, 6), merged_into=into)
    assert [mask.tolist() for mask in kinds.values()] == [[[False, False, True, True]], [[True, True, False, False]]]


@pytest.mark.parametrize(
    ("method", "options", "named"),
    [
        ("visionzip", {"contextual_share": 1.5}, "contextual_share"),
        ("visionzip", {"keys": torch.zeros(1, 3, 2)}, "keys"),
        ("tome", {"keys": torch.zeros(1, 3, 2)}, "keys"),
        ("prumerge", {"neighbours": 0}, "neighbours"),
        ("prumerge", {"raw_keys": torch.zeros(2, 9, 24)}, "raw_keys"),
        ("prumerge", {"cls_query": torch.zeros(2, 9)}, "cls_query"),
        ("prumerge", {"cls_query": torch.full((2, 24), torch.nan)}, "finite"),
        ("prumerge_plus", {"attended_share": "half"}, "attended_share"),
        ("vflowopt", {"cell": 0.5}, "method_options.cell must be a number from 1 on, got 0.5"),
        ("vflowopt", {"cell": float("nan")}, "method_options.cell"),
        ("vflowopt", {"grid": (5, 5)}, "grid must be"),
    ],
)
def test_bad_input_is_named(method: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        run_selector(method, visual_token_num=9, **{**inputs(2, 30), **options})


@pytest.mark.parametrize(("share", "budget"), [(0, 20), (0.25, 20), (0.25, 5), (0.9, 30), (1, 12), (0.1, 38)])
def test_prumerge_plus_meets_every_budget(share: float, budget: int) -> None:
    given = inputs(4, 40)
    made = run_selector("prumerge_plus", visual_token_num=budget, attended_share=share, **given)
    keys, query = given["raw_keys"], given["cls_query"]
    attention = (keys @ query[..., None])[..., 0].div(24**0.5).softmax(-1)[:, 1:]
    attended = attention.argsort(dim=1, descending=True)[:, : round((budget - 1) * share)]
    for kept, most in zip(made.indices.tolist(), attended.tolist(), strict=True):
        assert len(kept) == budget and set(most) <= set(kept)


def pixels_for(model: Any, images: int = 1) -> torch.Tensor:
    size = model.config.vision_config.image_size
    return torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", ["visionzip", "prumerge"])
def test_a_method_is_given_queries_and_keys_as_the_layers_project_them(method: str, tiny_llava_repo: Path) -> None:
    model = vispruner.load(tiny_llava_repo, method=method, visual_token_num=9).eval()
    base, choices, projected = model.model, [], {}
    for number, attention in enumerate(base.vision_attentions):
        for name in ("q_proj", "k_proj"):
            key = (number, name)
            getattr(attention, name).register_forward_hook(
                lambda _, __, made, key=key: projected.__setitem__(key, made)
            )
    pixels = pixels_for(model, images=2)
    with watch_choices(after=choices.append), torch.no_grad():
        output = base.get_image_features(pixels, output_hidden_states=True)
    given, last = choices[0].tokens.further, len(base.vision_attentions) - 1
    assert base.feature_layer < last
    if method == "visionzip":
        count = model.config.vision_config.num_attention_heads
        heads = projected[base.feature_layer, "k_proj"].unflatten(-1, (count, -1))
        torch.testing.assert_close(given["keys"], heads.mean(2)[:, 1:])
        assert torch.equal(given["cls_feature"], output.hidden_states[-2][:, 0])
        assert given.keys() == {"keys", "cls_feature"}
    else:
        assert torch.equal(given["cls_query"], projected[last, "q_proj"][:, 0])
        assert torch.equal(given["raw_keys"], projected[last, "k_proj"])
        assert given.keys() == {"cls_query", "raw_keys"}


def test_what_is_folded_after_projection_is_so(tiny_llava_repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def select(features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int) -> Selection:
        return select_tome(features, saliency, visual_token_num, features)

    monkeypatch.setitem(SELECTORS, "late", Selector(select, {}, merge_on="projected"))
    model = vispruner.load(tiny_llava_repo, method="late", visual_token_num=9).eval()
    pixels = pixels_for(model)
    choices: list[Choice] = []
    with watch_choices(after=choices.append), torch.no_grad():
        found = model.model.get_image_features(pixels).pooler_output[0]
        tokens, _, selection = choices[0]
        expected = selection.take(model.model.project(tokens.features))[0]
        other = model.model.project(selection.take(tokens.features))[0]
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, other, atol=1e-4)


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llava", {}),
        ("llava_next", {"tile_mode": "paper"}),
        ("llava_next", {"tile_mode": "native"}),
        ("llava_onevision", {}),
        ("video_llava", {}),
    ],
)
def test_behind_a_linear_projector_it_does_not_matter_where_tokens_are_folded(
    name: str, options: dict[str, str], tmp_path: Path
) -> None:
    """Means of what a linear map makes are what it makes of means: of tiles, newlines, frames and [CLS] alike."""
    folds = {"cell": 3, "stage_shares": [1.0]}
    model = made(name, tmp_path, method="vflowopt", keep_ratio=0.5, prune_layers=[1], method_options=folds, **options)
    projector, selector = model.pruned.model.multi_modal_projector, SELECTORS["vflowopt"]
    assert selector.merge_on == "projected"

    def tokens() -> list[torch.Tensor]:
        with torch.no_grad():
            inputs = [model.prompt(prompt) for prompt in model.prompts() if prompt != TEXT]
            found = [model.pruned.model.encoded(one)["mm_encoder_outputs"] for one in inputs]
        return [torch.cat(list(features.pooler_output)) for one in found for features in one.values()]

    def folded_before() -> list[torch.Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(SELECTORS, "vflowopt", selector._replace(merge_on="features"))
            return tokens()

    assert not all(torch.allclose(*pair, atol=1e-4) for pair in zip(tokens(), folded_before(), strict=True))
    projector.act = torch.nn.Identity()
    for pair in zip(tokens(), folded_before(), strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


def test_the_encoder_is_trained_by_what_is_folded(tiny_llava_repo: Path) -> None:
    model = vispruner.load(tiny_llava_repo, method="visionzip", visual_token_num=9)
    pixels = pixels_for(model)
    model.model.get_image_features(pixels).pooler_output[0].sum().backward()
    embedding = dict(model.model.vision_tower.named_parameters())
    of_cls = next(value for name, value in embedding.items() if name.endswith("class_embedding"))
    assert of_cls.grad is not None and bool(of_cls.grad.abs().sum() > 0)
