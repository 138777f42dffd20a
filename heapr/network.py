"""Whether a server answers, without a long wait.

In: a URL. Out: yes or no, within seconds.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlparse

PROBE_SECONDS = 3.0  # how long to wait for a connection
PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def answers(url: str) -> bool:
    """Whether a server answers at a URL. True behind a proxy, because only the proxy could tell."""
    if any(os.environ.get(name) for name in PROXIES):
        return True
    parts = urlparse(url)
    address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    return within(PROBE_SECONDS, lambda: socket.create_connection(address, timeout=PROBE_SECONDS).close())


def within(seconds: float, call: Callable[[], None]) -> bool:
    """Whether a call succeeds within some time.

    It runs in a thread, because looking up a name or ending a process cannot be given a time limit.
    """
    done = threading.Event()

    def attempt() -> None:
        with suppress(Exception):
            call()
            done.set()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return done.is_set()
