"""What is observed of one `generate` call: when each stage ran, when tokens left, which memory it took.

Stages are seen by hooks on the modules of any LLaVA-like model, so stock, peer and ours are observed alike.
"""

from __future__ import annotations

import time
import weakref
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vispruner.stock_versions import CACHE


@dataclass
class Observation:
    """Seconds, bytes and counts of one `generate` call.

    stages       seconds until the first token: vision, select, project, prefill, logits, and `other`, the rest
    ttft         from the call until the first new token is on the host
    decode       seconds of each later token
    peak         bytes held beyond those before the call, at most; by stage beyond those before the stage
    operations   tensor operations dispatched by stage (CPU only): what a GPU launches kernels for, roughly
    """

    stages: dict[str, float]
    ttft: float
    end_to_end: float
    decode: list[float]
    kept: int
    cache_length: int
    cache_bytes: int
    tokens: torch.Tensor
    peak: dict[str, int] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)


# Memory


class TensorMemory(TorchDispatchMode):
    """Bytes of the tensors that are alive, of those made while this mode is on; deterministic, on any device.

    Scratch space inside an operation is not seen, nor what an allocator keeps for later.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.highest = self.operations = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        self.operations += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), given)
        return result

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        if id(storage) in given or storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.held += size
        self.highest = max(self.highest, self.held)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.held -= size

    def start_peak(self) -> None:
        self.highest = self.held


class CudaMemory:
    """The same figures from PyTorch's CUDA allocator, which also sees scratch space inside operations."""

    operations = 0

    def __enter__(self) -> CudaMemory:
        self.start_peak()
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    @property
    def held(self) -> int:
        return torch.cuda.memory_allocated()

    @property
    def highest(self) -> int:
        return torch.cuda.max_memory_allocated()

    def start_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()


def memory_meter(device: torch.device) -> TensorMemory | CudaMemory:
    return CudaMemory() if on_cuda(device) else TensorMemory()


def on_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


# Time


class Watch:
    """Hooks that note when the stages of a LLaVA-like model begin and end, while the `with` block runs.

    On CUDA the notes are events on the stream, read when all is over: watching makes nobody wait.
    """

    def __init__(self, model: Any, memory: TensorMemory | CudaMemory | None = None) -> None:
        self.model, self.memory = model, memory
        self.spans: list[tuple[str, Any, Any]] = []
        self.kept: int | None = None
        self.peaks: dict[str, int] = defaultdict(int)
        self.operations: dict[str, int] = defaultdict(int)
        self._highest = 0
        self._cuda = on_cuda(model.device)
        self._begun: dict[str, tuple[Any, int, int]] = {}
        self._hooks: list[Any] = []
        self._choices: AbstractContextManager[Any] = nullcontext()
        self.puts: list[float] = []

    def __enter__(self) -> Watch:
        base = self.model.model
        modules = {
            "vision": base.vision_tower,
            "project": base.multi_modal_projector,
            "language": base.language_model,
            "logits": self.model.lm_head,
        }
        if hasattr(base, "selection"):  # the peer's
            modules["select"] = base.selection
            self._hooks.append(base.selection.register_forward_hook(lambda *call: self._note(call[-1])))
        for stage, module in modules.items():
            self._hooks.append(module.register_forward_pre_hook(lambda *_, stage=stage: self._begin(stage)))
            self._hooks.append(module.register_forward_hook(lambda *_, stage=stage: self._end(stage)))
        if hasattr(base, "watch_choices"):
            self._choices = base.watch_choices(self._after_choice, self._before_choice)
        self._choices.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._choices.__exit__(kind, error, trace)

    def _before_choice(self, choice: Any) -> None:
        if choice.layer is None:  # what the language model chooses is a part of prefill
            self._begin("select")

    def _after_choice(self, choice: Any) -> None:
        if choice.layer is None:
            self._end("select")
            self._note(choice.selection.indices)

    def _note(self, kept: torch.Tensor) -> None:
        self.kept = kept.shape[1]

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self, stage: str) -> None:
        if "select" in self._begun:  # what a method has projected to choose by is a part of choosing
            return
        held = made = 0
        if self.memory is not None:
            self._highest = max(self._highest, self.memory.highest)
            held, made = self.memory.held, self.memory.operations
            self.memory.start_peak()
        self._begun[stage] = (self._now(), held, made)

    def _end(self, stage: str) -> None:
        if stage not in self._begun:
            return
        begun, held, made = self._begun.pop(stage)
        self.spans.append((stage, begun, self._now()))
        if self.memory is not None:
            self._highest = max(self._highest, self.memory.highest)
            self.peaks[stage] = max(self.peaks[stage], self.memory.highest - held)
            self.operations[stage] += self.memory.operations - made

    def put(self, tokens: torch.Tensor) -> None:
        """`generate` streams to this: first the prompt, then every token once it is on the host."""
        self.puts.append(time.perf_counter())

    def end(self) -> None:
        pass

    def first_token_stages(self) -> dict[str, float]:
        """Return seconds by stage up to the first logits; call it when the device is done."""
        names = {"language": "prefill"}
        until = next(number for number, (stage, _, _) in enumerate(self.spans) if stage == "logits")
        stages = dict.fromkeys(("vision", "select", "project", "prefill", "logits"), 0.0)
        for stage, begin, end in self.spans[: until + 1]:
            stages[names.get(stage, stage)] += begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
        return stages

    def highest(self) -> int:
        return max(self._highest, self.memory.highest) if self.memory is not None else 0


def observe(model: Any, inputs: dict[str, Any], new_tokens: int, memory: bool = False) -> Observation:
    """Run `model.generate` greedily for exactly `new_tokens` tokens a row and return what was observed.

    memory  also meter it; on the CPU this slows the run, so its times are not to be used
    """
    meter = memory_meter(model.device) if memory else None
    with Watch(model, meter) as watch:
        _synchronize(model.device)
        before = meter.held if meter is not None else 0
        begin = time.perf_counter()
        if meter is None:
            result = _generate(model, inputs, new_tokens, watch)
        else:
            with meter:
                result = _generate(model, inputs, new_tokens, watch)
        _synchronize(model.device)
        end = time.perf_counter()
    stages, ttft = watch.first_token_stages(), watch.puts[1] - begin
    cache = result[CACHE]
    operations = {"all": meter.operations, **watch.operations} if meter is not None else {}
    return Observation(
        stages={**stages, "other": ttft - sum(stages.values())},
        ttft=ttft,
        end_to_end=end - begin,
        decode=[later - earlier for earlier, later in zip(watch.puts[1:], watch.puts[2:], strict=False)],
        kept=watch.kept if watch.kept is not None else _patches(model, inputs),
        cache_length=cache.get_seq_length(),
        cache_bytes=sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values)),
        tokens=result.sequences[:, -new_tokens:].cpu(),
        peak={"all": watch.highest() - before, **watch.peaks} if meter is not None else {},
        operations=operations,
    )


def _generate(model: Any, inputs: dict[str, Any], new_tokens: int, watch: Watch) -> Any:
    return model.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True, streamer=watch
    )


def _patches(model: Any, inputs: dict[str, Any]) -> int:
    return int((inputs["input_ids"][0] == model.config.image_token_id).sum())


def _synchronize(device: torch.device) -> None:
    if on_cuda(device):
        torch.cuda.synchronize()
