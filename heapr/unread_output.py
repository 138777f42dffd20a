"""Ends a command whose output nobody reads any more, such as `heapr --help | head`.

In: stdout, and what was raised while it was written to. Out: an end without a word, with the exit code that a
shell expects.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

UNREAD = 128 + signal.SIGPIPE


@contextmanager
def until_nobody_reads() -> Iterator[None]:
    """End without a word, as a shell expects, if stdout is a pipe that was closed, such as that of `| head`.

    What was printed last is written here, because at the end of Python a closed pipe is a stack trace.
    """
    try:
        yield
    except BrokenPipeError:
        if not _is_unread():
            raise
        _end_unread()
    finally:
        if sys.stdout is not None:  # a process may have none
            _flush()


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _end_unread()


def _is_unread() -> bool:
    """Whether stdout is a pipe that nobody reads any more."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), select.POLLOUT)
    except (AttributeError, OSError, ValueError):  # not a file of the system's
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _end_unread() -> None:
    """End; what is left in the buffer goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(UNREAD)
