"""How fast this machine multiplies and reads, measured in a moment, where nothing was timed before.

In: a device and the shape of a product; files. Out: FLOPs and bytes per second, to estimate with.
Shape letters: n tokens of one expert, D model width, F atomic experts of an expert.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import torch

MOMENT = 0.1  # seconds
SAMPLE = 2**27  # bytes of a file that are read
BLOCK = 2**24


def flops_per_second(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> float:
    """Speed of x W^T, x (n, D) and W (F, D), as experts compute it.

    Args:
        device: computes the product, again and again for a moment.
        dtype: of x and W.
        shape: n, D, F; each at least 1.
    """
    num_tokens, model_width, width = shape
    x_nD = torch.ones(num_tokens, model_width, dtype=dtype, device=device)
    W_FD = torch.ones(width, model_width, dtype=dtype, device=device)
    torch.nn.functional.linear(x_nD, W_FD)  # what is compiled is compiled now
    _wait(device)
    number = 0
    started = time.perf_counter()
    while (seconds := time.perf_counter() - started) < MOMENT:
        for _ in range(10):
            torch.nn.functional.linear(x_nD, W_FD)
        _wait(device)
        number += 10
    flops = 2 * num_tokens * model_width * width
    return number * flops / seconds


def bytes_per_second(paths: Iterable[Path]) -> float | None:
    """Speed of reading the first of some files that is there; None if none is.

    What the operating system has in its cache is read from there, as it would be in a run.
    """
    there = [path for path in paths if path.is_file()]
    if not there:
        return None
    done = 0
    started = time.perf_counter()
    with there[0].open("rb", buffering=0) as file:
        while done < SAMPLE and (block := file.read(BLOCK)):
            done += len(block)
    return done / max(1e-9, time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
