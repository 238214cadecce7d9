"""Several questions about images that were encoded and pruned once."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from cases import NEW, NONE, ONE, TWO, answers, generate, packed_as_stock
from transformers import StaticCache

from vispruner.pruning_mixin import VisPrunerMixin
from vispruner.selectors import SELECTORS
from vispruner.stock_versions import SLICES_FEATURES, TAKES_FEATURES
from vispruner.visual_features import PrunedImageFeatures, tokens_of

WHY = "USER: <image>\nWhy is it so? ASSISTANT:"


def split(case, texts, pictures, model=None):
    """The processor's tensors without pixels, the encoded images, and the same prompts with pixels."""
    inputs = dict(case.inputs(texts, pictures))
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    pixels = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    return text, (model or case.model).encode_images(**pixels), inputs


@contextmanager
def counted(case, monkeypatch):
    """Count the runs of the encoder, the projector and the configured selector."""
    runs = {"encoder": 0, "projector": 0, "selector": 0}
    model = case.model.model

    def counter(name):
        def count(*args):
            runs[name] += 1

        return count

    method = case.model.config.vispruner_config["method"]
    selector = SELECTORS[method]

    def select(*args, **kwargs):
        runs["selector"] += 1
        return selector.function(*args, **kwargs)

    watched = {"encoder": model.vision_tower, "projector": model.multi_modal_projector}
    hooks = [module.register_forward_hook(counter(name)) for name, module in watched.items()]
    try:
        with monkeypatch.context() as patch:
            patch.setitem(SELECTORS, method, selector._replace(function=select))
            yield runs
    finally:
        for hook in hooks:
            hook.remove()


def stock_repeats_features_in_order(case) -> bool:
    """False where 5.17 repeats none and 5.18 mixes up those of a row with several images."""
    if not TAKES_FEATURES:
        return False
    token = case.model.config.image_token_id
    features = PrunedImageFeatures(pooler_output=[torch.zeros(1, 1), torch.ones(1, 1)])
    expand = super(VisPrunerMixin, case.model)._expand_inputs_for_generation
    given = {"input_ids": torch.tensor([[token, token]]), "mm_encoder_outputs": {"image": features}}
    made = tokens_of(expand(2, **given)[1]["mm_encoder_outputs"]["image"])
    return [float(one) for one in made] == [0.0, 1.0, 0.0, 1.0]


class TestQuestions:
    def test_a_second_question_pays_neither_encoder_nor_selection(self, case, monkeypatch):
        with counted(case, monkeypatch) as runs:
            text, images, _ = split(case, ONE, case.pictures[:1])
            paid = dict(runs)
            assert paid["encoder"] == paid["projector"] == 1 and paid["selector"] >= 1
            generate(case.model, text, encoded_images=images)
            other = case.inputs(WHY, case.pictures[:1])
            generate(case.model, {"input_ids": other["input_ids"]}, encoded_images=images, num_beams=2)
            with torch.no_grad():
                case.model(**text, encoded_images=images)
            assert runs == paid

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}])
    def test_answers_equal_those_from_pixels(self, case, options):
        text, images, inputs = split(case, [TWO, ONE, NONE], case.pictures)
        expected = answers(case.model, inputs, eos_token_id=None, **options)
        for _ in range(2):  # what generate does with features must not change the images
            result = generate(case.model, text, encoded_images=images, eos_token_id=None, **options)
            assert torch.equal(result[:, text["input_ids"].shape[1] :], expected)
        assert len(images) == 3

    def test_logits_and_loss_equal_those_from_pixels(self, case):
        text, images, inputs = split(case, [TWO, ONE], case.pictures)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        with torch.no_grad():
            expected = case.model(**inputs, labels=labels)
            result = case.model(**text, labels=labels, encoded_images=images)
        assert torch.equal(result.logits, expected.logits) and torch.equal(result.loss, expected.loss)

    @packed_as_stock
    def test_original_positions(self, case):
        case.model.set_vispruner_config(position_policy="original")
        text, images, inputs = split(case, [TWO, ONE], case.pictures)
        for options in ({}, {"num_beams": 2}):
            expected = answers(case.model, inputs, eos_token_id=None, **options)
            assert torch.equal(
                answers(case.model, text, encoded_images=images, eos_token_id=None, **options), expected
            )
        with torch.no_grad():
            assert torch.equal(case.model(**text, encoded_images=images).logits, case.model(**inputs).logits)

    def test_each_beam_of_several_images_has_them_in_order(self, case):
        """Stock 5.18 gives a row's copies its first image twice, then its second twice."""
        _, images, _ = split(case, [TWO, ONE], case.pictures)
        first, second, third = images.kept_counts
        short = torch.full((2, first + second), case.model.config.image_token_id)
        short[1, third:] = 1
        features = {"image": images.to_features()}
        _, expanded = case.model._expand_inputs_for_generation(3, input_ids=short, mm_encoder_outputs=features)
        made = tokens_of(expanded["mm_encoder_outputs"]["image"])
        expected = [images.tokens[number] for number in [0, 1] * 3 + [2] * 3]
        assert all(torch.equal(found, own) for found, own in zip(made, expected, strict=True))

    def test_sampling_static_cache_and_chunked_prefill(self, case):
        text, images, inputs = split(case, ONE, case.pictures[:1])
        ways = [
            {"do_sample": True, "num_return_sequences": 3},
            {"cache_implementation": "static", "disable_compile": True},
            {"prompt_lookup_num_tokens": 3},
        ]
        if SLICES_FEATURES:
            ways.append({"prefill_chunk_size": 6})
        for options in ways:
            results = []
            for prompt in (inputs, {**text, "encoded_images": images}):
                torch.manual_seed(0)
                results.append(answers(case.model, prompt, eos_token_id=None, **options))
            assert torch.equal(*results)

    def test_a_later_turn_takes_them_or_its_cache(self, case):
        text, images, inputs = split(case, ONE, case.pictures[:1])
        first = generate(case.model, text, encoded_images=images, return_dict_in_generate=True, eos_token_id=None)
        longer = {"input_ids": torch.cat([first.sequences, first.sequences[:, -4:]], dim=1)}
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        expected = answers(case.model, {**inputs, **longer}, eos_token_id=None)
        again = answers(case.model, longer, encoded_images=images, eos_token_id=None)
        cached = answers(
            case.model, longer, encoded_images=images, past_key_values=first.past_key_values, eos_token_id=None
        )
        assert torch.equal(again, expected) and torch.equal(cached, expected)

    def test_a_prompt_of_kept_placeholders_needs_no_image_processor(self, case):
        text, images, _ = split(case, ONE, case.pictures[:1])
        (kept,) = images.kept_counts
        case.processor.tokenizer.padding_side = "left"
        short = case.processor.tokenizer(ONE.replace("<image>", "<image>" * kept), return_tensors="pt")
        assert torch.equal(
            answers(case.model, dict(short), encoded_images=images, eos_token_id=None),
            answers(case.model, text, encoded_images=images, eos_token_id=None),
        )

    def test_the_dense_model_reuses_images_too(self, case):
        case.model.set_vispruner_config(method="none")
        text, images, inputs = split(case, [TWO, ONE], case.pictures)
        assert images.kept_counts == images.full_counts
        for options in ({}, {"num_beams": 2}):
            if options and not stock_repeats_features_in_order(case):
                continue
            expected = answers(case.stock, inputs, eos_token_id=None, **options)
            assert torch.equal(
                answers(case.model, text, encoded_images=images, eos_token_id=None, **options), expected
            )
        with torch.no_grad():
            assert torch.equal(case.model(**text, encoded_images=images).logits, case.stock(**inputs).logits)

    def test_a_static_cache_is_as_long_as_the_short_prompt(self, case, monkeypatch):
        monkeypatch.setattr(case.model, "_previous_max_cache_length", -1, raising=False)  # of earlier, longer prompts
        text, images, _ = split(case, ONE, case.pictures[:1])
        options = {"cache_implementation": "static", "disable_compile": True, "return_dict_in_generate": True}
        cache = generate(case.model, text, encoded_images=images, eos_token_id=None, **options).past_key_values
        short = text["input_ids"].shape[1] - sum(images.full_counts) + sum(images.kept_counts)
        assert isinstance(cache, StaticCache)
        assert cache.layers[0].keys.shape[-2] == short + NEW - 1


class TestSequence:
    def test_several_questions_about_one_image_in_a_batch(self, case):
        texts = [ONE, WHY, "USER: <image>\nHow many? ASSISTANT:"]
        text, _, _ = split(case, texts, case.pictures[:1] * 3)
        _, images, _ = split(case, ONE, case.pictures[:1])
        batch = answers(case.model, text, encoded_images=images[[0] * 3], eos_token_id=None)
        for row, question in zip(batch, texts, strict=True):
            assert torch.equal(
                row, answers(case.model, case.inputs(question, case.pictures[:1]), eos_token_id=None)[0]
            )

    def test_images_are_chosen_and_joined_in_prompt_order(self, case):
        _, three, _ = split(case, [TWO, ONE], case.pictures)
        text, _, inputs = split(case, TWO, [case.pictures[2], case.pictures[0]])
        expected = answers(case.model, inputs, eos_token_id=None)
        one_by_one = [split(case, ONE, [picture])[1] for picture in case.pictures]
        for images in (three[[2, 0]], three[2] + three[-3], three[2:] + three[:1], one_by_one[2] + one_by_one[0]):
            assert len(images) == 2
            assert torch.equal(answers(case.model, text, encoded_images=images, eos_token_id=None), expected)
        with pytest.raises(IndexError):
            three[3]

    def test_they_say_what_was_kept(self, case):
        inputs = case.inputs([TWO, ONE], case.pictures)
        full, kept = case.counts(inputs)
        _, images, _ = split(case, [TWO, ONE], case.pictures)
        assert list(images.full_counts) == full and list(images.kept_counts) == kept
        assert [len(indices) for indices in images.kept_indices] == kept
        assert images.vispruner_config == case.model.config.vispruner_config

    def test_they_hold_no_gradients_and_nothing_as_large_as_the_encoder_output(self, case):
        inputs = case.inputs(ONE, case.pictures[:1])
        pixels = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
        images = case.model.encode_images(**pixels)
        assert not any(tokens.requires_grad for tokens in images.tokens)
        assert {tensor.shape[0] for tensor in (*images.tokens, *images.kept_indices)} == set(images.kept_counts)

    def test_they_move_between_devices_and_dtypes(self, case):
        text, images, inputs = split(case, ONE, case.pictures[:1])
        away = images.to("meta")
        held = [*away.tokens, *away.kept_indices, *away.placeholders]
        assert {tensor.device.type for tensor in held if tensor is not None} == {"meta"}
        half = images.to(dtype=torch.bfloat16)
        assert half.tokens[0].dtype == torch.bfloat16 and half.kept_indices[0].dtype == torch.int64
        doubled = images.to(torch.float64)
        assert torch.equal(
            answers(case.model, text, encoded_images=doubled, eos_token_id=None),
            answers(case.model, inputs, eos_token_id=None),
        )


class TestRefusals:
    def both_calls(self, case):
        return (lambda **inputs: case.model(**inputs)), (lambda **inputs: generate(case.model, inputs))

    @pytest.mark.parametrize("change", [{"visual_token_num": 3}, {"keep_ratio": 0.5}, {"method": "cls_attention"}])
    def test_a_changed_budget_or_method_is_named(self, case, change):
        text, images, inputs = split(case, ONE, case.pictures[:1])
        case.model.set_vispruner_config(**change)
        (field,) = change
        for call in self.both_calls(case):
            with pytest.raises(ValueError, match=rf"encoded_images were made with vispruner_config .*{field}"):
                call(**text, encoded_images=images)
        _, other, _ = split(case, ONE, case.pictures[:1])
        with pytest.raises(ValueError, match=field):
            images + other
        assert torch.equal(answers(case.model, text, encoded_images=other), answers(case.model, inputs))

    def test_the_dense_model_refuses_pruned_images(self, case):
        text, images, _ = split(case, ONE, case.pictures[:1])
        case.model.set_vispruner_config(method="none")
        for call in self.both_calls(case):
            with pytest.raises(ValueError, match="method='vispruner'"):
                call(**text, encoded_images=images)

    @packed_as_stock
    def test_another_position_policy_is_none_of_their_business(self, case):
        text, images, inputs = split(case, ONE, case.pictures[:1])
        case.model.set_vispruner_config(position_policy="original")
        assert torch.equal(
            answers(case.model, text, encoded_images=images, eos_token_id=None),
            answers(case.model, inputs, eos_token_id=None),
        )

    def test_pixels_beside_them_are_refused(self, case):
        _, images, inputs = split(case, ONE, case.pictures[:1])
        for call in self.both_calls(case):
            with pytest.raises(ValueError, match="stand in place of pixel_values"):
                call(**inputs, encoded_images=images)

    def test_another_number_of_images_is_refused(self, case):
        text, images, _ = split(case, TWO, case.pictures[:2])
        for call in self.both_calls(case):
            with pytest.raises(ValueError, match="image placeholders"):
                call(**text, encoded_images=images[0])

    def test_anything_else_is_refused(self, case):
        text, images, _ = split(case, ONE, case.pictures[:1])
        for call in self.both_calls(case):
            with pytest.raises(TypeError, match="encode_images returns"):
                call(**text, encoded_images=list(images.tokens))
