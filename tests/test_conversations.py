"""Later turns on the cache of an earlier one: right, or refused."""

from __future__ import annotations

import pytest
import torch
from matrix import ASK, HELLO, LLAVAS, NEW, ONE, PACKED_AS_STOCK, TEXT, answers, generate
from rows import Image

OTHER = [HELLO, Image((112, 56), seed=3), ASK]


def second_turn(model, policy=None):
    """A conversation's second prompt as whole ids, and the cache of its first turn."""
    model.pruned.set_vispruner_config(position_policy=policy)
    inputs = model.prompt(ONE)
    first = generate(model.pruned, inputs, return_dict_in_generate=True)
    inputs["input_ids"] = torch.cat([first.sequences, torch.tensor([[21, 22, *ASK]])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs, first.past_key_values


def require_continuation(model, policy, with_pixels):
    inputs, cache = second_turn(model, policy)
    expected = answers(model.pruned, inputs)
    if not with_pixels:
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    result = generate(model.pruned, inputs, past_key_values=cache, return_dict_in_generate=True)
    prompt = inputs["input_ids"].shape[1]
    assert torch.equal(result.sequences[:, :prompt], inputs["input_ids"])
    assert torch.equal(result.sequences[:, prompt:], expected)


@pytest.mark.parametrize("model", LLAVAS, indirect=True)
class TestLaterTurns:
    @pytest.mark.parametrize("with_pixels", [True, False])
    def test_from_a_returned_cache_equals_starting_again(self, model, with_pixels):
        require_continuation(model, "renumber", with_pixels)

    def test_a_third_turn(self, model):
        inputs, cache = second_turn(model)
        second = generate(model.pruned, inputs, past_key_values=cache, return_dict_in_generate=True)
        inputs["input_ids"] = torch.cat([second.sequences, inputs["input_ids"][:, -6:]], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        expected = answers(model.pruned, inputs)
        assert torch.equal(answers(model.pruned, inputs, past_key_values=second.past_key_values), expected)

    def test_a_changed_budget_is_refused(self, model):
        inputs, cache = second_turn(model)
        before = answers(model.pruned, inputs)
        cache_of_other_budget = second_turn(model)[1]
        cache_of_other_budget.vispruner_prompt = None
        with pytest.raises(ValueError, match="cannot continue"):
            generate(model.pruned, inputs, past_key_values=cache_of_other_budget)
        model.pruned.set_vispruner_config(visual_token_num=3)
        # the cache remembers its own budget, so the old conversation goes on with it
        assert torch.equal(answers(model.pruned, inputs, past_key_values=cache), before)

    def test_a_new_image_and_partial_ids_are_refused(self, model):
        inputs, cache = second_turn(model)
        more = dict(inputs)
        image = model.prompt(ONE)["input_ids"]
        more["input_ids"] = torch.cat([inputs["input_ids"], image], dim=1)
        more["attention_mask"] = torch.ones_like(more["input_ids"])
        with pytest.raises(ValueError, match="cannot continue"):
            generate(model.pruned, more, past_key_values=cache)
        partial = {"input_ids": inputs["input_ids"][:, -5:], "attention_mask": inputs["attention_mask"]}
        with pytest.raises(ValueError, match="cannot continue"):
            generate(model.pruned, partial, past_key_values=cache)

    def test_uneven_rows_are_refused(self, model):
        inputs = model.prompt(ONE, TEXT)
        first = generate(model.pruned, inputs, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, first.sequences[:, -3:]], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, NEW + 3, dtype=torch.long)], dim=1)
        with pytest.raises(ValueError, match="cannot continue"):
            generate(model.pruned, {"input_ids": ids, "attention_mask": mask}, past_key_values=first.past_key_values)

    def test_an_even_batch_equals_starting_again(self, model):
        inputs = model.prompt(ONE, [HELLO, Image((56, 84), seed=7), [18, 17, 16, 15]])
        first = generate(model.pruned, inputs, return_dict_in_generate=True)
        inputs["input_ids"] = torch.cat([first.sequences, first.sequences[:, -3:]], dim=1)
        inputs["attention_mask"] = torch.cat(
            [inputs["attention_mask"], torch.ones(2, NEW + 3, dtype=torch.long)], dim=1
        )
        expected = answers(model.pruned, inputs)
        assert torch.equal(answers(model.pruned, inputs, past_key_values=first.past_key_values), expected)

    def test_an_image_that_comes_after_a_turn_of_text_alone(self, model):
        first = generate(model.pruned, model.prompt(TEXT), return_dict_in_generate=True)
        inputs = model.prompt(ONE)
        inputs["input_ids"] = torch.cat([first.sequences, inputs["input_ids"]], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        expected = answers(model.pruned, inputs)
        result = answers(model.pruned, inputs, past_key_values=first.past_key_values)
        assert torch.equal(result, expected)

    def test_an_emptied_cache_starts_a_new_conversation(self, model):
        _, cache = second_turn(model)
        cache.crop(-cache.get_seq_length())
        assert cache.get_seq_length() == 0
        text = model.prompt(TEXT)
        first = generate(model.pruned, text, past_key_values=cache, return_dict_in_generate=True)
        text["input_ids"] = torch.cat([first.sequences, text["input_ids"]], dim=1)
        text["attention_mask"] = torch.ones_like(text["input_ids"])
        expected = answers(model.pruned, text)
        assert torch.equal(answers(model.pruned, text, past_key_values=cache), expected)

    @pytest.mark.parametrize("form", ["full", "short"])
    def test_generating_from_a_cache_that_forward_filled(self, model, form):
        inputs = model.prompt(ONE)
        prompt = inputs if form == "full" else model.shortened(inputs)
        with torch.no_grad():
            cache = model.pruned(**prompt, use_cache=True).past_key_values
        longer = {**prompt, "input_ids": torch.cat([prompt["input_ids"], prompt["input_ids"][:, -4:]], dim=1)}
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        expected = answers(model.pruned, longer)
        assert torch.equal(answers(model.pruned, longer, past_key_values=cache), expected)

    def test_two_images_that_came_by_forward_one_after_the_other(self, model):
        first, second = (model.prompt(prompt) for prompt in (ONE, OTHER))
        with torch.no_grad():
            cache = model.pruned(**first, use_cache=True).past_key_values
            del second["attention_mask"]
            model.pruned(**second, past_key_values=cache, use_cache=True)
        whole = {"input_ids": torch.cat([first["input_ids"], second["input_ids"]], dim=1)}
        whole["input_ids"] = torch.cat([whole["input_ids"], whole["input_ids"][:, -3:]], dim=1)
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        expected = answers(model.pruned, {**whole, **model.pixels(model.prompt(ONE, OTHER))})
        assert torch.equal(answers(model.pruned, whole, past_key_values=cache), expected)

    def test_the_dense_model_continues_as_stock_does(self, model):
        model.pruned.set_vispruner_config(method="none")
        results = []
        for which in (model.pruned, model.stock):
            first = generate(which, model.prompt(TEXT), return_dict_in_generate=True)
            inputs = model.prompt(ONE)
            inputs["input_ids"] = torch.cat([first.sequences, inputs["input_ids"]], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            results.append(answers(which, inputs, past_key_values=first.past_key_values))
        assert torch.equal(*results)

    def test_a_pruned_cache_is_not_continued_densely(self, model):
        """Switching pruning off between two turns must not make the model read its cache at the wrong places."""
        inputs, cache = second_turn(model)
        expected = answers(model.pruned, inputs)
        model.pruned.set_vispruner_config(method="none")
        assert torch.equal(answers(model.pruned, inputs, past_key_values=cache), expected)


@pytest.mark.parametrize("model", [name for name in LLAVAS if name in PACKED_AS_STOCK], indirect=True)
class TestOriginalPositions:
    @pytest.mark.parametrize("with_pixels", [True, False])
    def test_from_a_returned_cache(self, model, with_pixels):
        require_continuation(model, "original", with_pixels)

    def test_a_changed_policy_is_refused(self, model):
        inputs, cache = second_turn(model, "original")
        model.pruned.set_vispruner_config(position_policy="renumber")
        with pytest.raises(ValueError, match="set that policy again"):
            generate(model.pruned, inputs, past_key_values=cache)
