"""Visual tokens that leave between decoder layers, on every architecture, against a full-length masked reference.

The reference is the stock model with eager attention: nothing is shortened, but from a stage's layer on nobody attends
to what was dropped. What is dropped is computed from the attention maps that stock returns.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import ONE, ROWS, SEVERAL, TEXT, TOKEN_TYPES, TOLERANCE, Model, generate, lent, made
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import QuantizedLayer

from vispruner.choosing import watch_choices
from vispruner.prompt_reading import FEATURES
from vispruner.pruning_plan import layer_counts, most_before, stage_counts, whole_counts
from vispruner.selectors import DECODER_METHODS, SELECTORS
from vispruner.stock_versions import CACHE

DEPTH, FIRST = 6, 3  # FIRST: the first layer that Qwen3-VL lets visual tokens leave before
BATCH = [ONE, SEVERAL, TEXT]
PLACES = {name: SELECTORS[name].then or SELECTORS[name].place for name in DECODER_METHODS}
RENUMBERS = tuple(name for name, place in PLACES.items() if getattr(place, "positions", None) == "renumber")
TWO_PLACES = tuple(name for name in DECODER_METHODS if SELECTORS[name].then is not None)
ANYWHERE = ("vispruner", "divprune", "scope", "cls_attention")  # methods for the encoder that a decoder layer can run
HAS_AXES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

pytestmark = pytest.mark.filterwarnings("ignore:.*model-agnostic default.*")


@pytest.fixture(scope="session")
def deep_models() -> dict[str, Model]:
    return {}


@pytest.fixture
def deep(
    request: pytest.FixtureRequest, deep_models: dict[str, Model], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Model]:
    """A row's models with six decoder layers."""
    name = request.param
    if name not in deep_models:
        config = ROWS[name].config()
        text = config.get_text_config()
        if getattr(text, "layer_types", None):
            text.layer_types = [kind for kind, _ in zip(itertools.cycle(text.layer_types), range(DEPTH), strict=False)]
        text.num_hidden_layers = DEPTH
        deep_models[name] = made(name, tmp_path_factory.mktemp(name) / "deep", config, keep_ratio=0.5)
    with torch.set_grad_enabled("gradients" in request.keywords):
        yield from lent(deep_models[name])


every_model = pytest.mark.parametrize("deep", ROWS, indirect=True)
some_models = pytest.mark.parametrize("deep", ["llava", "qwen2_5_vl", "gemma3"], indirect=True)


def use(model: Model, method: str, **options: Any) -> Any:
    """Let the model prune by `method`, at layers that every architecture allows."""
    stages = len(PLACES[method].layers(32)) if method in PLACES else 1
    if not {"visual_token_num", "keep_ratio", "stage_token_nums"} & set(options):
        options["keep_ratio"] = 0.6 if stages == 1 or method in RENUMBERS else 0.7
    is_too_early = method in ANYWHERE or (method in PLACES and min(PLACES[method].layers(DEPTH)) < FIRST)
    if is_too_early and method not in RENUMBERS:
        options.setdefault("prune_layers", [FIRST + stage for stage in range(stages)])
    model.pruned.set_vispruner_config(method=method, **options)
    return model.pruned


def prompt_for(model: Model, method: str, *prompts: list) -> dict[str, Any]:
    """A prompt, with what a call has to say for a method that is told by what it ranks: here numbers out of order."""
    inputs = model.prompt(*prompts)
    if SELECTORS[method].is_told:
        most = int(visual(model, inputs).sum(1).max())
        inputs["visual_importance"] = (torch.arange(most) * 37 % 101).expand(len(prompts), -1)
    return inputs


def methods_of(model: Model) -> list[str]:
    """All methods that prune in the language model and that this one can have; others are refused by name."""
    usable = []
    base = model.pruned.model
    lacked = {"cls_feature": not base.has_cls_token, "places": not base.images_are_grids}
    for method in DECODER_METHODS:
        if lacking := [name for name in SELECTORS[method].needs if lacked.get(name)]:
            with pytest.raises(ValueError, match=f'method "{method}" needs {lacking[0]}, which .* cannot give'):
                use(model, method)
        elif method not in RENUMBERS or model.row.model_type not in HAS_AXES:
            usable.append(method)
    return usable


def visual(model: Model, inputs: dict[str, Any]) -> torch.Tensor:
    return torch.isin(inputs["input_ids"], torch.tensor(model.pruned.model.placeholder_ids))


def lengths(cache: Any) -> list[int]:
    return [int(cache.get_seq_length(layer)) for layer in range(DEPTH)]


def seen_at(cache: Any, inputs: dict[str, Any]) -> dict[int, torch.Tensor]:
    """By stage's layer, the columns (B, S) that its cache holds."""
    nothing = torch.zeros_like(inputs["attention_mask"], dtype=torch.bool)
    return {stage.layer: nothing.scatter(1, stage.columns, stage.seen) for stage in cache.vispruner_stages}


@contextmanager
def dropping(stock: Any, held: dict[int, torch.Tensor]) -> Iterator[None]:
    """Let nobody attend, from each layer on, to columns that it does not hold: nothing is shortened."""
    base = stock.model
    text = base.text_model if hasattr(base, "text_model") else base.language_model

    def mask_of(dropped: torch.Tensor) -> Callable:
        def hook(_: Any, args: tuple, kwargs: dict) -> tuple:
            width, lowest = args[0].shape[1], torch.finfo(args[0].dtype).min
            mask = kwargs["attention_mask"].expand(len(dropped), -1, -1, -1)
            blocked = dropped[:, None, None] & ~torch.eye(width, dtype=torch.bool)
            return args, {**kwargs, "attention_mask": mask.masked_fill(blocked, lowest)}

        return hook

    handles = []
    for number, layer in enumerate(text.layers):
        stages = [columns for first, columns in held.items() if first <= number]
        if stages:
            handles.append(layer.register_forward_pre_hook(mask_of(~stages[-1]), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def behind_the_encoder_alone(pruned: Any, method: str) -> Iterator[None]:
    """Let a method of two places leave out the second."""
    with pytest.MonkeyPatch.context() as patch:
        alone = pruned.model.encoder_options.to_dict()
        patch.setitem(SELECTORS, method, SELECTORS[method]._replace(then=None))
        patch.setattr(pruned.config, "vispruner_config", alone)
        yield


def rescored(model: Any, inputs: dict[str, Any], sequences: torch.Tensor) -> torch.Tensor:
    """The logits of an answer, computed in one pass over prompt and answer: (B, new, vocabulary)."""
    prompt, new = inputs["input_ids"].shape[1], sequences.shape[1] - inputs["input_ids"].shape[1]
    mask = F.pad(inputs["attention_mask"], (0, new), value=1)
    further = {name: F.pad(inputs[name], (0, new)) for name in TOKEN_TYPES & set(inputs)}
    if "mm_token_type_ids" not in inputs:
        further["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    full = {**inputs, **further, "input_ids": sequences, "attention_mask": mask}
    return model(**full, prompt_lengths=torch.full((len(mask),), prompt)).logits[:, prompt - 1 : -1]


def answered(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    return generate(model, inputs, return_dict_in_generate=True, output_logits=True, **options)


class TestAgainstStock:
    @every_model
    def test_fastv_keeps_what_stocks_attention_says_and_computes_as_if_the_rest_were_masked(self, deep: Model) -> None:
        inputs = deep.prompt(*BATCH)
        outputs = use(deep, "fastv")(**inputs)
        held = seen_at(outputs[CACHE], inputs)
        stock = deep.stock(**inputs, output_attentions=True)
        attention = stock.attentions[FIRST - 1].mean(1)[:, -1]
        for row, (is_visual, stays) in enumerate(zip(visual(deep, inputs), held[FIRST], strict=True)):
            columns = is_visual.nonzero()[:, 0]
            count = int((is_visual & stays).sum())
            best = columns[attention[row, columns].argsort(descending=True, stable=True)[:count]]
            assert set(best.tolist()) == set((is_visual & stays).nonzero()[:, 0].tolist())
            assert count < len(columns) or not len(columns)
        with dropping(deep.stock, held):
            expected = deep.stock(**inputs).logits
        assert outputs.logits.shape == expected.shape
        torch.testing.assert_close(outputs.logits[held[FIRST]], expected[held[FIRST]], rtol=1e-4, atol=2e-4)
        assert (stock.logits[:2, -1] - expected[:2, -1]).abs().max() > 0.01  # dropping changes something

    @every_model
    def test_three_stages_compute_as_if_the_rest_were_masked(self, deep: Model) -> None:
        inputs = deep.prompt(*BATCH)
        outputs = use(deep, "cls_attention", prune_layers=[FIRST, FIRST + 1, FIRST + 2])(**inputs)
        held = seen_at(outputs[CACHE], inputs)
        assert len(held) == 3
        with dropping(deep.stock, held):
            expected = deep.stock(**inputs).logits
        last = list(held.values())[-1]
        torch.testing.assert_close(outputs.logits[last], expected[last], rtol=1e-4, atol=2e-4)

    @every_model
    @pytest.mark.parametrize("method", TWO_PLACES)
    def test_a_method_of_two_places_computes_as_if_the_rest_were_masked(self, deep: Model, method: str) -> None:
        if method not in methods_of(deep):
            return
        inputs = deep.prompt(*BATCH)
        pruned = use(deep, method)
        outputs = pruned(**inputs)
        stages = outputs[CACHE].vispruner_stages
        assert [stage.layer for stage in stages] == pruned.model.decoder_layers
        budget = pruned.model.encoder_options
        assert budget.method == method and budget.keep_ratio < 1
        nothing = torch.zeros(len(BATCH), stages[0].width, dtype=torch.bool)
        held = {stage.layer: nothing.scatter(1, stage.columns, stage.seen) for stage in stages}
        text = ~visual(deep, inputs) & inputs["attention_mask"].bool()
        with behind_the_encoder_alone(pruned, method), dropping(pruned, held):
            expected = pruned(**inputs).logits
        torch.testing.assert_close(outputs.logits[text], expected[text], rtol=1e-4, atol=2e-4)
        with behind_the_encoder_alone(pruned, method):
            assert (outputs.logits[:2, -1] - pruned(**inputs).logits[:2, -1]).abs().max() > 1e-3

    @every_model
    def test_what_the_encoder_ranked_by_ranks_in_layers_too(self, deep: Model) -> None:
        options = {"stage_shares": [0.6, 0.4], "cell": 2, "global_threshold": 1.1}
        pruned = use(deep, "vflowopt", keep_ratio=0.6, method_options=options)
        for prompt in deep.prompts():
            if not any(visual(deep, inputs := deep.prompt(prompt)).flatten()):
                continue
            features, choices = pruned.model.encoded(inputs)[FEATURES], []
            said = torch.cat([told for given in features.values() for told in given.told])
            with watch_choices(choices.append):
                cache = pruned(**inputs)[CACHE]
            stages = [choice for choice in choices if choice.layer is not None]
            assert [choice.layer for choice in stages] == [stage.layer for stage in cache.vispruner_stages]
            assert len(stages) == 2 and len(said.unique()) > 1
            for choice in stages:
                (ranks,), (kept,) = choice.tokens.saliency, choice.selection.indices
                assert torch.equal(ranks, said)
                assert torch.equal(kept, ranks.argsort(descending=True, stable=True)[: len(kept)].sort().values)
                said = said[kept]

    @pytest.mark.parametrize("deep", ["llava"], indirect=True)
    def test_the_map_is_what_stocks_attention_says(self, deep: Model) -> None:
        inputs, threshold = deep.prompt(ONE), 1.05
        options = {"global_threshold": threshold, "cell": 3}
        pruned = use(deep, "vflowopt", keep_ratio=0.4, method_options=options, attention_layer=0)
        (attention, *_) = deep.stock.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
        attention = attention.mean(1)[0]
        received = attention.mean(0)
        is_global = received > threshold * received.mean()
        assert 0 < int(is_global.sum()) < len(received)
        expected = attention[is_global].mean(0)[1:]
        found = pruned.model.get_image_features(inputs["pixel_values"])
        torch.testing.assert_close(found.saliency[0], expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.told[0], expected[found.kept_indices[0]], rtol=1e-4, atol=1e-6)

    @every_model
    def test_every_method_in_layers_computes_as_if_the_rest_were_masked(self, deep: Model) -> None:
        inputs = deep.prompt(*BATCH)
        for method in methods_of(deep):
            if method in TWO_PLACES or method in RENUMBERS:  # tests of their own; those whose tokens move
                continue
            outputs = use(deep, method)(**prompt_for(deep, method, *BATCH))
            held = seen_at(outputs[CACHE], inputs)
            with dropping(deep.stock, held):
                expected = deep.stock(**inputs).logits
            last = list(held.values())[-1]
            torch.testing.assert_close(outputs.logits[last], expected[last], rtol=1e-4, atol=2e-4, msg=method)

    @every_model
    def test_places_are_those_of_the_grids_that_images_are(self, deep: Model, monkeypatch: Any) -> None:
        if "topv" not in methods_of(deep):
            return
        told = []
        stock = SELECTORS["topv"].function

        def select(features: Any, saliency: Any, count: int, layer_inputs: Any, places: Any) -> Any:
            told.extend(places)
            return stock(features, saliency, count, layer_inputs, places)

        monkeypatch.setitem(SELECTORS, "topv", SELECTORS["topv"]._replace(function=select))
        inputs = deep.prompt(SEVERAL)
        use(deep, "topv")(**inputs)
        (places,), counts = told, deep.counts(inputs)[0][placeholder_of(deep)]
        assert places[:, 0].int().bincount().tolist() == counts
        for image, count in enumerate(counts):
            own = places[places[:, 0] == image, 1:]
            rows, columns = (len(own[:, axis].unique()) for axis in (0, 1))
            assert rows * columns == count and (rows == columns or deep.row.model_type in HAS_AXES)
            assert torch.equal(own, own[(own[:, 0] * 100 + own[:, 1]).argsort()])  # raster order
            torch.testing.assert_close(own.sum(0), torch.zeros(2), atol=1e-5, rtol=0)
            torch.testing.assert_close((own[-1] - own[0]).norm(), torch.tensor(1.0))

    @pytest.mark.core
    @every_model
    def test_every_method_with_a_budget_that_keeps_all_is_stock_bit_for_bit(self, deep: Model) -> None:
        inputs = deep.prompt(*BATCH)
        expected = deep.stock(**inputs).logits
        for method in methods_of(deep):
            pruned = use(deep, method, keep_ratio=1.0, tile_mode="native")  # "paper" leaves newlines out, in any case
            assert torch.equal(pruned(**prompt_for(deep, method, *BATCH)).logits, expected), method

    @every_model
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_a_budget_that_keeps_all_is_stock_bit_for_bit(self, deep: Model, attention: str) -> None:
        inputs = deep.prompt(*BATCH)
        pruned = use(deep, "fastv", keep_ratio=1.0)
        models = [deep.stock, pruned]
        try:
            for model in models:
                model.set_attn_implementation(attention)
            assert torch.equal(pruned(**inputs).logits, deep.stock(**inputs).logits)
            assert torch.equal(generate(pruned, inputs), generate(deep.stock, inputs))
        finally:
            for model in models:
                model.set_attn_implementation("eager")

    @every_model
    def test_shapes_are_those_of_stock(self, deep: Model) -> None:
        inputs = deep.prompt(*BATCH)
        ours = use(deep, "fastv")(**inputs, output_hidden_states=True, output_attentions=True)
        stock = deep.stock(**inputs, output_hidden_states=True, output_attentions=True)
        assert [state.shape for state in ours.hidden_states] == [state.shape for state in stock.hidden_states]
        assert [layer.shape for layer in ours.attentions] == [layer.shape for layer in stock.attentions]
        assert deep.pruned.model(**inputs).last_hidden_state.shape == stock.hidden_states[-1].shape


class TestGenerate:
    @pytest.mark.core
    @every_model
    def test_every_row_of_a_batch_answers_as_alone_and_as_it_is_scored(self, deep: Model) -> None:
        name = deep.row.model_type
        of_its_own = (m for m in PLACES if SELECTORS[m].experimental or SELECTORS[m].is_told)
        few = {"fastv", "visiondrop", "vflowopt", *of_its_own}
        methods = [method for method in methods_of(deep) if method in few]
        if name in ("llava", "qwen2_5_vl", "gemma3"):
            methods = [*methods_of(deep), *ANYWHERE]
        for method in methods:
            pruned, inputs = use(deep, method), prompt_for(deep, method, *BATCH)
            outputs = answered(pruned, inputs)
            logits = torch.stack(outputs.logits, 1)
            for row, prompt in enumerate(BATCH):
                one = prompt_for(deep, method, prompt)
                alone = torch.stack(answered(pruned, one).logits, 1)
                torch.testing.assert_close(logits[row], alone[0], **TOLERANCE, msg=f"{method}, row {row}")
            if deep.row.model_type != "paligemma":  # whose prompts see themselves both ways, and answers do not
                scored = rescored(pruned, inputs, outputs.sequences)
                torch.testing.assert_close(logits, scored, rtol=1e-3, atol=1e-3, msg=method)

    @every_model
    def test_the_cache_of_each_layer_holds_what_is_left(self, deep: Model) -> None:
        inputs = deep.prompt(ONE)
        pruned = use(deep, "cls_attention", prune_layers=[FIRST, FIRST + 2])
        outputs = answered(pruned, inputs)
        tokens = int(visual(deep, inputs).sum())
        text = outputs.sequences.shape[1] - 1 - tokens
        (counts,) = {tuple(pruned.model.layer_counts(n)) for n in deep.counts(inputs)[0][placeholder_of(deep)]}
        images = len(deep.counts(inputs)[0][placeholder_of(deep)])
        assert lengths(outputs[CACHE]) == [text + count * images for count in counts]
        assert sum(counts) <= 0.6 * DEPTH * tokens / images

    @some_models
    @pytest.mark.parametrize(
        "how",
        [
            {"num_beams": 3},
            {"prompt_lookup_num_tokens": 3},
            {"cache_implementation": "static", "disable_compile": True},
            {"cache_implementation": "offloaded"},
            {"assistant": True},
        ],
        ids=["beams", "lookup", "static", "offloaded", "assisted"],
    )
    def test_every_way_to_generate_gives_the_same_answer(self, deep: Model, how: dict[str, Any]) -> None:
        if how == {"cache_implementation": "offloaded"} and not torch.accelerator.is_available():
            pytest.skip("an offloaded cache needs an accelerator")
        # Of these a call knows something of each row, which has beams.
        of_rows = [m for m in PLACES if "places" in SELECTORS[m].needs or SELECTORS[m].is_told]
        for method in (
            "fastv",
            "vflowopt",
            *(of_rows if "num_beams" in how else []),
            *([] if deep.row.model_type in HAS_AXES else ["pyramiddrop"]),
        ):
            pruned = use(deep, method)
            prompts = [ONE] if {"assistant", "prompt_lookup_num_tokens"} & set(how) else BATCH
            inputs = prompt_for(deep, method, *prompts)
            options = {"assistant_model": pruned} if how == {"assistant": True} else how
            answer = generate(pruned, inputs, **options)
            if "num_beams" in how:
                ones = [prompt_for(deep, method, prompt) for prompt in prompts]
                alone = [generate(pruned, one, **how)[0, -3:] for one in ones]
                assert torch.equal(answer[:, -3:], torch.stack(alone))
            else:
                assert torch.equal(answer, generate(pruned, inputs))

    @some_models
    def test_a_second_question_goes_on_with_what_the_first_left(self, deep: Model) -> None:
        pruned, inputs = use(deep, "fastv"), deep.prompt(ONE)
        first = answered(pruned, inputs)
        ids = torch.cat([first.sequences, torch.tensor([[21, 22, 23]])], dim=1)
        new = ids.shape[1] - inputs["input_ids"].shape[1]
        further = {name: F.pad(inputs[name], (0, new)) for name in TOKEN_TYPES & set(inputs)}
        later = {**inputs, **further, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        second = answered(pruned, later, **{CACHE: first[CACHE]})
        scored = pruned(**later, prompt_lengths=[inputs["input_ids"].shape[1]]).logits[:, -1]
        torch.testing.assert_close(second.logits[0], scored, **TOLERANCE)

    @some_models
    def test_encoded_images_serve_any_decoder_method(self, deep: Model) -> None:
        inputs = deep.prompt(ONE)
        for method in ("fastv", "topv", "vflowopt"):
            pruned = use(deep, method)
            names = [n for n in inputs if n not in {"input_ids", "attention_mask", *TOKEN_TYPES}]
            encoded = pruned.encode_images(**{name: inputs[name] for name in names})
            others = {name: value for name, value in inputs.items() if not name.startswith("pixel")}
            assert torch.equal(generate(pruned, others, encoded_images=encoded), generate(pruned, inputs))

    @every_model
    @pytest.mark.parametrize("method", [*TWO_PLACES, "vispruner+fastv"])
    def test_a_prompt_that_is_written_short_is_the_same_prompt(self, deep: Model, method: str) -> None:
        if method not in (*methods_of(deep), "vispruner+fastv"):
            return
        options = {"stage_token_nums": [4, 2], "prune_layers": [FIRST]} if "+" in method else {}
        inputs, pruned = deep.prompt(*BATCH), use(deep, method, **options)
        short = deep.row.shortened(inputs, deep.counts(inputs)[1])
        assert short["input_ids"].shape[1] < inputs["input_ids"].shape[1]
        wider = {name: F.pad(short[name], (2, 0)) for name in {"input_ids", "attention_mask", *TOKEN_TYPES} & {*short}}
        expected = pruned(**inputs).logits[:, -1]
        for form in (short, short | wider):
            assert torch.equal(answered(pruned, form).sequences[:, -3:], answered(pruned, inputs).sequences[:, -3:])
            outputs = pruned(**form, prompt_lengths=[form["input_ids"].shape[1]] * len(BATCH))
            torch.testing.assert_close(outputs.logits[:, -1], expected, **TOLERANCE)

    @some_models
    def test_methods_of_both_places_combine(self, deep: Model) -> None:
        inputs = deep.prompt(ONE)
        pruned = use(deep, "vispruner+fastv", stage_token_nums=[4, 2], prune_layers=[FIRST])
        outputs = answered(pruned, inputs)
        images = len(deep.counts(inputs)[0][placeholder_of(deep)])
        text = lengths(outputs[CACHE])[0] - 4 * images
        assert lengths(outputs[CACHE]) == [text + 4 * images] * FIRST + [text + 2 * images] * (DEPTH - FIRST)
        assert pruned(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
        if deep.row.model_type not in HAS_AXES:
            scored = rescored(pruned, inputs, outputs.sequences)
            torch.testing.assert_close(torch.stack(outputs.logits, 1), scored, rtol=1e-3, atol=1e-3)


def placeholder_of(model: Model) -> int:
    return model.pruned.model.placeholder_ids[0]


class TestTraining:
    @every_model
    @pytest.mark.gradients
    def test_checkpoints_change_no_gradient(self, deep: Model) -> None:
        inputs = deep.prompt(*BATCH)
        labels = inputs["input_ids"].clone()
        labels[:, :-3] = -100
        pruned = use(deep, "fastv").train()

        def gradients() -> tuple[torch.Tensor, list[torch.Tensor]]:
            pruned.zero_grad()
            loss = pruned(**inputs, labels=labels, use_cache=False).loss
            loss.backward()
            return loss, [p.grad.clone() for p in pruned.parameters() if p.grad is not None]

        try:
            plain = gradients()
            for reentrant in (False, True):
                pruned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
                loss, checkpointed = gradients()
                assert torch.equal(loss, plain[0]) and len(checkpointed) == len(plain[1])
                assert all(map(torch.equal, checkpointed, plain[1]))
        finally:
            pruned.gradient_checkpointing_disable()
            pruned.zero_grad()
            pruned.eval()

    @some_models
    def test_what_ranks_comes_before_the_labels(self, deep: Model) -> None:
        inputs = deep.prompt(ONE)
        labels = inputs["input_ids"].clone()
        labels[:, :-2] = -100
        pruned = use(deep, "fastv")
        prompt = inputs["input_ids"].shape[1] - 2
        by_labels = pruned(**inputs, labels=labels)
        told = pruned(**inputs, prompt_lengths=[prompt])
        assert torch.equal(by_labels.logits, told.logits)
        expected = F.cross_entropy(told.logits[0, prompt - 1 : -1], labels[0, prompt:])
        torch.testing.assert_close(by_labels.loss, expected)


class TestCopies:
    @some_models
    def test_a_copy_and_a_saved_model_prune_alike(self, deep: Model, tmp_path: Path) -> None:
        inputs = deep.prompt(*BATCH)
        pruned = use(deep, "fastv")
        expected = pruned(**inputs).logits
        assert torch.equal(copy.deepcopy(pruned)(**inputs).logits, expected)
        pruned.save_pretrained(tmp_path)
        again = type(pruned).from_pretrained(tmp_path, attn_implementation="eager").eval()
        assert torch.equal(again(**inputs).logits, expected)

    @some_models
    def test_another_budget_or_method_for_one_call(self, deep: Model) -> None:
        inputs = deep.prompt(ONE)
        pruned = use(deep, "fastv")
        dense = pruned(**inputs, vispruner_config={"method": "none"}).logits
        torch.testing.assert_close(dense, deep.stock(**inputs).logits, **TOLERANCE)
        by_encoder = pruned(**inputs, vispruner_config={"method": "vispruner", "keep_ratio": 0.5})
        assert not getattr(by_encoder[CACHE], "vispruner_stages", ())


class TestRefusals:
    @pytest.mark.parametrize("deep", ["llava"], indirect=True)
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"prune_layers": [0]}, "prune_layers must be null or decoder layers in rising order, from 1 on"),
            ({"prune_layers": [3, 2]}, "prune_layers must be null or decoder layers in rising order"),
            ({"prune_layers": [6]}, "prune_layers must be decoder layers from 1 to 5"),
            (
                {"stage_token_nums": [4, 8], "prune_layers": [2, 3]},
                "stage_token_nums must be null or numbers of tokens",
            ),
            (
                {"stage_token_nums": [4, 2]},
                'stage_token_nums must have 1 numbers, one for each stage of method "fastv"',
            ),
            ({"stage_token_nums": [4], "keep_ratio": 0.5}, "take out visual_token_num and keep_ratio"),
            ({"method_options": {"head": 3}}, "method \"fastv\" has no option 'head'; it has none"),
            ({"method": "dart", "method_options": {"image_pivot": 3}}, "did you mean image_pivots"),
            ({"method": "dart", "method_options": {"image_pivots": "3"}}, "image_pivots must be an integer such as 4"),
            ({"method": "dart", "method_options": {"text_pivots": 1.5}}, "text_pivots must be an integer such as 4"),
            ({"method": "fastv+vispruner"}, 'put one for the encoder there, as in "vispruner+fastv"'),
            ({"method": "image_text+fastv", "stage_token_nums": [4, 2]}, "prunes behind the encoder alone, and"),
            ({"method": "vispruner+divprune", "stage_token_nums": [4, 2]}, "only where prune_layers says"),
            ({"method": "vispruner+fastv", "keep_ratio": 0.5}, "has several stages"),
            (
                {"method": "hiprune", "prune_layers": [2], "keep_ratio": 0.5},
                "needs grid, layer_saliency, which a decoder",
            ),
            ({"method": "vispruner", "stage_token_nums": [4]}, "stage_token_nums is for methods that prune in the"),
            ({"method": "fastvv", "keep_ratio": 0.5}, "did you mean fastv"),
            ({"method": "vispruner+topv", "stage_token_nums": [4, 2]}, "needs places, which a decoder layer"),
            (
                {"method": "vflowopt", "method_options": {"stage_shares": [0.5]}},
                "stage_shares must be 2 numbers from 0 to 1, what part of the tokens before it each of the decoder",
            ),
            (
                {"method": "vflowopt", "method_options": {"stage_shares": [0.5, 1.5]}},
                "method_options.stage_shares must be a number from 0 to 1, got 1.5",
            ),
            ({"method": "vflowopt", "prune_layers": [2, 3, 4]}, "stage_shares must be 3 numbers from 0 to 1"),
        ],
    )
    def test_a_wrong_setting_names_its_field(self, deep: Model, options: dict[str, Any], message: str) -> None:
        given = {"method": "fastv", **options}
        if not {"keep_ratio", "stage_token_nums"} & set(given):
            given["keep_ratio"] = 0.5
        with pytest.raises(ValueError, match=message.replace("+", r"\+")):
            deep.pruned.set_vispruner_config(**given)

    @pytest.mark.parametrize("deep", ["llava"], indirect=True)
    def test_a_budget_that_cannot_be_met_says_the_least(self, deep: Model) -> None:
        pruned = use(deep, "fastv", visual_token_num=9)
        with pytest.raises(ValueError, match=r"32\.5 is the least"):
            pruned(**deep.prompt(ONE))
        use(deep, "fastv", stage_token_nums=[65])
        with pytest.raises(ValueError, match=r"stage_token_nums asks for 65 .* only 64 are there"):
            pruned(**deep.prompt(ONE))

    @pytest.mark.parametrize("deep", HAS_AXES, indirect=True)
    @pytest.mark.parametrize("method", RENUMBERS)
    def test_positions_with_axes_are_never_counted_anew(self, deep: Model, method: str) -> None:
        with pytest.raises(ValueError, match="counts positions anew"):
            deep.pruned.set_vispruner_config(method=method, keep_ratio=0.7, prune_layers=[3, 4, 5])

    @pytest.mark.parametrize("deep", ["qwen3_vl"], indirect=True)
    def test_qwen3_vl_keeps_all_while_its_encoder_adds_to_them(self, deep: Model) -> None:
        levels = len(deep.pruned.config.vision_config.deepstack_visual_indexes)
        with pytest.raises(ValueError, match=f"decoder layers from {levels} to 5"):
            deep.pruned.set_vispruner_config(method="fastv", keep_ratio=0.7, prune_layers=[levels - 1])

    @pytest.mark.parametrize("deep", ["llava"], indirect=True)
    def test_a_map_that_is_missing_or_makes_no_sense_is_refused_by_name(self, deep: Model) -> None:
        pruned, inputs = use(deep, "vflowopt"), deep.prompt(ONE)
        features = pruned.model.encoded(inputs)[FEATURES]
        features["image"].told = None
        others = {name: value for name, value in inputs.items() if name != "pixel_values"}
        with pytest.raises(ValueError, match=r'"vflowopt" ranks by what the encoder says .* pass pixel_values'):
            pruned(**others, **{FEATURES: features})
        for wrong, message in (("many", "must be a number such as"), (-1.0, "must be a number from 0 on")):
            with pytest.raises(ValueError, match=f"global_threshold {message}"):
                use(deep, "vflowopt", method_options={"global_threshold": wrong})
                pruned(**inputs)

    @some_models
    def test_what_would_rank_wrongly_is_refused_by_name(self, deep: Model) -> None:
        pruned, inputs = use(deep, "fastv"), deep.prompt(ONE)
        for options in ({"prefill_chunk_size": 8}, {"use_cache": False}):
            with pytest.raises(ValueError, match=f"{next(iter(options))}.* not to be had"):
                generate(pruned, inputs, **options)
        cache = pruned(**deep.prompt(TEXT)).get(CACHE)
        with pytest.raises(ValueError, match="cannot prune new images behind a cache"):
            pruned(**inputs, **{CACHE: cache})

    @pytest.mark.parametrize("deep", ["gemma3"], indirect=True)
    def test_a_window_shorter_than_the_prompt(self, deep: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(deep.pruned.config.get_text_config(), "sliding_window", 8)
        with pytest.raises(ValueError, match="attend over a sliding window of 8"):
            use(deep, "fastv")(**deep.prompt(ONE))

    @some_models
    def test_a_quantized_cache_is_refused_by_name(self, deep: Model) -> None:
        class Quantized(QuantizedLayer):
            _quantize = _dequantize = None  # those of a library, which is not installed

        cache = DynamicCache()
        cache.layers = [Quantized.__new__(Quantized)]
        with pytest.raises(ValueError, match="cannot prune with a quantized cache"):
            use(deep, "fastv").model._check_call(cache, 0, 4)


class TestPath:
    """What a call costs beside the layers themselves."""

    @some_models
    def test_a_step_without_stages_never_asks_the_cache_how_long_it_is(self, deep: Model) -> None:
        class Unasked:
            def get_seq_length(self) -> int:
                raise AssertionError("a static cache has its length on the device")

        inputs = {"input_ids": torch.tensor([[5]]), CACHE: Unasked()}
        with use(deep, "fastv").model.open_decoder(inputs) as forward:
            assert forward is None

    def test_the_plan_of_an_image_is_made_once(self) -> None:
        stage_counts.cache_clear()
        for _ in range(3):
            stage_counts(576, (8, 16, 24), 32, 270.0)
        assert stage_counts.cache_info().misses == 1

    @pytest.mark.slow
    @pytest.mark.parametrize("deep", ["llava", "qwen2_5_vl"], indirect=True)
    def test_compiled_code_leaves_the_stages_out_of_its_graphs(self, deep: Model) -> None:
        inputs = deep.prompt(ONE)
        pruned = use(deep, "fastv")
        expected = pruned(**inputs).logits
        compiled = torch.compile(pruned, backend="eager")
        outputs = compiled(**inputs)
        assert outputs[CACHE].vispruner_stages
        torch.testing.assert_close(outputs.logits, expected, **TOLERANCE)


class TestPlan:
    def test_published_settings_come_out_of_their_mean(self) -> None:
        assert stage_counts(576, (2,), 32, 306) == (288,)  # FastV, K = 2, R = 50 %
        assert stage_counts(576, (8, 16, 24), 32, 270) == (288, 144, 72)  # PyramidDrop
        assert stage_counts(576, (2,), 32, 576) == (576,)

    @pytest.mark.core
    @pytest.mark.parametrize("layers", [(1,), (2,), (8, 16, 24), (1, 2, 3, 4)])
    def test_the_mean_is_met_as_closely_as_whole_tokens_allow(self, layers: tuple[int, ...]) -> None:
        for tokens in (3, 16, 144, 577):
            least = sum(layer_counts(tokens, layers, [1] * len(layers), 32))
            for mean in (least / 32, (least / 32 + tokens) / 2, tokens - 0.5):
                counts = list(stage_counts(tokens, layers, 32, mean))
                held = sum(layer_counts(tokens, layers, counts, 32))
                assert held <= mean * 32 + 1e-9
                assert counts == sorted(counts, reverse=True) and min(counts) >= 1
                shares = [number / 20_000 for number in range(20_001)]
                family = {tuple(max(1, round(tokens * s ** (i + 1))) for i in range(len(layers))) for s in shares}
                fitting = [sum(layer_counts(tokens, layers, some, 32)) for some in family]
                assert held == max(total for total in fitting if total <= mean * 32 + 1e-9)

    @pytest.mark.parametrize("mean", [1, 2, 7, 144, 10**9])
    def test_the_most_that_an_image_may_begin_with(self, mean: int) -> None:
        layers, left, depth = (1, 2, 3), (0.95, 0.9, 0.5), 4

        def held(tokens: int) -> int:
            return sum(layer_counts(tokens, layers, whole_counts(tokens, left), depth))

        most = most_before(layers, left, depth, mean)
        assert held(most) <= mean * depth < held(most + 1)

    @pytest.mark.parametrize("deep", ["llava_next"], indirect=True)
    @pytest.mark.parametrize("method", TWO_PLACES)
    def test_two_places_meet_the_mean_as_closely_as_whole_tokens_allow(self, deep: Model, method: str) -> None:
        """One token more behind the encoder would be too many; tiles of one image leave what each of them would."""
        for mean in range(1, 73):
            model = use(deep, method, visual_token_num=mean).model
            begin = model.encoder_options.visual_token_num
            held = model.layer_counts(begin)
            assert begin >= mean and sum(held) <= DEPTH * mean
            more = layer_counts(begin + 1, model.decoder_layers, whole_counts(begin + 1, model._left), DEPTH)
            assert sum(more) > DEPTH * mean
            for tiles in (2, 5):
                assert model.layer_counts(tiles * begin) == [tiles * count for count in held]
