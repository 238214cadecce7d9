"""Count, without an accelerator, what one would be kept waiting by and what it would have to hold, and the cache."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakTensorKeyDictionary

from vispruner.stock_versions import CACHE

# Their results, or the shapes of these, are read on the host.
READS = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "bincount",
    "_unique2",
    "unique_dim",
}
COPIES = ("tolist", "cpu", "numpy", "__array__")


@torch.no_grad()
def cached_tokens(model: Any, inputs: Any) -> int:
    """Return how many tokens a prompt takes in the KV cache."""
    return model(**inputs, use_cache=True)[CACHE].get_seq_length()


def tensors_of(*values: Any) -> list[torch.Tensor]:
    return [value for value in tree_iter(values) if isinstance(value, torch.Tensor)]


class HostReads:
    """While active, count by name the operations for which the host waits on what came from `device_tensors`.

    Everything computed from those counts as being on the device too; all other tensors are the host's own.
    """

    def __init__(self, *device_tensors: Any) -> None:
        self.counts: Counter[str] = Counter()
        self._on_device = WeakTensorKeyDictionary()
        self._mark(device_tensors)
        self._operations, self._methods = _Operations(self), _Methods(self)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __enter__(self) -> HostReads:
        self._operations.__enter__()
        self._methods.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._methods.__exit__(*exception)
        self._operations.__exit__(*exception)

    def _mark(self, values: Any) -> None:
        for tensor in tensors_of(values):
            self._on_device[tensor] = True

    def _is_on_device(self, *values: Any) -> bool:
        return any(tensor in self._on_device for tensor in tensors_of(*values))


class _Operations(TorchDispatchMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        if self.reads._is_on_device(args, kwargs):
            name = operation._schema.name.removeprefix("aten::")
            by_mask = name.startswith("index") and any(t.dtype == torch.bool for t in tensors_of(args[1]))
            unsized = operation is torch.ops.aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
            if name in READS or by_mask or unsized:
                self.reads.counts[name] += 1
            self.reads._mark(result)
        return result


class _Methods(TorchFunctionMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in COPIES and self.reads._is_on_device(args):
            self.reads.counts[name] += 1
        return function(*args, **(kwargs or {}))


class PeakBytes(TorchDispatchMode):
    """While active, follow the bytes of every storage that operations make: `peak` is the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known_before = {tensor.untyped_storage()._cdata for tensor in tensors_of(args, kwargs)}
        result = operation(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            if storage not in self._known and storage._cdata not in known_before:
                self._known.add(storage)
                self._follow(storage)
        self.peak = max(self.peak, self.live)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.live += size

        def freed() -> None:
            self.live -= size

        weakref.finalize(storage, freed)


class OperationCounts(TorchDispatchMode):
    """While active, count the operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[operation._schema.name.removeprefix("aten::")] += 1
        return operation(*args, **(kwargs or {}))
