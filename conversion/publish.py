"""From a YAML to a verified repo on the Hub: build, verify, compare, push, read back. `upload.py` is its command line.

Every branch is brought up to date by one commit, made against the commit that was compared with, so that no branch
ever holds half a build. A run asks the Hub where it stands before each step, which is all that resuming takes: what is
there already is not sent again, and where nothing differs there is no commit.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from vispruner import __version__, architecture_of

from . import publish_worker
from .base_checkpoint import resolve_base
from .build import budget_config, build_repo, find_repo_base
from .built_folder import hash_of, holds_a_build, opened_regular
from .checkpoint_io import has_weights, read_json, read_regular
from .hub_access import (
    ExitCode,
    HubAccess,
    Patience,
    PublishError,
    explained,
    require_trusted,
    require_write_access,
    trusted_repo,
    understood,
    with_base_commit,
)
from .isolation import Isolation, isolation
from .plain_text import one_line, printable
from .repo_config import RepoConfig, is_branch_name, load_repo_config
from .space import SPACE_FILES, shown_models, space_files
from .upload_plan import (
    CARD,
    CONFIG,
    NEUTRAL_FILES,
    BranchPlan,
    LocalFile,
    RemoteBranch,
    RemoteFile,
    built_files,
    describe,
    local_file,
    made_by_a_build,
    plan_branch,
)
from .verify import lend_base, verify_repo

DEFAULT_BRANCH = "main"
DEFAULT_OUT = Path("build") / "upload"
# A model up to this size is loaded from the Hub after a push; of a larger one the classes, not the weights.
LOAD_BYTES = 4 * 2**30
LOAD_TIMEOUT = 3600.0
MOST_LISTED = 10_000  # files of a repo, whose list a Hub may go on giving for ever


def publish(
    configs: Sequence[str | os.PathLike[str]],
    push: bool = False,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    thin: bool | None = None,
    base: str | None = None,
    out: str | os.PathLike[str] = DEFAULT_OUT,
    endpoint: str | None = None,
    force: bool = False,
    collection: str | None = None,
    space: bool = False,
    done: list[dict[str, Any]] | None = None,
) -> None:
    """Build and verify each YAML's repo, show what would change on the Hub, and with `push` make it so.

    collection  put the repos into the collection of this name that their owner has, or gets
    space       then publish the Space that each YAML names, too
    done        takes a dict about each repo as soon as it is finished: repo_id, url, folder, and the commits of a push
    All accounts, bases and repos are checked before the first build. Raises PublishError, and for input that cannot be
    built what `build_repo` raises.
    """
    if revision is not None and create_pr:
        raise PublishError(ExitCode.BAD_INPUT, "--create-pr proposes a change of main: give it without --revision")
    if space and (revision is not None or create_pr):
        raise PublishError(
            ExitCode.BAD_INPUT, "--space shows what main holds: give it without --revision and --create-pr"
        )
    if trusted_repo() is not None and (collection is not None or space):
        raise PublishError(
            ExitCode.READ_ONLY_TOKEN,
            f"{'--space' if space else '--collection'}: a Trusted Publisher may write to its repo alone; do this with "
            "a token of your own",
        )
    repos = [load_repo_config(config) for config in configs]
    hub = HubAccess(endpoint)
    jobs = [
        PublishJob(hub, repo, private=private, create_pr=create_pr, revision=revision, force=force) for repo in repos
    ]
    spaces = [SpaceJob(hub, repo, private=private, force=force) for repo in repos] if space else [None] * len(jobs)
    for job in filter(None, (*jobs, *spaces)):
        job.check_access(push, pin_base=base is None)
    for job, page in zip(jobs, spaces, strict=True):
        folder = job.build(Path(out), thin, base)
        wanted = job.wanted_branches(folder)
        job.require_verified(wanted)
        job.show_summary(wanted, push)
        if push:
            job.push_branches(wanted)
            job.check_loads(wanted)
            if collection is not None:
                job.add_to_collection(collection)
            _say(f"done: {job.url}")
        elif collection is not None:
            _say(one_line(f"  --push would put it into the collection {collection}"))
        if page is not None:
            page.publish(push)
        if done is not None:
            more = {} if page is None else {"space": {"url": page.url, "commits": page.commits}}
            about = {"repo_id": job.repo.repo_id, "url": job.url, "folder": str(folder), "commits": job.commits}
            done.append(about | more)
    if not push:
        _say("this was a dry run: nothing was changed on the Hub; add --push to publish")


class PublishJob:
    """One YAML and where it goes; `commits` are those of the branches once they are pushed."""

    kind = "model"
    named_by = "repo_id"  # the field of the YAML

    def __init__(
        self,
        hub: HubAccess,
        repo: RepoConfig,
        private: bool = False,
        create_pr: bool = False,
        revision: str | None = None,
        force: bool = False,
    ) -> None:
        if revision is not None and not is_branch_name(revision):
            raise PublishError(
                ExitCode.BAD_INPUT,
                f"--revision {revision!r} is no good branch name: take letters, digits and - _ . / only, such as next",
            )
        if revision is not None and revision in repo.budgets:
            raise PublishError(
                ExitCode.BAD_INPUT, f"--revision {revision}: {repo.path} has a budget branch of that name"
            )
        self.hub = hub
        self.repo = repo
        self.private = private
        self.create_pr = create_pr
        self.branch = revision or DEFAULT_BRANCH
        self.force = force
        self.verified: Mapping[str, str] = {}
        self.commits: dict[str, str] = {}
        self.other_branches: list[str] = []

    @property
    def url(self) -> str:
        """Where its page is."""
        return f"{self.hub.endpoint}/{'' if self.kind == 'model' else f'{self.kind}s/'}{self.repo.repo_id}"

    @property
    def budgets(self) -> dict[str, dict[str, Any]]:
        """The budget branches that follow this push: those of the YAML, which follow main alone."""
        return {} if self.create_pr or self.branch != DEFAULT_BRANCH else self.repo.budgets

    def check_access(self, push: bool, pin_base: bool = True) -> None:
        """Refuse, before anything is built, what could not be pushed; pin the base's branch to its commit."""
        repo_id = self.repo.repo_id
        with explained(self.hub, repo_id):
            is_trusted = trusted_repo() is not None
            account = self.hub.account if not is_trusted and (push or self.hub.token) else None
            remote = self.read_branches()
            try:
                if is_trusted:
                    require_trusted(repo_id, exists=remote is not None)
                elif account is not None:
                    with understood(self.hub.endpoint):
                        require_write_access(
                            account, repo_id, creates=remote is None, pull_request=self.create_pr, kind=self.kind
                        )
            except PublishError as reason:
                if push:
                    raise
                _say(f"note: --push would be refused: {reason}")
            if remote is None and self.create_pr:
                raise PublishError(
                    ExitCode.BAD_INPUT, f"{repo_id} is not on the Hub: there is nothing --create-pr could change"
                )
            if remote is not None:
                self._refuse_public()
                for branch, found in remote.items():
                    self._refuse_foreign(branch, found)
            if pin_base:
                self.repo = with_base_commit(self.hub, self.repo)

    def build(self, out: Path, thin: bool | None, base: str | None) -> Path:
        """Build the repo into a folder of its own below `out` and verify it there."""
        folder = out / self.repo.repo_id.split("/")[-1]
        if folder.is_dir() and any(folder.iterdir()) and not holds_a_build(folder):
            raise PublishError(ExitCode.BAD_INPUT, f"{folder} holds something else: give another folder as --out")
        with explained(self.hub, f"building {self.repo.repo_id}"):
            build_repo(self.repo, folder, base=base, thin=thin, overwrite=True)
            report = verify_repo(folder, base=self._base_to_compare(folder, base))
        _say(report.table())
        if not report.passed:
            raise PublishError(
                ExitCode.NOT_VERIFIED, f"{self.repo.repo_id} is not published: verify refuses what was built"
            )
        self.verified = report.files
        return folder

    def _base_to_compare(self, folder: Path, base: str | None) -> Path | None:
        if not has_weights(folder):
            return None  # a thin repo has no weights of its own
        return find_repo_base(self.repo).with_weights().folder if base is None else resolve_base(base)

    def require_verified(self, wanted: Mapping[str, list[LocalFile]]) -> None:
        """Refuse to send anything but what was verified; a budget branch has a config.json of its own beside it."""
        found = {file.path: file.sha256 for file in wanted[self.branch]}
        differing = sorted(
            name for name in found.keys() | self.verified.keys() if found.get(name) != self.verified.get(name)
        )
        if differing:
            raise PublishError(
                ExitCode.NOT_VERIFIED,
                f"{self.repo.repo_id} is not published: {', '.join(differing)} changed since verify read it; run the "
                "same command again",
            )

    def show_summary(self, wanted: Mapping[str, list[LocalFile]], push: bool) -> None:
        """Print what would change, or will, on every branch; let the Hub judge a new card before anything is made."""
        repo_id = self.repo.repo_id
        with explained(self.hub, repo_id):
            remote = self.read_branches()
            plans = [self._plan(branch, files, (remote or {}).get(branch)) for branch, files in wanted.items()]
            card = next((file for plan in plans for file in (*plan.added, *plan.changed) if file.path == CARD), None)
            if card is not None:
                self.hub.check_card(card.text(), self.kind)
        state = "exists" if remote is not None else "a new repo" if self.hub.token else "a new repo, or a private one"
        visibility = ", private" if remote is None and self.private else ""
        _say(f"\n{self.url} ({state}{visibility})")
        _say("\n".join(describe(plans[0])))
        for plan in plans[1:]:
            _say("\n".join(describe(plan, self._budget_text(plan.branch), main=plans[0])))
        if self.other_branches:
            _say(one_line(f"  other branches stay as they are: {', '.join(self.other_branches)}"))
        if self.create_pr and not all(plan.is_empty for plan in plans):
            _say(f"  as a pull request{'' if push else ' that --push would open'}; budget branches follow main later")

    def _plan(self, branch: str, files: Sequence[LocalFile], remote: RemoteBranch | None) -> BranchPlan:
        return plan_branch(branch, files, remote, self.makes)

    def makes(self, path: str) -> bool:
        """Say whether a file's name is one that this job writes, or an older version of it."""
        return made_by_a_build(path) or path in {file.name for file in self.repo.files.values()}

    def _budget_text(self, branch: str) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.budgets.get(branch, {}).items())

    def push_branches(self, wanted: Mapping[str, list[LocalFile]]) -> dict[str, str]:
        """Bring every branch to the files it shall hold and read them back; return branch -> commit.

        Safe to repeat and to interrupt anywhere: each branch changes by one commit or not at all.
        """
        with explained(self.hub, self.repo.repo_id, uploading=True):
            if self.read_branches() is None:
                self._create_repo()
            self.commits = {branch: self._bring_up_to_date(branch, files) for branch, files in wanted.items()}
            self._read_back(wanted)
        return self.commits

    def add_to_collection(self, title: str) -> None:
        """Put the repo into a collection of its owner, which is made where there is none; safe to repeat."""
        namespace = self.repo.repo_id.split("/")[0]
        with explained(self.hub, f"the collection {title}", uploading=True):
            found = self.hub.ask(
                self.hub.api.create_collection, title, namespace=namespace, private=self.private, exists_ok=True
            )
            self.hub.ask(
                self.hub.api.add_collection_item, found.slug, self.repo.repo_id, item_type="model", exists_ok=True
            )
        _say(one_line(f"in the collection {self.hub.endpoint}/collections/{found.slug}"))

    def wanted_branches(self, folder: Path) -> dict[str, list[LocalFile]]:
        """Return the files that every branch shall hold, the pushed branch first."""
        files = built_files(folder, self.repo)
        wanted = {self.branch: files}
        config = read_json(folder / CONFIG)
        for branch, budget in self.budgets.items():
            text = json.dumps(budget_config(config, budget), indent=2, ensure_ascii=False) + "\n"
            own = local_file(CONFIG, text.encode())
            wanted[branch] = [own if file.path == own.path else file for file in files]
        return wanted

    def read_branches(self) -> dict[str, RemoteBranch] | None:
        """Return the branches this job writes to as they are on the Hub; None where there is no such repo."""
        try:
            refs = self.hub.ask(self.hub.api.list_repo_refs, self.repo.repo_id, repo_type=self.kind)
        except RepositoryNotFoundError:
            return None
        heads = {ref.name: ref.target_commit for ref in refs.branches}
        self.other_branches = sorted(heads.keys() - {self.branch, *self.budgets})
        return {
            branch: RemoteBranch(heads[branch], self._read_files(heads[branch]))
            for branch in (self.branch, *self.budgets)
            if branch in heads
        }

    def _read_files(self, commit: str) -> dict[str, RemoteFile]:
        listed = self.hub.ask(self._list_tree, commit)
        return {
            entry.path: RemoteFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
            for entry in listed
            if hasattr(entry, "blob_id")  # a folder has none
        }

    def _list_tree(self, commit: str) -> list[Any]:
        listing = self.hub.api.list_repo_tree(self.repo.repo_id, recursive=True, revision=commit, repo_type=self.kind)
        entries = list(itertools.islice(listing, MOST_LISTED + 1))
        if len(entries) > MOST_LISTED:
            raise PublishError(
                ExitCode.FOREIGN_CONTENT, f"{self.repo.repo_id} lists more than {MOST_LISTED} files: give another repo"
            )
        return entries

    def _refuse_public(self) -> None:
        if self.private and not self.hub.ask(self.hub.api.repo_info, self.repo.repo_id, repo_type=self.kind).private:
            raise PublishError(
                ExitCode.BAD_INPUT,
                f"{self.repo.repo_id} is public, and --private only counts when a repo is made: make it private in "
                "its settings, or leave --private out",
            )

    def _refuse_foreign(self, branch: str, remote: RemoteBranch) -> None:
        """Refuse to write over what no build of this base made."""
        if self.force:
            return
        ours = self._is_ours(remote)
        foreign = [
            path for path in sorted(remote.files) if path not in NEUTRAL_FILES and not (ours and self.makes(path))
        ]
        if not ours and foreign == [CARD] and not self._has_text(remote):
            return
        if foreign:
            listed = ", ".join(foreign[:6]) + (f" and {len(foreign) - 6} more" if len(foreign) > 6 else "")
            why = (
                "no build makes these files"
                if ours
                else f"its config.json is not one built from {self.repo.base_model}"
                if CONFIG in remote.files
                else "it holds no build"
            )
            raise PublishError(
                ExitCode.FOREIGN_CONTENT,
                f"{self.repo.repo_id} at {branch} holds {listed}: {why}. Give another {self.named_by}, or --force to "
                "write over it (code, config, processor and weights are replaced, other files stay)",
            )

    def _is_ours(self, remote: RemoteBranch) -> bool:
        if CONFIG not in remote.files:
            return False
        try:
            config = json.loads(self._read_text(remote, CONFIG))
            return config["vispruner_config"]["base_model_name_or_path"] == self.repo.base_model
        except (ValueError, KeyError, TypeError, RecursionError):
            return False

    def _has_text(self, remote: RemoteBranch) -> bool:
        """Say whether the card is more than the front matter that the Hub's own form for new repos writes."""
        text = self._read_text(remote, CARD).strip()
        return bool(text.rpartition("\n---")[2].strip()) if text.startswith("---") else bool(text)

    def _read_text(self, remote: RemoteBranch, path: str) -> str:
        found = self.hub.ask(
            self.hub.api.hf_hub_download, self.repo.repo_id, path, revision=remote.commit, repo_type=self.kind
        )
        return read_regular(found).decode("utf-8", errors="replace")

    def _create_repo(self) -> None:
        self.hub.ask(
            self.hub.api.create_repo,
            self.repo.repo_id,
            private=self.private or None,
            exist_ok=True,
            repo_type=self.kind,
            space_sdk="gradio" if self.kind == "space" else None,
        )

    def _bring_up_to_date(self, branch: str, files: list[LocalFile]) -> str:
        """Commit whatever a branch lacks; return its commit. After any trouble the branch is looked at anew."""
        patience, moved = Patience(), False
        while True:
            remote = self._branch_to_write(branch)
            self._refuse_foreign(branch, remote)
            plan = self._plan(branch, files, remote)
            if plan.is_empty:
                return remote.commit
            if self.create_pr and (proposed := self._open_proposal(files)) is not None:
                return proposed
            try:
                return self._commit(plan, remote)
            except Exception as error:
                if _is_moved(error) and not moved:
                    moved = True
                else:
                    patience.wait(error)

    def _commit(self, plan: BranchPlan, remote: RemoteBranch) -> str:
        """Make one commit on top of the one that was looked at, or a pull request of it; weights go up before it."""
        target: dict[str, Any] = {"create_pr": True} if self.create_pr else {"revision": plan.branch}
        target["repo_type"] = self.kind
        operations = plan.operations()
        additions = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
        if additions:
            self.hub.api.preupload_lfs_files(self.repo.repo_id, additions, free_memory=False, **target)
        changed = [file.path for file in (*plan.added, *plan.changed) if not file.is_as_hashed()]
        if changed:
            raise PublishError(
                ExitCode.NOT_VERIFIED,
                f"{', '.join(changed)} changed during the upload: nothing was committed; run the same command again",
            )
        done = self.hub.api.create_commit(
            self.repo.repo_id,
            operations,
            commit_message=self._title(plan.branch),
            parent_commit=remote.commit,
            **target,
        )
        if self.create_pr:
            _say(one_line(f"opened {done.pr_url}"))
        return done.oid

    def _branch_to_write(self, branch: str) -> RemoteBranch:
        """Return the branch; a missing one is made from the repo's first commit, which holds nothing to load."""
        while True:
            refs = self.hub.ask(self.hub.api.list_repo_refs, self.repo.repo_id, repo_type=self.kind)
            for ref in refs.branches:
                if ref.name == branch:
                    return RemoteBranch(ref.target_commit, self._read_files(ref.target_commit))
            first = self.hub.ask(self._first_commit)
            self.hub.ask(
                self.hub.api.create_branch,
                self.repo.repo_id,
                branch=branch,
                revision=first,
                exist_ok=True,
                repo_type=self.kind,
            )

    def _first_commit(self) -> str:
        return self.hub.api.list_repo_commits(self.repo.repo_id, repo_type=self.kind)[-1].commit_id

    def _title(self, branch: str) -> str:
        budget = f", {self._budget_text(branch)}" if branch in self.budgets else ""
        at = f" at {self.repo.base_revision[:8]}" if self.repo.base_revision else ""
        return f"Build of {self.repo.base_model}{at} by vispruner {__version__}{budget}"

    def _open_proposal(self, files: list[LocalFile]) -> str | None:
        refs = self.hub.ask(self.hub.api.list_repo_refs, self.repo.repo_id, include_pull_requests=True)
        for ref in refs.pull_requests or ():
            found = RemoteBranch(ref.target_commit, self._read_files(ref.target_commit))
            if not plan_branch(ref.name, files, found).is_empty:
                continue
            number = int(ref.ref.rpartition("/")[2])
            if self.hub.ask(self.hub.api.get_discussion_details, self.repo.repo_id, number).status in (
                "open",
                "draft",
            ):
                _say(f"pull request {number} proposes this build already")
                return ref.target_commit
        return None

    def _read_back(self, wanted: Mapping[str, list[LocalFile]]) -> None:
        """Compare every file of every commit on the Hub with what was built."""
        for branch, files in wanted.items():
            commit = self.commits[branch]
            plan = self._plan(branch, files, RemoteBranch(commit, self._read_files(commit)))
            if not plan.is_empty:
                raise PublishError(
                    ExitCode.READ_BACK_DIFFERS,
                    f"{self.repo.repo_id} at {branch} ({commit}) is not what was built: {', '.join(plan.paths())}; "
                    "run the same command again, and look for a .gitignore in the repo if it stays so",
                )
            _say(f"read back {branch} at {commit}: {len(files)} files are those built")

    def check_loads(self, wanted: Mapping[str, list[LocalFile]]) -> None:
        """Download what was pushed, compare it with what was built, and load it as its users will.

        Only what was compared is loaded: by the name of the repo, but in a process without network and without tokens,
        from a Hub cache of its own.
        """
        configs = {
            branch: json.loads(next(file.text() for file in files if file.path == CONFIG))
            for branch, files in wanted.items()
        }
        config, files = configs[self.branch], wanted[self.branch]
        settings = {
            "repo_id": self.repo.repo_id,
            "class_name": architecture_of(config["model_type"]).model_class.__name__,
            "revisions": {self.commits[branch]: configs[branch]["vispruner_config"] for branch in wanted},
        }
        code = [file.sha256 for file in files if file.path.endswith(".py")]
        with explained(self.hub, f"loading {self.repo.repo_id}"), isolation() as place:
            settings["loads_weights"] = loads = self._bring_base(place, config, files)
            for branch in wanted:
                self._download(place, self.commits[branch], wanted[branch], loads and branch == self.branch)
            outcome = place.run(publish_worker.__file__, [], settings, LOAD_TIMEOUT, code, 4 * LOAD_BYTES)
        result = outcome.results if isinstance(outcome.results, dict) else {"problem": str(outcome)}
        if "problem" in result:
            raise PublishError(
                ExitCode.READ_BACK_DIFFERS,
                self.hub.without_token(f"{self.repo.repo_id} is on the Hub but does not load: {result['problem']}"),
            )
        for line in result["passed"]:
            _say(line)

    def _bring_base(self, place: Isolation, config: Mapping[str, Any], files: Sequence[LocalFile]) -> bool:
        """Say whether the weights are few enough to be loaded, and lend those of a thin repo's base if they are."""
        if config["vispruner_config"]["weights"] != "thin":
            return sum(file.size for file in files) <= LOAD_BYTES
        base = find_repo_base(self.repo)
        if base.weights_size() > LOAD_BYTES:
            return False
        lend_base(base.with_weights(), place.hub_cache)
        return True

    def _download(self, place: Isolation, commit: str, files: Sequence[LocalFile], weights: bool) -> None:
        """Bring the files of one commit into the worker's Hub cache, each compared with what was built."""
        for file in files:
            if file.path.endswith(".safetensors") and not weights:
                continue
            options = {"revision": commit, "cache_dir": place.hub_cache}
            found = self.hub.ask(self.hub.api.hf_hub_download, self.repo.repo_id, file.path, **options)
            with opened_regular(Path(os.path.realpath(found))) as (content, _):
                is_same = hash_of(content) == file.sha256
            if not is_same or Path(found).parent.name != commit:
                raise PublishError(
                    ExitCode.READ_BACK_DIFFERS,
                    f"{self.repo.repo_id} at {commit}: {file.path} as the Hub serves it is not what was built, though "
                    "its listing says so; nothing of it was run. Look at the repo before anybody loads it",
                )


class SpaceJob(PublishJob):
    """The Space that a YAML names, which shows the model of that YAML."""

    kind = "space"
    named_by = "space"

    def __init__(self, hub: HubAccess, repo: RepoConfig, private: bool = False, force: bool = False) -> None:
        if repo.space is None:
            raise PublishError(
                ExitCode.BAD_INPUT, f"{repo.path}: space is missing, which --space publishes: set it to owner/name"
            )
        super().__init__(hub, replace(repo, repo_id=repo.space, budgets={}), private=private, force=force)
        self.model = repo

    def check_access(self, push: bool, pin_base: bool = True) -> None:
        """Refuse what could not be pushed; the base is the model's affair."""
        super().check_access(push, pin_base=False)

    def publish(self, push: bool) -> None:
        """Show what would change, and with `push` make it so."""
        files = [local_file(name, text.encode()) for name, text in sorted(space_files(self.model).items())]
        wanted = {self.branch: files}
        self.show_summary(wanted, push)
        if push:
            self.push_branches(wanted)
            _say(f"done: {self.url}")

    def makes(self, path: str) -> bool:
        return path in SPACE_FILES

    def _is_ours(self, remote: RemoteBranch) -> bool:
        return CARD in remote.files and self.model.repo_id in shown_models(self._read_text(remote, CARD))

    def _title(self, branch: str) -> str:
        return f"Page of {self.model.repo_id} by vispruner {__version__}"


def _is_moved(error: Exception) -> bool:
    """Say whether somebody else committed since the branch was looked at."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code == 412


def _say(text: str) -> None:
    print(printable(text))  # much of it is what a Hub said
