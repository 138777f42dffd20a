"""Connections by which ranks learn at once that another one has failed or is gone.

In: a connection from every other rank to rank 0. Out: the first end that was told, or seen by a connection
that broke. The kernel closes a killed process's connections; keep-alive packets find machines that are gone.
torch.distributed notices neither while a rank computes, nor on a GPU while it waits.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field

KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 2}  # a lost machine is noticed in 20 s
GRACE_SECONDS = 8.0  # for an orderly end, before the process is ended hard
FAILED, SIGNALLED, LOST, FINISHED = "failed", "signalled", "lost", "finished"
# Ends the main thread's work wherever it is. By default this signal does nothing.
WAKE = signal.SIGURG


@dataclass(frozen=True)
class End:
    """How a rank ended.

    Attributes:
        rank, host: which one.
        kind: FAILED with an error, SIGNALLED, LOST without a word, or FINISHED.
        text: the error in one line.
        code: exit code for the others.
    """

    rank: int
    host: str
    kind: str
    text: str = ""
    code: int = 1

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.text}"


@dataclass
class Lifelines:
    """The connections of one rank: to rank 0, or of rank 0 to all others.

    Args:
        rank: of this process.
        hosts: of all ranks.
        sockets: by the rank at the other end.

    Attributes:
        end: the first end of another rank that was not in order; None as long as there is none.
    """

    rank: int
    hosts: list[str]
    sockets: Mapping[int, socket.socket]
    end: End | None = None
    _ended: threading.Event = field(default_factory=threading.Event)
    _finished: set[int] = field(default_factory=set)
    _is_closing: bool = False
    _has_spoken: bool = False

    def watch(self) -> None:
        """Start to watch the connections, in a thread of their own."""
        threading.Thread(target=self._watch, name="lifelines", daemon=True).start()

    def wait_for_end(self, seconds: float) -> End | None:
        """Another rank's end, if it becomes known within so many seconds."""
        self._ended.wait(seconds)
        return self.end

    def tell(self, kind: str, text: str = "", code: int = 1) -> None:
        """Tell the others how this rank ends."""
        self._send(End(self.rank, self.hosts[self.rank], kind, text, code))

    def close(self) -> None:
        """Say that this rank has finished. From now on no end of others matters."""
        self._is_closing = True
        self.tell(FINISHED)

    def _send(self, end: End, *, but: int = -1) -> None:
        line = (json.dumps(asdict(end)) + "\n").encode()
        for rank, connection in self.sockets.items():
            if rank != but:
                with suppress(OSError):  # that rank is gone
                    connection.sendall(line)

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for rank, connection in self.sockets.items():
            selector.register(connection, selectors.EVENT_READ, rank)
        while selector.get_map():
            for key, _ in selector.select():
                if not self._hear(key.data, self.sockets[key.data]):
                    selector.unregister(key.fileobj)

    def _hear(self, rank: int, connection: socket.socket) -> bool:
        """Take in what a rank says; false if it says no more."""
        line = b""
        with suppress(OSError):
            line = _read_line(connection)
        if not line:
            if rank not in self._finished:
                text = "ended without a word: killed, out of memory, or its machine is gone"
                self._note(End(rank, self.hosts[rank], LOST, text))
            return False
        end = End(**json.loads(line))
        if end.kind == FINISHED:
            self._finished.add(rank)
        else:
            self._note(end)
        return True

    def _note(self, end: End) -> None:
        """Remember another rank's end, tell the others, and end this process's work."""
        if self.end is not None or self._is_closing:
            return
        self.end = end
        self._ended.set()
        if self.rank == 0:
            self._send(end, but=end.rank)
        end_hard_after(GRACE_SECONDS, end.code, self.line)
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, WAKE)

    def line(self) -> str:
        """What this rank says about another's end, once; empty if it is for another one to say."""
        assert self.end is not None
        # Rank 0 speaks for all, also of itself unless it is gone.
        speaker = 0 if self.end.rank > 0 else 1
        is_told_already = self._has_spoken or (self.end.rank == 0 and self.end.kind != LOST)
        self._has_spoken = True
        return str(self.end) if self.rank == speaker and not is_told_already else ""


def end_hard_after(seconds: float, code: int, line: Callable[[], str]) -> None:
    """End the process, even if its main thread is stuck, unless it has ended by then.

    Args:
        seconds: from now.
        code: exit code.
        line: gives what to write on stderr if it comes to that; nothing if it is empty.
    """

    def end() -> None:
        text = line()
        if text:
            sys.stderr.write(f"error: {text}\n")
            sys.stderr.flush()
        os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def listen() -> tuple[socket.socket, str]:
    """A socket on a free port for the other ranks, and the word by which they are known."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    server = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=1024)
    return server, secrets.token_hex(16)


def accept_all(server: socket.socket, word: str, size: int, *, seconds: float) -> dict[int, socket.socket]:
    """The connections of all other ranks to rank 0.

    Raises:
        TimeoutError: one has not called in time.
    """
    sockets: dict[int, socket.socket] = {}
    server.settimeout(seconds)
    with server:
        while len(sockets) < size - 1:
            connection, _ = server.accept()
            connection.settimeout(seconds)
            said, _, rank = _read_line(connection).decode(errors="replace").partition(" ")
            if said != word:  # somebody else who found the port
                connection.close()
                continue
            _keep_alive(connection)
            sockets[int(rank)] = connection
    return sockets


def call(host: str, port: int, word: str, rank: int, *, seconds: float) -> dict[int, socket.socket]:
    """The connection of another rank to rank 0.

    Raises:
        OSError: rank 0 does not answer.
    """
    connection = socket.create_connection((host, port), timeout=seconds)
    connection.sendall(f"{word} {rank}\n".encode())
    _keep_alive(connection)
    return {0: connection}


def _read_line(connection: socket.socket) -> bytes:
    """The next line, byte by byte so that nothing behind it is taken; shorter if the connection ends."""
    line = b""
    while not line.endswith(b"\n") and (byte := connection.recv(1)):
        line += byte
    return line


def _keep_alive(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
