"""Read the YAML of one published repo: base checkpoint, architecture, pruning options and card fields."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from vispruner import ARCHITECTURES
from vispruner.configuration_vispruner import FIELD_NAMES, FILES, merge_vispruner_config
from vispruner.selectors import require_published

from .checkpoint_io import read_regular

HUB_CONFIGS = Path(__file__).parent.parent / "hub_configs"
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
ASSETS = Path(__file__).parent / "assets"
EMBEDDED_PREFIX = "embedded/"
DEMO_CONFIG = "tiny-llava-vispruner"
TOY, PHOTO_LLAVA = "embedded/tiny-llava", "embedded/photo-llava"
EMBEDDED_CONFIGS = {TOY: DEMO_CONFIG, PHOTO_LLAVA: "photo-llava-vispruner"}  # checkpoints, and how each is pruned

FIELDS = (
    "repo_id",
    "base_model",
    "base_revision",
    "architecture",
    "vispruner_config",
    "weights",
    "budgets",
    "drop_unused_vision_layers",
    "engine_processor",
    "handler",
    "space",
    "card",
)
REQUIRED = ("repo_id", "base_model", "architecture", "vispruner_config")
MOST_YAML_BYTES, MOST_NESTED = 2**18, 16
MOST_SHOWN = 80  # characters of a wrong value, which must not bury what is said of it
WEIGHTS = ("thin", "full")
BUDGET_FIELDS = ("visual_token_num", "keep_ratio", "stage_token_nums")
CARD_FIELDS = (
    "license",
    "license_name",
    "license_link",
    "language",
    "tags",
    "note",
    "links",
    "new_version",
    "results",
    "picture",
    "citation",
)
LIST_CARD_FIELDS = ("language", "tags", "results", "citation")
FILLED_BY_BUILD = {
    "base_model_name_or_path": "set base_model instead",
    "base_model_revision": "set base_revision instead",
    "weights": "set weights beside vispruner_config instead",
    "vispruner_version": "leave it out",
}
# Stricter than git: whatever matches is a valid ref, and can be typed into a shell and a URL as it is.
BRANCH_NAME = re.compile(r"(?!.*(\.\.|//|/\.|\.lock(/|$)))[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9_-])?")
# What a path has no need of, and a terminal, a model card or HTML would take for more than a name.
STRANGE_IN_A_PATH = re.compile(r"[\x00-\x1f\x7f-\x9f`<>|\[\]{}\"]")
RESERVED_BRANCHES = ("main", "HEAD")


class RepoConfigError(ValueError):
    """A repo's YAML is missing or says something that cannot be built."""


@dataclass(frozen=True)
class RepoConfig:
    """One validated YAML; `vispruner_config` is complete, with the defaults filled in, as the repo will have it.

    weights  "thin", "full", or None to let the size of the base decide
    drop_unused_vision_layers  leave out the vision layers that nothing is read from
    engine_processor  the repo's processor counts kept tokens for engines that run the repo's own code
    handler           the repo carries what an Inference Endpoint runs
    space  the Hub id of the Space that shows the model; the card links to it
    files  by field of vispruner_config that names a file, by the name it has in the repo, what that is copied from
    budgets  name of a further branch -> the one budget field that its config.json has in place of the main one's
    """

    path: Path
    repo_id: str
    base_model: str
    base_revision: str | None
    architecture: str
    vispruner_config: dict[str, Any]
    card: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    budgets: dict[str, dict[str, Any]] = field(default_factory=dict)
    drop_unused_vision_layers: bool = False
    engine_processor: bool = False
    handler: bool = False
    space: str | None = None
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def base_on_hub(self) -> bool:
        """True when `base_model` is a Hub id, and neither embedded nor a folder of this machine."""
        return is_hub_id(self.base_model)


def hub_config_names() -> list[str]:
    """Return the stems of the YAML files in `hub_configs/`."""
    return sorted(path.stem for path in HUB_CONFIGS.glob("*.yaml"))


def find_repo_config(config: str | os.PathLike[str]) -> Path:
    """Return the YAML meant by a path, or by the stem of a file in `hub_configs/`."""
    given = os.fspath(config)
    path = Path(given)
    if path.is_file():
        return path
    is_name = path.name == given and path.suffix not in (".yaml", ".yml")
    if is_name and (shipped := HUB_CONFIGS / f"{given}.yaml").is_file():
        return shipped
    if path.is_dir():
        raise RepoConfigError(f"{given}: is a folder: give the YAML file in it")
    if is_name:
        what = "neither a file nor one of the configs in hub_configs"
        raise RepoConfigError(f"{given}: {what}{_meant_or_all(given, hub_config_names(), 'configs')}")
    remedy = did_you_mean(path.stem, hub_config_names()) or ": give the path of a YAML file"
    raise RepoConfigError(f"{given}: no such file{remedy}")


def load_repo_config(config: str | os.PathLike[str]) -> RepoConfig:
    """Load and validate one YAML, given as a path or as the stem of a file in `hub_configs/`."""
    path = find_repo_config(config)
    content = _read_yaml(path)
    if not isinstance(content, dict):
        got = "it is empty" if content is None else f"got {_shown(content)}"
        raise RepoConfigError(
            f"{path}: must hold the fields {', '.join(REQUIRED)}, {got} (hub_configs/README.md shows every field)"
        )
    _refuse_unknown(path, "", content, FIELDS)
    for name in REQUIRED:
        if content.get(name) is None:
            raise RepoConfigError(f"{path}: {name} is missing: add it (hub_configs/README.md shows every field)")
    for name in ("repo_id", "base_model", "architecture"):
        _require_text(path, name, content[name])
    _check_repo_id(path, "repo_id", content["repo_id"])
    if (space := content.get("space")) is not None:
        _require_text(path, "space", space)
        _check_repo_id(path, "space", space)
    _check_base_model(path, content["base_model"])
    architecture = content["architecture"]
    if architecture not in ARCHITECTURES:
        raise RepoConfigError(
            f"{path}: architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}"
            + did_you_mean(architecture, list(ARCHITECTURES))
        )
    options = _vispruner_config(path, content["vispruner_config"])
    files = {name: file for name in FILES if (file := _file_of(path, name, options)) is not None}
    if len({file.name for file in files.values()}) < len(files):
        raise RepoConfigError(f"{path}: vispruner_config: {' and '.join(files)} must be files of different names")
    return RepoConfig(
        path=path,
        repo_id=content["repo_id"],
        base_model=content["base_model"],
        base_revision=_base_revision(path, content),
        architecture=architecture,
        vispruner_config=options,
        card=_card(path, content.get("card"), content["base_model"]),
        weights=_weights(path, content),
        budgets=_budgets(path, content.get("budgets"), options),
        drop_unused_vision_layers=_flag(path, content, "drop_unused_vision_layers"),
        engine_processor=_flag(path, content, "engine_processor"),
        handler=_flag(path, content, "handler"),
        space=space,
        files=files,
    )


def _flag(path: Path, content: dict[str, Any], name: str) -> bool:
    value = content.get(name, False)
    if not isinstance(value, bool):
        raise RepoConfigError(f"{path}: {name} must be true or false, got {_shown(value)}")
    return value


def is_hub_id(name: Any) -> bool:
    """Say whether a base's name is `owner/name`; whether a folder of this machine is called so does not matter."""
    if not isinstance(name, str) or name.count("/") != 1 or name.startswith(EMBEDDED_PREFIX):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


class _UniqueKeyLoader(yaml.SafeLoader):
    """The safe loader, except that a field given twice is an error and not the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} is given twice: keep one", key_node.start_mark
                )
            seen.add(key)
        return mapping


def _read_yaml(path: Path) -> Any:
    try:
        text = read_regular(path, MOST_YAML_BYTES).decode("utf-8")
        _require_plain(path, text)
        return yaml.load(text, Loader=_UniqueKeyLoader)  # nosec B506 - the safe loader, made stricter
    except UnicodeDecodeError as error:
        raise RepoConfigError(f"{path}: is not UTF-8 text: {error}") from error
    except RepoConfigError:
        raise
    except Exception as error:  # beside its own, yaml raises what Python does for a date, number or tag that is none
        raise RepoConfigError(f"{path}: is not valid YAML: {error}") from error


def _require_plain(path: Path, text: str) -> None:
    """Refuse what needs no name in so small a file and could grow without bound, before it is put together."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise RepoConfigError(f"{path}: *{event.anchor} stands for something else: write it out, or leave it out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MOST_NESTED:
            raise RepoConfigError(f"{path}: is nested more than {MOST_NESTED} levels deep, which no field needs")


def _check_repo_id(path: Path, name: str, repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RepoConfigError(f"{path}: {name} is not a valid Hub id: {error}") from error
    if repo_id.count("/") != 1:
        raise RepoConfigError(f"{path}: {name} must be owner/name, got {repo_id!r}")


def _check_base_model(path: Path, base_model: str) -> None:
    if STRANGE_IN_A_PATH.search(base_model):
        raise RepoConfigError(
            f"{path}: base_model must be a Hub id (owner/name) or the path of a folder, got {base_model!r}"
        )


def _base_revision(path: Path, content: dict[str, Any]) -> str | None:
    revision = content.get("base_revision")
    if revision is not None:
        _require_text(path, "base_revision", revision)
        if not BRANCH_NAME.fullmatch(revision):
            raise RepoConfigError(f"{path}: base_revision must be a commit, a branch or a tag, got {revision!r}")
        return revision
    base_model = content["base_model"]
    if not is_hub_id(base_model):
        return None
    raise RepoConfigError(
        f"{path}: base_revision is missing: give the commit (or the branch) of {base_model} that is built from"
    )


def _weights(path: Path, content: dict[str, Any]) -> str | None:
    weights = content.get("weights")
    if weights is not None and weights not in WEIGHTS:
        raise RepoConfigError(
            f"{path}: weights must be thin or full, got {_shown(weights)}: leave it out to let the base's size decide"
        )
    if weights == "thin" and not is_hub_id(content["base_model"]):
        raise RepoConfigError(
            f"{path}: weights is thin, but base_model {content['base_model']} is not on the Hub, where the users of "
            "the repo would get the weights: set weights: full, or base_model to a Hub id"
        )
    return weights


def _budgets(path: Path, budgets: Any, main: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Check the further branches: a name that git takes, and one budget that is neither main's nor another's."""
    if budgets is None:
        return {}
    if not isinstance(budgets, dict):
        raise RepoConfigError(f"{path}: budgets must hold branches, for example {{v64: {{visual_token_num: 64}}}}")
    taken = {_budget(main): "vispruner_config"}
    for branch, budget in budgets.items():
        _require_branch_name(path, branch)
        name = f"budgets.{branch}"
        if not isinstance(budget, dict) or len(budget) != 1 or not set(budget) <= set(BUDGET_FIELDS):
            raise RepoConfigError(
                f"{path}: {name} must hold exactly one of {', '.join(BUDGET_FIELDS)}, got {_shown(budget)}: a branch "
                "differs from main in its budget only"
            )
        if main["method"] == "none":
            raise RepoConfigError(f'{path}: {name} has no meaning with vispruner_config.method "none": take it out')
        try:
            complete = merge_vispruner_config(main, budget)
        except ValueError as error:
            raise RepoConfigError(f"{path}: {name}: {error}") from error
        if _budget(complete) in taken:
            raise RepoConfigError(
                f"{path}: {name} has the budget of {taken[_budget(complete)]}: give it another one, or take it out"
            )
        taken[_budget(complete)] = name
    return {branch: dict(budget) for branch, budget in budgets.items()}


def _budget(options: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(json.dumps(options[name]) for name in BUDGET_FIELDS)


def is_branch_name(name: str) -> bool:
    """Say whether a branch may be called so: git takes it, and it cannot be taken for a commit or another ref."""
    looks_like_commit = re.fullmatch(r"[0-9a-f]{7,40}", name)
    return not looks_like_commit and not name.startswith("refs/") and BRANCH_NAME.fullmatch(name) is not None


def _require_branch_name(path: Path, branch: Any) -> None:
    _require_text(path, f"the branch name budgets.{branch}", branch)
    if branch in RESERVED_BRANCHES:
        raise RepoConfigError(
            f"{path}: budgets.{branch}: the branch {branch} has the budget of vispruner_config: take another name, "
            "such as v64"
        )
    if not is_branch_name(branch):
        raise RepoConfigError(
            f"{path}: budgets.{branch} is not a good branch name: take letters, digits and - _ . / only, beginning "
            "with a letter or digit, and nothing that could be a commit, such as v64"
        )


def _vispruner_config(path: Path, options: Any) -> dict[str, Any]:
    if not isinstance(options, dict):
        raise RepoConfigError(f"{path}: vispruner_config must hold fields, for example {{visual_token_num: 128}}")
    for name, remedy in FILLED_BY_BUILD.items():
        if name in options:
            raise RepoConfigError(f"{path}: vispruner_config.{name} is written by the build: {remedy}")
    try:
        complete = merge_vispruner_config(None, options)
    except ValueError as error:
        raise RepoConfigError(f"{path}: {error}") from error
    try:
        for name in complete["method"].split("+"):
            if name != "none":
                require_published(name)
    except ValueError as error:
        raise RepoConfigError(f"{path}: {error}") from error
    return complete


def _file_of(path: Path, name: str, options: dict[str, Any]) -> Path | None:
    """Find a file that an option names, beside the YAML or in this package, and leave there its name in the repo."""
    named = options[name]
    if named is None:
        return None
    places = [path.parent / Path(named).expanduser(), ASSETS / named]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise RepoConfigError(
            f"{path}: vispruner_config.{name}: there is no {named} beside this file: "
            f"`vispruner {name.replace('_', '-')}` makes one"
        )
    options[name] = found.name
    return found


def _card(path: Path, card: Any, base_model: str) -> dict[str, Any]:
    if card is None:
        return {}
    if not isinstance(card, dict):
        raise RepoConfigError(f"{path}: card must hold fields, for example {{license: llama2, language: en}}")
    _refuse_unknown(path, "card.", card, CARD_FIELDS)
    for name, value in card.items():
        if name == "links":
            _check_links(path, value)
            continue
        values = value if name in LIST_CARD_FIELDS and isinstance(value, list) else [value]
        for entry in values:
            _require_text(path, f"card.{name}", entry)
            if name not in ("note", "citation") and len(entry.splitlines()) > 1:
                raise RepoConfigError(f"{path}: card.{name} must be one line, got {entry!r}")
    for entry in as_list(card.get("citation")):
        if not entry.lstrip().startswith("@"):
            raise RepoConfigError(f"{path}: card.citation must be BibTeX, which starts with @, got {entry[:40]!r}")
    if "new_version" in card and not is_hub_id(card["new_version"]):
        raise RepoConfigError(
            f"{path}: card.new_version must be owner/name of a Hub repo, got {card['new_version']!r}"
        )
    for stem in as_list(card.get("results")):
        _check_record(path, "results", stem, base_model, ("date", "versions", "rows"))
    if "picture" in card:
        _check_record(path, "picture", card["picture"], base_model, ("date", "command", "alt", "caption"))
        if not (RESULTS / f"{card['picture']}.png").is_file():
            raise RepoConfigError(f"{path}: card.picture {card['picture']} has no {card['picture']}.png in {RESULTS}")
    return dict(card)


def _check_links(path: Path, links: Any) -> None:
    if not isinstance(links, dict):
        raise RepoConfigError(f"{path}: card.links must hold names and addresses, for example {{Docs: https://...}}")
    for name, address in links.items():
        _require_text(path, "a name in card.links", name)
        if not re.fullmatch(r"[^\[\]<>\r\n]+", name):
            raise RepoConfigError(
                f"{path}: a name in card.links must be one line without brackets, got {_shown(name)}"
            )
        if not isinstance(address, str) or not re.fullmatch(r"https://[^\s()<>]+", address):
            raise RepoConfigError(
                f"{path}: card.links.{name} must begin with https:// and have no blanks or brackets (write ( and ) as "
                f"%28 and %29), got {_shown(address)}"
            )


def _check_record(path: Path, name: str, stem: str, base_model: str, needed: tuple[str, ...]) -> None:
    """A card may show only what is on record, and only what is on record about its own base."""
    found = {record.stem: record for record in RESULTS.glob("*.json")}
    if stem not in found:
        raise RepoConfigError(
            f"{path}: card.{name} {stem} is not on record: give the stem of a .json file in {RESULTS}"
            + did_you_mean(stem, list(found))
        )
    record = json.loads(found[stem].read_text(encoding="utf-8"))
    if missing := [field for field in needed if field not in record]:
        raise RepoConfigError(f"{path}: card.{name} {stem} cannot stand in a card: it records no {', '.join(missing)}")
    if record.get("base_model") != base_model:
        raise RepoConfigError(
            f"{path}: card.{name} {stem} is about the base {record.get('base_model')}, not {base_model}: leave it out"
        )


def as_list(value: Any) -> list[Any]:
    """Return the values of a card field that holds none, one or several."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _refuse_unknown(path: Path, prefix: str, content: dict[Any, Any], known: tuple[str, ...]) -> None:
    for name in content:
        if name in known:
            continue
        for place, inner in (("vispruner_config", FIELD_NAMES), ("card", CARD_FIELDS)):
            if not prefix and name in inner:
                raise RepoConfigError(f"{path}: {name} is not a field here: write it below {place}")
        raise RepoConfigError(f"{path}: {prefix}{name} is not a field{_meant_or_all(str(name), known, 'fields')}")


def _require_text(path: Path, name: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise RepoConfigError(f"{path}: {name} must be text, got {_shown(value)}: put it in quotes")


def _meant_or_all(given: str, known: tuple[str, ...] | list[str], kind: str) -> str:
    """Return how a message goes on about an unknown name: by the one that was meant, else by all there are."""
    return did_you_mean(given, known) or f": the {kind} are {', '.join(known)}"


def did_you_mean(given: str, known: tuple[str, ...] | list[str]) -> str:
    close = difflib.get_close_matches(given.lower(), known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + ' ...'} ({type(value).__name__})"
