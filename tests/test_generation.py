"""Every way to generate, on every pruned architecture."""

from __future__ import annotations

import logging
from contextlib import contextmanager

import pytest
import torch
from cases import NEW, NONE, ONE, TWO, answers, generate
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

import vispruner
from vispruner.stock_versions import SLICES_FEATURES, TAKES_FEATURES


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

    @pytest.mark.parametrize("policy", ["renumber", "original"])
    @pytest.mark.parametrize("count", [1, 3])
    @pytest.mark.parametrize("compiled", [False, True])
    def test_a_static_cache_is_as_long_as_the_pruned_prompt(self, case, monkeypatch, policy, count, compiled):
        """Compiled, all decoding steps are one graph, and a second call compiles nothing."""
        if policy == "original" and case.tile_mode == "paper":
            pytest.skip("kept padding has no original position")
        case.model.set_vispruner_config(position_policy=policy)
        monkeypatch.setattr(case.model, "_previous_max_cache_length", -1, raising=False)  # of earlier, longer prompts
        inputs = case.inputs([ONE] if count == 1 else [TWO, ONE], case.pictures[:count])
        graphs = []
        options = self.compiling(graphs) if compiled else {"disable_compile": True}
        options |= {"cache_implementation": "static", "return_dict_in_generate": True, "eos_token_id": None}
        result = generate(case.model, inputs, **options)
        assert torch.equal(result.sequences[:, inputs["input_ids"].shape[1] :], self.greedy_reference(case, inputs))
        assert isinstance(result.past_key_values, StaticCache)
        lost = [full - kept for full, kept in zip(*case.counts(inputs), strict=True)]
        lost = lost if count == 1 else [lost[0] + lost[1], lost[2]]
        pruned = max(int(seen) - fewer for seen, fewer in zip(inputs["attention_mask"].sum(1), lost, strict=True))
        layer = result.past_key_values.layers[0]
        assert layer.max_cache_len == layer.keys.shape[-2] == pruned + NEW - 1
        assert len(graphs) == compiled
        generate(case.model, inputs, **options)
        assert len(graphs) == compiled

    @staticmethod
    def compiling(graphs):
        """Options that compile every decoding step as one graph, into which no Python may break."""

        def backend(graph, example_inputs):
            graphs.append(graph)
            return graph.forward

        torch.compiler.reset()
        config = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend=backend)
        config._compile_all_devices = True
        return {"compile_config": config}

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
        torch.manual_seed(0)
        assistant = AutoModelForCausalLM.from_config(case.model.config.text_config).eval()
        assistant.generation_config.pad_token_id = case.model.generation_config.pad_token_id
        inputs = case.inputs(ONE, case.pictures[:1])
        if not TAKES_FEATURES:  # stock hands the pixels to the assistant, and refuses them
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
        if not SLICES_FEATURES:
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

    def test_options_that_are_none_mean_what_they_mean_to_stock(self, case):
        """None switches an option off; it does not mean that it was not given."""
        inputs = case.inputs(ONE, case.pictures[:1])
        never_ending = answers(case.model, inputs, eos_token_id=None)[0]
        ends = [int(never_ending[2])]
        assert answers(case.model, inputs, eos_token_id=ends).shape[1] <= 3
        case.model.generation_config.eos_token_id, before = ends, case.model.generation_config.eos_token_id
        try:
            assert torch.equal(answers(case.model, inputs, eos_token_id=None)[0], never_ending)
        finally:
            case.model.generation_config.eos_token_id = before

    def test_end_tokens_may_be_a_tensor(self, case):
        inputs = dict(case.inputs([ONE, TWO, NONE], case.pictures))
        expected = answers(case.model, inputs, eos_token_id=[2, 3])
        del inputs["attention_mask"]
        assert torch.equal(answers(case.model, inputs, eos_token_id=torch.tensor([2, 3])), expected)

    def test_a_callers_hook_replaces_stocks_own_of_the_same_type(self, case):
        inputs = case.inputs(ONE, case.pictures[:1])
        prompt = inputs["input_ids"].shape[1]
        criteria = StoppingCriteriaList([MaxLengthCriteria(prompt + 6)])
        result = answers(case.model, inputs, max_new_tokens=3, stopping_criteria=criteria, eos_token_id=None)
        assert result.shape[1] == 6
        once = answers(case.model, inputs, repetition_penalty=0.7, eos_token_id=None)
        processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(0.7)])
        both = answers(case.model, inputs, repetition_penalty=0.7, logits_processor=processors, eos_token_id=None)
        assert torch.equal(once, both)

    def test_a_generation_config_alone_brings_no_warning_and_stays_as_it_was(self, case, caplog):
        inputs = case.inputs(ONE, case.pictures[:1])
        prompt = inputs["input_ids"].shape[1]
        config = self.config(case, max_length=prompt + 4, do_sample=False)
        before = config.to_dict()
        for model in (case.model, case.stock):
            caplog.clear()
            with self.heard(caplog):
                assert model.generate(**inputs, generation_config=config).shape[1] <= prompt + 4
            assert not caplog.records
        assert config.to_dict() == before

    @staticmethod
    @contextmanager
    def heard(caplog):
        """Let caplog hear transformers, whose logger does not pass its records on."""
        logger = logging.getLogger("transformers")
        logger.addHandler(caplog.handler)
        try:
            yield
        finally:
            logger.removeHandler(caplog.handler)
