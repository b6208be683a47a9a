"""A Hub on the loopback interface: enough of its HTTP interface for pushes, pull requests, branches, tags and loading.

It keeps everything in memory, wants one token, and can be told to break off after some uploads, to answer with a page
of HTML as gateways do, and to call a function at every request.
"""

import base64
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse


TOKEN = "hf_" + "a" * 34
REPO, REF = r"(?P<repo>[^/]+/[^/]+)", r"(?P<ref>refs/pr/\d+|[^/]+)"


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str = "", **more) -> None:
        self.status, self.body, self.code = status, {"error": message, **more}, code


@dataclass
class Repository:
    """Commits are dictionaries of path to content; refs (branches, tags, pull requests) name commits."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    refs: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})

    def commit_of(self, ref: str) -> str:
        if ref not in self.refs and ref not in self.commits:
            raise Refused(404, f"no revision {ref}", "RevisionNotFound")
        return self.refs.get(ref, ref)


class FakeHub:
    """The state of the Hub, and one method per kind of request."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # large files by SHA-256
        self.uploads: list[str] = []  # large files as they arrived
        self.arriving = threading.Lock()
        self.fail_after: int | None = None  # break off once so many large files have arrived
        self.html: str | None = None  # requests that a page answers: a pattern of method and path
        self.watch: Callable[[int], None] = lambda number: None  # called before a request is answered
        self.log: list[str] = []
        self.url = ""

    # ------------------------------------------------------------------------------------------------- for the tests
    def files(self, repo: str, ref: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo]
        return repository.commits[repository.commit_of(ref)]

    # ------------------------------------------------------------------------------------------------------- requests
    def repository(self, repo: str) -> Repository:
        if repo not in self.repositories:
            raise Refused(404, f"no repository {repo}", "RepoNotFound")
        return self.repositories[repo]

    def whoami(self, **_) -> dict:
        return {"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def validate_yaml(self, **_) -> dict:
        return {"errors": [], "warnings": []}

    def create(self, body: bytes, **_) -> dict:
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        answer = {"url": f"{self.url}/{repo}", "id": repo}
        if repo in self.repositories:
            raise Refused(409, f"{repo} exists", **answer)
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.repositories[repo] = Repository(private)
        return answer

    def preupload(self, body: bytes, **_) -> dict:
        def mode(file: dict) -> str:
            return "lfs" if file["path"].endswith(".safetensors") else "regular"

        plain = {"shouldIgnore": False, "oid": None}
        files = json.loads(body)["files"]
        return {"files": [{"path": file["path"], "uploadMode": mode(file)} | plain for file in files]}

    def lfs_batch(self, body: bytes, **_) -> dict:
        def answer(wanted: dict) -> dict:
            if wanted["oid"] in self.objects:
                return wanted
            return wanted | {"actions": {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}}

        return {"transfer": "basic", "objects": [answer(wanted) for wanted in json.loads(body)["objects"]]}

    def lfs_upload(self, body: bytes, oid: str, **_) -> dict:
        assert hashlib.sha256(body).hexdigest() == oid
        with self.arriving:  # clients send several files at a time, and only so many may arrive
            if self.fail_after is not None and len(self.uploads) >= self.fail_after:
                raise Refused(400, "the connection broke")
            self.uploads.append(oid)
            self.objects[oid] = body
        return {}

    def commit(self, repo: str, ref: str, body: bytes, query: dict, **_) -> dict:
        repository = self.repository(repo)
        files = dict(repository.commits[repository.commit_of(ref)])
        for line in body.splitlines():
            kind, value = (entry := json.loads(line))["key"], entry["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        commit, url = hashlib.sha1(f"{repo}{len(repository.commits)}".encode()).hexdigest(), None
        if query.get("create_pr") == ["1"]:
            number = next(n for n in itertools.count(1) if f"refs/pr/{n}" not in repository.refs)
            ref, url = f"refs/pr/{number}", f"{self.url}/{repo}/discussions/{number}"
        repository.commits[commit] = files
        repository.refs[ref] = commit
        return {"commitUrl": f"{self.url}/{repo}/commit/{commit}", "commitOid": commit, "pullRequestUrl": url}

    def branch(self, repo: str, name: str, **_) -> dict:
        refs = self.repository(repo).refs
        if name in refs:
            raise Refused(409, f"the branch {name} exists")
        refs[name] = refs["main"]
        return {}

    def tag(self, repo: str, ref: str, body: bytes, **_) -> dict:
        repository = self.repository(repo)
        repository.refs[json.loads(body)["tag"]] = repository.commit_of(ref)
        return {}

    def tree(self, repo: str, ref: str, **_) -> list:
        repository = self.repository(repo)
        files = repository.commits[repository.commit_of(ref)]
        return [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in files.items()
        ]

    def about(self, repo: str, ref: str | None = None, **_) -> dict:
        repository = self.repository(repo)
        commit = repository.commit_of(ref or "main")
        siblings = [{"rfilename": path} for path in repository.commits[commit]]
        known = {"id": repo, "modelId": repo, "sha": commit, "private": repository.private, "tags": []}
        return known | {"siblings": siblings}

    def resolve(self, repo: str, ref: str, path: str, **_) -> tuple[bytes, dict]:
        repository = self.repository(repo)
        commit = repository.commit_of(ref)
        if path not in repository.commits[commit]:
            raise Refused(404, f"no file {path}", "EntryNotFound")
        data = repository.commits[commit][path]
        return data, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}


ROUTES = [
    (r"/api/whoami-v2", FakeHub.whoami),
    (r"/api/validate-yaml", FakeHub.validate_yaml),
    (r"/api/repos/create", FakeHub.create),
    (rf"/api/models/{REPO}/preupload/.+", FakeHub.preupload),
    (rf"/{REPO}\.git/info/lfs/objects/batch", FakeHub.lfs_batch),
    (r"/lfs/(?P<oid>[0-9a-f]+)", FakeHub.lfs_upload),
    (rf"/api/models/{REPO}/commit/{REF}", FakeHub.commit),
    (rf"/api/models/{REPO}/branch/(?P<name>.+)", FakeHub.branch),
    (rf"/api/models/{REPO}/tag/{REF}", FakeHub.tag),
    (rf"/api/models/{REPO}/tree/{REF}(/.*)?", FakeHub.tree),
    (rf"/api/models/{REPO}(/revision/{REF})?", FakeHub.about),
    (rf"/{REPO}/resolve/{REF}/(?P<path>.+)", FakeHub.resolve),
]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, data: bytes, headers: dict) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _answer(self) -> None:
        hub, url, body = self.server.hub, urlparse(self.path), self._body()
        path = unquote(url.path)
        hub.log.append(f"{self.command} {path}")
        hub.watch(len(hub.log))
        if hub.html and re.search(hub.html, hub.log[-1]):
            return self._send(200, b"<html><title>Sign in</title></html>", {"Content-Type": "text/html"})
        try:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/lfs/"):
                raise Refused(401, "Invalid username or password.")
            for pattern, method in ROUTES:
                if match := re.fullmatch(pattern, path):
                    answer = method(hub, body=body, query=parse_qs(url.query), **match.groupdict())
                    break
            else:
                raise Refused(404, f"the fake Hub does not know {self.command} {path}")
        except Refused as refused:
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            return self._send(refused.status, json.dumps(refused.body).encode(), headers)
        data, headers = answer if isinstance(answer, tuple) else (json.dumps(answer).encode(), {})
        kind = "application/octet-stream" if isinstance(answer, tuple) else "application/json"
        self._send(200, data, {"Content-Type": kind} | headers)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _answer


@contextmanager
def serve() -> Iterator[FakeHub]:
    """A new, empty Hub that answers until the block ends."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub, hub.url = hub, f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
