"""What every pruned architecture must do, as one table of architectures against one list of properties."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from PIL import Image
from reference import greedy, visual_tokens
from transformers import (
    AutoProcessor,
    DynamicCache,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

import vispruner
from vispruner.conversion.tiny_llava import write_tiny_llava, write_tiny_llava_next
from vispruner.pruning_mixin import GENERATE_ENCODES_ONCE

ONE = "USER: <image>\nWhat is this? ASSISTANT:"
TWO = "USER: <image> and <image>\nDo these two pictures differ? ASSISTANT:"
NONE = "USER: What color is the sky at night? ASSISTANT:"
NEW = 8
# Padding and batching change the order of sums in matrix products, never more than this on these models.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


@dataclass
class Case:
    """One architecture: its stock model, the pruned one, and how prompts are made for them."""

    name: str
    repo: str
    stock_class: type
    budget: int
    photo: Image.Image
    options: dict

    @cached_property
    def stock(self):
        return self.stock_class.from_pretrained(self.repo).eval()

    @cached_property
    def model(self):
        return vispruner.load(self.repo, visual_token_num=self.budget, **self.options).eval()

    @cached_property
    def processor(self):
        return AutoProcessor.from_pretrained(self.repo)

    @cached_property
    def pictures(self):
        turned = self.photo.transpose(Image.Transpose.ROTATE_90)
        return [self.photo, turned, self.photo.crop((60, 40, 260, 240))]

    @property
    def tile_mode(self):
        return self.options.get("tile_mode")

    def inputs(self, texts, images=(), side="left"):
        self.processor.tokenizer.padding_side = side
        return self.processor(images=list(images) or None, text=texts, return_tensors="pt", padding=True)

    def counts(self, inputs):
        return self.model.visual_token_counts(inputs["pixel_values"], inputs.get("image_sizes"))

    def reference(self, inputs, new_tokens=NEW, original_positions=False):
        """The hand-built answer to one unpadded prompt."""
        images = []
        for number, pixels in enumerate(inputs["pixel_values"]):
            size = inputs["image_sizes"][number] if "image_sizes" in inputs else None
            if size is not None:
                pixels = pixels[: self.tiles(size)]
            tokens, placeholders = visual_tokens(self.stock, pixels, self.budget, size, self.tile_mode)
            images.append((tokens, placeholders, self.counts(inputs)[0][number]))
        return greedy(self.stock, inputs["input_ids"][0], images, new_tokens, original_positions)

    def tiles(self, size):
        rows, columns = self.model.model.tile_grid(size)
        return 1 + rows * columns

    def shortened(self, inputs):
        """The same prompts as a processor that knows the budget would write them (one image or none a row)."""
        _, kept = self.counts(inputs)
        image = self.model.config.image_token_id
        rows, kept = [], list(kept)
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            ids = ids[mask.bool()].tolist()
            if image in ids:
                first, count = ids.index(image), ids.count(image)
                ids = ids[:first] + [image] * kept.pop(0) + ids[first + count :]
            rows.append(ids)
        width, pad = max(map(len, rows)), self.processor.tokenizer.pad_token_id
        short = dict(inputs)
        short["input_ids"] = torch.tensor([[pad] * (width - len(ids)) + ids for ids in rows])
        short["attention_mask"] = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows])
        return short


CASES = ("llava", "llava-mistral", "next-paper", "next-native", "next-mistral")


@pytest.fixture(scope="session")
def cases(tiny_llava_repo, tiny_llava_next_repo, tmp_path_factory, photo):
    folder = tmp_path_factory.mktemp("mistral")
    mistral = write_tiny_llava(folder / "llava", image_size=112, text_model="mistral")
    next_mistral = write_tiny_llava_next(folder / "next", image_size=56, text_model="mistral")
    llava, next_ = LlavaForConditionalGeneration, LlavaNextForConditionalGeneration
    return {
        "llava": Case("llava", str(tiny_llava_repo), llava, 9, photo, {}),
        "llava-mistral": Case("llava-mistral", str(mistral), llava, 6, photo, {}),
        "next-paper": Case("next-paper", str(tiny_llava_next_repo), next_, 5, photo, {"tile_mode": "paper"}),
        "next-native": Case("next-native", str(tiny_llava_next_repo), next_, 5, photo, {"tile_mode": "native"}),
        "next-mistral": Case("next-mistral", str(next_mistral), next_, 4, photo, {"tile_mode": "native"}),
    }


@pytest.fixture(params=CASES)
def case(request, cases):
    case = cases[request.param]
    before = dict(case.model.config.vispruner_config)
    yield case
    case.model.config.vispruner_config = before


def generate(model, inputs, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(**inputs, **options)


def answers(model, inputs, **options):
    return generate(model, inputs, **options)[:, inputs["input_ids"].shape[1] :]


class TestKeepingAll:
    @pytest.mark.parametrize("how", [{"method": "none"}, {"visual_token_num": 64}, {"keep_ratio": 1.0}])
    def test_logits_and_generations_equal_stock_bit_for_bit(self, case, how):
        case.model.set_vispruner_config(**how)
        if case.tile_mode == "paper" and how != {"method": "none"}:
            pytest.skip("the paper's tile mode packs differently from stock even when every token is kept")
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

    @pytest.mark.parametrize("method", [m for m in vispruner.SELECTORS if m != "vispruner"])
    def test_every_registered_selector_runs(self, case, method):
        inputs = case.inputs(ONE, case.pictures[:1])
        case.model.set_vispruner_config(method=method, seed=3)
        first = answers(case.model, inputs)
        assert torch.equal(first, answers(case.model, inputs))


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
        assert torch.equal(full_logits, short_logits)
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

    def test_an_image_without_placeholder_and_the_reverse_raise(self, case):
        image, text = case.inputs(ONE, case.pictures[:1]), case.inputs(NONE)
        pixels = {name: image[name] for name in ("pixel_values", "image_sizes") if name in image}
        for call in (case.model, case.model.generate):
            with pytest.raises(ValueError, match="put one <image> per image"):
                call(**text, **pixels)
            with pytest.raises(ValueError, match="there is no image"):
                call(input_ids=image["input_ids"], attention_mask=image["attention_mask"])

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
            width = batch.logits.shape[1]
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


class TestGenerationModes:
    def greedy_reference(self, case, inputs):
        return answers(case.model, inputs, eos_token_id=None)

    def test_beams_of_one_image_per_row(self, case):
        inputs = case.inputs([ONE, NONE], case.pictures[:1])
        result = answers(case.model, inputs, num_beams=3, num_return_sequences=2, eos_token_id=None)
        short = answers(case.model, case.shortened(inputs), num_beams=3, num_return_sequences=2, eos_token_id=None)
        assert result.shape == (4, NEW)
        assert torch.equal(result, short)
        single = answers(
            case.model, case.inputs(ONE, case.pictures[:1]), num_beams=3, num_return_sequences=2, eos_token_id=None
        )
        assert torch.equal(result[:2], single)

    def test_beams_of_uneven_image_counts(self, case):
        inputs = case.inputs([TWO, ONE], case.pictures)
        if not GENERATE_ENCODES_ONCE:
            with pytest.raises(ValueError, match="upgrade transformers"):
                answers(case.model, inputs, num_beams=2)
            return
        result = answers(case.model, inputs, num_beams=2, eos_token_id=None)
        for row, (text, chosen) in enumerate([(TWO, case.pictures[:2]), (ONE, case.pictures[2:])]):
            assert torch.equal(
                result[row], answers(case.model, case.inputs(text, chosen), num_beams=2, eos_token_id=None)[0]
            )

    def test_sampling_is_reproducible_and_returns_several_sequences(self, case):
        inputs = case.inputs(ONE, case.pictures[:1])
        draws = []
        for prompt in (inputs, inputs, case.shortened(inputs)):
            torch.manual_seed(0)
            draws.append(answers(case.model, prompt, do_sample=True, num_return_sequences=3, eos_token_id=None))
        assert draws[0].shape == (3, NEW)
        assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])

    def test_streamers_see_the_full_prompt_and_every_new_token(self, case):
        class Recorder:
            def __init__(self):
                self.values, self.ended = [], False

            def put(self, value):
                self.values.append(value)

            def end(self):
                self.ended = True

        inputs, recorder = case.inputs(ONE, case.pictures[:1]), Recorder()
        result = generate(case.model, inputs, streamer=recorder)
        assert torch.equal(recorder.values[0], inputs["input_ids"])
        assert torch.cat([value.reshape(-1) for value in recorder.values]).tolist() == result[0].tolist()
        assert recorder.ended

    def test_a_text_streamer_prints_the_answer(self, case, capsys):
        inputs = case.inputs(ONE, case.pictures[:1])
        result = generate(case.model, inputs, streamer=TextStreamer(case.processor.tokenizer, skip_prompt=True))
        answer = case.processor.tokenizer.decode(result[0, inputs["input_ids"].shape[1] :])
        assert capsys.readouterr().out.strip() == answer.strip()

    def test_max_length_counts_the_callers_prompt(self, case):
        inputs = case.inputs([ONE, NONE], case.pictures[:1])
        prompt = inputs["input_ids"].shape[1]
        for options in ({"max_length": prompt + 5}, {"generation_config": self.config(case, max_length=prompt + 5)}):
            result = case.model.generate(**inputs, do_sample=False, eos_token_id=None, **options)
            assert result.shape[1] == prompt + 5
        result = case.model.generate(**inputs, do_sample=False, min_length=prompt + 4, max_length=prompt + 6)
        assert prompt + 4 <= result.shape[1] <= prompt + 6

    @staticmethod
    def config(case, **changes):
        values = {**case.model.generation_config.to_dict(), **changes}
        return type(case.model.generation_config).from_dict(values)

    def test_static_cache(self, case):
        inputs = case.inputs(ONE, case.pictures[:1])
        result = generate(
            case.model,
            inputs,
            cache_implementation="static",
            eos_token_id=None,
            disable_compile=True,
            return_dict_in_generate=True,
        )
        assert torch.equal(result.sequences[:, inputs["input_ids"].shape[1] :], self.greedy_reference(case, inputs))
        assert isinstance(result.past_key_values, StaticCache)
        pruned = inputs["input_ids"].shape[1] - sum(case.counts(inputs)[0]) + sum(case.counts(inputs)[1])
        assert result.past_key_values.layers[0].max_cache_len <= pruned + NEW

    def test_without_a_cache(self, case):
        inputs = case.inputs(ONE, case.pictures[:1])
        result = answers(case.model, inputs, use_cache=False, eos_token_id=None)
        assert torch.equal(result, self.greedy_reference(case, inputs))

    def test_prompt_lookup_decoding(self, case):
        inputs = case.inputs(ONE, case.pictures[:1])
        result = answers(case.model, inputs, prompt_lookup_num_tokens=3, eos_token_id=None)
        assert torch.equal(result, self.greedy_reference(case, inputs))

    def test_assisted_decoding_by_a_pruned_assistant(self, case):
        inputs = case.inputs(ONE, case.pictures[:1])
        assistant = vispruner.load(case.repo, visual_token_num=case.budget, **case.options).eval()
        result = answers(case.model, inputs, assistant_model=assistant, eos_token_id=None)
        assert torch.equal(result, self.greedy_reference(case, inputs))

    def test_assisted_decoding_by_a_language_model(self, case):
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        assistant = AutoModelForCausalLM.from_config(case.model.config.text_config).eval()
        assistant.generation_config.pad_token_id = case.model.generation_config.pad_token_id
        inputs = case.inputs(ONE, case.pictures[:1])
        if not GENERATE_ENCODES_ONCE:  # stock hands the pixels to the assistant, and refuses them
            with pytest.raises(ValueError, match="pixel_values"):
                answers(case.model, inputs, assistant_model=assistant)
            return
        result = answers(case.model, inputs, assistant_model=assistant, eos_token_id=None)
        assert torch.equal(result, self.greedy_reference(case, inputs))

    def test_repetition_penalty(self, case):
        """Below 1 it rewards the prompt's own tokens, which a random model would not repeat by itself."""
        inputs = case.inputs(ONE, case.pictures[:1])
        full, short = (
            answers(case.model, prompt, repetition_penalty=0.05, eos_token_id=None)
            for prompt in (inputs, case.shortened(inputs))
        )
        assert torch.equal(full, short)
        assert not torch.equal(full, self.greedy_reference(case, inputs))

    def test_chunked_prefill(self, case):
        inputs = case.inputs(ONE, case.pictures[:1])
        if not GENERATE_ENCODES_ONCE:
            with pytest.raises(ValueError, match="prefill_chunk_size"):
                answers(case.model, inputs, prefill_chunk_size=6)
            return
        result = answers(case.model, inputs, prefill_chunk_size=6, eos_token_id=None)
        assert torch.equal(result, self.greedy_reference(case, inputs))

    def test_the_callers_processors_and_criteria_see_the_full_prompt(self, case):
        inputs = case.inputs(ONE, case.pictures[:1])
        prompt = inputs["input_ids"]
        seen = []

        class Record(LogitsProcessor):
            def __call__(self, input_ids, scores):
                seen.append(("processor", input_ids))
                return scores

        class StopAfterThree(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                seen.append(("criterion", input_ids))
                done = input_ids.shape[1] >= prompt.shape[1] + 3
                return torch.full((input_ids.shape[0],), done, device=input_ids.device)

        def every_token(row, input_ids):
            seen.append(("prefix", input_ids[None]))
            return list(range(case.model.config.text_config.vocab_size))

        result = answers(
            case.model,
            inputs,
            eos_token_id=None,
            logits_processor=LogitsProcessorList([Record()]),
            stopping_criteria=StoppingCriteriaList([StopAfterThree()]),
            prefix_allowed_tokens_fn=every_token,
        )
        assert result.shape[1] == 3
        assert {kind for kind, _ in seen} == {"processor", "criterion", "prefix"}
        assert all(torch.equal(ids[:, : prompt.shape[1]], prompt) for _, ids in seen)

    def test_ids_as_first_argument(self, case):
        inputs = dict(case.inputs(ONE, case.pictures[:1]))
        expected = generate(case.model, inputs)
        ids = inputs.pop("input_ids")
        assert torch.equal(case.model.generate(ids, max_new_tokens=NEW, do_sample=False, **inputs), expected)

    def test_inputs_embeds_none_is_ignored(self, case):
        inputs = case.inputs(ONE, case.pictures[:1])
        assert torch.equal(generate(case.model, inputs, inputs_embeds=None), generate(case.model, inputs))


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

    def test_a_full_length_mask_on_a_shortened_cache_raises(self, case):
        inputs = case.inputs(ONE, case.pictures[:1])
        with torch.no_grad():
            cache = case.model(**inputs, use_cache=True).past_key_values
            mask = torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.long)
            with pytest.raises(ValueError, match="leave out the columns"):
                case.model(input_ids=torch.tensor([[5]]), attention_mask=mask, past_key_values=cache)


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

    @pytest.mark.parametrize("policy", ["renumber", "original"])
    @pytest.mark.parametrize("with_pixels", [True, False])
    def test_from_a_returned_cache_equals_starting_again(self, case, policy, with_pixels):
        if policy == "original" and case.tile_mode == "paper":
            pytest.skip("refused: padding patches have no original position")
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


class TestPositions:
    @pytest.fixture
    def original(self, case):
        if case.tile_mode == "paper":
            with pytest.raises(ValueError, match='needs tile_mode "native"'):
                case.model.set_vispruner_config(position_policy="original")
            pytest.skip("refused, as just checked")
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

    def test_null_means_renumber(self, case):
        inputs = case.inputs(ONE, case.pictures[:1])
        with torch.no_grad():
            expected = case.model(**inputs).logits
            case.model.set_vispruner_config(position_policy="renumber")
            assert torch.equal(case.model(**inputs).logits, expected)

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

    def test_original_needs_a_full_prompt(self, original):
        short = original.shortened(original.inputs(ONE, original.pictures[:1]))
        for call in (original.model, original.model.generate):
            with pytest.raises(ValueError, match="needs a full prompt"):
                call(**short)

    def test_position_ids_given_with_a_full_prompt_are_renumbered(self, case):
        inputs = case.inputs([ONE, NONE], case.pictures[:1])
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            given = case.model(**inputs, position_ids=positions).logits[:, -1]
            expected = [
                case.model(**case.inputs(*prompt)).logits[0, -1] for prompt in ((ONE, case.pictures[:1]), (NONE,))
            ]
        torch.testing.assert_close(given, torch.stack(expected), **TOLERANCE)

    def test_a_continuation_by_forward_needs_positions(self, original):
        inputs = original.inputs(ONE, original.pictures[:1])
        with torch.no_grad():
            cache = original.model(**inputs, use_cache=True).past_key_values
            with pytest.raises(ValueError, match="pass position_ids"):
                original.model(input_ids=torch.tensor([[5]]), past_key_values=cache)


class TestTraining:
    def test_loss_is_finite_equal_for_both_prompt_forms_and_trains(self, case):
        inputs = case.inputs([ONE, NONE], case.pictures[:1])
        short = case.shortened(inputs)
        losses = []
        for prompt in (inputs, short):
            ids, mask = prompt["input_ids"], prompt["attention_mask"]
            hidden = (ids == case.model.config.image_token_id) | (mask == 0)
            losses.append(case.model(**prompt, labels=ids.masked_fill(hidden, -100)).loss)
        assert torch.isfinite(losses[0]) and torch.equal(losses[0], losses[1])
        losses[0].backward()
        gradients = {name for name, weight in case.model.named_parameters() if weight.grad is not None}
        case.model.zero_grad()
        assert any("multi_modal_projector" in name for name in gradients)
        assert any("vision_tower" in name for name in gradients) and any("lm_head" in name for name in gradients)


class TestSignature:
    def test_forward_keeps_the_stock_parameters(self, case):
        ours, stock = (list(inspect.signature(model.forward).parameters) for model in (case.model, case.stock))
        assert [name for name in ours if name != "mm_encoder_outputs"] == [
            name for name in stock if name != "mm_encoder_outputs"
        ]

    def test_a_tensor_of_logits_to_keep_is_refused_for_a_full_prompt(self, case):
        with pytest.raises(ValueError, match="logits_to_keep"):
            case.model(**case.inputs(ONE, case.pictures[:1]), logits_to_keep=torch.tensor([0]))

    def test_a_mask_of_another_shape_is_refused_for_a_full_prompt(self, case):
        inputs = dict(case.inputs(ONE, case.pictures[:1]))
        inputs["attention_mask"] = inputs["attention_mask"][:, :-1]
        with pytest.raises(ValueError, match="attention_mask must be 2-D"):
            case.model(**inputs)
