"""Several questions about images that were encoded and pruned once."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from matrix import ASK, HELLO, LLAVAS, NEW, ONE, PACKED_AS_STOCK, SEVERAL, TEXT, answers, generate
from rows import Image
from transformers import StaticCache

from vispruner.pruning_mixin import VisPrunerMixin
from vispruner.selectors import SELECTORS
from vispruner.stock_versions import SLICES_FEATURES, TAKES_FEATURES
from vispruner.visual_features import PrunedImageFeatures, tokens_of

PICTURE = Image((56, 84), seed=1)  # that of `ONE`
WHY = [[25, 26], PICTURE, [27]]
FIRST, SECOND = SEVERAL[1], SEVERAL[3]

every_llava = pytest.mark.parametrize("model", LLAVAS, indirect=True)
packed_as_stock = pytest.mark.parametrize("model", [name for name in LLAVAS if name in PACKED_AS_STOCK], indirect=True)


def split(model, *prompts):
    """The tensors of prompts without pixels, the encoded images, and the same prompts with pixels."""
    inputs = model.prompt(*prompts)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return text, model.pruned.encode_images(**model.pixels(inputs)), inputs


@contextmanager
def counted(model, monkeypatch):
    """Count the runs of the encoder, the projector and the configured selector."""
    runs = {"encoder": 0, "projector": 0, "selector": 0}
    base = model.pruned.model

    def counter(name):
        def count(*args):
            runs[name] += 1

        return count

    method = model.pruned.config.vispruner_config["method"]
    selector = SELECTORS[method]

    def select(*args, **kwargs):
        runs["selector"] += 1
        return selector.function(*args, **kwargs)

    watched = {"encoder": base.vision_tower, "projector": base.multi_modal_projector}
    hooks = [module.register_forward_hook(counter(name)) for name, module in watched.items()]
    try:
        with monkeypatch.context() as patch:
            patch.setitem(SELECTORS, method, selector._replace(function=select))
            yield runs
    finally:
        for hook in hooks:
            hook.remove()


def stock_repeats_features_in_order(model) -> bool:
    """False where 5.17 repeats none and 5.18 mixes up those of a row with several images."""
    if not TAKES_FEATURES:
        return False
    token = model.pruned.config.image_token_id
    features = PrunedImageFeatures(pooler_output=[torch.zeros(1, 1), torch.ones(1, 1)])
    expand = super(VisPrunerMixin, model.pruned)._expand_inputs_for_generation
    given = {"input_ids": torch.tensor([[token, token]]), "mm_encoder_outputs": {"image": features}}
    made = tokens_of(expand(2, **given)[1]["mm_encoder_outputs"]["image"])
    return [float(one) for one in made] == [0.0, 1.0, 0.0, 1.0]


@every_llava
class TestQuestions:
    def test_a_second_question_pays_neither_encoder_nor_selection(self, model, monkeypatch):
        with counted(model, monkeypatch) as runs:
            text, images, _ = split(model, ONE)
            paid = dict(runs)
            assert paid["encoder"] == paid["projector"] == 1 and paid["selector"] >= 1
            generate(model.pruned, text, encoded_images=images)
            other = model.prompt(WHY)
            generate(model.pruned, {"input_ids": other["input_ids"]}, encoded_images=images, num_beams=2)
            with torch.no_grad():
                model.pruned(**text, encoded_images=images)
            assert runs == paid

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}])
    def test_answers_equal_those_from_pixels(self, model, options):
        text, images, inputs = split(model, SEVERAL, ONE, TEXT)
        expected = answers(model.pruned, inputs, **options)
        for _ in range(2):  # what generate does with features must not change the images
            result = generate(model.pruned, text, encoded_images=images, **options)
            assert torch.equal(result[:, text["input_ids"].shape[1] :], expected)
        assert len(images) == 3

    def test_logits_and_loss_equal_those_from_pixels(self, model):
        text, images, inputs = split(model, SEVERAL, ONE)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        with torch.no_grad():
            expected = model.pruned(**inputs, labels=labels)
            result = model.pruned(**text, labels=labels, encoded_images=images)
        assert torch.equal(result.logits, expected.logits) and torch.equal(result.loss, expected.loss)

    def test_each_beam_of_several_images_has_them_in_order(self, model):
        """Stock 5.18 gives a row's copies its first image twice, then its second twice."""
        _, images, _ = split(model, SEVERAL, ONE)
        first, second, third = images.kept_counts
        short = torch.full((2, first + second), model.pruned.config.image_token_id)
        short[1, third:] = 1
        features = {"image": images.to_features()}
        _, expanded = model.pruned._expand_inputs_for_generation(3, input_ids=short, mm_encoder_outputs=features)
        made = tokens_of(expanded["mm_encoder_outputs"]["image"])
        expected = [images.tokens[number] for number in [0, 1] * 3 + [2] * 3]
        assert all(torch.equal(found, own) for found, own in zip(made, expected, strict=True))

    def test_sampling_static_cache_and_chunked_prefill(self, model):
        text, images, inputs = split(model, ONE)
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
                results.append(answers(model.pruned, prompt, **options))
            assert torch.equal(*results)

    def test_a_later_turn_takes_them_or_its_cache(self, model):
        text, images, inputs = split(model, ONE)
        first = generate(model.pruned, text, encoded_images=images, return_dict_in_generate=True)
        longer = {"input_ids": torch.cat([first.sequences, first.sequences[:, -4:]], dim=1)}
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        expected = answers(model.pruned, {**inputs, **longer})
        again = answers(model.pruned, longer, encoded_images=images)
        cached = answers(model.pruned, longer, encoded_images=images, past_key_values=first.past_key_values)
        assert torch.equal(again, expected) and torch.equal(cached, expected)

    def test_a_prompt_of_kept_placeholders_is_the_same(self, model):
        text, images, inputs = split(model, ONE)
        short = model.shortened(inputs)
        short = {name: short[name] for name in text}
        assert torch.equal(
            answers(model.pruned, short, encoded_images=images), answers(model.pruned, text, encoded_images=images)
        )

    def test_the_dense_model_reuses_images_too(self, model):
        model.pruned.set_vispruner_config(method="none")
        text, images, inputs = split(model, SEVERAL, ONE)
        assert images.kept_counts == images.full_counts
        for options in ({}, {"num_beams": 2}):
            if options and not stock_repeats_features_in_order(model):
                continue
            expected = answers(model.stock, inputs, **options)
            assert torch.equal(answers(model.pruned, text, encoded_images=images, **options), expected)
        with torch.no_grad():
            assert torch.equal(model.pruned(**text, encoded_images=images).logits, model.stock(**inputs).logits)

    def test_a_static_cache_is_as_long_as_the_short_prompt(self, model, monkeypatch):
        monkeypatch.setattr(
            model.pruned, "_previous_max_cache_length", -1, raising=False
        )  # of earlier, longer prompts
        text, images, _ = split(model, ONE)
        options = {"cache_implementation": "static", "disable_compile": True, "return_dict_in_generate": True}
        cache = generate(model.pruned, text, encoded_images=images, **options).past_key_values
        short = text["input_ids"].shape[1] - sum(images.full_counts) + sum(images.kept_counts)
        assert isinstance(cache, StaticCache)
        assert cache.layers[0].keys.shape[-2] == short + NEW - 1


@packed_as_stock
class TestOriginalPositions:
    def test_answers_equal_those_from_pixels(self, model):
        model.pruned.set_vispruner_config(position_policy="original")
        text, images, inputs = split(model, SEVERAL, ONE)
        for options in ({}, {"num_beams": 2}):
            expected = answers(model.pruned, inputs, **options)
            assert torch.equal(answers(model.pruned, text, encoded_images=images, **options), expected)
        with torch.no_grad():
            assert torch.equal(model.pruned(**text, encoded_images=images).logits, model.pruned(**inputs).logits)

    def test_another_position_policy_is_none_of_their_business(self, model):
        text, images, inputs = split(model, ONE)
        model.pruned.set_vispruner_config(position_policy="original")
        assert torch.equal(
            answers(model.pruned, text, encoded_images=images),
            answers(model.pruned, inputs),
        )


@every_llava
class TestSequence:
    def test_several_questions_about_one_image_in_a_batch(self, model):
        prompts = [ONE, WHY, [HELLO, PICTURE, [28, 29]]]
        text, _, _ = split(model, *prompts)
        _, images, _ = split(model, ONE)
        batch = answers(model.pruned, text, encoded_images=images[[0] * 3])
        for row, prompt in zip(batch, prompts, strict=True):
            assert torch.equal(row, answers(model.pruned, model.prompt(prompt))[0])

    def test_images_are_chosen_and_joined_in_prompt_order(self, model):
        _, three, _ = split(model, SEVERAL, ONE)
        text, _, inputs = split(model, [HELLO, PICTURE, [18], FIRST, ASK])
        expected = answers(model.pruned, inputs)
        one_by_one = [split(model, [HELLO, picture, ASK])[1] for picture in (FIRST, SECOND, PICTURE)]
        for images in (three[[2, 0]], three[2] + three[-3], three[2:] + three[:1], one_by_one[2] + one_by_one[0]):
            assert len(images) == 2
            assert torch.equal(answers(model.pruned, text, encoded_images=images), expected)
        with pytest.raises(IndexError):
            three[3]

    def test_they_say_what_was_kept(self, model):
        inputs = model.prompt(SEVERAL, ONE)
        ((full,), (kept,)) = (of.values() for of in model.counts(inputs))
        _, images, _ = split(model, SEVERAL, ONE)
        assert list(images.full_counts) == full and list(images.kept_counts) == kept
        assert [len(indices) for indices in images.kept_indices] == kept
        assert images.vispruner_config == model.pruned.config.vispruner_config

    def test_they_hold_no_gradients_and_nothing_as_large_as_the_encoder_output(self, model):
        images = model.pruned.encode_images(**model.pixels(model.prompt(ONE)))
        assert not any(tokens.requires_grad for tokens in images.tokens)
        assert {tensor.shape[0] for tensor in (*images.tokens, *images.kept_indices)} == set(images.kept_counts)

    def test_they_move_between_devices_and_dtypes(self, model):
        text, images, inputs = split(model, ONE)
        away = images.to("meta")
        held = [*away.tokens, *away.kept_indices, *away.placeholders]
        assert {tensor.device.type for tensor in held if tensor is not None} == {"meta"}
        half = images.to(dtype=torch.bfloat16)
        assert half.tokens[0].dtype == torch.bfloat16 and half.kept_indices[0].dtype == torch.int64
        doubled = images.to(torch.float64)
        assert torch.equal(
            answers(model.pruned, text, encoded_images=doubled),
            answers(model.pruned, inputs),
        )


@every_llava
class TestRefusals:
    def both_calls(self, model):
        return (lambda **inputs: model.pruned(**inputs)), (lambda **inputs: generate(model.pruned, inputs))

    @pytest.mark.parametrize("change", [{"visual_token_num": 3}, {"keep_ratio": 0.5}, {"method": "cls_attention"}])
    def test_a_changed_budget_or_method_is_named(self, model, change):
        text, images, inputs = split(model, ONE)
        model.pruned.set_vispruner_config(**change)
        (field,) = change
        for call in self.both_calls(model):
            with pytest.raises(ValueError, match=rf"encoded_images were made with vispruner_config .*{field}"):
                call(**text, encoded_images=images)
        _, other, _ = split(model, ONE)
        with pytest.raises(ValueError, match=field):
            images + other
        assert torch.equal(answers(model.pruned, text, encoded_images=other), answers(model.pruned, inputs))

    def test_the_dense_model_refuses_pruned_images(self, model):
        text, images, _ = split(model, ONE)
        model.pruned.set_vispruner_config(method="none")
        for call in self.both_calls(model):
            with pytest.raises(ValueError, match="method='vispruner'"):
                call(**text, encoded_images=images)

    def test_pixels_beside_them_are_refused(self, model):
        _, images, inputs = split(model, ONE)
        for call in self.both_calls(model):
            with pytest.raises(ValueError, match="stand in place of pixel_values"):
                call(**inputs, encoded_images=images)

    def test_another_number_of_images_is_refused(self, model):
        text, images, _ = split(model, SEVERAL)
        for call in self.both_calls(model):
            with pytest.raises(ValueError, match="image placeholders"):
                call(**text, encoded_images=images[0])

    def test_anything_else_is_refused(self, model):
        text, images, _ = split(model, ONE)
        for call in self.both_calls(model):
            with pytest.raises(TypeError, match="encode_images returns"):
                call(**text, encoded_images=list(images.tokens))
