"""All methods there are: importing this file registers every family. What else the registry offers goes by here."""

from .configuration_vispruner import VisPrunerOptions
from .decoder_selectors import select_fastv  # noqa: F401 - as are the next two, so that all register
from .related_selectors import select_scope  # noqa: F401
from .selector_registry import (
    DECODER_INPUTS,
    FURTHER_INPUTS,
    SELECTORS,
    DecoderPlace,
    Selection,
    Selector,
    check_method_options,
    kinds_of_kept,
    register_selector,
    require_published,
    run_selector,
    select_tokens,
    selector_named,
)
from .token_selection import important_tokens, select_vispruner  # noqa: F401

ENCODER_METHODS = tuple(sorted(name for name, selector in SELECTORS.items() if selector.place is None))
DECODER_METHODS = tuple(sorted(name for name, selector in SELECTORS.items() if selector.place is not None))


def prunes_in_decoder(options: VisPrunerOptions) -> bool:
    """Say whether visual tokens leave in the language model under these options."""
    if options.method == "none":
        return False
    methods = options.methods
    return len(methods) > 1 or options.prune_layers is not None or selector_named(methods[0]).place is not None


__all__ = [
    "DECODER_INPUTS",
    "DECODER_METHODS",
    "ENCODER_METHODS",
    "FURTHER_INPUTS",
    "SELECTORS",
    "DecoderPlace",
    "Selection",
    "Selector",
    "check_method_options",
    "important_tokens",
    "kinds_of_kept",
    "prunes_in_decoder",
    "register_selector",
    "require_published",
    "run_selector",
    "select_tokens",
    "selector_named",
]
