"""The options that one call runs under, and what it pruned: kept per thread, so that no call disturbs another."""

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .configuration_vispruner import FILES, VisPrunerOptions, merge_vispruner_config
from .prompt_reading import Questions


@dataclass(frozen=True)
class Pruning:
    """How many visual tokens each image of a call has in a full prompt, and how many of them were kept.

    What is called an image here is what a prompt has a run of placeholders for: an image, a tile, a frame or a video.

    stages  of a method that prunes in the language model, each stage's first layer and how many tokens it leaves of
            each image; `kept_counts` is then what the first layers see
    """

    full_counts: tuple[int, ...]
    kept_counts: tuple[int, ...]
    stages: tuple[tuple[int, tuple[int, ...]], ...] = ()

    def __str__(self) -> str:
        later = "".join(f"; {sum(counts)} from decoder layer {layer} on" for layer, counts in self.stages)
        return self._encoded() + later

    def _encoded(self) -> str:
        pairs = [f"{kept} of {full}" for full, kept in zip(self.full_counts, self.kept_counts, strict=True)]
        if len(pairs) == 1:
            return f"{pairs[0]} visual tokens kept"
        total = f"{sum(self.kept_counts)} of {sum(self.full_counts)} visual tokens kept"
        return f"{total}, in {len(pairs)} images: {', '.join(pairs)}" if pairs else "no image"


@dataclass
class Call:
    """One call in progress: its `vispruner_config`, validated, and what has been noted of it.

    is_short  `generate` has shortened the prompt: all that runs within it is about short prompts
    prompt_length  how many columns that prompt has; what comes behind is guessed or generated
    places         (B, S, 3) where the visual tokens of its prompt lie in their images; None where no method asks
    importance     (B, N) what its caller said of these tokens, in their order
    told           (B, S) the same in their columns; None where no method asks
    clip_inputs    what the call said of the questions of its rows for CLIP's text tower, by name
    questions      by modality what is asked about its images, where a method chooses by that
    question       that of the modality whose images are encoded now
    """

    vispruner_config: dict[str, Any]
    options: VisPrunerOptions
    pruning: Pruning | None = None
    is_short: bool = False
    prompt_length: int | None = None
    places: torch.Tensor | None = None
    importance: torch.Tensor | None = None
    told: torch.Tensor | None = None
    clip_inputs: Mapping[str, Any] = field(default_factory=dict)
    questions: Mapping[str, Questions] = field(default_factory=dict)
    question: Questions | None = None


class _Calls(threading.local):
    def __init__(self) -> None:
        self.open: dict[int, Call] = {}  # by the id of the model
        self.last: weakref.WeakKeyDictionary[Any, Pruning] = weakref.WeakKeyDictionary()


_calls = _Calls()


class CallOptionsMixin:
    """For the base model: options per call. What a call begins with holds to its end, whatever is set meanwhile."""

    config: Any

    @property
    def vispruner_options(self) -> VisPrunerOptions:
        """The options of the call in progress in this thread, else those of the config."""
        call = self.open_call
        return VisPrunerOptions.from_dict(self._stored_config()) if call is None else call.options

    @property
    def open_call(self) -> Call | None:
        """The call in progress in this thread."""
        return _calls.open.get(id(self))

    @property
    def is_in_generate(self) -> bool:
        """True while `generate` runs, which has shortened the prompt."""
        call = self.open_call
        return call is not None and call.is_short

    @property
    def last_pruning(self) -> Pruning | None:
        """What this thread's last call with images pruned; None before the first."""
        return _calls.last.get(self)

    @contextmanager
    def call_with(self, changes: Mapping[str, Any] | None = None) -> Iterator[Call]:
        """Open a call under the config's options with `changes` laid over them; within another call, that one goes on.

        Raises ValueError naming the field that cannot be changed or is wrong.
        """
        outer = self.open_call
        if outer is not None and not changes:
            yield outer
            return
        stored = self._stored_config() if outer is None else outer.vispruner_config
        config = self._merged_for_one_call(stored, changes) if changes else stored
        with self._open(Call(config, VisPrunerOptions.from_dict(config))) as call:
            if changes:
                self.check_options()
            yield call
        if call.pruning is not None:
            _calls.last[self] = call.pruning

    @contextmanager
    def _open(self, call: Call) -> Iterator[Call]:
        outer = self.open_call
        _calls.open[id(self)] = call
        try:
            yield call
        finally:
            if outer is None:
                del _calls.open[id(self)]
            else:
                _calls.open[id(self)] = outer

    @staticmethod
    def _merged_for_one_call(stored: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        merged = merge_vispruner_config(stored, dict(changes))
        for name in FILES:
            if merged[name] != stored.get(name):
                raise ValueError(
                    f"vispruner_config.{name} cannot be changed for one call, since it is read from a file: use "
                    f"model.set_vispruner_config({name}=...)"
                )
        return merged

    def require_usable(self, vispruner_config: dict[str, Any]) -> None:
        """Raise ValueError with the remedy when this model cannot be pruned under a complete `vispruner_config`."""
        with self._open(Call(vispruner_config, VisPrunerOptions.from_dict(vispruner_config))):
            self.check_options()

    def _stored_config(self) -> dict[str, Any]:
        stored = getattr(self.config, "vispruner_config", None)
        if stored is None:
            raise ValueError(
                "config.vispruner_config is missing: pass vispruner_config={'visual_token_num': 128} to "
                "from_pretrained, or {'method': 'none'} for the dense model"
            )
        return stored

    def check_options(self) -> None:
        """Raise ValueError with the remedy when this model cannot be pruned under the options of the call."""


class TokenCounts:
    """What `visual_token_counts` is: to be called, and short when printed."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def __call__(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, **arguments: Any
    ) -> tuple[list[int], list[int]]:
        """Return per image the visual tokens of a full prompt and those that are kept.

        image_sizes, arguments  what the processor returned beside pixel_values to describe the images
        """
        sizes = {} if image_sizes is None else {"image_sizes": image_sizes}
        with self.base.call_with(arguments.pop("vispruner_config", None)):
            return self.base.image_token_counts(pixel_values, **sizes, **arguments)

    def __repr__(self) -> str:
        return "visual_token_counts(pixel_values, image_sizes=None, ...); last_pruning tells of the last call"
