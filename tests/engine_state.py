"""What a vLLM engine holds at this moment, asked of its worker.

vLLM mixes the class below into its worker, and in its development mode calls a worker's methods for a
`POST /collective_rpc`. The engine has to run its worker in its own process: on the CPU, only where it is told to.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import Any

import torch
from vllm.v1.core.sched.interface import SchedulerInterface


class EngineState:
    """Mixed into vLLM's worker."""

    model_runner: Any

    def held(self) -> dict[str, Any]:
        """Return how much is held for requests, of which an idle engine holds none, and for its caches.

        requests         that the scheduler, or the worker, knows
        kv_cache         the share of its blocks that requests use
        encoded          pictures in the encoder cache, as the scheduler counts them
        encoded_in_use   those of them that requests refer to
        encoded_apart    those that scheduler and worker do not both have
        encoder_tokens   that the cache counts as taken and no picture has, and that it counts as in use
        tensors          that are alive in this process
        objects          of Python's own, as its allocator counts them
        bytes            that malloc has given out, whatever it keeps beside them
        """
        gc.unfreeze()  # vLLM hides from the collector, and so from us, what it made as it started
        gc.collect()
        objects = gc.get_objects()
        (scheduler,) = (one for one in objects if issubclass(type(one), SchedulerInterface))
        cache, worker = scheduler.encoder_cache_manager, self.model_runner
        return {
            "requests": [len(scheduler.requests), len(worker.requests), worker.input_batch.num_reqs],
            "kv_cache": scheduler.kv_cache_manager.usage,
            "encoded": len(cache.cached),
            "encoded_in_use": sum(map(bool, cache.cached.values())) + len(cache.request_cached_ids),
            "encoded_apart": len(set(cache.cached) ^ set(worker.encoder_cache)),
            "encoder_tokens": [
                cache.cache_size - cache.num_free_slots - sum(cache.num_embeds_by_hash.values()),
                cache.cache_size - cache.num_freeable_slots,
            ],
            "tensors": sum(issubclass(type(one), torch.Tensor) for one in objects),
            "objects": sys.getallocatedblocks(),
            "bytes": _given_out(),
        }


class _Mallinfo2(ctypes.Structure):
    """Of glibc's malloc.h."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    )]  # fmt: skip


def _given_out() -> int:
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    found = mallinfo2()
    return found.uordblks + found.hblkhd
