"""The budget that a single request may ask for, and what the operator allows. Needs no engine.

An operator says it at launch, in a block `vispruner_serving` beside `vispruner_config`: `maximum`, a budget that no
request may exceed (that of `vispruner_config` unless given), `detail`, names for budgets that requests may use, and
`keywords`, what else requests may say to the processor: nothing unless named, since a picture that is preprocessed in
another way can be one that the worker does not survive.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vispruner.configuration_vispruner import VisPrunerOptions, merge_vispruner_config

BLOCK = "vispruner_serving"
BUDGETS = ("visual_token_num", "keep_ratio")
DETAIL, KEYWORDS = "detail", "keywords"
FIELDS = ("maximum", DETAIL, KEYWORDS)
OWN = (*BUDGETS, DETAIL)  # keys of a request's mm_processor_kwargs that mean us


@dataclass(frozen=True)
class RequestBudgets:
    """What requests may ask for.

    default   the options of a request that asks for nothing
    maximum   options whose budget is the most that a picture may keep
    details   the budgets that requests may name
    keywords  what else the mm_processor_kwargs of requests may have
    """

    default: VisPrunerOptions
    maximum: VisPrunerOptions
    details: Mapping[str, VisPrunerOptions]
    keywords: frozenset[str] = frozenset()

    @classmethod
    def of_launch(cls, options: VisPrunerOptions, block: Any) -> "RequestBudgets":
        """Read `vispruner_serving`; ValueError names the field that is wrong."""
        block = {} if block is None else block
        if not isinstance(block, dict) or (unknown := sorted(set(block) - set(FIELDS), key=str)):
            got = block if not isinstance(block, dict) else unknown
            raise ValueError(f"{BLOCK} must be a dict of {', '.join(FIELDS)}, got {got!r}")
        if block and options.method == "none":
            raise ValueError(f'{BLOCK} is of no use: vispruner_config.method is "none"')
        maximum = _with_budget(options, block.get("maximum"), f"{BLOCK}.maximum") if "maximum" in block else options
        named, keywords = block.get(DETAIL, {}), block.get(KEYWORDS, [])
        if not isinstance(named, dict):
            raise ValueError(f"{BLOCK}.detail must be a dict of budgets by name, got {named!r}")
        if not isinstance(keywords, list) or not all(isinstance(name, str) for name in keywords):
            raise ValueError(f"{BLOCK}.{KEYWORDS} must be a list of names, got {keywords!r}")
        details = {name: _with_budget(options, budget, f"{BLOCK}.detail.{name}") for name, budget in named.items()}
        for name, other in {"vispruner_config": options, **details}.items():
            if any(_exceeds(getattr(other, field), getattr(maximum, field)) for field in BUDGETS):
                raise ValueError(f"{BLOCK}.maximum must not be less than the budget of {name!r}")
        return cls(options, maximum, details, frozenset(keywords))

    def asked(self, given: Mapping[str, Any]) -> VisPrunerOptions:
        """Return the options of a request with such mm_processor_kwargs; ValueError for a budget that is none.

        A keyword that is null counts as not given, as in the rest of a request.
        """
        own = {name: given[name] for name in OWN if given.get(name) is not None}
        if self.default.method == "none":
            if own:
                raise ValueError(f"{', '.join(own)}: this server prunes nothing, so a request cannot have a budget")
            return self.default
        if unknown := sorted(set(given) - set(OWN) - self.keywords):
            known = ", ".join((*OWN, *sorted(self.keywords)))
            raise ValueError(
                f"mm_processor_kwargs: this server takes {known} of a request, got {', '.join(unknown)}: what else "
                f"requests may say is named at its start, in {BLOCK}.{KEYWORDS}"
            )
        if DETAIL in own:
            if len(own) > 1:
                raise ValueError(f"give one of {', '.join(own)}, not all of them")
            if not isinstance(own[DETAIL], str) or own[DETAIL] not in self.details:
                none = f"named at the start, in {BLOCK}.{DETAIL}"
                known = f"one of {sorted(self.details)}" if self.details else none
                raise ValueError(f"detail must be {known}, got {own[DETAIL]!r}")
            return self.details[own[DETAIL]]
        if not own:
            return self.default
        return _with_budget(self.default, own, "mm_processor_kwargs")

    def require_within(self, options: VisPrunerOptions, kept: int, most: int) -> None:
        """Raise ValueError where a picture would keep more tokens than the operator allows.

        What the operator named is allowed, since a count and a ratio compare differently for every picture.
        """
        if kept > most and options not in (self.default, *self.details.values()):
            raise ValueError(
                f"the request asks for {kept} visual tokens of a picture ({said(options)}), but this server keeps at "
                f"most {most} ({said(self.maximum)}): ask for less, or start it with another {BLOCK}.maximum"
            )


def of_request(options: VisPrunerOptions) -> dict[str, Any]:
    """Return the mm_processor_kwargs that ask for the budget of `options`."""
    return {name: getattr(options, name) for name in BUDGETS if getattr(options, name) is not None}


def as_numbers(options: VisPrunerOptions) -> list[float]:
    """Return a budget as two numbers, which a tensor takes along to the worker; 0 is none."""
    count = min(options.visual_token_num or 0, 2**53)  # no picture has as many, and a float holds no more exactly
    return [float(count), float(options.keep_ratio or 0)]


def from_numbers(options: VisPrunerOptions, numbers: Sequence[float]) -> VisPrunerOptions:
    """Undo `as_numbers`: `options` with that budget."""
    count, ratio = numbers
    return replace(options, visual_token_num=int(count) or None, keep_ratio=ratio or None, stage_token_nums=None)


def _exceeds(budget: float | None, maximum: float | None) -> bool:
    """Say whether a budget is more than another of its kind; a count and a ratio are compared picture by picture."""
    return budget is not None and maximum is not None and budget > maximum


def _with_budget(options: VisPrunerOptions, budget: Any, place: str) -> VisPrunerOptions:
    if not isinstance(budget, dict) or not budget or set(budget) - set(BUDGETS):
        raise ValueError(f"{place} must be a budget, visual_token_num or keep_ratio, got {budget!r}")
    try:
        return VisPrunerOptions(**merge_vispruner_config(options.to_dict(), budget))
    except ValueError as error:
        said_there = str(error).removesuffix(' (use method="none" to disable pruning)')  # which is no remedy here
        raise ValueError(said_there.replace("vispruner_config", place)) from error


def said(options: VisPrunerOptions) -> str:
    """Return a budget in words."""
    return ", ".join(f"{name} {value}" for name, value in of_request(options).items()) or "all"
