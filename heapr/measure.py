"""Seconds and peak memory of a stage.

On a GPU the peak is torch's count of allocated bytes. On a CPU it is the process's peak resident memory, reset at the
start of the stage where the operating system lets us (Linux); elsewhere it is the peak since the process started.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from types import TracebackType

import torch

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class StageMeter:
    """Context manager; after it, `seconds` and `peak_memory_bytes` hold what the block took.

    Args:
        device: where the work is done, and so whose memory is meant.
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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.seconds = time.perf_counter() - self._started
        on_gpu = self._device.type == "cuda"
        self.peak_memory_bytes = torch.cuda.max_memory_allocated(self._device) if on_gpu else _resident_peak()


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
