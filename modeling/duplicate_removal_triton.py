"""The rounds of duplicate removal on a GPU, from the matrix of cosines on; the host reads nothing back.

Up to `MOST_IN_ONE_KERNEL` tokens all rounds of an image are one program of one launch. More would keep a single
multiprocessor busy for long, so there each round is two launches that use the whole GPU: compare, then drop and split.
Both give what duplicate_removal.py gives with tensor operations. Sorting is ranking by counting: the rank of an
element is the number of those ahead of it, earlier ones among equals included.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


MOST_IN_ONE_KERNEL = 1024


def kernel_can_run(device: torch.device) -> bool:
    """True on a GPU where Triton is installed with the compiler and the headers that it builds its launcher with."""
    return device.type == "cuda" and triton is not None and _LAUNCHER_CAN_BE_BUILT


_LAUNCHER_CAN_BE_BUILT = (
    any(os.environ.get("CC") or shutil.which(name) for name in ("clang", "gcc"))
    and Path(sysconfig.get_path("include"), "Python.h").is_file()
)


def keep_in_one_kernel(
    cosine: torch.Tensor, order: torch.Tensor, important_num: int, budget: int, step: int
) -> torch.Tensor:
    """Keep the first tokens of `order` and what duplicate removal leaves of the rest.

    cosine   (B, R, R)  similarities of the last R tokens of `order`
    order    (B, N)     tokens, most attended first
    returns  (B, T)     kept indices, ascending; T = budget
    """
    batch, tokens = order.shape
    cosine, order = cosine.contiguous(), order.contiguous()
    wide = cosine.dtype == torch.float64
    slots = order.new_empty((batch, cosine.shape[-1]), dtype=torch.int32)
    duplication = cosine.new_empty(slots.shape, dtype=torch.float64 if wide else torch.float32)
    kept = order.new_empty((batch, budget))
    block = triton.next_power_of_2(tokens)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(cosine):
        _keep_kernel[(batch,)](
            cosine,
            order,
            slots,
            duplication,
            kept,
            tokens,
            important_num,
            budget,
            step,
            WIDE=wide,
            BLOCK=block,
            ROWS=max(1, 16384 // block),
            num_warps=16,
            num_stages=1,
        )
    return kept


def slots_left_by_kernels(cosine: torch.Tensor, drops: list[int]) -> torch.Tensor:
    """Run the rounds, two launches each: (B, R, R) -> the places of the tokens left, (B, R - sum(drops)) int64."""
    batch, residual = cosine.shape[:2]
    cosine = cosine.contiguous()
    wide = cosine.dtype == torch.float64
    slots = torch.arange(residual, dtype=torch.int32, device=cosine.device).repeat(batch, 1)
    others = torch.empty_like(slots)
    is_b = (slots % 2).to(torch.int8)
    duplication = cosine.new_empty((batch, (residual + 1) // 2), dtype=torch.float64 if wide else torch.float32)
    left = residual
    with torch.cuda.device_of(cosine):
        for drop in drops:
            a_num = (left + 1) // 2
            _compare_kernel[(triton.cdiv(a_num, 4), batch)](
                cosine, slots, is_b, duplication, residual, a_num, WIDE=wide, ROWS=4, BLOCK=512, num_warps=4
            )
            _drop_kernel[(triton.cdiv(a_num, 64), batch)](
                slots, duplication, others, is_b, residual, left, drop, BLOCK=64, RIVALS=128, num_warps=4
            )
            slots, others = others, slots
            left -= drop
    return slots[:, :left].long()


if triton is not None:
    # Left unspecialised, no budget or number of tokens compiles the kernel anew.
    @triton.jit(do_not_specialize=["tokens", "important_num", "budget", "step"])
    def _keep_kernel(  # type: ignore[no-untyped-def]
        cosine,
        order,
        slots,
        duplication,
        kept,
        tokens,
        important_num,
        budget,
        step,
        WIDE: tl.constexpr,
        BLOCK: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        residual = tokens - important_num
        image = tl.program_id(0).to(tl.int64)
        cosine += image * residual * residual
        order += image * tokens
        slots += image * residual
        duplication += image * residual
        kept += image * budget
        place = tl.arange(0, BLOCK)
        row = tl.arange(0, ROWS)
        value_type: tl.constexpr = tl.float64 if WIDE else tl.float32

        tl.store(slots + place, place, mask=place < residual)
        tl.debug_barrier()
        left = residual
        while left > budget - important_num:
            drop = tl.minimum(tl.minimum(step, left - (budget - important_num)), (left + 1) // 2)
            a_num = (left + 1) // 2
            b_num = left // 2
            # The matrix is symmetric, so the best of the b's for every column is read in whole rows.
            best = tl.full([BLOCK], float("-inf"), value_type)
            for start in range(0, b_num, ROWS):
                valid = start + row < b_num
                b = tl.load(slots + 2 * (start + row) + 1, mask=valid, other=0)
                here = valid[:, None] & (place < residual)[None, :]
                tile = tl.load(cosine + b[:, None] * residual + place[None, :], mask=here, other=float("-inf"))
                best = tl.maximum(best, tl.max(tile.to(value_type), axis=0))
            tl.store(duplication + place, best, mask=place < residual)
            tl.debug_barrier()
            a = tl.load(slots + 2 * place, mask=place < a_num, other=0)
            spared = tl.load(slots + 2 * place + 1, mask=place < b_num, other=0)
            mine = tl.load(duplication + a, mask=place < a_num, other=float("-inf"))
            rank = tl.zeros([BLOCK], tl.int32)
            for start in range(0, a_num, ROWS):
                rival_place = start + row
                rival = tl.load(slots + 2 * rival_place, mask=rival_place < a_num, other=0)
                theirs = tl.load(duplication + rival, mask=rival_place < a_num, other=float("-inf"))
                more = theirs[:, None] > mine[None, :]
                equal_but_earlier = (theirs[:, None] == mine[None, :]) & (rival_place[:, None] < place[None, :])
                ahead = (more | equal_but_earlier) & (rival_place < a_num)[:, None]
                rank += tl.sum(ahead.to(tl.int32), axis=0)
            tl.debug_barrier()
            tl.store(slots + rank - drop, a, mask=(place < a_num) & (rank >= drop))
            tl.store(slots + a_num - drop + place, spared, mask=place < b_num)
            tl.debug_barrier()
            left -= drop

        diverse = (place >= important_num) & (place < budget)
        slot = tl.load(slots + place - important_num, mask=diverse, other=0)
        token = tl.load(order + tl.where(diverse, important_num + slot, place), mask=place < budget, other=0)
        smaller = tl.zeros([BLOCK], tl.int32)
        for start in range(0, budget, ROWS):
            kept_place = start + row
            kept_diverse = (kept_place >= important_num) & (kept_place < budget)
            kept_slot = tl.load(slots + kept_place - important_num, mask=kept_diverse, other=0)
            source = order + tl.where(kept_diverse, important_num + kept_slot, kept_place)
            kept_token = tl.load(source, mask=kept_place < budget, other=0)
            below = (kept_token[:, None] < token[None, :]) & (kept_place < budget)[:, None]
            smaller += tl.sum(below.to(tl.int32), axis=0)
        tl.store(kept + smaller, token, mask=place < budget)

    @triton.jit(do_not_specialize=["residual", "a_num"])
    def _compare_kernel(  # type: ignore[no-untyped-def]
        cosine,
        slots,
        is_b,
        duplication,
        residual,
        a_num,
        WIDE: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Find the highest cosine of some a's with any b: program (block of a's, image)."""
        value_type: tl.constexpr = tl.float64 if WIDE else tl.float32
        image = tl.program_id(1).to(tl.int64)
        is_b += image * residual
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        place = tl.arange(0, BLOCK)
        a = tl.load(slots + image * residual + 2 * row, mask=row < a_num, other=0)
        best = tl.full([ROWS, BLOCK], float("-inf"), value_type)
        for start in range(0, residual, BLOCK):
            here = start + place < residual
            on_other_side = tl.load(is_b + start + place, mask=here, other=0) != 0
            wanted = (row < a_num)[:, None] & on_other_side[None, :]
            at = (image * residual + a)[:, None] * residual + (start + place)[None, :]
            tile = tl.load(cosine + at, mask=wanted, other=float("-inf"))
            best = tl.maximum(best, tile.to(value_type))
        tl.store(duplication + image * ((residual + 1) // 2) + row, tl.max(best, axis=1), mask=row < a_num)

    @triton.jit(do_not_specialize=["residual", "left", "drop"])
    def _drop_kernel(  # type: ignore[no-untyped-def]
        slots,
        duplication,
        next_slots,
        is_b,
        residual,
        left,
        drop,
        BLOCK: tl.constexpr,
        RIVALS: tl.constexpr,
    ):
        """Rank some a's among all, and put those that are not dropped, and as many b's, where the next round looks."""
        image = tl.program_id(1).to(tl.int64)
        a_num = (left + 1) // 2
        b_num = left // 2
        slots += image * residual
        next_slots += image * residual
        is_b += image * residual
        duplication += image * ((residual + 1) // 2)
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        rival = tl.arange(0, RIVALS)
        mine = tl.load(duplication + place, mask=place < a_num, other=float("-inf"))
        rank = tl.zeros([BLOCK], tl.int32)
        for start in range(0, a_num, RIVALS):
            rival_place = start + rival
            theirs = tl.load(duplication + rival_place, mask=rival_place < a_num, other=float("-inf"))
            more = theirs[:, None] > mine[None, :]
            equal_but_earlier = (theirs[:, None] == mine[None, :]) & (rival_place[:, None] < place[None, :])
            ahead = (more | equal_but_earlier) & (rival_place < a_num)[:, None]
            rank += tl.sum(ahead.to(tl.int32), axis=0)
        a = tl.load(slots + 2 * place, mask=place < a_num, other=0)
        spared = tl.load(slots + 2 * place + 1, mask=place < b_num, other=0)
        stays = (place < a_num) & (rank >= drop)
        tl.store(next_slots + rank - drop, a, mask=stays)
        tl.store(is_b + a, ((rank - drop) % 2).to(tl.int8), mask=stays)
        tl.store(is_b + a, tl.zeros([BLOCK], tl.int8), mask=(place < a_num) & (rank < drop))
        moved = a_num - drop + place
        tl.store(next_slots + moved, spared, mask=place < b_num)
        tl.store(is_b + spared, (moved % 2).to(tl.int8), mask=place < b_num)
