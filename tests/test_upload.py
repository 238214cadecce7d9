"""Publishing against a local Hub: what is pushed, what is refused and with which exit code, and what a kill leaves."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import constants
from local_hub import LocalHub, Refusal, Request

from vispruner import __version__
from vispruner.conversion import cli, hub_access, publish, upload_plan
from vispruner.conversion.build import build_repo
from vispruner.conversion.hub_access import ExitCode, HubAccess, PublishError
from vispruner.conversion.publish import PublishJob
from vispruner.conversion.repo_config import RepoConfig, load_repo_config
from vispruner.conversion.space import space_files
from vispruner.conversion.verify import Check, Report

ROOT = Path(__file__).parent.parent
TOKEN = "hf_the-owner-s-token"
BUDGETS: dict[str, dict[str, Any]] = {"v8": {"visual_token_num": 8}, "quarter": {"keep_ratio": 0.25}}
BRANCHES = {"main", *BUDGETS}


def _load_upload() -> Any:
    spec = importlib.util.spec_from_file_location("upload", ROOT / "upload.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


upload = _load_upload()


def write_yaml(path: Path, **changes: Any) -> Path:
    content = {
        "repo_id": "user/tiny",
        "architecture": "llava",
        "vispruner_config": {"visual_token_num": 16},
        "weights": "full",
        "budgets": BUDGETS,
        "card": {"license": "apache-2.0"},
        **changes,
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_llava_repo: Path) -> Path:
    """A YAML of a full repo with two budget branches."""
    return write_yaml(tmp_path_factory.mktemp("config") / "tiny.yaml", base_model=str(tiny_llava_repo))


@pytest.fixture(scope="module")
def repo(config: Path) -> RepoConfig:
    return load_repo_config(config)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    """The repo built from it, once for all tests."""
    return build_repo(config, tmp_path_factory.mktemp("built") / "tiny", show_progress=False)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A local Hub that this process talks to, logged in as `user`, through plain LFS."""
    with LocalHub(tmp_path / "hub") as hub:
        hub.add_user("user", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        address = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that publishing would have slept; it does not sleep."""
    seconds: list[float] = []
    clock = SimpleNamespace(sleep=seconds.append)
    monkeypatch.setattr(hub_access, "time", clock)
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
    return seconds


def verified(folder: Path, base: Path | None = None) -> Report:
    """The report of a folder that passes whatever it holds."""
    files = {name: hashlib.sha256(content).hexdigest() for name, content in contents(folder).items()}
    return Report(folder, (Check("all", "pass", ""),), files)


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch, built: Path) -> None:
    """Building takes the finished folder, and verify and loading, which have tests of their own, pass at once."""

    def copy(repo: RepoConfig, out: Path, **options: Any) -> Path:
        shutil.copytree(built, out, dirs_exist_ok=True)
        return out

    monkeypatch.setattr(publish, "build_repo", copy)
    monkeypatch.setattr(publish, "verify_repo", verified)
    monkeypatch.setattr(PublishJob, "check_loads", lambda self, folder: None)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], config: Path) -> Callable[..., tuple[int, str]]:
    """Run `upload.py` here and return exit status and all that it printed, which never holds the token."""

    def run(*arguments: str, config: Path = config) -> tuple[int, str]:
        status = upload.main([str(config), "--out", str(tmp_path / "out"), *arguments])
        printed = capsys.readouterr()
        text = printed.out + printed.err
        for token in (TOKEN, os.environ.get("HF_TOKEN") or TOKEN):
            assert token not in text
        return status, text

    return run


class Job(PublishJob):
    """The part of a publication between a built folder and the Hub."""

    def push(self, folder: Path) -> dict[str, str]:
        return self.push_branches(self.wanted_branches(folder))


def job(repo: RepoConfig, **options: Any) -> Job:
    return Job(HubAccess(), repo, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def on_hub(hub: LocalHub, repo_id: str, revision: str = "main") -> dict[str, bytes]:
    """The files of a branch but for the one that every new repo has."""
    return {path: data for path, data in hub.files(repo_id, revision).items() if path != ".gitattributes"}


def commits(hub: LocalHub) -> int:
    return sum(method == "POST" and "/commit/" in path for method, path in hub.requests)


def state(hub: LocalHub, repo_id: str) -> dict[str, Any]:
    """All that a kill must not change: the branches, their files, and how many commits made them."""
    branches = sorted(hub.refs(repo_id))
    return {branch: (hub.files(repo_id, branch), len(hub.history(repo_id, branch))) for branch in branches}


# What a push does


def test_a_push_makes_main_and_the_budget_branches(hub: LocalHub, repo: RepoConfig, built: Path) -> None:
    job(repo).push(built)
    assert set(hub.refs("user/tiny")) == BRANCHES
    assert on_hub(hub, "user/tiny") == contents(built)
    main = json.loads((built / "config.json").read_text())
    for branch, budget in BUDGETS.items():
        files = on_hub(hub, "user/tiny", branch)
        own = json.loads(files.pop("config.json"))
        assert files == {path: data for path, data in contents(built).items() if path != "config.json"}
        cleared = {"visual_token_num": None, "keep_ratio": None}
        assert own == {**main, "vispruner_config": {**main["vispruner_config"], **cleared, **budget}}


def test_each_branch_takes_one_commit(hub: LocalHub, repo: RepoConfig, built: Path) -> None:
    job(repo).push(built)
    assert commits(hub) == len(BRANCHES)
    assert {len(hub.history("user/tiny", branch)) for branch in BRANCHES} == {2}  # the Hub's own first one, and ours


def test_a_second_push_commits_nothing(hub: LocalHub, repo: RepoConfig, built: Path) -> None:
    first = job(repo).push(built)
    before, asked = state(hub, "user/tiny"), len(hub.requests)
    assert job(repo).push(built) == first
    assert state(hub, "user/tiny") == before
    assert {method for method, _ in hub.requests[asked:]} <= {"GET", "HEAD"}


def test_weights_come_first_in_a_commit_and_config_and_card_last(repo: RepoConfig, built: Path) -> None:
    files = upload_plan.built_files(built, repo)
    plan = upload_plan.plan_branch("main", reversed(files), None)
    paths = [operation.path_in_repo for operation in plan.operations()]
    assert paths[0] == "model.safetensors"
    assert paths[-2:] == ["README.md", "config.json"]
    assert sorted(paths) == sorted(contents(built))


def test_a_new_build_goes_to_every_branch_and_only_what_changed_is_sent(
    hub: LocalHub, repo: RepoConfig, built: Path, tmp_path: Path
) -> None:
    job(repo).push(built)
    newer = newer_build(built, tmp_path / "newer")
    asked = len(hub.requests)
    job(repo).push(newer)
    assert on_hub(hub, "user/tiny") == contents(newer)
    for branch in BUDGETS:
        assert on_hub(hub, "user/tiny", branch)["README.md"] == contents(newer)["README.md"]
    assert not [path for method, path in hub.requests[asked:] if method == "PUT"]  # the weights are the same


def newer_build(built: Path, folder: Path, weights: bool = False) -> Path:
    """The same repo as a later version would build it: another card, perhaps other weights."""
    shutil.copytree(built, folder)
    (folder / "README.md").write_text((built / "README.md").read_text() + "\nA later version.\n")
    if weights:
        data = bytearray((built / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(bytes(data))
    return folder


def test_files_of_an_older_build_go_and_what_is_nobody_s_stays(hub: LocalHub, repo: RepoConfig, built: Path) -> None:
    job(repo).push(built)
    hub.commit("user/tiny", {"modeling_old.py": b"pass\n", "LICENSE": b"Apache-2.0\n"})
    job(repo).push(built)
    assert on_hub(hub, "user/tiny") == {**contents(built), "LICENSE": b"Apache-2.0\n"}


def test_a_full_repo_becomes_thin(hub: LocalHub, repo: RepoConfig, built: Path, tmp_path: Path) -> None:
    """Weights left on the Hub would be loaded instead of the base's."""
    job(repo).push(built)
    thin = Path(shutil.copytree(built, tmp_path / "thin"))
    (thin / "model.safetensors").unlink()
    job(repo).push(thin)
    assert all(on_hub(hub, "user/tiny", branch).keys() == contents(thin).keys() for branch in BRANCHES)


@pytest.mark.parametrize("strange", ["notes.txt", ".env", "model.bin", "folder"])
def test_what_the_build_did_not_write_is_never_uploaded(
    hub: LocalHub, repo: RepoConfig, built: Path, tmp_path: Path, strange: str
) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "folder"))
    if strange == "folder":
        (folder / strange).mkdir()
    else:
        (folder / strange).write_text("secret")
    with pytest.raises(PublishError, match=strange) as refused:
        job(repo).push(folder)
    assert refused.value.exit_code == ExitCode.BAD_INPUT
    assert commits(hub) == 0


def test_a_link_out_of_the_built_folder_is_refused(repo: RepoConfig, built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "folder"))
    (tmp_path / "elsewhere.json").write_text("{}")
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(PublishError, match=r"generation_config\.json"):
        upload_plan.built_files(folder, repo)


def test_another_revision_is_pushed_alone(hub: LocalHub, repo: RepoConfig, built: Path) -> None:
    job(repo, revision="next").push(built)
    assert set(hub.refs("user/tiny")) == {"main", "next"}
    assert on_hub(hub, "user/tiny", "next") == contents(built)
    assert on_hub(hub, "user/tiny") == {}


def test_a_revision_that_is_a_budget_s_is_refused(repo: RepoConfig, hub: LocalHub) -> None:
    with pytest.raises(PublishError, match="--revision v8"):
        job(repo, revision="v8")


def test_a_pull_request_is_opened_once_and_main_stays(
    hub: LocalHub, repo: RepoConfig, built: Path, tmp_path: Path
) -> None:
    job(repo).push(built)
    before, newer = state(hub, "user/tiny"), newer_build(built, tmp_path / "newer")
    first = job(repo, create_pr=True).push(newer)
    assert state(hub, "user/tiny") == before
    assert on_hub(hub, "user/tiny", first["main"]) == contents(newer)
    assert job(repo, create_pr=True).push(newer) == first
    assert commits(hub) == len(BRANCHES) + 1


def test_private_makes_a_private_repo_and_never_writes_to_a_public_one(
    hub: LocalHub, ready: None, run: Callable[..., tuple[int, str]], config: Path
) -> None:
    assert run("--push", "--private")[0] == 0
    assert HubAccess().api.repo_info("user/tiny").private
    assert run("--push")[0] == 0  # it stays private
    assert HubAccess().api.repo_info("user/tiny").private
    hub.add_repo("user/open")
    status, text = run(
        "--push", "--private", config=write_yaml(config.parent / "open.yaml", **changed(config, "open"))
    )
    assert status == ExitCode.BAD_INPUT
    assert "user/open is public" in text


def test_a_visitor_can_propose_a_build(
    hub: LocalHub, repo: RepoConfig, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job(repo).push(built)
    before, newer = state(hub, "user/tiny"), newer_build(built, tmp_path / "newer")
    hub.add_user("visitor", "hf_visitor")
    monkeypatch.setenv("HF_TOKEN", "hf_visitor")
    proposal = job(repo, create_pr=True)
    proposal.check_access(push=True)
    assert on_hub(hub, "user/tiny", proposal.push(newer)["main"]) == contents(newer)
    assert state(hub, "user/tiny") == before


def test_a_pull_request_needs_a_repo(hub: LocalHub, never_built: None, run: Callable[..., tuple[int, str]]) -> None:
    assert "nothing --create-pr could change" in refused(run, ExitCode.BAD_INPUT, "--create-pr")


def test_weights_in_parts(hub: LocalHub, repo: RepoConfig, built: Path) -> None:
    hub.part_size = 1 << 18
    job(repo).push(built)
    assert on_hub(hub, "user/tiny") == contents(built)
    assert len([path for method, path in hub.requests if method == "PUT"]) > 4


def changed(config: Path, name: str, **more: Any) -> dict[str, Any]:
    return {**yaml.safe_load(config.read_text()), "repo_id": f"user/{name}", **more}


# The command line


def test_a_dry_run_shows_files_sizes_and_hashes_and_changes_nothing(
    hub: LocalHub, ready: None, run: Callable[..., tuple[int, str]], built: Path
) -> None:
    status, text = run()
    assert status == 0
    for file in upload_plan.built_files(built, load_repo_config("tiny-llava-vispruner")):
        assert f"{file.path} " in text
        assert file.sha256[:16] in text
    assert "new branch v8 (visual_token_num 8): what main gets, but for:" in text
    assert "dry run" in text
    assert not hub.repos
    assert {method for method, path in hub.requests if path != "/api/validate-yaml"} <= {"GET", "HEAD"}


@pytest.mark.core
def test_a_space_follows_its_model(
    hub: LocalHub, ready: None, run: Callable[..., tuple[int, str]], config: Path, tmp_path: Path
) -> None:
    yaml_file = write_yaml(tmp_path / "shown.yaml", **changed(config, "tiny", space="user/tiny-page"))
    status, text = run("--space", config=yaml_file)
    assert status == 0 and f"{hub.endpoint}/spaces/user/tiny-page (a new repo)" in text
    assert "requirements.txt" in text and not hub.repos
    status, text = run("--space", "--push", config=yaml_file)
    assert status == 0 and f"done: {hub.endpoint}/spaces/user/tiny-page" in text
    assert set(hub.repos) == {"user/tiny", "spaces/user/tiny-page"}
    files = {name: data.decode() for name, data in on_hub(hub, "spaces/user/tiny-page").items()}
    assert files == space_files(load_repo_config(yaml_file))
    assert hub.history("spaces/user/tiny-page") == [f"Page of user/tiny by vispruner {__version__}", "initial commit"]
    before = commits(hub)
    status, text = run("--space", "--push", config=yaml_file)
    assert status == 0 and "main: nothing to do, 3 files are the same" in text and commits(hub) == before


def test_a_space_keeps_what_its_owner_added_and_gets_what_is_new(
    hub: LocalHub, ready: None, run: Callable[..., tuple[int, str]], config: Path, tmp_path: Path
) -> None:
    yaml_file = write_yaml(tmp_path / "shown.yaml", **changed(config, "tiny", space="user/tiny-page"))
    assert run("--space", "--push", config=yaml_file)[0] == 0
    hub.commit("spaces/user/tiny-page", {"app.py": b"old", "logo.png": b"mine", "extra.py": b"mine"})
    status, text = run("--space", "--push", config=yaml_file)
    assert status == ExitCode.FOREIGN_CONTENT and "Give another space" in text
    assert run("--space", "--push", "--force", config=yaml_file)[0] == 0
    files = on_hub(hub, "spaces/user/tiny-page")
    assert files["app.py"].decode() == space_files(load_repo_config(yaml_file))["app.py"]
    assert (files["logo.png"], files["extra.py"]) == (b"mine", b"mine")


def test_another_s_space_is_left_alone(
    hub: LocalHub, never_built: None, run: Callable[..., tuple[int, str]], config: Path, tmp_path: Path
) -> None:
    hub.add_repo("spaces/user/tiny-page")
    front = b"---\nsdk: gradio\nmodels: [somebody/else]\n---\nMy page\n"
    hub.commit("spaces/user/tiny-page", {"README.md": front, "app.py": b"print(1)"})
    yaml_file = write_yaml(tmp_path / "shown.yaml", **changed(config, "tiny", space="user/tiny-page"))
    text = refused(run, ExitCode.FOREIGN_CONTENT, "--space", "--push", config=yaml_file)
    assert "user/tiny-page at main holds README.md, app.py" in text


def test_a_new_space_of_the_hub_s_own_form_is_taken(
    hub: LocalHub, ready: None, run: Callable[..., tuple[int, str]], config: Path, tmp_path: Path
) -> None:
    hub.add_repo("spaces/user/tiny-page")
    hub.commit("spaces/user/tiny-page", {"README.md": b"---\ntitle: x\nsdk: gradio\n---\n"})
    yaml_file = write_yaml(tmp_path / "shown.yaml", **changed(config, "tiny", space="user/tiny-page"))
    assert run("--space", "--push", config=yaml_file)[0] == 0
    assert set(on_hub(hub, "spaces/user/tiny-page")) == {"README.md", "app.py", "requirements.txt"}


def test_a_space_in_another_s_namespace_is_refused_before_anything_is_built(
    hub: LocalHub, never_built: None, run: Callable[..., tuple[int, str]], config: Path, tmp_path: Path
) -> None:
    yaml_file = write_yaml(tmp_path / "shown.yaml", **changed(config, "tiny", space="stranger/tiny-page"))
    text = refused(run, ExitCode.NO_NAMESPACE, "--space", "--push", config=yaml_file)
    assert "set space in the YAML" in text


def test_a_space_needs_a_name_and_main(hub: LocalHub, never_built: None, run: Callable[..., tuple[int, str]]) -> None:
    assert "space is missing" in refused(run, ExitCode.BAD_INPUT, "--space")
    assert "without --revision and --create-pr" in refused(run, ExitCode.BAD_INPUT, "--space", "--revision", "next")


def test_a_dry_run_needs_no_account(
    hub: LocalHub, ready: None, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    status, text = run()
    assert status == 0
    assert "a new repo" in text


def test_a_dry_run_after_a_push_finds_nothing_to_do(
    hub: LocalHub, ready: None, run: Callable[..., tuple[int, str]]
) -> None:
    assert run("--push")[0] == 0
    status, text = run()
    assert status == 0
    assert text.count("nothing to do") == len(BRANCHES)


def test_a_dry_run_tells_what_a_new_build_changes(
    hub: LocalHub, ready: None, run: Callable[..., tuple[int, str]], repo: RepoConfig, built: Path, tmp_path: Path
) -> None:
    job(repo).push(newer_build(built, tmp_path / "newer", weights=True))
    hub.commit("user/tiny", {"modeling_old.py": b"pass\n"})
    _, text = run()
    main = text[text.index("  main:") : text.index("  quarter")]
    actions = [line.split()[:2] for line in main.splitlines()[1:-1]]
    assert actions == [["change", "model.safetensors"], ["change", "README.md"], ["remove", "modeling_old.py"]]


def test_a_dry_run_names_the_branches_that_no_longer_follow(
    hub: LocalHub, ready: None, run: Callable[..., tuple[int, str]], repo: RepoConfig, built: Path
) -> None:
    job(replace(repo, budgets={**BUDGETS, "v4": {"visual_token_num": 4}})).push(built)
    assert "other branches stay as they are: v4" in run()[1]


def test_the_help_teaches_by_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        upload.main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert "python upload.py llava-1.5-7b-vispruner --push" in text
    table = {int(number) for number in re.findall(r"(?:^|\s{2})\s*(\d+)\s{2}", text, flags=re.MULTILINE)}
    assert table == {int(code) for code in ExitCode}


# Refusals, each with its exit code


def refused(run: Callable[..., tuple[int, str]], code: ExitCode, *arguments: str, config: Path | None = None) -> str:
    """Run with --push, expect this end, and return what was printed."""
    status, text = run("--push", *arguments, **({} if config is None else {"config": config}))
    assert (status, f"{code.name}") == (code, code.name), text
    assert "upload: error: " in text
    return text


@pytest.fixture
def never_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("it was built")

    monkeypatch.setattr(publish, "build_repo", fail)


def test_not_logged_in(
    hub: LocalHub, never_built: None, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused(run, ExitCode.NOT_LOGGED_IN)


def test_a_wrong_token(
    hub: LocalHub, never_built: None, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_mistyped")
    assert "does not accept the token" in refused(run, ExitCode.WRONG_TOKEN)
    assert run()[0] == ExitCode.WRONG_TOKEN  # a dry run with it would not find a private repo


@pytest.mark.parametrize("role", ["read", "fineGrained"])
def test_a_token_that_may_not_write(
    hub: LocalHub,
    never_built: None,
    run: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    role: str,
) -> None:
    hub.add_user("user", "hf_weak", role=role)
    monkeypatch.setenv("HF_TOKEN", "hf_weak")
    assert "settings/tokens" in refused(run, ExitCode.READ_ONLY_TOKEN)


def test_a_dry_run_says_that_a_push_would_be_refused(
    hub: LocalHub, ready: None, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_user("user", "hf_weak", role="read")
    monkeypatch.setenv("HF_TOKEN", "hf_weak")
    status, text = run()
    assert status == 0
    assert "--push would be refused" in text


ACCOUNT: dict[str, Any] = {"name": "user", "orgs": [{"name": "Lab", "roleInOrg": "write"}]}


def fine_grained(*scoped: tuple[str, str, str], everywhere: tuple[str, ...] = ()) -> dict[str, Any]:
    rights = [{"entity": {"type": kind, "name": name}, "permissions": [right]} for kind, name, right in scoped]
    token = {"displayName": "laptop", "role": "fineGrained", "fineGrained": {"global": everywhere, "scoped": rights}}
    return {**ACCOUNT, "auth": {"type": "access_token", "accessToken": token}}


@pytest.mark.parametrize(
    ("account", "repo_id", "creates"),
    [
        ({**ACCOUNT, "auth": {"accessToken": {"role": "write"}}}, "user/tiny", True),
        ({**ACCOUNT, "auth": {"accessToken": {"role": "write"}}}, "lab/tiny", True),
        ({**ACCOUNT, "auth": {"type": "oauth"}}, "user/tiny", True),
        (fine_grained(("user", "user", "repo.write")), "user/tiny", True),
        (fine_grained(("org", "Lab", "repo.write")), "Lab/tiny", True),
        (fine_grained(("model", "user/tiny", "repo.write")), "user/tiny", False),
        (fine_grained(everywhere=("repo.write",)), "user/tiny", True),
    ],
)
def test_tokens_that_may_write(account: dict[str, Any], repo_id: str, creates: bool) -> None:
    hub_access.require_write_access(account, repo_id, creates=creates)


@pytest.mark.parametrize(
    ("account", "repo_id", "code"),
    [
        ({**ACCOUNT, "auth": {"accessToken": {"role": "read"}}}, "user/tiny", ExitCode.READ_ONLY_TOKEN),
        ({**ACCOUNT, "auth": {"accessToken": {"role": "write"}}}, "someone/tiny", ExitCode.NO_NAMESPACE),
        ({"name": "user", "orgs": [{"name": "Lab", "roleInOrg": "read"}]}, "Lab/tiny", ExitCode.READ_ONLY_TOKEN),
        (fine_grained(("user", "user", "repo.content.read")), "user/tiny", ExitCode.READ_ONLY_TOKEN),
        (fine_grained(("org", "Lab", "repo.write")), "user/tiny", ExitCode.READ_ONLY_TOKEN),
        (fine_grained(("dataset", "user/tiny", "repo.write")), "user/tiny", ExitCode.READ_ONLY_TOKEN),
        (fine_grained(everywhere=("discussion.write",)), "user/tiny", ExitCode.READ_ONLY_TOKEN),
    ],
)
def test_tokens_that_may_not_write(account: dict[str, Any], repo_id: str, code: ExitCode) -> None:
    for creates in (True, False):
        with pytest.raises(PublishError) as error:
            hub_access.require_write_access(account, repo_id, creates=creates)
        assert error.value.exit_code == code


def test_a_right_on_a_repo_does_not_make_it() -> None:
    account = fine_grained(("model", "user/tiny", "repo.write"))
    with pytest.raises(PublishError, match="may not write to user:"):
        hub_access.require_write_access(account, "user/tiny", creates=True)


def test_a_pull_request_takes_less() -> None:
    account = fine_grained(everywhere=("discussion.write",))
    hub_access.require_write_access(account, "someone/tiny", creates=False, pull_request=True)


def test_somebody_else_s_namespace(
    hub: LocalHub, never_built: None, run: Callable[..., tuple[int, str]], config: Path, tmp_path: Path
) -> None:
    theirs = write_yaml(tmp_path / "theirs.yaml", **{**changed(config, "tiny"), "repo_id": "someone/tiny"})
    text = refused(run, ExitCode.NO_NAMESPACE, config=theirs)
    assert "'someone'" in text
    assert "one of yours: user" in text


@pytest.mark.parametrize(
    ("base", "code", "says"),
    [
        ("lab/gated", ExitCode.NO_ACCESS_TO_BASE, "accept its terms"),
        ("lab/private", ExitCode.NO_ACCESS_TO_BASE, "log in as somebody with access"),
        ("lab/nothing", ExitCode.NO_ACCESS_TO_BASE, "check base_model"),
        ("lab/base", ExitCode.BASE_REVISION_NOT_FOUND, "set base_revision"),
        ("lab/empty", ExitCode.BAD_INPUT, "no config.json"),
    ],
)
def test_a_base_that_cannot_be_had(
    hub: LocalHub,
    never_built: None,
    run: Callable[..., tuple[int, str]],
    config: Path,
    tmp_path: Path,
    base: str,
    code: ExitCode,
    says: str,
) -> None:
    hub.add_user("lab", "hf_lab")
    for name, options in (("gated", {"gated": True}), ("private", {"private": True}), ("base", {}), ("empty", {})):
        hub.add_repo(f"lab/{name}", **options)
        if name != "empty":
            hub.commit(f"lab/{name}", {"config.json": b"{}"})
    revision = "no-such-branch" if base == "lab/base" else "main"
    text = refused(
        run,
        code,
        config=write_yaml(tmp_path / "base.yaml", **changed(config, "tiny", base_model=base, base_revision=revision)),
    )
    assert base in text
    assert says in text


def test_a_thin_repo_of_a_folder_needs_the_commit_of_its_base_too(
    hub: LocalHub, run: Callable[..., tuple[int, str]], config: Path, tmp_path: Path, tiny_llava_repo: Path
) -> None:
    hub.add_repo("user/base")
    lost = write_yaml(tmp_path / "lost.yaml", **changed(config, "tiny", base_model="user/base", base_revision="gone"))
    arguments = ("--base", str(tiny_llava_repo), "--thin")
    assert "user/base" in refused(run, ExitCode.BASE_REVISION_NOT_FOUND, *arguments, config=lost)
    lost = write_yaml(tmp_path / "lost.yaml", **changed(config, "tiny", base_model="lab/none", base_revision="main"))
    assert "lab/none" in refused(run, ExitCode.NO_ACCESS_TO_BASE, *arguments, config=lost)


def test_a_branch_of_the_base_is_pinned_before_the_build(
    hub: LocalHub, config: Path, tmp_path: Path, tiny_llava_repo: Path
) -> None:
    hub.add_repo("user/base")
    hub.commit("user/base", contents(tiny_llava_repo))
    moving = write_yaml(tmp_path / "m.yaml", **changed(config, "tiny", base_model="user/base", base_revision="main"))
    published = job(load_repo_config(moving))
    published.check_access(push=True)
    assert published.repo.base_revision == hub.refs("user/base")["main"]


OTHER_CONFIG = json.dumps({"vispruner_config": {"base_model_name_or_path": "another/base"}}).encode()


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": b'{"model_type": "llava"}', "model.safetensors": b"weights"},
        {"config.json": OTHER_CONFIG},
        {"config.json": b"not JSON"},
        {"README.md": b"---\nlicense: mit\n---\n# My model\n"},
        {"data/train.csv": b"1,2\n"},
    ],
)
def test_foreign_content_is_refused_unless_forced(
    hub: LocalHub,
    ready: None,
    run: Callable[..., tuple[int, str]],
    built: Path,
    files: dict[str, bytes],
) -> None:
    hub.add_repo("user/tiny")
    hub.commit("user/tiny", files)
    before = hub.files("user/tiny")
    text = refused(run, ExitCode.FOREIGN_CONTENT)
    assert next(iter(files)) in text
    assert hub.files("user/tiny") == before
    assert run("--push", "--force")[0] == 0
    kept = {path: data for path, data in files.items() if path.startswith("data/")}
    assert on_hub(hub, "user/tiny") == {**contents(built), **kept}


def test_a_foreign_budget_branch_is_refused_too(
    hub: LocalHub, ready: None, run: Callable[..., tuple[int, str]], repo: RepoConfig, built: Path
) -> None:
    job(repo).push(built)
    hub.commit("user/tiny", {"experiment.bin": b"", "notes.md": b"mine"}, revision="v8")
    assert "at v8 holds notes.md" in refused(run, ExitCode.FOREIGN_CONTENT)


def test_repos_go_into_a_collection_once(
    hub: LocalHub, ready: None, run: Callable[..., tuple[int, str]], waits: list[float]
) -> None:
    status, text = run("--collection", "My pruned models")
    assert status == 0 and "would put it into the collection My pruned models" in text
    assert hub.collections == {}
    for _ in range(2):  # as after an interruption
        status, text = run("--push", "--collection", "My pruned models")
        assert status == 0, text
        (slug,) = hub.collections
        assert [(item["id"], item["type"]) for item in hub.collections[slug]["items"]] == [("user/tiny", "model")]
        assert f"{hub.endpoint}/collections/{slug}" in text


def test_publish_is_upload_for_those_who_installed_with_pip(
    hub: LocalHub, ready: None, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["publish", str(config), "--out", str(tmp_path / "out"), "--json"]
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["repos"][0]["commits"] == {} and hub.repos == {}
    assert cli.main([*arguments, "--push"]) == 0
    printed = capsys.readouterr()
    (done,) = json.loads(printed.out)["repos"]
    assert done["url"] == f"{hub.endpoint}/user/tiny"
    assert done["commits"] == {branch: hub.refs("user/tiny")[branch] for branch in done["commits"]}
    assert set(done["commits"]) == {"main", *BUDGETS}
    assert "read back main" in printed.err


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"vispruner_config": {"visual_token_num": 999}, "budgets": {}}, "vispruner_config.visual_token_num 999"),
        ({"budgets": {"all": {"keep_ratio": 1.0}}}, "budgets.all.keep_ratio 1.0"),
    ],
    ids=["main", "branch"],
)
def test_what_prunes_nothing_is_not_published(
    changes: dict[str, Any],
    field: str,
    hub: LocalHub,
    tiny_llava_repo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_yaml(tmp_path / "all.yaml", base_model=str(tiny_llava_repo), **changes)
    arguments = ["publish", str(config), "--out", str(tmp_path / "out"), "--collection", "Pruned", "--push"]
    assert cli.main(arguments) == ExitCode.BAD_INPUT
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{config}: {field} keeps all 64 visual tokens of an image, so nothing would be pruned: set it" in said
    assert hub.repos == {} and hub.collections == {} and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["--collection", "--out", "--revision"])
def test_an_empty_argument_is_refused_at_once(name: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        upload.main([str(config), "--push", name, ""])
    assert f"argument {name}: is empty: leave it out" in capsys.readouterr().err


def test_publish_tells_its_errors_as_upload_does(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(["publish", str(config), "--out", str(tmp_path), "--revision", "bad name..", "--json"])
    printed = capsys.readouterr()
    assert status == ExitCode.BAD_INPUT
    assert "no good branch name" in json.loads(printed.out)["error"]
    assert printed.err.startswith("vispruner publish: error: --revision")


@pytest.mark.parametrize("files", [{}, {"README.md": b"---\nlicense: mit\n---\n"}, {"LICENSE": b"MIT"}])
def test_a_repo_fresh_from_the_website_is_not_foreign(
    hub: LocalHub, ready: None, run: Callable[..., tuple[int, str]], files: dict[str, bytes]
) -> None:
    hub.add_repo("user/tiny")
    if files:
        hub.commit("user/tiny", files)
    assert run("--push")[0] == 0


@pytest.mark.core
def test_exit_status_and_endpoint_of_a_real_process(hub: LocalHub, config: Path, tmp_path: Path) -> None:
    environment = hub.client_env(tmp_path, "hf_mistyped", HF_ENDPOINT="http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, str(ROOT / "upload.py"), str(config), "--push", "--endpoint", hub.endpoint],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ExitCode.WRONG_TOKEN
    assert done.stderr.splitlines()[-1].startswith("upload: error: ")
    assert "hf_mistyped" not in done.stdout + done.stderr
    assert hub.requests[-1] == ("GET", "/api/whoami-v2")


def test_an_interruption(hub: LocalHub, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(publish, "build_repo", interrupt)
    status, text = run("--push")
    assert status == ExitCode.INTERRUPTED
    assert "run the same command again" in text


def test_a_fault_shows_its_traceback_without_the_token(
    hub: LocalHub, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise KeyError(f"Bearer {TOKEN}")

    monkeypatch.setattr(publish, "build_repo", fail)
    for arguments in (("--push",), ("--push", "--traceback")):
        status, text = run(*arguments)  # which looks for the token in all that was printed
        assert status == ExitCode.FAULT
        assert "KeyError: 'Bearer [token]'" in text


def test_offline_mode_is_named(
    hub: LocalHub, never_built: None, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(run, ExitCode.CONNECTION_LOST)


def test_what_verify_refuses_is_not_published(
    hub: LocalHub, ready: None, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Report(Path(), (Check("imports", "fail", "line 1 imports os.path"),))
    monkeypatch.setattr(publish, "verify_repo", lambda folder, base: report)
    assert "line 1 imports" in refused(run, ExitCode.NOT_VERIFIED)
    assert not hub.repos


def test_a_bad_yaml_is_found_before_anything_else(
    hub: LocalHub, run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    text = refused(run, ExitCode.BAD_INPUT, config=write_yaml(tmp_path / "bad.yaml", base_model="x/y", spam=1))
    assert "spam is not a field" in text
    assert hub.requests == []


def test_a_folder_that_holds_something_else_is_not_replaced(
    hub: LocalHub, run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    (tmp_path / "out" / "tiny").mkdir(parents=True)
    (tmp_path / "out" / "tiny" / "thesis.tex").write_text("years of work")
    assert "give another folder as --out" in refused(run, ExitCode.BAD_INPUT)
    assert (tmp_path / "out" / "tiny" / "thesis.tex").exists()


def test_a_full_disk(
    hub: LocalHub, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr("vispruner.conversion.build.shutil.copyfile", full)
    assert "free some space" in refused(run, ExitCode.DISK_FULL)
    assert not list((tmp_path / "out").glob("*"))
    assert not hub.repos


# Troubles of the network: what passes is waited out, what does not has an exit code


def is_commit(request: Request) -> bool:
    return request.method == "POST" and "/commit/" in request.path


def is_upload(request: Request) -> bool:
    return request.method == "PUT"


def is_whoami(request: Request) -> bool:
    return request.path.endswith("/whoami-v2")


ALWAYS = float("inf")


@pytest.mark.parametrize("kind", ["500", "503", "429", "drop"])
@pytest.mark.parametrize("request_kind", [is_whoami, is_upload, is_commit])
def test_what_happens_once_is_waited_out(
    hub: LocalHub,
    ready: None,
    run: Callable[..., tuple[int, str]],
    waits: list[float],
    built: Path,
    request_kind: Callable[[Request], bool],
    kind: str,
) -> None:
    hub.fail_at(request_kind, kind=kind)
    assert run("--push")[0] == 0
    assert len(waits) == 1
    assert on_hub(hub, "user/tiny") == contents(built)
    assert {len(hub.history("user/tiny", branch)) for branch in BRANCHES} == {2}


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("500", ExitCode.SERVER_ERROR),
        ("503", ExitCode.SERVER_ERROR),
        ("429", ExitCode.RATE_LIMITED),
        ("drop", ExitCode.CONNECTION_LOST),
    ],
)
@pytest.mark.parametrize("request_kind", [is_whoami, is_upload, is_commit])
def test_what_does_not_pass_ends_and_the_next_run_goes_on(
    hub: LocalHub,
    ready: None,
    run: Callable[..., tuple[int, str]],
    waits: list[float],
    built: Path,
    request_kind: Callable[[Request], bool],
    kind: str,
    code: ExitCode,
) -> None:
    hub.fail_at(request_kind, kind=kind, times=ALWAYS)
    assert "again" in refused(run, code)
    assert 0 < sum(waits) < 2000
    hub.heal()
    assert run("--push")[0] == 0
    assert on_hub(hub, "user/tiny") == contents(built)


def test_the_hub_s_wait_is_kept_to(
    hub: LocalHub, ready: None, run: Callable[..., tuple[int, str]], waits: list[float]
) -> None:
    hub.fail_at(is_commit, kind="429", retry_after=7)
    status, text = run("--push")
    assert status == 0
    assert waits == [7.0]
    assert "trying again in 7 s" in text


def test_a_rate_limit_of_hours_is_not_waited_for(
    hub: LocalHub, ready: None, run: Callable[..., tuple[int, str]], waits: list[float]
) -> None:
    hub.fail_at(is_commit, kind="429", retry_after=7200, times=ALWAYS)
    assert "rate limit" in refused(run, ExitCode.RATE_LIMITED)
    assert waits == []


def test_an_answer_that_is_lost_makes_no_second_commit(
    hub: LocalHub, ready: None, run: Callable[..., tuple[int, str]], waits: list[float]
) -> None:
    hub.fail_at(is_commit, kind="drop", after=True)
    assert run("--push")[0] == 0
    assert {len(hub.history("user/tiny", branch)) for branch in BRANCHES} == {2}


def test_somebody_else_s_commit_is_kept_and_built_upon(
    hub: LocalHub, ready: None, run: Callable[..., tuple[int, str]], repo: RepoConfig, built: Path, tmp_path: Path
) -> None:
    job(repo).push(newer_build(built, tmp_path / "older"))
    hub.fail_at(is_commit, kind=lambda request: hub.commit("user/tiny", {"LICENSE": b"MIT"}))
    assert run("--push")[0] == 0
    assert on_hub(hub, "user/tiny") == {**contents(built), "LICENSE": b"MIT"}


def test_a_branch_that_keeps_moving_is_given_up(
    hub: LocalHub, ready: None, run: Callable[..., tuple[int, str]], repo: RepoConfig, built: Path, tmp_path: Path
) -> None:
    job(repo).push(newer_build(built, tmp_path / "older"))
    count = iter(range(100))
    hub.fail_at(
        is_commit, kind=lambda request: hub.commit("user/tiny", {"LICENSE": b"%d" % next(count)}), times=ALWAYS
    )
    assert "twice" in refused(run, ExitCode.PARENT_MOVED)
    assert next(count) == 2


def test_a_card_that_the_hub_refuses_stops_before_the_repo_is_made(
    hub: LocalHub,
    ready: None,
    run: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    built: Path,
    tmp_path: Path,
) -> None:
    bad = Path(shutil.copytree(built, tmp_path / "bad"))
    (bad / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    monkeypatch.setattr(
        publish, "build_repo", lambda repo, out, **options: shutil.copytree(bad, out, dirs_exist_ok=True)
    )
    refused(run, ExitCode.CARD_REFUSED)
    assert not hub.repos
    assert run()[0] == ExitCode.CARD_REFUSED


def test_what_the_hub_drops_is_noticed(hub: LocalHub, ready: None, run: Callable[..., tuple[int, str]]) -> None:
    hub.add_repo("user/tiny")
    hub.commit("user/tiny", {".gitignore": b"tokenizer*\n"})
    assert "tokenizer.json" in refused(run, ExitCode.READ_BACK_DIFFERS)


def test_another_refusal_is_passed_on(hub: LocalHub, ready: None, run: Callable[..., tuple[int, str]]) -> None:
    hub.fail_at(is_commit, kind="413", times=ALWAYS)
    assert "413" in refused(run, ExitCode.REFUSED_BY_HUB)


# Xet, the way that huggingface_hub takes by default


@pytest.fixture
def xet_hub(tmp_path: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.xet = True
    return hub


@pytest.mark.core
def test_weights_go_through_xet(xet_hub: LocalHub, repo: RepoConfig, built: Path, tmp_path: Path) -> None:
    job(repo).push(built)
    newer = newer_build(built, tmp_path / "newer", weights=True)
    pushed = job(repo).push(newer)
    assert any("/xet-write-token/" in path for _, path in xet_hub.requests)
    assert not [path for method, path in xet_hub.requests if method == "PUT"]
    assert on_hub(xet_hub, "user/tiny") == contents(newer)
    assert {branch: xet_hub.refs("user/tiny")[branch] for branch in pushed} == pushed
    assert job(repo).push(newer) == pushed


def test_a_refusal_on_the_way_through_xet(
    xet_hub: LocalHub, ready: None, run: Callable[..., tuple[int, str]], waits: list[float], built: Path
) -> None:
    """Server errors are left out: hf_xet itself retries them for minutes before it gives up."""
    xet_hub.fail_at(lambda request: "/xet-write-token/" in request.path, kind="403", times=ALWAYS)
    refused(run, ExitCode.READ_ONLY_TOKEN)
    assert waits == []
    xet_hub.heal()
    assert run("--push")[0] == 0
    assert on_hub(xet_hub, "user/tiny") == contents(built)


# Killed at any request, run again: nothing is lost and nothing is half there


def die_at(
    hub: LocalHub,
    number: int | Callable[[Request], bool],
    answered: bool,
    push: Callable[[], Any],
    by: signal.Signals = signal.SIGKILL,
) -> int:
    """Push in a child that gets a signal at its request of this number; return how it ended, as `os.waitpid` says."""
    child: list[int] = []
    forked = threading.Event()

    def kill(request: Request) -> None:
        forked.wait()
        os.kill(child[0], by)
        if not answered:
            raise Refusal(503, "nobody reads this")

    hub.fail_at(number, kind=kill, after=answered)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = 0
        try:
            status = push()
        except BaseException:
            traceback.print_exc()
        os._exit(status if isinstance(status, int) else 0)
    child.append(pid)
    forked.set()
    _, status = os.waitpid(pid, 0)
    hub.heal()
    return status


def require_whole(hub: LocalHub, repo_id: str, *builds: Path) -> None:
    """Every commit of every branch holds nothing, or one of the builds from its weights to its card."""
    for branch in hub.refs(repo_id):
        for commit in hub._ancestors(hub.repos[repo_id], branch):
            files = on_hub(hub, repo_id, commit.id)
            files.pop("config.json", None)
            wholes = [
                {path: data for path, data in contents(build).items() if path != "config.json"} for build in builds
            ]
            assert files == {} or files in wholes, (branch, sorted(files))


@pytest.mark.slow
@pytest.mark.parametrize("answered", [False, True], ids=["before the answer", "after the Hub did it"])
@pytest.mark.parametrize("first", [True, False], ids=["a new repo", "a new build"])
def test_a_kill_at_any_request(
    hub: LocalHub, repo: RepoConfig, built: Path, tmp_path: Path, first: bool, answered: bool
) -> None:
    newer = newer_build(built, tmp_path / "newer", weights=True)

    def prepare(name: str) -> RepoConfig:
        own = replace(repo, repo_id=f"user/{name}")
        if not first:
            job(own).push(built)
        return own

    job(prepare("warm")).push(newer)  # some versions of the client ask one thing more in a process's first run
    undisturbed = prepare("undisturbed")
    before = len(hub.requests)
    job(undisturbed).push(newer)
    count = len(hub.requests) - before
    assert count > 20
    for number in range(1, count + 1):
        own = prepare(f"killed-at-{number}")
        assert os.WIFSIGNALED(die_at(hub, number, answered, lambda own=own: job(own).push(newer)))
        if own.repo_id in hub.repos:
            require_whole(hub, own.repo_id, built, newer)
        job(own).push(newer)
        assert state(hub, own.repo_id) == state(hub, "user/undisturbed"), number
        require_whole(hub, own.repo_id, built, newer)


def test_uploaded_weights_are_not_sent_again_after_a_kill(hub: LocalHub, repo: RepoConfig, built: Path) -> None:
    assert os.WIFSIGNALED(die_at(hub, is_commit, False, lambda: job(repo).push(built)))
    sent = [path for method, path in hub.requests if method == "PUT"]
    assert len(sent) == 1
    job(repo).push(built)
    assert [path for method, path in hub.requests if method == "PUT"] == sent


INTERRUPTED_AT = {
    "the account": lambda request: "whoami" in request.path,
    "the upload of weights": is_upload,
    "a commit": is_commit,
    "a new branch": lambda request: request.method == "POST" and "/branch/" in request.path,
    "the listing that is read back": 18,
}


@pytest.mark.core
@pytest.mark.parametrize("answered", [False, True], ids=["before the answer", "after the Hub did it"])
@pytest.mark.parametrize("moment", INTERRUPTED_AT.values(), ids=INTERRUPTED_AT)
def test_ctrl_c_leaves_what_the_next_run_completes(
    hub: LocalHub,
    ready: None,
    run: Callable[..., tuple[int, str]],
    config: Path,
    tmp_path: Path,
    repo: RepoConfig,
    built: Path,
    moment: Any,
    answered: bool,
) -> None:
    undisturbed = replace(repo, repo_id="user/undisturbed")
    job(undisturbed).push(built)
    command = [str(config), "--out", str(tmp_path / "out"), "--push"]
    status = die_at(hub, moment, answered, lambda: upload.main(command), by=signal.SIGINT)
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == ExitCode.INTERRUPTED
    if "user/tiny" in hub.repos:
        require_whole(hub, "user/tiny", built)
    assert run("--push")[0] == 0
    assert state(hub, "user/tiny") == state(hub, "user/undisturbed")


@pytest.mark.core
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_full_disk_under_the_hub_s_cache_leaves_what_the_next_run_completes(
    number: int,
    hub: LocalHub,
    ready: None,
    run: Callable[..., tuple[int, str]],
    repo: RepoConfig,
    built: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    older = newer_build(built, tmp_path / "older", weights=True)
    for name in ("user/tiny", "user/undisturbed"):
        job(replace(repo, repo_id=name)).push(older)
    job(replace(repo, repo_id="user/undisturbed")).push(built)
    download, calls = hub_access.HfApi.hf_hub_download, []

    def full(*arguments: Any, **options: Any) -> str:
        calls.append(arguments)
        if len(calls) >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "cache" / "blob"))
        return download(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(hub_access.HfApi, "hf_hub_download", full)
        text = refused(run, ExitCode.DISK_FULL)
    assert f"{tmp_path}/cache/blob" in text and "HF_HOME" in text
    require_whole(hub, "user/tiny", older, built)
    assert run("--push")[0] == 0
    assert state(hub, "user/tiny") == state(hub, "user/undisturbed")


@pytest.mark.core
def test_a_repo_with_all_that_a_build_can_add_is_published_twice(
    hub: LocalHub, run: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "verify_repo", verified)
    monkeypatch.setattr(PublishJob, "check_loads", lambda self, folder: None)
    codebook = {"method": "codebook", "codebook": "tiny-llava-codebook.safetensors", "visual_token_num": 18}
    yaml_file = write_yaml(
        tmp_path / "all.yaml", base_model="embedded/tiny-llava", vispruner_config=codebook, handler=True, budgets={}
    )
    assert run("--push", config=yaml_file)[0] == ExitCode.DONE
    before = len(hub.history("user/tiny", "main"))
    status, text = run("--push", config=yaml_file)
    assert status == ExitCode.DONE and len(hub.history("user/tiny", "main")) == before, text
    assert {"handler.py", "requirements.txt", "tiny-llava-codebook.safetensors"} <= hub.files("user/tiny").keys()


# A CI job without a stored token


@pytest.fixture
def publisher(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    """A Hub that trusts this process's identity to write to user/tiny, which is there; nobody is logged in."""
    pytest.importorskip("huggingface_hub._oidc", reason="huggingface_hub knows Trusted Publishers since 1.19")
    hub.add_repo("user/tiny")
    hub.publishers["user/tiny"] = "the identity of a job"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_OIDC_RESOURCE", "user/tiny")
    monkeypatch.setenv("HF_OIDC_ID_TOKEN", "the identity of a job")
    monkeypatch.setattr("huggingface_hub.utils._auth._OIDC_TOKEN_CACHE", None)
    return hub


def test_a_trusted_publisher_pushes_without_a_token_and_asks_for_no_account(
    publisher: LocalHub, run: Callable[..., tuple[int, str]], ready: None, built: Path
) -> None:
    assert run("--push")[0] == ExitCode.DONE
    assert contents(built).items() <= publisher.files("user/tiny").items()
    assert publisher.refs("user/tiny").keys() >= BRANCHES
    assert ("GET", "/api/whoami-v2") not in publisher.requests
    assert not {user.name for user in publisher.users.values()} - {"user", "a trusted publisher"}


@pytest.mark.parametrize(
    ("change", "options", "status", "reason"),
    [
        ({"HF_OIDC_RESOURCE": "user/other"}, (), ExitCode.NOT_LOGGED_IN, "let this workflow publish in the settings"),
        ({"HF_OIDC_ID_TOKEN": "another"}, (), ExitCode.NOT_LOGGED_IN, "let this workflow publish in the settings"),
        ({"HF_OIDC_ID_TOKEN": ""}, (), ExitCode.NOT_LOGGED_IN, "permissions: id-token: write"),
        ({}, ("--collection", "pruned"), ExitCode.READ_ONLY_TOKEN, "--collection: a Trusted Publisher may write to"),
        ({}, ("--space",), ExitCode.READ_ONLY_TOKEN, "--space: a Trusted Publisher may write to"),
    ],
)
def test_what_a_trusted_publisher_lacks_is_named(
    publisher: LocalHub,
    run: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, str],
    options: tuple[str, ...],
    status: ExitCode,
    reason: str,
) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    found, text = run("--push", *options)
    assert (found, reason in text) == (status, True), text
    assert "the identity of a job" not in text


def test_a_trusted_publisher_of_another_repo_is_refused(
    publisher: LocalHub, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.publishers["user/other"] = "the identity of a job"
    monkeypatch.setenv("HF_OIDC_RESOURCE", "user/other")
    status, text = run("--push")
    assert status == ExitCode.NO_NAMESPACE and "set it to user/tiny, with a job for each repo" in text


def test_no_identity_is_sent_in_the_clear(
    publisher: LocalHub, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_access, "get_token", lambda: pytest.fail("the identity was sent"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.example")
    with pytest.raises(PublishError, match="is not https"):
        HubAccess()


def test_a_trusted_publisher_of_another_repo_may_look(
    publisher: LocalHub, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, ready: None
) -> None:
    publisher.publishers["user/other"] = "the identity of a job"
    monkeypatch.setenv("HF_OIDC_RESOURCE", "user/other")
    status, text = run()
    assert status == ExitCode.DONE and "note: --push would be refused: HF_OIDC_RESOURCE is user/other" in text


def test_a_trusted_publisher_makes_no_repo(publisher: LocalHub, run: Callable[..., tuple[int, str]]) -> None:
    del publisher.repos["user/tiny"]
    status, text = run("--push")
    assert status == ExitCode.READ_ONLY_TOKEN and "https://huggingface.co/new" in text


def test_a_client_that_knows_no_trusted_publishers_is_named(
    hub: LocalHub, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_OIDC_RESOURCE", "user/tiny")
    monkeypatch.setattr(hub_access, "get_token", lambda: None)  # as huggingface_hub 1.18 without a stored token
    status, text = run("--push")
    assert status == ExitCode.NOT_LOGGED_IN and "install 1.19 or later" in text


def test_the_workflow_in_the_documentation_stores_no_token_and_runs_this_command() -> None:
    page = (ROOT / "docs" / "publish.md").read_text(encoding="utf-8")
    (workflow,) = re.findall(r"```yaml\n(name: publish.*?)```", page, flags=re.DOTALL)
    (job,) = yaml.safe_load(workflow)["jobs"].values()
    assert job["permissions"] == {"contents": "read", "id-token": "write"} and "secrets." not in workflow
    (step,) = (step for step in job["steps"] if "vispruner publish" in step.get("run", ""))
    assert step["env"] == {"HF_OIDC_RESOURCE": "your-name/llava-1.5-7b-vispruner"}
    command = step["run"].split(" && ")[-1].split()
    arguments = cli._parser().parse_args(command[1:])
    assert arguments.push and arguments.configs == ["mine.yaml"]
