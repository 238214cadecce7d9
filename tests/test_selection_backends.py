"""Every form of duplicate removal chooses the same tokens: the CPU's loop, tensor operations, and the GPU's kernel.

And what each costs where it can be counted rather than timed: operations, launches, bytes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_token_selection import FLOATS, RECORDED_CASES, SIZES, exact_images, oracle, random_images
from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vispruner import duplicate_removal_triton, token_selection
from vispruner.token_selection import select_vispruner

TRITON = importlib.util.find_spec("triton") is not None
NUMPY = tuple(int(part) for part in importlib.import_module("numpy").__version__.split(".")[:2])
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed")
needs_interpreter = pytest.mark.skipif(
    not TRITON or NUMPY >= (2, 4), reason="Triton's interpreter needs Triton and numpy < 2.4"
)


@pytest.fixture
def tensor_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what `torch.compile` would trace."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


class Operations(TorchDispatchMode):
    """Count the operations that reach the backend, and note the bytes of the largest tensor any of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen[function.name().removeprefix("aten::").partition(".")[0]] += 1
        given = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if is_tensor(tensor)}
        made = [tensor.untyped_storage() for tensor in tree_leaves(result) if is_tensor(tensor)]
        self.largest = max([self.largest, *[storage.nbytes() for storage in made if storage.data_ptr() not in given]])
        return result


def operations(*args, **options) -> Operations:
    with Operations() as counted:
        select_vispruner(*args, **options)
    return counted


# The same tokens


@pytest.mark.parametrize("important_ratio", [0, 0.3, 0.5, 1])
@pytest.mark.parametrize("tokens", SIZES)
def test_tensor_operations_give_what_the_oracle_gives_for_every_budget(tensor_form, tokens, important_ratio):
    features, saliency = exact_images(2, tokens, seed=tokens)
    for budget in range(1, tokens + 2):
        kept = select_vispruner(features, saliency, budget, important_ratio)
        assert torch.equal(kept, oracle(features, saliency, budget, important_ratio)), budget


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    left=st.integers(2, 60),
    drop=st.integers(1, 60),
    step=st.integers(1, 12),
    levels=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_the_loop_takes_the_decisions_of_the_tensor_operations_in_the_same_order(left, drop, step, levels, seed):
    """On one matrix; few levels mean that nearly every decision is a tie."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(-levels, levels + 1, (left, left), generator=generator).float()
    cosine = half.triu() + half.triu(1).T
    drops = token_selection._drops(left, max(1, left - drop), step)
    expected = token_selection._surviving_slots(cosine[None], drops)[0]
    assert token_selection._surviving_slots_on_cpu(cosine.numpy(), drops).tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens, budget", [(576, 128), (576, 33), (577, 64), (729, 58)])
def test_both_forms_agree_on_whole_images_whose_arithmetic_is_exact(monkeypatch, tokens, budget, dtype):
    features, saliency = exact_images(2, tokens, channels=64, seed=budget, levels=99, dtype=dtype)
    kept = select_vispruner(features, saliency, budget)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(kept, select_vispruner(features, saliency, budget))


@pytest.mark.parametrize("tokens, budget", [(576, 128), (576, 58), (729, 64)])
def test_both_forms_agree_on_whole_images_of_generic_features(monkeypatch, tokens, budget):
    features, saliency = random_images(2, tokens, channels=64, seed=budget)
    kept = select_vispruner(features, saliency, budget)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(kept, select_vispruner(features, saliency, budget))


@pytest.mark.parametrize("rows", [1, 2, 127, 128, 129, 300])
def test_multiplying_one_half_fills_the_whole_matrix(rows):
    unit = exact_images(1, rows, channels=64)[0][0]
    out = torch.full((rows, rows), float("nan"))
    token_selection._multiply_by_own_transpose(unit, out)
    assert torch.equal(out, unit @ unit.T)


@pytest.mark.parametrize("left, keep, step", [(10, 9, 8), (544, 32, 8), (7, 1, 100), (5, 5, 3)])
def test_the_rounds_are_known_before_any_token_is_compared(left, keep, step):
    drops = token_selection._drops(left, keep, step)
    assert left - sum(drops) == keep
    assert all(0 < drop <= step for drop in drops)
    for drop in drops:
        assert drop <= -(-left // 2)
        left -= drop


def test_inputs_that_are_views_are_neither_changed_nor_misread():
    features, saliency = exact_images(2, 49)
    wide = torch.stack([features, features * 0], dim=-1)
    transposed = features.mT.contiguous().mT
    expected = select_vispruner(features, saliency, 9)
    for view in (wide[..., 0], transposed):
        before = view.clone()
        assert torch.equal(select_vispruner(view, saliency, 9), expected)
        assert torch.equal(view, before)


# The kernel, in Triton's interpreter and compiled ahead

WORKER = """
import json, sys
import torch
from vispruner import duplicate_removal_triton, token_selection
from oracle import vispruner_oracle
from test_token_selection import exact_images, random_images
torch.set_num_threads(1)

def by_kernel(features, saliency, budget, ratio, step):
    order, important_num = token_selection._most_attended_first(saliency), int(budget * ratio)
    cosine = token_selection._cosine_matrix(features, token_selection._norms(features), order[:, important_num:])
    return duplicate_removal_triton.keep_in_one_kernel(cosine, order, important_num, budget, step)

for tokens, budget, ratio, step, dtype, kind in json.loads(sys.argv[1]):
    images = random_images if kind == "generic" else exact_images
    features, saliency = images(2, tokens, seed=budget, dtype=getattr(torch, dtype))
    kept = by_kernel(features, saliency, budget, ratio, step)
    print(json.dumps([kept.dtype == torch.int64, kept.tolist()]))
"""

INTERPRETED = [
    (tokens, budget, ratio, step, "float32", "exact")
    for tokens in (2, 3, 5, 16, 33)
    for budget in sorted({1, 2, tokens // 2, tokens - 1} & set(range(1, tokens)))
    for ratio in (0.0, 0.5, 0.9)
    for step in (1, 8)
    if int(budget * ratio) < budget
] + [
    (100, 17, 0.5, 8, "float16", "exact"),
    (100, 57, 0.3, 3, "bfloat16", "exact"),
    (81, 9, 0.5, 1000, "float64", "exact"),
    (100, 16, 0.5, 8, "float64", "generic"),
]


def run_worker(script: str, argument: str, **environment: str) -> list[str]:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", script, argument]
    variables = os.environ | {"PYTHONPATH": path} | environment
    run = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@needs_interpreter
def test_the_kernel_gives_what_the_oracle_gives():
    lines = run_worker(WORKER, json.dumps(INTERPRETED), TRITON_INTERPRET="1")
    assert len(lines) == len(INTERPRETED) > 60
    for (tokens, budget, ratio, step, dtype, kind), line in zip(INTERPRETED, lines, strict=True):
        images = random_images if kind == "generic" else exact_images
        features, saliency = images(2, tokens, seed=budget, dtype=getattr(torch, dtype))
        is_int64, kept = json.loads(line)
        assert is_int64
        assert kept == oracle(features, saliency, budget, ratio, step).tolist(), (tokens, budget, ratio, step, dtype)


@pytest.mark.slow
@needs_interpreter
@pytest.mark.parametrize("tokens, budget, dtype", [(576, 64, "float64"), (577, 128, "float64")])
def test_the_kernel_gives_the_loops_tokens_on_whole_images(tokens, budget, dtype):
    case = (tokens, budget, 0.5, 8, dtype, "generic")
    (line,) = run_worker(WORKER, json.dumps([case]), TRITON_INTERPRET="1")
    features, saliency = random_images(2, tokens, seed=budget, dtype=getattr(torch, dtype))
    assert json.loads(line)[1] == select_vispruner(features, saliency, budget).tolist()


REPLAY = """
import json, sys
import torch
from safetensors.torch import load_file
from test_token_selection import RECORDED, RECORDED_CASES
from vispruner import duplicate_removal_triton, token_selection
torch.set_num_threads(1)

def by_kernel(features, order, important_num, budget, step):
    cosine = token_selection._cosine_matrix(features, token_selection._norms(features), order[:, important_num:])
    return duplicate_removal_triton.keep_in_one_kernel(cosine, order, important_num, budget, step)

if sys.argv[1] == "kernel":
    token_selection._drop_duplicates = by_kernel
else:
    torch.compiler.is_compiling = lambda: True
tensors = load_file(RECORDED)
for name, case in RECORDED_CASES.items():
    features, attention = tensors[name + ".features"][None], tensors[name + ".cls_attention"][None]
    if case["kind"] == "smooth":
        features = features.mT.contiguous().mT
    budget, ratio = case["visual_token_num"], case["important_ratio"]
    kept = token_selection.select_vispruner(features, attention.mean(1), budget, ratio)
    print(name, kept[0].tolist() == tensors[name + ".kept"].tolist())
"""


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="the recorded rounding needs MKL")
@pytest.mark.parametrize("form", ["tensors", pytest.param("kernel", marks=[needs_interpreter, pytest.mark.slow])])
def test_the_authors_selection_is_reproduced_by_every_form(form):
    """The CPU's own form is held to it in test_token_selection.py, which says what the rounding depends on."""
    environment = {"MKL_CBWR": "COMPATIBLE", "TRITON_INTERPRET": "1"}
    assert run_worker(REPLAY, form, **environment) == [f"{name} True" for name in RECORDED_CASES]


COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vispruner.duplicate_removal_triton import _keep_kernel

for capability, dtype in json.loads(sys.argv[1]):
    wide = dtype == "fp64"
    signature = {"cosine": "*" + dtype, "order": "*i64", "slots": "*i32", "kept": "*i64"}
    signature["duplication"] = "*fp64" if wide else "*fp32"
    signature |= dict.fromkeys(["tokens", "important_num", "budget", "step"], "i32")
    constants = {"WIDE": wide, "BLOCK": 1024, "ROWS": 16}
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in _keep_kernel.arg_names}
    source = ASTSource(_keep_kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(source, target=target, options={"num_warps": 16, "num_stages": 1})
    ptx = built.asm["ptx"]
    print(json.dumps([len(built.asm["cubin"]), f"sm_{capability}" in ptx, ptx.count("bar.sync"), ".local" in ptx]))
"""


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_ahead_for_data_centre_gpus(capability, tmp_path):
    types = ["fp16", "bf16", "fp32", "fp64"]
    cases = json.dumps([(capability, dtype) for dtype in types])
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    lines = run_worker(COMPILE, cases, **environment)
    assert len(lines) == len(types)
    for line in lines:
        machine_code, for_this_target, barriers, spills = json.loads(line)
        assert machine_code > 1000 and for_this_target
        assert barriers == 4, "one before the rounds, three in each: no step reads what another has not finished"
        assert not spills, "the rounds stay in registers"


def test_the_kernel_is_for_gpus_with_triton_and_what_it_compiles_with(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(duplicate_removal_triton, "triton", object())
    monkeypatch.setattr(duplicate_removal_triton, "_LAUNCHER_CAN_BE_BUILT", True)
    assert duplicate_removal_triton.kernel_can_run(gpu) and not duplicate_removal_triton.kernel_can_run(cpu)
    monkeypatch.setattr(duplicate_removal_triton, "_LAUNCHER_CAN_BE_BUILT", False)
    assert not duplicate_removal_triton.kernel_can_run(gpu)
    monkeypatch.setattr(duplicate_removal_triton, "_LAUNCHER_CAN_BE_BUILT", True)
    monkeypatch.setattr(duplicate_removal_triton, "triton", None)
    assert not duplicate_removal_triton.kernel_can_run(gpu)


def test_selecting_works_where_triton_is_not_installed():
    script = """
import sys
sys.modules["triton"] = None
import torch
from vispruner import duplicate_removal_triton
from vispruner.token_selection import select_vispruner
print(duplicate_removal_triton.triton, select_vispruner(torch.eye(9)[None], torch.arange(9.0)[None], 3).tolist())
"""
    (line,) = run_worker(script, "")
    assert line.startswith("None [[")


# What can be counted


@pytest.mark.parametrize("batch, most", [(1, 90), (16, 1200)])
def test_the_cpu_dispatches_as_many_operations_however_many_rounds(batch, most):
    features, saliency = random_images(batch, 576, channels=32, dtype=torch.float32)
    counts = {step: operations(features, saliency, 64, dedup_step=step).seen for step in (1, 8, 1000)}
    rounds = {step: len(token_selection._drops(544, 32, step)) for step in counts}
    assert rounds == {1: 512, 8: 64, 1000: 5}
    assert counts[1] == counts[8] == counts[1000]
    assert counts[8].total() <= most


def test_each_further_image_costs_the_cpu_the_same_operations_and_no_larger_tensor():
    counted = [operations(*random_images(batch, 576, channels=1024), 64) for batch in (1, 2, 3)]
    totals = [count.seen.total() for count in counted]
    assert totals[2] - totals[1] == totals[1] - totals[0]
    residual_rows = 544 * 1024 * 8
    assert [count.largest for count in counted] == [residual_rows] * 3


WAITS_FOR_THE_DEVICE = {
    *["_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2"],
    *["_to_copy", "copy_", "lift_fresh", "repeat_interleave", "bincount"],
}


def test_tensor_operations_never_read_a_value_on_the_host(tensor_form):
    counted = operations(*exact_images(2, 100), 17)
    assert not WAITS_FOR_THE_DEVICE & set(counted.seen)
    assert counted.seen["_assert_async"] == 2, "NaN is still refused"


def test_the_cpus_form_would_be_caught_reading_values():
    assert "_local_scalar_dense" in operations(*exact_images(2, 100), 17).seen


@pytest.mark.parametrize("batch", [1, 16])
def test_a_round_of_tensor_operations_costs_the_same_whatever_the_batch(tensor_form, batch):
    counts = [operations(*exact_images(batch, 100), budget).seen.total() for budget in (60, 44)]
    rounds = [len(token_selection._drops(100 - budget // 2, budget - budget // 2, 8)) for budget in (60, 44)]
    assert rounds == [5, 7]
    assert counts[1] - counts[0] == 2 * 10


LAUNCHES = {
    **dict.fromkeys(["eq", "lt", "all", "linalg_vector_norm", "threshold", "div", "gather", "bmm"], 1),
    "sort": 3,  # numbers the elements, copies the values, sorts
    "_local_scalar_dense": 1,  # on a GPU: _assert_async
    **dict.fromkeys(["slice", "unsqueeze", "expand", "transpose", "detach", "view", "_unsafe_view", "empty"], 0),
}


@pytest.mark.parametrize("batch", [1, 16])
def test_a_gpu_is_given_at_most_fifteen_kernels(monkeypatch, batch):
    """Counted on a CPU: the operations before the kernel, each with the launches that torch's CUDA code needs."""
    asked = []

    def one_launch(cosine, order, important_num, budget, step):
        asked.append((cosine.shape, order.shape, important_num, budget, step))
        return order[:, :budget]

    monkeypatch.setattr(token_selection, "kernel_can_run", lambda device: True)
    monkeypatch.setattr(token_selection, "keep_in_one_kernel", one_launch)
    counted = operations(*exact_images(batch, 576), 64)
    assert asked == [((batch, 544, 544), (batch, 576), 32, 64, 8)]
    assert set(counted.seen) <= set(LAUNCHES), set(counted.seen) - set(LAUNCHES)
    assert sum(LAUNCHES[name] * count for name, count in counted.seen.items()) + 1 <= 15


# The benchmark


def test_the_benchmark_times_every_method(tmp_path):
    benchmark = str(Path(__file__).parent.parent / "benchmarks" / "selection.py")
    out = tmp_path / "methods.json"
    sizes = ["--tokens", "64", "--channels", "32", "--width", "48", "--budgets", "16", "--repeats", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, benchmark, "--methods", *sizes, "--json", str(out)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = {row["method"]: row for row in json.loads(out.read_text())["methods"]}
    assert rows.keys() == token_selection.SELECTORS.keys()
    assert all(row["milliseconds"]["median"] > 0 and row["operations"] > 2 for row in rows.values())
    assert rows["cls_attention"]["operations"] < rows["hiprune"]["operations"] < rows["divprune"]["operations"]


def test_the_benchmark_measures_forms_that_choose_alike(tmp_path):
    benchmark = str(Path(__file__).parent.parent / "benchmarks" / "selection.py")
    out = tmp_path / "results" / "selection.json"
    sizes = ["--tokens", "64", "--channels", "32", "--budgets", "16", "9", "--batches", "1", "3"]
    arguments = [benchmark, *sizes, "--repeats", "2", "--images", "1", "--stages", "--study", "--json", str(out)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    assert [(row["batch"], row["visual_token_num"]) for row in result["selection"]] == [
        (1, 16),
        (1, 9),
        (3, 16),
        (3, 9),
    ]
    assert all(row["same_tokens"] and row["ratio"]["median"] > 0 for row in result["selection"])
    assert len(result["stages"]) == len(result["study"]) == 2
    assert os.listdir(out.parent) == ["selection.json"]


def test_the_recorded_run_is_of_forms_that_choose_alike():
    recorded = json.loads((Path(__file__).parent.parent / "benchmarks" / "results" / "selection.json").read_text())
    rows = {(row["batch"], row["visual_token_num"]): row for row in recorded["selection"]}
    assert set(rows) == {(batch, budget) for batch in (1, 16) for budget in (128, 64, 32)}
    assert all(row["same_tokens"] for row in rows.values())
    assert all(row["half_product_equals_whole_bit_for_bit"] for row in recorded["stages"])


# On a GPU


@pytest.fixture
def on_gpu():
    return lambda *tensors: [tensor.cuda() for tensor in tensors]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens, budget", [(64, 16), (576, 128), (576, 33), (577, 64), (729, 58)])
def test_on_a_gpu_kernel_and_tensor_operations_agree(monkeypatch, on_gpu, tokens, budget, dtype):
    features, saliency = on_gpu(*random_images(5, tokens, channels=64, dtype=dtype))
    assert duplicate_removal_triton.kernel_can_run(features.device)
    kept = select_vispruner(features, saliency, budget)
    monkeypatch.setattr(token_selection, "kernel_can_run", lambda device: False)
    assert torch.equal(kept, select_vispruner(features, saliency, budget))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [True, False])
def test_on_a_gpu_selection_is_captured_in_a_graph_and_replayed(monkeypatch, on_gpu, kernel):
    monkeypatch.setattr(token_selection, "kernel_can_run", lambda device: kernel)
    features, saliency = on_gpu(*exact_images(2, 100))
    select_vispruner(features, saliency, 17)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = select_vispruner(features, saliency, 17)
    others = exact_images(2, 100, seed=1)
    features.copy_(others[0])
    saliency.copy_(others[1])
    graph.replay()
    assert kept.cpu().tolist() == oracle(*others, 17).tolist()


@pytest.mark.gpu
def test_on_a_gpu_at_most_fifteen_kernels_are_launched(on_gpu):
    features, saliency = on_gpu(*random_images(1, 576, channels=1024, dtype=torch.float16))
    select_vispruner(features, saliency, 64)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        select_vispruner(features, saliency, 64)
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(launched) <= 15, launched
