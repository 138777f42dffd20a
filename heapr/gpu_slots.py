"""One job per GPU: on a machine whose launcher does not assign GPUs, every process takes a free one.

In: the GPUs that torch sees. Out: a context in which one of them, or all, belong to this process;
others wait. The locks are per machine and per physical
GPU, known by its UUID, which CUDA_VISIBLE_DEVICES does not change.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from filelock import Timeout

from heapr.errors import ConfigError
from heapr.locks import held, holder_of, lock_of, locked

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0
# The same for all users and jobs of a machine, unlike TMPDIR; empty after a boot.
SHARED_MEMORY = Path("/dev/shm")


@contextmanager
def gpu_slot(device: torch.device, *, all_of_them: bool, wait_minutes: float | None) -> Iterator[None]:
    """Own the GPU that a run uses.

    `cuda` without a number becomes the first free GPU, which is made torch's current device. The CPU needs no
    slot.

    Args:
        device: of the run.
        all_of_them: whether the weights are spread over all GPUs (`runtime.device_map`).
        wait_minutes: after which to give up; None waits as long as it takes.

    Raises:
        ConfigError: all are still taken after `wait_minutes`; the message says by whom.
    """
    if device.type != "cuda":
        yield
        return
    names = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    folder = slots_folder()
    if all_of_them:
        with ExitStack() as stack:
            for name in sorted(names):  # in one order, so that two processes cannot wait for each other
                stack.enter_context(locked(folder / name, f"GPU {name}", wait_minutes=wait_minutes))
            yield
        return
    candidates = range(len(names)) if device.index is None else [device.index]
    wanted = [names[index] for index in candidates]
    with one_of(wanted, folder, wait_minutes=wait_minutes) as taken:
        index = candidates[taken]
        torch.cuda.set_device(index)
        yield


@contextmanager
def one_of(names: Sequence[str], folder: Path, *, wait_minutes: float | None = None) -> Iterator[int]:
    """Own the first of some things that is free; its number.

    Args:
        names: of the locks in the folder.
        wait_minutes: after which to give up; None waits as long as it takes.

    Raises:
        ConfigError: none has become free.
    """
    start, told = time.monotonic(), False
    while True:
        for number, name in enumerate(names):
            lock = lock_of(folder / name)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            with held(lock):
                yield number
            return
        taken = _holders(names, folder)
        if wait_minutes is not None and time.monotonic() - start >= 60 * wait_minutes:
            raise ConfigError(
                f"no GPU is free after {wait_minutes:g} minutes: {taken}; wait longer with"
                " runtime.wait_minutes=..., or start fewer jobs at a time"
            )
        if not told:
            logger.info("no GPU is free, waiting: %s", taken)
            told = True
        time.sleep(POLL_SECONDS)


def slots_folder() -> Path:
    """The folder of this machine's locks, which every user may write."""
    base = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    folder = base / "heapr-gpus"
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
    return folder


def _holders(names: Sequence[str], folder: Path) -> str:
    described = []
    for name in names:
        holder = holder_of(folder / name)
        described.append(f"{name} by {holder or 'another process'}")
    return "; ".join(described)
