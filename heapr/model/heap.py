"""The C library's heap: how much of the memory that was freed goes back to the operating system.

It matters where large tensors come and go: without it a process that streams a model grows to several times
what it holds.
"""

from __future__ import annotations

import ctypes

M_MMAP_THRESHOLD = -3  # glibc's number of the option
LARGE_BLOCK = 2**22  # bytes


def give_back_freed_memory() -> None:
    """Let the C library return large blocks to the operating system as soon as they are freed.

    By default glibc soon keeps blocks of up to 32 MB, so a process that takes and frees layers grows. Without
    glibc nothing is done.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def trim_heap() -> None:
    """Let glibc return what it keeps of freed small blocks to the operating system."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
