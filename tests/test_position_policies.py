"""How the tokens of a shortened prompt are numbered: anew, or as in the full prompt, in every way to call a model.

That the original positions are right is seen in test_architectures.py: dropped tokens masked out give the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from matrix import (
    HELLO,
    ONE,
    RENUMBERED,
    SEVERAL,
    TEXT,
    TOKEN_TYPES,
    TOLERANCE,
    Model,
    answers,
    generate,
    logits,
    type_of_new_tokens,
)

from vispruner.stock_versions import CACHE

renumbered = pytest.mark.parametrize("model", RENUMBERED, indirect=True)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def original(model: Model) -> Model:
    model.pruned.set_vispruner_config(position_policy="original")
    return model


def positions_of(inputs: dict[str, Any]) -> torch.Tensor:
    return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)


@renumbered
class TestRenumbered:
    def test_is_what_null_means(self, model: Model) -> None:
        expected = logits(model.pruned, model.prompt(ONE))
        model.pruned.set_vispruner_config(position_policy="renumber")
        assert torch.equal(logits(model.pruned, model.prompt(ONE)), expected)

    def test_positions_given_with_a_full_prompt_are_numbered_anew(self, model: Model) -> None:
        inputs = model.prompt(ONE, TEXT)
        given = logits(model.pruned, {**inputs, "position_ids": positions_of(inputs)})[:, -1]
        expected = [logits(model.pruned, model.prompt(prompt))[0, -1] for prompt in (ONE, TEXT)]
        torch.testing.assert_close(given, torch.stack(expected), **TOLERANCE)

    def test_positions_of_a_later_step_are_counted_as_the_caller_counts(self, model: Model) -> None:
        inputs, step = model.prompt(ONE, TEXT), torch.tensor([[20], [21]])
        types = {name: torch.full_like(step, type_of_new_tokens(model)) for name in TOKEN_TYPES & inputs.keys()}
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        positions = positions_of({"attention_mask": mask})
        joined = {name: torch.cat([inputs[name], new], dim=1) for name, new in {"input_ids": step, **types}.items()}
        at_once = logits(model.pruned, {**inputs, **joined, "attention_mask": mask, "position_ids": positions})
        outputs = model.pruned(**inputs, position_ids=positions[:, :-1], use_cache=True)
        given = {"attention_mask": mask, "position_ids": positions[:, -1:], CACHE: outputs[CACHE]}
        later = model.pruned(input_ids=step, **types, **given)
        torch.testing.assert_close(later.logits[:, -1], at_once[:, -1], **TOLERANCE)


def scores(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    """The logits of the first three tokens of an answer, (3, rows, vocabulary)."""
    asked = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, **options}
    return torch.stack(model.generate(**inputs, **asked, output_logits=True, return_dict_in_generate=True).logits)


@renumbered
class TestOriginal:
    def test_differ_from_new_ones(self, original: Model) -> None:
        kept = logits(original.pruned, original.prompt(ONE))[0, -1]
        original.pruned.set_vispruner_config(position_policy="renumber")
        assert not torch.allclose(logits(original.pruned, original.prompt(ONE))[0, -1], kept, atol=1e-3)

    def test_a_batch_equals_its_rows(self, original: Model) -> None:
        prompts = [ONE, SEVERAL, TEXT]
        batch = answers(original.pruned, original.prompt(*prompts))
        for row, prompt in zip(batch, prompts, strict=True):
            assert torch.equal(row, answers(original.pruned, original.prompt(prompt))[0])

    @pytest.mark.parametrize(
        "options",
        [{"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}],
        ids=["no cache", "static cache"],
    )
    def test_other_caches_give_the_same(self, original: Model, options: dict[str, Any]) -> None:
        inputs = original.prompt(ONE)
        of_stock = [scores(original.stock, inputs, **given) for given in (options, {})]
        if not torch.allclose(*of_stock, atol=1e-3):
            pytest.skip("nor does stock: PaliGemma's prompt saw its answer without a cache in earlier versions")
        assert torch.equal(answers(original.pruned, inputs, **options), answers(original.pruned, inputs))

    def test_beams(self, original: Model) -> None:
        batch = answers(original.pruned, original.prompt(ONE, TEXT), num_beams=3)
        assert torch.equal(batch[:1], answers(original.pruned, original.prompt(ONE), num_beams=3))

    def test_a_short_prompt_gets_the_positions_of_the_full_one(self, original: Model) -> None:
        inputs = original.prompt(ONE, TEXT, SEVERAL)
        short = original.shortened(inputs)
        assert short["input_ids"].shape[1] < inputs["input_ids"].shape[1]
        expected = logits(original.pruned, inputs)[:, -1]
        torch.testing.assert_close(logits(original.pruned, short)[:, -1], expected, **TOLERANCE)
        result = generate(original.pruned, short)
        width = short["input_ids"].shape[1]
        assert torch.equal(result[:, :width], short["input_ids"])
        assert torch.equal(result[:, width:], answers(original.pruned, inputs))

    def test_an_image_on_a_cache_of_text_goes_on_counting(self, original: Model) -> None:
        text, image = original.prompt([HELLO]), original.prompt(ONE)
        if "token_type_ids" in image:
            pytest.skip("behind a cache stock lets no image see itself in both directions")
        by_column = {"input_ids"} | TOKEN_TYPES & image.keys()
        whole = {**image, **{name: torch.cat([text[name], image[name]], dim=1) for name in by_column}}
        del image["attention_mask"], whole["attention_mask"]
        expected = logits(original.pruned, whole)[0, -1]
        cache = original.pruned(**text, use_cache=True)[CACHE]
        found = original.pruned(**image, **{CACHE: cache}, use_cache=True).logits[0, -1]
        torch.testing.assert_close(found, expected, **TOLERANCE)

    @pytest.mark.parametrize("as_dict", [True, False])
    def test_a_step_by_forward_goes_on_behind_the_full_prompt(self, original: Model, as_dict: bool) -> None:
        inputs, step = original.prompt(ONE), torch.tensor([[20]])
        types = {name: torch.full_like(step, type_of_new_tokens(original)) for name in TOKEN_TYPES & inputs.keys()}
        joined = {name: torch.cat([inputs[name], new], dim=1) for name, new in {"input_ids": step, **types}.items()}
        whole = {**inputs, **joined}
        del whole["attention_mask"]
        expected = logits(original.pruned, whole)[0, -1]
        for prompt in (inputs, original.shortened(inputs)):
            outputs = original.pruned(**prompt, use_cache=True, return_dict=as_dict)
            cache = outputs[CACHE] if as_dict else next(part for part in outputs if hasattr(part, "get_seq_length"))
            found = original.pruned(input_ids=step, **types, **{CACHE: cache}).logits[0, -1]
            torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.core
@pytest.mark.parametrize("model", ["llava", "llava_next"], indirect=True)
def test_a_compiled_forward_numbers_a_short_prompt_or_refuses_it(original: Model) -> None:
    short = original.shortened(original.prompt(ONE))
    expected = logits(original.pruned, short)
    compiled = torch.compile(original.pruned.forward, backend="eager")(**short).logits
    torch.testing.assert_close(compiled, expected, **TOLERANCE)
    torch.compiler.reset()
    with pytest.raises(Exception, match="does not say which"):
        torch.compile(original.pruned.forward, backend="eager", fullgraph=True)(**short)
