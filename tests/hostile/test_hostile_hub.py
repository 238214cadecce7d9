"""A Hub that lies, breaks or is overheard, and files that change under way: nothing of theirs runs or is published."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attack import Attack, write_yaml
from huggingface_hub import HfApi, HfFileMetadata, constants
from huggingface_hub.hf_api import RepoFile
from local_hub import Answer, LocalHub, Request

from vispruner.conversion import base_checkpoint, publish, publish_worker
from vispruner.conversion.base_checkpoint import BuildError
from vispruner.conversion.hub_access import ExitCode, HubAccess, PublishError
from vispruner.conversion.publish import PublishJob
from vispruner.conversion.repo_config import load_repo_config
from vispruner.conversion.verify import Check, Report

ROOT = Path(__file__).parent.parent.parent
TOKEN = "hf_the-owner-s-token"


def _load_upload() -> Any:
    spec = importlib.util.spec_from_file_location("upload_attacked", ROOT / "upload.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


upload = _load_upload()


class LyingHub(LocalHub):
    """A Hub whose listing is true, while some files come down altered and some questions are answered wrong."""

    def __init__(self, storage: Path) -> None:
        super().__init__(storage)
        self.altered: dict[str, bytes] = {}
        self.wrong: dict[str, bytes] = {}

    def _resolve_cache(self, request: Request, repo: str, revision: str, path: str) -> Answer:
        answer = super()._resolve_cache(request, repo, revision, path)
        if path in self.altered:
            answer.body = self.altered[path]
        return answer

    def _get_object(self, request: Request, repo: str, oid: str) -> Answer:
        answer = super()._get_object(request, repo, oid)
        if "weights" in self.altered:
            answer.body = self.altered["weights"].ljust(len(answer.body))
        return answer

    def _answer(self, request: Request) -> Answer:
        for part, body in self.wrong.items():
            if request.host == "hub" and part in request.path:
                return Answer(200, body, {"Content-Type": "application/json"})
        return super()._answer(request)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LyingHub]:
    """A Hub that this process talks to, logged in as `user`."""
    with LyingHub(tmp_path / "hub") as hub:
        hub.add_user("user", TOKEN)
        address = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in {
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "ENDPOINT": hub.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": address,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def config(tmp_path: Path, tiny_llava_repo: Path) -> Path:
    return write_yaml(tmp_path, repo_id="user/tiny", base_model=str(tiny_llava_repo), base_revision=None)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], good_repo: Path, config: Path
) -> Callable[..., tuple[int, str]]:
    """Run `upload.py` here with the good repo as what it builds, which passes verify at once; return all it printed.

    after_verify  what happens to the folder between verify and the upload
    """

    def run(*arguments: str, after_verify: Callable[[Path], Any] = lambda folder: None) -> tuple[int, str]:
        def build(repo: Any, out: Path, **options: Any) -> Path:
            return Path(shutil.copytree(good_repo, out, dirs_exist_ok=True))

        def verify(folder: Path, base: Path | None) -> Report:
            report = Report(folder, (Check("all", "pass", ""),), hashes(folder))
            after_verify(folder)
            return report

        monkeypatch.setattr(publish, "build_repo", build)
        monkeypatch.setattr(publish, "verify_repo", verify)
        status = upload.main([str(config), "--out", str(tmp_path / "out"), *arguments])
        printed = capsys.readouterr()
        assert TOKEN not in printed.out + printed.err
        return status, printed.out + printed.err

    return run


# What comes down is compared before anything of it runs


@pytest.mark.parametrize("name", ["token_selection.py", "tokenizer_config.json", "weights"])
def test_an_altered_download_is_never_run(
    name: str, hub: LyingHub, run: Callable[..., tuple[int, str]], attack_on: Callable[[Path], Attack], good_repo: Path
) -> None:
    attack = attack_on(good_repo)
    settings = {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    bodies = {"token_selection.py": attack.code.encode(), "tokenizer_config.json": json.dumps(settings).encode()}
    hub.altered[name] = bodies.get(name, b"altered weights")
    status, text = run("--push")
    assert status == ExitCode.READ_BACK_DIFFERS
    assert "as the Hub serves it is not what was built" in text
    assert "nothing of it was run" in text


@pytest.mark.core
def test_what_is_loaded_after_a_push_has_no_token_and_no_line_to_the_hub(
    hub: LyingHub, run: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "curious.py"
    worker.write_text(
        "import json, os, sys\n"
        f"found = [name for name, value in os.environ.items() if {TOKEN!r} in value or {hub.endpoint!r} in value]\n"
        "open(sys.argv[-1], 'w').write(json.dumps({'problem': str(found)} if found else {'passed': ['clean']}))\n"
    )
    monkeypatch.setattr(publish_worker, "__file__", str(worker))
    status, text = run("--push")
    assert (status, "clean\n" in text) == (ExitCode.DONE, True), text


@pytest.mark.slow
def test_a_true_hub_s_repo_loads_by_name_from_what_was_compared(
    hub: LyingHub, run: Callable[..., tuple[int, str]]
) -> None:
    status, text = run("--push")
    assert status == ExitCode.DONE, text
    assert "VisPrunerLlavaForConditionalGeneration, budget 16, with its weights" in text


# What changes under way is not published


def code_swapped(attack: Attack) -> Callable[[Path], Any]:
    return lambda folder: attack.write_code(folder, "token_selection.py")


def link_put_in_place(attack: Attack) -> Callable[[Path], Any]:
    def swap(folder: Path) -> None:
        attack.write_code(attack.elsewhere, "token_selection.py")
        (folder / "token_selection.py").unlink()
        (folder / "token_selection.py").symlink_to(attack.elsewhere / "token_selection.py")

    return swap


def weights_swapped(attack: Attack) -> Callable[[Path], Any]:
    return lambda folder: (folder / "model.safetensors").write_bytes(b"other weights")


def file_added(attack: Attack) -> Callable[[Path], Any]:
    return lambda folder: (folder / "vocab.txt").write_text("a\n")


@pytest.mark.parametrize("swap", [code_swapped, link_put_in_place, weights_swapped, file_added])
def test_files_swapped_after_verify_are_not_published(
    swap: Callable[[Attack], Callable[[Path], Any]],
    hub: LyingHub,
    run: Callable[..., tuple[int, str]],
    attack_on: Callable[[Path], Attack],
    good_repo: Path,
) -> None:
    status, text = run("--push", after_verify=swap(attack_on(good_repo)))
    assert status in (ExitCode.NOT_VERIFIED, ExitCode.BAD_INPUT), text
    assert "changed since verify read it" in text or "which the build did not write" in text
    assert not hub.repos


def test_the_bytes_that_were_hashed_are_sent_even_if_the_file_changes_then(
    hub: LyingHub, good_repo: Path, config: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(good_repo, tmp_path / "folder"))
    job = PublishJob(HubAccess(), load_repo_config(config))
    wanted = job.wanted_branches(folder)
    (folder / "token_selection.py").write_text("raise SystemExit")
    job.push_branches(wanted)
    assert hub.files("user/tiny")["token_selection.py"] == (good_repo / "token_selection.py").read_bytes()


def test_weights_swapped_during_their_upload_are_not_committed(
    hub: LyingHub, good_repo: Path, config: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(good_repo, tmp_path / "folder"))
    job = PublishJob(HubAccess(), load_repo_config(config))
    wanted = job.wanted_branches(folder)
    others = tmp_path / "others"
    others.write_bytes((folder / "model.safetensors").read_bytes())
    hub.fail_at(lambda request: request.method == "PUT", lambda request: others.replace(folder / "model.safetensors"))
    with pytest.raises(PublishError, match=r"model\.safetensors changed during the upload") as refused:
        job.push_branches(wanted)
    assert refused.value.exit_code == ExitCode.NOT_VERIFIED
    assert set(hub.files("user/tiny")) == {".gitattributes"}


# What a Hub says


ESCAPES = "\x1b[2J\x1b]0;pwned\x07\u202e"


def test_no_terminal_obeys_a_listing(hub: LyingHub, run: Callable[..., tuple[int, str]], good_repo: Path) -> None:
    hub.add_repo("user/tiny")
    files = {path.name: path.read_bytes() for path in good_repo.iterdir()}
    hub.commit("user/tiny", {**files, f"modeling_{ESCAPES}.py": b"pass\n"})
    hub.commit("user/tiny", {"LICENSE": b"MIT"}, revision=f"old{ESCAPES}")
    status, text = run("--force")
    assert status == ExitCode.DONE, text
    assert "\\x1b[2J" in text
    status, foreign = run()
    assert status == ExitCode.FOREIGN_CONTENT
    for printed in (text, foreign):
        assert not set(ESCAPES) & set(printed) - set("[2J]0;pwned")


def test_no_terminal_obeys_who_the_hub_says_one_is(hub: LyingHub, run: Callable[..., tuple[int, str]]) -> None:
    hub.wrong["/whoami-v2"] = json.dumps({"name": f"mallory{ESCAPES}", "orgs": []}).encode()
    status, text = run()
    assert status == ExitCode.DONE and "\\x1b[2J" in text, text
    assert not set(ESCAPES) & set(text) - set("[2J]0;pwned")


def test_a_commit_that_is_none_gets_into_no_card(hub: LyingHub, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = HfFileMetadata("x](http://evil)", None, "", None, None)
    access = HubAccess()
    monkeypatch.setattr(access.api, "get_hf_file_metadata", lambda url: metadata)
    with pytest.raises(PublishError, match="did not say which commit base owner/name is"):
        access.base_commit("owner/name", None)


def test_a_shard_whose_name_a_terminal_would_obey_is_not_even_downloaded(hub: LyingHub) -> None:
    hub.add_repo("mallory/base")
    hub.commit("mallory/base", {"config.json": b"{}", f"model{ESCAPES}.safetensors": b"x", "model.safetensors": b"x"})
    folder = base_checkpoint.find_hub_base("mallory/base").with_weights().folder
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_a_listing_without_end_is_left(
    hub: LyingHub, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("user/tiny")
    entry = {"type": "file", "path": "x.py", "size": 1, "oid": "0"}
    monkeypatch.setattr(HfApi, "list_repo_tree", lambda *_, **__: (RepoFile(**entry) for _ in itertools.count()))
    monkeypatch.setattr(publish, "MOST_LISTED", 100)
    status, text = run("--push")
    assert status == ExitCode.FOREIGN_CONTENT and "lists more than 100 files" in text, text


def test_a_repo_without_any_commit_is_not_a_fault_of_this_program(
    hub: LyingHub, run: Callable[..., tuple[int, str]]
) -> None:
    hub.add_repo("user/tiny")
    hub.wrong["/commits/"] = b"[]"
    status, text = run("--push", "--revision", "another")
    assert status == ExitCode.SERVER_ERROR, text


ANSWERS = [b"<html>welcome to this hotel</html>", b"[]", b"null", b'"x"', b'{"name": null, "orgs": 7}', b"[" * 10**5]


@pytest.mark.parametrize("body", ANSWERS, ids=[body[:20].decode() for body in ANSWERS])
@pytest.mark.parametrize("path", ["/whoami-v2", "/refs", "/tree/"])
def test_an_answer_that_is_none_is_not_a_fault_of_this_program(
    path: str, body: bytes, hub: LyingHub, run: Callable[..., tuple[int, str]]
) -> None:
    hub.add_repo("user/tiny")
    hub.wrong[path] = body
    status, text = run("--push")
    assert "fault of upload.py" not in text, text
    # An empty list of files is an answer, too: what was pushed is then missing when it is read back.
    empty = path == "/tree/" and body == b"[]"
    assert status == (ExitCode.READ_BACK_DIFFERS if empty else ExitCode.SERVER_ERROR), text


@pytest.mark.parametrize("endpoint", ["http://hub.example", "http://127.0.0.1.example:80", "ftp://localhost.evil"])
def test_a_token_is_not_sent_in_the_clear(endpoint: str, monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(PublishError, match="is not https, and your token would be sent") as refused:
        publish.publish([config], endpoint=endpoint)
    assert refused.value.exit_code == ExitCode.BAD_INPUT
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with pytest.raises(BuildError, match="is not https, and your token would be sent"):
        base_checkpoint.find_hub_base("owner/name", "main")


@pytest.mark.parametrize("endpoint", ["https://hub.example", "http://127.0.0.1:8000", "http://localhost:8000"])
def test_a_line_that_nobody_else_reads_is_fine(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    HubAccess(endpoint)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    HubAccess("http://hub.example")
