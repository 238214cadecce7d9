"""Every architecture against every property: one table, of which README shows what is covered.

Each test says by `@covers` which column of that table it stands for; the rows are in tests/rows.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import cached_tokens
from matrix import (
    ASK,
    CLIP,
    EVERY,
    HELLO,
    LLAVAS,
    MIXED,
    NEW,
    ONE,
    PACKED_AS_STOCK,
    RENUMBERED,
    ROWS,
    SEVERAL,
    TEXT,
    TOKEN_TYPES,
    TOLERANCE,
    Model,
    answers,
    dropped_columns,
    generate,
    logits,
    reference_of,
    require_the_reference,
    type_of_new_tokens,
)
from rows import PLAIN, Image
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForImageTextToText

import vispruner
from vispruner.choosing import Choice, watch_choices
from vispruner.conversion.codebook import save_codebook
from vispruner.selector_registry import Merge, Selection, Selector
from vispruner.selectors import ENCODER_METHODS, SELECTORS
from vispruner.token_selection import select_uniform_grid
from vispruner.visual_features import tokens_of

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"


def covers(column: str, needs: str = "image", but: str | None = None, variants: bool = True) -> Callable:
    """Mark a test as the proof of one column of README's table, for the rows that have the modality.

    variants  whether also for rows of another tile mode or another language model
    """
    marked = [name for name, row in EVERY.items() if needs in row.modalities and name != but]
    marked = [name for name in marked if variants or "-" not in name]

    def mark(test: Callable) -> Callable:
        test.column = column
        return pytest.mark.parametrize("model", marked, indirect=True)(test)

    return mark


@pytest.mark.core
@covers("images")
@pytest.mark.parametrize("change", [{"method": "none"}, {"keep_ratio": 1.0}, {"visual_token_num": 10_000}])
def test_keeping_all_equals_stock_bit_for_bit(model: Model, change: dict[str, Any]) -> None:
    if model.row.options.get("tile_mode") == "paper" and "method" not in change:
        pytest.skip("the padding of tiles is kept, too: see test_llava_next.py")
    model.pruned.set_vispruner_config(**change)
    for prompts in (*([prompt] for prompt in model.prompts()), model.prompts()):
        inputs = model.prompt(*prompts)
        assert torch.equal(logits(model.pruned, inputs), logits(model.stock, inputs))
        assert torch.equal(generate(model.pruned, inputs), generate(model.stock, inputs))


@pytest.mark.each
@pytest.mark.parametrize("model", ROWS, indirect=True)
def test_a_budget_that_prunes_nothing_is_told_once(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    logging.Logger.warning_once.cache_clear()  # transformers forgets what earlier tests warned of
    inputs = model.prompt(ONE)

    def told(**change: Any) -> int:
        caplog.clear()
        model.pruned.set_vispruner_config(**change)
        for _ in range(2):
            logits(model.pruned, inputs)
        return sum("so nothing is pruned; lower" in record.getMessage() for record in caplog.records)

    assert (told(), told(method="none"), told(method="vispruner", keep_ratio=1.0, visual_token_num=None)) == (0, 0, 1)


@covers("images")
@pytest.mark.each
def test_one_image_equals_the_reference(model: Model) -> None:
    require_the_reference(model, ONE)
    dense, pruned = (logits(which, model.prompt(ONE))[0, -1] for which in (model.stock, model.pruned))
    other = logits(model.pruned, model.prompt([HELLO, Image((56, 84), seed=9), ASK]))[0, -1]
    for shown in (dense, other):
        assert not torch.allclose(shown, pruned, atol=1e-3)  # the tiny model can show a difference


@covers("several images")
def test_several_images_of_different_sizes_equal_the_reference(model: Model) -> None:
    require_the_reference(model, SEVERAL)


@covers("video", needs="video")
@pytest.mark.parametrize("prompt", [CLIP, MIXED], ids=["alone", "beside an image"])
def test_a_video_equals_the_reference(model: Model, prompt: list) -> None:
    require_the_reference(model, prompt)


@pytest.mark.parametrize("model", RENUMBERED, indirect=True)
def test_original_positions_equal_the_full_prompt_with_dropped_tokens_masked_out(model: Model) -> None:
    """So `placeholders` says which token of the full prompt each kept one is."""
    model.pruned.set_vispruner_config(position_policy="original")
    for prompt in [ONE, SEVERAL, *([CLIP, MIXED] if "video" in model.row.modalities else [])]:
        inputs = model.prompt(prompt)
        dropped = dropped_columns(inputs, reference_of(model, inputs)[1])
        mask = inputs["attention_mask"].masked_fill(dropped, 0)
        expected = logits(model.stock, {**inputs, "attention_mask": mask})[0, -1]
        torch.testing.assert_close(logits(model.pruned, inputs)[0, -1], expected, **TOLERANCE)
        first = generate(model.pruned, inputs, return_dict_in_generate=True, output_logits=True).logits[0][0]
        torch.testing.assert_close(first, expected, **TOLERANCE)


@covers("batch")
@pytest.mark.each
def test_a_left_padded_batch_equals_its_rows(model: Model) -> None:
    inputs = model.prompt(*model.prompts())
    batch, scores = answers(model.pruned, inputs), logits(model.pruned, inputs)
    for row, prompt in enumerate(model.prompts()):
        single = model.prompt(prompt)
        assert torch.equal(batch[row], answers(model.pruned, single)[0])
        alone = logits(model.pruned, single)[0]
        torch.testing.assert_close(scores[row, -len(alone) :], alone, **TOLERANCE)


@covers("batch")
def test_logits_of_a_right_padded_batch_equal_those_of_its_rows(model: Model) -> None:
    prompts = [ONE, SEVERAL, TEXT]
    inputs = model.prompt(*prompts)
    seen = inputs["attention_mask"].sum(1).tolist()
    for name in {"input_ids", "attention_mask", *TOKEN_TYPES} & inputs.keys():
        inputs[name] = torch.stack([line.roll(int(count)) for line, count in zip(inputs[name], seen, strict=True)])
    scores = logits(model.pruned, inputs)
    for row, (prompt, count) in enumerate(zip(prompts, seen, strict=True)):
        torch.testing.assert_close(scores[row, :count], logits(model.pruned, model.prompt(prompt))[0], **TOLERANCE)


@covers("batch")
def test_a_mask_that_is_not_given_is_inferred_as_stock_infers_it(model: Model) -> None:
    inputs = model.prompt(*model.prompts())
    expected, of_stock = answers(model.pruned, inputs), answers(model.stock, inputs)
    del inputs["attention_mask"]
    if not torch.equal(answers(model.stock, inputs), of_stock):
        pytest.skip("stock infers none: its padding id is not that of these prompts")
    assert torch.equal(answers(model.pruned, inputs), expected)


@covers("batch")
def test_padding_shrinks_with_the_prompts(model: Model) -> None:
    """A row of text alone, padded to an image's full length, must not keep that length."""
    text = [[*HELLO, *ASK] * 2]
    assert cached_tokens(model.pruned, model.prompt(ONE, text)) == max(
        cached_tokens(model.pruned, model.prompt(prompt)) for prompt in (ONE, text)
    )


@covers("batch")
def test_the_result_starts_with_the_callers_prompts(model: Model) -> None:
    inputs = model.prompt(*model.prompts())
    assert torch.equal(generate(model.pruned, inputs)[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


@covers("batch")
def test_text_alone_equals_stock(model: Model) -> None:
    for prompts in ([TEXT], [TEXT, [HELLO]]):
        inputs = model.prompt(*prompts)
        assert torch.equal(logits(model.pruned, inputs), logits(model.stock, inputs))
        assert torch.equal(generate(model.pruned, inputs), generate(model.stock, inputs))


@pytest.mark.core
@covers("short prompts")
def test_prompts_with_the_kept_number_of_placeholders_give_the_same(model: Model) -> None:
    for prompts in ([ONE], [SEVERAL], model.prompts()):
        inputs = model.prompt(*prompts)
        short = model.shortened(inputs)
        assert short["input_ids"].shape[1] < inputs["input_ids"].shape[1]
        assert torch.equal(answers(model.pruned, short), answers(model.pruned, inputs))
        expected = logits(model.pruned, inputs)[:, -1]
        torch.testing.assert_close(logits(model.pruned, short)[:, -1], expected, **TOLERANCE)


@covers("short prompts")
@pytest.mark.parametrize("more", [-1, 1])
def test_any_other_number_of_placeholders_is_refused(model: Model, more: int) -> None:
    require_refusal_of_placeholders(model, more)


@pytest.mark.parametrize("more", [-1, 1])
@pytest.mark.parametrize("model", [name for name in LLAVAS if name in PACKED_AS_STOCK], indirect=True)
def test_it_is_refused_where_nothing_is_dropped_too(model: Model, more: int) -> None:
    """Other architectures leave it to stock, which may say nothing."""
    model.pruned.set_vispruner_config(keep_ratio=1.0)
    require_refusal_of_placeholders(model, more)


def require_refusal_of_placeholders(model: Model, more: int) -> None:
    inputs = model.prompt(ONE)
    token = model.pruned.model.placeholder_ids[0]
    column = int((inputs["input_ids"][0] == token).nonzero()[0])
    for name in {"input_ids", "attention_mask", *TOKEN_TYPES} & inputs.keys():
        one = inputs[name][:, column : column + 1].repeat(1, 1 + more)
        inputs[name] = torch.cat([inputs[name][:, :column], one, inputs[name][:, column + 1 :]], dim=1)
    for call in (model.pruned, model.pruned.generate):
        with pytest.raises(ValueError, match="placeholders"):
            call(**copy.copy(inputs))


@covers("beams")
def test_beams_of_a_batch_equal_those_of_its_rows(model: Model) -> None:
    options = {"num_beams": 3, "num_return_sequences": 2}
    batch = answers(model.pruned, model.prompt(*model.prompts()), **options)
    for row, prompt in enumerate(model.prompts()):
        assert torch.equal(batch[2 * row : 2 * row + 2], answers(model.pruned, model.prompt(prompt), **options))
    assert not torch.equal(batch[0], batch[1])


@covers("static cache")
def test_a_static_cache_gives_the_same_and_is_as_long_as_the_pruned_prompt(model: Model) -> None:
    inputs = model.prompt(ONE)
    result = generate(model.pruned, inputs, cache_implementation="static", return_dict_in_generate=True)
    assert torch.equal(result.sequences, generate(model.pruned, inputs))
    full, kept = model.counts(inputs)
    lost = sum(map(sum, full.values())) - sum(map(sum, kept.values()))
    assert result.past_key_values.layers[0].keys.shape[-2] <= inputs["input_ids"].shape[1] - lost + NEW


@covers("prompt lookup")
def test_prompt_lookup_gives_the_same(model: Model) -> None:
    inputs = model.prompt(ONE)
    expected = generate(model.pruned, inputs)
    assert torch.equal(generate(model.pruned, inputs, prompt_lookup_num_tokens=2), expected)


@covers("prompt lookup")
def test_decoding_equals_scoring_the_whole_in_one_pass(model: Model) -> None:
    """What the cache held while decoding was right: the same ids, scored at once, have the same logits."""
    inputs = model.prompt(ONE)
    result = generate(model.pruned, inputs, return_dict_in_generate=True, output_logits=True)
    whole = dict(inputs)
    new = result.sequences[:, inputs["input_ids"].shape[1] :]
    whole["input_ids"] = result.sequences
    whole["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW), value=1)
    for name in TOKEN_TYPES & inputs.keys():
        whole[name] = torch.nn.functional.pad(inputs[name], (0, NEW), value=type_of_new_tokens(model))
    scored = logits(model.pruned, whole)[0, -NEW - 1 : -1]
    torch.testing.assert_close(torch.cat(result.logits), scored, **TOLERANCE)
    assert scored.argmax(-1).tolist() == new[0].tolist()


@covers("compile", variants=False)  # each takes ten seconds
@pytest.mark.core
def test_generating_with_a_compiled_forward_gives_the_same(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    inputs = model.prompt(ONE)
    expected = generate(model.pruned, inputs)
    graphs = CompileCounter()
    monkeypatch.setattr(model.pruned, "forward", torch.compile(model.pruned.forward, backend=graphs))
    assert torch.equal(generate(model.pruned, inputs, cache_implementation="static"), expected)
    assert graphs.frame_count > 0


@covers("training")
def test_the_loss_is_finite_equal_for_both_prompt_forms_and_trains_the_encoder(model: Model) -> None:
    inputs = model.prompt(ONE, TEXT)
    short = model.row.shortened(inputs, model.counts(inputs)[1])
    losses = []
    for form in (inputs, short):
        labels = form["input_ids"].masked_fill(form["attention_mask"] == 0, -100)
        for token in model.pruned.model.placeholder_ids:
            labels = labels.masked_fill(form["input_ids"] == token, -100)
        losses.append(model.pruned(**copy.copy(form), labels=labels).loss)
    assert losses[0].isfinite()
    torch.testing.assert_close(losses[0], losses[1], **TOLERANCE)
    model.pruned.zero_grad()
    losses[0].backward()
    gradients = [p.grad for attention in model.pruned.model.vision_attentions for p in attention.parameters()]
    model.pruned.zero_grad()
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@covers("encoded images")
def test_images_encoded_once_answer_several_questions(model: Model) -> None:
    inputs = model.prompt(SEVERAL)
    described = {name: inputs[name] for name in model.pruned.modalities[0].described_by if name in inputs}
    pixels = model.pruned.modalities[0].pixels
    images = model.pruned.encode_images(inputs[pixels], **described)
    rest = {name: value for name, value in inputs.items() if name != pixels}
    assert torch.equal(generate(model.pruned, {**rest, "encoded_images": images}), generate(model.pruned, inputs))
    text = {**model.prompt(TEXT), "encoded_images": images[:0]}
    assert torch.equal(generate(model.pruned, text), generate(model.pruned, model.prompt(TEXT)))


@covers("encoded images", needs="video")
def test_encoded_images_stand_beside_a_video(model: Model) -> None:
    inputs = model.prompt(MIXED)
    image = model.pruned.modalities[0]
    described = {name: inputs[name] for name in image.described_by if name in inputs}
    images = model.pruned.encode_images(inputs[image.pixels], **described)
    rest = {name: value for name, value in inputs.items() if name != image.pixels}
    if len(model.pruned.modalities) == 1:  # frames are images there
        assert len(images) > 1
    expected = logits(model.pruned, inputs)
    torch.testing.assert_close(logits(model.pruned, {**rest, "encoded_images": images}), expected, **TOLERANCE)


@pytest.mark.parametrize("model", ROWS, indirect=True)
def test_features_of_another_layer_are_ranked_by_that_layer(model: Model) -> None:
    if "vision_feature_layer" not in model.pruned.modalities[0].described_by:
        assert not hasattr(model.pruned.config, "vision_feature_layer")
        return
    other = copy.deepcopy(model.pruned)
    configured = other.config.vision_feature_layer
    other.config.vision_feature_layer = -2 if configured == -1 else -1
    inputs = model.prompt(ONE)
    expected = logits(other, inputs)
    assert torch.equal(
        logits(model.pruned, {**inputs, "vision_feature_layer": other.config.vision_feature_layer}), expected
    )
    assert not torch.equal(logits(model.pruned, inputs), expected)


@pytest.mark.core
@covers("save and load")
def test_a_saved_model_loads_pruned_from_its_own_code(model: Model, tmp_path: Path) -> None:
    model.pruned.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path, trust_remote_code=True, output_loading_info=True, attn_implementation=model.attention
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(loaded).__name__ == type(model.pruned).__name__
    assert type(loaded).__module__.startswith("transformers_modules")
    for prompt in (ONE, SEVERAL):
        assert torch.equal(logits(loaded.eval(), model.prompt(prompt)), logits(model.pruned, model.prompt(prompt)))


@covers("leaving within the encoder", but="llava_onevision")
def test_patches_leave_within_the_encoder(model: Model) -> None:
    """What comes out is held to an encoder of full length in test_encoder_stage.py."""
    stage = {"layer": model.pruned.model.stage_layers.start, "keep_ratio": 0.6}
    model.pruned.set_vispruner_config(encoder_stage=stage, tile_mode="paper")
    rows: list[int] = []
    hook = model.pruned.model.vision_layers[-1].register_forward_hook(lambda *of: rows.append(of[1][0].shape[-2]))
    assert answers(model.pruned, model.prompt(ONE)).shape[1] == NEW
    full = rows.pop()
    model.pruned.set_vispruner_config(encoder_stage=None)
    answers(model.pruned, model.prompt(ONE))
    hook.remove()
    assert full < rows.pop()


@pytest.mark.core
@covers("thin")
def test_a_thin_repo_takes_its_weights_from_the_base(model: Model, tmp_path: Path) -> None:
    model.pruned.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    base = {"base_model_name_or_path": "someone/base", "base_model_revision": 40 * "0"}
    config["vispruner_config"] |= {"weights": "thin", **base}
    (tmp_path / "config.json").write_text(json.dumps(config))
    named = {"base_model_name_or_path": str(model.folder)}  # a folder is no base unless the caller says so
    thin = AutoModelForImageTextToText.from_pretrained(
        tmp_path, trust_remote_code=True, attn_implementation=model.attention, vispruner_config=named
    )
    assert torch.equal(logits(thin.eval(), model.prompt(ONE)), logits(model.pruned, model.prompt(ONE)))


@pytest.mark.parametrize("model", ROWS, indirect=True)
def test_attention_functions_rank_alike(model: Model) -> None:
    """Eager and SDPA attention of the encoder are read the same way."""
    other = vispruner.load(model.folder, **model.row.options, attn_implementation="sdpa").eval()
    expected = logits(model.pruned, model.prompt(ONE))
    torch.testing.assert_close(logits(other, model.prompt(ONE)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [name for name in ENCODER_METHODS if name != "vispruner"])
@pytest.mark.parametrize("model", [*ROWS, "llava_next-paper"], indirect=True)
def test_every_method_prunes_as_much_or_says_what_it_lacks(model: Model, method: str, tmp_path: Path) -> None:
    inputs = model.prompt(*model.prompts())
    kept = model.counts(inputs)[1]
    width = model.pruned.config.get_text_config().hidden_size
    prototypes = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    codebook = save_codebook(prototypes, tmp_path / "codebook.safetensors", {})
    try:
        model.pruned.set_vispruner_config(method=method, seed=3, codebook=codebook)
    except ValueError as error:
        assert re.search(f'method "{method}" needs .*(CLS|grid|cls_query)', str(error))
        return
    assert model.counts(inputs)[1] == kept
    assert torch.equal(answers(model.pruned, inputs), answers(model.pruned, inputs))


@pytest.mark.parametrize("model", ROWS, indirect=True)
def test_a_ratio_for_each_image_leaves_the_counts_as_they_are(model: Model) -> None:
    inputs = model.prompt(*model.prompts())
    kept = model.counts(inputs)[1]
    model.pruned.set_vispruner_config(method="vispruner", important_ratio="auto")
    assert model.counts(inputs)[1] == kept
    assert torch.equal(answers(model.pruned, inputs), answers(model.pruned, inputs))
    assert json.loads(model.pruned.config.to_json_string())["vispruner_config"]["important_ratio"] == "auto"


@pytest.mark.parametrize("model", ROWS, indirect=True)
def test_even_spacing_knows_the_grid_of_every_image_tile_and_frame(model: Model) -> None:
    model.pruned.set_vispruner_config(method="uniform_grid")
    choices: list[Choice] = []
    with watch_choices(after=choices.append):
        for prompt in [ONE, *([CLIP] if "video" in model.row.modalities else [])]:
            logits(model.pruned, model.prompt(prompt))
    for tokens, _, selection in choices:
        budget = selection.indices.shape[1]
        expected = select_uniform_grid(tokens.features, tokens.saliency, budget, tokens.grid)
        assert torch.equal(selection.indices, expected)
    grids = [choice.tokens.grid for choice in choices]
    assert grids and None not in grids
    assert GRIDS_OF_ONE.get(model.row.model_type, grids[0]) in grids


def _last(features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int) -> torch.Tensor:
    tokens = saliency.shape[1]
    return torch.arange(tokens - visual_token_num, tokens).expand(len(saliency), -1)


def _first_made_of_last(features: torch.Tensor, saliency: torch.Tensor, visual_token_num: int) -> Selection:
    """Keep the first tokens, and put into each of them the one that lies as far from the end."""
    last = _last(features, saliency, visual_token_num)
    places = torch.arange(visual_token_num).expand_as(last)
    ones = torch.ones_like(last, dtype=torch.float32)
    return Selection(places, Merge(last.flip(1), places, ones, torch.zeros_like(ones)))


@pytest.mark.parametrize("model", ROWS, indirect=True)
def test_what_a_method_folds_together_is_what_comes_out(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but a `Selection` gathers tokens, whatever order a packing lines them up in."""
    for method in (_last, _first_made_of_last):
        monkeypatch.setitem(SELECTORS, method.__name__, Selector(method, {}))
    base, found = model.pruned.model, []
    for method in (_last, _first_made_of_last):
        model.pruned.set_vispruner_config(method=method.__name__)
        inputs = model.prompt(MIXED if "video" in model.row.modalities else SEVERAL)
        given = [modality for modality in base.modalities if modality.pixels in inputs]
        made = [
            getattr(base, f"get_{m.name}_features")(
                inputs[m.pixels], **{name: inputs[name] for name in m.described_by if name in inputs}
            )
            for m in given
        ]
        found.append([tokens for features in made for tokens in tokens_of(features)])
    for last, first in zip(*found, strict=True):
        assert torch.equal(sorted_rows(first), sorted_rows(last)) and not torch.equal(first, last)


@pytest.mark.parametrize("method", ["visionzip", "tome", "prumerge", "prumerge_plus"])
@pytest.mark.parametrize("model", ROWS, indirect=True)
def test_methods_that_fold_tokens_hand_over_what_they_made(model: Model, method: str) -> None:
    """Of every image, tile and frame; a token stands at its anchor, and encoded images are the same."""
    base, name = model.pruned.model, model.row.model_type
    try:
        model.pruned.set_vispruner_config(method=method)
    except ValueError as error:
        assert "needs cls_query, raw_keys, which" in str(error) and method.startswith("prumerge")
        assert name not in ("llava", "llava_next", "video_llava")
        return
    for prompt, kind in [(SEVERAL, "image"), *([(CLIP, "video")] if "video" in model.row.modalities else [])]:
        inputs, choices = model.prompt(prompt), []
        modality = next((m for m in base.modalities if m.name == kind), base.modalities[0])
        described = {key: inputs[key] for key in modality.described_by if key in inputs}
        with watch_choices(after=choices.append), torch.no_grad():
            made = getattr(base, f"get_{modality.name}_features")(inputs[modality.pixels], **described)
        assert all(choice.selection.merge is not None for choice in choices)
        kept = [(choice.selection.indices.diff(dim=1) > 0).all() for choice in choices]
        assert all(kept) and made.merged_into is not None
        assert made.placeholders is None or all(bool((item.diff() > 0).all()) for item in made.placeholders)
        views = getattr(base, f"{modality.name}_views")(inputs[modality.pixels], **described)
        sizes = [sum(rows * columns for rows, columns in (view.grid for view in item)) for item in views]
        went = torch.cat(list(made.merged_into), dim=-1).split(sizes)
        for into, indices in zip(went, made.kept_indices, strict=True):
            assert set(into.tolist()) - {-1} <= set(indices.tolist())
        if (name, kind) != ("llava_onevision", "video"):  # where stock interpolates what is projected
            found = torch.cat(tokens_of(made))
            with torch.no_grad():
                for tokens, _, selection in choices:
                    rows = tokens.features if tokens.projected is None else tokens.projected
                    rows = selection.take(rows) if tokens.projected is not None else base.project(selection.take(rows))
                    distance = torch.cdist(rows.flatten(0, 1).double(), found.double()).amin(1)
                    assert distance.max() < 1e-4  # rows of length 1 to 10
        if name.startswith("qwen") and kind == "image":  # both of another size: the position is that of the anchor
            assert len(choices) == 2
            for (tokens, _, selection), places, rows in zip(choices, made.placeholders, tokens_of(made), strict=True):
                assert torch.equal(selection.indices[0], places)
                torch.testing.assert_close(rows, selection.take(tokens.features)[0])
        if kind == "image":
            images = model.pruned.encode_images(inputs[modality.pixels], **described)
            assert all(torch.equal(a, b) for a, b in zip(images.tokens, tokens_of(made), strict=True))
    assert torch.equal(answers(model.pruned, model.prompt(ONE)), answers(model.pruned, model.prompt(ONE, SEVERAL))[:1])


@pytest.mark.parametrize("model", ["llava"], indirect=True)
def test_features_are_folded_together_before_they_are_projected(model: Model) -> None:
    model.pruned.set_vispruner_config(method="visionzip")
    inputs, rows = model.prompt(ONE), []
    hook = model.pruned.model.multi_modal_projector.register_forward_hook(
        lambda module, given, made: rows.append(given[0].shape[-2])
    )
    logits(model.pruned, inputs)
    hook.remove()
    ((kept,),) = model.counts(inputs)[1].values()
    assert rows == [kept]


def sorted_rows(tokens: torch.Tensor) -> torch.Tensor:
    return torch.stack(sorted(tokens, key=lambda row: row.tolist()))


# Where a video is no pile of pictures to the model: only there is known which frames are of one.
KNOW_VIDEOS = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "video_llava")


@pytest.mark.parametrize("method", ["evs", "vidcom2"])
@pytest.mark.parametrize("model", KNOW_VIDEOS, indirect=True)
def test_the_frames_of_a_video_are_compared_with_each_other(model: Model, method: str) -> None:
    model.pruned.set_vispruner_config(method=method)
    choices: list[Choice] = []
    with watch_choices(after=choices.append):
        logits(model.pruned, model.prompt(CLIP, CLIP))
    (videos,) = (choice.tokens.videos for choice in choices)
    frames = len(videos) // 2
    assert frames > 1 and videos == (0,) * frames + (1,) * frames


# Rows and columns of tokens that stand for the picture of `ONE` or a part of it, where it is not made square.
GRIDS_OF_ONE = {
    "llava_next": (4, 3),
    "llava_onevision": (5, 8),
    **dict.fromkeys(["qwen2_vl", "qwen2_5_vl", "qwen3_vl"], (2, 3)),
}


@pytest.mark.parametrize("name", ROWS)
def test_text_ids_mean_nothing_special(name: str) -> None:
    found = re.findall(r"\"\w*(?:token_id|token_index)\": (\d+)", ROWS[name].config().to_json_string())
    assert not {int(value) for value in found} & set(PLAIN)


def feature_table() -> str:
    """Return README's table: an architecture a line, and what the tests above cover of it."""
    tests = [value for value in globals().values() if hasattr(value, "column")]
    columns = list(dict.fromkeys(test.column for test in tests))
    lines = [f"| architecture (`model_type`) | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in ROWS:
        covered = {
            test.column
            for test in tests
            for mark in test.pytestmark
            if mark.name == "parametrize" and mark.args[0] == "model" and name in mark.args[1]
        }
        cells = ["✓" if column in covered else "" for column in columns]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_every_architecture_has_a_row() -> None:
    assert set(ROWS) == set(vispruner.ARCHITECTURES)


def test_readme_shows_the_table() -> None:
    assert feature_table() in PAGE.read_text(), "run: python tests/test_architectures.py"


if __name__ == "__main__":
    print(feature_table(), file=sys.stdout)
