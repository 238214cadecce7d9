"""Every form of duplicate removal chooses the same tokens: the CPU's two, tensor operations, and the GPU's kernels.

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
from drawn_inputs import FLOATS, RECORDED_CASES, SIZES, exact_images, oracle, random_images
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vispruner import duplicate_removal, duplicate_removal_triton, similarity
from vispruner.duplicate_removal import drops_of_rounds, slots_left
from vispruner.selectors import ENCODER_METHODS
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


@pytest.mark.core
@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    left=st.integers(2, 60),
    drop=st.integers(1, 60),
    step=st.integers(1, 12),
    levels=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_the_loop_takes_the_decisions_of_the_tensor_operations_in_the_same_order(left, drop, step, levels, seed):
    """On one matrix and on several; few levels mean that nearly every decision is a tie."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(-levels, levels + 1, (3, left, left), generator=generator).float()
    cosine = half.triu() + half.triu(1).mT
    drops = drops_of_rounds(left, max(1, left - drop), step)
    expected = by_tensors(cosine, drops)
    assert duplicate_removal.slots_left_on_cpu(cosine[0].numpy(), drops).tolist() == expected[0].tolist()
    assert duplicate_removal.slots_left_in_several(cosine.numpy(), drops).tolist() == expected.tolist()


def by_tensors(cosine, drops):
    return slots_left(duplicate_removal._compare_in(cosine), torch.empty(cosine.shape[:2]), drops)


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


# Lists of the most alike, on a CPU for many tokens


@pytest.fixture
def by_lists(monkeypatch):
    """Run what large images get, with limits so low that small ones meet every case of it."""

    def set_limits(candidates=4, few=2, fewest_rows=2, block=64):
        monkeypatch.setattr(duplicate_removal, "MOST_IN_A_MATRIX", 0)
        monkeypatch.setattr(duplicate_removal, "CANDIDATES", candidates)
        monkeypatch.setattr(duplicate_removal, "FEW", few)
        monkeypatch.setattr(duplicate_removal, "FEWEST_ROWS", fewest_rows)
        monkeypatch.setattr(duplicate_removal, "BLOCK", block)

    set_limits()
    return set_limits


@pytest.mark.parametrize("important_ratio", [0, 0.3, 0.5])
@pytest.mark.parametrize("tokens", SIZES)
def test_lists_give_what_the_oracle_gives_for_every_budget(by_lists, tokens, important_ratio):
    features, saliency = exact_images(2, tokens, seed=tokens)
    for budget in range(1, tokens + 2):
        kept = select_vispruner(features, saliency, budget, important_ratio)
        assert torch.equal(kept, oracle(features, saliency, budget, important_ratio)), budget


@pytest.mark.core
@pytest.mark.parametrize("candidates", [1, 2, 3, 5, 8, 64])
def test_lists_of_any_length_give_what_the_oracle_gives(by_lists, candidates):
    for seed, (tokens, budget, step, channels) in enumerate(
        [(60, 4, 1, 4), (60, 9, 8, 16), (75, 12, 3, 4), (50, 48, 8, 16), (90, 30, 7, 64), (41, 2, 100, 4)] * 3
    ):
        by_lists(candidates, few=candidates // 2, block=64 * (1 + seed % 3))
        features, saliency = exact_images(1, tokens, channels, seed=seed)
        expected = oracle(features, saliency, budget, 0.3, step)
        assert torch.equal(select_vispruner(features, saliency, budget, 0.3, step), expected), seed


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    tokens=st.integers(2, 60),
    budget=st.integers(1, 60),
    candidates=st.integers(1, 8),
    step=st.integers(1, 12),
    channels=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 1000),
)
def test_lists_take_the_decisions_of_a_matrix(tokens, budget, candidates, step, channels, seed):
    """With one channel every cosine is -1, 0 or 1, as in a picture of one colour."""
    features, saliency = exact_images(1, tokens, channels, seed=seed)
    expected = select_vispruner(features, saliency, budget, 0.2, step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicate_removal, "MOST_IN_A_MATRIX", 0)
        patch.setattr(duplicate_removal, "CANDIDATES", candidates)
        patch.setattr(duplicate_removal, "FEW", candidates // 2)
        assert torch.equal(select_vispruner(features, saliency, budget, 0.2, step), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_lists_take_the_decisions_of_a_matrix_on_whole_images(monkeypatch, dtype):
    features, saliency = exact_images(2, 1024, channels=64, levels=99, dtype=dtype)
    expected = select_vispruner(features, saliency, 256)
    monkeypatch.setattr(duplicate_removal, "MOST_IN_A_MATRIX", 0)
    assert torch.equal(select_vispruner(features, saliency, 256), expected)


def alike_images(kind, tokens, channels=16):
    """One image without structure, of a few things each seen many times, of one colour, or nearly so."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, tokens, channels, generator=generator)
    things = torch.randn(1, tokens // 100, channels, generator=generator)
    which = torch.randint(0, tokens // 100, (tokens,), generator=generator)
    features = {
        "random": features,
        "clusters": things[:, which] + 0.1 * features,
        "copies": things[:, which],
        "one colour": torch.ones_like(features),
        "nearly one colour": 1 + 1e-6 * features,
    }[kind]
    return features, torch.rand(1, tokens, generator=generator)


@pytest.mark.parametrize("kind", ["random", "clusters", "copies", "one colour", "nearly one colour"])
@pytest.mark.parametrize("step", [8, None])
def test_lists_compare_little_more_than_all_pairs_once(monkeypatch, kind, step):
    features, saliency = alike_images(kind, 4000)
    pairs = 0

    def counted(rows, others):
        nonlocal pairs
        pairs += len(rows) * len(others)
        return similarity.cosines(rows, others)

    monkeypatch.setattr(duplicate_removal, "cosines", counted)
    kept = select_vispruner(features, saliency, 1000, dedup_step=step)
    residual = 4000 - 500
    assert residual**2 <= pairs <= 1.25 * residual**2
    assert kept.shape == (1, 1000)


def test_lists_hold_no_matrix():
    features, saliency = alike_images("random", 6000)
    counted = operations(features, saliency, 1500)
    residual = 6000 - 750
    assert counted.largest <= duplicate_removal.BLOCK * 4 < residual**2 * 4 / 6


@pytest.mark.parametrize(
    "tokens, step", [(64, 8), (576, 8), (1024, 8), (1225, 8), (2047, 8), (2048, 16), (16384, 128)]
)
def test_the_step_grows_with_the_image_beyond_what_the_paper_used(tokens, step):
    """CogVLM's 1,225 tokens are the most that the paper reports."""
    assert duplicate_removal.default_step(tokens) == step


@pytest.mark.core
def test_no_image_takes_more_than_256_rounds():
    for tokens in range(1, 40000, 7):
        assert len(drops_of_rounds(tokens, 1, duplicate_removal.default_step(tokens))) <= 256 + 5
        assert len(drops_of_rounds(tokens, tokens // 4 + 1, duplicate_removal.default_step(tokens))) <= 256


@pytest.mark.parametrize("tokens, step", [(100, 8), (2100, 16)])
def test_without_a_step_the_default_one_is_taken(tokens, step):
    features, saliency = exact_images(1, tokens)
    kept = select_vispruner(features, saliency, tokens // 4)
    assert torch.equal(kept, select_vispruner(features, saliency, tokens // 4, dedup_step=step))
    assert not torch.equal(kept, select_vispruner(features, saliency, tokens // 4, dedup_step=2 * step))


# What all forms are built on


@pytest.mark.parametrize("form", ["matrix", "compared again"])
def test_tensor_operations_go_on_where_no_matrix_may_be_held(monkeypatch, tensor_form, form):
    """A matrix for two images at a time, or none; compared again in blocks of a few rows."""
    monkeypatch.setattr(similarity, "MATRIX", 2 * 90**2 if form == "matrix" else 0)
    monkeypatch.setattr(duplicate_removal, "BLOCK", 100)
    features, saliency = exact_images(5, 100)
    assert torch.equal(select_vispruner(features, saliency, 20), oracle(features, saliency, 20))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 2, 127, 128, 129, 300])
def test_multiplying_one_half_fills_the_whole_matrix(rows, dtype):
    unit = exact_images(2, rows, channels=64, dtype=dtype)[0]
    for images in (1, 2):
        out = torch.full((images, rows, rows), float("nan"), dtype=dtype)
        similarity.fill_with_cosines(unit[:images], out)
        assert torch.equal(out, unit[:images] @ unit[:images].mT)


@pytest.mark.parametrize("left, keep, step", [(10, 9, 8), (544, 32, 8), (7, 1, 100), (5, 5, 3)])
def test_the_rounds_are_known_before_any_token_is_compared(left, keep, step):
    drops = drops_of_rounds(left, keep, step)
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
from vispruner import duplicate_removal
from vispruner.token_selection import select_vispruner
from drawn_inputs import exact_images, random_images
torch.set_num_threads(1)
duplicate_removal.kernel_can_run = lambda device: True

for most, tokens, budget, ratio, step, dtype, kind in json.loads(sys.argv[1]):
    duplicate_removal.MOST_IN_ONE_KERNEL = most
    images = random_images if kind == "generic" else exact_images
    features, saliency = images(2, tokens, seed=budget, dtype=getattr(torch, dtype))
    kept = select_vispruner(features, saliency, budget, ratio, step)
    print(json.dumps([kept.dtype == torch.int64, kept.tolist()]))
"""

ONE_LAUNCH, TWO_A_ROUND = 1024, 0

INTERPRETED = [
    (most, tokens, budget, ratio, step, "float32", "exact")
    for most in (ONE_LAUNCH, TWO_A_ROUND)
    for tokens in (2, 3, 5, 16, 33)
    for budget in sorted({1, 2, tokens // 2, tokens - 1} & set(range(1, tokens)))
    for ratio in (0.0, 0.5, 0.9)
    for step in (1, 8)
    if int(budget * ratio) < budget
] + [
    (most, *case)
    for most in (ONE_LAUNCH, TWO_A_ROUND)
    for case in (
        (100, 17, 0.5, 8, "float16", "exact"),
        (100, 57, 0.3, 3, "bfloat16", "exact"),
        (81, 9, 0.5, 1000, "float64", "exact"),
        (100, 16, 0.5, 8, "float64", "generic"),
    )
]


def run_worker(script: str, argument: str, **environment: str) -> list[str]:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", script, argument]
    variables = os.environ | {"PYTHONPATH": path} | environment
    run = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.mark.triton
@needs_interpreter
@pytest.mark.parametrize(
    "cases", [pytest.param(INTERPRETED, marks=pytest.mark.slow, id="all"), pytest.param(INTERPRETED[3::7], id="few")]
)
def test_the_kernels_give_what_the_oracle_gives(cases):
    """Every seventh, which are some of either form, are the few that CI has the time for."""
    lines = run_worker(WORKER, json.dumps(cases), TRITON_INTERPRET="1")
    assert len(lines) == len(cases) >= 18
    for (most, tokens, budget, ratio, step, dtype, kind), line in zip(cases, lines, strict=True):
        images = random_images if kind == "generic" else exact_images
        features, saliency = images(2, tokens, seed=budget, dtype=getattr(torch, dtype))
        is_int64, kept = json.loads(line)
        assert is_int64
        expected = oracle(features, saliency, budget, ratio, step).tolist()
        assert kept == expected, (most, tokens, budget, ratio, step, dtype)


@pytest.mark.slow
@needs_interpreter
@pytest.mark.parametrize("most, step", [(ONE_LAUNCH, 8), (TWO_A_ROUND, 32)])
@pytest.mark.parametrize("tokens, budget, dtype", [(576, 64, "float64"), (577, 128, "float64")])
def test_the_kernels_give_the_cpus_tokens_on_whole_images(tokens, budget, dtype, most, step):
    """Blocks of one kernel hold fewer tokens than these images have. Interpreted, more rounds would take minutes."""
    case = (most, tokens, budget, 0.5, step, dtype, "generic")
    (line,) = run_worker(WORKER, json.dumps([case]), TRITON_INTERPRET="1")
    features, saliency = random_images(2, tokens, seed=budget, dtype=getattr(torch, dtype))
    assert json.loads(line)[1] == select_vispruner(features, saliency, budget, dedup_step=step).tolist()


REPLAY = """
import json, sys
import torch
from safetensors.torch import load_file
from drawn_inputs import RECORDED, RECORDED_CASES
from vispruner import duplicate_removal
from vispruner.token_selection import select_vispruner
torch.set_num_threads(1)
duplicate_removal.kernel_can_run = lambda device: sys.argv[1] == "one kernel"
duplicate_removal.MOST_IN_A_MATRIX = 0 if sys.argv[1] == "lists" else 2048
if sys.argv[1] == "tensors":
    torch.compiler.is_compiling = lambda: True
tensors = load_file(RECORDED)
for name, case in RECORDED_CASES.items():
    features, attention = tensors[name + ".features"][None], tensors[name + ".cls_attention"][None]
    if case["kind"] == "smooth":
        features = features.mT.contiguous().mT
    kept = select_vispruner(features, attention.mean(1), case["visual_token_num"], case["important_ratio"])
    print(name, kept[0].tolist() == tensors[name + ".kept"].tolist())
"""


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="the recorded rounding needs MKL")
@pytest.mark.parametrize(
    "form",
    ["lists", "tensors", pytest.param("one kernel", marks=[needs_interpreter, pytest.mark.slow])],
)
def test_the_authors_selection_is_reproduced_by_every_form(form):
    """The CPU's matrix is held to it in test_token_selection.py, which says what the rounding depends on."""
    environment = {"MKL_CBWR": "COMPATIBLE", "TRITON_INTERPRET": "1"}
    assert run_worker(REPLAY, form, **environment) == [f"{name} True" for name in RECORDED_CASES]


COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vispruner import duplicate_removal_triton

KERNELS = {
    "_keep_kernel": ({"BLOCK": 1024, "ROWS": 16}, 16),
    "_compare_kernel": ({"ROWS": 4, "BLOCK": 512}, 4),
    "_drop_kernel": ({"BLOCK": 64, "RIVALS": 128}, 4),
}
for capability, dtype in json.loads(sys.argv[1]):
    wide = dtype == "fp64"
    types = {"cosine": "*" + dtype, "order": "*i64", "slots": "*i32", "next_slots": "*i32", "kept": "*i64"}
    types |= {"is_b": "*i8", "duplication": "*fp64" if wide else "*fp32"}
    for kernel, (constants, warps) in KERNELS.items():
        function = getattr(duplicate_removal_triton, kernel)
        constants = {"WIDE": wide} | constants if "WIDE" in function.arg_names else constants
        known = types | dict.fromkeys(constants, "constexpr")
        source = ASTSource(function, {name: known.get(name, "i32") for name in function.arg_names}, constants)
        target = GPUTarget("cuda", capability, 32)
        built = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": 1})
        ptx = built.asm["ptx"]
        size, barriers = len(built.asm["cubin"]), ptx.count("bar.sync")
        print(json.dumps([kernel, size, f"sm_{capability}" in ptx, barriers, ".local" in ptx]))
"""


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_ahead_for_data_centre_gpus(capability, tmp_path):
    types = ["fp16", "bf16", "fp32", "fp64"]
    cases = json.dumps([(capability, dtype) for dtype in types])
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    lines = [json.loads(line) for line in run_worker(COMPILE, cases, **environment)]
    assert len(lines) == 3 * len(types)
    for kernel, machine_code, for_this_target, barriers, spills in lines:
        assert machine_code > 1000 and for_this_target
        assert not spills, "a round stays in registers"
        if kernel == "_keep_kernel":
            assert barriers == 4, "one before the rounds, three in each: no step reads what another has not finished"


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


@pytest.mark.core
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


@pytest.mark.parametrize("batch, most", [(1, 110), (16, 1500)])
def test_the_cpu_dispatches_as_many_operations_however_many_rounds(batch, most):
    features, saliency = random_images(batch, 576, channels=32, dtype=torch.float32)
    counts = {step: operations(features, saliency, 64, dedup_step=step).seen for step in (1, 8, 1000)}
    rounds = {step: len(drops_of_rounds(544, 32, step)) for step in counts}
    assert rounds == {1: 512, 8: 64, 1000: 5}
    assert counts[1] == counts[8] == counts[1000]
    assert counts[8].total() <= most


def test_each_further_image_costs_the_cpu_the_same_operations_and_no_larger_tensor():
    counted = [operations(*random_images(batch, 576, channels=1024), 64) for batch in (2, 3, 4)]
    totals = [count.seen.total() for count in counted]
    assert totals[2] - totals[1] == totals[1] - totals[0]
    residual_rows = 544 * 1024 * 8
    assert [count.largest for count in counted] == [residual_rows] * 3


@pytest.mark.parametrize("tokens, in_a_group", [(49, 141), (196, 8), (256, 5)])
def test_many_small_images_cost_the_cpu_the_operations_of_a_few(tokens, in_a_group):
    """One pass over the rounds serves as many as fit into its cache."""
    assert duplicate_removal.IN_CACHE // (tokens - tokens // 8) ** 2 == in_a_group
    totals = {
        batch: operations(*random_images(batch, tokens, channels=8), tokens // 4).seen.total()
        for batch in (2, in_a_group, 2 * in_a_group)
    }
    assert totals[in_a_group] == totals[2] <= 110
    assert totals[2 * in_a_group] <= 2 * totals[2]


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
    rounds = [len(drops_of_rounds(100 - budget // 2, budget - budget // 2, 8)) for budget in (60, 44)]
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

    monkeypatch.setattr(duplicate_removal, "kernel_can_run", lambda device: True)
    monkeypatch.setattr(duplicate_removal, "keep_in_one_kernel", one_launch)
    counted = operations(*exact_images(batch, 576), 64)
    assert asked == [((batch, 544, 544), (batch, 576), 32, 64, 8)]
    assert set(counted.seen) <= set(LAUNCHES), set(counted.seen) - set(LAUNCHES)
    assert sum(LAUNCHES[name] * count for name, count in counted.seen.items()) + 1 <= 15


# The benchmark


@pytest.mark.core
def test_the_benchmark_times_every_method(tmp_path):
    benchmark = str(Path(__file__).parent.parent / "benchmarks" / "selection.py")
    out = tmp_path / "methods.json"
    sizes = ["--tokens", "64", "--channels", "32", "--width", "48", "--budgets", "16", "--repeats", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, benchmark, "--methods", *sizes, "--json", str(out)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = {row["method"]: row for row in json.loads(out.read_text())["methods"]}
    assert rows.keys() == set(ENCODER_METHODS)
    assert all(row["milliseconds"]["median"] > 0 and row["operations"] > 2 for row in rows.values())
    assert rows["cls_attention"]["operations"] < rows["hiprune"]["operations"] < rows["divprune"]["operations"]


@pytest.mark.core
def test_the_benchmark_measures_forms_that_choose_alike(tmp_path):
    benchmark = str(Path(__file__).parent.parent / "benchmarks" / "selection.py")
    out = tmp_path / "selection.json"
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


@pytest.mark.core
def test_the_benchmark_times_an_earlier_version_beside_this_one(tmp_path):
    """Of a folder with the files of this one: the same tokens. Of one that keeps others: nothing is timed."""
    tests = Path(__file__).parent
    benchmark, files = str(tests.parent / "benchmarks" / "selection.py"), tests.parent / "modeling"
    sizes = ["--tokens", "64", "--channels", "32", "--budgets", "16", "--batches", "1", "3", "--repeats", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def run(folder):
        command = [sys.executable, benchmark, *sizes, "--against", str(folder), "--json", str(tmp_path / "out.json")]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    same = run(files)
    assert same.returncode == 0, same.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["against"]
    assert [(row["batch"], row["visual_token_num"]) for row in rows] == [(1, 16), (3, 16)]
    assert all(row["milliseconds"].keys() == {"earlier", "ours"} and row["ratio"]["median"] > 0 for row in rows)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "token_selection.py").write_text(
        "import torch\n\ndef select_vispruner(features, saliency, number, dedup_step):\n"
        "    return torch.arange(number).repeat(len(saliency), 1)\n"
    )
    assert "chose different tokens" in run(tmp_path / "other").stderr
    assert "takes the folder of token_selection.py" in run(tmp_path).stderr


def test_choosing_among_576_tokens_is_no_slower_than_before_large_pictures_were_thought_of():
    """One thread, 151 runs in turn: ours to the code of the commit that the record names."""
    recorded = json.loads(
        (Path(__file__).parent.parent / "benchmarks" / "results" / "selection-against.json").read_text()
    )
    rows = {(row["batch"], row["visual_token_num"]): row["ratio"] for row in recorded["against"]}
    assert set(rows) == {(batch, budget) for batch in (1, 8) for budget in (64, 144, 192)}
    assert recorded["settings"]["tokens"] == 576 and recorded["machine"]["threads"] == 1
    assert max(ratio["median"] for ratio in rows.values()) <= 1
    text = (Path(__file__).parent.parent / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for (batch, budget), ratio in rows.items():
        middle = f"{ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f}"
        assert f"| {batch} | {budget} | {ratio['median']:.3f} ({middle}) |" in text


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
    monkeypatch.setattr(duplicate_removal, "kernel_can_run", lambda device: False)
    assert torch.equal(kept, select_vispruner(features, saliency, budget))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [True, False])
def test_on_a_gpu_selection_is_captured_in_a_graph_and_replayed(monkeypatch, on_gpu, kernel):
    monkeypatch.setattr(duplicate_removal, "kernel_can_run", lambda device: kernel)
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
