"""A server that answers as wandb's does, well enough for a run to begin, or badly in a way of our choice."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = {"id": "1", "name": "me"}
BUCKET = {
    "id": "1", "name": "id", "displayName": "name", "config": "{}", "historyLineCount": 0,
    "project": {"id": "1", "name": "project", "entity": ENTITY},
}  # fmt: skip


class FakeWandb(ThreadingHTTPServer):
    """
    Args:
        status: of every answer.
        silent: whether requests are taken and never answered.
    """

    daemon_threads = True

    def __init__(self, status: int = 200, *, silent: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.silence = status, threading.Event()
        self.ended = threading.Event()
        if silent:
            self.silence.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: FakeWandb

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.server.silence.is_set():
            self.server.ended.wait()
            return
        text = (gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body).decode()
        failed = {"errors": [{"message": f"status {self.server.status}"}]}
        self._answer({"data": answer(text)} if self.server.status == 200 else failed)

    do_GET = do_POST

    def _answer(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(self.server.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def answer(query: str) -> dict[str, Any]:
    if "mutation UpsertBucket" in query:
        return {"upsertBucket": {"bucket": BUCKET, "inserted": True}}
    if "viewer" in query:
        return {
            "viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        }
    return {}


@contextmanager
def serving(status: int = 200, *, silent: bool = False) -> Iterator[FakeWandb]:
    server = FakeWandb(status, silent=silent)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
