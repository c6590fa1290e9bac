"""A model hub on 127.0.0.1 that speaks what huggingface_hub's client asks of one: create, preupload, LFS, commit,
tree, resolve. It refuses, and breaks off, as a test tells it to.
"""

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
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "t0psecretvalue" * 3
MODELS = r"/api/models/(?P<repo>[^/]+/[^/]+)"


class Repo:
    def __init__(self, private: bool):
        self.private = private
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.lfs: set[str] = set()  # names of files kept as such

    @property
    def head(self) -> tuple[str, dict[str, bytes]]:
        return self.commits[-1] if self.commits else ("0" * 40, {})

    def commit(self, files: dict[str, bytes]) -> str:
        number = f"{len(self.commits)}{sorted(files)}".encode()
        self.commits.append((hashlib.sha1(number).hexdigest(), files))
        return self.commits[-1][0]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.head
        return next((commit for commit in self.commits if commit[0] == revision), None)


class LoopbackHub(ThreadingHTTPServer):
    """repos: what is there. refusals: (method, pattern of the path) -> status. cut: the same -> bytes of the body after
    which the connection closes. Each refusal or cut holds until it is taken away. seen: every request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.refusals: dict[tuple[str, str], int] = {}
        self.cuts: dict[tuple[str, str], int] = {}
        self.seen: list[tuple[str, str]] = []
        self.licences: dict[str, str] = {}
        self.spoil: bytes | None = None  # is answered instead of any LFS file

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running() -> Iterator[LoopbackHub]:
    hub = LoopbackHub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    server: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        self.server.seen.append((self.command, path))
        if self._cut_at(path, reading=True) is not None:
            self.rfile.read(min(length, self._cut_at(path, reading=True) or 0))
            return self._hang_up()
        self.body = self.rfile.read(length) if length else self._chunks()
        for (method, pattern), status in self.server.refusals.items():
            if method == self.command and re.search(pattern, path):
                return self._answer({"error": "as the test wishes"}, status)
        if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid credentials"}, 401)
        for method, pattern, answer in ROUTES:
            if method == self.command and (found := re.fullmatch(pattern, path)):
                return answer(self, **found.groupdict())
        return self._answer({"error": f"no {self.command} {path} here"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = _serve

    def _chunks(self) -> bytes:
        parts = []
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        return b"".join(parts)

    def _cut_at(self, path: str, reading: bool) -> int | None:
        for (method, pattern), count in self.server.cuts.items():
            if method == self.command and re.search(pattern, path) and reading == (method in ("PUT", "POST")):
                return count
        return None

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        if status in (401, 404) and "/resolve/" not in self.path:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self._cut_at(unquote(urlsplit(self.path).path), reading=False)
        self.wfile.write(data if cut is None else data[:cut])
        if cut is not None:
            self._hang_up()

    # -- the endpoints -------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        self._answer({"type": "user", "name": "ada", "fullname": "Ada", "orgs": [], "auth": {}})

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.server.repos:
            return self._answer({"error": "You already created this model repo", "url": self._url(repo)}, 409)
        self.server.repos[repo] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        self._answer({"url": self._url(repo), "name": repo, "id": repo})

    def _url(self, repo: str) -> str:
        return f"{self.server.url}/{repo}"

    def validate(self) -> None:
        self._answer({"errors": [], "warnings": []})

    def info(self, repo: str, revision: str = "main") -> None:
        if repo in self.server.licences:
            return self._answer({"id": repo, "sha": "1" * 40, "cardData": {"license": self.server.licences[repo]}})
        known = self.server.repos.get(repo)
        commit = known.at(revision) if known else None
        if known is None or commit is None:
            return self._answer({"error": "not found"}, 404)
        siblings = [self._entry(known, name, data, "rfilename") for name, data in commit[1].items()]
        return self._answer({"id": repo, "sha": commit[0], "private": known.private, "siblings": siblings})

    def tree(self, repo: str, revision: str) -> None:
        known = self.server.repos[repo]
        commit = known.at(revision)
        assert commit is not None
        entries = [self._entry(known, name, data, "path") for name, data in commit[1].items()]
        self._answer([{"type": "file", "oid": entry["blobId"], **entry} for entry in entries])

    def _entry(self, repo: Repo, name: str, data: bytes, key: str) -> dict[str, Any]:
        entry = {key: name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
        if name in repo.lfs:
            digest = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"size": len(data), "sha256": digest, "oid": digest, "pointerSize": 130}
        return entry

    def preupload(self, repo: str, revision: str) -> None:
        files = json.loads(self.body)["files"]
        if repo not in self.server.repos:
            return self._answer({"error": "not found"}, 404)
        modes = ["lfs" if f["path"].endswith((".safetensors", "tokenizer.json")) else "regular" for f in files]
        answer = [
            {"path": f["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
            for f, mode in zip(files, modes, strict=True)
        ]
        self._answer({"files": answer})

    def lfs_batch(self, repo: str) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.blobs:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}
            objects.append(entry)
        self._answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.blobs[oid] = self.body
        self._answer({})

    def commit(self, repo: str, revision: str) -> None:
        known = self.server.repos[repo]
        files = dict(known.head[1])
        for line in self.body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit") not in (None, known.head[0]):
                return self._answer({"error": "A commit has happened since"}, 412)
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
                known.lfs.add(value["path"])
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        oid = known.commit(files)
        return self._answer({"commitUrl": f"{self._url(repo)}/commit/{oid}", "commitOid": oid})

    def resolve(self, repo: str, revision: str, name: str) -> None:
        known = self.server.repos.get(repo)
        commit = known.at(revision) if known else None
        if known is None or commit is None or name not in commit[1]:
            return self._answer({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        data = commit[1][name]
        if name in known.lfs and self.server.spoil is not None:
            data = self.server.spoil + data[len(self.server.spoil) :]
        etag = hashlib.sha256(commit[1][name]).hexdigest() if name in known.lfs else hashlib.sha1(data).hexdigest()
        headers = {"X-Repo-Commit": commit[0], "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start and int(start[1]):
            at = int(start[1])
            headers["Content-Range"] = f"bytes {at}-{len(data) - 1}/{len(data)}"
            return self._answer(data[at:], 206, headers)
        return self._answer(data, 200, headers)


ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", MODELS, Handler.info),
    ("GET", MODELS + "/revision/(?P<revision>[^/]+)", Handler.info),
    ("GET", MODELS + "/tree/(?P<revision>[^/]+)", Handler.tree),
    ("POST", MODELS + "/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", MODELS + "/commit/(?P<revision>[^/]+)", Handler.commit),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", Handler.lfs_put),
    *(
        (method, "/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Handler.resolve)
        for method in ("GET", "HEAD")
    ),
]
