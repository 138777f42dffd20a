"""Ends that come from outside: Ctrl-C, SIGTERM, and the death of the process that started this one.

In: signals. Out: one line and the exit code that a shell expects, after locks are released and half-written
files removed; what is in the artifact store stays, and the same command goes on from there.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
STARTED_BY = "HEAPR_STARTED_BY"  # environment variable: the process without which this one has no purpose
POLL_SECONDS = 0.5


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception that unwinds the stack like Ctrl-C."""


@contextmanager
def one_line_ends() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into one line on stderr and exit codes 130 and 143."""
    previous = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    except KeyboardInterrupt as end:
        is_term = isinstance(end, Terminated)
        how = "terminated" if is_term else "interrupted"
        sys.stderr.write(f"{how}: finished artifacts are in the store; the same command goes on from there\n")
        sys.stderr.flush()
        sys.exit(TERMINATED if is_term else INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _raise_terminated(number: int, frame: FrameType | None) -> None:
    raise Terminated


def end_with_parent() -> None:
    """End this process group when the process named by `STARTED_BY` is gone, even by SIGKILL."""
    started_by = os.environ.get(STARTED_BY)
    if started_by is None or os.getpgrp() != os.getpid():
        return

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os.killpg(os.getpgrp(), signal.SIGTERM)

    threading.Thread(target=watch, args=(int(started_by),), daemon=True).start()
