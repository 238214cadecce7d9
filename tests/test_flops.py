"""What the speed benchmarks call ideal: operations equal to PyTorch's own count, and floors nothing can beat."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vispruner import decoder_pruning
from vispruner.conversion.prefill_cost import kv_cache_bytes
from vispruner.decoder_attention import find_raters
from vispruner.selectors import DECODER_METHODS, SELECTORS

BUDGETS = (64, 21, 7, 1)
COUNTED = [name for name in DECODER_METHODS if SELECTORS[name].place and SELECTORS[name].place.ranking != "told"]


@pytest.fixture(scope="module")
def flops() -> ModuleType:
    folder = str(Path(__file__).parent.parent / "benchmarks")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("flops")


@pytest.mark.core
@pytest.mark.parametrize("row", ["stock", "peer", "ours"])
@pytest.mark.parametrize("kept", BUDGETS)
def test_every_stage_costs_what_torch_counts(flops: ModuleType, row: str, kept: int) -> None:
    config = flops.load_geometry("tiny")
    sizes = {"batch": 2, "text_tokens": 10, "new": 6}
    expected = flops.stage_flops(config, row, kept, **sizes)
    counted = flops.counted_stage_flops(config, row, kept, **sizes)
    if row == "ours":  # one whole matrix of similarities is what a selection needs at most
        assert counted.pop("select") <= expected.pop("select")
    assert counted == expected


@pytest.mark.core
@pytest.mark.parametrize(("row", "kept"), [("stock", 576), ("ours", 576), ("ours", 64)])
def test_so_it_does_before_a_tower_whose_features_are_those_of_two_layers(
    flops: ModuleType, row: str, kept: int
) -> None:
    config = flops.load_geometry(str(Path(__file__).parent.parent / "conversion" / "assets" / "photo-llava"))
    expected = flops.stage_flops(config, row, kept, text_tokens=10)
    counted = flops.counted_stage_flops(config, row, kept, text_tokens=10)
    assert counted.pop("select") <= expected.pop("select") <= 2 * 576**2 * 768
    assert counted == expected


@pytest.mark.parametrize("method", COUNTED)
@pytest.mark.parametrize("kept", [40, 24])
def test_a_method_in_the_language_model_costs_what_torch_counts(
    flops: ModuleType, monkeypatch: pytest.MonkeyPatch, method: str, kept: int
) -> None:
    """The whole of a forward: layers below the first stage see all tokens, those behind fewer; ranking costs, too."""
    config, text = flops.load_geometry("tiny"), 11
    model = flops.MODEL_CLASSES["ours"](flops.vispruner_config(config, 64)).eval()
    model.set_attn_implementation("eager")
    model.set_vispruner_config(method=method, visual_token_num=kept)
    raters: list[int] = []

    def find(*arguments: torch.Tensor) -> torch.Tensor:
        found = find_raters(*arguments)
        raters.append(int(found.sum()))
        return found

    monkeypatch.setattr(decoder_pruning, "find_raters", find)
    ids = torch.tensor([[*range(3, 8), *[config.image_token_id] * 64, *range(8, 14)]])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        made = model(input_ids=ids, pixel_values=torch.zeros(1, 3, 112, 112), use_cache=True, logits_to_keep=1)
    expected = flops.stage_flops(
        config, "ours", kept, text_tokens=text, method=method, raters=raters[0] if raters else None
    )
    angles = sum(sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb"))
    assert counter.get_total_flops() - angles == flops.first_token_flops(expected)
    held = [text + count for count in flops.layers_of_method(config, method, kept)]
    assert [layer.keys.shape[2] for layer in made.past_key_values.layers] == held
    assert kv_cache_bytes(config, held, bytes_per_value=4) == sum(
        tensor.nbytes for layer in made.past_key_values.layers for tensor in (layer.keys, layer.values)
    )


@pytest.mark.parametrize("method", ["scope", "divprune", "cls_attention", "random"])
def test_what_other_methods_behind_the_encoder_compare_is_known(flops: ModuleType, method: str) -> None:
    """At most one product of all with all, and what projecting all of them takes where they are compared projected."""
    config = flops.load_geometry("tiny")
    model = flops.MODEL_CLASSES["ours"](flops.vispruner_config(config, 64)).eval()
    model.set_attn_implementation("eager")
    model.set_vispruner_config(method=method, visual_token_num=20, seed=1)
    ids = torch.tensor([[3, *[config.image_token_id] * 64, 4]])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 112, 112), logits_to_keep=1)
    expected = flops.stage_flops(config, "ours", 20, text_tokens=2, method=method)
    angles = sum(sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb"))
    apart = flops.first_token_flops(expected) - (counter.get_total_flops() - angles)
    assert 0 <= apart <= 0.1 * expected["select"], (apart, expected)


def test_only_kept_tokens_are_projected_and_compared_once(flops: ModuleType) -> None:
    config = flops.load_geometry("llava-1.5-7b")
    ours, peer = (flops.stage_flops(config, row, 64) for row in ("ours", "peer"))
    assert peer["project"] == 9 * ours["project"]
    assert peer["select"] > 5 * ours["select"]
    assert ours["vision"] - peer["vision"] == flops.saliency_flops(config) < 1e-5 * peer["vision"]


def test_the_costs_of_llava_7b_are_the_known_ones(flops: ModuleType) -> None:
    """64 text tokens; the speed-ups are those of a tower whose unused last layer does not run."""
    config = flops.load_geometry("llava-1.5-7b")
    by_budget = {kept: flops.stage_flops(config, "ours", kept) for kept in (576, 192, 128, 64, 32)}
    assert [round(f["prefill"] / 1e12, 2) for f in by_budget.values()] == [8.50, 3.35, 2.51, 1.67, 1.25]
    assert kv_cache_bytes(config, 1) == 2**19
    config.vision_config.num_hidden_layers = 23
    first = [flops.first_token_flops(flops.stage_flops(config, "ours", kept)) for kept in by_budget]
    assert [round(first[0] / f, 2) for f in first[1:]] == [2.39, 3.09, 4.37, 5.50]


@pytest.mark.core
def test_a_floor_is_bound_by_weights_or_by_operations(flops: ModuleType) -> None:
    config, h200 = flops.load_geometry("llava-1.5-7b"), flops.DEVICES["h200"]
    weights = flops.weight_bytes(config)
    assert weights["prefill"] == pytest.approx(12.95e9, rel=1e-3)
    one = {kept: flops.floors(config, "ours", kept, h200, weights=weights) for kept in (192, 64, 32)}
    assert one[64]["prefill"] == one[32]["prefill"] == weights["prefill"] / h200.bytes
    assert one[192]["prefill"] == flops.stage_flops(config, "ours", 192)["prefill"] / h200.flops
    eight = [flops.floors(config, row, 64, h200, batch=8, weights=weights)["ttft"] for row in ("stock", "ours")]
    assert eight[0] / eight[1] == pytest.approx(4.34, abs=0.02)  # the whole speed-up, where one image has 2.9 at most
    assert one[64]["ttft"] == pytest.approx(sum(one[64][stage] for stage in flops.FIRST_TOKEN_STAGES))


def test_stages_read_every_weight_but_the_input_embeddings_once(flops: ModuleType) -> None:
    config = flops.load_geometry("tiny")
    model = flops.empty_model(flops.LlavaForConditionalGeneration, config)
    read = flops.weight_bytes(config, bytes_per_value=4)
    assert read["decode"] == read["prefill"] + read["logits"]
    everything = sum(4 * parameter.numel() for parameter in model.parameters())
    embeddings = 4 * model.get_input_embeddings().weight.numel()
    assert sum(read[stage] for stage in flops.FIRST_TOKEN_STAGES) == everything - embeddings


def test_the_command_prints_tables_and_checks_itself(flops: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    rates = ["--flops-per-second", "1e12", "--bytes-per-second", "1e11"]
    assert flops.main(["--geometry", "tiny", "--tokens", "64", "8", *rates]) == 0
    printed = capsys.readouterr().out
    assert "| 64 | " in printed and "1 TFLOP/s and 100 GB/s (as given)" in printed
    assert flops.main(["--geometry", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_the_command_compares_methods_at_equal_cache(flops: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert flops.main(["--methods", "--tokens", "288"]) == 0
    rows = {line.split("`")[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("| 288")}
    assert rows.keys() == {"vispruner", *COUNTED}
    assert "| 2 x 576, 30 x 268 |" in rows["fastv"] and "| 32 x 288 |" in rows["vispruner"]
    assert flops.main(["--methods", "pyramiddrop", "--tokens", "64"]) == 2
    assert "is the least" in capsys.readouterr().err


@pytest.mark.core
def test_a_difference_from_the_count_is_reported(flops: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    config = flops.load_geometry("tiny")
    assert flops.check(config, [64, 8], text_tokens=4) == []
    monkeypatch.setattr(flops, "saliency_flops", lambda config: 1)
    (line,) = flops.check(config, [64, 8], text_tokens=4)
    assert line.startswith("ours, 8 tokens, vision: ")
