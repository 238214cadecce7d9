"""The Hub's protocol as the local Hub follows it, told by huggingface_hub's own client over HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_hf_file_metadata, hf_hub_url
from huggingface_hub import lfs as hub_lfs
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, hf_raise_for_status
from local_hub import LocalHub, Request

import vispruner

# The client's own uploads pass bytes to httpx in a way that httpx now calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CARD = b"---\nlicense: apache-2.0\ntags:\n- tiny\n---\n# A model\n"
WEIGHTS = bytes(range(256)) * 10


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    """Ada writes, Bob writes elsewhere, Eve only reads; large files go up in parts above 2000 bytes."""
    with LocalHub(tmp_path / "storage") as hub:
        hub.part_size = 2000
        hub.add_user("ada", "hf_ada", organizations=("lab",))
        hub.add_user("bob", "hf_bob")
        hub.add_user("eve", "hf_eve", role="read")
        yield hub


@pytest.fixture
def ada(hub: LocalHub) -> Iterator[HfApi]:
    hub.add_repo("ada/model")
    with hub.online("hf_ada") as api:
        yield api


@pytest.fixture
def client(hub: LocalHub, ada: HfApi) -> Callable[[str | None], HfApi]:
    """The client with another token, or with none."""
    return lambda token: HfApi(endpoint=hub.endpoint, token=False if token is None else token)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a small model repo holds: a card, a config, code and weights."""
    folder = tmp_path / "model"
    (folder / "code").mkdir(parents=True)
    (folder / "README.md").write_bytes(CARD)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "code" / "model.py").write_bytes(b"x = 1\n")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds the client would have slept before each retry; it does not."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def refusal(error: pytest.ExceptionInfo[HfHubHTTPError]) -> tuple[int, str | None]:
    return error.value.response.status_code, error.value.response.headers.get("X-Error-Code")


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def paths(hub: LocalHub, method: str, part: str) -> list[str]:
    return [path for verb, path in hub.requests if verb == method and part in path]


# Accounts


def test_whoami_tells_what_a_token_may_do(hub: LocalHub, ada: HfApi, client: Callable[[str | None], HfApi]) -> None:
    hub.add_user("ada", "hf_fine", role="fineGrained", scoped={"ada/model": ["repo.write"]})

    roles = {token: client(token).whoami()["auth"]["accessToken"] for token in ("hf_ada", "hf_eve", "hf_fine")}

    assert [roles[token]["role"] for token in roles] == ["write", "read", "fineGrained"]
    (scope,) = roles["hf_fine"]["fineGrained"]["scoped"]
    assert (scope["entity"]["name"], scope["permissions"]) == ("ada/model", ["repo.write"])
    assert [(org["name"], org["roleInOrg"]) for org in ada.whoami()["orgs"]] == [("lab", "write")]


def test_an_unknown_token_is_refused_everywhere(client: Callable[[str | None], HfApi]) -> None:
    for question in (lambda api: api.whoami(), lambda api: api.model_info("ada/model")):
        with pytest.raises(HfHubHTTPError) as error:
            question(client("hf_wrong"))
        assert error.value.response.headers["X-Error-Message"] == "Invalid credentials in Authorization header"
        assert refusal(error) == (401, None)


# Creating repos


@pytest.mark.parametrize("private", [True, False])
def test_a_new_repo_has_its_visibility_and_one_commit(hub: LocalHub, ada: HfApi, private: bool) -> None:
    url = ada.create_repo("ada/new", private=private)

    assert url.repo_id == "ada/new"
    assert ada.model_info("ada/new").private is private
    assert hub.history("ada/new") == ["initial commit"]
    assert list(hub.files("ada/new")) == [".gitattributes"]


@pytest.mark.parametrize(
    ("token", "repo_id", "status"),
    [
        ("hf_ada", "ada/model", 409),
        ("hf_ada", "bob/model", 403),
        ("hf_ada", "nobody/model", 404),
        ("hf_eve", "eve/model", 403),
        (None, "ada/other", 401),
    ],
)
def test_creating_a_repo_is_refused(
    client: Callable[[str | None], HfApi], token: str | None, repo_id: str, status: int
) -> None:
    with pytest.raises(HfHubHTTPError) as error:
        client(token).create_repo(repo_id)
    assert error.value.response.status_code == status


def test_an_existing_repo_may_be_created_again_if_asked_for(ada: HfApi) -> None:
    assert ada.create_repo("ada/model", exist_ok=True).repo_id == "ada/model"


def test_organizations_and_fine_grained_tokens_are_namespaces_too(
    hub: LocalHub, ada: HfApi, client: Callable[[str | None], HfApi]
) -> None:
    hub.add_user("ada", "hf_fine", role="fineGrained", scoped={"lab": ["repo.write"]})

    ada.create_repo("lab/one")
    client("hf_fine").create_repo("lab/two")
    with pytest.raises(HfHubHTTPError) as error:
        client("hf_fine").create_repo("ada/three")

    assert refusal(error) == (403, None)
    assert {"lab/one", "lab/two"} <= set(hub.repos)


# Uploading


def test_a_folder_becomes_one_commit(hub: LocalHub, ada: HfApi, folder: Path) -> None:
    done = ada.upload_folder(repo_id="ada/model", folder_path=folder, commit_message="First", commit_description="!")

    assert hub.files("ada/model").items() >= contents(folder).items()
    assert hub.history("ada/model") == ["First", "initial commit"]
    assert hub.refs("ada/model") == {"main": done.oid}
    assert done.commit_url == f"{hub.endpoint}/ada/model/commit/{done.oid}"


def test_weights_are_large_files_and_text_is_not(hub: LocalHub, ada: HfApi, folder: Path) -> None:
    (folder / "picture").write_bytes(b"\x89PNG\0")
    (folder / "empty.bin").write_bytes(b"")
    ada.upload_folder(repo_id="ada/model", folder_path=folder)

    large = {file.rfilename for file in ada.model_info("ada/model", files_metadata=True).siblings if file.lfs}
    assert large == {"model.safetensors", "picture"}


def test_a_second_upload_of_the_same_folder_makes_no_commit(hub: LocalHub, ada: HfApi, folder: Path) -> None:
    first = ada.upload_folder(repo_id="ada/model", folder_path=folder)
    second = ada.upload_folder(repo_id="ada/model", folder_path=folder)

    assert first.oid == second.oid
    assert len(paths(hub, "POST", "/commit/")) == 1
    assert len(paths(hub, "PUT", "/lfs/")) == 2


def test_ignored_files_stay_out(hub: LocalHub, ada: HfApi, folder: Path) -> None:
    (folder / ".gitignore").write_text("# caches\n*.pyc\ncode/\n")
    (folder / "module.pyc").write_bytes(b"cached")
    ada.upload_folder(repo_id="ada/model", folder_path=folder)
    later = [CommitOperationAdd("other.pyc", b"cached"), CommitOperationAdd("other.py", b"")]
    ada.create_commit("ada/model", later, commit_message="Rules of the repo itself")

    expected = [".gitattributes", ".gitignore", "README.md", "config.json", "model.safetensors", "other.py"]
    assert sorted(hub.files("ada/model")) == expected


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("license: made-up", '"license" must be one of'),
        ("tags: tiny", '"tags" must be an array of strings'),
        ("base_model: 3 apples", '"base_model" with value "3 apples" is not valid'),
        ("tags: [a", "cannot be parsed"),
        ("base_model: ", '"base_model" with value "None" is not valid'),
        ("model-index: x", '"model-index" must be an array'),
        ("model-index:\n- name: x\n  results:\n  - task: {type: vqa}", r'results\[0\].dataset" is required'),
    ],
)
def test_bad_metadata_stops_a_commit_before_anything_is_uploaded(
    hub: LocalHub, ada: HfApi, folder: Path, header: str, message: str
) -> None:
    (folder / "README.md").write_text(f"---\n{header}\n---\n")
    operations = [CommitOperationAdd(name, folder / name) for name in ("README.md", "model.safetensors")]

    with pytest.raises(ValueError, match=message):
        ada.create_commit("ada/model", operations, commit_message="Bad card")
    assert hub.requests == [("POST", "/api/validate-yaml")]


def test_a_card_without_metadata_is_warned_of(ada: HfApi) -> None:
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        ada.upload_file(path_or_fileobj=b"# A model", path_in_repo="README.md", repo_id="ada/model")


# Large files


def batch(ada: HfApi, content: bytes, transfers: list[str] | None = None) -> dict:
    """What the Hub tells a client to do with this file."""
    info = hub_lfs.UploadInfo.from_bytes(content)
    actions, errors, _ = hub_lfs.post_lfs_batch_info(
        [info], ada.token, "model", "ada/model", endpoint=ada.endpoint, transfers=transfers
    )
    assert errors == []
    return actions[0]


def test_a_large_file_goes_to_the_storage_host_in_parts_and_without_the_token(
    hub: LocalHub, ada: HfApi, folder: Path
) -> None:
    ada.upload_file(path_or_fileobj=folder / "model.safetensors", path_in_repo="w.bin", repo_id="ada/model")

    sent = [request for request in hub.cdn_requests if request.method == "PUT"]
    assert sorted(len(request.body) for request in sent) == [560, 2000]
    assert all(request.headers.get("Authorization") is None for request in hub.cdn_requests)
    assert any(request.token == "hf_ada" for request in hub.log)
    assert hub.files("ada/model")["w.bin"] == WEIGHTS


@pytest.mark.parametrize(("size", "transfers", "parts"), [(2000, None, 0), (2001, None, 2), (2001, ["basic"], 0)])
def test_only_files_above_the_part_size_go_up_in_parts(
    ada: HfApi, size: int, transfers: list[str] | None, parts: int
) -> None:
    upload = batch(ada, b"x" * size, transfers)["actions"]["upload"]
    assert len([name for name in upload.get("header", {}) if name.isdigit()]) == parts


def test_content_that_is_not_what_was_announced_is_refused(ada: HfApi) -> None:
    actions = batch(ada, b"x" * 1000)["actions"]

    assert get_session().put(actions["upload"]["href"], content=b"y" * 1000).status_code == 400
    oid = hub_lfs.UploadInfo.from_bytes(b"x" * 1000).sha256.hex()
    headers = {"Authorization": f"Bearer {ada.token}"}
    verified = get_session().post(actions["verify"]["href"], json={"oid": oid, "size": 1000}, headers=headers)
    with pytest.raises(HfHubHTTPError, match="was not uploaded"):
        hf_raise_for_status(verified)


def test_parts_are_checked_one_by_one_and_as_a_whole(ada: HfApi) -> None:
    content = b"x" * 3000
    upload = batch(ada, content)["actions"]["upload"]
    etags = [
        get_session().put(upload["header"][number], content=part).headers["ETag"]
        for number, part in (("00001", content[:2000]), ("00002", b"y" * 1000))
    ]

    def complete(etags: list[str]) -> int:
        parts = [{"partNumber": number, "etag": etag} for number, etag in enumerate(etags, 1)]
        return get_session().post(upload["href"], json={"oid": "", "parts": parts}).status_code

    assert complete([etags[0], '"other"']) == 400
    assert complete(etags) == 400
    get_session().put(upload["header"]["00002"], content=content[2000:])
    assert complete([etags[0], etags[0]]) == 400


def test_an_address_of_the_storage_host_is_good_for_one_object_and_one_method(ada: HfApi) -> None:
    href = batch(ada, b"x" * 1000)["actions"]["upload"]["href"]

    assert get_session().get(href).status_code == 403
    assert get_session().put(re.sub("size=1000", "size=999", href), content=b"x" * 999).status_code == 403
    with_token = get_session().put(href, content=b"x" * 1000, headers={"Authorization": f"Bearer {ada.token}"})
    assert with_token.status_code == 400
    assert get_session().put(href, content=b"x" * 1000).status_code == 200


def test_a_file_that_is_there_already_is_not_sent_again(hub: LocalHub, ada: HfApi, folder: Path) -> None:
    hub.fail_at(lambda request: "/commit/" in request.path, "drop")
    with pytest.raises(Exception, match="disconnected"):
        ada.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="w.bin", repo_id="ada/model")
    hub.log.clear()

    ada.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="w.bin", repo_id="ada/model")

    assert "actions" not in batch(ada, WEIGHTS)
    assert hub.cdn_requests == []
    assert hub.files("ada/model")["w.bin"] == WEIGHTS


def test_a_commit_cannot_refer_to_a_file_that_was_not_uploaded(
    hub: LocalHub, ada: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub._commit_api._upload_files", lambda **_: None)
    with pytest.raises(HfHubHTTPError, match="LFS pointer pointed to a file that does not exist"):
        ada.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="w.bin", repo_id="ada/model")
    assert hub.history("ada/model") == ["initial commit"]


# Commits, branches, tags and pull requests


def test_a_commit_adds_and_deletes_at_once(hub: LocalHub, ada: HfApi) -> None:
    hub.commit("ada/model", {"old.txt": b"old", "code/a.py": b"", "code/b.py": b"", "kept.txt": b""})
    operations = [
        CommitOperationDelete("old.txt"),
        CommitOperationDelete("code/"),
        CommitOperationAdd("new.txt", b"new"),
    ]
    ada.create_commit("ada/model", operations, commit_message="Replace")
    assert sorted(hub.files("ada/model")) == [".gitattributes", "kept.txt", "new.txt"]

    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        ada.delete_file("old.txt", "ada/model")


def test_a_commit_on_a_parent_that_has_moved_is_refused(hub: LocalHub, ada: HfApi) -> None:
    before = hub.refs("ada/model")["main"]
    hub.commit("ada/model", {"theirs.txt": b""})
    operations = [CommitOperationAdd("ours.txt", b"")]

    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        ada.create_commit("ada/model", operations, commit_message="Ours", parent_commit=before)
    assert refusal(error) == (412, None)

    operations = [CommitOperationAdd("ours.txt", b"")]
    parent = hub.refs("ada/model")["main"]
    ada.create_commit("ada/model", operations, commit_message="Ours", parent_commit=parent)
    assert {"ours.txt", "theirs.txt"} <= set(hub.files("ada/model"))


@pytest.mark.parametrize(("token", "status"), [("hf_bob", 403), ("hf_eve", 403), (None, 401)])
def test_only_the_owner_commits(
    hub: LocalHub, client: Callable[[str | None], HfApi], token: str | None, status: int
) -> None:
    with pytest.raises(HfHubHTTPError) as error:
        client(token).upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="ada/model")
    assert error.value.response.status_code == status
    assert hub.history("ada/model") == ["initial commit"]
    with pytest.raises(HfHubHTTPError):
        client(token).auth_check("ada/model", write=True)


def test_anyone_who_may_write_somewhere_may_open_a_pull_request(
    hub: LocalHub, ada: HfApi, client: Callable[[str | None], HfApi]
) -> None:
    operations = [CommitOperationAdd("w.bin", WEIGHTS), CommitOperationAdd("a.txt", b"a")]
    done = client("hf_bob").create_commit("ada/model", operations, commit_message="Mine", create_pr=True)

    assert (done.pr_num, done.pr_revision) == (1, "refs/pr/1")
    assert set(hub.files("ada/model", "refs/pr/1")) == {".gitattributes", "w.bin", "a.txt"}
    assert list(hub.files("ada/model")) == [".gitattributes"]
    details = ada.get_discussion_details("ada/model", 1)
    assert (details.title, details.author, details.is_pull_request) == ("Mine", "bob", True)
    (pull,) = ada.list_repo_refs("ada/model", include_pull_requests=True).pull_requests
    assert (pull.ref, pull.target_commit) == ("refs/pr/1", done.oid)


def test_a_pull_request_can_be_opened_first_and_filled_later_by_who_opened_it(
    hub: LocalHub, ada: HfApi, client: Callable[[str | None], HfApi]
) -> None:
    hub.add_user("mallory", "hf_mallory")
    bob = client("hf_bob")
    pull = bob.create_pull_request("ada/model", "Draft")
    bob.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="ada/model", revision=pull.git_reference)
    with pytest.raises(HfHubHTTPError) as error:
        client("hf_mallory").upload_file(
            path_or_fileobj=b"y", path_in_repo="y", repo_id="ada/model", revision=pull.git_reference
        )
    assert refusal(error) == (403, None)

    assert hub.history("ada/model", "refs/pr/1") == ["Upload x with huggingface_hub", "initial commit"]
    assert hub.history("ada/model") == ["initial commit"]
    assert [listed.title for listed in ada.get_repo_discussions("ada/model")] == ["Draft"]


def test_branches_and_tags_are_refs(hub: LocalHub, ada: HfApi) -> None:
    first = hub.refs("ada/model")["main"]
    second = hub.commit("ada/model", {"a.txt": b"a"})
    ada.create_branch("ada/model", branch="v64")
    ada.create_branch("ada/model", branch="feature/old", revision=first)
    ada.create_tag("ada/model", tag="v1", revision="feature/old")
    ada.upload_file(path_or_fileobj=b"b", path_in_repo="b.txt", repo_id="ada/model", revision="feature/old")

    refs = ada.list_repo_refs("ada/model")

    branches = {branch.name: branch.target_commit for branch in refs.branches}
    assert branches == hub.refs("ada/model")
    assert (branches["main"], branches["v64"]) == (second, second)
    assert hub.history("ada/model", "feature/old") == ["Upload b.txt with huggingface_hub", "initial commit"]
    assert [(tag.ref, tag.target_commit) for tag in refs.tags] == [("refs/tags/v1", first)]
    assert refs.converts == []

    ada.delete_branch("ada/model", branch="feature/old")
    ada.delete_tag("ada/model", tag="v1")
    assert sorted(hub.refs("ada/model")) == ["main", "v64"]
    assert ada.list_repo_refs("ada/model").tags == []


def test_a_ref_is_made_once_and_from_something_that_exists(hub: LocalHub, ada: HfApi) -> None:
    ada.create_branch("ada/model", branch="v64")
    ada.create_tag("ada/model", tag="v1")
    ada.create_branch("ada/model", branch="v64", exist_ok=True)

    for again in (lambda: ada.create_branch("ada/model", branch="v64"), lambda: ada.create_tag("ada/model", tag="v1")):
        with pytest.raises(HfHubHTTPError) as error:
            again()
        assert refusal(error) == (409, None)
    for missing in (
        lambda: ada.create_branch("ada/model", branch="v32", revision="nothing"),
        lambda: ada.delete_branch("ada/model", branch="nothing"),
        lambda: ada.delete_tag("ada/model", tag="nothing"),
        lambda: ada.upload_file(path_or_fileobj=b"", path_in_repo="x", repo_id="ada/model", revision="nothing"),
    ):
        with pytest.raises(RevisionNotFoundError):
            missing()
    for fixed in ("v1", hub.refs("ada/model")["main"]):
        with pytest.raises(HfHubHTTPError, match="it is not a branch"):
            ada.upload_file(path_or_fileobj=b"", path_in_repo="x", repo_id="ada/model", revision=fixed)
    with pytest.raises(HfHubHTTPError, match="Cannot delete the default branch"):
        ada.delete_branch("ada/model", branch="main")


# Reading


def test_listings_come_in_pages(hub: LocalHub, ada: HfApi) -> None:
    hub.commit("ada/model", {f"{folder}/{n}.txt": b"" for folder in ("a", "b/c") for n in range(3)})
    hub.page_size = 2

    everything = [entry.path for entry in ada.list_repo_tree("ada/model", recursive=True)]
    assert len(paths(hub, "GET", "/tree/")) == 5
    assert [entry.path for entry in ada.list_repo_tree("ada/model")] == [".gitattributes", "a", "b"]
    assert [entry.path for entry in ada.list_repo_tree("ada/model", "b/c")] == ["b/c/0.txt", "b/c/1.txt", "b/c/2.txt"]
    assert everything == sorted([*hub.files("ada/model"), "a", "b", "b/c"])
    with pytest.raises(EntryNotFoundError):
        list(ada.list_repo_tree("ada/model", "nothing"))


def test_history_names_authors(hub: LocalHub, ada: HfApi) -> None:
    ada.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="ada/model", commit_message="Mine")
    commits = ada.list_repo_commits("ada/model")
    assert (commits[0].title, commits[0].authors) == ("Mine", ["ada"])
    assert commits[0].commit_id == hub.refs("ada/model")["main"]
    assert [commit.title for commit in commits] == hub.history("ada/model")


def test_files_are_described_by_git_and_large_ones_by_sha256_too(ada: HfApi, folder: Path) -> None:
    ada.upload_folder(repo_id="ada/model", folder_path=folder)
    info = hub_lfs.UploadInfo.from_bytes(WEIGHTS)

    config, weights, code = ada.get_paths_info("ada/model", ["config.json", "model.safetensors", "code", "nothing"])

    assert config.blob_id == "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # git hash-object of {}
    assert (config.size, config.lfs) == (2, None)
    assert (weights.lfs.sha256, weights.lfs.size, weights.size) == (info.sha256.hex(), 2560, 2560)
    assert code.path == "code"
    siblings = {file.rfilename: file for file in ada.model_info("ada/model", files_metadata=True).siblings}
    assert siblings["config.json"].blob_id == config.blob_id
    assert siblings["model.safetensors"].lfs.sha256 == weights.lfs.sha256
    assert ada.model_info("ada/model", expand=["sha"]).siblings is None
    assert ada.model_info("ada/model", securityStatus=True).sha == ada.list_repo_commits("ada/model")[0].commit_id


def test_a_file_is_named_by_its_hash_and_its_commit(hub: LocalHub, ada: HfApi) -> None:
    commit = hub.commit("ada/model", {"config.json": b"{}", "w.bin": WEIGHTS})

    def metadata(name: str):
        return get_hf_file_metadata(hf_hub_url("ada/model", name, endpoint=hub.endpoint), token=ada.token)

    config, weights = metadata("config.json"), metadata("w.bin")

    assert (config.commit_hash, config.etag, config.size) == (commit, "9e26dfeeb6e641a33dae4961196235bdb965b21b", 2)
    assert weights.etag == hub_lfs.UploadInfo.from_bytes(WEIGHTS).sha256.hex()
    assert (weights.commit_hash, weights.size) == (commit, 2560)
    assert weights.location.startswith(f"{hub.cdn}/")
    assert config.location.startswith(f"{hub.endpoint}/")


def test_a_revision_is_downloaded_whole_and_without_showing_the_token_to_the_storage_host(
    hub: LocalHub, ada: HfApi, tmp_path: Path
) -> None:
    hub.repos["ada/model"].private = True
    hub.commit("ada/model", {"config.json": b"{}", "a/w.bin": WEIGHTS})
    hub.commit("ada/model", {"config.json": b"[]"}, revision="v64")

    main = Path(ada.snapshot_download("ada/model", cache_dir=tmp_path / "cache"))
    branch = Path(ada.snapshot_download("ada/model", revision="v64", cache_dir=tmp_path / "cache"))
    single = ada.hf_hub_download("ada/model", "a/w.bin", revision="refs/heads/v64", cache_dir=tmp_path / "other")

    assert main.name == hub.refs("ada/model")["main"]
    assert contents(main) == hub.files("ada/model")
    assert contents(branch) == hub.files("ada/model", "v64")
    assert Path(single).read_bytes() == WEIGHTS
    assert len(hub.cdn_requests) == 2
    assert all(request.headers.get("Authorization") is None for request in hub.cdn_requests)


def test_ranges_are_served(hub: LocalHub, ada: HfApi) -> None:
    hub.commit("ada/model", {"w.bin": WEIGHTS, "a.txt": b"0123456789"})

    def get(name: str, wanted: str):
        url = hf_hub_url("ada/model", name, endpoint=hub.endpoint)
        return get_session().get(url, headers={"Range": wanted}, follow_redirects=True)

    part = get("w.bin", "bytes=100-199")
    assert (part.status_code, part.content) == (206, WEIGHTS[100:200])
    assert part.headers["Content-Range"] == "bytes 100-199/2560"
    assert get("a.txt", "bytes=7-").content == b"789"
    assert get("a.txt", "bytes=-2").content == b"89"
    with pytest.raises(HfHubHTTPError, match=r"Requested range: bytes=10-. Content-Range: bytes \*/10"):
        hf_raise_for_status(get("a.txt", "bytes=10-"))


@pytest.mark.parametrize("token", [None, "hf_bob"])
def test_a_private_repo_is_as_good_as_missing_to_others(
    hub: LocalHub, client: Callable[[str | None], HfApi], token: str | None, tmp_path: Path
) -> None:
    hub.repos["ada/model"].private = True
    hub.commit("ada/model", {"config.json": b"{}"})
    api = client(token)

    for question in (
        lambda: api.model_info("ada/model"),
        lambda: api.model_info("ada/nothing"),
        lambda: api.list_repo_files("ada/model"),
        lambda: api.hf_hub_download("ada/model", "config.json", cache_dir=tmp_path),
        lambda: api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="ada/model"),
    ):
        with pytest.raises(RepositoryNotFoundError) as error:
            question()
        assert refusal(error) == (401 if token is None else 404, "RepoNotFound")


def test_a_fine_grained_token_reads_what_it_was_given(
    hub: LocalHub, ada: HfApi, client: Callable[[str | None], HfApi]
) -> None:
    hub.add_repo("ada/secret", private=True)
    hub.repos["ada/model"].private = True
    hub.add_user("ada", "hf_fine", role="fineGrained", scoped={"ada/model": ["repo.content.read"]})

    assert client("hf_fine").model_info("ada/model").private
    with pytest.raises(RepositoryNotFoundError):
        client("hf_fine").model_info("ada/secret")
    with pytest.raises(HfHubHTTPError) as error:
        client("hf_fine").create_branch("ada/model", branch="v64")
    assert refusal(error) == (403, None)


def test_a_gated_repo_shows_its_page_and_keeps_its_files(
    hub: LocalHub, client: Callable[[str | None], HfApi], tmp_path: Path
) -> None:
    repo = hub.add_repo("ada/gated", gated="manual")
    hub.commit("ada/gated", {"config.json": b"{}"})
    repo.granted.add("bob")

    for token, status in ((None, 401), ("hf_eve", 403)):
        assert client(token).model_info("ada/gated").gated == "manual"
        with pytest.raises(GatedRepoError) as error:
            client(token).hf_hub_download("ada/gated", "config.json", cache_dir=tmp_path)
        assert refusal(error) == (status, "GatedRepo")
        with pytest.raises(GatedRepoError):
            client(token).auth_check("ada/gated")
    for token in ("hf_bob", "hf_ada"):
        client(token).auth_check("ada/gated")
        assert Path(client(token).hf_hub_download("ada/gated", "config.json", cache_dir=tmp_path)).exists()


def test_missing_revisions_and_files_are_told_apart(ada: HfApi, tmp_path: Path) -> None:
    with pytest.raises(RevisionNotFoundError):
        ada.hf_hub_download("ada/model", "config.json", revision="v64", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        ada.model_info("ada/model", revision="v64")
    with pytest.raises(EntryNotFoundError):
        ada.hf_hub_download("ada/model", "config.json", cache_dir=tmp_path)
    assert ada.file_exists("ada/model", ".gitattributes") and not ada.file_exists("ada/model", "config.json")


# Faults


def test_a_rate_limit_is_waited_out(hub: LocalHub, ada: HfApi, waits: list[float]) -> None:
    hub.fail_at(lambda request: "/preupload/" in request.path, 429, times=2, retry_after=7)
    ada.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="ada/model")
    assert waits == [8, 8]  # the client adds a second

    hub.fail_at(1, 429, retry_after=30)
    with pytest.raises(HfHubHTTPError, match="Retry after 30 seconds") as error:
        ada.model_info("ada/model")
    assert error.value.response.headers["Retry-After"] == "30"


@pytest.mark.parametrize("kind", ["500", "503", "drop"])
@pytest.mark.parametrize("after", [False, True])
def test_what_can_be_repeated_is_repeated(
    hub: LocalHub, ada: HfApi, waits: list[float], kind: str, after: bool
) -> None:
    hub.fail_at(lambda request: request.host == "storage", kind, after=after)
    hub.fail_at(lambda request: request.path.endswith("/batch"), kind, after=after)
    hub.fail_at(lambda request: "/preupload/" in request.path, kind, after=after)

    ada.upload_file(path_or_fileobj=WEIGHTS[:1000], path_in_repo="w.bin", repo_id="ada/model")

    assert waits == [1, 1, 1]
    assert hub.files("ada/model")["w.bin"] == WEIGHTS[:1000]


@pytest.mark.parametrize(("after", "titles"), [(False, ["initial commit"]), (True, ["Mine", "initial commit"])])
def test_a_lost_connection_leaves_open_whether_a_commit_was_made(
    hub: LocalHub, ada: HfApi, after: bool, titles: list[str]
) -> None:
    hub.fail_at(lambda request: "/commit/" in request.path, "drop", after=after)
    with pytest.raises(Exception, match="disconnected"):
        ada.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="ada/model", commit_message="Mine")
    assert hub.history("ada/model") == titles


def test_a_download_cut_half_way_goes_on_where_it_stopped(
    hub: LocalHub, ada: HfApi, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.commit("ada/model", {"w.bin": WEIGHTS})
    hub.fail_at(lambda request: request.host == "storage", "truncate")

    file = ada.hf_hub_download("ada/model", "w.bin", cache_dir=tmp_path)

    assert Path(file).read_bytes() == WEIGHTS
    assert [request.headers.get("Range") for request in hub.cdn_requests] == [None, "bytes=1000-"]


def test_requests_are_counted_from_now_on(hub: LocalHub, ada: HfApi) -> None:
    ada.model_info("ada/model")
    hub.fail_at(2, "500")

    ada.model_info("ada/model")
    with pytest.raises(HfHubHTTPError):
        ada.model_info("ada/model")
    ada.model_info("ada/model")

    assert [request.status for request in hub.log] == [200, 200, 500, 200]
    hub.fail_at(1, "drop", times=float("inf"))
    hub.heal()
    ada.model_info("ada/model")


def test_something_else_can_happen_in_between(hub: LocalHub, ada: HfApi) -> None:
    def meanwhile(request: Request) -> None:
        hub.commit("ada/model", {"theirs.txt": b""})

    hub.fail_at(lambda request: "/commit/" in request.path, meanwhile)
    operations, parent = [CommitOperationAdd("ours.txt", b"")], hub.refs("ada/model")["main"]
    with pytest.raises(HfHubHTTPError) as error:
        ada.create_commit("ada/model", operations, commit_message="Ours", parent_commit=parent)
    assert refusal(error) == (412, None)


def test_half_a_request_changes_nothing(hub: LocalHub, ada: HfApi) -> None:
    line = json.dumps({"key": "header", "value": {"summary": "Half", "description": ""}})
    head = "POST /api/models/ada/model/commit/main HTTP/1.1\r\nAuthorization: Bearer hf_ada\r\nContent-Length: 999"
    with socket.create_connection(("127.0.0.1", int(hub.endpoint.rsplit(":", 1)[1]))) as connection:
        connection.sendall(f"{head}\r\n\r\n{line}\n".encode())
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""
    assert [request.status for request in hub.log] == [None]
    assert hub.history("ada/model") == ["initial commit"]


def test_a_mistake_of_the_local_hub_does_not_pass_for_a_refusal(tmp_path: Path) -> None:
    with pytest.raises(KeyError), LocalHub(tmp_path) as hub, hub.online() as api:
        hub.add_repo("ada/model").branches["main"] = "gone"
        hub.repos["ada/model"].commits = {"gone": None}  # type: ignore[dict-item]
        with pytest.raises(HfHubHTTPError, match="The local hub failed"):
            api.model_info("ada/model")
        hub.errors[:] = [KeyError("shown again when the hub is closed")]


# Fresh processes


@pytest.mark.core
def test_a_process_that_is_killed_half_way_leaves_nothing_behind(hub: LocalHub, tmp_path: Path) -> None:
    hub.add_repo("ada/model")
    upload = (
        "import sys; from huggingface_hub import upload_file; print('up', flush=True);"
        "upload_file(path_or_fileobj=b'x' * 1000, path_in_repo='w.bin', repo_id='ada/model')"
    )
    processes: list[subprocess.Popen[str]] = []
    hub.fail_at(lambda request: request.host == "storage", lambda _: processes[0].kill())
    env = hub.client_env(tmp_path / "home", "hf_ada")
    processes.append(subprocess.Popen([sys.executable, "-c", upload], env=env, text=True))

    assert processes[0].wait(60) == -signal.SIGKILL
    assert hub.history("ada/model") == ["initial commit"]
    hub.run(upload, tmp_path / "home", "hf_ada")
    assert hub.files("ada/model")["w.bin"] == b"x" * 1000


LOAD = """
import sys
import torch
from transformers import AutoModelForImageTextToText
torch.set_num_threads(1)
sys.modules["vispruner"] = None
def load(**options):
    return AutoModelForImageTextToText.from_pretrained("ada/model", trust_remote_code=True, revision="v8", **options)
if sys.argv[1:]:
    try:
        load(token=False)
    except OSError as error:
        print("refused" if "ada/model" in str(error) else error)
model = load()
print(type(model).__name__, model.config.vispruner_config["visual_token_num"])
"""


@pytest.mark.core
def test_a_private_repo_loads_by_name_and_branch_then_offline(
    hub: LocalHub, ada: HfApi, tiny_llava_repo: Path, tmp_path: Path
) -> None:
    model = vispruner.load(tiny_llava_repo, visual_token_num=16)
    model.save_pretrained(tmp_path / "built")
    ada.upload_folder(repo_id="ada/model", folder_path=tmp_path / "built")
    model.set_vispruner_config(visual_token_num=8)
    model.config.save_pretrained(tmp_path / "v8")
    ada.create_branch("ada/model", branch="v8")
    config = tmp_path / "v8" / "config.json"
    ada.upload_file(path_or_fileobj=config, path_in_repo="config.json", repo_id="ada/model", revision="v8")
    hub.repos["ada/model"].private = True
    hub.log.clear()

    online = hub.run(LOAD, tmp_path / "home", "hf_ada", arguments=["private"])
    seen = len(hub.log)
    offline = hub.run(LOAD, tmp_path / "home", HF_HUB_OFFLINE="1")

    loaded = "VisPrunerLlavaForConditionalGeneration 8"
    assert online.stdout.splitlines() == ["refused", loaded]
    assert offline.stdout.splitlines() == [loaded]
    assert [request for request in hub.cdn_requests if request.method == "GET"]
    assert all(request.token is None for request in hub.cdn_requests)
    assert len(hub.log) == seen


@pytest.mark.core
def test_it_can_be_started_from_the_command_line(tmp_path: Path) -> None:
    script = Path(__file__).with_name("local_hub.py")
    command = [sys.executable, str(script), str(tmp_path / "storage"), "--user", "grace"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        settings = dict(word.split("=", 1) for word in server.stdout.readline().split()[1:])
        env = {**os.environ, **settings, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
        ask = "import huggingface_hub as h; print(h.create_repo('tiny').repo_id, h.whoami()['name'])"
        asked = subprocess.run([sys.executable, "-c", ask], env=env, text=True, capture_output=True, check=True)
        assert asked.stdout.split() == ["grace/tiny", "grace"]
    finally:
        server.terminate()
        server.wait()


# Xet


@pytest.fixture
def xet(tmp_path: Path) -> Iterator[tuple[LocalHub, HfApi]]:
    pytest.importorskip("hf_xet")
    with LocalHub(tmp_path / "storage", xet=True) as hub:
        hub.add_user("ada", "hf_ada")
        hub.add_repo("ada/model")
        with hub.online("hf_ada") as api:
            yield hub, api


def xorbs(hub: LocalHub) -> int:
    """Bytes of chunks the hub keeps."""
    kept = (hub.storage / "xet" / "all").rglob("xorbs/default.*")
    return sum(path.stat().st_size for path in kept if path.suffix != ".tagset" and "tagset" not in path.name)


@pytest.mark.parametrize("create_pr", [False, True])
def test_large_files_go_up_and_come_down_as_xet_chunks(
    xet: tuple[LocalHub, HfApi], folder: Path, tmp_path: Path, create_pr: bool
) -> None:
    hub, api = xet
    done = api.upload_folder(repo_id="ada/model", folder_path=folder, create_pr=create_pr)
    revision = done.pr_revision or "main"
    down = Path(api.snapshot_download("ada/model", revision=revision, cache_dir=tmp_path / "cache"))

    assert hub.files("ada/model", revision).items() >= contents(folder).items()
    assert contents(down) == hub.files("ada/model", revision)
    assert hub.cdn_requests == [] and paths(hub, "POST", "/batch") == []
    assert len(paths(hub, "GET", "/xet-write-token/")) == len(paths(hub, "GET", "/xet-read-token/")) == 1


def test_xet_files_carry_their_hash_and_can_still_be_read_without_xet(
    xet: tuple[LocalHub, HfApi], tmp_path: Path
) -> None:
    hub, api = xet
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="w.bin", repo_id="ada/model")

    metadata = get_hf_file_metadata(hf_hub_url("ada/model", "w.bin", endpoint=hub.endpoint), endpoint=hub.endpoint)
    (listed,) = api.get_paths_info("ada/model", "w.bin")

    assert metadata.etag == hub_lfs.UploadInfo.from_bytes(WEIGHTS).sha256.hex()
    assert metadata.xet_file_data.refresh_route.endswith(f"/xet-read-token/{metadata.commit_hash}")
    assert listed.xet_hash == metadata.xet_file_data.file_hash != metadata.etag
    assert get_session().get(metadata.location).content == WEIGHTS


def test_chunks_that_are_there_already_are_not_kept_twice(xet: tuple[LocalHub, HfApi]) -> None:
    hub, api = xet
    first = os.urandom(400_000)
    api.upload_file(path_or_fileobj=first, path_in_repo="a.bin", repo_id="ada/model")
    once = xorbs(hub)
    api.upload_file(path_or_fileobj=first + b"more", path_in_repo="b.bin", repo_id="ada/model")

    assert once > 400_000
    assert xorbs(hub) < 1.6 * once
    assert hub.files("ada/model")["b.bin"] == first + b"more"


@pytest.mark.core
def test_a_fresh_process_fetches_what_another_one_uploaded_through_xet(
    xet: tuple[LocalHub, HfApi], tmp_path: Path
) -> None:
    hub, api = xet
    hub.repos["ada/model"].private = True
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="w.bin", repo_id="ada/model")
    code = (
        "from huggingface_hub import hf_hub_download, upload_file; f = hf_hub_download('ada/model', 'w.bin');"
        "upload_file(path_or_fileobj=open(f, 'rb').read() + b'!', path_in_repo='w2.bin', repo_id='ada/model')"
    )
    hub.run(code, tmp_path / "home", "hf_ada")
    assert hub.files("ada/model")["w2.bin"] == WEIGHTS + b"!"


def test_only_those_who_may_write_get_a_xet_write_token(xet: tuple[LocalHub, HfApi]) -> None:
    hub, _ = xet
    hub.add_user("eve", "hf_eve", role="read")
    url = f"{hub.endpoint}/api/models/ada/model/xet-{{}}-token/main"
    headers = {"Authorization": "Bearer hf_eve"}

    assert get_session().get(url.format("write"), headers=headers).status_code == 403
    answer = get_session().get(url.format("read"), headers=headers)
    assert answer.json()["casUrl"] == answer.headers["X-Xet-Cas-Url"]
    assert answer.json()["exp"] == int(answer.headers["X-Xet-Token-Expiration"]) > time.time()


def test_a_client_that_offers_xet_is_told_to_use_it(xet: tuple[LocalHub, HfApi]) -> None:
    hub, api = xet
    info = [hub_lfs.UploadInfo.from_bytes(WEIGHTS)]
    for transfers, chosen in ((["basic", "xet"], "xet"), (["basic"], "basic")):
        _, _, transfer = hub_lfs.post_lfs_batch_info(
            info, api.token, "model", "ada/model", endpoint=hub.endpoint, transfers=transfers
        )
        assert transfer == chosen
