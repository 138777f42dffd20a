"""A server with as much of the hub's API as an upload needs; it remembers what it was given."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HubStub(ThreadingHTTPServer):
    """
    Attributes:
        repositories: whether each is private, by id.
        files: what was committed, by id and path.
        cards: that it was asked to check.
        token: the only one that is known.
        takes_commits: whether uploads succeed.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.cards: list[str] = []
        self.token = "hf_known"
        self.takes_commits = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "me", "orgs": [{"name": "ours"}]}
        if path == "/api/validate-yaml":
            self.cards.append(json.loads(body)["content"])
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        return self._of_repository(path, body)

    def _of_repository(self, path: str, body: bytes) -> tuple[int, Any]:
        hub_id = "/".join(path.split("/")[3:5])
        if hub_id not in self.repositories:
            return 404, {"error": "Repository not found"}
        if "/preupload/" in path:
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]  # fmt: skip
            return 200, {"files": modes}
        if "/commit/" in path:
            return self._commit(hub_id, body)
        return 200, {"id": hub_id, "private": self.repositories[hub_id], "siblings": [], "sha": "0" * 40}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.repositories:
            return 409, {"error": "exists", "url": f"{self.url}/{name}"}
        self.repositories[name] = asked["visibility"] == "private"
        return 200, {"url": f"{self.url}/{name}"}

    def _commit(self, hub_id: str, body: bytes) -> tuple[int, Any]:
        if not self.takes_commits:
            return 403, {"error": "storage is full"}
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                self.files.setdefault(hub_id, {})[entry["value"]["path"]] = content
        return 200, {"commitUrl": f"{self.url}/{hub_id}/commit/{'1' * 40}", "commitOid": "1" * 40, "hookOutput": ""}  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    server: HubStub

    def _serve(self) -> None:
        body = self._body()
        status, value = 401, {"error": "Invalid credentials"}
        if self.headers.get("authorization") == f"Bearer {self.server.token}":
            status, value = self.server.answer(self.path.partition("?")[0], body)
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        if status == 404:
            self.send_header("x-error-code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = _serve

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def serving_hub() -> Iterator[HubStub]:
    server = HubStub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
