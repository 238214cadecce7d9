"""Methods that choose by the question: against recorded results of their authors' code, and on every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_vectors import CASES, cases, tensors
from matrix import ASK, MIXED, ONE, ROWS, SEVERAL, TEXT, Model, answers, generate, logits, made
from rows import Image

from vispruner import guided_selectors
from vispruner.choosing import Choice, watch_choices
from vispruner.configuration_vispruner import VisPrunerOptions
from vispruner.guided_selectors import select_cdpruner, select_trim
from vispruner.selectors import SELECTORS, require_choice_by_image, run_selector, select_tokens

METHODS = ["cdpruner", "trim"]
every_method = pytest.mark.parametrize("method", METHODS)
OTHER = [21, 22, 23]  # another question


def saliency_of(features: torch.Tensor) -> torch.Tensor:
    return torch.zeros(features.shape[:2])


# The rules


@cases("cdpruner")
def test_cdpruner_keeps_what_the_authors_code_does(name: str) -> None:
    given, budget = tensors(name), CASES[name]["visual_token_num"]
    projected, expected = given["projected"], given["kept"].sort(dim=-1).values
    question = {"image_embeds": given["image_embeds"], "text_embeds": given["text_embeds"]}
    if len(projected) == 1:
        kept = select_cdpruner(projected, saliency_of(projected), budget, projected, **question)
    else:  # of several images their code brings the relevance to one range
        images, words = (torch.nn.functional.normalize(given, dim=-1) for given in question.values())
        relevance = -(images @ words.T).mean(-1)
        relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
        unit = torch.nn.functional.normalize(projected, dim=-1)
        kept = guided_selectors._most_spanning(unit * relevance[..., None], relevance, budget).sort(dim=-1).values
    assert torch.equal(kept, expected)


@cases("trim")
def test_trim_keeps_and_averages_what_the_authors_code_does(name: str) -> None:
    given = tensors(name)
    features = given["features"]
    normed = torch.nn.functional.layer_norm(features, features.shape[-1:], given["ln_weight"], given["ln_bias"])
    budget = 1 + given["kept"].shape[1]
    made = select_trim(
        features,
        saliency_of(features),
        budget,
        features,
        image_embeds=normed @ given["projection"].T,
        text_embeds=given["text_embeds"],
    )
    is_mean = made.merged_into(features.shape[1]).gather(1, made.indices) != made.indices
    images = range(len(features))
    for image in images:
        assert torch.equal(made.indices[image][~is_mean[image]], given["kept"][image].sort().values)
        rows = made.take(features)[image]
        ordered = torch.cat([rows[~is_mean[image]], rows[is_mean[image]]])
        torch.testing.assert_close(ordered, given["merged"][image], rtol=1e-4, atol=1e-4)


def test_all_recorded_cases_of_these_methods_are_replayed() -> None:
    assert sum(name.split(".")[0] in METHODS for name in CASES) == 7


def asked(images: int, tokens: int, seed: int = 0, width: int = 12, words: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(images, *shape, generator=generator, dtype=torch.float64)

    features = draw(tokens, 8)
    return {
        "features": features,
        "saliency": saliency_of(features),
        "projected": draw(tokens, width),
        "text": draw(words, width),
        "text_saliency": torch.zeros(images, words),
    }


def relevance_by_hand(given: dict[str, Any], image: int) -> torch.Tensor:
    tokens, words = given["projected"][image], given["text"][image]
    return torch.nn.functional.cosine_similarity(tokens[:, None], words[None], dim=-1).mean(1)


@pytest.mark.parametrize("seed", range(4))
def test_cdpruner_adds_the_token_that_makes_the_determinant_largest(seed: int) -> None:
    given = asked(2, 10, seed)
    for image in range(2):
        relevance = relevance_by_hand(given, image)
        relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
        unit = torch.nn.functional.normalize(given["projected"][image], dim=-1)
        kernel = relevance[:, None] * (unit @ unit.T) * relevance[None]
        picked: list[int] = []
        for budget in range(1, 9):
            others = [token for token in range(10) if token not in picked]
            picked.append(
                max(others, key=lambda token: float(torch.det(kernel[[*picked, token]][:, [*picked, token]])))
            )
            one = {name: value[image : image + 1] for name, value in given.items()}
            assert select_tokens("cdpruner", visual_token_num=budget, **one).tolist() == [sorted(picked)]


def test_trim_keeps_the_tokens_most_like_the_question() -> None:
    given = asked(2, 10)
    made = run_selector("trim", visual_token_num=4, **given)
    for image in range(2):
        best = relevance_by_hand(given, image).argsort(descending=True)
        rows = set(made.indices[image].tolist())
        assert set(best[:3].tolist()) <= rows
        mean = given["features"][image][best[3:]].mean(0)
        torch.testing.assert_close(made.take(given["features"])[image][made.indices[image] == best[3:].max()][0], mean)


def test_cdpruner_goes_on_with_the_most_relevant_where_nothing_new_is_left() -> None:
    given = asked(1, 12, width=3)  # three directions, so that no fourth token adds anything
    relevance = relevance_by_hand(given, 0)
    three = set(select_tokens("cdpruner", visual_token_num=3, **given)[0].tolist())
    rest = [token for token in relevance.argsort(descending=True).tolist() if token not in three]
    for budget in range(4, 12):
        kept = select_tokens("cdpruner", visual_token_num=budget, **given)[0].tolist()
        assert kept == sorted(three | set(rest[: budget - 3]))


@pytest.mark.parametrize("pool", [1, 7, 256])
@pytest.mark.parametrize(("tokens", "width"), [(300, 64), (300, 40), (420, 500)])
def test_many_picks_at_a_time_are_the_same_picks(
    tokens: int, width: int, pool: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """...in double precision, beyond the rank too."""
    monkeypatch.setattr(guided_selectors, "POOL", pool)
    given = asked(2, tokens, width=width)
    for budget in (1, 30, width + 20, tokens - 1):
        found = select_tokens("cdpruner", visual_token_num=budget, **given)
        monkeypatch.setattr(guided_selectors, "FEW_TOKENS", tokens)
        assert torch.equal(found, select_tokens("cdpruner", visual_token_num=budget, **given))
        monkeypatch.setattr(guided_selectors, "FEW_TOKENS", 0)


@every_method
def test_what_is_no_word_and_how_long_words_are_change_nothing(method: str) -> None:
    given = asked(3, 16)
    expected = run_selector(method, visual_token_num=5, **given)
    padded = {
        **given,
        "text": torch.cat([given["text"] * 7, torch.randn(3, 2, 12, dtype=torch.float64)], dim=1),
        "text_saliency": torch.cat([given["text_saliency"], torch.full((3, 2), float("-inf"))], dim=1),
    }
    assert torch.equal(run_selector(method, visual_token_num=5, **padded).indices, expected.indices)


@every_method
def test_an_image_is_chosen_from_as_it_would_be_alone(method: str) -> None:
    given = asked(3, 16)
    together = run_selector(method, visual_token_num=5, **given).indices
    alone = [
        run_selector(method, visual_token_num=5, **{name: value[image : image + 1] for name, value in given.items()})
        for image in range(3)
    ]
    assert torch.equal(together, torch.cat([one.indices for one in alone]))


@every_method
def test_every_budget_keeps_so_many_tokens_and_all_is_all(method: str) -> None:
    given = asked(2, 9)
    for budget in range(1, 12):
        kept = run_selector(method, visual_token_num=budget, **given).indices
        assert kept.shape == (2, min(budget, 9)) and bool((kept.diff(dim=1) > 0).all())
    alike = {**given, "projected": torch.ones(2, 9, 12), "text": torch.ones(2, 5, 12)}
    for budget in range(1, 10):
        kept = run_selector(method, visual_token_num=budget, **alike).indices
        assert all(len(set(row)) == budget for row in kept.tolist())


@every_method
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, "needs the question"),
        ({"text_saliency": None}, "needs the question"),
        ({"text": torch.ones(2, 5, 11)}, "text must hold the question of each of 2 images in 12"),
        ({"text": torch.ones(1, 5, 12)}, "text must hold"),
        ({"text": torch.ones(2, 0, 12)}, "text must hold"),
        ({"text_saliency": torch.zeros(2, 4)}, "text_saliency must be"),
        ({"text_saliency": torch.full((2, 5), float("-inf"))}, "asks nothing"),
        ({"image_embeds": torch.ones(2, 9, 4), "text_embeds": torch.ones(2, 5)}, "text_embeds must hold"),
        ({"image_embeds": torch.ones(2, 8, 4), "text_embeds": torch.ones(2, 4)}, "image_embeds must be"),
    ],
)
def test_a_question_that_does_not_fit_is_refused(method: str, change: dict[str, Any], message: str) -> None:
    given = {name: value for name, value in {**asked(2, 9), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        run_selector(method, visual_token_num=3, **given)


# In models


@pytest.fixture(scope="module", params=sorted(ROWS))
def guided(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    name = request.param
    options = {**ROWS[name].options, "method": "cdpruner", "method_options": None}
    return made(name, tmp_path_factory.mktemp(f"guided-{name}"), **options)


def asking(question: list[int], prompt: list = ONE) -> list:
    return [*prompt[:-1], question]


def choices_of(model: Model, call: Any) -> list[Choice]:
    seen: list[Choice] = []
    with watch_choices(seen.append):
        call()
    return seen


def words_given(choice: Choice) -> list[torch.Tensor]:
    """Return the words (n, D) that each image was chosen by."""
    text, saliency = choice.tokens.further["text"], choice.tokens.further["text_saliency"]
    return [rows[score > float("-inf")] for rows, score in zip(text, saliency, strict=True)]


def test_each_image_is_chosen_from_by_the_words_of_its_own_row(guided: Model) -> None:
    prompts = [asking(ASK), asking(OTHER, SEVERAL), TEXT, asking([24])]
    if "video" in guided.row.modalities:
        prompts.append(asking([25, 26, 27, 28, 29, 30], MIXED))
    inputs = guided.prompt(*prompts)
    expected = []
    for ids, seen in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        places = torch.isin(ids[seen], torch.tensor(guided.pruned.model.placeholder_ids)).nonzero()
        if len(places):
            expected.append(guided.pruned.get_input_embeddings()(ids[seen][int(places[-1]) + 1 :]))
    assert len({len(words) for words in expected}) == len(expected)
    for call in (lambda: logits(guided.pruned, inputs), lambda: answers(guided.pruned, inputs)):
        given = [words for choice in choices_of(guided, call) for words in words_given(choice)]
        assert {len(words) for words in given} == {len(words) for words in expected}
        for words in given:
            assert any(torch.equal(words, own) for own in expected if len(own) == len(words))


@every_method
def test_a_row_of_a_batch_answers_as_it_does_alone(guided: Model, method: str) -> None:
    prompts = [asking(ASK), asking(OTHER, SEVERAL), TEXT]
    change = {"vispruner_config": {"method": method}}
    together = generate(guided.pruned, guided.prompt(*prompts), **change)
    for row, prompt in enumerate(prompts):
        inputs = guided.prompt(prompt)
        alone = generate(guided.pruned, inputs, **change)[0, inputs["input_ids"].shape[1] :]
        assert torch.equal(together[row, -len(alone) :], alone)


def test_beams_answer_by_the_question_of_their_row(guided: Model) -> None:
    prompts = [asking(ASK), asking(OTHER)]
    together = answers(guided.pruned, guided.prompt(*prompts), num_beams=2, num_return_sequences=2)
    alone = [answers(guided.pruned, guided.prompt(prompt), num_beams=2, num_return_sequences=2) for prompt in prompts]
    assert torch.equal(together, torch.cat(alone))


def test_embedded_prompts_are_read_as_those_of_ids(guided: Model) -> None:
    inputs = guided.prompt(asking(OTHER))
    embeds = {
        **{name: value for name, value in inputs.items() if name != "input_ids"},
        "inputs_embeds": guided.pruned.get_input_embeddings()(inputs["input_ids"]),
    }
    if "mm_token_type_ids" in embeds or guided.row.model_type.startswith("qwen"):
        pytest.skip("stock numbers an embedded prompt of these models as text")
    if guided.row.model_type in ("gemma3", "paligemma"):
        pytest.skip("stock marks images of these models by ids")
    by_ids, by_embeds = (
        choices_of(guided, lambda given=given: logits(guided.pruned, given)) for given in (inputs, embeds)
    )
    for one, other in zip(by_ids, by_embeds, strict=True):
        assert torch.equal(one.tokens.further["text"], other.tokens.further["text"])


def test_images_cannot_be_encoded_before_the_question_is_known(guided: Model) -> None:
    inputs = guided.prompt(ONE)
    modality = guided.pruned.modalities[0]
    described = {name: inputs[name] for name in modality.described_by if name in inputs}
    for encode in (guided.pruned.encode_images, guided.pruned.model.get_image_features):
        with pytest.raises(ValueError, match=r'"cdpruner" chooses by the question.*to generate or forward'):
            encode(inputs[modality.pixels], **described)
    features = guided.pruned.model.encode_prompt(**inputs)[modality.name]
    assert sum(map(len, features.kept_indices)) < sum(features.full_counts)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return made("llava", tmp_path_factory.mktemp("llava"), method="cdpruner", visual_token_num=9)


def kept_for(model: Model, prompt: list, **inputs: Any) -> torch.Tensor:
    (choice,) = choices_of(model, lambda: logits(model.pruned, {**model.prompt(prompt), **inputs}))
    return choice.selection.indices  # type: ignore[union-attr]


@every_method
def test_another_question_keeps_other_tokens(llava: Model, method: str) -> None:
    llava.pruned.set_vispruner_config(method=method)
    assert not torch.equal(kept_for(llava, asking(ASK)), kept_for(llava, asking(OTHER)))
    llava.pruned.set_vispruner_config(method="cdpruner")


def test_words_before_an_image_ask_where_none_come_behind_it(llava: Model) -> None:
    first = [OTHER, Image((56, 84), seed=1)]
    (choice,) = choices_of(llava, lambda: logits(llava.pruned, llava.prompt(first)))
    words = words_given(choice)[0]
    assert torch.equal(words[-3:], llava.pruned.get_input_embeddings()(torch.tensor(OTHER))) and len(words) <= 4


@pytest.mark.parametrize("answer", [[30, 31], [40, 41, 42]])
def test_the_answer_that_is_trained_on_is_no_part_of_the_question(llava: Model, answer: list[int]) -> None:
    inputs = llava.prompt([*ONE, answer])
    labels = inputs["input_ids"].clone()
    labels[:, : -len(answer)] = -100
    for further in ({"labels": labels}, {"prompt_lengths": torch.tensor([labels.shape[1] - len(answer)])}):
        (choice,) = choices_of(llava, lambda further=further: llava.pruned(**inputs, **further))
        assert torch.equal(words_given(choice)[0], llava.pruned.get_input_embeddings()(torch.tensor(ASK)))
    assert torch.equal(kept_for(llava, [*ONE, answer], labels=labels), kept_for(llava, ONE))


@pytest.mark.parametrize("method", ["cdpruner", "fastv"])
@pytest.mark.parametrize("prompt", [ONE, SEVERAL])
def test_labels_that_begin_before_the_question_are_refused(llava: Model, method: str, prompt: list) -> None:
    inputs = llava.prompt(prompt)
    place = {"prune_layers": [1], "visual_token_num": 40} if method == "fastv" else {}
    change = {"method": method, **place}
    first = inputs["input_ids"].clone()
    first[inputs["input_ids"] == llava.pruned.config.image_token_id] = -100
    for further in ({"labels": first}, {"prompt_lengths": torch.tensor([3])}):
        with pytest.raises(ValueError, match=r"labels begin before the last image of a row.*prompt_lengths"):
            llava.pruned(**inputs, **further, vispruner_config=change)
    asked = torch.tensor([inputs["input_ids"].shape[1]])
    llava.pruned(**inputs, labels=first, prompt_lengths=asked, vispruner_config=change)


def test_a_mask_that_does_not_tell_padding_is_refused(llava: Model) -> None:
    inputs = llava.prompt(ONE)
    is_image = inputs["input_ids"] == llava.pruned.config.image_token_id
    stays = ~(is_image & (is_image.cumsum(1) > 9))[0]
    ids = inputs["input_ids"][:, stays]
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    short = {"input_ids": ids, "attention_mask": mask, "pixel_values": inputs["pixel_values"]}
    with pytest.raises(ValueError, match=r"attention_mask must be 2-D .* to read the question in it"):
        llava.pruned(**short)
    llava.pruned(**short, vispruner_config={"method": "divprune"})


def test_a_later_turn_goes_on_with_the_tokens_that_the_first_question_left(llava: Model) -> None:
    first = llava.prompt(ONE)
    made = generate(llava.pruned, first, return_dict_in_generate=True)
    later = torch.cat([made.sequences, torch.tensor([OTHER])], dim=1)
    inputs = {**first, "input_ids": later, "attention_mask": torch.ones_like(later)}
    inputs["past_key_values"] = made.past_key_values
    assert choices_of(llava, lambda: generate(llava.pruned, inputs)) == []


@pytest.mark.core
def test_positions_short_prompts_and_compiled_models_are_no_different(llava: Model) -> None:
    inputs = llava.prompt(asking(OTHER))
    expected = logits(llava.pruned, inputs)
    compiled = torch.compile(llava.pruned, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, expected)
    (original,) = choices_of(llava, lambda: llava.pruned(**inputs, vispruner_config={"position_policy": "original"}))
    assert torch.equal(original.selection.indices, kept_for(llava, asking(OTHER)))  # type: ignore[union-attr]
    drop = (inputs["input_ids"] == llava.pruned.config.image_token_id).cumsum(1) > 9
    is_image = inputs["input_ids"] == llava.pruned.config.image_token_id
    stays = ~(drop & is_image)[0]
    short = {
        **inputs,
        "input_ids": inputs["input_ids"][:, stays],
        "attention_mask": inputs["attention_mask"][:, stays],
    }
    torch.testing.assert_close(logits(llava.pruned, short)[0, -1], expected[0, -1])


def test_in_the_language_model_it_ranks_by_hidden_states(llava: Model) -> None:
    change = {"prune_layers": [1], "visual_token_num": 40}
    inputs = llava.prompt(asking(ASK))
    choices = choices_of(llava, lambda: llava.pruned(**inputs, vispruner_config=change))
    assert [choice.layer for choice in choices] == [1]


@every_method
def test_an_engine_refuses_what_depends_on_the_question(method: str) -> None:
    assert SELECTORS[method].is_guided
    options = VisPrunerOptions.from_dict({"method": method, "visual_token_num": 9})
    with pytest.raises(ValueError, match="chooses by the question, but an engine"):
        require_choice_by_image(options)


def test_no_other_method_is_told_the_question() -> None:
    assert sorted(name for name, selector in SELECTORS.items() if selector.is_guided) == METHODS
