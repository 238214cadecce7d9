"""Choose which visual tokens stay: the one place where a method runs, for the encoder and for the language model.

Whoever draws, times or records choices looks on by `watch_choices`; nothing is replaced for that.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch

from .configuration_vispruner import VisPrunerOptions
from .selector_registry import Selection, run_selector, selector_named
from .visual_features import VisualTokens, stacked


class Choice(NamedTuple):
    """One choice among B images of N tokens.

    tokens     what the method looked at
    layer      the decoder layer before which the others leave; None for behind the encoder
    selection  what stays; None before that is known
    """

    tokens: VisualTokens
    layer: int | None
    selection: Selection | None = None


Watcher = Callable[[Choice], None]


class _Watching(threading.local):
    watchers: tuple[tuple[Watcher | None, Watcher | None], ...] = ()


_watching = _Watching()


@contextmanager
def watch_choices(after: Watcher | None = None, before: Watcher | None = None) -> Iterator[None]:
    """Have `before` and `after` called around every choice that this thread makes within the `with` block."""
    outer = _watching.watchers
    _watching.watchers = (*outer, (before, after))
    try:
        yield
    finally:
        _watching.watchers = outer


def choose_each(
    images: Sequence[VisualTokens], budgets: Sequence[int], choose_of: Callable[[VisualTokens, int], Selection]
) -> list[Selection]:
    """Return which tokens stay of images (1, N, C) of any sizes; of those of one grid and budget at once.

    budgets    how many each keeps
    choose_of  what chooses so many from images of one size
    """
    groups: dict[tuple[int, tuple[int, int] | None, int | None, int], list[int]] = {}
    for number, (image, budget) in enumerate(zip(images, budgets, strict=True)):
        groups.setdefault((image.features.shape[1], image.grid, image.left, budget), []).append(number)
    kept: dict[int, Selection] = {}
    for (*_, budget), numbers in groups.items():
        chosen = choose_of(stacked([images[number] for number in numbers]), budget)
        kept |= dict(zip(numbers, chosen.of_each(), strict=True))
    return [kept[number] for number in range(len(images))]


def choose(
    options: VisPrunerOptions,
    tokens: VisualTokens,
    visual_token_num: int,
    *,
    method: str | None = None,
    project: Callable[[torch.Tensor], torch.Tensor] | None = None,
    codebook: torch.Tensor | None = None,
    layer: int | None = None,
    **further: torch.Tensor,
) -> Selection:
    """Return which T = min(visual_token_num, N) of the N tokens of each image stay.

    options  of the model
    method   that of `options` unless given
    project  features (B, N, C) to visual tokens (B, N, D), called where the method compares those and has none yet
    codebook (M, D), for the method that has one, on any device
    layer    the decoder layer before which tokens leave; None for behind the encoder
    further  what else the method is given of `FURTHER_INPUTS`
    """
    method = options.method if method is None else method
    for before, _ in _watching.watchers:
        if before is not None:
            before(Choice(tokens, layer))
    if project is not None and tokens.projected is None and "projected" in selector_named(method).needs:
        with torch.no_grad():
            tokens = replace(tokens, projected=project(tokens.features))
    inputs = {
        "grid": tokens.grid,
        "videos": tokens.videos,
        "layer_saliency": tokens.layer_saliency,
        **tokens.further,
        **further,
    }
    if tokens.projected is not None:
        inputs["projected"] = tokens.projected.detach()
        inputs["codebook"] = None if codebook is None else codebook.to(tokens.projected.device)
    selection = run_selector(
        method,
        tokens.features.detach(),
        tokens.saliency,
        visual_token_num,
        **options.selector_options,
        **{name: given for name, given in inputs.items() if given is not None},
    )
    for _, after in _watching.watchers:
        if after is not None:
            after(Choice(tokens, layer, selection))
    return selection
