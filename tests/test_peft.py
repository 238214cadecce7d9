"""PEFT's adapters and soft prompts train on a pruned model wherever they do on a stock one.

What stock or PEFT refuses, or gets wrong in stock already, is found by asking stock.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from counting import cached_tokens
from matrix import NEW, ONE, ROWS, SEVERAL, TOLERANCE, Model, dropped_columns, generate, reference_of
from torch.nn import functional as F

from vispruner.stock_versions import CACHE


@pytest.fixture(autouse=True)
def without_the_last_prompt(request: pytest.FixtureRequest) -> None:
    """Forget what Qwen-VL remembers of the last prompt of whichever test: embedded prompts are numbered by it."""
    if "model" in request.fixturenames:
        model = request.getfixturevalue("model")
        for which in (model.stock, model.pruned):
            if hasattr(which.model, "rope_deltas"):
                which.model.rope_deltas = None


VIRTUAL = 3
TEXT_ATTENTION = r".*(language_model|text_model)\..*\.(q_proj|v_proj)"
SOFT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": VIRTUAL}
KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=TEXT_ATTENTION, init_lora_weights=False
    ),
    "prompt": lambda: peft.PromptTuningConfig(**SOFT),
    "p-tuning": lambda: peft.PromptEncoderConfig(**SOFT, encoder_hidden_size=8),
    "prefix": lambda: peft.PrefixTuningConfig(**SOFT),
}
every_model = pytest.mark.parametrize("model", ROWS, indirect=True)
every_kind = pytest.mark.parametrize("kind", KINDS)


def adapted(model: Any, kind: str) -> Any:
    """A copy of a model with an adapter, whose weights are drawn from one seed."""
    torch.manual_seed(0)
    return peft.get_peft_model(copy.deepcopy(model), KINDS[kind]())


def labelled(model: Model, inputs: dict[str, Any]) -> dict[str, Any]:
    ids = inputs["input_ids"]
    hidden = (inputs["attention_mask"] == 0) | torch.isin(ids, torch.tensor(model.pruned.model.placeholder_ids))
    return {**inputs, "labels": ids.masked_fill(hidden, -100)}


def trainable_in_stock(model: Model, kind: str, batch: dict[str, Any]) -> Any:
    stock = adapted(model.stock, kind)
    try:
        return stock, stock(**copy.copy(batch)).loss
    except (IndexError, ValueError, RuntimeError) as error:
        pytest.skip(f"stock does not train so: {error}")


@every_kind
@every_model
def test_a_step_changes_the_adapter_alone(model: Model, kind: str) -> None:
    inputs = model.prompt(ONE, SEVERAL)
    batch = labelled(model, inputs)
    trainable_in_stock(model, kind, batch)
    tuned = adapted(model.pruned, kind)
    own = {name: parameter for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    others = {name: parameter.clone() for name, parameter in tuned.named_parameters() if name not in own}
    optimizer = torch.optim.SGD(own.values(), lr=0.1)
    tuned.train()
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = tuned(**copy.copy(batch)).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert all(loss == loss and 0 < loss < 100 for loss in losses) and losses[1] != losses[0]
    assert all(parameter.grad is not None for parameter in own.values())
    assert any(parameter.grad.abs().sum() > 0 for parameter in own.values())
    for name, parameter in tuned.named_parameters():
        if name in others:
            assert parameter.grad is None and torch.equal(parameter, others[name]), name


@every_kind
@every_model
def test_with_all_tokens_the_loss_is_that_of_stock(model: Model, kind: str) -> None:
    batch = labelled(model, model.prompt(ONE, SEVERAL))
    _, expected = trainable_in_stock(model, kind, batch)
    tuned = adapted(model.pruned, kind)
    tuned.get_base_model().set_vispruner_config(**keep_all(model))
    assert torch.equal(tuned(**copy.copy(batch)).loss, expected)


@every_kind
@every_model
def test_the_loss_equals_a_computation_by_hand(model: Model, kind: str) -> None:
    """Stock with the adapter, on a prompt that is built without ours; the loss over what stays, column by column."""
    inputs = model.prompt(SEVERAL)
    batch = labelled(model, inputs)
    stock, _ = trainable_in_stock(model, kind, batch)
    tokens, stays = reference_of(model, inputs)
    dropped = dropped_columns(inputs, stays)
    if model.row.positions == "original":
        hand = {**inputs, "attention_mask": inputs["attention_mask"].masked_fill(dropped, 0)}
        if kind == "lora":  # behind soft prompts stock numbers all columns as text
            names = ("mm_token_type_ids", "image_grid_thw", "attention_mask")
            described = {name: inputs[name] for name in names}
            hand["position_ids"] = model.stock.model.get_rope_index(inputs["input_ids"], **described)[0]
    else:
        embeds = model.stock.get_input_embeddings()(inputs["input_ids"]).detach()
        for token, items in tokens.items():
            embeds[(inputs["input_ids"] == token) & ~dropped] = torch.cat(items)
        hand = {"inputs_embeds": embeds[~dropped][None], "attention_mask": inputs["attention_mask"][~dropped][None]}
        if "token_type_ids" in inputs:
            hand["token_type_ids"] = inputs["token_type_ids"][~dropped][None]
    scores, labels = stock(**hand).logits[0], batch["labels"][~dropped]
    soft = VIRTUAL if kind in ("prompt", "p-tuning") else 0  # columns of their own, the last of which predicts
    if "input_ids" in hand:
        scores = torch.cat([scores[:soft], scores[soft:][~dropped[0]]])
    expected = F.cross_entropy(scores[:-1], F.pad(labels, (soft, 0), value=-100)[1:])
    torch.testing.assert_close(adapted(model.pruned, kind)(**copy.copy(batch)).loss, expected, **TOLERANCE)


@every_kind
@every_model
def test_the_loss_is_that_of_a_prompt_written_short(model: Model, kind: str) -> None:
    """And as little is cached. Of one row: stock counts padding between soft prompts and text, so length matters."""
    inputs = model.prompt(SEVERAL)
    full, kept = model.counts(inputs)
    trainable_in_stock(model, kind, labelled(model, inputs))
    tuned = adapted(model.pruned, kind)
    losses = [tuned(**labelled(model, form)).loss for form in (inputs, model.row.shortened(inputs, kept))]
    torch.testing.assert_close(losses[0], losses[1], **TOLERANCE)
    lost = sum(map(sum, full.values())) - sum(map(sum, kept.values()))
    virtual = 0 if kind == "lora" else VIRTUAL
    assert lost and cached_tokens(tuned, inputs) == inputs["input_ids"].shape[1] - lost + virtual


def keep_all(model: Model) -> dict[str, Any]:
    """What makes a pruned model the stock one, newlines of tiles included."""
    native = {"tile_mode": "native"} if "tile_mode" in model.pruned.config.vispruner_config else {}
    return {"keep_ratio": 1.0, **native}


@every_kind
@every_model
def test_generate(model: Model, kind: str) -> None:
    inputs = model.prompt(ONE)
    stock, _ = trainable_in_stock(model, kind, labelled(model, inputs))
    width, virtual = inputs["input_ids"].shape[1], 0 if kind == "lora" else VIRTUAL
    settings = {"return_dict_in_generate": True}
    try:
        expected = generate(stock.eval(), inputs, **settings)
    except (IndexError, ValueError, RuntimeError) as error:
        pytest.skip(f"stock does not generate so: {error}")
    if expected[CACHE].get_seq_length() != width + virtual + NEW - 1:
        pytest.skip("this PEFT knows the KV cache by another name than this transformers: stock is wrong, too")
    tuned = adapted(model.pruned, kind).eval()
    full, kept = (sum(map(sum, counts.values())) for counts in model.counts(inputs))
    found = generate(tuned, inputs, **settings)
    assert torch.equal(found.sequences[:, :width], inputs["input_ids"])
    assert found[CACHE].get_seq_length() == width - full + kept + virtual + NEW - 1
    if virtual == 0 or model.row.positions == "renumber":  # else PEFT drops the positions that tokens keep
        with torch.no_grad():
            first = tuned(**copy.copy(inputs)).logits[0, -1].argmax()
        assert int(found.sequences[0, width]) == int(first)
    tuned.get_base_model().set_vispruner_config(**keep_all(model))
    assert torch.equal(generate(tuned, inputs, **settings).sequences, expected.sequences)
