"""What every pruned architecture must compute: the properties that one table of architectures is held against."""

from __future__ import annotations

import inspect

import pytest
import torch
from cases import NEW, NONE, ONE, TOLERANCE, TWO, answers, generate, packed_as_stock
from transformers import DynamicCache

import vispruner
from vispruner.configuration_vispruner import CLIP_INPUTS
from vispruner.selectors import ENCODER_METHODS
from vispruner.stock_versions import CACHE


class TestKeepingAll:
    def test_without_pruning_all_equals_stock_bit_for_bit(self, case):
        case.model.set_vispruner_config(method="none")
        self.require_equality_with_stock(case)

    @packed_as_stock
    @pytest.mark.parametrize("budget", [{"visual_token_num": 64}, {"keep_ratio": 1.0}])
    def test_a_budget_of_all_tokens_equals_stock_bit_for_bit(self, case, budget):
        case.model.set_vispruner_config(**budget)
        self.require_equality_with_stock(case)

    @staticmethod
    def require_equality_with_stock(case):
        inputs = case.inputs([ONE, TWO, NONE], case.pictures)
        with torch.no_grad():
            assert torch.equal(case.model(**inputs).logits, case.stock(**inputs).logits)
        assert torch.equal(generate(case.model, inputs), generate(case.stock, inputs))

    def test_paper_tile_mode_keeps_every_patch_of_every_tile(self, cases):
        case = cases["next-paper"]
        before = dict(case.model.config.vispruner_config)
        case.model.set_vispruner_config(visual_token_num=16)
        inputs = case.inputs(ONE, case.pictures[:1])
        try:
            assert case.counts(inputs)[1] == [16 * case.tiles(inputs["image_sizes"][0])]
            result = generate(case.model, inputs, return_dict_in_generate=True)
        finally:
            case.model.config.vispruner_config = before
        full, _ = case.counts(inputs)
        prompt = inputs["input_ids"].shape[1]
        tokens = 16 * case.tiles(inputs["image_sizes"][0])
        assert tokens > full[0]  # more than stock's unpadded packing: the prompt is lengthened
        assert result.past_key_values.get_seq_length() == prompt - full[0] + tokens + NEW - 1
        assert torch.equal(result.sequences[:, :prompt], inputs["input_ids"])


class TestPruning:
    def test_equals_the_hand_built_reference(self, case):
        for picture in case.pictures:
            inputs = case.inputs(ONE, [picture])
            expected, logits = case.reference(inputs)
            result = generate(case.model, inputs, return_dict_in_generate=True, output_logits=True, eos_token_id=None)
            assert result.sequences[0, inputs["input_ids"].shape[1] :].tolist() == expected.tolist()
            torch.testing.assert_close(result.logits[0][0], logits, **TOLERANCE)

    def test_several_images_equal_the_hand_built_reference(self, case):
        inputs = case.inputs(TWO, case.pictures[:2])
        expected, _ = case.reference(inputs)
        assert answers(case.model, inputs, eos_token_id=None)[0].tolist() == expected.tolist()

    def test_answers_differ_from_the_dense_model_and_between_images(self, case):
        """The tiny model must be able to show a difference, or equalities above would prove nothing."""
        first, second = (case.inputs(ONE, [picture]) for picture in (case.pictures[0], case.pictures[2]))
        with torch.no_grad():
            pruned = case.model(**first).logits[0, -1]
            assert not torch.allclose(pruned, case.stock(**first).logits[0, -1], atol=1e-3)
            assert not torch.allclose(pruned, case.model(**second).logits[0, -1], atol=1e-3)

    def test_the_cache_really_holds_fewer_tokens(self, case):
        inputs = case.inputs(ONE, case.pictures[:1])
        (full,), (kept,) = case.counts(inputs)
        assert kept < full
        pruned, dense = (
            generate(model, inputs, return_dict_in_generate=True).past_key_values.get_seq_length()
            for model in (case.model, case.stock)
        )
        assert dense - pruned == full - kept

    def test_token_counts_follow_the_budget(self, case):
        inputs = case.inputs(ONE, case.pictures[:1])
        features = case.model.get_image_features(
            **{k: inputs[k] for k in ("pixel_values", "image_sizes") if k in inputs}
        )
        assert [len(image) for image in features.pooler_output] == case.counts(inputs)[1]
        assert [len(image) for image in features.kept_indices] == case.counts(inputs)[1]
        if case.tile_mode is None:
            assert case.counts(inputs) == ([64], [case.budget])
        if case.tile_mode == "paper":
            assert case.counts(inputs)[1] == [case.budget * case.tiles(inputs["image_sizes"][0])]

    def test_the_budget_can_be_changed_on_a_loaded_model(self, case):
        inputs = case.inputs(ONE, case.pictures[:1])
        lengths = []
        for budget in (3, 7, 3):
            case.model.set_vispruner_config(visual_token_num=budget)
            result = generate(case.model, inputs, return_dict_in_generate=True)
            lengths.append(result.past_key_values.get_seq_length())
        assert lengths[0] == lengths[2] < lengths[1]

    @pytest.mark.parametrize("method", [m for m in ENCODER_METHODS if m != "vispruner"])
    def test_every_registered_selector_runs_or_says_what_it_lacks(self, case, method):
        inputs = case.inputs(ONE, case.pictures[:1])
        needs = vispruner.SELECTORS[method].needs
        missing = ["a codebook"] if "codebook" in needs else sorted(needs - case.model.model.selector_inputs)
        if missing:
            with pytest.raises(ValueError, match=f'method "{method}" needs {", ".join(missing)}[,:] '):
                case.model.set_vispruner_config(method=method, seed=3)
        else:
            case.model.set_vispruner_config(method=method, seed=3)
            first = answers(case.model, inputs)
            assert torch.equal(first, answers(case.model, inputs))


class TestImageShapes:
    @pytest.mark.parametrize("size", [(2000, 60), (60, 2000), (5000, 20), (57, 56), (112, 112)])
    def test_any_aspect_ratio_equals_the_hand_built_reference(self, case, size):
        """The grid of a very long image may lose whole tiles to unpadding."""
        inputs = case.inputs(ONE, [case.photo.resize(size)])
        expected, logits = case.reference(inputs)
        result = generate(case.model, inputs, return_dict_in_generate=True, output_logits=True, eos_token_id=None)
        assert result.sequences[0, inputs["input_ids"].shape[1] :].tolist() == expected.tolist()
        torch.testing.assert_close(result.logits[0][0], logits, **TOLERANCE)

    def test_images_of_different_tile_counts_in_one_batch(self, case):
        pictures = [case.photo.resize(size) for size in ((400, 100), (90, 90), (60, 200))]
        batch = answers(case.model, case.inputs([TWO, ONE], pictures), eos_token_id=None)
        for row, (text, chosen) in enumerate([(TWO, pictures[:2]), (ONE, pictures[2:])]):
            assert torch.equal(batch[row], answers(case.model, case.inputs(text, chosen), eos_token_id=None)[0])

    def test_short_and_full_prompts_of_equal_length_are_told_apart(self, cases):
        """In the paper's tile mode two images may need as many tokens together, but each a different number."""
        case = cases["next-paper"]
        before = dict(case.model.config.vispruner_config)
        case.model.set_vispruner_config(visual_token_num=10)
        try:
            inputs = dict(case.inputs(TWO, [case.photo.resize((40, 56)), case.photo.resize((300, 56))]))
            full, kept = case.counts(inputs)
            assert full != kept and sum(full) == sum(kept)
            image, ids = case.model.config.image_token_id, inputs["input_ids"][0].tolist()
            first = ids.index(image)
            between = ids[first + full[0] : ids.index(image, first + full[0])]
            second = first + full[0] + len(between)
            short = [*ids[:first], *[image] * kept[0], *between, *[image] * kept[1], *ids[second + full[1] :]]
            with torch.no_grad():
                expected = case.model(**inputs).logits[0, -1]
                inputs["input_ids"] = torch.tensor([short])
                assert torch.equal(case.model(**inputs).logits[0, -1], expected)
        finally:
            case.model.config.vispruner_config = before


class TestImageFeatures:
    def pixels(self, case):
        inputs = case.inputs(ONE, case.pictures[:1])
        return {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}

    @packed_as_stock
    @pytest.mark.parametrize("change", [{"method": "none"}, {"keep_ratio": 1.0}])
    def test_keeping_all_describes_itself_as_pruning_does(self, case, change):
        case.model.set_vispruner_config(**change)
        features = case.model.get_image_features(**self.pixels(case))
        (full,), _ = case.model.visual_token_counts(**self.pixels(case))
        assert features.full_counts == [full]
        assert [len(image) for image in features.pooler_output] == [len(features.kept_indices[0])] == [full]
        assert torch.equal(features.placeholders[0], torch.arange(full))

    def test_hidden_states_are_there_when_asked_for(self, case):
        features = case.model.get_image_features(**self.pixels(case), output_hidden_states=True)
        stock = case.stock.get_image_features(**self.pixels(case), output_hidden_states=True)
        assert len(features.hidden_states) == len(stock.hidden_states)
        assert all(torch.equal(*pair) for pair in zip(features.hidden_states, stock.hidden_states, strict=True))
        assert case.model.get_image_features(**self.pixels(case)).hidden_states is None

    def test_a_tuple_is_returned_when_asked_for(self, case):
        features = case.model.get_image_features(**self.pixels(case), return_dict=False)
        assert isinstance(features, tuple)

    def test_features_with_cls_cannot_be_asked_for(self, case):
        with pytest.raises(ValueError, match="vision_feature_select_strategy"):
            case.model.get_image_features(**self.pixels(case), vision_feature_select_strategy="full")

    def test_an_attention_layer_that_does_not_exist_is_refused_at_once(self, case):
        before = dict(case.model.config.vispruner_config)
        with pytest.raises(ValueError, match="attention_layer"):
            case.model.set_vispruner_config(attention_layer=99)
        assert case.model.config.vispruner_config == before


class TestPrompts:
    def test_the_result_starts_with_the_callers_prompt(self, case):
        inputs = case.inputs([ONE, NONE], case.pictures[:1])
        result = generate(case.model, inputs)
        assert torch.equal(result[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])

    def test_short_prompts_give_the_same_result(self, case):
        inputs = case.inputs([ONE, NONE, ONE], case.pictures[:2])
        short = case.shortened(inputs)
        assert short["input_ids"].shape[1] < inputs["input_ids"].shape[1]
        with torch.no_grad():
            full_logits, short_logits = case.model(**inputs).logits, case.model(**short).logits
        assert full_logits.shape[1] == inputs["input_ids"].shape[1]
        torch.testing.assert_close(full_logits[:, -1], short_logits[:, -1], **TOLERANCE)
        assert torch.equal(answers(case.model, inputs), answers(case.model, short))

    @pytest.mark.parametrize("change", [-1, 1])
    def test_any_other_number_of_placeholders_raises(self, case, change):
        inputs = dict(case.inputs(ONE, case.pictures[:1]))
        image = case.model.config.image_token_id
        first = inputs["input_ids"][0].tolist().index(image)
        ids = inputs["input_ids"][0].tolist()
        ids = ids[:first] + ids[first + 1 :] if change < 0 else [*ids[:first], image, *ids[first:]]
        inputs["input_ids"] = torch.tensor([ids])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for call in (case.model, case.model.generate):
            with pytest.raises(ValueError, match="image placeholders"):
                call(**inputs)

    @packed_as_stock
    def test_a_wrong_number_raises_too_where_nothing_is_dropped(self, case):
        case.model.set_vispruner_config(keep_ratio=1.0)
        inputs = dict(case.inputs(ONE, case.pictures[:1]))
        (full,) = case.counts(inputs)[0]
        inputs["input_ids"][:, -1] = case.model.config.image_token_id
        for call in (case.model, case.model.generate):
            with pytest.raises(ValueError, match=rf"{full + 1} (image )?placeholders.* {full} "):
                call(**inputs)

    def test_an_image_without_placeholder_and_the_reverse_raise(self, case):
        image, text = case.inputs(ONE, case.pictures[:1]), case.inputs(NONE)
        pixels = {name: image[name] for name in ("pixel_values", "image_sizes") if name in image}
        for call in (case.model, case.model.generate):
            with pytest.raises(ValueError, match="put one <image> per image"):
                call(**text, **pixels)
        alone = {"input_ids": image["input_ids"], "attention_mask": image["attention_mask"]}
        with pytest.raises(ValueError, match="there is no image"):
            case.model.generate(**alone)
        with torch.no_grad():  # a model may write that id, so forward reads it as text, as stock does
            assert torch.equal(case.model(**alone).logits, case.stock(**alone).logits)

    def test_an_image_spread_over_two_rows_raises(self, case):
        inputs = dict(case.inputs([ONE, ONE], case.pictures[:2]))
        image, text = case.model.config.image_token_id, case.inputs(NONE)["input_ids"][0, -1]
        row, other = inputs["input_ids"]
        row[row.tolist().index(image)] = text
        other[other.tolist().index(image) - 1] = image
        for call in (case.model, case.model.generate):
            with pytest.raises(ValueError, match="two rows"):
                call(**inputs)


class TestBatches:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_logits_of_a_batch_equal_those_of_single_prompts(self, case, side):
        texts, images = [ONE, TWO, NONE], case.pictures
        inputs = case.inputs(texts, images, side)
        with torch.no_grad():
            batch = case.model(**inputs)
            width = inputs["input_ids"].shape[1]
            assert batch.logits.shape[1] == width
            for row, (text, chosen) in enumerate([(ONE, images[:1]), (TWO, images[1:]), (NONE, [])]):
                single = case.model(**case.inputs(text, chosen)).logits[0]
                start = width - len(single) if side == "left" else 0
                torch.testing.assert_close(batch.logits[row, start : start + len(single)], single, **TOLERANCE)

    def test_generations_of_a_left_padded_batch_equal_those_of_single_prompts(self, case):
        texts, images = [ONE, TWO, NONE], case.pictures
        batch = answers(case.model, case.inputs(texts, images), eos_token_id=None)
        for row, (text, chosen) in enumerate([(ONE, images[:1]), (TWO, images[1:]), (NONE, [])]):
            single = answers(case.model, case.inputs(text, chosen), eos_token_id=None)
            assert torch.equal(batch[row], single[0])

    def test_padding_shrinks_with_the_prompts(self, case):
        """A text-only row padded to an image's full length must not keep that length."""
        inputs = case.inputs([ONE, NONE], case.pictures[:1])
        single = case.inputs(ONE, case.pictures[:1])
        lengths = [
            generate(case.model, prompt, return_dict_in_generate=True).past_key_values.get_seq_length()
            for prompt in (inputs, single)
        ]
        assert lengths[0] == max(lengths[1], case.inputs(NONE)["input_ids"].shape[1] + NEW - 1)

    def test_a_mask_that_is_not_given_is_inferred_as_stock_infers_it(self, case):
        inputs = dict(case.inputs([ONE, TWO, NONE], case.pictures))
        expected = answers(case.model, inputs)
        del inputs["attention_mask"]
        assert torch.equal(answers(case.model, inputs), expected)

    def test_text_only_batches_equal_stock(self, case):
        inputs = case.inputs([NONE, "USER: Hi ASSISTANT:"])
        with torch.no_grad():
            assert torch.equal(case.model(**inputs).logits, case.stock(**inputs).logits)
        assert torch.equal(generate(case.model, inputs), generate(case.stock, inputs))


class TestDecoding:
    def test_decoding_equals_rescoring_in_one_pass(self, case):
        inputs = dict(case.inputs(ONE, case.pictures[:1]))
        result = generate(case.model, inputs, return_dict_in_generate=True, output_logits=True, eos_token_id=None)
        inputs["input_ids"] = result.sequences
        inputs["attention_mask"] = torch.ones_like(result.sequences)
        with torch.no_grad():
            once = case.model(**inputs).logits[0, -NEW - 1 : -1]
        torch.testing.assert_close(once, torch.cat(result.logits), **TOLERANCE)

    def test_a_loop_of_forward_calls(self, case):
        inputs = case.inputs(ONE, case.pictures[:1])
        expected = answers(case.model, inputs, eos_token_id=None)[0].tolist()
        new, past, current = [], DynamicCache(), dict(inputs)
        with torch.no_grad():
            for _ in range(NEW):
                outputs = case.model(**current, past_key_values=past, use_cache=True)
                new.append(int(outputs.logits[0, -1].argmax()))
                current = {"input_ids": torch.tensor([new[-1:]])}
        assert new == expected

    def test_behind_a_pruned_prompt_masks_and_positions_go_on_as_the_caller_counts(self, case):
        inputs = case.inputs([ONE, NONE], case.pictures[:1])
        step = torch.tensor([[5], [5]])
        ids = torch.cat([inputs["input_ids"], step], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(step)], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            at_once = case.model(**{**inputs, "input_ids": ids, "attention_mask": mask}, position_ids=positions)
            outputs = case.model(**inputs, position_ids=positions[:, :-1], use_cache=True)
            given = {"attention_mask": mask, "position_ids": positions[:, -1:], CACHE: outputs[CACHE]}
            later = case.model(input_ids=step, **given)
            torch.testing.assert_close(later.logits[:, -1], at_once.logits[:, -1], **TOLERANCE)
            with pytest.raises(ValueError, match="attention_mask has 3 columns"):
                case.model(input_ids=step, attention_mask=mask[:, :3], **{CACHE: outputs[CACHE]})


class TestRenumberedPositions:
    def test_null_means_renumber(self, case):
        inputs = case.inputs(ONE, case.pictures[:1])
        with torch.no_grad():
            expected = case.model(**inputs).logits
            case.model.set_vispruner_config(position_policy="renumber")
            assert torch.equal(case.model(**inputs).logits, expected)

    def test_position_ids_given_with_a_full_prompt_are_renumbered(self, case):
        inputs = case.inputs([ONE, NONE], case.pictures[:1])
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            given = case.model(**inputs, position_ids=positions).logits[:, -1]
            expected = [
                case.model(**case.inputs(*prompt)).logits[0, -1] for prompt in ((ONE, case.pictures[:1]), (NONE,))
            ]
        torch.testing.assert_close(given, torch.stack(expected), **TOLERANCE)


@packed_as_stock
class TestOriginalPositions:
    @pytest.fixture
    def original(self, case):
        case.model.set_vispruner_config(position_policy="original")
        return case

    def test_original_positions_equal_the_hand_built_reference(self, original):
        for text, pictures in ((ONE, original.pictures[:1]), (TWO, original.pictures[1:])):
            inputs = original.inputs(text, pictures)
            expected, logits = original.reference(inputs, original_positions=True)
            result = generate(
                original.model, inputs, return_dict_in_generate=True, output_logits=True, eos_token_id=None
            )
            assert result.sequences[0, inputs["input_ids"].shape[1] :].tolist() == expected.tolist()
            torch.testing.assert_close(result.logits[0][0], logits, **TOLERANCE)
            with torch.no_grad():
                torch.testing.assert_close(original.model(**inputs).logits[0, -1], logits, **TOLERANCE)

    def test_the_two_policies_differ(self, original):
        inputs = original.inputs(ONE, original.pictures[:1])
        with torch.no_grad():
            kept = original.model(**inputs).logits[0, -1]
            original.model.set_vispruner_config(position_policy="renumber")
            assert not torch.allclose(original.model(**inputs).logits[0, -1], kept, atol=1e-3)

    def test_original_batches_equal_singles_and_modes_agree(self, original):
        texts, images = [ONE, TWO, NONE], original.pictures
        inputs = original.inputs(texts, images)
        batch = answers(original.model, inputs, eos_token_id=None)
        for row, (text, chosen) in enumerate([(ONE, images[:1]), (TWO, images[1:]), (NONE, [])]):
            single = original.inputs(text, chosen)
            assert torch.equal(batch[row], answers(original.model, single, eos_token_id=None)[0])
        single = original.inputs(ONE, images[:1])
        expected = answers(original.model, single, eos_token_id=None)
        for options in ({"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
            assert torch.equal(answers(original.model, single, eos_token_id=None, **options), expected)

    def test_original_beams(self, original):
        inputs = original.inputs([ONE, NONE], original.pictures[:1])
        result = answers(original.model, inputs, num_beams=3, eos_token_id=None)
        single = answers(original.model, original.inputs(ONE, original.pictures[:1]), num_beams=3, eos_token_id=None)
        assert torch.equal(result[:1], single)

    def test_a_short_prompt_gets_the_positions_of_the_full_one(self, original):
        inputs = original.inputs([ONE, NONE, ONE], original.pictures[:2])
        short = original.shortened(inputs)
        assert short["input_ids"].shape[1] < inputs["input_ids"].shape[1]
        with torch.no_grad():
            short_logits, full_logits = (original.model(**prompt).logits for prompt in (short, inputs))
            torch.testing.assert_close(short_logits[:, -1], full_logits[:, -1], **TOLERANCE)
        result = generate(original.model, short)
        assert torch.equal(result[:, : short["input_ids"].shape[1]], short["input_ids"])
        assert torch.equal(answers(original.model, short), answers(original.model, inputs))

    def test_an_image_on_a_cache_of_text_goes_on_counting(self, original):
        text, image = original.inputs(NONE), dict(original.inputs(ONE, original.pictures[:1]))
        whole = {**image, "input_ids": torch.cat([text["input_ids"], image["input_ids"]], dim=1)}
        del image["attention_mask"], whole["attention_mask"]
        with torch.no_grad():
            expected = original.model(**whole).logits[0, -1]
            cache = original.model(**text, use_cache=True).past_key_values
            logits = original.model(**image, past_key_values=cache, use_cache=True).logits[0, -1]
        torch.testing.assert_close(logits, expected, **TOLERANCE)

    def test_a_compiled_forward_numbers_a_short_prompt_or_refuses_it(self, original):
        short = original.shortened(original.inputs(ONE, original.pictures[:1]))
        with torch.no_grad():
            expected = original.model(**short).logits
            compiled = torch.compile(original.model.forward, backend="eager")(**short).logits
            torch.testing.assert_close(compiled, expected, **TOLERANCE)
        torch.compiler.reset()
        with pytest.raises(Exception, match="does not say which"):
            torch.compile(original.model.forward, backend="eager", fullgraph=True)(**short)

    @pytest.mark.parametrize("as_dict", [True, False])
    def test_a_continuation_by_forward_goes_on_behind_the_full_prompt(self, original, as_dict):
        inputs = original.inputs(ONE, original.pictures[:1])
        step = torch.tensor([[5]])
        whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], step], dim=1)}
        del whole["attention_mask"]
        for prompt in (inputs, original.shortened(inputs)):
            with torch.no_grad():
                outputs = original.model(**prompt, use_cache=True, return_dict=as_dict)
                cache = (
                    next(part for part in outputs if hasattr(part, "get_seq_length"))
                    if not as_dict
                    else outputs[CACHE]
                )
                found = original.model(input_ids=step, **{CACHE: cache}).logits[0, -1]
                torch.testing.assert_close(found, original.model(**whole).logits[0, -1], **TOLERANCE)


class TestTraining:
    def test_loss_is_finite_equal_for_both_prompt_forms_and_trains(self, case):
        inputs = case.inputs([ONE, NONE], case.pictures[:1])
        short = case.shortened(inputs)
        losses = []
        for prompt in (inputs, short):
            ids, mask = prompt["input_ids"], prompt["attention_mask"]
            hidden = (ids == case.model.config.image_token_id) | (mask == 0)
            losses.append(case.model(**prompt, labels=ids.masked_fill(hidden, -100)).loss)
        assert torch.isfinite(losses[0])
        torch.testing.assert_close(losses[0], losses[1])
        losses[0].backward()
        gradients = {name for name, weight in case.model.named_parameters() if weight.grad is not None}
        case.model.zero_grad()
        assert any("multi_modal_projector" in name for name in gradients)
        assert any("vision_tower" in name for name in gradients) and any("lm_head" in name for name in gradients)


class TestSignature:
    def test_forward_keeps_the_stock_parameters(self, case):
        ours, stock = (list(inspect.signature(model.forward).parameters) for model in (case.model, case.stock))
        added = (
            "mm_encoder_outputs",
            "encoded_images",
            "vispruner_config",
            "prompt_lengths",
            "visual_importance",
            *CLIP_INPUTS,
        )  # newer stock has the first itself
        assert [name for name in ours if name not in added] == [name for name in stock if name not in added]

    def test_forward_takes_by_place_what_stock_does_and_nothing_twice(self, case):
        inputs = case.inputs(ONE, case.pictures[:1])
        names = list(inspect.signature(case.stock.forward).parameters)
        by_place = [inputs.get(name) for name in names[: 1 + max(names.index(name) for name in inputs)]]
        with torch.no_grad():
            assert torch.equal(case.model(*by_place).logits, case.model(**inputs).logits)
        with pytest.raises(TypeError, match="input_ids twice"):
            case.model(inputs["input_ids"], **inputs)
        with pytest.raises(TypeError, match=r"forward takes \d+ inputs by place, got 40"):
            case.model(*[None] * 40)

    @pytest.mark.parametrize("kept", [3, torch.tensor([1, -2])])
    def test_logits_to_keep_counts_the_callers_columns(self, case, kept):
        inputs = case.inputs([ONE, NONE], case.pictures[:1])
        with torch.no_grad():
            every = case.model(**inputs).logits
            some = case.model(**inputs, logits_to_keep=kept).logits
        torch.testing.assert_close(some, every[:, -kept:] if isinstance(kept, int) else every[:, kept])

    def test_a_mask_of_another_shape_is_refused_for_a_full_prompt(self, case):
        inputs = dict(case.inputs(ONE, case.pictures[:1]))
        inputs["attention_mask"] = inputs["attention_mask"][:, :-1]
        with pytest.raises(ValueError, match="attention_mask must be 2-D"):
            case.model(**inputs)
