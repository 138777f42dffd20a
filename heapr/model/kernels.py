"""Kernels of torch's CPU products in half precision: what they take, and how many are kept.

In: a device, a dtype, and how many products of different shapes there are. Out: bytes. oneDNN compiles a
kernel for each shape, and the experts' numbers of tokens, and widths after pruning, give many shapes. oneDNN
keeps kernels in a cache, and torch keeps them in another one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

# How many kernels each cache may hold, as oneDNN and torch call it.
CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
BY_DEFAULT, STREAMED = 1024, 128
KERNEL = 290_000  # bytes of one kernel in one cache, measured: 0.27 to 0.30 MB for widths of 128 to 1,024


@dataclass(frozen=True)
class Kernels:
    """The kernels that a process keeps.

    Attributes:
        capacities: the most that each cache holds; none if no kernels are compiled.
    """

    capacities: tuple[int, ...]

    def num_bytes(self, num_shapes: int) -> int:
        """What is kept after products of so many different shapes."""
        kept = [min(num_shapes, capacity) for capacity in self.capacities]
        return KERNEL * sum(kept)


def kernels_of(device: torch.device, dtype: torch.dtype, *, is_streamed: bool) -> Kernels:
    """The kernels that products in a dtype leave behind on a device."""
    if device.type != "cpu" or not _compiles(dtype):
        return Kernels(())
    usual = STREAMED if is_streamed else BY_DEFAULT
    capacities = [int(os.environ.get(name, usual)) for name in CAPACITIES]
    return Kernels(tuple(capacities))


def keep_few_kernels() -> None:
    """Keep a few kernels only, unless the environment says how many.

    Without effect if this process has multiplied in half precision before.
    """
    for name in CAPACITIES:
        os.environ.setdefault(name, str(STREAMED))


def _compiles(dtype: torch.dtype) -> bool:
    """Whether this processor's products in a dtype are oneDNN's."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
