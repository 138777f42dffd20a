"""Checkpoints of calibration: the sums so far, from which another process goes on after a crash.

In: running sums and counters after whole batches. Out: the same, bit for bit, in another process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from heapr.model.shelf import Files
from heapr.types import Batch

logger = logging.getLogger(__name__)


class Observer(Protocol):
    """Whoever has the running sums of a layer: see `heapr.calibration.collector.LayerObserver`."""

    index: int
    sums: dict[str, Tensor]


@dataclass
class Totals:
    """What has been counted so far, of this process; see `Statistics`."""

    num_batches: int = 0
    num_tokens: int = 0
    num_predicted_tokens: int = 0
    loss_sum: float = 0.0

    def add(self, batch: Batch, loss: float) -> None:
        """Count a batch and its summed loss."""
        self.num_batches += 1
        self.num_tokens += batch.ids_NW.numel()
        self.num_predicted_tokens += int(batch.num_predicted.sum())
        self.loss_sum += loss


class Checkpoints:
    """Saves the sums of all layers after a whole batch, when the last time is long enough ago.

    The sums are saved in float64, as they are, and batches come in a fixed order, so statistics do not depend
    on whether, when or how often calibration was interrupted. A checkpoint that cannot be written is said in
    the log, and calibration goes on; the one before stays.

    Args:
        files: outlive the process.
        seconds: between two checkpoints; what a crash costs at most, and a batch. 0 saves after every batch.
        clock: returns seconds.
    """

    def __init__(self, files: Files, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._files, self._seconds, self._clock = files, seconds, clock
        self._saved = clock()

    def recover(self, observers: Sequence[Observer], totals: Totals) -> None:
        """Take over what an earlier process saved last, if it did."""
        if not self._files.state:
            return
        for name, value in self._files.state["totals"].items():
            setattr(totals, name, value)
        for observer in observers:
            unpack(self._files.get(_file_name(observer, totals)), observer.sums)
        logger.info("%-9s goes on behind batch %d, from a checkpoint", "calibrate", totals.num_batches)

    def save_if_due(self, observers: Sequence[Observer], totals: Totals) -> None:
        """Save the sums after a whole batch, if that is due."""
        if self._clock() - self._saved < self._seconds:
            return
        before = list(self._files)
        try:
            for observer in observers:
                self._files.put(_file_name(observer, totals), packed(observer.sums))
            for name in before:
                self._files.drop(name)
            self._files.commit(totals=asdict(totals))
        except OSError as error:
            logger.warning(
                "%-9s the checkpoint behind batch %d could not be written: %s; a crash would cost more",
                "calibrate",
                totals.num_batches,
                error.strerror,
            )
        self._saved = self._clock()


def packed(sums: Mapping[str, Tensor]) -> Tensor:
    """All sums of a layer in one float64 vector, on the CPU."""
    flat = [tensor.flatten().cpu() for tensor in sums.values()]
    return torch.cat(flat)


def unpack(vector: Tensor, sums: Mapping[str, Tensor]) -> None:
    """Put a vector that `packed` made back into the sums."""
    sizes = [tensor.numel() for tensor in sums.values()]
    for part, tensor in zip(vector.split(sizes), sums.values(), strict=True):
        tensor.copy_(part.view(tensor.shape))


def _file_name(observer: Observer, totals: Totals) -> str:
    return f"statistics-{observer.index}-{totals.num_batches}"
