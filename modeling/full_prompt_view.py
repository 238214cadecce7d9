"""`generate` runs on a shortened prompt; its caller sees the full one: in hooks, streamers, lengths and the result."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import ModelOutput

HOOKS = ("logits_processor", "stopping_criteria")


class FullPromptView:
    """The caller's prompt beside the one that is run in its place.

    prompt        (B, S) ids, or None where the caller gave embeddings alone: then the result has no prompt
    full_length   S
    length        W, of the prompt that is run
    """

    def __init__(self, prompt: torch.Tensor | None, full_length: int, length: int) -> None:
        self.prompt, self.full_length, self.length = prompt, full_length, length

    @property
    def dropped(self) -> int:
        return self.full_length - self.length

    def ids(self, run: torch.Tensor) -> torch.Tensor:
        """Put the caller's prompt in the place of the one that was run: (B, W + new) -> (B, S + new)."""
        if self.prompt is None:
            return run
        copies = run.shape[0] // self.prompt.shape[0]
        full = self.prompt.to(run.device).repeat_interleave(copies, dim=0)
        return torch.cat([full, run[:, self.length :]], dim=1)

    def result(self, result: Any, run: torch.Tensor | None = None) -> Any:
        """Return what `generate` returns: ids, or an output whose other tensors stay as short as what was run.

        run  the prompt (B, W) that was run, where the result might not start with it
        """
        if isinstance(result, ModelOutput):
            result.sequences = self.result(result.sequences, run)
            return result
        if run is not None and not _starts_with(result, run):
            return result
        return self.ids(result)

    def hooks(self, hooks: dict[str, Any]) -> dict[str, Any]:
        """Let the caller's logits processors, stopping criteria and prefix function see the caller's own prompt."""
        prompt = self.prompt
        if prompt is None:
            return hooks
        wrapped = dict(hooks)
        for name in HOOKS:
            if (given := hooks[name]) is not None:
                wrapped[name] = type(given)(FullPromptHook(hook, self) for hook in given)
        if (prefix_function := hooks["prefix_allowed_tokens_fn"]) is not None:

            def allowed_tokens(row: int, ids: torch.Tensor) -> list[int]:
                return prefix_function(row, torch.cat([prompt[row].to(ids.device), ids[self.length :]]))

            wrapped["prefix_allowed_tokens_fn"] = allowed_tokens
        return wrapped

    def lengths(self, arguments: dict[str, Any], config: Any, option: Callable[[str], Any]) -> tuple[dict, Any]:
        """Return arguments and generation config; lengths that count the prompt there count the one that is run.

        option  looks a generation option up in arguments, config and the model's own config
        Raises ValueError when max_length leaves no room for a new token.
        """
        arguments, config = dict(arguments), copy.deepcopy(config)
        for name, counts_new_only in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            value = option(name)
            if not value or option(counts_new_only) is not None:
                continue
            if name == "max_length" and value <= self.full_length:
                raise ValueError(
                    f"max_length is {value}, but the prompt alone has {self.full_length} tokens: set max_new_tokens, "
                    "or a larger max_length"
                )
            if config is not None and name not in arguments:
                setattr(config, name, max(value - self.dropped, 0))
            else:
                arguments[name] = max(value - self.dropped, 0)
        return arguments, config


class FullPromptHook:
    """A logits processor or stopping criterion of the caller, which sees the caller's own prompt."""

    def __init__(self, hook: Callable, view: FullPromptView) -> None:
        self.hook, self.view = hook, view

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.hook(self.view.ids(args[0]), *args[1:], **kwargs)


class FullPromptStreamer:
    """Hands the caller's full prompt to a streamer in place of the shortened one, then every new token."""

    def __init__(self, streamer: Any, prompt: torch.Tensor) -> None:
        self.streamer = streamer
        self.prompt: torch.Tensor | None = prompt

    def put(self, value: torch.Tensor) -> None:
        self.streamer.put(value if self.prompt is None else self.prompt)
        self.prompt = None

    def end(self) -> None:
        self.streamer.end()


def _starts_with(ids: Any, prompt: torch.Tensor) -> bool:
    """True when each row of `ids` is a row of the prompt (B, W), or a copy of it, and goes on."""
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] < prompt.shape[1]:
        return False
    copies, rest = divmod(len(ids), len(prompt))
    if rest or not copies:
        return False
    return torch.equal(ids[:, : prompt.shape[1]], prompt.repeat_interleave(copies, dim=0).to(ids.device))
