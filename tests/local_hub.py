"""A Hub on this machine: the HTTP protocol of model repos as `huggingface_hub` speaks it, with faults on request.

Repos live in memory, file contents in a content-addressed folder. Two servers run: the Hub itself and a storage host
under another name and port, which large files are sent to and fetched from and which must never see a token. The
standard library does it all, but for YAML metadata (PyYAML) and Xet uploads (hf_xet), which the client needs as well.

    python tests/local_hub.py FOLDER      # serves until interrupted and prints what to export before `hf` or `upload.py`
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fnmatch
import hashlib
import json
import os
import re
import secrets
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

LFS_PATTERNS = "*.7z *.arrow *.bin *.gguf *.gz *.h5 *.model *.msgpack *.npy *.npz *.onnx *.parquet *.pkl *.pt *.pth"
LFS_PATTERNS += " *.safetensors *.tar *.tflite *.tgz *.xz *.zip *.zst *tfevents*"
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS.split())
LICENSES = (
    "apache-2.0 mit openrail bigscience-openrail-m cc-by-4.0 cc-by-nc-4.0 cc-by-sa-4.0 cc0-1.0 bsd-3-clause gpl-3.0"
)
LICENSES += " llama2 llama3 llama3.1 llama3.2 gemma unknown other"
SHA1, SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")


class Refusal(Exception):
    """An error answer: status, sentence, and the X-Error-Code by which the client picks its exception."""

    def __init__(self, status: int, message: str, code: str | None = None, body: Any = None, **headers: str) -> None:
        super().__init__(message)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers["X-Error-Message"] = message
        if code is not None:
            headers["X-Error-Code"] = code
        self.answer = Answer(status, {"error": message} if body is None else body, headers)


@dataclass
class Answer:
    """What goes back: bytes as they are, anything else as JSON."""

    status: int = 200
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    """One request as it came in; `status` is filled in when it is answered, and stays None when the line was cut."""

    host: str
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = b""
    status: int | None = None

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query)

    @property
    def token(self) -> str | None:
        scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
        return token if scheme.lower() == "bearer" else None

    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise Refusal(400, f"The body is not JSON: {error}") from error


@dataclass
class User:
    name: str
    token: str
    role: str
    organizations: tuple[str, ...]
    scoped: dict[str, list[str]]

    def may(self, permission: str, namespace: str, repo_id: str) -> bool:
        """Whether the token allows `repo.write` or `repo.content.read` on a repo of this namespace."""
        if self.role == "fineGrained":
            granted = self.scoped.get(namespace, []) + self.scoped.get(repo_id, [])
            return permission in granted or (permission == "repo.content.read" and "repo.write" in granted)
        owned = namespace in (self.name, *self.organizations)
        return owned and (self.role == "write" or permission == "repo.content.read")


@dataclass
class Entry:
    """A file in a commit: git blob id and, where the content lies with the storage host, its sha256."""

    oid: str
    size: int
    sha256: str | None = None
    pointer_size: int = 0


@dataclass
class Commit:
    id: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, Entry]


@dataclass
class Repo:
    id: str
    private: bool
    gated: str | bool
    granted: set[str] = field(default_factory=set)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, dict[str, Any]] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, int] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a tag, `refs/pr/N` or `refs/heads/NAME`, or a commit id."""
        pull = re.fullmatch(r"refs/pr/(\d+)", revision)
        if pull and int(pull[1]) in self.pulls:
            return self.commits[self.pulls[int(pull[1])]["head"]]
        name = revision.removeprefix("refs/heads/")
        found = self.branches.get(name) or self.tags.get(revision) or revision
        if found not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[found]

    def move(self, revision: str, commit: Commit) -> None:
        """Point the branch or pull request at a new commit."""
        self.commits[commit.id] = commit
        if revision.startswith("refs/pr/"):
            self.pulls[int(revision.removeprefix("refs/pr/"))]["head"] = commit.id
        else:
            self.branches[revision.removeprefix("refs/heads/")] = commit.id


@dataclass
class Fault:
    when: Callable[[Request], bool]
    kind: str | int | Callable[[Request], Any]
    after: bool
    times: float
    retry_after: int


ROUTES: list[tuple[str, str, re.Pattern[str], str]] = []


def route(methods: str, template: str, host: str = "hub") -> Callable[[Callable], Callable]:
    """Register a handler; {repo} takes `owner/name`, {path} the rest, any other field one (quoted) segment."""
    patterns = {"repo": "[^/]+/[^/]+?", "path": ".+"}
    expression = re.sub(r"\{(\w+)\}", lambda m: f"(?P<{m[1]}>{patterns.get(m[1], '[^/]+')})", template)

    def register(function: Callable) -> Callable:
        ROUTES.extend((host, method, re.compile(expression), function.__name__) for method in methods.split())
        return function

    return register


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def metadata_problems(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings on the YAML header of a model card."""
    import yaml

    header = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*$", content, re.DOTALL | re.MULTILINE)
    if header is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        card = yaml.safe_load(header[1]) or {}
    except yaml.YAMLError as error:
        return [f"YAML metadata cannot be parsed: {error}"], []
    if not isinstance(card, dict):
        return ["YAML metadata must be a mapping"], []
    errors, warnings = [], []
    licenses = card.get("license", "unknown")
    for name in licenses if isinstance(licenses, list) else [licenses]:
        if name not in LICENSES.split():
            errors.append(f'"license" must be one of [{", ".join(LICENSES.split())}]')
    for key in ("tags", "datasets", "metrics"):
        if key in card and not (isinstance(card[key], list) and all(isinstance(item, str) for item in card[key])):
            errors.append(f'"{key}" must be an array of strings')
    bases = card.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(base)):
            errors.append(f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
    for index in card.get("model-index", []):
        for number, result in enumerate(index.get("results", [])):
            for key in ("task", "dataset", "metrics"):
                if key not in result:
                    errors.append(f'"model-index[0].results[{number}].{key}" is required')
    if "pipeline_tag" in card and not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", str(card["pipeline_tag"])):
        warnings.append(f'"{card["pipeline_tag"]}" is not a known pipeline_tag')
    return errors, warnings


def xet_file(shard: Path, sha256: str) -> tuple[str, int] | None:
    """Xet hash and size of the file with this sha256, if the shard (records of 48 bytes after a header) has it."""
    content = shard.read_bytes()
    records = list(struct.iter_unpack("<32sIIII", content[48 : len(content) // 48 * 48]))

    def as_hex(raw: bytes) -> str:
        return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))

    at = 0
    while records[at][0] != b"\xff" * 32:
        name, flags, segments, *_ = records[at]
        size = sum(record[2] for record in records[at + 1 : at + 1 + segments])
        at += 1 + segments * (2 if flags >> 31 & 1 else 1)
        if flags >> 30 & 1:
            if as_hex(records[at][0]) == sha256:
                return as_hex(name), size
            at += 1
    return None


class _Handler(BaseHTTPRequestHandler):
    """The wire: reads a request whole, hands it to the hub, writes the answer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits 40 ms for the client's acknowledgement of its headers
    hub: LocalHub
    host: str

    def log_message(self, format: str, *args: object) -> None:
        pass

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def respond(self) -> None:
        with contextlib.suppress(ConnectionError):
            self.hub._serve(self, Request(self.host, self.command, self.path, self.headers))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = respond

    def write(self, answer: Answer, whole: bool = True) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        headers = {"X-Request-Id": f"Root=local-{secrets.token_hex(4)}", **answer.headers}
        headers.setdefault("Content-Type", "application/octet-stream" if body is answer.body else "application/json")
        self.send_response(answer.status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if whole else body[: len(body) // 2])
        if not whole:
            self.close_connection = True


class LocalHub:
    """A Hub with users and repos of the test's choosing.

        with LocalHub(folder) as hub:
            hub.add_user("ada", "hf_ada")                              # role write, or read, or fineGrained
            hub.add_repo("ada/model", private=True)
            hub.commit("ada/model", {"config.json": b"{}"})            # without HTTP, to prepare a state
            with hub.online("hf_ada") as api:                          # huggingface_hub's HfApi in this process
                api.upload_file(...)
            hub.run("print(1)", home=tmp_path, token="hf_ada")         # the same in a fresh process
            hub.files("ada/model", "main"), hub.refs("ada/model"), hub.history("ada/model", "main")

    `hub.log` keeps every request to both hosts as `Request`, `hub.requests` the same as (method, path), and
    `hub.cdn_requests` those that reached the storage host, with headers. `fail_at` breaks requests; see there.
    Limits that tests lower: `part_size` (above it a large file goes up in parts), `regular_size` (above it every file
    is a large file), `page_size` (of tree and commit listings). `xet=True` lets large files go through Xet, into a
    `local://` folder. A bug in the server itself is kept in `hub.errors` and raised when the hub is closed.

    One deliberate difference: an anonymous request for a repo that is private or missing is answered 401 with
    `X-Error-Code: RepoNotFound`. The client turns the Hub's bare 401 into the same exception, but only over https.
    """

    def __init__(self, storage: str | Path, port: int = 0, xet: bool = False) -> None:
        self.storage = Path(storage)
        self.xet = xet
        self.part_size, self.regular_size, self.page_size = 1 << 26, 10_000_000, 1000
        self.users: dict[str, User] = {}
        self.repos: dict[str, Repo] = {}
        self.log: list[Request] = []
        self.errors: list[Exception] = []
        self._faults: list[Fault] = []
        self._xet_hashes: dict[str, str] = {}
        self._secret = secrets.token_hex(8)
        self._lock = threading.RLock()
        self._servers = {host: self._server(host, port if host == "hub" else 0) for host in ("hub", "storage")}
        self.endpoint = f"http://127.0.0.1:{self._servers['hub'].server_port}"
        self.cdn = f"http://localhost:{self._servers['storage'].server_port}"

    def _server(self, host: str, port: int) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self, "host": host}))
        server.daemon_threads = True
        return server

    def __enter__(self) -> LocalHub:
        for folder in ("objects", "parts", "xet"):
            (self.storage / folder).mkdir(parents=True, exist_ok=True)
        for server in self._servers.values():
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()
        if self.errors and kind is None:
            raise self.errors[0]

    # Preparing and looking, without HTTP

    def add_user(
        self,
        name: str,
        token: str,
        role: str = "write",
        organizations: tuple[str, ...] = (),
        scoped: dict[str, list[str]] | None = None,
    ) -> None:
        """A token of a user; `scoped` gives a fineGrained one its permissions by namespace or repo."""
        self.users[token] = User(name, token, role, organizations, scoped or {})

    def add_repo(self, repo_id: str, private: bool = False, gated: str | bool = False) -> Repo:
        """A repo with the Hub's initial commit; `granted` of the result are the users who may read a gated one."""
        repo = self.repos[repo_id] = Repo(repo_id, private, gated)
        self._write_commit(repo, "main", None, "initial commit", "", {".gitattributes": GITATTRIBUTES.encode()})
        return repo

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | None],
        message: str = "Commit files",
        revision: str = "main",
        author: str = "local-hub",
    ) -> str:
        """Commit files (None deletes one) to a branch, which is created from main when missing; returns the id."""
        repo = self.repos[repo_id]
        with self._lock:
            if revision not in repo.branches and not revision.startswith("refs/pr/"):
                repo.branches[revision] = repo.branches["main"]
            head = repo.resolve(revision)
            return self._write_commit(repo, revision, head, message, "", files, author).id

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Every file of a revision with its content."""
        with self._lock:
            return {path: self._content(entry) for path, entry in self._files(repo_id, revision).items()}

    def _files(self, repo_id: str, revision: str) -> dict[str, Entry]:
        return self.repos[repo_id].resolve(revision).files

    def refs(self, repo_id: str) -> dict[str, str]:
        """Branches and their commits."""
        return dict(self.repos[repo_id].branches)

    def history(self, repo_id: str, revision: str = "main") -> list[str]:
        """Commit titles, newest first."""
        return [commit.title for commit in self._ancestors(self.repos[repo_id], revision)]

    def fail_at(
        self,
        when: int | Callable[[Request], bool],
        kind: str | int | Callable[[Request], Any] = "drop",
        after: bool = False,
        times: float = 1,
        retry_after: int = 1,
    ) -> None:
        """Break the `when`-th request from now (1 is the next, both hosts counted), or those `when(request)` picks.

        kind: "drop" hangs up, "truncate" hangs up half-way through the answer, a status such as "503" or "429" is
        answered (429 with Retry-After), a callable is called with the request, which is then served as usual unless
        it raises Refusal. With `after` the request is carried out first and only its answer is lost or replaced.
        `times` is how many requests are hit, `float("inf")` for every one.
        """
        if isinstance(when, int):
            target = len(self.log) + when
            self._faults.append(Fault(lambda _: len(self.log) == target, kind, after, times, retry_after))
        else:
            self._faults.append(Fault(when, kind, after, times, retry_after))

    def heal(self) -> None:
        """Forget every fault that has not struck yet."""
        self._faults.clear()

    @property
    def requests(self) -> list[tuple[str, str]]:
        return [(request.method, request.path) for request in self.log]

    @property
    def cdn_requests(self) -> list[Request]:
        return [request for request in self.log if request.host == "storage"]

    # Clients

    def client_env(self, home: str | Path, token: str | None = None, **more: str) -> dict[str, str]:
        """The environment of a process whose Hub is this one and whose caches and login lie in `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE_"))}
        kept |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
        kept |= {"HF_HUB_DISABLE_XET": "0" if self.xet else "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        kept |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_MODULES_CACHE": str(Path(home) / "modules")}
        return kept | ({} if token is None else {"HF_TOKEN": token}) | more

    def run(
        self, code: str, home: str | Path, token: str | None = None, arguments: Iterable[str] = (), **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run Python code in a fresh process against this hub; it has to succeed."""
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, env=self.client_env(home, token, **env), capture_output=True, text=True)
        if done.returncode:
            raise AssertionError(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    @contextlib.contextmanager
    def online(self, token: str | None = None) -> Iterator[Any]:
        """An HfApi on this hub in a process which was started offline; the client's constants are put back after."""
        from huggingface_hub import HfApi, constants

        changed = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": not self.xet}
        before = {name: getattr(constants, name) for name in changed}
        environment = {name: os.environ.pop(name) for name in ("HF_TOKEN",) if name in os.environ}
        try:
            for name, value in changed.items():
                setattr(constants, name, value)
            yield HfApi(endpoint=self.endpoint, token=False if token is None else token)
        finally:
            for name, value in before.items():
                setattr(constants, name, value)
            os.environ.update(environment)

    # Requests and faults

    def _serve(self, handler: _Handler, request: Request) -> None:
        with self._lock:
            self.log.append(request)
            fault = next((fault for fault in self._faults if fault.times > 0 and fault.when(request)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.kind == "drop" and not fault.after:
            handler.close_connection = True
            return
        request.body = handler.read_body()
        try:
            if fault is not None and not fault.after:
                self._strike(fault, request)
            try:
                with self._lock:
                    answer = self._answer(request)
            except Refusal as refusal:
                answer = refusal.answer
            if fault is not None and fault.after:
                self._strike(fault, request)
        except Refusal as refusal:
            answer = refusal.answer
        if fault is not None and fault.kind == "drop":
            handler.close_connection = True
            return
        request.status = answer.status
        handler.write(answer, whole=fault is None or fault.kind != "truncate")

    def _strike(self, fault: Fault, request: Request) -> None:
        if callable(fault.kind):
            fault.kind(request)
        elif fault.kind not in ("drop", "truncate"):
            status = int(fault.kind)
            if status == 429:
                limit = {"Retry_After": str(fault.retry_after), "RateLimit": f'"api";r=0;t={fault.retry_after}'}
                limit["RateLimit_Policy"] = '"fixed window";"api";q=500;w=300'
                raise Refusal(status, "We had to rate limit you.", **limit)
            raise Refusal(status, "Internal Error - We're working hard to fix this as soon as possible!")

    def _answer(self, request: Request) -> Answer:
        path = urlsplit(request.path).path
        for host, method, pattern, name in ROUTES:
            if host == request.host and method == request.method and (match := pattern.fullmatch(path)):
                arguments = {key: unquote(value) for key, value in match.groupdict().items()}
                try:
                    return getattr(self, name)(request, **arguments)
                except Refusal:
                    raise
                except Exception as error:
                    traceback.print_exc()
                    self.errors.append(error)
                    raise Refusal(501, f"The local hub failed: {error!r}") from error
        raise Refusal(404, f"Sorry, we can't find the page you are looking for: {request.method} {path}")

    # Who may do what

    def _user(self, request: Request) -> User | None:
        token = request.token
        if token is not None and token not in self.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.users[token] if token is not None else None

    def _readable(self, request: Request, repo_id: str, content: bool = False) -> Repo:
        """The repo, if this request may see it; with `content`, if it may read files too (gated repos)."""
        user = self._user(request)
        repo = self.repos.get(repo_id)
        namespace = repo_id.split("/")[0]
        member = user is not None and user.may("repo.content.read", namespace, repo_id)
        if repo is None or (repo.private and not member):
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if content and repo.gated and not member and (user is None or user.name not in repo.granted):
            message = f"Access to model {repo_id} is restricted"
            if user is None:
                raise Refusal(401, f"{message}. You must be authenticated to access it. Please log in.", "GatedRepo")
            raise Refusal(403, f"{message} and you are not in the authorized list. Ask for access first.", "GatedRepo")
        return repo

    def _writable(self, request: Request, repo_id: str, pull_request: bool = False) -> Repo:
        repo = self._readable(request, repo_id)
        user = self._user(request)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if user.role == "read":
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        if not pull_request and not user.may("repo.write", repo_id.split("/")[0], repo_id):
            raise Refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    # Commits and contents

    def _store(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        target = self.storage / "objects" / digest
        if not target.exists():
            partial = target.with_name(f"{digest}.{secrets.token_hex(4)}")
            partial.write_bytes(content)
            os.replace(partial, target)
        return digest

    def _content(self, entry: Entry) -> bytes:
        if entry.sha256 is not None:
            return (self.storage / "objects" / entry.sha256).read_bytes()
        return (self.storage / "objects" / entry.oid).read_bytes()

    def _regular(self, content: bytes) -> Entry:
        oid = git_blob_id(content)
        (self.storage / "objects" / oid).write_bytes(content)
        return Entry(oid, len(content))

    def _large(self, repo: Repo, sha256: str, size: int) -> Entry:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        repo.objects[sha256] = size
        if self.xet:
            self._into_xet(sha256)
        return Entry(git_blob_id(pointer), size, sha256, len(pointer))

    def _is_large(self, path: str, size: int, sample: bytes) -> bool:
        matches = any(fnmatch.fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in LFS_PATTERNS.split())
        return size > 0 and (matches or size > self.regular_size or b"\0" in sample)

    def _write_commit(
        self,
        repo: Repo,
        revision: str,
        parent: Commit | None,
        title: str,
        message: str,
        changes: Mapping[str, bytes | Entry | None],
        author: str = "local-hub",
    ) -> Commit:
        files = dict(parent.files) if parent else {}
        for path, content in changes.items():
            if content is None:
                del files[path]
            elif isinstance(content, Entry):
                files[path] = content
            elif self._is_large(path, len(content), content[:512]):
                files[path] = self._large(repo, self._store(content), len(content))
            else:
                files[path] = self._regular(content)
        tree = sorted((path, entry.oid) for path, entry in files.items())
        identity = json.dumps([repo.id, parent and parent.id, title, message, tree])
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        commit_id = hashlib.sha1(identity.encode()).hexdigest()
        commit = Commit(commit_id, parent.id if parent else None, title, message, author, date, files)
        repo.move(revision, commit)
        return commit

    def _ancestors(self, repo: Repo, revision: str) -> Iterator[Commit]:
        commit: Commit | None = repo.resolve(revision)
        while commit is not None:
            yield commit
            commit = repo.commits[commit.parent] if commit.parent else None

    # Accounts and repos

    @route("GET", "/api/whoami-v2")
    def _whoami(self, request: Request) -> Answer:
        user = self._user(request)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        token: dict[str, Any] = {"displayName": "test", "role": user.role, "createdAt": "2024-01-01T00:00:00.000Z"}
        if user.role == "fineGrained":
            kinds = {name: "model" if "/" in name else "user" if name == user.name else "org" for name in user.scoped}
            entities = {
                name: {"_id": git_blob_id(name.encode())[:24], "type": kinds[name], "name": name} for name in kinds
            }
            scoped = [{"entity": entities[name], "permissions": user.scoped[name]} for name in user.scoped]
            token["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scoped}
        organizations = [{"type": "org", "name": name, "roleInOrg": "write"} for name in user.organizations]
        about = {"type": "user", "id": git_blob_id(user.name.encode())[:24], "name": user.name, "fullname": user.name}
        auth = {"type": "access_token", "accessToken": token}
        return Answer(body={**about, "orgs": organizations, "isPro": False, "auth": auth})

    @route("POST", "/api/repos/create")
    def _create_repo(self, request: Request) -> Answer:
        user, wanted = self._user(request), request.json()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        namespace = wanted.get("organization") or user.name
        repo_id = f"{namespace}/{wanted['name']}"
        known = {name for user in self.users.values() for name in (user.name, *user.organizations)}
        if namespace not in known:
            raise Refusal(404, f'Namespace "{namespace}" not found')
        if not user.may("repo.write", namespace, repo_id):
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        url = {"url": f"{self.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.repos:
            message = "You already created this model repo"
            raise Refusal(409, message, body={"error": message, **url})
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.add_repo(repo_id, private=private)
        return Answer(body={**url, "private": private})

    @route("DELETE", "/api/repos/delete")
    def _delete_repo(self, request: Request) -> Answer:
        user, wanted = self._user(request), request.json()
        namespace = wanted.get("organization") or (user.name if user else "")
        del self.repos[self._writable(request, f"{namespace}/{wanted['name']}").id]
        return Answer(body="OK")

    @route("PUT", "/api/models/{repo}/settings")
    def _settings(self, request: Request, repo: str) -> Answer:
        target, wanted = self._writable(request, repo), request.json()
        target.private = wanted.get("visibility", "private" if target.private else "public") == "private"
        target.private = wanted.get("private", target.private)
        target.gated = wanted.get("gated", target.gated)
        return Answer(body={"private": target.private, "gated": target.gated})

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, request: Request) -> Answer:
        errors, warnings = metadata_problems(request.json()["content"])
        body = {
            key: [{"message": text} for text in texts] for key, texts in [("errors", errors), ("warnings", warnings)]
        }
        return Answer(400 if errors else 200, body)

    @route("GET", "/api/models/{repo}/auth-check")
    def _auth_check(self, request: Request, repo: str) -> Answer:
        self._readable(request, repo, content=True)
        return Answer(body={})

    @route("GET", "/api/models/{repo}/auth-check/write")
    def _auth_check_write(self, request: Request, repo: str) -> Answer:
        self._writable(request, repo)
        return Answer(body={})

    # Reading

    @route("GET", "/api/models/{repo}/revision/{revision}")
    @route("GET", "/api/models/{repo}")
    def _model_info(self, request: Request, repo: str, revision: str = "main") -> Answer:
        found = self._readable(request, repo)
        commit = found.resolve(revision)
        blobs = "blobs" in request.query
        siblings = []
        for path, entry in sorted(commit.files.items()):
            about: dict[str, Any] = {"rfilename": path}
            if blobs:
                about |= {"size": entry.size, "blobId": entry.oid}
                if entry.sha256:
                    about["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
            siblings.append(about)
        info = {"_id": git_blob_id(repo.encode())[:24], "id": repo, "modelId": repo, "author": repo.split("/")[0]}
        info |= {"sha": commit.id, "lastModified": commit.date, "createdAt": commit.date, "siblings": siblings}
        info |= {"private": found.private, "gated": found.gated, "disabled": False, "downloads": 0, "likes": 0}
        wanted = request.query.get("expand")
        if wanted:
            info = {key: info[key] for key in ["_id", "id", *wanted] if key in info}
        return Answer(body=info | ({} if wanted else {"tags": [], "spaces": []}))

    def _describe(self, repo: Repo, commit: Commit, path: str, expand: bool = False) -> dict[str, Any] | None:
        entry = commit.files.get(path)
        if entry is None:
            inside = sorted((p, e.oid) for p, e in commit.files.items() if p.startswith(f"{path}/"))
            oid = git_blob_id(json.dumps(inside).encode())
            about: dict[str, Any] = {"type": "directory", "oid": oid, "size": 0, "path": path}
            if not inside:
                return None
        else:
            about = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
            if entry.sha256:
                about["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
            if entry.sha256 in self._xet_hashes:
                about["xetHash"] = self._xet_hashes[entry.sha256]
        if expand:
            about["lastCommit"] = {"id": commit.id, "title": commit.title, "date": commit.date}
        return about

    def _page(self, request: Request, items: list[Any]) -> Answer:
        """One page of a listing, with a Link to the next."""
        start = int(request.query.get("cursor", ["0"])[0])
        headers = {}
        if start + self.page_size < len(items):
            query = {key: values[0] for key, values in request.query.items()} | {"cursor": str(start + self.page_size)}
            url = f"{self.endpoint}{urlsplit(request.path).path}?{urlencode(query)}"
            headers["Link"] = f'<{url}>; rel="next"'
        return Answer(body=items[start : start + self.page_size], headers=headers)

    @route("GET", "/api/models/{repo}/tree/{revision}/{path}")
    @route("GET", "/api/models/{repo}/tree/{revision}")
    def _tree(self, request: Request, repo: str, revision: str, path: str = "") -> Answer:
        found = self._readable(request, repo)
        commit = found.resolve(revision)
        recursive, expand = (
            request.query.get(key, ["false"])[0].lower() in ("true", "1") for key in ("recursive", "expand")
        )
        prefix = f"{path.strip('/')}/" if path.strip("/") else ""
        names = set()
        for name in (name.removeprefix(prefix) for name in commit.files if name.startswith(prefix)):
            parts = name.split("/")
            names |= {"/".join(parts[:depth]) for depth in range(1, len(parts) + 1 if recursive else 2)}
        if prefix and not names:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound", X_Repo_Commit=commit.id)
        return self._page(request, [self._describe(found, commit, prefix + name, expand) for name in sorted(names)])

    @route("POST", "/api/models/{repo}/paths-info/{revision}")
    def _paths_info(self, request: Request, repo: str, revision: str) -> Answer:
        found = self._readable(request, repo)
        commit = found.resolve(revision)
        if "json" in request.headers.get("Content-Type", ""):
            asked = request.json()
            paths, expand = asked["paths"], bool(asked.get("expand"))
        else:
            form = parse_qs(request.body.decode())
            paths, expand = form.get("paths", []), form.get("expand", [""])[0].lower() in ("true", "1")
        described = (self._describe(found, commit, path.strip("/"), expand) for path in paths)
        return Answer(body=[about for about in described if about is not None])

    @route("GET", "/api/models/{repo}/commits/{revision}")
    def _commits(self, request: Request, repo: str, revision: str) -> Answer:
        listed = []
        for commit in self._ancestors(self._readable(request, repo), revision):
            about = {"id": commit.id, "title": commit.title, "message": commit.message, "date": commit.date}
            listed.append(about | {"authors": [{"user": commit.author}]})
        return self._page(request, listed)

    @route("GET HEAD", "/{repo}/resolve/{revision}/{path}")
    def _resolve(self, request: Request, repo: str, revision: str, path: str) -> Answer:
        found = self._readable(request, repo, content=True)
        commit = found.resolve(revision)
        entry = commit.files.get(path)
        if entry is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.id)
        etag = f'"{entry.sha256 or entry.oid}"'
        headers = {"X-Repo-Commit": commit.id, "X-Linked-Etag": etag, "X-Linked-Size": str(entry.size)}
        if entry.sha256 is None:
            headers["Location"] = f"/api/resolve-cache/models/{repo}/{commit.id}/{quote(path)}"
            return Answer(307, b"Temporary Redirect", headers)
        headers["Location"] = self._signed("GET", f"{repo}/{entry.sha256}")
        if entry.sha256 in self._xet_hashes:
            headers["X-Xet-Hash"] = self._xet_hashes[entry.sha256]
            headers["Link"] = f'<{self.endpoint}/api/models/{repo}/xet-read-token/{commit.id}>; rel="xet-auth"'
        return Answer(302, b"Found", headers)

    @route("GET HEAD", "/api/resolve-cache/models/{repo}/{revision}/{path}")
    def _resolve_cache(self, request: Request, repo: str, revision: str, path: str) -> Answer:
        entry = self._readable(request, repo, content=True).commits[revision].files[path]
        return self._ranged(request, self._content(entry), {"ETag": f'"{entry.oid}"', "X-Repo-Commit": revision})

    def _ranged(self, request: Request, content: bytes, headers: dict[str, str]) -> Answer:
        headers["Accept-Ranges"] = "bytes"
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range") or "")
        if wanted is None or wanted[0] == "bytes=-":
            return Answer(200, content, headers)
        last = len(content) - 1
        start = int(wanted[1]) if wanted[1] else max(0, len(content) - int(wanted[2]))
        stop = min(last, int(wanted[2])) if wanted[1] and wanted[2] else last
        if start > last or stop < start:
            raise Refusal(416, "Range Not Satisfiable", Content_Range=f"bytes */{len(content)}")
        headers["Content-Range"] = f"bytes {start}-{stop}/{len(content)}"
        return Answer(206, content[start : stop + 1], headers)

    # Refs and pull requests

    @route("GET", "/api/models/{repo}/refs")
    def _refs(self, request: Request, repo: str) -> Answer:
        found = self._readable(request, repo)

        def listed(prefix: str, refs: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"{prefix}{n}", "targetCommit": c} for n, c in refs.items()]

        body = {"branches": listed("refs/heads/", found.branches), "converts": []}
        body["tags"] = listed("refs/tags/", found.tags)
        if "include_prs" in request.query:
            pulls = [(str(number), pull["head"]) for number, pull in found.pulls.items()]
            body["pullRequests"] = [{"name": n, "ref": f"refs/pr/{n}", "targetCommit": c} for n, c in pulls]
        return Answer(body=body)

    @route("POST DELETE", "/api/models/{repo}/branch/{name}")
    def _branch(self, request: Request, repo: str, name: str) -> Answer:
        found = self._writable(request, repo)
        if request.method == "DELETE":
            if name == "main":
                raise Refusal(403, "Cannot delete the default branch")
            if found.branches.pop(name, None) is None:
                raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
        else:
            if name in found.branches:
                raise Refusal(409, f"Reference already exists: refs/heads/{name}")
            found.branches[name] = found.resolve((request.json() or {}).get("startingPoint") or "main").id
        return Answer(body={})

    @route("POST DELETE", "/api/models/{repo}/tag/{name}")
    def _tag(self, request: Request, repo: str, name: str) -> Answer:
        found = self._writable(request, repo)
        if request.method == "DELETE":
            if found.tags.pop(name, None) is None:
                raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
        else:
            tag = request.json()["tag"]
            if tag in found.tags:
                raise Refusal(409, f"Tag reference exists already: {tag}")
            found.tags[tag] = found.resolve(name).id
        return Answer(body={})

    def _open_pull(self, repo: Repo, title: str, description: str, author: str, base: Commit) -> int:
        number = len(repo.pulls) + 1
        pull = {"title": title, "description": description, "author": author, "head": base.id, "date": base.date}
        repo.pulls[number] = pull
        return number

    @route("GET POST", "/api/models/{repo}/discussions")
    def _discussions(self, request: Request, repo: str) -> Answer:
        if request.method == "GET":
            found = self._readable(request, repo)
            listed = [self._discussion(request, repo, str(number)).body for number in found.pulls]
            return Answer(body={"discussions": listed, "count": len(listed), "start": 0})
        found, wanted = self._writable(request, repo, pull_request=True), request.json()
        author = self._user(request).name
        number = self._open_pull(found, wanted["title"], wanted["description"], author, found.resolve("main"))
        return Answer(body={"num": number, "pullRequest": True})

    @route("GET", "/api/models/{repo}/discussions/{number}")
    def _discussion(self, request: Request, repo: str, number: str) -> Answer:
        pull = self._readable(request, repo).pulls.get(int(number))
        if pull is None:
            raise Refusal(404, "Discussion not found")
        about = {"num": int(number), "title": pull["title"], "status": "draft", "isPullRequest": True, "events": []}
        about |= {"author": {"name": pull["author"]}, "createdAt": pull["date"], "filesWithConflicts": []}
        about |= {"repo": {"name": repo, "type": "model"}, "changes": {"base": "refs/heads/main"}, "diff": ""}
        return Answer(body=about)

    # Writing

    @route("POST", "/api/models/{repo}/preupload/{revision}")
    def _preupload(self, request: Request, repo: str, revision: str) -> Answer:
        found = self._writable(request, repo, pull_request="create_pr" in request.query)
        present, asked = found.resolve(revision).files, request.json()
        hosted = self._content(present[".gitignore"]).decode() if ".gitignore" in present else ""
        ignored = [
            line.strip() for line in asked.get("gitIgnore", hosted).splitlines() if line.strip()[:1] not in ("", "#")
        ]
        decided = []
        for file in asked["files"]:
            path = file["path"]
            large = self._is_large(path, file["size"], base64.b64decode(file["sample"]))
            about: dict[str, Any] = {"path": path, "uploadMode": "lfs" if large else "regular"}
            about["shouldIgnore"] = any(
                fnmatch.fnmatch(path, p)
                or fnmatch.fnmatch(path, f"{p.rstrip('/')}/*")
                or fnmatch.fnmatch(path, f"*/{p}")
                for p in ignored
            )
            if path in present:
                about["oid"] = present[path].sha256 or present[path].oid
            decided.append(about)
        return Answer(body={"files": decided, "commitOid": found.resolve(revision).id})

    @route("POST", "/api/models/{repo}/commit/{revision}")
    def _commit(self, request: Request, repo: str, revision: str) -> Answer:
        as_pull = "create_pr" in request.query
        found = self._writable(request, repo, pull_request=as_pull)
        lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        if not lines or lines[0]["key"] != "header" or not lines[0]["value"].get("summary"):
            raise Refusal(400, "The first line must be a header with a summary")
        header, head = lines[0]["value"], found.resolve(revision)
        if SHA1.fullmatch(revision):
            raise Refusal(400, "Cannot commit to a commit: name a branch")
        if header.get("parentCommit") not in (None, head.id):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        changes = {}
        for line in lines[1:]:
            changes |= self._operation(found, head, line["key"], line["value"])
        author = self._user(request).name
        body: dict[str, Any] = {"success": True, "hookOutput": ""}
        if as_pull:
            number = self._open_pull(found, header["summary"], header.get("description", ""), author, head)
            revision = f"refs/pr/{number}"
            body["pullRequestUrl"] = f"{self.endpoint}/{repo}/discussions/{number}"
        message = header.get("description", "")
        commit = self._write_commit(found, revision, head, header["summary"], message, changes, author)
        return Answer(body=body | {"commitOid": commit.id, "commitUrl": f"{self.endpoint}/{repo}/commit/{commit.id}"})

    def _operation(self, repo: Repo, head: Commit, key: str, value: dict[str, Any]) -> dict[str, Entry | None]:
        """What one line of a commit changes."""
        path = value["path"]
        if path.startswith("/") or {"", ".", "..", ".git"} & set(path.rstrip("/").split("/")):
            raise Refusal(400, f"Invalid path: {path}")
        if key == "file":
            content = base64.b64decode(value["content"])
            if self._is_large(path, len(content), content[:512]):
                raise Refusal(400, f"{path} is binary or too large: upload it to the large file storage first")
            if path == "README.md" and (errors := metadata_problems(content.decode())[0]):
                raise Refusal(400, "Invalid metadata in README.md: " + "; ".join(errors))
            return {path: self._regular(content)}
        if key == "lfsFile":
            size = self._known_object(repo, value["oid"])
            if size is None or value.get("size", size) != size:
                raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path} ({value['oid']})")
            return {path: self._large(repo, value["oid"], size)}
        prefix = f"{path.rstrip('/')}/"
        gone = [p for p in head.files if p == path or (key == "deletedFolder" and p.startswith(prefix))]
        if not gone:
            raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        return dict.fromkeys(gone)

    # Large files

    def _known_object(self, repo: Repo, sha256: str) -> int | None:
        """Size of a large file this repo has, or None."""
        if self.xet and sha256 not in repo.objects:
            self._from_xet(repo, sha256)
        return repo.objects.get(sha256)

    def _signed(self, method: str, key: str, host: str | None = None, **query: str) -> str:
        """An address that needs no token; it allows one method on one object."""
        signature = hashlib.sha256(f"{self._secret}:{method}:{key}:{sorted(query.items())}".encode()).hexdigest()
        return f"{host or self.cdn}/lfs/{key}?{urlencode({**query, 'signature': signature})}"

    def _check_signature(self, request: Request, key: str) -> dict[str, str]:
        if request.headers.get("Authorization"):
            raise Refusal(400, "Only one auth mechanism allowed")
        query = {name: values[0] for name, values in request.query.items() if name != "signature"}
        method = "GET" if request.method == "HEAD" else request.method
        if request.query.get("signature") != parse_qs(urlsplit(self._signed(method, key, **query)).query)["signature"]:
            raise Refusal(403, "SignatureDoesNotMatch")
        return query

    @route("POST", "/{repo}.git/info/lfs/objects/batch")
    def _lfs_batch(self, request: Request, repo: str) -> Answer:
        asked = request.json()
        found = self._writable(request, repo, pull_request=True)
        if asked.get("hash_algo", "sha256") != "sha256" or asked["operation"] != "upload":
            raise Refusal(422, "Only uploads by sha256 are supported")
        multipart = "multipart" in asked.get("transfers", ["basic"])
        objects = [self._batch_object(found, item["oid"], item["size"], multipart) for item in asked["objects"]]
        parts = any("chunk_size" in o.get("actions", {}).get("upload", {}).get("header", {}) for o in objects)
        return Answer(body={"transfer": "multipart" if parts else "basic", "objects": objects})

    def _batch_object(self, repo: Repo, oid: str, size: int, multipart: bool) -> dict[str, Any]:
        about: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
        if not SHA256.fullmatch(oid) or size <= 0:
            return about | {"error": {"code": 422, "message": "Validation error: not a sha256 and a size"}}
        if self._known_object(repo, oid) == size:
            return about
        key = f"{repo.id}/{oid}"
        if multipart and size > self.part_size:
            numbers = range(1, -(-size // self.part_size) + 1)
            header = {f"{n:05d}": self._signed("PUT", key, part=str(n), size=str(size)) for n in numbers}
            href = self._signed("POST", key, host=self.endpoint, size=str(size))
            upload: dict[str, Any] = {"href": href, "header": {"chunk_size": str(self.part_size), **header}}
        else:
            upload = {"href": self._signed("PUT", key, size=str(size))}
        verify = {"href": f"{self.endpoint}/{repo.id}.git/info/lfs/objects/verify"}
        return about | {"actions": {"upload": upload, "verify": verify}}

    def _accept(self, repo_id: str, oid: str, size: int, content: bytes) -> None:
        """Keep an uploaded object if it is what its name says."""
        if len(content) != size or hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, f"BadDigest: the content does not have sha256 {oid} and {size} bytes")
        self.repos[repo_id].objects[self._store(content)] = size

    @route("PUT", "/lfs/{repo}/{oid}", host="storage")
    def _put_object(self, request: Request, repo: str, oid: str) -> Answer:
        query = self._check_signature(request, f"{repo}/{oid}")
        etag = hashlib.md5(request.body).hexdigest()
        if "part" in query:
            (self.storage / "parts" / f"{oid}.{int(query['part']):05d}").write_bytes(request.body)
        else:
            self._accept(repo, oid, int(query["size"]), request.body)
        return Answer(headers={"ETag": f'"{etag}"'})

    @route("POST", "/lfs/{repo}/{oid}")
    def _complete_parts(self, request: Request, repo: str, oid: str) -> Answer:
        query = self._check_signature(request, f"{repo}/{oid}")
        content = b""
        for part in request.json()["parts"]:
            piece = self.storage / "parts" / f"{oid}.{part['partNumber']:05d}"
            if not piece.exists() or hashlib.md5(piece.read_bytes()).hexdigest() != part["etag"].strip('"'):
                raise Refusal(400, f"InvalidPart: {part['partNumber']}")
            content += piece.read_bytes()
        self._accept(repo, oid, int(query["size"]), content)
        for piece in (self.storage / "parts").glob(f"{oid}.*"):
            piece.unlink()
        return Answer(body={})

    @route("POST", "/{repo}.git/info/lfs/objects/verify")
    def _verify(self, request: Request, repo: str) -> Answer:
        found, asked = self._writable(request, repo, pull_request=True), request.json()
        if found.objects.get(asked["oid"]) != asked["size"]:
            raise Refusal(404, f"Object {asked['oid']} of {asked['size']} bytes was not uploaded")
        return Answer(body={})

    @route("GET HEAD", "/lfs/{repo}/{oid}", host="storage")
    def _get_object(self, request: Request, repo: str, oid: str) -> Answer:
        self._check_signature(request, f"{repo}/{oid}")
        content = (self.storage / "objects" / oid).read_bytes()
        return self._ranged(request, content, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    # Xet: hf_xet itself writes to and reads from `local://` folders. A folder belongs to one process at a time, hence
    # every token comes with a copy of its own, and what a commit refers to is gathered in the folder "all".

    @route("GET", "/api/models/{repo}/xet-{kind}-token/{revision}")
    def _xet_token(self, request: Request, repo: str, kind: str, revision: str) -> Answer:
        if kind == "write":
            self._writable(request, repo, pull_request="create_pr" in request.query)
        else:
            self._readable(request, repo, content=True).resolve(revision)
        folder = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=self.storage / "xet"))
        if (self.storage / "xet" / "all").exists():
            shutil.copytree(self.storage / "xet" / "all", folder, dirs_exist_ok=True)
        url, token, expiry = f"local://{folder}", secrets.token_hex(16), int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expiry)}
        return Answer(body={"casUrl": url, "accessToken": token, "exp": expiry}, headers=headers)

    def _into_xet(self, sha256: str) -> None:
        import hf_xet

        if sha256 not in self._xet_hashes:
            with hf_xet.XetSession().new_upload_commit(endpoint=f"local://{self.storage / 'xet' / 'all'}") as commit:
                handle = commit.start_upload_file(str(self.storage / "objects" / sha256), sha256=sha256)
            self._xet_hashes[sha256] = handle.result().xet_info.hash

    def _from_xet(self, repo: Repo, sha256: str) -> None:
        """Take over a file from the folder of whichever upload finished it, if one did."""
        import hf_xet

        for folder in (self.storage / "xet").glob("write-*"):
            found = next(filter(None, (xet_file(shard, sha256) for shard in folder.rglob("shards/*.mdb"))), None)
            if found is None:
                continue
            with tempfile.TemporaryDirectory(dir=self.storage / "xet") as copy:
                shutil.copytree(folder, copy, dirs_exist_ok=True)
                with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{copy}") as group:
                    group.start_download_file(hf_xet.XetFileInfo(*found), f"{copy}/content")
                self._accept(repo.id, sha256, found[1], Path(copy, "content").read_bytes())
            return


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a Hub on this machine until interrupted.")
    parser.add_argument("storage", type=Path, help="folder for the contents of files; created when missing")
    parser.add_argument("--port", type=int, default=0, help="port of the endpoint (default: a free one)")
    parser.add_argument("--user", default="user", help="name of the user who may write (default: user)")
    parser.add_argument("--xet", action="store_true", help="take large files through Xet (needs hf_xet on the client)")
    arguments = parser.parse_args()
    with LocalHub(arguments.storage, arguments.port, arguments.xet) as hub:
        token = f"hf_{secrets.token_hex(16)}"
        hub.add_user(arguments.user, token)
        switches = "" if arguments.xet else " HF_HUB_DISABLE_XET=1"
        print(f"export HF_ENDPOINT={hub.endpoint} HF_TOKEN={token}{switches}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
