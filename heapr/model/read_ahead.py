"""Reads a decoder layer in a thread while another one computes.

In: a function that reads a layer. Out: what it returns, once the layer is asked for. At most one layer is
read ahead, and its thread ends with it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Generic, TypeVar

Read = TypeVar("Read")


class ReadAhead(Generic[Read]):
    """One layer that is being read, or has been.

    Args:
        read: reads a layer. It is called in a thread, never twice at the same time.
    """

    def __init__(self, read: Callable[[int], Read]) -> None:
        self._read = read
        self._layer: int | None = None
        self._thread: Thread | None = None
        self._future: Future[Read] = Future()

    def start(self, layer: int) -> None:
        """Begin to read a layer. One that was read and never asked for is forgotten."""
        if layer == self._layer:
            return
        self.forget()
        self._layer = layer
        self._future = Future()
        self._thread = Thread(
            target=_fill, args=(self._future, self._read, layer), name=f"read layer {layer}"
        )
        self._thread.start()

    def take(self, layer: int) -> Read | None:
        """What was read of a layer, as soon as it is there; None if it was not begun.

        Raises:
            Exception: what reading raised.
        """
        if layer != self._layer:
            self.forget()
            return None
        future = self._future
        self.forget()
        return future.result()

    def forget(self) -> None:
        """Wait for the thread, and let go of what it read."""
        if self._thread is not None:
            self._thread.join()
        self._layer = self._thread = None
        self._future = Future()


def _fill(future: Future[Read], read: Callable[[int], Read], layer: int) -> None:
    """Read a layer and hand over what was read, or the error."""
    try:
        future.set_result(read(layer))
    except BaseException as error:  # raised again by whoever takes the layer
        future.set_exception(error)
