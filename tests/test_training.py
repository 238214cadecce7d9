"""Training a pruned model as any other: loss for both prompt forms, gradients, Trainer, LoRA; quantized inference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, PreTrainedModel, Trainer, TrainingArguments

import vispruner
from vispruner import code_files

KEPT = {"llava": 6, "llava_next": 4}
ANSWER = " It is a cat."


@pytest.fixture(scope="module", params=list(KEPT))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(architecture: str, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue({"llava": "tiny_llava_repo", "llava_next": "tiny_llava_next_repo"}[architecture])


@pytest.fixture
def model(base: Path, architecture: str) -> PreTrainedModel:
    return vispruner.load(base, visual_token_num=KEPT[architecture])


@pytest.fixture(scope="module")
def processor(base: Path) -> Any:
    return AutoProcessor.from_pretrained(base)


@pytest.fixture(scope="module")
def prompt(processor: Any, photo: Image.Image) -> dict[str, torch.Tensor]:
    return processor(text="USER: <image>\nWhat is it? ASSISTANT:", images=photo, return_tensors="pt")


@pytest.fixture(scope="module")
def example(processor: Any, photo: Image.Image) -> dict[str, torch.Tensor]:
    """A full prompt with its answer, the loss on the answer only."""
    question = "USER: <image>\nWhat is it? ASSISTANT:"
    batch = processor(text=question + ANSWER, images=photo, return_tensors="pt")
    labels = batch["input_ids"].clone()
    labels[:, : processor(text=question, images=photo, return_tensors="pt")["input_ids"].shape[1]] = -100
    assert (labels != -100).sum() > 3
    return {**batch, "labels": labels}


def dropped_tokens(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> int:
    full, kept = model.visual_token_counts(batch["pixel_values"], batch.get("image_sizes"))
    assert sum(kept) < sum(full)
    return sum(full) - sum(kept)


def short_form(model: PreTrainedModel, example: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same example as a processor that knows the budget writes it."""
    image_columns = (example["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    stays = torch.ones(example["input_ids"].shape[1], dtype=torch.bool)
    stays[image_columns[: dropped_tokens(model, example)]] = False
    per_token = ("input_ids", "attention_mask", "labels")
    return {name: value[:, stays] if name in per_token else value for name, value in example.items()}


def cache_length_shows_pruning(model: Any, prompt: dict[str, torch.Tensor], dropped: int) -> torch.Tensor:
    output = model.generate(**prompt, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    length = prompt["input_ids"].shape[1]
    assert output.past_key_values.get_seq_length() == length - dropped + output.sequences.shape[1] - length - 1
    assert torch.equal(output.sequences[:, :length].cpu(), prompt["input_ids"])
    return output.sequences[:, length:]


def test_loss_is_finite_and_equal_for_both_prompt_forms(model: PreTrainedModel, example: dict[str, Any]) -> None:
    with torch.no_grad():
        full, short = model(**example), model(**short_form(model, example))
    assert full.loss.isfinite() and full.loss > 0
    torch.testing.assert_close(full.loss, short.loss)
    assert full.logits.shape[1] == example["input_ids"].shape[1]
    torch.testing.assert_close(full.logits[:, -1], short.logits[:, -1])


def test_loss_is_over_the_answer_as_computed_by_hand(model: PreTrainedModel, example: dict[str, Any]) -> None:
    with torch.no_grad():
        output = model(**example)
    answer = example["labels"][example["labels"] != -100]
    log_probs = output.logits[0, -len(answer) - 1 : -1].log_softmax(-1)
    by_hand = -log_probs[torch.arange(len(answer)), answer].mean()
    torch.testing.assert_close(output.loss, by_hand)


def test_gradients_reach_projector_tower_and_language_model(model: PreTrainedModel, example: dict[str, Any]) -> None:
    gradients = []
    for batch in (example, short_form(model, example)):
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    full, short = gradients
    assert full.keys() == short.keys() and all(torch.equal(full[name], short[name]) for name in full)
    reached = {name for name, gradient in full.items() if gradient.isfinite().all() and gradient.any()}
    for part in ("multi_modal_projector.linear_1.weight", "language_model.layers.0.self_attn.q_proj.weight"):
        assert any(name.endswith(part) for name in reached), part
    # Layer 3 of 4 feeds nothing: the features are taken before it.
    for layer in (0, 1, 2):
        assert any("vision_tower" in name and f"layers.{layer}.mlp.fc1.weight" in name for name in reached), layer
    assert not any("vision_tower" in name and "layers.3." in name for name in reached)


def test_a_frozen_tower_gets_no_gradients(model: PreTrainedModel, example: dict[str, Any]) -> None:
    model.model.vision_tower.requires_grad_(False)
    model(**example).loss.backward()
    assert all(parameter.grad is None for parameter in model.model.vision_tower.parameters())
    assert model.model.multi_modal_projector.linear_1.weight.grad.any()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(
    model: PreTrainedModel, example: dict[str, Any], use_reentrant: bool
) -> None:
    model.train()
    calls, gradients = [0], []
    model.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *args: calls.append(calls.pop() + 1))
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(**example, use_cache=False).loss.backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert calls == [3]  # once without checkpointing, twice with it
    plain, found = gradients
    assert any("language_model" in name for name in plain) and found.keys() <= plain.keys()
    compared = [name for name in plain if use_reentrant is False or "vision_tower" not in name]
    for name in compared:  # the reentrant kind cannot train a tower whose input asks for no gradient, as in stock
        torch.testing.assert_close(found[name], plain[name])


class Examples(torch.utils.data.Dataset):
    """Photographs with a question and an answer."""

    def __init__(self, photo: Image.Image) -> None:
        self.items = [
            (photo, "What is it?", " A cat."),
            (photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "What is on the left?", " The eyes of an orange cat."),
            (photo.rotate(90), "Where?", " Here."),
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, question, answer = self.items[index]
        return {"image": image, "text": f"USER: <image>\n{question} ASSISTANT:{answer}</s>"}


@pytest.mark.core
def test_trainer_takes_a_step_and_saves_a_pruned_repo(
    model: PreTrainedModel, processor: Any, photo: Image.Image, architecture: str, tmp_path: Path
) -> None:
    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts, images = [item["text"] for item in items], [item["image"] for item in items]
        batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
        hidden = (batch["attention_mask"] == 0) | (batch["input_ids"] == model.config.image_token_id)
        return {**batch, "labels": batch["input_ids"].masked_fill(hidden, -100)}

    lengths = []
    model.model.language_model.register_forward_hook(lambda m, args, output: lengths.append(output[0].shape[1]))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=1,
        learning_rate=1e-3,
        remove_unused_columns=False,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    examples = Examples(photo)
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(loss == loss and 0 < loss < 100 for loss in losses)
    assert losses[1] < losses[0]  # the same three examples twice
    assert any(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    batch = collate([examples[index] for index in range(3)])
    assert max(lengths) <= batch["input_ids"].shape[1] - dropped_tokens(model, batch) // 3
    assert trainer.evaluate(examples)["eval_loss"] < losses[1]
    trainer.save_model(str(tmp_path / "final"))
    assert {file.name for file in code_files(architecture)} <= {file.name for file in (tmp_path / "final").iterdir()}
    again = vispruner.load(tmp_path / "final")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_lora_trains_generates_and_reloads(
    model: PreTrainedModel,
    base: Path,
    architecture: str,
    example: dict[str, Any],
    prompt: dict[str, torch.Tensor],
    tmp_path: Path,
    task_type: str | None,
) -> None:
    import peft

    dropped = dropped_tokens(model, prompt)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=task_type)
    adapted = peft.get_peft_model(model, config)
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = adapted(**example).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    adapted.eval()
    generated = cache_length_shows_pruning(adapted, prompt, dropped)
    with torch.no_grad():
        expected = adapted(**prompt).logits
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = vispruner.load(base, visual_token_num=KEPT[architecture])
    with torch.no_grad():
        assert not torch.allclose(fresh(**prompt).logits, expected, atol=1e-3)
    reloaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(reloaded(**prompt).logits, expected)
    assert torch.equal(cache_length_shows_pruning(reloaded, prompt, dropped), generated)


def test_a_merged_adapter_saves_as_a_pruned_repo(
    model: PreTrainedModel, architecture: str, prompt: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    merged = adapted.merge_and_unload()
    assert type(merged) is type(model)
    merged.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["auto_map"] == vispruner.auto_map(architecture)
    with torch.no_grad():
        assert torch.equal(vispruner.load(tmp_path)(**prompt).logits, merged(**prompt).logits)


QUANTIZED = ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_a_quantized_model_generates_pruned(
    base: Path, architecture: str, prompt: dict[str, torch.Tensor], scheme: str
) -> None:
    from torchao import quantization
    from transformers import TorchAoConfig

    model = vispruner.load(
        base,
        visual_token_num=KEPT[architecture],
        quantization_config=TorchAoConfig(getattr(quantization, scheme)(), modules_to_not_convert=["lm_head"]),
    )
    kinds = {
        part: type(dict(model.named_modules())[part].weight.data).__name__
        for part in (
            "model.language_model.layers.0.self_attn.q_proj",
            "model.multi_modal_projector.linear_1",
            next(name for name, _ in model.named_modules() if name.endswith("encoder.layers.2.self_attn.q_proj")),
        )
    }
    assert all("Int8" in kind or "Quantized" in kind for kind in kinds.values()), kinds
    dense = vispruner.load(base, visual_token_num=KEPT[architecture])
    with torch.no_grad():
        found, exact = model(**prompt).logits, dense(**prompt).logits
    assert found.isfinite().all() and found.shape == exact.shape
    assert not torch.equal(found, exact)  # it really computes with rounded weights
    answer = cache_length_shows_pruning(model, prompt, dropped_tokens(model, prompt))
    assert answer.shape == (1, 3)
