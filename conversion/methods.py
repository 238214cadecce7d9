"""The table of `vispruner methods`: what each method is, needs and loses, and which ones a model refuses, and why.

All of it is read: from what the methods declare, from their docstrings, and from what a model says when it is asked. A
model is asked without its weights.
"""

from __future__ import annotations

import inspect
import logging
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vispruner import ARCHITECTURES, SELECTORS, architecture_of
from vispruner.configuration_vispruner import merge_vispruner_config
from vispruner.selectors import Selector
from vispruner.serving.launch_options import SELECTOR_INPUTS

from .base_checkpoint import BuildError, find_base
from .checkpoint_io import read_json
from .repo_config import RepoConfigError, did_you_mean, hub_config_names, load_repo_config

DEPTH = 32  # of the language models that the papers' layers are counted in
ENCODER = "behind the encoder"
LOST_IN_DECODER = ("engines", "second questions")
LOST_TO_QUESTIONS = ("engines", "encoded images", "second questions")
LOSSES = {
    "engines": "a paged cache holds no layers of different lengths, and pictures are stored without their questions",
    "encoded images": "nothing can be chosen before the question is known",
    "second questions": "on the same cache they find what the first one left",
    "vLLM plugin": "builds no layer of the encoder above the features, which the method reads; transformers does",
}
# What nothing can be asked without: none of it is for or against an architecture.
GIVEN = {"codebook": "codebook.safetensors", "seed": 0}


@dataclass(frozen=True)
class Method:
    """One row of the table.

    paper    the arXiv number, and the name there where the docstring says one
    prunes   behind the encoder, before which layers of a language model of 32, or both
    needs    beside features: inputs of the registry, with "?" those that it can do without
    differs  how it differs from its authors' code; empty where it does not
    loses    what other methods have, keys of `LOSSES`
    experimental  whether its authors published no code
    refused  why the model asked about cannot have it; None where it can, or none was asked
    """

    name: str
    summary: str
    paper: str
    prunes: str
    needs: tuple[str, ...]
    options: dict[str, Any]
    differs: str
    loses: tuple[str, ...]
    experimental: bool
    refused: str | None = None

    @property
    def authors(self) -> str:
        """Whether it does what its authors' code does."""
        if self.experimental:
            return "experimental"
        return "" if not self.paper else "differs" if self.differs else "exact"


def all_methods(base: Any = None) -> list[Method]:
    """Return a row for each registered method; `base` is a base model to be asked, without weights."""
    return [_method(name, selector, base) for name, selector in sorted(SELECTORS.items(), key=_order)]


def _order(entry: tuple[str, Selector]) -> tuple[bool, str]:
    return entry[1].in_decoder, entry[0]


def _method(name: str, selector: Selector, base: Any) -> Method:
    summary, *paragraphs = re.split(r"\n\s*\n", inspect.getdoc(selector.function) or "")
    paper = re.search(r" \((?:([^(),]+), )?(?:arXiv )?(\d{4}\.\d{5})[^()]*\)", summary)
    named = f"{paper[1]}, {paper[2]}" if paper and paper[1] and paper[1] != "arXiv" else paper[2] if paper else ""
    place = selector.place or selector.then
    layers = [] if place is None else place.layers(DEPTH)
    where = [ENCODER] * (selector.place is None) + ["before layer " + ", ".join(map(str, layers))] * bool(layers)
    looked_at = not re.search(r"^ *saliency .*not looked at", "\n".join(paragraphs), re.MULTILINE)
    return Method(
        name,
        re.sub(r" \([^()]*\d{4}\.\d{5}[^()]*\)", "", summary.replace("\n", " ")).rstrip("."),
        named,
        ", ".join(where),
        (*(["saliency"] if looked_at else []), *sorted(selector.needs), *(f"{use}?" for use in sorted(selector.uses))),
        dict(selector.options),
        " ".join(re.sub(r"\s+", " ", part) for part in paragraphs if "authors" in part and not _is_list(part)),
        _lost(selector, bool(layers)),
        selector.experimental,
        None if base is None else _refusal(base, name),
    )


def _lost(selector: Selector, in_decoder: bool) -> tuple[str, ...]:
    if selector.is_guided:
        return LOST_TO_QUESTIONS
    if in_decoder:
        return LOST_IN_DECODER
    return ("vLLM plugin",) if selector.needs - SELECTOR_INPUTS else ()


def _is_list(paragraph: str) -> bool:
    """Say whether a paragraph is that of parameters and what is returned."""
    return re.search(r"^(saliency|returns) ", paragraph, re.MULTILINE) is not None


def _refusal(base: Any, method: str) -> str | None:
    """Return why a model cannot have a method, in its own words."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # nobody chose the method, and what is experimental stands in the table
    stage = (base.config.vispruner_config or {}).get("encoder_stage")
    stored = {"method": "none", "encoder_stage": stage}
    try:
        base.require_usable(merge_vispruner_config(stored, {"method": method, "keep_ratio": 0.5, **GIVEN}))
    except ValueError as error:
        return re.sub(rf'^vispruner_config\.method "{re.escape(method)}":? ', "", str(error))
    finally:
        logging.disable(level)
    return None


def model_without_weights(name: str) -> tuple[Any, str]:
    """Return the base model that a YAML, a checkpoint or a model_type names, without weights, and what that was."""
    if name in ARCHITECTURES:
        return _made(name, None), f"{name}, with the defaults of its config"
    path = Path(name)
    if path.is_dir() or (not path.is_file() and "/" in name and path.suffix not in (".yaml", ".yml")):
        return _of_checkpoint(find_base(name).folder), name
    is_name = path.name == name and path.suffix not in (".yaml", ".yml") and not path.is_file()
    if is_name and name not in hub_config_names():
        meant = did_you_mean(name, [*ARCHITECTURES, *hub_config_names()])
        known = f": the model_types are {', '.join(ARCHITECTURES)}"
        raise RepoConfigError(f"{name}: neither a file, a config of hub_configs nor a model_type{meant or known}")
    repo = load_repo_config(name)
    stage = repo.vispruner_config["encoder_stage"]
    try:
        return _of_checkpoint(find_base(repo.base_model, repo.base_revision).folder, stage), f"{repo.base_model}"
    except (BuildError, OSError):
        return _made(repo.architecture, None, stage), (
            f"{repo.architecture}, with the defaults of its config, because {repo.base_model} cannot be reached"
        )


def _of_checkpoint(folder: Path, stage: dict[str, Any] | None = None) -> Any:
    content = read_json(folder / "config.json")
    stored = (content.get("vispruner_config") or {}).get("encoder_stage")
    return _made(content.get("model_type", ""), content, stored if stage is None else stage)


def count_by_picture(base: Any) -> str | None:
    """Say of a base model whether how many tokens a method keeps depends on the picture; None where it does not."""
    if base.vispruner_options.pixel_tolerance is None:
        return None
    return (
        "Here encoder_stage lets blocks of patches leave whose pixels a neighbour foretells. A method then keeps its "
        "budget at most: how many, the picture says. What is gained by that no ceiling counts."
    )


def _made(model_type: str, content: dict[str, Any] | None, stage: dict[str, Any] | None = None) -> Any:
    architecture = architecture_of(model_type)
    dense = {"vispruner_config": {"method": "none", "encoder_stage": stage}}
    config = architecture.config_class.from_dict({**(content or {}), **dense})
    if content is None:  # the defaults of some versions pad by a token beyond the vocabulary, which makes no model
        for part in (config, config.get_text_config()):
            part.pad_token_id = None
    with torch.device("meta"):
        return architecture.base_class(config)


def table(methods: Sequence[Method], asked: str | None = None) -> str:
    """Return the methods as aligned lines, and below what the words in them mean."""
    header = ["method", "paper", "prunes", "needs", "authors' code", "loses", *([] if asked is None else ["here"])]
    rows = [header]
    for method in methods:
        row = [method.name, method.paper, method.prunes, ", ".join(method.needs), method.authors]
        row.append(", ".join(method.loses))
        rows.append(row if asked is None else [*row, "yes" if method.refused is None else "no"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    refused = {method.name: method.refused for method in methods if method.refused is not None}
    lines += _list(f"Refused by {asked}:", refused) if asked is not None else []
    lines += _list("Against the authors' code:", {m.name: m.differs for m in methods if m.differs})
    lines += _list("Lost:", {name: text for name, text in LOSSES.items() if any(name in m.loses for m in methods)})
    lines += ["", f"Layers are those of a language model of {DEPTH}. Needs with ? are used where there are any."]
    lines += ["Of experimental methods there is no code of the authors."]
    return "\n".join(lines)


def _list(title: str, entries: dict[str, str]) -> list[str]:
    if not entries:
        return []
    wrapped = [
        textwrap.fill(f"{name}: {text}", 118, initial_indent="  ", subsequent_indent="    ")
        for name, text in entries.items()
    ]
    return ["", title, *wrapped]


def methods_as_data(methods: Sequence[Method], asked: str | None) -> dict[str, Any]:
    """Return what `--json` prints."""
    rows = [{**asdict(method), "authors": method.authors} for method in methods]
    return {"for": asked, "methods": rows, "losses": LOSSES}
