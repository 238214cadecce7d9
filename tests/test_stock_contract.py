"""Outside, a pruned model has stock's shapes: whatever scores or trains a stock model works on a pruned one.

Every architecture against an independent computation (tests/rows) and against itself: one row of a batch against the
row alone, the base model against the model, a loss against one that is computed by hand.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import PeakBytes, cached_tokens
from matrix import (
    ASK,
    HELLO,
    NEW,
    ONE,
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
    type_of_new_tokens,
)
from rows import Image
from torch.func import functional_call, grad
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from vispruner.configuration_vispruner import CLIP_INPUTS
from vispruner.stock_versions import CACHE
from vispruner.visual_features import tokens_of

every_model = pytest.mark.parametrize("model", ROWS, indirect=True)
ANSWER, LONGER = [20, 21, 22, 23], [24, 25]
IGNORED = -100
# Of `forward`, beside stock's; newer stock has the first itself.
OWN_INPUTS = ("mm_encoder_outputs", "encoded_images", "vispruner_config", "prompt_lengths", "visual_importance")


@pytest.fixture(autouse=True)
def without_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("gradients" in request.keywords):
        yield


def is_placeholder(model: Model, ids: torch.Tensor) -> torch.Tensor:
    return torch.isin(ids, torch.tensor(model.pruned.model.placeholder_ids))


def appended(model: Model, inputs: dict[str, Any], new: torch.Tensor, seen: torch.Tensor | None = None) -> dict:
    """A prompt with completions (B, n) behind it, of which `seen` is no padding."""
    seen = torch.ones_like(new) if seen is None else seen
    longer = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], new], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], seen], dim=1),
    }
    for name in TOKEN_TYPES & set(inputs):
        longer[name] = F.pad(inputs[name], (0, new.shape[1]), value=type_of_new_tokens(model))
    return longer


def stock_returns_tuples(model: Model) -> bool:
    """Say whether stock runs where its config asks for tuples: some of it reads its own outputs by name."""
    model.stock.config.return_dict = False
    try:
        model.stock(**model.prompt(ONE), use_cache=False)
    except AttributeError:
        return False
    finally:
        model.stock.config.return_dict = True
    return True


def log_probs(output: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return output.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


@every_model
class TestShapes:
    @pytest.mark.parametrize("change", [{}, {"keep_ratio": 1.0}, {"method": "none"}], ids=["pruned", "all", "none"])
    def test_are_those_of_stock(self, model: Model, change: dict[str, Any]) -> None:
        if change:
            model.pruned.set_vispruner_config(**change)
        inputs = model.prompt(*model.prompts())
        asked = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
        stock, pruned = (which(**copy.copy(inputs), **asked) for which in (model.stock, model.pruned))
        assert pruned.logits.shape == stock.logits.shape
        for name in ("hidden_states", "attentions"):
            assert [part.shape for part in pruned[name]] == [part.shape for part in stock[name]], name
        base = model.pruned.model(**copy.copy(inputs), use_cache=False).last_hidden_state
        assert base.shape == model.stock.model(**copy.copy(inputs), use_cache=False).last_hidden_state.shape
        torch.testing.assert_close(model.pruned.lm_head(base), pruned.logits)

    def test_dropped_columns_are_zero_and_no_others(self, model: Model) -> None:
        inputs = model.prompt(*model.prompts())
        full, kept = model.counts(inputs)
        states = model.pruned.model(**copy.copy(inputs)).last_hidden_state
        seen, placeholders = inputs["attention_mask"].bool(), is_placeholder(model, inputs["input_ids"])
        zero = (states == 0).all(-1)
        assert not (zero & seen & ~placeholders).any()
        assert int((zero & placeholders).sum()) == sum(map(sum, full.values())) - sum(map(sum, kept.values()))

    def test_tuples_and_arguments_by_place(self, model: Model) -> None:
        inputs = model.prompt(ONE)
        for which in (model.pruned, model.pruned.model):
            as_dict = which(**copy.copy(inputs), use_cache=False)
            for as_tuple in (which(**copy.copy(inputs), use_cache=False, return_dict=False),):
                assert isinstance(as_tuple, tuple)
                assert torch.equal(as_tuple[0], as_dict[0])
            if not stock_returns_tuples(model):
                continue
            model.pruned.config.return_dict = False
            try:
                assert torch.equal(which(**copy.copy(inputs), use_cache=False)[0], as_dict[0])
                assert isinstance(which(**copy.copy(inputs), use_cache=False), tuple)
            finally:
                model.pruned.config.return_dict = True

    @pytest.mark.parametrize("kept", [1, 3, "columns"])
    def test_logits_to_keep_counts_the_callers_columns(self, model: Model, kept: Any) -> None:
        inputs = model.prompt(ONE, SEVERAL, TEXT)
        columns = torch.tensor([0, -1, -3]) if kept == "columns" else kept
        every = logits(model.pruned, inputs)
        some = model.pruned(**copy.copy(inputs), logits_to_keep=columns).logits
        torch.testing.assert_close(some, every[:, columns] if kept == "columns" else every[:, -kept:])

    def test_forward_takes_by_place_what_stock_does_and_nothing_twice(self, model: Model) -> None:
        inputs = model.prompt(ONE)
        ours, stock = (list(inspect.signature(which.forward).parameters) for which in (model.pruned, model.stock))
        added = {
            *OWN_INPUTS,
            *CLIP_INPUTS,
            *{"pixel_values"} - set(stock),
        }  # so newer stock names Video-LLaVA's images
        assert [name for name in ours if name not in added] == [name for name in stock if name not in added]
        by_place = [inputs.get(name) for name in stock[: 1 + max(stock.index(name) for name in inputs)]]
        assert torch.equal(model.pruned(*by_place).logits, logits(model.pruned, inputs))
        with pytest.raises(TypeError, match="input_ids twice"):
            model.pruned(inputs["input_ids"], **inputs)
        with pytest.raises(TypeError, match=r"forward takes \d+ inputs by place, got 40"):
            model.pruned(*[None] * 40)

    def test_a_mask_of_another_shape_is_refused_for_a_full_prompt(self, model: Model) -> None:
        inputs = model.prompt(ONE)
        inputs["attention_mask"] = inputs["attention_mask"][:, :-1]
        with pytest.raises(ValueError, match="attention_mask must be 2-D"):
            model.pruned(**inputs)

    def test_no_call_takes_more_memory_than_stock(self, model: Model) -> None:
        inputs = model.prompt(*model.prompts())
        peaks = []
        for which in (model.stock, model.pruned):
            with PeakBytes() as memory:
                which(**copy.copy(inputs), use_cache=False)
            peaks.append(memory.peak)
        assert peaks[1] <= 1.1 * peaks[0]  # the choice itself, in a model whose layers hold next to nothing


@every_model
class TestScores:
    def test_text_columns_equal_an_independent_reference(self, model: Model) -> None:
        """Those of the short prompt, computed by hand; in the full prompt, with what is dropped masked out."""
        inputs = model.prompt(SEVERAL)
        tokens, stays = reference_of(model, inputs)
        dropped = dropped_columns(inputs, stays)
        text = ~is_placeholder(model, inputs["input_ids"])[0]
        found = logits(model.pruned, inputs)[0, text]
        if model.row.positions == "original":
            names = ("mm_token_type_ids", "image_grid_thw", "attention_mask")
            positions, _ = model.stock.model.get_rope_index(inputs["input_ids"], **{n: inputs[n] for n in names})
            mask = inputs["attention_mask"].masked_fill(dropped, 0)
            expected = model.stock(**{**inputs, "attention_mask": mask, "position_ids": positions}).logits[0, text]
        else:
            embeds = model.stock.get_input_embeddings()(inputs["input_ids"])
            for token, items in tokens.items():
                embeds[(inputs["input_ids"] == token) & ~dropped] = torch.cat(items)
            types = {name: inputs[name][~dropped][None] for name in {"token_type_ids"} & set(inputs)}
            short = model.stock(inputs_embeds=embeds[~dropped][None], **types).logits[0]
            expected = short[text[~dropped[0]]]
        torch.testing.assert_close(found, expected, **TOLERANCE)

    def test_completions_of_a_batch_equal_those_alone(self, model: Model) -> None:
        """As GRPO and DPO score: prompts padded on the left, completions on the right, the last columns alone."""
        prompts = [ONE, SEVERAL, TEXT]
        new = torch.tensor([ANSWER, [*LONGER, 0, 0], [*LONGER, 26, 0]])
        seen = (new > 0).long()
        inputs = appended(model, model.prompt(*prompts), new, seen)
        kept = new.shape[1] + 1
        batch = log_probs(model.pruned(**copy.copy(inputs), logits_to_keep=kept).logits[:, :-1], new)
        for row, prompt in enumerate(prompts):
            length = int(seen[row].sum())
            alone = appended(model, model.prompt(prompt), new[row : row + 1, :length])
            expected = model.pruned(**copy.copy(alone), logits_to_keep=length + 1).logits[:, :-1]
            torch.testing.assert_close(
                batch[row, :length], log_probs(expected, new[row : row + 1, :length])[0], **TOLERANCE
            )

    def test_an_answer_is_scored_as_it_was_generated(self, model: Model) -> None:
        inputs = model.prompt(ONE, SEVERAL, TEXT)
        result = generate(model.pruned, inputs, return_dict_in_generate=True, output_logits=True)
        width = inputs["input_ids"].shape[1]
        whole = appended(model, inputs, result.sequences[:, width:])
        found = logits(model.pruned, whole)[:, width - 1 : -1]
        torch.testing.assert_close(found, torch.stack(result.logits, dim=1), **TOLERANCE)

    def test_behind_a_pruned_prompt_steps_count_as_the_caller_does(self, model: Model) -> None:
        """Masks are as long as the full prompt and what followed; the cache is not."""
        inputs = model.prompt(ONE, SEVERAL, TEXT)
        step = torch.tensor([[20], [21], [22]])
        whole = appended(model, inputs, step)
        expected = logits(model.pruned, whole)[:, -1]
        output = model.pruned(**copy.copy(inputs), use_cache=True)
        types = {name: whole[name][:, -1:] for name in TOKEN_TYPES & set(inputs)}
        later = {"input_ids": step, "attention_mask": whole["attention_mask"], CACHE: output[CACHE], **types}
        if model.row.positions == "original":  # stock's forward finds none under a mask
            names = ("mm_token_type_ids", "image_grid_thw", "attention_mask")
            positions, _ = model.stock.model.get_rope_index(whole["input_ids"], **{n: whole[n] for n in names})
            later["position_ids"] = positions[..., -1:]
        torch.testing.assert_close(model.pruned(**later).logits[:, -1], expected, **TOLERANCE)
        with pytest.raises(ValueError, match="attention_mask has 3 columns"):
            model.pruned(input_ids=step, attention_mask=whole["attention_mask"][:, :3], **{CACHE: output[CACHE]})


@every_model
class TestLosses:
    def labelled(self, model: Model, cover: bool = False) -> tuple[dict[str, Any], torch.Tensor]:
        """Rows that lose different numbers of tokens, and labels; with `cover`, of placeholders too."""
        inputs = model.prompt(ONE, SEVERAL)
        seen = inputs["attention_mask"]
        # Stock predicts the first token of a padded row from the padding: from nothing, so it is left out.
        labels = inputs["input_ids"].masked_fill((seen == 0) | (seen.cumsum(1) == 1), IGNORED)
        return inputs, labels if cover else labels.masked_fill(is_placeholder(model, labels), IGNORED)

    def by_hand(self, model: Model, inputs: dict[str, Any], labels: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The sum of losses over the short prompts one by one, and how many labels count."""
        total, count = torch.zeros(()), 0
        for row, prompt in enumerate((ONE, SEVERAL)):
            alone = model.prompt(prompt)
            of_row = labels[row, inputs["attention_mask"][row].bool()]
            states = model.pruned.model(**alone).last_hidden_state[0]
            kept = ~(states == 0).all(-1)
            scores = model.pruned.lm_head(states[kept])[:-1]
            total = total + F.cross_entropy(scores, of_row[kept][1:], ignore_index=IGNORED, reduction="sum")
            count += int((of_row[kept][1:] != IGNORED).sum())
        return total, count

    @pytest.mark.parametrize("cover", [False, True], ids=["text", "all"])
    def test_a_dropped_column_never_counts(self, model: Model, cover: bool) -> None:
        inputs, labels = self.labelled(model, cover)
        total, count = self.by_hand(model, inputs, labels)
        found = model.pruned(**copy.copy(inputs), labels=labels).loss
        torch.testing.assert_close(found, total / count, **TOLERANCE)
        shifted = model.pruned(
            **copy.copy(inputs), labels=labels, shift_labels=F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        )
        torch.testing.assert_close(shifted.loss, found)

    @pytest.mark.parametrize("cover", [False, True], ids=["text", "all"])
    def test_num_items_in_batch_is_scaled_by_what_counts(self, model: Model, cover: bool) -> None:
        """A trainer counts labels of dropped tokens; the loss stays the mean over those that count."""
        inputs, labels = self.labelled(model, cover)
        total, count = self.by_hand(model, inputs, labels)
        counted = int((labels[:, 1:] != IGNORED).sum())
        for items in (counted, torch.tensor(counted)):
            found = model.pruned(**copy.copy(inputs), labels=labels, num_items_in_batch=items).loss
            torch.testing.assert_close(found, total / count, **TOLERANCE)
        twice = model.pruned(**copy.copy(inputs), labels=labels, num_items_in_batch=2 * counted).loss
        torch.testing.assert_close(twice, total / count / 2, **TOLERANCE)

    def test_labels_of_one_row_need_no_batch(self, model: Model) -> None:
        inputs = model.prompt(ONE)
        labels = inputs["input_ids"].masked_fill(is_placeholder(model, inputs["input_ids"]), IGNORED)
        found = [model.pruned(**copy.copy(inputs), labels=each).loss for each in (labels, labels[0])]
        assert torch.equal(*found)

    @pytest.mark.gradients
    def test_functional_gradients_are_those_of_backward(self, model: Model) -> None:
        inputs, labels = self.labelled(model)

        def loss_of(head: dict[str, torch.Tensor]) -> torch.Tensor:
            return functional_call(model.pruned, head, (), {**inputs, "labels": labels}).loss

        weight = model.pruned.lm_head.weight
        expected = torch.autograd.grad(model.pruned(**copy.copy(inputs), labels=labels).loss, weight)[0]
        found = grad(loss_of)({"lm_head.weight": weight.detach()})["lm_head.weight"]
        torch.testing.assert_close(found, expected)

    def test_labels_of_nothing_but_dropped_tokens_give_no_loss(self, model: Model) -> None:
        inputs = model.prompt(ONE)
        states = model.pruned.model(**copy.copy(inputs)).last_hidden_state
        gone = (states == 0).all(-1)
        labels = inputs["input_ids"].masked_fill(~gone, IGNORED)
        found = model.pruned(**copy.copy(inputs), labels=labels, num_items_in_batch=int(gone.sum()))
        assert float(found.loss) == 0

    def trained(self, model: Any, batches: list[dict[str, Any]], smoothing: float, folder: Path) -> float:
        """The loss of one step of a trainer, which accumulates its batches."""
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=len(batches),
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            label_smoothing_factor=smoothing,
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        numbers = list(range(len(batches)))
        collate = lambda chosen: dict(batches[chosen[0]])  # noqa: E731
        trainer = Trainer(model=copy.deepcopy(model), args=arguments, train_dataset=numbers, data_collator=collate)
        return trainer.train().training_loss

    @pytest.mark.gradients
    @pytest.mark.parametrize("cover", [False, True], ids=["text", "all"])
    def test_a_trainer_has_the_loss_of_forward(self, model: Model, cover: bool, tmp_path: Path) -> None:
        """By the factor that stock's has: some versions of the trainer count a label that nothing predicts."""
        inputs = model.prompt(ONE)
        ids = inputs["input_ids"]
        batch = {**inputs, "labels": ids if cover else ids.masked_fill(is_placeholder(model, ids), IGNORED)}
        stock, pruned = (
            (self.trained(which, [batch], 0.0, tmp_path), float(which(**copy.copy(batch)).loss.detach()))
            for which in (model.stock, model.pruned)
        )
        assert pruned[0] / pruned[1] == pytest.approx(stock[0] / stock[1], rel=1e-4)

    @pytest.mark.gradients
    @pytest.mark.parametrize("cover", [False, True], ids=["text", "all"])
    def test_accumulated_batches_count_by_their_labels(self, model: Model, cover: bool, tmp_path: Path) -> None:
        """The mean of each batch by the labels given with it: as if those of dropped tokens had that mean, too."""
        batches = []
        for prompt in (ONE, SEVERAL):
            inputs = model.prompt(prompt)
            ids = inputs["input_ids"]
            batches.append(
                {**inputs, "labels": ids if cover else ids.masked_fill(is_placeholder(model, ids), IGNORED)}
            )

        def by_hand(which: Any, weights: list[int]) -> float:
            means = [float(which(**copy.copy(batch)).loss.detach()) for batch in batches]
            return sum(mean * weight for mean, weight in zip(means, weights, strict=True))

        counts = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches]
        labels = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
        by_version = (  # by labels, by those that something predicts, and for models that take no number of items
            [count / sum(counts) for count in counts],
            [count / labels for count in counts],
            [1 / len(counts)] * len(counts),
        )
        stock, pruned = (self.trained(which, batches, 0.0, tmp_path) for which in (model.stock, model.pruned))
        (weights,) = (w for w in by_version if stock == pytest.approx(by_hand(model.stock, w), rel=1e-5))
        assert pruned == pytest.approx(by_hand(model.pruned, weights), rel=1e-4)

    @pytest.mark.gradients
    def test_checkpointing_changes_no_gradient(self, model: Model) -> None:
        """Of the encoder neither: what runs again in the backward pass chooses the same tokens."""
        inputs, labels = self.labelled(model)
        found = []
        for checkpointed in (False, True):
            pruned = copy.deepcopy(model.pruned).train()
            runs = [0]
            if checkpointed:
                pruned.gradient_checkpointing_enable({"use_reentrant": False})
            language_model = pruned.model.get_decoder()
            language_model.layers[0].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(runs.pop() + 1))
            loss = pruned(**copy.copy(inputs), labels=labels).loss
            loss.backward()
            assert runs == [1 + checkpointed]
            found.append({name: parameter.grad for name, parameter in pruned.named_parameters()})
        for name, gradient in found[0].items():
            assert (gradient is None) == (found[1][name] is None), name
            if gradient is not None:
                torch.testing.assert_close(found[1][name], gradient)

    @pytest.mark.gradients
    def test_label_smoothing_equals_a_computation_by_hand(self, model: Model, tmp_path: Path) -> None:
        inputs, smoothing = model.prompt(ONE), 0.1
        labels = inputs["input_ids"].masked_fill(is_placeholder(model, inputs["input_ids"]), IGNORED)
        labels[:, : int((labels == IGNORED).nonzero()[-1, 1]) + 2] = IGNORED  # what follows the image
        batch = {**inputs, "labels": labels}

        def by_hand(which: Any, shift: int) -> float:
            scores = logits(which, inputs)[0, : len(labels[0]) - shift].log_softmax(-1)
            wanted = labels[0, shift:]
            counts = wanted != IGNORED
            right = scores[counts].gather(-1, wanted[counts][:, None]).mean()
            return -float((1 - smoothing) * right + smoothing * scores[counts].mean())

        stock, pruned = (self.trained(which, [batch], smoothing, tmp_path) for which in (model.stock, model.pruned))
        # Some versions of the trainer forget to shift the labels of models that read images.
        (shift,) = (shift for shift in (0, 1) if stock == pytest.approx(by_hand(model.stock, shift), rel=1e-4))
        assert pruned == pytest.approx(by_hand(model.pruned, shift), rel=1e-4)


@every_model
class TestEmbeddedPrompts:
    """`inputs_embeds` beside pixels: placeholders are told by their embedding, as stock tells them."""

    def embedded(self, model: Model, inputs: dict[str, Any]) -> dict[str, Any]:
        embeds = model.pruned.get_input_embeddings()(inputs["input_ids"])
        return {**{name: value for name, value in inputs.items() if name != "input_ids"}, "inputs_embeds": embeds}

    def test_keep_all_equals_stock(self, model: Model) -> None:
        model.pruned.set_vispruner_config(keep_ratio=1.0)
        inputs = self.embedded(model, model.prompt(ONE))
        for which in (model.stock, model.pruned):
            which.model.rope_deltas = None  # stock numbers embeddings by those of an earlier call
        assert torch.equal(logits(model.pruned, inputs), logits(model.stock, inputs))

    def test_prune_as_ids_do(self, model: Model) -> None:
        inputs = model.prompt(ONE, SEVERAL, TEXT)
        embedded = self.embedded(model, inputs)
        if model.row.positions == "original":  # stock numbers an embedded prompt as text, so both are told
            place = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
            positions = place.expand(3, *place.shape)
            inputs, embedded = ({**form, "position_ids": positions} for form in (inputs, embedded))
        torch.testing.assert_close(logits(model.pruned, embedded), logits(model.pruned, inputs), **TOLERANCE)
        short = cached_tokens(model.pruned, embedded)
        assert short == cached_tokens(model.pruned, inputs) < inputs["input_ids"].shape[1]

    def test_generate_new_tokens_alone(self, model: Model) -> None:
        inputs = self.embedded(model, model.prompt(ONE))
        try:
            stock = generate(model.stock, inputs)
        except ValueError as error:  # stock does not take embeddings here
            with pytest.raises(ValueError, match=re.escape(str(error)[:60])):
                generate(model.pruned, inputs)
            return
        pruned = generate(model.pruned, inputs)
        assert pruned.shape == stock.shape
        first = logits(model.pruned, inputs)[0, -1].argmax()
        assert int(pruned[0, 0]) == int(first)
        both = {**inputs, "input_ids": model.prompt(ONE)["input_ids"]}
        result = generate(model.pruned, both)
        width = both["input_ids"].shape[1]
        assert torch.equal(result[:, :width], both["input_ids"]) and torch.equal(result[:, width:], pruned)

    @pytest.mark.gradients
    def test_soft_prompts_get_gradients(self, model: Model) -> None:
        inputs = self.embedded(model, model.prompt(ONE))
        soft = torch.randn(1, 2, inputs["inputs_embeds"].shape[-1], requires_grad=True)
        inputs["inputs_embeds"] = torch.cat([soft, inputs["inputs_embeds"]], dim=1)
        for name in ("attention_mask", *TOKEN_TYPES & set(inputs)):
            inputs[name] = F.pad(inputs[name], (2, 0), value=1 if name == "attention_mask" else 0)
        output = model.pruned(**inputs)
        assert output.logits.shape[1] == inputs["inputs_embeds"].shape[1]
        output.logits[:, -1].sum().backward()
        assert soft.grad is not None and soft.grad.abs().sum() > 0
        model.pruned.zero_grad()


@every_model
class TestPlaceholdersWithoutImage:
    def test_are_text_in_forward_as_in_stock(self, model: Model) -> None:
        inputs = model.prompt(ONE)
        alone = {name: inputs[name] for name in ("input_ids", "attention_mask", *TOKEN_TYPES & set(inputs))}
        assert torch.equal(logits(model.pruned, alone), logits(model.stock, alone))

    def test_are_refused_in_a_prompt_of_generate(self, model: Model) -> None:
        inputs = model.prompt(ONE)
        alone = {name: inputs[name] for name in ("input_ids", "attention_mask", *TOKEN_TYPES & set(inputs))}
        with pytest.raises(ValueError, match="there is no image"):
            generate(model.pruned, alone)


@every_model
class TestImagesWithoutPlaceholders:
    def test_are_refused(self, model: Model) -> None:
        text = {**model.prompt(TEXT), **model.pixels(model.prompt(ONE))}
        for call in (model.pruned, model.pruned.generate):
            with pytest.raises(ValueError, match="put one <image> per image"):
                call(**copy.copy(text))

    def test_an_image_spread_over_two_rows_is_refused(self, model: Model) -> None:
        inputs = model.prompt(ONE, ONE)
        row, other = inputs["input_ids"]
        placeholders = is_placeholder(model, row).nonzero()
        row[placeholders[0]], other[placeholders[0] - 1] = HELLO[0], row[placeholders[0]].clone()
        said = "two rows" if model.row.positions == "renumber" else None  # stock fails first where it counts axes
        for call in (model.pruned, model.pruned.generate):
            with pytest.raises((ValueError, RuntimeError), match=said):
                call(**copy.copy(inputs))


@every_model
class TestPackedSamples:
    def test_do_not_see_each_other(self, model: Model) -> None:
        """Two samples in one row, told apart by positions that start anew, without a mask."""
        parts = [
            model.prompt([HELLO, Image((56, 84), seed=1), ASK]),
            model.prompt([[11], Image((56, 84), seed=2), [13]]),
        ]
        alone = [logits(model.pruned, {**part, "use_cache": False})[0, -1] for part in parts]
        by_column = {"input_ids", *TOKEN_TYPES & set(parts[0])}
        packed = {
            name: torch.cat([part[name] for part in parts], dim=1 if name in by_column else 0)
            for name in parts[0]
            if name != "attention_mask"
        }
        positions = []
        for part in parts:
            place = torch.arange(part["input_ids"].shape[1])[None]
            if model.row.positions == "original":
                kinds, grid = part["mm_token_type_ids"], part["image_grid_thw"]
                three, _ = model.stock.model.get_rope_index(part["input_ids"], kinds, image_grid_thw=grid)
                place = torch.cat([place[None], three])
            positions.append(place)
        packed["position_ids"] = torch.cat(positions, dim=-1)
        if "token_type_ids" in packed:
            pytest.skip("an image sees itself in both directions here, and stock numbers such images over samples")
        found = logits(model.pruned, {**packed, "use_cache": False})
        first = parts[0]["input_ids"].shape[1] - 1
        torch.testing.assert_close(found[0, first], alone[0], **TOLERANCE)
        torch.testing.assert_close(found[0, -1], alone[1], **TOLERANCE)
        model.pruned.set_vispruner_config(keep_ratio=1.0)
        stock = logits(model.stock, {**packed, "use_cache": False})
        assert torch.equal(logits(model.pruned, {**packed, "use_cache": False}), stock)


@every_model
class TestPerCall:
    """`vispruner_config` of one call; it neither stays nor disturbs others."""

    @pytest.mark.core
    def test_budgets_per_call_are_those_of_a_model_set_to_them(self, model: Model) -> None:
        inputs = model.prompt(SEVERAL)
        before = dict(model.pruned.config.vispruner_config)
        own = cached_tokens(model.pruned, inputs)
        for change in ({"keep_ratio": 0.2}, {"visual_token_num": 2}, {"method": "uniform_grid"}, {"method": "none"}):
            given = logits(model.pruned, {**inputs, "vispruner_config": change})
            answered = answers(model.pruned, {**inputs, "vispruner_config": change})
            assert model.pruned.config.vispruner_config == before
            model.pruned.set_vispruner_config(**change)
            assert torch.equal(given, logits(model.pruned, inputs))
            assert torch.equal(answered, answers(model.pruned, inputs))
            model.pruned.config.vispruner_config = dict(before)
        assert cached_tokens(model.pruned, inputs) == own

    def test_encoded_images_are_made_and_used_under_one(self, model: Model) -> None:
        inputs = model.prompt(ONE)
        image = model.pruned.modalities[0]
        described = {name: inputs[name] for name in image.described_by if name in inputs}
        small = {"vispruner_config": {"keep_ratio": 0.2}}
        images = model.pruned.encode_images(inputs[image.pixels], **described, **small)
        rest = {name: value for name, value in inputs.items() if name != image.pixels}
        for call in (answers, logits):
            found = call(model.pruned, {**rest, "encoded_images": images, **small})
            torch.testing.assert_close(found, call(model.pruned, {**inputs, **small}))
            with pytest.raises(ValueError, match="encoded_images were made with"):
                call(model.pruned, {**rest, "encoded_images": images})

    def test_what_is_wrong_is_named_and_nothing_changes(self, model: Model) -> None:
        inputs = model.prompt(ONE)
        for change, named in (({"keep_ratio": 2}, "keep_ratio"), ({"method": "no"}, "method"), ({"T": 1}, "unknown")):
            for call in (model.pruned, model.pruned.model, model.pruned.generate):
                with pytest.raises(ValueError, match=named):
                    call(**copy.copy(inputs), vispruner_config=change)
        with pytest.raises(ValueError, match="set_vispruner_config"):
            model.pruned(**copy.copy(inputs), vispruner_config={"codebook": "a.safetensors"})
        logits(model.pruned, inputs)

    def test_last_pruning_tells_what_each_image_had_and_kept(self, model: Model) -> None:
        inputs = model.prompt(SEVERAL)
        full, kept = ([n for counts in of.values() for n in counts] for of in model.counts(inputs))
        for run in (lambda: logits(model.pruned, inputs), lambda: generate(model.pruned, inputs)):
            generate(model.pruned, model.prompt(ONE))
            run()
            found = model.pruned.last_pruning
            assert (list(found.full_counts), list(found.kept_counts)) == (full, kept)
            assert model.pruned.model.last_pruning == found
        assert f"{sum(kept)} of {sum(full)} visual tokens kept" in str(found) and "\n" not in f"{found} {found!r}"
        text = model.prompt(TEXT)
        logits(model.pruned, text)
        assert model.pruned.last_pruning == found  # a step of a loop has no images, and takes nothing away
        logits(model.pruned, {**inputs, "vispruner_config": {"method": "none"}})
        assert list(model.pruned.last_pruning.kept_counts) == full

    @pytest.mark.core
    def test_threads_have_options_and_last_prunings_of_their_own(self, model: Model) -> None:
        inputs = model.prompt(ONE)

        def ask(keep_ratio: float) -> tuple[int, Any]:
            result = generate(
                model.pruned, inputs, vispruner_config={"keep_ratio": keep_ratio}, return_dict_in_generate=True
            )
            return result[CACHE].get_seq_length(), model.pruned.last_pruning

        ratios = [0.2, 0.5, 0.8, 1.0] * 3
        expected = {ratio: ask(ratio) for ratio in set(ratios)}
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(ask, ratios)) == [expected[ratio] for ratio in ratios]

    @pytest.mark.core
    def test_a_call_ends_under_the_options_it_began_with(self, model: Model) -> None:
        """Others may set budgets meanwhile: each answer has one of them, and none fails."""
        inputs = model.prompt(ONE)

        def ask(keep_ratio: float) -> int:
            model.pruned.set_vispruner_config(keep_ratio=keep_ratio)
            return generate(model.pruned, inputs, return_dict_in_generate=True)[CACHE].get_seq_length()

        ratios = [0.2, 0.5, 0.8, 1.0] * 3
        allowed = {ask(ratio) for ratio in ratios[:4]}
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(ask, ratios)) <= allowed


@every_model
class TestGenerate:
    def test_a_custom_generate_function_may_return_what_it_likes(self, model: Model) -> None:
        inputs = model.prompt(ONE)

        def only_new(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
            return torch.tensor([[7, 8]])

        def with_prompt(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
            return torch.cat([input_ids, torch.tensor([[7, 8]])], dim=1)

        assert model.pruned.generate(**copy.copy(inputs), custom_generate=only_new).tolist() == [[7, 8]]
        whole = model.pruned.generate(**copy.copy(inputs), custom_generate=with_prompt)
        assert whole.tolist() == [[*inputs["input_ids"][0].tolist(), 7, 8]]

    def test_a_custom_generate_repo_gets_ids_by_the_name_they_were_given(self, model: Model, tmp_path: Path) -> None:
        folder = tmp_path / "custom_generate"
        folder.mkdir()
        (folder / "generate.py").write_text(
            "def generate(model, input_ids, generation_config=None, **kwargs):\n    return input_ids[:, :1] * 0 + 9\n"
        )
        inputs = model.prompt(ONE)
        found = model.pruned.generate(**copy.copy(inputs), custom_generate=str(tmp_path), trust_remote_code=True)
        assert found.tolist() == [[9]]

    def test_a_max_length_that_is_too_short_is_told_in_the_callers_terms(self, model: Model) -> None:
        inputs = model.prompt(ONE)
        width = inputs["input_ids"].shape[1]
        with pytest.raises(ValueError, match=f"max_length is {width}, but the prompt alone has {width} tokens"):
            model.pruned.generate(**copy.copy(inputs), max_length=width)
        assert model.pruned.generate(**copy.copy(inputs), max_length=width + 2).shape[1] <= width + 2

    def test_compiled_answers_the_same_and_prunes(self, model: Model) -> None:
        inputs = model.prompt(ONE)
        result = generate(model.pruned, inputs, return_dict_in_generate=True)
        torch.compiler.reset()
        compiled = torch.compile(model.pruned.generate, backend="eager")
        found = compiled(
            **copy.copy(inputs),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
        )
        assert torch.equal(found.sequences, result.sequences)
        assert found[CACHE].get_seq_length() == result[CACHE].get_seq_length()
        assert found[CACHE].get_seq_length() < inputs["input_ids"].shape[1] + NEW - 1

    def test_nothing_the_caller_gave_is_changed(self, model: Model) -> None:
        inputs = model.prompt(ONE, SEVERAL)
        features = model.pruned.model.encoded(inputs)["mm_encoder_outputs"]
        pixels = {modality.pixels for modality in model.pruned.modalities}
        encoded = {**{n: v for n, v in inputs.items() if n not in pixels}, "mm_encoder_outputs": features}
        for given in (inputs, encoded):
            before = {name: copy.deepcopy(value) for name, value in given.items()}
            model.pruned(**given)
            model.pruned.generate(**given, max_new_tokens=2)
            assert given.keys() == before.keys()
            for name in set(given) - {"mm_encoder_outputs"}:
                assert torch.equal(given[name], before[name]), name
        again = answers(model.pruned, encoded)
        assert torch.equal(again, answers(model.pruned, inputs))

    def test_features_and_encoded_images_are_one_thing(self, model: Model) -> None:
        inputs = model.prompt(SEVERAL)
        image = model.pruned.modalities[0]
        described = {name: inputs[name] for name in image.described_by if name in inputs}
        images = model.pruned.encode_images(inputs[image.pixels], **described)
        features = model.pruned.model.get_image_features(inputs[image.pixels], **described, return_dict=True)
        rest = {name: value for name, value in inputs.items() if name != image.pixels}
        expected = answers(model.pruned, inputs)
        for given in (
            {"encoded_images": images},
            {"encoded_images": features},
            {"encoded_images": {"image": features}},
            {"mm_encoder_outputs": images},
            {"mm_encoder_outputs": {"image": images}},
            {"mm_encoder_outputs": {"image": features}},
        ):
            assert torch.equal(answers(model.pruned, {**rest, **given}), expected)


@every_model
class TestImageFeatures:
    def test_are_as_many_as_is_counted(self, model: Model) -> None:
        inputs = model.prompt(ONE)
        full, kept = (sum(map(sum, of.values())) for of in model.counts(inputs))
        features = model.pruned.get_image_features(**model.pixels(inputs))
        assert sum(map(len, tokens_of(features))) == sum(map(len, features.kept_indices)) == kept
        assert sum(features.full_counts) == full
        assert type(model.pruned.get_image_features(**model.pixels(inputs), return_dict=False)) is tuple

    def test_of_a_smaller_budget_are_fewer(self, model: Model) -> None:
        inputs, lengths = model.prompt(ONE), []
        for keep_ratio in (0.2, 0.7, 0.2):
            model.pruned.set_vispruner_config(keep_ratio=keep_ratio)
            lengths.append(cached_tokens(model.pruned, inputs))
        assert lengths[0] == lengths[2] < lengths[1]

    @pytest.mark.parametrize("change", [{"method": "none"}, {"keep_ratio": 1.0}])
    def test_of_all_describe_themselves_as_pruned_ones_do(self, model: Model, change: dict[str, Any]) -> None:
        model.pruned.set_vispruner_config(**change)
        features = model.pruned.get_image_features(**model.pixels(model.prompt(ONE)))
        counts = list(features.full_counts)
        assert [len(image) for image in tokens_of(features)] == [len(kept) for kept in features.kept_indices] == counts
        for places, count in zip(features.placeholders or [], counts, strict=False):
            assert torch.equal(places, torch.arange(count))

    def test_with_cls_cannot_be_asked_for(self, model: Model) -> None:
        if getattr(model.pruned.config, "vision_feature_select_strategy", "full") == "full":
            pytest.skip("there is none to leave out")
        pixels = model.pixels(model.prompt(ONE))
        with pytest.raises(ValueError, match="vision_feature_select_strategy"):
            model.pruned.get_image_features(**pixels, vision_feature_select_strategy="full")


@every_model
def test_get_image_features_gives_what_stock_gives_beside_the_tokens(model: Model) -> None:
    inputs = model.prompt(ONE)
    image = model.pruned.modalities[0]
    given = {name: inputs[name] for name in (image.pixels, *image.described_by) if name in inputs}
    for asked in ({}, {"output_hidden_states": True, "output_attentions": True}):
        stock, pruned = (
            which.get_image_features(**given, **asked, return_dict=True) for which in (model.stock, model.pruned)
        )
        assert type(pruned.pooler_output) is type(stock.pooler_output) or isinstance(pruned.pooler_output, list)
        assert len(pruned.pooler_output) == len(stock.pooler_output)
        torch.testing.assert_close(pruned.last_hidden_state, stock.last_hidden_state)
        if asked:
            for name in ("hidden_states", "attentions"):
                found = [None if part is None else part.shape for part in pruned[name]]
                assert found == [None if part is None else part.shape for part in stock[name]], name
            theirs, ours = stock.hidden_states, pruned.hidden_states
            assert all(torch.equal(*pair) for pair in zip(theirs, ours, strict=True) if None not in pair)
        else:
            assert pruned.hidden_states is None


@every_model
def test_get_image_features_gives_the_hidden_states_that_the_config_asks_for(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = model.prompt(ONE)
    image = model.pruned.modalities[0]
    given = {name: inputs[name] for name in (image.pixels, *image.described_by) if name in inputs}
    shapes = []
    for which in (model.stock, model.pruned):
        for config in (which.config, which.config.vision_config, which.model.config.vision_config):
            monkeypatch.setattr(config, "output_hidden_states", True)
        states = which.get_image_features(**given, return_dict=True).hidden_states
        shapes.append([None if state is None else state.shape for state in states or ()])
    theirs, ours = shapes
    assert len(ours) == len(theirs) and all(shape in (None, own) for shape, own in zip(theirs, ours, strict=True))


@every_model
def test_labels_change_nothing_that_is_generated(model: Model) -> None:
    inputs = model.prompt(ONE)
    expected = answers(model.pruned, inputs)
    for labels in (inputs["input_ids"], inputs["input_ids"][:, :3]):
        assert torch.equal(answers(model.pruned, {**inputs, "labels": labels}), expected)


@every_model
def test_printing_an_attribute_does_not_print_the_model(model: Model) -> None:
    assert len(repr(model.pruned.visual_token_counts)) < 200


@every_model
def test_a_mistyped_field_is_guessed(model: Model) -> None:
    with pytest.raises(ValueError, match=r"did you mean visual_token_num\?"):
        model.pruned.set_vispruner_config(visual_tokens_num=3)
