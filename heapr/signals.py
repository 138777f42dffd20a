"""Ends that come from outside: Ctrl-C, SIGTERM, and the death of the process that started this one.

In: signals. Out: one line and the exit code that a shell expects, after locks are released and half-written
files removed; what is in the artifact store stays, and the same command goes on from there.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
STARTED_BY = "HEAPR_STARTED_BY"  # environment variable: the process without which this one has no purpose
POLL_SECONDS = 0.5
AGAIN_SECONDS = 0.05

Handler = Callable[[int, FrameType | None], None]


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception that unwinds the stack like Ctrl-C."""


def end_at_once() -> None:
    """Turn Ctrl-C and SIGTERM into one line and the end of the process, as long as there is nothing to undo:
    before the slow imports."""
    for number in _heeded():
        signal.signal(number, _end)


@contextmanager
def one_line_ends() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into one line on stderr and exit codes 130 and 143.

    Libraries may turn the exception into one of their own, such as an import that failed: any error behind a
    signal counts as the end that was asked for. Where Python drops the exception, because a destructor ran
    when the signal came, the signal is sent again. A second signal ends the process at once.
    """
    received: list[int] = []

    def unwind(number: int, frame: FrameType | None) -> None:
        if received:
            _end(received[0], frame)
        received.append(number)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    previous = {number: signal.signal(number, unwind) for number in _heeded()}
    try:
        with _sent_again_if_dropped(received):
            yield
    except (KeyboardInterrupt, Exception) as end:
        if not received and not isinstance(end, KeyboardInterrupt):
            raise
        is_term = isinstance(end, Terminated) or received[:1] == [signal.SIGTERM]
        _set_all(_ignore)
        code = _say_end(signal.SIGTERM if is_term else signal.SIGINT)
        _set_all(lambda number, frame: os._exit(code))
        sys.exit(code)
    finally:
        for number, handler in previous.items():
            if signal.getsignal(number) is unwind:  # else an end has been said, here or further inside
                signal.signal(number, handler)


@contextmanager
def _sent_again_if_dropped(received: list[int]) -> Iterator[None]:
    """Send a signal again whose exception Python could not raise, and say nothing about that.

    Args:
        received: the signal, once there was one; emptied.
    """
    report = sys.unraisablehook

    def send_again(dropped: sys.UnraisableHookArgs) -> None:
        if not received or not isinstance(dropped.exc_value, KeyboardInterrupt):
            report(dropped)
            return
        again = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), received.pop()))
        again.daemon = True
        again.start()

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = report


def _heeded() -> list[int]:
    """The signals that end a process; without Ctrl-C where it runs in the background and ignores it."""
    both = (signal.SIGTERM, signal.SIGINT)
    return [number for number in both if signal.getsignal(number) != signal.SIG_IGN]


def _end(number: int, frame: FrameType | None) -> None:
    _set_all(_ignore)  # so that a second one does not say it again
    os._exit(_say_end(number))


def _ignore(number: int, frame: FrameType | None) -> None:
    """Not `SIG_IGN`, behind which Python would report a signal that has come already."""


def _set_all(handler: Handler) -> None:
    for number in _heeded():
        signal.signal(number, handler)


def _say_end(number: int) -> int:
    """Say in one line what a signal ends; return the exit code that a shell expects."""
    how = "terminated" if number == signal.SIGTERM else "interrupted"
    sys.stderr.write(f"{how}: finished artifacts are in the store; the same command goes on from there\n")
    sys.stderr.flush()
    return TERMINATED if number == signal.SIGTERM else INTERRUPTED


def end_with_parent() -> None:
    """End this process group when the process named by `STARTED_BY` is gone, even by SIGKILL."""
    started_by = os.environ.get(STARTED_BY)
    if started_by is None or not started_by.isdecimal() or os.getpgrp() != os.getpid():
        return
    _when_gone(int(started_by), lambda: os.killpg(os.getpgrp(), signal.SIGTERM))


@functools.cache
def end_worker_with_parent() -> None:
    """End this process, a launcher's that runs one job after the other, when who started it is gone.

    An idle worker of joblib would wait for minutes and keep its GPU's memory.
    """
    _when_gone(os.getppid(), lambda: os.kill(os.getpid(), signal.SIGTERM))


def _when_gone(parent: int, end: Callable[[], None]) -> None:
    """Call `end` once this process is not a child of `parent` any more."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        end()

    threading.Thread(target=watch, daemon=True).start()
