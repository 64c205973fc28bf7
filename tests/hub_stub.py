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
        self.history: dict[str, dict[str, bytes]] = {}
        """By commit."""
        self.large: dict[str, bytes] = {}
        """Files that came by LFS, by their sha256."""
        self.downloads: list[str] = []
        """Paths in repositories, in the order they were asked for."""
        self.url = ""

    def commit_of(self, repo: str) -> str:
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()

    def files_of(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """A repository at `main` or at a commit; None where there is no such thing."""
        if revision == "main" or repo not in self.repos:
            return self.repos.get(repo)
        return self.history.get(revision)


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
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in files
            ]
            self.answer({"files": modes})
        elif found := re.fullmatch(REPO + r"/commit/.+", self.path):
            self.commit(found[1], body)
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            self.answer({"objects": [self.lfs_entry(o) for o in json.loads(body)["objects"]]})
        else:
            self.answer({"error": "unknown"}, 404)

    def lfs_entry(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["oid"] in self.hub.large:
            return asked  # without actions: it is there
        return asked | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}}

    def do_PUT(self) -> None:
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == self.path.removeprefix("/lfs/")
        self.hub.large[self.path.removeprefix("/lfs/")] = content
        self.answer({})

    def commit(self, repo: str, body: bytes) -> None:
        for line in body.decode().splitlines():
            step = json.loads(line)
            if step["key"] == "file":
                content = base64.b64decode(step["value"]["content"])
                self.hub.repos[repo][step["value"]["path"]] = content
            if step["key"] == "lfsFile":
                content = self.hub.large[step["value"]["oid"]]
                self.hub.repos[repo][step["value"]["path"]] = content
        commit = self.hub.commit_of(repo)
        self.hub.history[commit] = dict(self.hub.repos[repo])
        url = f"{self.hub.url}/{repo}/commit/{commit}"
        self.answer({"commitOid": commit, "commitUrl": url, "hookOutput": "", "success": True})

    def do_GET(self) -> None:
        path, repos = self.path.split("?")[0], self.hub.repos
        if path == "/api/whoami-v2":
            self.answer({"name": "me", "type": "user"})
        elif (found := re.fullmatch(REPO + r"(/revision/(.+))?", path)) and found[1] in repos:
            files = self.hub.files_of(found[1], found[3] or "main")
            if files is None:
                self.answer({"error": "no revision"}, 404, X_Error_Code="RevisionNotFound")
                return
            names = [{"rfilename": name} for name in files]
            commit = found[3] if found[3] in self.hub.history else self.hub.commit_of(found[1])
            head = {"id": found[1], "sha": commit, "private": False}
            self.answer(head | {"tags": [], "downloads": 0, "siblings": names})
        elif (found := re.fullmatch(REPO + r"/tree/([^/]+).*", path)) and found[1] in repos:
            files = self.hub.files_of(found[1], found[2]) or {}
            self.answer([_entry(name, data) for name, data in files.items()])
        elif found := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(*found.groups())
        else:
            self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")

    def file(self, repo: str, revision: str, name: str) -> None:
        files = self.hub.files_of(repo, revision)
        if files is None:
            what = "RepoNotFound" if repo not in self.hub.repos else "RevisionNotFound"
            self.answer({"error": "not there"}, 404, X_Error_Code=what)
            return
        commit = revision if revision in self.hub.history else self.hub.commit_of(repo)
        if name not in files:
            error = {"error": "no file"}
            self.answer(error, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        if self.command == "GET":
            self.hub.downloads.append(name)
        tag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
        self.answer(files[name], ETag=tag, X_Repo_Commit=commit)

    do_HEAD = do_GET


def _entry(name: str, data: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(data).hexdigest()
    return {"type": "file", "path": name, "size": len(data), "oid": oid}
