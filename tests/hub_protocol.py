"""The Hub's models and Spaces, and the HTTP endpoints by which `huggingface_hub` reaches them, for local_hub.py.

Repos live in memory, file contents in a content-addressed folder. A Space is kept under its id with `spaces/` before
it, as its addresses have it. The standard library does it all, except that the YAML of cards is read by PyYAML and
Xet's chunks by hf_xet, both of which the client brings along.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import os
import re
import secrets
import shutil
import struct
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

LFS_PATTERNS = "*.7z *.arrow *.bin *.gguf *.gz *.h5 *.model *.msgpack *.npy *.npz *.onnx *.parquet *.pkl *.pt *.pth"
LFS_PATTERNS += " *.safetensors *.tar *.tflite *.tgz *.xz *.zip *.zst *tfevents*"
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS.split())
LICENSES = "apache-2.0 mit openrail bigscience-openrail-m cc-by-4.0 cc-by-nc-4.0 cc-by-sa-4.0 cc0-1.0 bsd-3-clause"
LICENSES += " gpl-3.0 llama2 llama3 llama3.1 llama3.2 gemma unknown other"
SDKS = ("gradio", "docker", "static")
SHA256 = re.compile(r"[0-9a-f]{64}")


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


ROUTES: list[tuple[str, str, re.Pattern[str], str]] = []


def route(methods: str, template: str, host: str = "hub") -> Callable[[Callable], Callable]:
    """Register a handler; {repo} takes `owner/name`, {path} the rest, any other field one (quoted) segment."""
    patterns = {"repo": "(?:spaces/)?[^/]+/[^/]+?", "path": ".+"}
    expression = re.sub(r"\{(\w+)\}", lambda m: f"(?P<{m[1]}>{patterns.get(m[1], '[^/]+')})", template)

    def register(function: Callable) -> Callable:
        ROUTES.extend((host, method, re.compile(expression), function.__name__) for method in methods.split())
        return function

    return register


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def owner_of(repo_id: str) -> str:
    return repo_id.removeprefix("spaces/").split("/")[0]


def metadata_problems(content: str, kind: str = "model") -> tuple[list[str], list[str]]:
    """Errors and warnings on the YAML header of the README.md of a model or a Space."""
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
    errors: list[str] = space_problems(card) if kind == "space" else []
    warnings: list[str] = []
    licenses = card.get("license", "unknown")
    for name in licenses if isinstance(licenses, list) else [licenses]:
        if name not in LICENSES.split():
            errors.append(f'"license" must be one of [{", ".join(LICENSES.split())}]')
    for key in ("tags", "datasets", "metrics"):
        if key in card and not (isinstance(card[key], list) and all(isinstance(item, str) for item in card[key])):
            errors.append(f'"{key}" must be an array of strings')
    bases = card.get("base_model", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(base)):
            errors.append(f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
    indexes = card.get("model-index", [])
    if not (isinstance(indexes, list) and all(isinstance(index, dict) and "results" in index for index in indexes)):
        return [*errors, '"model-index" must be an array of models with results'], warnings
    for place, index in enumerate(indexes):
        for number, result in enumerate(index["results"]):
            for key in ("task", "dataset", "metrics"):
                if key not in result:
                    errors.append(f'"model-index[{place}].results[{number}].{key}" is required')
    if "pipeline_tag" in card and not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", str(card["pipeline_tag"])):
        warnings.append(f'"{card["pipeline_tag"]}" is not a known pipeline_tag')
    return errors, warnings


def space_problems(card: dict[str, Any]) -> list[str]:
    """Errors on what only a Space has."""
    colours = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
    allowed = {"sdk": SDKS, "colorFrom": colours, "colorTo": colours}
    errors = [f'"{key}" must be one of [{", ".join(of)}]' for key, of in allowed.items() if card.get(key) not in of]
    if card.get("sdk") == "gradio" and not re.fullmatch(r"\d+\.\d+\.\d+", str(card.get("sdk_version"))):
        errors.append('"sdk_version" must be a version')
    if len(card.get("short_description", "")) > 60:
        errors.append('"short_description" length must be less than or equal to 60 characters long')
    if not all(re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) for name in card.get("models", [])):
        errors.append('"models" must be model ids')
    return errors


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


class HubProtocol:
    """Answers requests to the Hub (`endpoint`) and to its storage host (`cdn`), which never accepts a token."""

    endpoint: str
    cdn: str

    def __init__(self, storage: str | Path, xet: bool = False) -> None:
        self.storage = Path(storage)
        self.xet = xet
        self.part_size, self.regular_size, self.page_size = 1 << 26, 10_000_000, 1000
        self.users: dict[str, User] = {}
        self.repos: dict[str, Repo] = {}
        self.publishers: dict[str, str] = {}  # repo -> the identity whose holder gets a token that may write there
        self.collections: dict[str, dict[str, Any]] = {}  # by slug
        self.errors: list[Exception] = []
        self._secret = secrets.token_hex(8)
        self._xet_hashes: dict[str, str] = {}
        for folder in ("objects", "parts", "xet"):
            (self.storage / folder).mkdir(parents=True, exist_ok=True)

    def add_repo(self, repo_id: str, private: bool = False, gated: str | bool = False) -> Repo:
        """A repo with the Hub's initial commit; `granted` of the result are the users who may read a gated one."""
        repo = self.repos[repo_id] = Repo(repo_id, private, gated)
        self._write_commit(repo, "main", None, "initial commit", "", {".gitattributes": GITATTRIBUTES.encode()})
        return repo

    def _answer(self, request: Request) -> Answer:
        path = urlsplit(request.path).path
        if path.startswith("/api/spaces/"):
            path = f"/api/models/{path.removeprefix('/api/')}"
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
        namespace = owner_of(repo_id)
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
        if not pull_request and not user.may("repo.write", owner_of(repo_id), repo_id):
            raise Refusal(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def _author(self, request: Request) -> str:
        user = self._user(request)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return user.name

    def _own_pull(self, request: Request, repo_id: str, revision: str) -> bool:
        """Whether the revision is a pull request of the user who asks."""
        pull = re.fullmatch(r"refs/pr/(\d+)", revision)
        user, repo = self._user(request), self.repos.get(repo_id)
        opened = repo.pulls.get(int(pull[1])) if pull and repo else None
        return opened is not None and user is not None and opened["author"] == user.name

    # Commits and contents

    def _store(self, content: bytes, digest: str) -> str:
        target = self.storage / "objects" / digest
        if not target.exists():
            partial = target.with_name(f"{digest}.{secrets.token_hex(4)}")
            partial.write_bytes(content)
            os.replace(partial, target)
        return digest

    def _content(self, entry: Entry) -> bytes:
        return (self.storage / "objects" / (entry.sha256 or entry.oid)).read_bytes()

    def _regular(self, content: bytes) -> Entry:
        return Entry(self._store(content, git_blob_id(content)), len(content))

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
                files[path] = self._large(repo, self._store(content, sha256_of(content)), len(content))
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

    @route("POST", "/oauth/token")
    def _exchange(self, request: Request) -> Answer:
        wanted = request.json()
        repo_id = wanted["resource"]
        if repo_id not in self.publishers or self.publishers[repo_id] != wanted["subject_token"]:
            raise Refusal(400, "invalid_grant", body={"error": "invalid_grant"})
        token = f"hf_jwt_{secrets.token_hex(8)}"
        self.users[token] = User("a trusted publisher", token, "fineGrained", (), {repo_id: ["repo.write"]})
        return Answer(body={"access_token": token, "token_type": "bearer", "expires_in": 3600})

    @route("GET", "/api/whoami-v2")
    def _whoami(self, request: Request) -> Answer:
        user = self._user(request)
        if request.token is not None and request.token.startswith("hf_jwt_"):
            raise Refusal(403, "This token belongs to no account")  # what the Hub answers is not known: nobody may ask
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        token: dict[str, Any] = {"displayName": "test", "role": user.role, "createdAt": "2024-01-01T00:00:00.000Z"}
        if user.role == "fineGrained":
            kinds = {name: "model" if "/" in name else "user" if name == user.name else "org" for name in user.scoped}
            entities = {name: {"_id": name, "type": kind, "name": name} for name, kind in kinds.items()}
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
        kind = wanted.get("type") or "model"
        if kind == "space" and wanted.get("sdk") not in SDKS:
            raise Refusal(400, f'"sdk" must be one of [{", ".join(SDKS)}]')
        repo_id = f"{'spaces/' if kind == 'space' else ''}{namespace}/{wanted['name']}"
        known = {name for user in self.users.values() for name in (user.name, *user.organizations)}
        if namespace not in known:
            raise Refusal(404, f'Namespace "{namespace}" not found')
        if not user.may("repo.write", namespace, repo_id):
            raise Refusal(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
        url = {"url": f"{self.endpoint}/{repo_id}", "name": repo_id.removeprefix("spaces/")}
        if repo_id in self.repos:
            message = f"You already created this {kind} repo"
            raise Refusal(409, message, body={"error": message, **url})
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.add_repo(repo_id, private=private)
        return Answer(body={**url, "private": private})

    @route("POST", "/api/collections")
    def _create_collection(self, request: Request) -> Answer:
        user, wanted = self._user(request), request.json()
        if user is None or wanted["namespace"] not in (user.name, *user.organizations):
            raise Refusal(403, "You don't have the rights to create a collection there")
        slug = f"{wanted['namespace']}/{wanted['title'].lower().replace(' ', '-')}-0123456789abcdef01234567"
        if slug in self.collections:
            raise Refusal(409, "it exists", body={"error": "it exists", "slug": slug})
        made = {"slug": slug, "title": wanted["title"], "private": wanted["private"], "items": [], "position": 0}
        owner = {"owner": {"name": wanted["namespace"]}, "theme": "blue", "upvotes": 0}
        self.collections[slug] = {**made, **owner, "lastUpdated": "2026-01-01T00:00:00.000Z"}
        return Answer(body=self.collections[slug])

    @route("GET", "/api/collections/{repo}")
    def _collection(self, request: Request, repo: str) -> Answer:
        return Answer(body=self.collections[repo])

    @route("POST", "/api/collections/{repo}/items")
    def _add_to_collection(self, request: Request, repo: str) -> Answer:
        items, item = self.collections[repo]["items"], request.json()["item"]
        if any(known["id"] == item["id"] for known in items):
            raise Refusal(409, "Item already in collection")
        self._readable(request, item["id"])
        items.append({"_id": str(len(items)), "id": item["id"], "type": item["type"], "position": len(items)})
        return Answer(body=self.collections[repo])

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, request: Request) -> Answer:
        asked = request.json()
        errors, warnings = metadata_problems(asked["content"], asked["repoType"])
        body = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
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
        info: dict[str, Any] = {
            "_id": git_blob_id(repo.encode())[:24],
            "id": repo.removeprefix("spaces/"),
            "modelId": repo.removeprefix("spaces/"),
            "author": owner_of(repo),
        }
        info |= {"sha": commit.id, "lastModified": commit.date, "createdAt": commit.date, "siblings": siblings}
        info |= {"private": found.private, "gated": found.gated, "disabled": False, "downloads": 0, "likes": 0}
        wanted = request.query.get("expand")
        if wanted:
            info = {key: info[key] for key in ["_id", "id", *wanted] if key in info}
        return Answer(body=info | ({} if wanted else {"tags": [], "spaces": []}))

    def _describe(self, commit: Commit, path: str) -> dict[str, Any] | None:
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
        commit = self._readable(request, repo).resolve(revision)
        recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix = f"{path.strip('/')}/" if path.strip("/") else ""
        names = set()
        for name in (name.removeprefix(prefix) for name in commit.files if name.startswith(prefix)):
            parts = name.split("/")
            names |= {"/".join(parts[:depth]) for depth in range(1, len(parts) + 1 if recursive else 2)}
        if prefix and not names:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound", X_Repo_Commit=commit.id)
        return self._page(request, [self._describe(commit, prefix + name) for name in sorted(names)])

    @route("POST", "/api/models/{repo}/paths-info/{revision}")
    def _paths_info(self, request: Request, repo: str, revision: str) -> Answer:
        commit = self._readable(request, repo).resolve(revision)
        paths = parse_qs(request.body.decode()).get("paths", [])
        described = (self._describe(commit, path.strip("/")) for path in paths)
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
        author = self._author(request)
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
        as_pull = "create_pr" in request.query or self._own_pull(request, repo, revision)
        found = self._writable(request, repo, as_pull)
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
                fnmatch.fnmatch(path, pattern)
                for rule in ignored
                for pattern in (rule, f"*/{rule}", f"{rule.rstrip('/')}/*")
            )
            if path in present:
                about["oid"] = present[path].sha256 or present[path].oid
            decided.append(about)
        return Answer(body={"files": decided, "commitOid": found.resolve(revision).id})

    @route("POST", "/api/models/{repo}/commit/{revision}")
    def _commit(self, request: Request, repo: str, revision: str) -> Answer:
        as_pull = "create_pr" in request.query
        found = self._writable(request, repo, as_pull or self._own_pull(request, repo, revision))
        lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        if not lines or lines[0]["key"] != "header" or not lines[0]["value"].get("summary"):
            raise Refusal(400, "The first line must be a header with a summary")
        header, head = lines[0]["value"], found.resolve(revision)
        if not as_pull and revision not in found.branches and not revision.startswith("refs/"):
            raise Refusal(400, f"Cannot commit to {revision}: it is not a branch")
        if header.get("parentCommit") not in (None, head.id):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        changes: dict[str, Entry | None] = {}
        for line in lines[1:]:
            changes |= self._operation(found, head, line["key"], line["value"])
        author = self._author(request)
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
            kind = "space" if repo.id.startswith("spaces/") else "model"
            if path == "README.md" and (errors := metadata_problems(content.decode(), kind)[0]):
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
        transfers = asked.get("transfers", ["basic"])
        if self.xet and "xet" in transfers:
            known = [{"oid": item["oid"], "size": item["size"]} for item in asked["objects"]]
            return Answer(body={"transfer": "xet", "objects": known})
        multipart = "multipart" in transfers
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
        if len(content) != size or sha256_of(content) != oid:
            raise Refusal(400, f"BadDigest: the content does not have sha256 {oid} and {size} bytes")
        self.repos[repo_id].objects[self._store(content, oid)] = size

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
            as_pull = "create_pr" in request.query or self._own_pull(request, repo, revision)
            self._writable(request, repo, as_pull)
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
