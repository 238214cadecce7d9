"""Every way to generate, on every set-up of the LLaVA family; on other architectures see test_architectures.py."""

from __future__ import annotations

import copy
import logging
from contextlib import contextmanager

import pytest
import torch
from matrix import LLAVAS, NEW, ONE, SEVERAL, TEXT, answers, generate
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
)

from vispruner.stock_versions import SLICES_FEATURES, TAKES_FEATURES


@pytest.mark.parametrize("model", LLAVAS, indirect=True)
class TestGenerationModes:
    def greedy_reference(self, model, inputs):
        return answers(model.pruned, inputs)

    def test_beams_of_one_image_per_row(self, model):
        inputs = model.prompt(ONE, TEXT)
        result = answers(model.pruned, inputs, num_beams=3, num_return_sequences=2)
        short = answers(model.pruned, model.shortened(inputs), num_beams=3, num_return_sequences=2)
        assert result.shape == (4, NEW)
        assert torch.equal(result, short)
        single = answers(model.pruned, model.prompt(ONE), num_beams=3, num_return_sequences=2)
        assert torch.equal(result[:2], single)

    def test_beams_of_uneven_image_counts(self, model):
        inputs = model.prompt(SEVERAL, ONE)
        result = answers(model.pruned, inputs, num_beams=2)
        for row, prompt in zip(result, (SEVERAL, ONE), strict=True):
            assert torch.equal(row, answers(model.pruned, model.prompt(prompt), num_beams=2)[0])

    def test_sampling_is_reproducible_and_returns_several_sequences(self, model):
        inputs = model.prompt(ONE)
        draws = []
        for prompt in (inputs, inputs, model.shortened(inputs)):
            torch.manual_seed(0)
            draws.append(answers(model.pruned, prompt, do_sample=True, num_return_sequences=3))
        assert draws[0].shape == (3, NEW)
        assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])

    def test_streamers_see_the_full_prompt_and_every_new_token(self, model):
        class Recorder:
            def __init__(self):
                self.values, self.ended = [], False

            def put(self, value):
                self.values.append(value)

            def end(self):
                self.ended = True

        inputs, recorder = model.prompt(ONE), Recorder()
        result = generate(model.pruned, inputs, streamer=recorder)
        assert torch.equal(recorder.values[0], inputs["input_ids"])
        assert torch.cat([value.reshape(-1) for value in recorder.values]).tolist() == result[0].tolist()
        assert recorder.ended

    def test_max_length_counts_the_callers_prompt(self, model):
        inputs = model.prompt(ONE, TEXT)
        prompt = inputs["input_ids"].shape[1]
        for options in ({"max_length": prompt + 5}, {"generation_config": self.config(model, max_length=prompt + 5)}):
            result = model.pruned.generate(**inputs, do_sample=False, eos_token_id=None, **options)
            assert result.shape[1] == prompt + 5
        result = model.pruned.generate(**inputs, do_sample=False, min_length=prompt + 4, max_length=prompt + 6)
        assert prompt + 4 <= result.shape[1] <= prompt + 6

    @staticmethod
    def config(model, **changes):
        values = {**model.pruned.generation_config.to_dict(), **changes}
        return type(model.pruned.generation_config).from_dict(values)

    @pytest.mark.core
    @pytest.mark.parametrize("policy", ["renumber", "original"])
    @pytest.mark.parametrize("count", [1, 3])
    @pytest.mark.parametrize("compiled", [False, True])
    def test_a_static_cache_is_as_long_as_the_pruned_prompt(self, model, monkeypatch, policy, count, compiled):
        """Compiled, all decoding steps are one graph, and a second call compiles nothing."""
        if policy == "original" and model.row.options.get("tile_mode") == "paper":
            pytest.skip("kept padding has no original position")
        model.pruned.set_vispruner_config(position_policy=policy)
        monkeypatch.setattr(
            model.pruned, "_previous_max_cache_length", -1, raising=False
        )  # of earlier, longer prompts
        inputs = model.prompt(*([ONE] if count == 1 else [SEVERAL, ONE]))
        graphs = []
        options = self.compiling(graphs) if compiled else {"disable_compile": True}
        options |= {"cache_implementation": "static", "return_dict_in_generate": True}
        result = generate(model.pruned, inputs, **options)
        assert torch.equal(result.sequences[:, inputs["input_ids"].shape[1] :], self.greedy_reference(model, inputs))
        assert isinstance(result.past_key_values, StaticCache)
        ((full,), (kept,)) = (of.values() for of in model.counts(inputs))
        lost = [before - after for before, after in zip(full, kept, strict=True)]
        lost = lost if count == 1 else [lost[0] + lost[1], lost[2]]
        seen = inputs["attention_mask"].sum(1).tolist()
        pruned = max(columns - fewer for columns, fewer in zip(seen, lost, strict=True))
        layer = result.past_key_values.layers[0]
        assert layer.max_cache_len == layer.keys.shape[-2] == pruned + NEW - 1
        assert len(graphs) == compiled
        generate(model.pruned, inputs, **options)
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

    def test_without_a_cache(self, model):
        inputs = model.prompt(ONE)
        result = answers(model.pruned, inputs, use_cache=False)
        assert torch.equal(result, self.greedy_reference(model, inputs))

    def test_prompt_lookup_decoding(self, model):
        inputs = model.prompt(ONE)
        result = answers(model.pruned, inputs, prompt_lookup_num_tokens=3)
        assert torch.equal(result, self.greedy_reference(model, inputs))

    def test_assisted_decoding_by_a_pruned_assistant(self, model):
        inputs = model.prompt(ONE)
        assistant = copy.deepcopy(model.pruned)
        result = answers(model.pruned, inputs, assistant_model=assistant)
        assert torch.equal(result, self.greedy_reference(model, inputs))

    def test_assisted_decoding_by_a_language_model(self, model):
        torch.manual_seed(0)
        assistant = AutoModelForCausalLM.from_config(model.pruned.config.text_config).eval()
        assistant.generation_config.pad_token_id = model.pruned.generation_config.pad_token_id
        inputs = model.prompt(ONE)
        if not TAKES_FEATURES:  # stock hands the pixels to the assistant, and refuses them
            with pytest.raises(ValueError, match="pixel_values"):
                answers(model.pruned, inputs, assistant_model=assistant)
            return
        result = answers(model.pruned, inputs, assistant_model=assistant)
        assert torch.equal(result, self.greedy_reference(model, inputs))

    def test_repetition_penalty(self, model):
        """Below 1 it rewards the prompt's own tokens, which a random model would not repeat by itself."""
        inputs = model.prompt(ONE)
        full, short = (
            answers(model.pruned, prompt, repetition_penalty=0.05) for prompt in (inputs, model.shortened(inputs))
        )
        assert torch.equal(full, short)
        assert not torch.equal(full, self.greedy_reference(model, inputs))

    def test_chunked_prefill(self, model):
        inputs = model.prompt(ONE)
        if not SLICES_FEATURES:
            with pytest.raises(ValueError, match="prefill_chunk_size"):
                answers(model.pruned, inputs, prefill_chunk_size=6)
            return
        result = answers(model.pruned, inputs, prefill_chunk_size=6)
        assert torch.equal(result, self.greedy_reference(model, inputs))

    def test_the_callers_processors_and_criteria_see_the_full_prompt(self, model):
        inputs = model.prompt(ONE)
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
            return list(range(model.pruned.config.text_config.vocab_size))

        result = answers(
            model.pruned,
            inputs,
            eos_token_id=None,
            logits_processor=LogitsProcessorList([Record()]),
            stopping_criteria=StoppingCriteriaList([StopAfterThree()]),
            prefix_allowed_tokens_fn=every_token,
        )
        assert result.shape[1] == 3
        assert {kind for kind, _ in seen} == {"processor", "criterion", "prefix"}
        assert all(torch.equal(ids[:, : prompt.shape[1]], prompt) for _, ids in seen)

    def test_ids_as_first_argument(self, model):
        inputs = model.prompt(ONE)
        expected = generate(model.pruned, inputs)
        ids = inputs.pop("input_ids")
        assert torch.equal(model.pruned.generate(ids, max_new_tokens=NEW, do_sample=False, **inputs), expected)

    def test_inputs_embeds_none_is_ignored(self, model):
        inputs = model.prompt(ONE)
        assert torch.equal(generate(model.pruned, inputs, inputs_embeds=None), generate(model.pruned, inputs))

    def test_options_that_are_none_mean_what_they_mean_to_stock(self, model):
        """None switches an option off; it does not mean that it was not given."""
        inputs = model.prompt(ONE)
        never_ending = answers(model.pruned, inputs)[0]
        ends = [int(never_ending[2])]
        assert answers(model.pruned, inputs, eos_token_id=ends).shape[1] <= 3
        model.pruned.generation_config.eos_token_id, before = ends, model.pruned.generation_config.eos_token_id
        try:
            assert torch.equal(answers(model.pruned, inputs)[0], never_ending)
        finally:
            model.pruned.generation_config.eos_token_id = before

    def test_end_tokens_may_be_a_tensor(self, model):
        inputs = model.prompt(ONE, SEVERAL, TEXT)
        expected = answers(model.pruned, inputs, eos_token_id=[2, 3])
        del inputs["attention_mask"]
        assert torch.equal(answers(model.pruned, inputs, eos_token_id=torch.tensor([2, 3])), expected)

    def test_a_callers_hook_replaces_stocks_own_of_the_same_type(self, model):
        inputs = model.prompt(ONE)
        prompt = inputs["input_ids"].shape[1]
        criteria = StoppingCriteriaList([MaxLengthCriteria(prompt + 6)])
        result = answers(model.pruned, inputs, max_new_tokens=3, stopping_criteria=criteria)
        assert result.shape[1] == 6
        once = answers(model.pruned, inputs, repetition_penalty=0.7)
        processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(0.7)])
        both = answers(model.pruned, inputs, repetition_penalty=0.7, logits_processor=processors)
        assert torch.equal(once, both)

    def test_a_generation_config_alone_brings_no_warning_and_stays_as_it_was(self, model, caplog):
        inputs = model.prompt(ONE)
        prompt = inputs["input_ids"].shape[1]
        config = self.config(model, max_length=prompt + 4, do_sample=False)
        before = config.to_dict()
        for which in (model.pruned, model.stock):
            caplog.clear()
            with self.heard(caplog):
                assert which.generate(**inputs, generation_config=config).shape[1] <= prompt + 4
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
