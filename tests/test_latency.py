"""The latency benchmark measures what it says, and pruning's countable costs stay where they are. Never times."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from oracle import vispruner_oracle
from PIL import Image
from transformers import LlavaForConditionalGeneration

pytest.importorskip("matplotlib", reason="the benchmarks need `pip install 'vispruner[benchmarks]'`")

FULL, BUDGETS = 64, (64, 16, 4)
TEXT, NEW = 12, 4


@pytest.fixture(scope="module")
def latency() -> ModuleType:
    folder = str(Path(__file__).parent.parent / "benchmarks")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("latency")


@pytest.fixture(scope="module")
def files(latency: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("latency")
    sizes = ["--text-tokens", str(TEXT), "--new-tokens", str(NEW), "--rounds", "2", "--long-rounds", "1"]
    budgets = ["--budgets", *map(str, BUDGETS)]
    assert latency.main(["--quick", "--at-cap", "--max-batch", "2", *budgets, *sizes, "--out", str(folder)]) == 0
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def result(files: list[Path]) -> dict[str, Any]:
    return json.loads(files[0].read_text())


def row(result: dict[str, Any], name: str, kept: int, setting: int = 0) -> dict[str, Any]:
    rows = result["settings"][setting]["rows"]
    (found,) = [row for row in rows if (row["row"], row["visual_token_num"]) == (name, kept)]
    return found


@pytest.fixture
def weights(latency: ModuleType) -> Any:
    return latency.RandomWeights(torch.float32, torch.device("cpu"), distinct_layers=3)


# What is measured


@pytest.mark.core
def test_every_row_is_there_with_its_class_and_its_cache(latency: ModuleType, result: dict[str, Any]) -> None:
    expected = [("stock", FULL), *((name, budget) for budget in BUDGETS for name in ("peer", "ours"))]
    assert [(setting["batch"], setting["depth_divisor"]) for setting in result["settings"]] == [(1, 1), (8, 2)]
    for setting in result["settings"]:
        assert [(row["row"], row["visual_token_num"]) for row in setting["rows"]] == expected
        for found in setting["rows"]:
            length = TEXT + found["visual_token_num"] + NEW - 1
            layers, heads, width = setting["config"]["text_config"]["num_hidden_layers"], 2, 16
            assert found["kv_length"] == length
            assert found["kv_bytes"] == setting["batch"] * 2 * layers * heads * width * length * 4
            assert found["class"].endswith(latency.MODEL_CLASSES[found["row"]].__name__)
    assert row(result, "ours", 16)["class"].startswith("vispruner.")


@pytest.mark.core
def test_times_have_medians_spreads_and_as_many_runs_as_rounds(result: dict[str, Any]) -> None:
    for setting in result["settings"]:
        for found in setting["rows"]:
            seconds = found["seconds"]
            runs = {name: len(spread["runs"]) for name, spread in seconds.items()}
            assert runs == {name: 1 if name in ("e2e", "decode") else 2 for name in seconds}
            assert all(s["low"] <= s["median"] <= s["high"] for s in seconds.values())
            stages = ("vision", "select", "project", "prefill", "logits", "other")
            sums = [sum(parts) for parts in zip(*(seconds[stage]["runs"] for stage in stages), strict=True)]
            assert sums == pytest.approx(seconds["ttft"]["runs"])
            assert seconds["select"]["median"] > 0 or found["visual_token_num"] == FULL
        assert setting["rows"][0]["ratio_to_stock"]["ttft"]["median"] == 1.0


@pytest.mark.core
def test_the_circumstances_are_recorded(result: dict[str, Any]) -> None:
    assert {"torch", "transformers", "python", "vispruner"} <= result["versions"].keys()
    assert result["threads"] == torch.get_num_threads() and result["dtype"] == "float32"
    assert min(result["probe"]["flops_per_second"], result["probe"]["bytes_per_second"]) > 0
    assert "dispatch" in result["memory"].lower()


@pytest.mark.core
def test_tables_and_the_plot_come_from_the_file(
    latency: ModuleType, files: list[Path], result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert [file.suffix for file in files] == [".json", ".png"] and files[0].name.startswith("latency-cpu-")
    files[1].unlink()
    assert latency.main(["--show", str(files[0])]) == 0
    printed = capsys.readouterr().out
    shown = row(result, "ours", 16)["seconds"]["ttft"]
    assert f"| 16 | ours | {shown['median']:.3g} ({shown['low']:.3g}, {shown['high']:.3g}) |" in printed
    with Image.open(files[1]) as picture:
        assert picture.width > 600
    efficiency = sys.modules["flops"].efficiency_table(result)
    assert efficiency.count("| ours |") == 2 * len(BUDGETS) and "measured by latency.py" in efficiency


@pytest.mark.core
def test_methods_are_compared_with_stock_on_the_same_weights(
    latency: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods, sizes = ["vispruner", "divprune", "codebook"], ["--rounds", "2", "--budgets", "16", "--batches", "2"]
    assert latency.main(["--quick", "--methods", *methods, *sizes, "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("latency-methods-cpu-")
    result = json.loads(file.read_text())
    (setting,) = result["settings"]
    assert [(found["method"], found["visual_token_num"]) for found in setting["rows"]] == [
        (None, FULL), *((method, 16) for method in (*methods, "downsample"))
    ]  # fmt: skip
    *pruned, smaller = setting["rows"][1:]
    assert smaller["row"] == "stock" and smaller["operations"]["vision"] > 0 and smaller["kv_length"] == 64 + 16 + 1
    assert smaller["peak_bytes"]["vision"] < setting["rows"][0]["peak_bytes"]["vision"]
    chosen = {found["method"]: found for found in pruned}
    for name, found in chosen.items():
        assert found["seconds"]["select"]["median"] > 0
        assert found["kv_length"] == setting["rows"][0]["kv_length"] - FULL + 16
        # Whatever was projected to be compared belongs to the choice; what was kept is projected once more.
        assert found["operations"]["project"] == chosen["vispruner"]["operations"]["project"], name
    assert chosen["divprune"]["operations"]["select"] > chosen["codebook"]["operations"]["select"]
    printed = capsys.readouterr().out
    assert latency.main(["--show", str(file)]) == 0
    again = capsys.readouterr().out
    assert "| 16 | divprune |" in again and again in printed
    assert [*tmp_path.iterdir()] == [file]


def test_every_registered_method_is_compared_unless_some_are_named(latency: ModuleType) -> None:
    plan = latency.plan_of(latency.parse_arguments(["--methods"]))
    assert plan.methods == latency.ENCODER_METHODS and plan.budgets == (576, 64)
    assert latency.plan_of(latency.parse_arguments([])).methods == ()


def test_the_share_at_stocks_rates_counts_a_slow_stage_for_its_time(latency: ModuleType) -> None:
    """Vision runs at a tenth of the other rate: all of stock takes 20 s, and a tenth of the prefill leaves 11 s."""
    names = latency.FIRST_TOKEN_STAGES

    def made(vision: float, prefill: float, ratio: float) -> dict[str, Any]:
        flops = dict.fromkeys(names, 0) | {"vision": 10, "prefill": int(100 * prefill)}
        seconds = {name: {"median": 0.0} for name in names} | {
            "vision": {"median": vision}, "prefill": {"median": 10 * prefill}
        }  # fmt: skip
        return {"flops": flops, "seconds": seconds, "ratio_to_stock": {"ttft": {"median": ratio}}}

    stock, pruned = made(10.0, 1.0, 1.0), made(10.0, 0.1, 20 / 11)
    assert latency.share_at_stocks_rates(stock, stock) == 1.0
    assert latency.share_at_stocks_rates(pruned, stock) == pytest.approx(1.0)


# The countable costs


@pytest.mark.core
def test_ours_holds_no_attention_map_and_the_peer_holds_them_all(result: dict[str, Any]) -> None:
    vision = result["settings"][0]["config"]["vision_config"]
    one_map = vision["num_attention_heads"] * (FULL + 1) ** 2 * 4
    stock = row(result, "stock", FULL)["peak_bytes"]["vision"]
    assert row(result, "peer", 16)["peak_bytes"]["vision"] > vision["num_hidden_layers"] * one_map
    assert row(result, "ours", 16)["peak_bytes"]["vision"] <= 1.05 * stock


@pytest.mark.core
def test_peak_memory_falls_with_the_budget(result: dict[str, Any]) -> None:
    peaks = [row(result, "ours", budget)["peak_bytes"]["all"] for budget in BUDGETS]
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] < peaks[0]
    assert peaks[0] <= 1.05 * row(result, "stock", FULL)["peak_bytes"]["all"]


@pytest.mark.core
def test_pruning_adds_few_operations_and_none_to_the_language_model(result: dict[str, Any]) -> None:
    stock, ours = row(result, "stock", FULL)["operations"], row(result, "ours", 16)["operations"]
    for stage in ("language", "logits", "project"):
        assert ours[stage] == stock[stage]
    assert ours["vision"] - stock["vision"] <= 15
    outside = ours["all"] - ours["select"] - ours["vision"] - (stock["all"] - stock["vision"])
    assert outside <= 80  # shortening and restoring the prompt


@pytest.mark.core
def test_more_images_fit_under_the_cap_when_fewer_tokens_stay(result: dict[str, Any]) -> None:
    fits = [row(result, "ours", budget)["images_at_cap"] for budget in BUDGETS]
    assert fits == sorted(fits) and fits[-1] > fits[0] > 0
    assert row(result, "ours", 4)["batch_at_cap"] == 2
    assert row(result, "ours", 4)["images_per_second_at_cap"] > 0
    assert "images_at_cap" not in row(result, "ours", 4, setting=1)  # other layers would hold more


# What the measurement rests on


def test_cycled_layers_compute_what_their_copies_would(latency: ModuleType, weights: Any) -> None:
    config = latency.load_geometry("tiny")
    model = weights.model(LlavaForConditionalGeneration, config)
    layers = model.model.language_model.layers
    assert len({id(layer) for layer in layers}) == 8 and [layer.self_attn.layer_idx for layer in layers] == [*range(8)]
    assert len({layer.mlp.up_proj.weight.data_ptr() for layer in layers}) == 3
    copied = LlavaForConditionalGeneration(config).eval()
    copied.load_state_dict(model.state_dict())
    assert len({layer.mlp.up_proj.weight.data_ptr() for layer in copied.model.language_model.layers}) == 8
    ids = torch.arange(3, 12)[None]
    cycled, plain = (m(input_ids=ids, use_cache=True) for m in (model, copied))
    assert torch.equal(cycled.logits, plain.logits)
    keys = [[layer.keys for layer in out.past_key_values.layers] for out in (cycled, plain)]
    assert all(torch.equal(a, b) for a, b in zip(*keys, strict=True))
    assert not torch.equal(keys[0][0], keys[0][3])  # the same weights, another slot


def test_all_models_read_one_set_of_weights(latency: ModuleType, weights: Any) -> None:
    config = latency.load_geometry("tiny")
    models = [weights.model(model_class, config) for model_class in (LlavaForConditionalGeneration,) * 2]
    held = weights.nbytes
    shallow = weights.model(LlavaForConditionalGeneration, latency.shallower(config, 2))
    assert weights.nbytes == held and len(shallow.model.language_model.layers) == 4
    pointers = [{p.data_ptr() for p in model.parameters()} for model in (*models, shallow)]
    assert pointers[0] == pointers[1] >= pointers[2]


@pytest.mark.core
@pytest.mark.parametrize(("arguments", "strides"), [([], (64, 64, 1)), (["--as-is"], (76 * 64, 64, 1))])
def test_first_logits_are_of_a_compact_row_unless_left_as_they_are(
    latency: ModuleType, arguments: list[str], strides: tuple[int, ...]
) -> None:
    """In bfloat16 on the CPU a slice would have the weights copied."""
    parsed = latency.parse_arguments(["--quick", "--dtype", "bfloat16", "--text-tokens", str(TEXT), *arguments])
    plan = latency.plan_of(parsed)
    models = latency.Models(plan, plan.config, latency.RandomWeights(plan.dtype, plan.device))
    for name in ["stock"] if arguments else latency.MODEL_CLASSES:  # the others may compact of their own accord
        seen: list[tuple[int, ...]] = []
        lm_head = models.models[name].lm_head
        lm_head.register_forward_hook(lambda module, given, made, seen=seen: seen.append(given[0].stride()))
        models.run(latency.Row(name, FULL), models.inputs(1), 2)
        assert seen == [strides, (64, 64, 1)]


@pytest.mark.parametrize(("arguments", "appending"), [([], 0), (["--as-is"], 1)])
def test_ours_appends_tokens_only_when_left_as_it_is(
    latency: ModuleType, arguments: list[str], appending: int
) -> None:
    plan = latency.plan_of(latency.parse_arguments(["--quick", "--dtype", "bfloat16", *arguments]))
    models = latency.Models(plan, plan.config, latency.RandomWeights(plan.dtype, plan.device)).models
    hooks = latency.transformer_of(models["ours"].model.vision_tower).embeddings._forward_hooks.values()
    assert [hook.__name__ for hook in hooks] == ["pad_slow_rows"] * appending


@pytest.mark.parametrize("kept", [33, 16, 7, 1])
def test_the_peer_selects_by_the_specification(latency: ModuleType, weights: Any, kept: int) -> None:
    peer = weights.model(latency.MODEL_CLASSES["peer"], latency.load_geometry("tiny"))
    generator = torch.Generator().manual_seed(kept)
    features = torch.randint(0, 2, (3, 48, 64), generator=generator).float() * 2 - 1
    saliency = torch.randint(0, 16, (3, 48), generator=generator).float()
    expected = [vispruner_oracle(f.tolist(), s.tolist(), kept, 0.5) for f, s in zip(features, saliency, strict=True)]
    assert peer.model.selection(features, saliency, kept).tolist() == expected


def test_live_bytes_are_counted_once_and_given_back() -> None:
    from stages import TensorMemory

    with TensorMemory() as memory:
        first = torch.zeros(256)
        view = first[:128].view(2, 64).add_(1)
        assert memory.held == memory.highest == 1024
        second = first + 1
        del first
        assert memory.held == 2048 and view.shape == (2, 64)
        del view
        assert (memory.held, memory.highest) == (1024, 2048)
        memory.start_peak()
        assert memory.highest == 1024 == second.nbytes


class HostEvent:
    """Stands in for a CUDA event: reading it is only allowed after `torch.cuda.synchronize`."""

    synchronized = False

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        HostEvent.synchronized = False
        self.time = time.perf_counter()

    def elapsed_time(self, later: HostEvent) -> float:
        assert HostEvent.synchronized
        return 1e3 * (later.time - self.time)


def test_on_cuda_stages_are_events_read_when_the_device_is_done(
    latency: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA branches with a pretended device, whose memory rises by a byte at every look."""
    looks = itertools.count()
    monkeypatch.setattr(sys.modules["stages"], "on_cuda", lambda device: True)
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(HostEvent, "synchronized", True))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(looks))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000 + next(looks))
    resets: list[int] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(next(looks)))
    plan = latency.plan_of(latency.parse_arguments(["--quick", "--text-tokens", str(TEXT)]))
    models = latency.Models(plan, plan.config, latency.RandomWeights(plan.dtype, plan.device))
    seen = models.run(latency.Row("ours", 16), models.inputs(1), 3, memory=True)
    assert all(seconds > 0 for seconds in seen.stages.values()) and sum(seen.stages.values()) == pytest.approx(
        seen.ttft
    )
    assert {"vision", "select", "project", "language", "logits"} < seen.peak.keys()
    assert (
        all(1000 < peak < 1100 for peak in seen.peak.values()) and len(resets) == 1 + 3 + 2 * 3
    )  # stages, three tokens


@pytest.mark.core
def test_a_model_that_does_not_prune_is_refused(
    latency: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(latency.MODEL_CLASSES["ours"], "set_vispruner_config", lambda self, **changes: None)
    assert latency.main(["--quick", "--rounds", "1", "--budgets", "16"]) == 2
    assert "ours at 16 tokens" in capsys.readouterr().err


@pytest.mark.core
def test_a_peer_that_selects_otherwise_is_refused(
    latency: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = lambda self, features, attention, kept: torch.arange(kept).expand(len(features), -1)  # noqa: E731
    monkeypatch.setattr(sys.modules["peer"].PerRound, "forward", first)
    assert latency.main(["--quick", "--rounds", "1", "--budgets", "16", "--batches", "1"]) == 2
    assert "keep different tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--batches", "0"], "DEPTH_DIVISOR"),
        (["--new-tokens", "1"], "--new-tokens"),
        (["--out", "no/such/folder"], "no/such/folder"),
        (["--text-tokens", "1"], "--text-tokens"),
    ],
)
def test_wrong_arguments_are_named(
    latency: ModuleType, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        latency.main(arguments)
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--methods", "--budgets", "64"], "--methods"),
        (["--budgets", "65"], "--budgets"),
        (["--device", "xpu"], "--device"),
        (["--geometry", "no.json"], "no.json"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    latency: ModuleType, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert latency.main(["--quick", *arguments]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.core
def test_a_method_in_the_language_model_is_timed_at_equal_cache(latency: ModuleType, tmp_path: Path) -> None:
    arguments = ["--quick", "--methods", "vispruner", "fastv", "--budgets", "32", "--batches", "1", "--rounds", "1"]
    assert latency.main([*arguments, "--no-memory", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("latency-methods-decoder-*.json")
    rows = {row["method"]: row for row in json.loads(file.read_text())["settings"][0]["rows"]}
    assert rows["fastv"]["held_by_layer"] == [64] + [27] * 7 and rows["vispruner"]["held_by_layer"] == [32] * 8
    assert 0.98 * rows["vispruner"]["kv_bytes"] < rows["fastv"]["kv_bytes"] <= rows["vispruner"]["kv_bytes"]
    assert rows["fastv"]["seconds"]["e2e"]["median"] > 0 and rows["fastv"]["peak_bytes"] == {}
    assert latency.main(["--quick", "--no-memory"]) == 2
