"""Later turns on the cache of an earlier one: right, or refused."""

from __future__ import annotations

import pytest
import torch
from cases import NEW, NONE, ONE, TWO, answers, generate, packed_as_stock


class TestLaterTurns:
    def second_turn(self, case, policy=None):
        """A conversation's second prompt as whole ids, and the cache of its first turn."""
        case.model.set_vispruner_config(position_policy=policy)
        inputs = dict(case.inputs(ONE, case.pictures[:1]))
        first = generate(case.model, inputs, return_dict_in_generate=True, eos_token_id=None)
        more = case.processor.tokenizer(" USER: Why? ASSISTANT:", add_special_tokens=False, return_tensors="pt")
        inputs["input_ids"] = torch.cat([first.sequences, more.input_ids], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return inputs, first.past_key_values

    @pytest.mark.parametrize("with_pixels", [True, False])
    def test_from_a_returned_cache_equals_starting_again(self, case, with_pixels):
        self.require_continuation(case, "renumber", with_pixels)

    @packed_as_stock
    @pytest.mark.parametrize("with_pixels", [True, False])
    def test_from_a_returned_cache_with_original_positions(self, case, with_pixels):
        self.require_continuation(case, "original", with_pixels)

    def require_continuation(self, case, policy, with_pixels):
        inputs, cache = self.second_turn(case, policy)
        expected = answers(case.model, inputs, eos_token_id=None)
        if not with_pixels:
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        result = generate(case.model, inputs, past_key_values=cache, eos_token_id=None, return_dict_in_generate=True)
        prompt = inputs["input_ids"].shape[1]
        assert torch.equal(result.sequences[:, :prompt], inputs["input_ids"])
        assert torch.equal(result.sequences[:, prompt:], expected)

    def test_a_third_turn(self, case):
        inputs, cache = self.second_turn(case)
        second = generate(case.model, inputs, past_key_values=cache, eos_token_id=None, return_dict_in_generate=True)
        inputs["input_ids"] = torch.cat([second.sequences, inputs["input_ids"][:, -6:]], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        expected = answers(case.model, inputs, eos_token_id=None)
        assert torch.equal(
            answers(case.model, inputs, past_key_values=second.past_key_values, eos_token_id=None), expected
        )

    def test_a_changed_budget_is_refused(self, case):
        inputs, cache = self.second_turn(case)
        before = answers(case.model, inputs, eos_token_id=None)
        cache_of_other_budget = self.second_turn(case)[1]
        cache_of_other_budget.vispruner_prompt = None
        with pytest.raises(ValueError, match="cannot continue"):
            generate(case.model, inputs, past_key_values=cache_of_other_budget)
        case.model.set_vispruner_config(visual_token_num=3)
        # the cache remembers its own budget, so the old conversation goes on with it
        assert torch.equal(answers(case.model, inputs, past_key_values=cache, eos_token_id=None), before)

    def test_a_new_image_and_partial_ids_are_refused(self, case):
        inputs, cache = self.second_turn(case)
        more = dict(inputs)
        image = case.inputs(ONE, case.pictures[:1])["input_ids"]
        more["input_ids"] = torch.cat([inputs["input_ids"], image], dim=1)
        more["attention_mask"] = torch.ones_like(more["input_ids"])
        with pytest.raises(ValueError, match="cannot continue"):
            generate(case.model, more, past_key_values=cache)
        partial = {"input_ids": inputs["input_ids"][:, -5:], "attention_mask": inputs["attention_mask"]}
        with pytest.raises(ValueError, match="cannot continue"):
            generate(case.model, partial, past_key_values=cache)

    def test_uneven_rows_are_refused(self, case):
        inputs = dict(case.inputs([ONE, NONE], case.pictures[:1]))
        first = generate(case.model, inputs, return_dict_in_generate=True, eos_token_id=None)
        ids = torch.cat([first.sequences, first.sequences[:, -3:]], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, NEW + 3, dtype=torch.long)], dim=1)
        with pytest.raises(ValueError, match="cannot continue"):
            generate(case.model, {"input_ids": ids, "attention_mask": mask}, past_key_values=first.past_key_values)

    def test_an_even_batch_equals_starting_again(self, case):
        text = "USER: <image>\nIs it day? ASSISTANT:"
        inputs = dict(case.inputs([ONE, text], [case.pictures[0], case.pictures[0]]))
        first = generate(case.model, inputs, return_dict_in_generate=True, eos_token_id=None)
        inputs["input_ids"] = torch.cat([first.sequences, first.sequences[:, -3:]], dim=1)
        inputs["attention_mask"] = torch.cat(
            [inputs["attention_mask"], torch.ones(2, NEW + 3, dtype=torch.long)], dim=1
        )
        expected = answers(case.model, inputs, eos_token_id=None)
        assert torch.equal(
            answers(case.model, inputs, past_key_values=first.past_key_values, eos_token_id=None), expected
        )

    def test_an_image_that_comes_after_a_turn_of_text_alone(self, case):
        first = generate(case.model, case.inputs(NONE), return_dict_in_generate=True, eos_token_id=None)
        inputs = dict(case.inputs(ONE, case.pictures[:1]))
        inputs["input_ids"] = torch.cat([first.sequences, inputs["input_ids"]], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        expected = answers(case.model, inputs, eos_token_id=None)
        result = answers(case.model, inputs, past_key_values=first.past_key_values, eos_token_id=None)
        assert torch.equal(result, expected)

    @packed_as_stock
    def test_an_image_after_a_turn_of_text_with_original_positions(self, case):
        case.model.set_vispruner_config(position_policy="original")
        self.test_an_image_that_comes_after_a_turn_of_text_alone(case)

    @packed_as_stock
    def test_a_changed_position_policy_is_refused(self, case):
        inputs, cache = self.second_turn(case, "original")
        case.model.set_vispruner_config(position_policy="renumber")
        with pytest.raises(ValueError, match="set that policy again"):
            generate(case.model, inputs, past_key_values=cache)

    def test_an_emptied_cache_starts_a_new_conversation(self, case):
        _, cache = self.second_turn(case)
        cache.crop(-cache.get_seq_length())
        assert cache.get_seq_length() == 0
        text = dict(case.inputs(NONE))
        first = generate(case.model, text, past_key_values=cache, return_dict_in_generate=True, eos_token_id=None)
        text["input_ids"] = torch.cat([first.sequences, text["input_ids"]], dim=1)
        text["attention_mask"] = torch.ones_like(text["input_ids"])
        expected = answers(case.model, text, eos_token_id=None)
        assert torch.equal(answers(case.model, text, past_key_values=cache, eos_token_id=None), expected)

    @pytest.mark.parametrize("form", ["full", "short"])
    def test_generating_from_a_cache_that_forward_filled(self, case, form):
        inputs = dict(case.inputs(ONE, case.pictures[:1]))
        prompt = inputs if form == "full" else case.shortened(inputs)
        with torch.no_grad():
            cache = case.model(**prompt, use_cache=True).past_key_values
        longer = {**prompt, "input_ids": torch.cat([prompt["input_ids"], prompt["input_ids"][:, -4:]], dim=1)}
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        expected = answers(case.model, longer, eos_token_id=None)
        assert torch.equal(answers(case.model, longer, past_key_values=cache, eos_token_id=None), expected)

    def test_two_images_that_came_by_forward_one_after_the_other(self, case):
        first, second = (dict(case.inputs(ONE, [picture])) for picture in case.pictures[:2])
        with torch.no_grad():
            cache = case.model(**first, use_cache=True).past_key_values
            del second["attention_mask"]
            case.model(**second, past_key_values=cache, use_cache=True)
        whole = {"input_ids": torch.cat([first["input_ids"], second["input_ids"]], dim=1)}
        whole["input_ids"] = torch.cat([whole["input_ids"], whole["input_ids"][:, -3:]], dim=1)
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        images = case.inputs(TWO, case.pictures[:2])
        pixels = {name: images[name] for name in ("pixel_values", "image_sizes") if name in images}
        expected = answers(case.model, {**whole, **pixels}, eos_token_id=None)
        assert torch.equal(answers(case.model, whole, past_key_values=cache, eos_token_id=None), expected)

    def test_the_dense_model_continues_as_stock_does(self, case):
        case.model.set_vispruner_config(method="none")
        results = []
        for model in (case.model, case.stock):
            first = generate(model, case.inputs(NONE), return_dict_in_generate=True, eos_token_id=None)
            inputs = dict(case.inputs(ONE, case.pictures[:1]))
            inputs["input_ids"] = torch.cat([first.sequences, inputs["input_ids"]], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            results.append(answers(model, inputs, past_key_values=first.past_key_values, eos_token_id=None))
        assert torch.equal(*results)

    def test_a_pruned_cache_is_not_continued_densely(self, case):
        """Switching pruning off between two turns must not make the model read its cache at the wrong places."""
        inputs, cache = self.second_turn(case)
        expected = answers(case.model, inputs, eos_token_id=None)
        case.model.set_vispruner_config(method="none")
        assert torch.equal(answers(case.model, inputs, past_key_values=cache, eos_token_id=None), expected)
