"""Methods whose authors published no code: what each rule says, computed slowly here, and what all of them promise."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from bases import write_yaml
from documents import DOCUMENTS
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText

import vispruner
from vispruner.conversion.build import build_repo
from vispruner.conversion.verify import verify_repo
from vispruner.selectors import SELECTORS, run_selector

EXPERIMENTAL = sorted(name for name, selector in SELECTORS.items() if selector.experimental)
# A budget for the toy model, of 4 layers and 144 tokens, and what each layer then holds.
REPOS = {"image_text": (80, [128, 64, 64, 64]), "todre": (60, [80, 80, 80, 0]), "topv": (72, [144, 48, 48, 48])}


def given_to(method: str, images: int, tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a method asks for: entries +-1, so that cosines are exact and many are equal; saliency of a few levels.

    What TopV compares is drawn from a normal distribution: how two equal tokens round is no part of its rule.
    """
    generator = torch.Generator().manual_seed(seed)

    def signs(*shape: int) -> torch.Tensor:
        return torch.randint(0, 2, shape, generator=generator) * 2.0 - 1

    further = {"cls_feature": signs(images, 16), "projected": signs(images, tokens, 16)}
    saliency = torch.randint(0, 5, (images, tokens), generator=generator).float()
    inputs = {"features": signs(images, tokens, 16), "saliency": saliency}
    if method == "topv":
        inputs["features"], further["layer_inputs"] = torch.randn(2, images, tokens, 16, generator=generator)
        further["places"] = torch.rand(images, tokens, 3, generator=generator) - 0.5
        further["places"][..., 0] = (torch.arange(tokens) >= tokens // 2).float()
    return inputs | {name: value for name, value in further.items() if name in SELECTORS[method].needs}


def cosine(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True)) / math.sqrt(
        sum(a * a for a in one) * sum(b * b for b in other)
    )


def evenly_filled(stays: set[int], tokens: int, budget: int) -> list[int]:
    """Those that stay and, of each equal part of the others, the last one."""
    others, room = [token for token in range(tokens) if token not in stays], budget - len(stays)
    more = {others[-(-len(others) * (step + 1) // room) - 1] for step in range(room)}
    assert len(more) == room
    return sorted(stays | more)


def slow_image_text(features: list, saliency: list, budget: int, cls_feature: list) -> list[int]:
    similarity = [round(cosine(token, cls_feature), 9) for token in features]
    order = sorted(range(len(features)), key=lambda token: (-similarity[token], token))
    falling, last = [similarity[token] for token in order], len(order) - 1
    above = [
        round(abs(value - falling[0] - (falling[last] - falling[0]) * place / max(1, last)), 6)
        for place, value in enumerate(falling)
    ]
    bend = above.index(max(above)) + 1
    return evenly_filled(set(order[: min(bend, budget)]), len(order), budget)


def slow_todre(features: list, saliency: list, budget: int, projected: list) -> list[int]:
    lengths = [math.sqrt(sum(entry * entry for entry in token)) for token in projected]
    directions = [[entry / length for entry in token] for token, length in zip(projected, lengths, strict=True)]
    mean = [sum(entries) / len(projected) for entries in zip(*directions, strict=True)]
    kept: list[int] = []
    while len(kept) < min(budget, len(projected)):

        def distance(token: int) -> float:
            others = [projected[other] for other in kept] or [mean]
            return round(sum(1 - cosine(projected[token], other) for other in others), 5)

        kept.append(max((t for t in range(len(projected)) if t not in kept), key=lambda t: (distance(t), -t)))
    return sorted(kept)


def slow_topv(features: list, saliency: list, budget: int, layer_inputs: list, places: list) -> list[int]:
    """Sinkhorn's algorithm on the kernel itself, in double precision and for each entry alone."""
    tokens = range(len(features))
    if budget >= len(features):
        return list(tokens)

    def cost(source: int, target: int) -> float:
        (image, down, across), (other, *there) = places[source], places[target]
        apart = math.dist((down, across), there) if image == other else 1.0
        return 1 - cosine(layer_inputs[source], features[target]) + apart / 2 + math.hypot(down, across) / 2

    costs = [[cost(source, target) for target in tokens] for source in tokens]
    kernel = [[math.exp(-entry / 0.1) for entry in row] for row in costs]
    rows, columns = [1.0] * len(features), [1.0] * len(features)
    for _ in range(30):
        rows = [1 / len(features) / sum(kernel[s][t] * columns[t] for t in tokens) for s in tokens]
        columns = [1 / len(features) / sum(kernel[s][t] * rows[s] for s in tokens) for t in tokens]
    paid = [sum(rows[s] * kernel[s][t] * columns[t] * costs[s][t] for t in tokens) for s in tokens]
    best = sorted(tokens, key=lambda token: paid[token])[: budget - budget // 10]
    return evenly_filled(set(best), len(features), budget)


SLOW = {"image_text": slow_image_text, "todre": slow_todre, "topv": slow_topv}


def test_every_experimental_method_has_a_slow_reference_and_a_repo() -> None:
    assert EXPERIMENTAL == sorted(SLOW) == sorted(REPOS)


@pytest.mark.core
@pytest.mark.parametrize("method", EXPERIMENTAL)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(images=st.integers(1, 3), tokens=st.integers(1, 40), budget=st.integers(1, 45), seed=st.integers(0, 1000))
def test_what_every_rule_promises(method: str, images: int, tokens: int, budget: int, seed: int) -> None:
    inputs = given_to(method, images, tokens, seed)
    before = {name: value.clone() for name, value in inputs.items()}
    kept = run_selector(method, visual_token_num=budget, **inputs).indices
    assert kept.dtype == torch.int64 and kept.shape == (images, min(budget, tokens))
    assert bool((kept.diff(dim=1) > 0).all()) and int(kept.min()) >= 0 and int(kept.max()) < tokens
    if budget >= tokens:
        assert torch.equal(kept, torch.arange(tokens).expand(images, -1))
    assert all(torch.equal(inputs[name], value) for name, value in before.items())
    assert torch.equal(kept, run_selector(method, visual_token_num=budget, **inputs).indices)
    for image in range(images):
        one = {name: value[image : image + 1] for name, value in inputs.items()}
        assert torch.equal(run_selector(method, visual_token_num=budget, **one).indices[0], kept[image])


@pytest.mark.parametrize("method", EXPERIMENTAL)
@pytest.mark.parametrize(("tokens", "budget"), [(1, 1), (2, 1), (7, 3), (24, 1), (24, 5), (24, 23), (36, 12)])
def test_a_rule_is_what_it_says(method: str, tokens: int, budget: int) -> None:
    for seed in range(12):
        inputs = given_to(method, 2, tokens, seed)
        kept = run_selector(method, visual_token_num=budget, **inputs).indices
        for image in range(2):
            one = {name: value[image].tolist() for name, value in inputs.items()}
            assert kept[image].tolist() == SLOW[method](**one, budget=budget), (seed, image)


@pytest.mark.parametrize("method", EXPERIMENTAL)
@pytest.mark.core
def test_a_repo_is_built_verified_and_loaded_and_says_that_it_is_experimental(method: str, tmp_path: Path) -> None:
    budget, held = REPOS[method]
    config = write_yaml(
        tmp_path,
        base_model="embedded/tiny-llava",
        base_revision=None,
        vispruner_config={"method": method, "visual_token_num": budget},
        card={"license": "apache-2.0", "language": "en"},
    )
    repo = build_repo(config, tmp_path / "repo", show_progress=False)
    report = verify_repo(repo)
    assert report.passed, report.table()
    model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True)
    options = model.model.encoder_options
    left = 144 if options.method == "none" else options.budget(144)
    assert model.model.layer_counts(left) == held and sum(held) <= 4 * budget
    assert f"| `{method}` (experimental: its authors published no code): " in (repo / "README.md").read_text()
    assert any(line.startswith(f"| `{method}` | experimental: ") for line in DOCUMENTS.splitlines())


@pytest.mark.parametrize("method", EXPERIMENTAL)
def test_who_chooses_one_is_told_once(method: str, tiny_llava_repo: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.Logger.warning_once.cache_clear()  # transformers forgets what earlier tests warned of
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            vispruner.load(tiny_llava_repo, method=method, keep_ratio=0.5)
    said = [record.message for record in caplog.records if f'method "{method}" is experimental' in record.message]
    assert len(said) == 1


def test_the_bend_and_what_is_beyond_it() -> None:
    """Three tokens resemble the image, nine do not: the three stay, and every third of the others."""
    features = torch.tensor([[1.0, 0.0]] * 3 + [[0.1, 1.0]] * 9)[None]
    inputs = {"features": features, "saliency": torch.zeros(1, 12), "cls_feature": torch.tensor([[1.0, 0.0]])}
    kept = run_selector("image_text", visual_token_num=7, **inputs).indices[0].tolist()
    assert kept[:3] == [0, 1, 2] and len(kept) == 7
    assert run_selector("image_text", visual_token_num=2, **inputs).indices[0].tolist() == [0, 1]
