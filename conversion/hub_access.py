"""Ask the Hub: who is asking, may they write, where a base's branch points, and what a refusal means.

Every answer that ends a publication is a `PublishError` with an exit code of its own. Passing troubles (rate limits,
server errors, dropped connections) are waited out, within bounds.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub import __version__ as HUB_VERSION
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from tqdm import tqdm

from vispruner import __version__

from .base_checkpoint import HTTP_ERROR, BuildError, is_commit, require_private_line
from .plain_text import printable
from .repo_config import RepoConfig

TRIES = 5
FIRST_WAIT = 1.0
LONGEST_WAIT = 900.0
WRITING_ORG_ROLES = ("admin", "write", "contributor")
TRUSTED_PUBLISHER = "HF_OIDC_RESOURCE"
TOKENS_PAGE = "https://huggingface.co/settings/tokens"

Answer = TypeVar("Answer")


class ExitCode(IntEnum):
    """How `upload.py` ends."""

    DONE = 0
    NOT_VERIFIED = 1
    BAD_INPUT = 2
    NOT_LOGGED_IN = 3
    WRONG_TOKEN = 4
    READ_ONLY_TOKEN = 5
    NO_NAMESPACE = 6
    NO_ACCESS_TO_BASE = 7
    BASE_REVISION_NOT_FOUND = 8
    FOREIGN_CONTENT = 9
    PARENT_MOVED = 10
    RATE_LIMITED = 11
    SERVER_ERROR = 12
    CONNECTION_LOST = 13
    DISK_FULL = 14
    CARD_REFUSED = 15
    READ_BACK_DIFFERS = 16
    REFUSED_BY_HUB = 17
    FAULT = 70
    INTERRUPTED = 130


class PublishError(Exception):
    """Why nothing more is published; `exit_code` tells the kinds apart."""

    def __init__(self, exit_code: ExitCode, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class Patience:
    """Waits out what passes by itself, a bounded number of times; anything else is raised again as it came."""

    tries: int = TRIES
    longest: float = LONGEST_WAIT
    waited: float = field(default=0.0, init=False)
    failures: int = field(default=0, init=False)

    def wait(self, error: Exception) -> None:
        """Sleep as long as the Hub asks, or a little longer each time; raise `error` where that is no use."""
        trouble = _passing_trouble(error)
        self.failures += 1
        if trouble is None or self.failures >= self.tries:
            raise error
        reason, asked = trouble
        seconds = FIRST_WAIT * 2 ** (self.failures - 1) if asked is None else asked
        if self.waited + seconds > self.longest:
            raise error
        self.waited += seconds
        tqdm.write(f"{printable(reason)}; trying again in {seconds:g} s ({self.failures} of {self.tries - 1})")
        time.sleep(seconds)


def trusted_repo() -> str | None:
    """Return the one repo that this CI job may write to as its Trusted Publisher, without a stored token."""
    return os.environ.get(TRUSTED_PUBLISHER) or None


def without_secrets(text: str) -> str:
    """Return `text` without the token and the identity of this process."""
    try:
        token = get_token()
    except Exception:  # as in `_find_token`
        token = None
    for secret in filter(None, (token, os.environ.get("HF_OIDC_ID_TOKEN"))):
        text = text.replace(secret, "[token]")
    return text


def _find_token() -> str | None:
    if trusted_repo() is None:
        return get_token()
    try:
        token = get_token()
    except Exception as error:  # no identity, or one that the Hub does not trust
        raise PublishError(
            ExitCode.NOT_LOGGED_IN,
            f"{TRUSTED_PUBLISHER} is set, but the Hub gave no token for it: let this workflow publish in the settings "
            f"of {trusted_repo()}, and give the job `permissions: id-token: write`. {error}",
        ) from None
    if token is None:
        raise PublishError(
            ExitCode.NOT_LOGGED_IN,
            f"{TRUSTED_PUBLISHER} is set, which huggingface_hub {HUB_VERSION} does not know: install 1.19 or later",
        )
    return token


class HubAccess:
    """The Hub at one endpoint, as the owner of the stored token (or nobody) sees it."""

    def __init__(self, endpoint: str | None = None) -> None:
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        try:
            # An identity is sent to the endpoint for a token, so this must be known of it before.
            require_private_line(self.endpoint, os.environ.get(TRUSTED_PUBLISHER))
            self.token = _find_token()
            require_private_line(self.endpoint, self.token)
        except BuildError as reason:
            raise PublishError(ExitCode.BAD_INPUT, str(reason)) from None
        self.api = HfApi(
            endpoint=self.endpoint,
            token=self.token or False,
            library_name="vispruner",
            library_version=__version__,
        )

    def ask(self, function: Callable[..., Answer], *arguments: Any, **options: Any) -> Answer:
        """Call something that is safe to repeat, waiting out passing troubles."""
        patience = Patience()
        while True:
            try:
                with understood(self.endpoint):
                    return function(*arguments, **options)
            except Exception as error:
                patience.wait(error)

    def without_token(self, text: str) -> str:
        """Return `text` as it may be shown."""
        return text.replace(self.token, "[token]") if self.token else text

    @functools.cached_property
    def account(self) -> dict[str, Any]:
        """What the Hub says about the token's owner, asked for once because it may be asked for only rarely."""
        if not self.token:
            raise PublishError(
                ExitCode.NOT_LOGGED_IN,
                f"not logged in to {self.endpoint}: run `hf auth login`, or set HF_TOKEN, with a token that may write "
                f"({TOKENS_PAGE})",
            )
        try:
            return self.ask(self._whoami)
        except HfHubHTTPError as error:
            if error.response.status_code != 401:
                raise
            raise PublishError(
                ExitCode.WRONG_TOKEN,
                f"{self.endpoint} does not accept the token of this machine (it is mistyped, expired or revoked): run "
                "`hf auth login` again; HF_TOKEN, where it is set, goes before the stored one",
            ) from None

    def _whoami(self) -> dict[str, Any]:
        account = self.api.whoami()
        if not isinstance(account["name"], str):
            raise TypeError(f"the account's name is {account['name']!r}")
        return account

    def base_commit(self, base_model: str, revision: str | None) -> str:
        """Return the commit that a base's branch, tag or commit is, as a download of it would find."""
        name = f"base {base_model}" + (f" at revision {revision}" if revision else "")
        url = hf_hub_url(base_model, "config.json", revision=revision, endpoint=self.endpoint)
        try:
            found = self.ask(self.api.get_hf_file_metadata, url=url)
        except GatedRepoError:
            raise PublishError(
                ExitCode.NO_ACCESS_TO_BASE,
                f"{name} is gated and {self._reader()} has no access to it: accept its terms at "
                f"{self.endpoint}/{base_model}",
            ) from None
        except RevisionNotFoundError:
            raise PublishError(
                ExitCode.BASE_REVISION_NOT_FOUND,
                f"{name} does not exist: set base_revision to a commit or branch listed at "
                f"{self.endpoint}/{base_model}/commits/main",
            ) from None
        except RepositoryNotFoundError:
            raise PublishError(
                ExitCode.NO_ACCESS_TO_BASE,
                f"{name} is not on {self.endpoint}, or is private and {self._reader()} cannot see it: check "
                "base_model, or log in as somebody with access",
            ) from None
        except EntryNotFoundError:
            raise PublishError(ExitCode.BAD_INPUT, f"{name} has no config.json: give another base") from None
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 403):
                raise
            raise PublishError(
                ExitCode.NO_ACCESS_TO_BASE, f"{self._reader()} may not read {name}: ask its owner for access"
            ) from None
        if not is_commit(found.commit_hash):
            raise PublishError(ExitCode.REFUSED_BY_HUB, f"{self.endpoint} did not say which commit {name} is")
        return found.commit_hash

    def check_card(self, text: str, kind: str = "model") -> None:
        """Let the Hub judge the front matter of a README.md, as it will when that is committed."""
        response = self.ask(self._post_card, text, kind)
        try:
            hf_raise_for_status(response)
        except HfHubHTTPError as error:
            if error.response.status_code != 400:
                raise
            raise PublishError(ExitCode.CARD_REFUSED, f"the Hub refuses the metadata of README.md: {error}") from None

    def _post_card(self, text: str, kind: str) -> Any:
        response = get_session().post(
            f"{self.endpoint}/api/validate-yaml",
            json={"content": text, "repoType": kind},
            headers=build_hf_headers(token=self.token or False),
        )
        if response.status_code != 400:
            hf_raise_for_status(response)
        return response

    def _reader(self) -> str:
        return "the account of this machine's token" if self.token else "a visitor who is not logged in"


def require_trusted(repo_id: str, exists: bool) -> None:
    """Raise unless this job is the Trusted Publisher of `repo_id`; who that is, the Hub does not say."""
    if str(trusted_repo()).lower() != repo_id.lower():
        raise PublishError(
            ExitCode.NO_NAMESPACE,
            f"{TRUSTED_PUBLISHER} is {trusted_repo()}, and the token that the Hub gives for that can write nowhere "
            f"else: set it to {repo_id}, with a job for each repo",
        )
    if not exists:
        raise PublishError(
            ExitCode.READ_ONLY_TOKEN,
            f"{repo_id} is not on the Hub, and a Trusted Publisher cannot make it: create it at "
            "https://huggingface.co/new and name this workflow in its settings",
        )


def require_write_access(
    account: dict[str, Any], repo_id: str, creates: bool, pull_request: bool = False, kind: str = "model"
) -> None:
    """Raise unless the account's token may write to `repo_id`, or open a pull request there.

    kind     "model" or "space"
    creates  the repo is not there yet: a right on the repo alone is not enough
    """
    namespace = repo_id.split("/")[0]
    token = (account.get("auth") or {}).get("accessToken") or {}
    role = token.get("role")
    if role == "read":
        raise PublishError(
            ExitCode.READ_ONLY_TOKEN,
            f"the token {token.get('displayName', '')!r} of {account['name']} may only read: make one that may write "
            f"({TOKENS_PAGE}) and run `hf auth login` again",
        )
    if not pull_request:
        _require_namespace(account, repo_id, namespace, "repo_id" if kind == "model" else kind)
    if role == "fineGrained":
        rights = {"repo.write", "discussion.write"} if pull_request else {"repo.write"}
        if not _is_granted(token.get("fineGrained") or {}, rights, namespace, None if creates else repo_id, kind):
            where = namespace if creates else f"{namespace} or {repo_id}"
            raise PublishError(
                ExitCode.READ_ONLY_TOKEN,
                f"the fine-grained token {token.get('displayName', '')!r} of {account['name']} may not write to "
                f"{where}: give it write access to the repos of {namespace} ({TOKENS_PAGE})",
            )


def _require_namespace(account: dict[str, Any], repo_id: str, namespace: str, field: str) -> None:
    organisations = {org["name"].lower(): org for org in account.get("orgs") or ()}
    if namespace.lower() == account["name"].lower():
        return
    if namespace.lower() not in organisations:
        own = ", ".join([account["name"], *(org["name"] for org in organisations.values())])
        raise PublishError(
            ExitCode.NO_NAMESPACE,
            f"{repo_id}: you cannot publish under {namespace!r}; set {field} in the YAML to one of yours: {own}",
        )
    own_role = organisations[namespace.lower()].get("roleInOrg")
    if own_role is not None and own_role not in WRITING_ORG_ROLES:
        raise PublishError(
            ExitCode.READ_ONLY_TOKEN,
            f"{account['name']} may only read in the organisation {namespace} (role {own_role}): ask an admin of it",
        )


def _is_granted(
    fine_grained: dict[str, Any], rights: set[str], namespace: str, repo_id: str | None, kind: str
) -> bool:
    if rights & set(fine_grained.get("global") or ()):
        return True
    places = {("user", namespace.lower()), ("org", namespace.lower()), (kind, (repo_id or "").lower())}
    for scope in fine_grained.get("scoped") or ():
        entity = scope.get("entity") or {}
        place = (entity.get("type"), str(entity.get("name")).lower())
        if place in places and rights & set(scope.get("permissions") or ()):
            return True
    return False


def with_base_commit(hub: HubAccess, repo: RepoConfig) -> RepoConfig:
    """Return the YAML with the branch in `base_revision` replaced by the commit it is now."""
    if not repo.base_on_hub:
        return repo
    return replace(repo, base_revision=hub.base_commit(repo.base_model, repo.base_revision))


@contextmanager
def understood(endpoint: str) -> Iterator[None]:
    """Blame the server for an answer that cannot be read: for whatever is raised in here but what it refuses."""
    try:
        yield
    except (OSError, PublishError, HFValidationError):
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise PublishError(
            ExitCode.SERVER_ERROR,
            f"{endpoint} gives an answer that is not a Hub's ({type(error).__name__}: {error}): check the endpoint, "
            "or run the same command again later",
        ) from error


@contextmanager
def explained(hub: HubAccess, what: str, uploading: bool = False) -> Iterator[None]:
    """Turn whatever the Hub, the network or the disk raises into a PublishError that says what to do.

    uploading  an error of no known kind came from the upload, and not from what a user gave
    """
    try:
        yield
    except PublishError:
        raise
    except Exception as error:
        found = explain(error, what, hub.endpoint, uploading)
        if found is None and uploading:
            found = PublishError(ExitCode.REFUSED_BY_HUB, f"{what}: the upload failed: {error}")
        if found is None:
            raise
        raise PublishError(found.exit_code, hub.without_token(str(found))) from error


def explain(error: BaseException, what: str, endpoint: str, uploading: bool = False) -> PublishError | None:
    """Return what an exception, or one it was raised from, means for a user; None for a fault of ours."""
    goes_on = ", what has been uploaded is not sent twice" if uploading else ""
    for cause in _causes(error):
        if isinstance(cause, PublishError):
            return cause
        if isinstance(error, BuildError) and isinstance(cause, RevisionNotFoundError):
            return PublishError(ExitCode.BASE_REVISION_NOT_FOUND, str(error))
        if isinstance(error, BuildError) and isinstance(cause, RepositoryNotFoundError):  # a gated one is that too
            return PublishError(ExitCode.NO_ACCESS_TO_BASE, str(error))
        if isinstance(cause, OfflineModeIsEnabled):
            return PublishError(ExitCode.CONNECTION_LOST, f"{what}: HF_HUB_OFFLINE is set: unset it to publish")
        if isinstance(cause, LocalTokenNotFoundError):
            return PublishError(ExitCode.NOT_LOGGED_IN, f"{what}: not logged in: run `hf auth login`")
        if isinstance(cause, HfHubHTTPError):
            said = cause.server_message or str(cause).strip()
            return _explain_answer(cause.response.status_code, said, what, goes_on)
        if isinstance(cause, ValueError) and "Invalid metadata in README.md" in str(cause):
            return PublishError(ExitCode.CARD_REFUSED, f"{what}: {cause}")
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" ({cause.filename})" if cause.filename else ""
            return PublishError(
                ExitCode.DISK_FULL,
                f"{what}: the disk is full{where}: free some space, or give another --out (or HF_HOME)",
            )
        if isinstance(cause, ConnectionError) and (status := _status_in_text(cause)) is not None:
            return _explain_answer(status, str(cause), what, goes_on)
        if isinstance(cause, (HTTP_ERROR, ConnectionError, TimeoutError)):
            return PublishError(
                ExitCode.CONNECTION_LOST,
                f"{what}: the connection to {endpoint} broke ({cause}): run the same command again{goes_on}",
            )
    return None


def _explain_answer(status: int, said: str, what: str, goes_on: str) -> PublishError:
    if status == 401:
        return PublishError(ExitCode.WRONG_TOKEN, f"{what}: the Hub does not accept the token: run `hf auth login`")
    if status == 403:
        return PublishError(ExitCode.READ_ONLY_TOKEN, f"{what}: the Hub does not let this token do that: {said}")
    if status == 412:
        return PublishError(
            ExitCode.PARENT_MOVED,
            f"{what}: somebody else committed to it at the same time, twice: run the same command again",
        )
    if status == 429:
        return PublishError(
            ExitCode.RATE_LIMITED, f"{what}: the Hub's rate limit lasts longer than this waits: run it again later"
        )
    if status >= 500:
        return PublishError(
            ExitCode.SERVER_ERROR,
            f"{what}: the Hub keeps answering {status}: run the same command again later{goes_on}",
        )
    return PublishError(ExitCode.REFUSED_BY_HUB, f"{what}: the Hub refuses ({status}): {said}")


def _passing_trouble(error: Exception) -> tuple[str, float | None] | None:
    """Return what may pass by itself, and the seconds that the Hub asks to wait; None where waiting is no use."""
    for cause in _causes(error):
        if isinstance(cause, PublishError | OfflineModeIsEnabled):
            return None
        if isinstance(cause, HfHubHTTPError):
            return _passing_answer(cause.response.status_code, _asked_wait(cause))
        if isinstance(cause, ConnectionError) and (status := _status_in_text(cause)) is not None:
            return _passing_answer(status, None)
        if isinstance(cause, (HTTP_ERROR, ConnectionError, TimeoutError)):
            return f"the connection broke ({cause})", None
    return None


def _passing_answer(status: int, asked: float | None) -> tuple[str, float | None] | None:
    if status == 429:
        return "the Hub's rate limit is reached", asked
    return (f"the Hub answers {status}", None) if status >= 500 or status == 408 else None


def _status_in_text(error: ConnectionError) -> int | None:
    """Return the status of an answer that hf_xet got, which it tells by its message alone."""
    found = re.search(r"HTTP status \w+ error \((\d{3})\b", str(error))
    return int(found[1]) if found else None


def _asked_wait(error: HfHubHTTPError) -> float | None:
    value = error.response.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    limit = error.response.headers.get("ratelimit", "")
    _, found, seconds = limit.partition("t=")
    digits = seconds.split(";")[0].strip()
    return float(digits) if found and digits.isdigit() else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those it was raised from, as a traceback would show them."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
