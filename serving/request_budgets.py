"""The budget that a single request may ask for, and what the operator allows. Needs no engine.

An operator says it at launch, in a block `vispruner_serving` beside `vispruner_config`: `maximum`, a budget that no
request may exceed (that of `vispruner_config` unless given), and `detail`, names for budgets that requests may use.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vispruner.configuration_vispruner import VisPrunerOptions, merge_vispruner_config

BLOCK = "vispruner_serving"
BUDGETS = ("visual_token_num", "keep_ratio")
DETAIL = "detail"
OWN = (*BUDGETS, DETAIL)  # keys of a request's mm_processor_kwargs that mean us


@dataclass(frozen=True)
class RequestBudgets:
    """What requests may ask for.

    default  the options of a request that asks for nothing
    maximum  options whose budget is the most that a picture may keep
    details  the budgets that requests may name
    """

    default: VisPrunerOptions
    maximum: VisPrunerOptions
    details: Mapping[str, VisPrunerOptions]

    @classmethod
    def of_launch(cls, options: VisPrunerOptions, block: Any) -> "RequestBudgets":
        """Read `vispruner_serving`; ValueError names the field that is wrong."""
        block = {} if block is None else block
        if not isinstance(block, dict) or (unknown := sorted(set(block) - {"maximum", "detail"}, key=str)):
            got = block if not isinstance(block, dict) else unknown
            raise ValueError(f"{BLOCK} must be a dict of maximum and detail, got {got!r}")
        if block and options.method == "none":
            raise ValueError(f'{BLOCK} is of no use: vispruner_config.method is "none"')
        maximum = _with_budget(options, block.get("maximum"), f"{BLOCK}.maximum") if "maximum" in block else options
        named = block.get("detail", {})
        if not isinstance(named, dict):
            raise ValueError(f"{BLOCK}.detail must be a dict of budgets by name, got {named!r}")
        details = {name: _with_budget(options, budget, f"{BLOCK}.detail.{name}") for name, budget in named.items()}
        for name, other in {"vispruner_config": options, **details}.items():
            if any(_exceeds(getattr(other, field), getattr(maximum, field)) for field in BUDGETS):
                raise ValueError(f"{BLOCK}.maximum must not be less than the budget of {name!r}")
        return cls(options, maximum, details)

    def asked(self, given: Mapping[str, Any]) -> VisPrunerOptions:
        """Return the options of a request with such mm_processor_kwargs; ValueError for a budget that is none."""
        own = {name: given[name] for name in OWN if name in given}
        if not own:
            return self.default
        if self.default.method == "none":
            raise ValueError(f"{', '.join(own)}: this server prunes nothing, so a request cannot have a budget")
        if DETAIL in own:
            if len(own) > 1:
                raise ValueError(f"give one of {', '.join(own)}, not all of them")
            if not isinstance(own[DETAIL], str) or own[DETAIL] not in self.details:
                raise ValueError(f"detail must be one of {sorted(self.details)}, got {own[DETAIL]!r}")
            return self.details[own[DETAIL]]
        return _with_budget(self.default, own, "mm_processor_kwargs")

    def require_within(self, options: VisPrunerOptions, kept: int, most: int) -> None:
        """Raise ValueError where a picture would keep more tokens than the operator allows."""
        if kept > most:
            raise ValueError(
                f"the request asks for {kept} visual tokens of a picture ({said(options)}), but this server keeps at "
                f"most {most} ({said(self.maximum)}): ask for less, or start it with another {BLOCK}.maximum"
            )


def of_request(options: VisPrunerOptions) -> dict[str, Any]:
    """Return the mm_processor_kwargs that ask for the budget of `options`."""
    return {name: getattr(options, name) for name in BUDGETS if getattr(options, name) is not None}


def as_numbers(options: VisPrunerOptions) -> list[float]:
    """Return a budget as two numbers, which a tensor takes along to the worker; 0 is none."""
    return [float(options.visual_token_num or 0), float(options.keep_ratio or 0)]


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
    return VisPrunerOptions(**merge_vispruner_config(options.to_dict(), budget))


def said(options: VisPrunerOptions) -> str:
    """Return a budget in words."""
    return ", ".join(f"{name} {value}" for name, value in of_request(options).items()) or "all"
