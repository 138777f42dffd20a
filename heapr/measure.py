"""Measures seconds and peak memory of a stage or another piece of work, and describes the machine.

On a GPU the peak is torch's count of allocated bytes. On a CPU it is the process's peak resident memory,
which is reset at the start of the stage where the operating system allows it (Linux); elsewhere it is the
peak since the process started.
"""

from __future__ import annotations

import platform
import resource
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CLEAR_REFS, STATUS, CPUINFO = Path("/proc/self/clear_refs"), Path("/proc/self/status"), Path("/proc/cpuinfo")


class StageMeter:
    """Context manager that measures its block: `seconds` and `peak_memory_bytes` are set at the end.

    Args:
        device: where the work is done; its memory is measured.
    """

    seconds: float = 0.0
    peak_memory_bytes: int = 0

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> StageMeter:
        self._started = time.perf_counter()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _reset_resident_peak()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._started
        if self._device.type == "cuda":
            self.peak_memory_bytes = torch.cuda.max_memory_allocated(self._device)
        else:
            self.peak_memory_bytes = _resident_peak()


class WorkingMemory:
    """Context manager that measures the most bytes that torch held at once, beyond what was there before.

    On a GPU this is the allocator's peak, which is reset. On a CPU it is the storage of all tensors that are
    alive between two operations; a kernel's own workspace and the rest of the process do not count. Counting
    takes time on a CPU, so do not measure seconds in the same block.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors = None if device.type == "cuda" else _LiveTensors()

    def __enter__(self) -> WorkingMemory:
        if self._tensors is not None:
            self._tensors.__enter__()
        else:
            self._before = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tensors is not None:
            self._tensors.__exit__(kind, error, trace)

    def take_peak(self) -> int:
        """The most bytes since the start or since the last call."""
        if self._tensors is not None:
            peak, self._tensors.peak_bytes = self._tensors.peak_bytes, self._tensors.bytes
            return peak
        peak = torch.cuda.max_memory_allocated(self._device) - self._before
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operations create, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._add(tensor, num_bytes=0)  # what was there before does not count
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._add(tensor, num_bytes=tensor.untyped_storage().nbytes())
        return result

    def _add(self, tensor: Tensor, num_bytes: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            weakref.finalize(storage, self._remove, key, num_bytes)
            self.bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.bytes)

    def _remove(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.bytes -= num_bytes


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def machine(device: torch.device) -> dict[str, Any]:
    """What timings depend on: kind and name of the device, and torch's number of CPU threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": device.type, "name": name, "threads": torch.get_num_threads()}


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    try:
        lines = CPUINFO.read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _reset_resident_peak() -> None:
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return  # not Linux, or not allowed: the peak then counts from the start of the process


def _resident_peak() -> int:
    try:
        lines = STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
