"""A Hub on this machine: serves hub_protocol.py to real clients over HTTP, with faults on request.

Two servers run: the Hub itself and a storage host under another name and port, which large files are sent to and
fetched from and which must never see a token. To try `hf` or `upload.py` by hand:

    python tests/local_hub.py FOLDER    # prints what to export first, then serves until interrupted
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from hub_protocol import Answer, HubProtocol, Refusal, Request, User


@dataclass
class Fault:
    when: Callable[[Request], bool]
    kind: str | int | Callable[[Request], Any]
    after: bool
    times: float
    retry_after: int


class _Handler(BaseHTTPRequestHandler):
    """The wire: reads a request whole, hands it to the hub, writes the answer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits 40 ms for the client's acknowledgement of its headers
    hub: LocalHub
    host: str

    def log_message(self, format: str, *args: object) -> None:
        pass

    def read_body(self) -> bytes:
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionError("the client left in the middle of a request")
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


class LocalHub(HubProtocol):
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
        super().__init__(storage, xet)
        self.log: list[Request] = []
        self._faults: list[Fault] = []
        self._seen = 0
        self._lock = threading.RLock()
        self._servers = {host: self._server(host, port if host == "hub" else 0) for host in ("hub", "storage")}
        self.endpoint = f"http://127.0.0.1:{self._servers['hub'].server_port}"
        self.cdn = f"http://localhost:{self._servers['storage'].server_port}"

    def _server(self, host: str, port: int) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self, "host": host}))
        server.daemon_threads = True
        return server

    def __enter__(self) -> LocalHub:
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
            return {path: self._content(entry) for path, entry in self.repos[repo_id].resolve(revision).files.items()}

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
            target = self._seen + when
            self._faults.append(Fault(lambda _: self._seen == target, kind, after, times, retry_after))
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
            self._seen += 1
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
