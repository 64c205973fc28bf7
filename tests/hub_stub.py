"""A Hub on loopback, in memory: what create_repo, upload_folder and snapshot_download ask for."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REPO = r"/api/(?:models|datasets)/([^/]+/[^/]+)"


class StubHub:
    """Repositories by name, each a mapping of path to bytes."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.url = ""

    def commit_of(self, repo: str) -> str:
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()


@contextmanager
def stub_hub() -> Iterator[StubHub]:
    """Serve until the block ends."""
    hub = StubHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    hub: StubHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/json" if not isinstance(content, bytes) else "application/octet-stream"
        for name, value in {"Content-Length": str(len(data)), "Content-Type": kind}.items():
            self.send_header(name, value)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if length := int(self.headers.get("Content-Length") or 0):
            return self.rfile.read(length)
        content = b""
        while self.headers.get("Transfer-Encoding") == "chunked":
            size = int(self.rfile.readline(), 16)
            content += self.rfile.read(size)
            self.rfile.readline()
            if not size:
                break
        return content

    def do_POST(self) -> None:
        body = self.body()
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.hub.repos.setdefault(repo, {})
            self.answer({"url": f"{self.hub.url}/{repo}", "id": repo})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif re.fullmatch(REPO + r"/preupload/.+", self.path):
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            self.answer({"files": modes})
        elif found := re.fullmatch(REPO + r"/commit/.+", self.path):
            self.commit(found[1], body)
        else:
            self.answer({"error": "unknown"}, 404)

    def commit(self, repo: str, body: bytes) -> None:
        for line in body.decode().splitlines():
            step = json.loads(line)
            if step["key"] == "file":
                content = base64.b64decode(step["value"]["content"])
                self.hub.repos[repo][step["value"]["path"]] = content
        commit = self.hub.commit_of(repo)
        url = f"{self.hub.url}/{repo}/commit/{commit}"
        self.answer({"commitOid": commit, "commitUrl": url, "hookOutput": "", "success": True})

    def do_GET(self) -> None:
        path, repos = self.path.split("?")[0], self.hub.repos
        if path == "/api/whoami-v2":
            self.answer({"name": "me", "type": "user"})
        elif (found := re.fullmatch(REPO + r"(/revision/(.+))?", path)) and found[1] in repos:
            if found[3] not in (None, "main", self.hub.commit_of(found[1])):
                self.answer({"error": "no revision"}, 404, X_Error_Code="RevisionNotFound")
                return
            names = [{"rfilename": name} for name in repos[found[1]]]
            head = {"id": found[1], "sha": self.hub.commit_of(found[1]), "private": False}
            self.answer(head | {"tags": [], "downloads": 0, "siblings": names})
        elif (found := re.fullmatch(REPO + r"/tree/.*", path)) and found[1] in repos:
            self.answer([_entry(name, data) for name, data in repos[found[1]].items()])
        elif found := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self.file(repos.get(found[1], {}).get(found[2]), found[1])
        else:
            self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")

    def file(self, data: bytes | None, repo: str) -> None:
        if data is None:
            self.answer({"error": "no file"}, 404, X_Error_Code="EntryNotFound")
            return
        tag = f'"{hashlib.sha1(data).hexdigest()}"'
        self.answer(data, ETag=tag, X_Repo_Commit=self.hub.commit_of(repo))

    do_HEAD = do_GET


def _entry(name: str, data: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(data).hexdigest()
    return {"type": "file", "path": name, "size": len(data), "oid": oid}
