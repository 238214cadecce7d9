"""All methods there are: importing this file registers every family. What else the registry offers goes by here."""

from .configuration_vispruner import VisPrunerOptions
from .decoder_selectors import select_fastv  # noqa: F401 - as are those below, so that all register
from .diversity_selectors import select_mmr  # noqa: F401
from .experimental_selectors import select_image_text  # noqa: F401
from .guided_selectors import select_cdpruner  # noqa: F401
from .merging_selectors import select_visionzip  # noqa: F401
from .related_selectors import select_scope  # noqa: F401
from .selector_registry import (
    DECODER_INPUTS,
    FURTHER_INPUTS,
    SELECTORS,
    DecoderPlace,
    Selection,
    Selector,
    Then,
    check_method_options,
    kinds_of_kept,
    register_selector,
    require_published,
    run_selector,
    select_tokens,
    selector_named,
)
from .token_selection import important_tokens, select_vispruner  # noqa: F401

ENCODER_METHODS = tuple(sorted(name for name, selector in SELECTORS.items() if not selector.in_decoder))
DECODER_METHODS = tuple(sorted(name for name, selector in SELECTORS.items() if selector.in_decoder))


def methods_by_place(options: VisPrunerOptions) -> tuple[str | None, str | None]:
    """Return the method that prunes behind the encoder and the one in the language model; None where there is none."""
    if options.method == "none":
        return None, None
    first, *second = options.methods
    if second:
        return first, second[0]
    if (then := selector_named(first).then) is not None:
        return first, then.method
    in_decoder = selector_named(first).place is not None or options.prune_layers is not None
    return (None, first) if in_decoder else (first, None)


def require_last_layer_unread(options: VisPrunerOptions) -> None:
    """Raise ValueError for a method that reads the encoder's last layer, which is to be left out as unused."""
    for method in options.methods:
        if method in SELECTORS and SELECTORS[method].needs & {"cls_query", "raw_keys"}:
            raise ValueError(
                f'vispruner_config.method "{method}" reads the last layer of the vision encoder, which '
                "drop_unused_vision_layers would leave out"
            )


def require_choice_by_image(options: VisPrunerOptions) -> None:
    """Raise ValueError for what an engine cannot do: prune in the language model, or by the question."""
    encoder, decoder = methods_by_place(options)
    if decoder is not None:
        raise ValueError(
            f'vispruner_config.method "{options.method}" prunes in the language model, which an engine with a paged '
            "cache cannot: choose a method that prunes behind the encoder"
        )
    if encoder is not None and selector_named(encoder).is_guided:
        raise ValueError(
            f'vispruner_config.method "{options.method}" chooses by the question, but an engine stores what it '
            "encoded under the picture alone: choose a method that does not read the question"
        )


__all__ = [
    "DECODER_INPUTS",
    "DECODER_METHODS",
    "ENCODER_METHODS",
    "FURTHER_INPUTS",
    "SELECTORS",
    "DecoderPlace",
    "Selection",
    "Selector",
    "Then",
    "check_method_options",
    "important_tokens",
    "kinds_of_kept",
    "methods_by_place",
    "register_selector",
    "require_choice_by_image",
    "require_last_layer_unread",
    "require_published",
    "run_selector",
    "select_tokens",
    "selector_named",
]
