"""The KV cache under either of its names, and what generating does with it: as stock does, on every architecture.

The tests hold on every supported transformers; what a version calls the cache is stock_versions.py's business.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from counting import HostReads
from matrix import (
    ASK,
    CLIP,
    HELLO,
    NEW,
    ONE,
    ROWS,
    TEXT,
    TOKEN_TYPES,
    TOLERANCE,
    Model,
    answers,
    generate,
    logits,
    type_of_new_tokens,
)
from rows import PLAIN
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from vispruner.pruned_forward import _require_length
from vispruner.stock_versions import CACHE, CACHE_NAMES, NEWEST_TESTED, SLICES_FEATURES

every_model = pytest.mark.parametrize("model", ROWS, indirect=True)
with_either_name = pytest.mark.parametrize("name", CACHE_NAMES)
ORDINARY = PLAIN[7]


# A model that writes the id of a placeholder.


def writing(token: int, prompt_length: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Make the second new token of every row `token`."""

    def force(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == prompt_length + 1:
            scores = torch.full_like(scores, -torch.inf)
            scores[:, token] = 0.0
        return scores

    return force


def answers_writing(model: Any, inputs: dict[str, Any], token: int, **options: Any) -> torch.Tensor:
    return answers(model, inputs, logits_processor=[writing(token, inputs["input_ids"].shape[1])], **options)


@contextmanager
def embedded_like(model: Any, tokens: list[int], ordinary: int) -> Iterator[None]:
    """Let some tokens have the embedding of an ordinary one; in a prompt a placeholder's is replaced anyway."""
    weight = model.get_input_embeddings().weight.data
    before = weight.clone()
    weight[tokens] = before[ordinary]
    try:
        yield
    finally:
        weight.copy_(before)


@every_model
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_a_placeholder_that_the_model_writes_is_a_token_like_any_other(model: Model, options: dict[str, Any]) -> None:
    """...so with the embedding of another token the answer goes on as after that."""
    placeholders = model.pruned.model.placeholder_ids
    inputs = model.prompt(*model.prompts())
    with embedded_like(model.pruned, placeholders, ORDINARY):
        expected = answers_writing(model.pruned, inputs, ORDINARY, **options)
        for token in placeholders:
            written = answers_writing(model.pruned, inputs, token, **options)
            assert (written[:, 1] == token).all()
            assert torch.equal(written.masked_fill(written == token, ORDINARY), expected)


@every_model
def test_in_an_answer_to_text_alone_it_is_what_it_is_to_stock(model: Model) -> None:
    inputs = model.prompt(TEXT)
    for token in model.pruned.model.placeholder_ids:
        expected = answers_writing(model.stock, inputs, token)
        assert torch.equal(answers_writing(model.pruned, inputs, token), expected)


# Later turns.


def after(model: Model, first: torch.Tensor, *parts: Any) -> dict[str, Any]:
    """Return the prompt of a later turn: the ids of the first, then `parts`."""
    start = model.prompt([[]])["input_ids"].shape[1]  # what a row puts in front of every prompt
    return model.prompt([first[0, start:].tolist(), *parts])


def in_turns(model: Model, first: dict[str, Any], then: Callable[[torch.Tensor], dict[str, Any]], name: str) -> None:
    """Require that a second turn on the cache of the first is answered as from the start."""
    result = generate(model.pruned, first, return_dict_in_generate=True)
    second = then(result.sequences)
    expected = answers(model.pruned, second)
    assert torch.equal(answers(model.pruned, {**second, name: result[CACHE]}), expected)


def extended(model: Model, inputs: dict[str, Any], sequences: torch.Tensor, more: list[int]) -> dict[str, Any]:
    """Return a prompt with its answer and `more` behind it."""
    longer = dict(inputs)
    longer["input_ids"] = torch.cat([sequences, torch.tensor([more], dtype=torch.long)], dim=1)
    added = longer["input_ids"].shape[1] - inputs["input_ids"].shape[1]
    longer["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, added), value=1)
    for types in TOKEN_TYPES & inputs.keys():
        longer[types] = torch.nn.functional.pad(inputs[types], (0, added), value=type_of_new_tokens(model))
    return longer


@every_model
@with_either_name
def test_an_image_after_a_cached_turn_of_text_is_answered_as_from_the_start(model: Model, name: str) -> None:
    in_turns(model, model.prompt([HELLO]), lambda ids: after(model, ids, *ONE), name)


@pytest.mark.parametrize("model", [name for name, row in ROWS.items() if row.positions == "renumber"], indirect=True)
@with_either_name
def test_likewise_with_original_positions(model: Model, name: str) -> None:
    model.pruned.set_vispruner_config(position_policy="original")
    in_turns(model, model.prompt([HELLO]), lambda ids: after(model, ids, *ONE), name)


@pytest.mark.parametrize("model", [name for name, row in ROWS.items() if "video" in row.modalities], indirect=True)
def test_likewise_with_a_video(model: Model) -> None:
    in_turns(model, model.prompt([HELLO]), lambda ids: after(model, ids, *CLIP), CACHE)


@every_model
@with_either_name
def test_a_later_turn_takes_the_cache_by_either_name(model: Model, name: str) -> None:
    inputs = model.prompt(ONE)
    in_turns(model, inputs, lambda ids: extended(model, inputs, ids, ASK), name)


@every_model
@with_either_name
def test_a_step_by_forward_takes_the_cache_by_either_name(model: Model, name: str) -> None:
    inputs = model.prompt(ONE)
    with torch.no_grad():
        prefill = model.pruned(**copy.copy(inputs), use_cache=True)
        step = prefill.logits[:, -1:].argmax(-1)
        types = {types: torch.full_like(step, type_of_new_tokens(model)) for types in TOKEN_TYPES & inputs.keys()}
        stepped = model.pruned(input_ids=step, **types, **{name: prefill[CACHE]}).logits[0, -1]
    sequences = torch.cat([inputs["input_ids"], step], dim=1)
    expected = logits(model.pruned, extended(model, inputs, sequences, []))[0, -1]
    torch.testing.assert_close(stepped, expected, **TOLERANCE)


@every_model
def test_a_loop_of_forward_calls_on_the_callers_cache(model: Model) -> None:
    inputs = model.prompt(ONE)
    new, cache, current = [], DynamicCache(), dict(inputs)
    for _ in range(NEW):
        with torch.no_grad():
            step = model.pruned(**current, **{CACHE: cache}, use_cache=True).logits[:, -1:].argmax(-1)
        new.append(int(step))
        types = {types: torch.full_like(step, type_of_new_tokens(model)) for types in TOKEN_TYPES & inputs.keys()}
        current = {"input_ids": step, **types}
    assert new == answers(model.pruned, inputs)[0].tolist()


@every_model
@pytest.mark.parametrize("method", ["vispruner", "none"])
def test_both_names_at_once_are_refused(model: Model, method: str) -> None:
    model.pruned.set_vispruner_config(method=method)
    inputs = model.prompt(ONE)
    cache = generate(model.pruned, inputs, return_dict_in_generate=True)[CACHE]
    for call in (model.pruned, model.pruned.generate):
        with pytest.raises(ValueError, match="cache and past_key_values are two names of the same thing"):
            call(**inputs, cache=cache, past_key_values=cache)


# What stock says, and how often it waits.


def said_by(call: Callable[[], Any], caplog: pytest.LogCaptureFixture) -> set[str]:
    """Return the warnings of a call; what transformers says once it may say again."""
    logger = logging.getLogger("transformers")
    logger.warning_once.__func__.cache_clear()
    caplog.clear()
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        logger.removeHandler(caplog.handler)
    return {str(warning.message) for warning in caught} | {record.getMessage() for record in caplog.records}


@every_model
def test_nothing_is_deprecated_that_is_not_in_stock(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    """...in the first call of a process, and in a later turn by the name that stock has for the cache."""

    def run(which: Any, prompt: list) -> None:
        inputs = model.prompt(prompt)
        logits(which, inputs)
        result = generate(which, inputs, return_dict_in_generate=True)
        later = {**extended(model, inputs, result.sequences, ASK), CACHE: result[CACHE]}
        if which is model.stock:  # it would look for the placeholders of pixels among the ids that are new
            later = {name: value for name, value in later.items() if not name.startswith("pixel")}
        generate(which, later)

    for prompt in (ONE, TEXT):
        ours, theirs = (said_by(lambda: run(which, prompt), caplog) for which in (model.pruned, model.stock))  # noqa: B023
        assert ours - theirs == set()


@pytest.mark.core
@every_model
def test_a_decoding_step_waits_for_the_device_no_more_often_than_in_stock(model: Model) -> None:
    inputs, steps = model.prompt(ONE), {}
    for which in (model.pruned, model.stock):
        totals = []
        for new in (2, 6):
            with torch.no_grad(), HostReads(inputs, list(which.parameters())) as reads:
                generate(which, inputs, max_new_tokens=new)
            totals.append(reads.total)
        steps[which] = totals[1] - totals[0]
    assert steps[model.pruned] <= steps[model.stock]


# Ways to generate that hand the cache on.


# Their tokens see those behind them too: of an image (Gemma 3), of the whole prompt (PaliGemma). What stock makes of
# such a prompt in pieces is wrong on every version.
BOTH_WAYS = {"gemma3", "paligemma"}


@every_model
def test_the_model_as_its_own_assistant_answers_as_without(model: Model) -> None:
    inputs = model.prompt(ONE)
    expected = answers(model.pruned, inputs)
    if model.row.model_type == "paligemma":
        with pytest.raises(
            ValueError, match="assistant_model is not to be had for a prompt with images: a prompt sees"
        ):
            answers(model.pruned, inputs, assistant_model=model.pruned)
        return
    assert torch.equal(answers(model.pruned, inputs, assistant_model=model.pruned), expected)


@every_model
@pytest.mark.parametrize("chunk", [3, 16])
def test_a_prefill_in_chunks_gives_the_same_or_is_refused(model: Model, chunk: int) -> None:
    refused = not SLICES_FEATURES or model.row.model_type in BOTH_WAYS
    for prompts in ([ONE], model.prompts()):
        inputs = model.prompt(*prompts)
        if refused:
            with pytest.raises(ValueError, match="prefill_chunk_size is not to be had for a prompt with images"):
                generate(model.pruned, inputs, prefill_chunk_size=chunk)
        else:
            assert torch.equal(answers(model.pruned, inputs, prefill_chunk_size=chunk), answers(model.pruned, inputs))


@every_model
def test_text_alone_is_prefilled_in_chunks_as_in_stock(model: Model) -> None:
    inputs = model.prompt(TEXT)
    try:
        expected = answers(model.stock, inputs, prefill_chunk_size=3)
    except RuntimeError:  # older stock Qwen-VL
        with pytest.raises(RuntimeError):
            answers(model.pruned, inputs, prefill_chunk_size=3)
    else:
        assert torch.equal(answers(model.pruned, inputs, prefill_chunk_size=3), expected)


# What the cache must hold after the prefill of a pruned prompt.


@pytest.fixture
def one_token_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stock whose cache holds one token more than it was handed, as if an image had not been shortened."""
    update = Cache.update

    def update_too_much(self: Cache, keys: torch.Tensor, values: torch.Tensor, layer: int, *rest: Any, **kw: Any):
        result = update(self, keys, values, layer, *rest, **kw)
        update(self, keys[..., -1:, :], values[..., -1:, :], layer, *rest, **kw)
        return result

    monkeypatch.setattr(Cache, "update", update_too_much)


@every_model
@pytest.mark.usefixtures("one_token_too_many")
def test_a_cache_of_another_length_is_an_error_that_names_the_versions(model: Model) -> None:
    inputs = model.prompt(ONE)
    full, kept = model.counts(inputs)
    length = inputs["input_ids"].shape[1] - sum(map(sum, full.values())) + sum(map(sum, kept.values()))
    expected = rf"must hold {length} tokens, but it holds {length + 1}: .*transformers [\d.]+.*, tested up to "
    for call in (model.pruned, model.pruned.generate):
        with pytest.raises(RuntimeError, match=expected + re.escape(NEWEST_TESTED)):
            call(**inputs)


@every_model
def test_that_check_waits_for_no_device(model: Model) -> None:
    """A static cache may have its length on the device alone: then nothing is checked, and nothing waited for."""
    config = model.stock.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = StaticCache(config=config, max_cache_len=8)
    states = torch.ones(1, heads, 3, width)
    for layer in range(config.num_hidden_layers):
        cache.update(states, states, layer)
    on_device = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    with HostReads(on_device) as reads:
        _require_length(cache, 3)
    assert reads.total == 0
