"""Later turns on the cache of an earlier one: right, or refused."""

from __future__ import annotations

import pytest
import torch
from cases import NEW, NONE, ONE, answers, generate, packed_as_stock


class TestContinuing:
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
