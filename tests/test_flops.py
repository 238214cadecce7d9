"""What the speed benchmarks call ideal: operations equal to PyTorch's own count, and floors nothing can beat."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vispruner.conversion.prefill_cost import kv_cache_bytes

BUDGETS = (64, 21, 7, 1)


@pytest.fixture(scope="module")
def flops() -> ModuleType:
    folder = str(Path(__file__).parent.parent / "benchmarks")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("flops")


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


def test_a_difference_from_the_count_is_reported(flops: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    config = flops.load_geometry("tiny")
    assert flops.check(config, [64, 8], text_tokens=4) == []
    monkeypatch.setattr(flops, "saliency_flops", lambda config: 1)
    (line,) = flops.check(config, [64, 8], text_tokens=4)
    assert line.startswith("ours, 8 tokens, vision: ")
