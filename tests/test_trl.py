"""TRL trains a pruned model as it trains a stock one: its losses and weights are those of loops that do not call it.

Each loop scores one completion at a time behind its own prompt. Rows of a batch lose different numbers of tokens.
Where TRL changes how it computes a loss (fused heads, chunks, checkpointing), its defaults are what is tried.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from documents import python_block, run_python_block
from PIL import Image
from rows import draw_weights
from rows.qwen2_5_vl import ROW as QWEN
from tiny_processors import write_processor
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

import vispruner
from vispruner import conversion

pytestmark = pytest.mark.trl

ASSETS = Path(conversion.__file__).parent / "assets"
STEPS, RATE, BETA = 3, 0.01, 0.1
TEMPERATURE = 3.0  # at which the trained toy gives different answers to one question
# Rows alone and in a batch, in one product and in chunks: sums in another order, of losses of order 1 to 10.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@dataclass
class Example:
    """Pictures, a question about them, and answers: the one to be learned first."""

    images: list[Image.Image]
    question: str
    answers: tuple[str, str]


@dataclass
class Subject:
    """A checkpoint to be loaded pruned, its processor, and questions that it can tokenize.

    written   how a prompt with so many pictures is written
    answered  how an answer is
    begins    whether a prompt begins with the tokenizer's own first token: TRL lets it in GRPO alone
    """

    folder: Path
    options: dict[str, Any]
    processor: Any
    examples: list[Example]
    written: Callable[[int, str], str]
    answered: Callable[[str], str]
    begins: bool = False

    def model(self) -> Any:
        return vispruner.load(self.folder, **self.options)

    def row(self, example: Example, completion: Sequence[int]) -> dict[str, torch.Tensor]:
        """One prompt with a completion behind it, without padding."""
        prompt = self.written(len(example.images), example.question)
        given = {"text": [prompt], "images": [example.images], "add_special_tokens": self.begins}
        inputs = dict(self.processor(**given, return_tensors="pt"))
        more = torch.tensor([list(completion)])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], more], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, len(completion)))
        return inputs

    def ids(self, answer: str) -> list[int]:
        return self.processor.tokenizer(self.answered(answer), add_special_tokens=False)["input_ids"]

    def log_probs(
        self, model: Any, example: Example, completion: Sequence[int], temperature: float = 1.0
    ) -> torch.Tensor:
        """Score each token of a completion."""
        logits = model(**self.row(example, completion)).logits[0, -len(completion) - 1 : -1] / temperature
        return logits.log_softmax(-1)[torch.arange(len(completion)), torch.tensor(list(completion))]


def llava(folder: Path) -> Subject:
    with Image.open(ASSETS / "scene.png") as picture:
        scene = picture.convert("RGB")
    turned = scene.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return Subject(
        ASSETS / "tiny-llava",
        {"visual_token_num": 18},
        AutoProcessor.from_pretrained(ASSETS / "tiny-llava"),
        [
            Example([scene], "What color is the square?", ("orange", "zero circles")),
            Example([scene, turned], "How many circles are there?", ("one circle", "blue")),
        ],
        lambda images, question: "USER: " + "<image>\n" * images + question + " ASSISTANT:",
        lambda answer: f" {answer}</s>",
    )


def qwen(folder: Path) -> Subject:
    stock = QWEN.stock_class(QWEN.config())
    draw_weights(stock)
    stock.save_pretrained(folder)
    write_processor(QWEN, folder)
    shapes = [(112, 168), (168, 168), (140, 112)]
    images = [Image.effect_noise(shape, 90).convert("RGB") for shape in shapes]
    return Subject(
        folder,
        QWEN.options,
        AutoProcessor.from_pretrained(folder),
        [
            Example(images[:1], "w20 w21", ("w22 w23 w24", "w25")),
            Example(images[1:], "w30 w31 w32 w33", ("w34", "w35 w36")),
        ],
        lambda images, question: "<|vision_start|><|image_pad|><|vision_end|>" * images + " " + question,
        lambda answer: f" {answer}",
    )


@pytest.fixture(scope="module", params=["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.video)])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    torch.manual_seed(0)
    return {"llava": llava, "qwen2_5_vl": qwen}[request.param](tmp_path_factory.mktemp(request.param))


def said(role: str, text: str, images: int = 0) -> list[dict[str, Any]]:
    pictures = [{"type": "image", "text": None} for _ in range(images)]
    return [{"role": role, "content": [*pictures, {"type": "text", "text": text}]}]


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """What all trainers get: every step sees all examples."""
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **more,
    }


@dataclass
class Run:
    """What a trainer did: its losses, and how long each prompt was in the language model."""

    losses: list[float]
    lengths: list[int]
    prunings: list[Any]


def train(trainer: Any) -> Run:
    run = Run([], [], [])
    model, step = trainer.model, trainer.training_step
    base = (model.get_base_model() if hasattr(model, "get_base_model") else model).model

    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(*args, **kwargs)
        run.losses.append(float(loss))
        run.prunings.append(getattr(base, "last_pruning", None))
        return loss

    trainer.training_step = training_step
    hook = base.language_model.register_forward_hook(
        lambda module, args, output: run.lengths.append(output[0].shape[1])
    )
    trainer.train()
    hook.remove()
    return run


def train_by_hand(model: Any, losses: Sequence[Callable[[Any], torch.Tensor]]) -> list[float]:
    """One step of gradient descent for each loss, with gradients of a norm of at most one."""
    model.train()
    found = []
    for loss_of in losses:
        model.zero_grad()
        loss = loss_of(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
        found.append(float(loss.detach()))
    return found


def require_same(run: Run, trained: Any, by_hand: Any, losses: list[float], subject: Subject) -> None:
    assert run.losses == pytest.approx(losses, rel=1e-4, abs=1e-5)
    expected = dict(by_hand.named_parameters())
    for name, parameter in trained.named_parameters():
        torch.testing.assert_close(parameter, expected[name], **CLOSE)
    before = dict(subject.model().named_parameters())
    assert any(not torch.equal(parameter, before[name]) for name, parameter in expected.items())
    require_pruned(run, subject)


def require_pruned(run: Run, subject: Subject) -> None:
    """The language model never saw the tokens that were dropped."""
    model, longest = subject.model(), 0
    for example in subject.examples:
        inputs = subject.row(example, subject.ids(example.answers[0]))
        full, kept = (sum(map(sum, counts.values())) for counts in model.model.count_visual_tokens(inputs))
        assert kept < full
        longest = max(longest, inputs["input_ids"].shape[1] - full + kept)
    assert run.lengths and max(run.lengths) <= longest + 8  # completions are of different lengths
    assert all(sum(pruning.kept_counts) < sum(pruning.full_counts) for pruning in run.prunings)


def answered_data(subject: Subject) -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "images": example.images,
                "prompt": said("user", example.question, len(example.images)),
                "completion": said("assistant", example.answers[0]),
            }
            for example in subject.examples
        ]
    )


def preferences(subject: Subject) -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "images": example.images,
                "prompt": said("user", example.question, len(example.images)),
                "chosen": said("assistant", example.answers[0]),
                "rejected": said("assistant", example.answers[1]),
            }
            for example in subject.examples
        ]
    )


class TestSFT:
    def scores(self, subject: Subject, model: Any) -> list[torch.Tensor]:
        return [subject.log_probs(model, example, subject.ids(example.answers[0])) for example in subject.examples]

    def nll(self, subject: Subject, model: Any) -> torch.Tensor:
        return -torch.cat(self.scores(subject, model)).mean()

    def nll_of_rows(self, subject: Subject, model: Any) -> torch.Tensor:
        return -torch.stack([score.mean() for score in self.scores(subject, model)]).mean()

    def dft(self, subject: Subject, model: Any) -> torch.Tensor:
        scores = torch.cat(self.scores(subject, model))
        return -(scores * scores.detach().exp()).mean()

    @pytest.mark.parametrize(
        ("loss", "more"),
        [
            ("nll", {}),
            ("nll", {"gradient_checkpointing_kwargs": {"use_reentrant": False, "selective": True}}),
            ("nll", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
            ("dft", {"loss_type": "dft"}),
        ],
        ids=["default", "selective checkpointing", "accumulated", "dft"],
    )
    def test_equals_a_loop_by_hand(self, subject: Subject, loss: str, more: dict[str, Any], tmp_path: Path) -> None:
        from trl import SFTConfig, SFTTrainer

        trained, by_hand = subject.model(), subject.model()
        arguments = SFTConfig(max_length=None, **settings(tmp_path, **more))
        trainer = SFTTrainer(
            trained, arguments, train_dataset=answered_data(subject), processing_class=subject.processor
        )
        run = train(trainer)
        if (parts := arguments.gradient_accumulation_steps) > 1:
            run.losses = [sum(run.losses[at : at + parts]) for at in range(0, len(run.losses), parts)]
            if not trainer.model_accepts_loss_kwargs:  # stock Qwen-VL: each part counts as much as another
                loss = "nll_of_rows"
        losses = train_by_hand(by_hand, [lambda model: getattr(self, loss)(subject, model)] * STEPS)
        require_same(run, trained, by_hand, losses, subject)

    def test_the_readme_s_run_trains_and_saves_a_pruned_repo(self, tmp_path: Path) -> None:
        subject = llava(tmp_path)
        example = replace(subject.examples[0], answers=subject.examples[0].answers[::-1])  # which it does not know yet
        by_hand, trained = subject.model(), subject.model()
        before = float(self.nll(replace(subject, examples=[example]), by_hand.eval()))
        here = {"num_train_epochs=1": "num_train_epochs=1, use_cpu=True, bf16=False, report_to=[]"}
        given = {"model": trained, "processor": subject.processor, "image": example.images[0]}
        given |= {"question": example.question, "answer": example.answers[0]}
        ran = run_python_block(python_block("SFTTrainer"), tmp_path, here, given)
        assert ran["trainer"].state.log_history[-1]["train_loss"] == pytest.approx(before, rel=1e-4)
        again = vispruner.load(tmp_path / "tuned")
        assert again.config.vispruner_config["visual_token_num"] == 18
        assert float(self.nll(replace(subject, examples=[example]), again)) < before

    def test_logits_for_metrics_are_those_of_whole_prompts(self, subject: Subject, tmp_path: Path) -> None:
        """`compute_metrics` and label smoothing take logits, which TRL lays beside the labels."""
        from trl import SFTConfig, SFTTrainer

        found = {}

        def compute_metrics(prediction: Any) -> dict[str, float]:
            logits, labels = torch.tensor(prediction.predictions)[:, :-1], torch.tensor(prediction.label_ids)[:, 1:]
            assert logits.shape[:2] == labels.shape
            scores = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            found["scores"] = [row[counts] for row, counts in zip(scores, labels != -100, strict=True)]
            return {}

        data = answered_data(subject)
        arguments = SFTConfig(max_length=None, **settings(tmp_path), per_device_eval_batch_size=2)
        trainer = SFTTrainer(
            subject.model(),
            arguments,
            train_dataset=data,
            eval_dataset=data,
            processing_class=subject.processor,
            compute_metrics=compute_metrics,
        )
        metrics = trainer.evaluate()
        with torch.no_grad():
            expected = self.scores(subject, subject.model())
        for row, wanted in zip(found["scores"], expected, strict=True):
            torch.testing.assert_close(row, wanted, **CLOSE)
        assert metrics["eval_loss"] == pytest.approx(-float(torch.cat(expected).mean()), rel=1e-4)

    def test_packed_text_trains_as_stock_does(self, subject: Subject, tmp_path: Path) -> None:
        """TRL packs text alone, and leaves it to positions that start anew to tell samples apart."""
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        rows = [subject.ids(f"{answer} {answer}") for example in subject.examples for answer in example.answers]
        data = Dataset.from_list([{"input_ids": row} for row in rows])
        runs = []
        for model in (subject.model(), AutoModelForImageTextToText.from_pretrained(subject.folder)):
            arguments = SFTConfig(max_length=512, packing=True, **settings(tmp_path))
            tokenizer = subject.processor.tokenizer
            runs.append(train(SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)))
        assert runs[0].lengths[0] == sum(map(len, rows))
        assert runs[0].losses == runs[1].losses and len(runs[0].losses) == STEPS

    def test_samples_with_images_that_a_collator_packs(self, subject: Subject, tmp_path: Path) -> None:
        """TRL refuses to do so itself. The trained model sees one row; the loop by hand, one for each sample."""
        from trl import SFTConfig, SFTTrainer

        trained, by_hand = subject.model(), subject.model()
        answers = [(example, subject.ids(example.answers[0])) for example in subject.examples]
        rows = [(subject.row(example, ids), len(ids)) for example, ids in answers]
        arguments = SFTConfig(max_length=None, **settings(tmp_path))
        trainer = SFTTrainer(
            trained,
            arguments,
            train_dataset=answered_data(subject),
            processing_class=subject.processor,
            data_collator=lambda examples: packed(trained, rows),
        )
        run = train(trainer)
        losses = train_by_hand(by_hand, [lambda model: self.nll(subject, model)] * STEPS)
        run.lengths = [length // len(rows) for length in run.lengths]
        require_same(run, trained, by_hand, losses, subject)


def packed(model: Any, rows: Sequence[tuple[dict[str, torch.Tensor], int]]) -> dict[str, torch.Tensor]:
    """Lay samples one behind the other, without a mask; what each ends with is to be learned."""
    batch: dict[str, list[torch.Tensor]] = {}
    for inputs, answer in rows:
        ids = inputs["input_ids"]
        place = torch.arange(ids.shape[1])[None]
        if hasattr(model.model, "get_rope_index"):
            three, _ = model.model.get_rope_index(ids, inputs["mm_token_type_ids"], inputs["image_grid_thw"])
            place = torch.cat([place[None], three])
        labels = ids.clone()
        labels[:, :-answer] = -100
        for name, value in {**inputs, "position_ids": place, "labels": labels}.items():
            batch.setdefault(name, []).append(value)
    of_images = {"pixel_values", "image_grid_thw"}
    joined = {name: torch.cat(parts, dim=0 if name in of_images else -1) for name, parts in batch.items()}
    del joined["attention_mask"]
    return joined


class TestDPO:
    def loss(self, subject: Subject, model: Any, reference: Any) -> torch.Tensor:
        losses = []
        for example in subject.examples:
            chosen, rejected = map(subject.ids, example.answers)
            with torch.no_grad():
                before = [subject.log_probs(reference, example, ids).sum() for ids in (chosen, rejected)]
            now = [subject.log_probs(model, example, ids).sum() for ids in (chosen, rejected)]
            losses.append(-F.logsigmoid(BETA * ((now[0] - before[0]) - (now[1] - before[1]))))
        return torch.stack(losses).mean()

    def test_equals_a_loop_by_hand(self, subject: Subject, tmp_path: Path) -> None:
        from trl import DPOConfig, DPOTrainer

        trained, by_hand, reference = subject.model(), subject.model(), subject.model().eval()
        arguments = DPOConfig(max_length=None, beta=BETA, **settings(tmp_path))
        trainer = DPOTrainer(
            trained,
            ref_model=copy.deepcopy(reference),
            args=arguments,
            train_dataset=preferences(subject),
            processing_class=subject.processor,
        )
        run = train(trainer)
        losses = train_by_hand(by_hand, [lambda model: self.loss(subject, model, reference)] * STEPS)
        assert losses[0] == pytest.approx(math.log(2), rel=1e-4)
        require_same(run, trained, by_hand, losses, subject)

    def test_with_an_adapter_the_reference_is_the_pruned_model_too(self, subject: Subject, tmp_path: Path) -> None:
        from peft import LoraConfig
        from trl import DPOConfig, DPOTrainer

        trainer = DPOTrainer(
            subject.model(),
            args=DPOConfig(max_length=None, beta=BETA, **settings(tmp_path)),
            train_dataset=preferences(subject),
            processing_class=subject.processor,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        )
        run = train(trainer)
        assert run.losses[0] == pytest.approx(math.log(2), rel=1e-4)
        require_pruned(run, subject)


def repo_of(subject: Subject, folder: Path) -> Any:
    """Return the model as a repo of its own, from which TRL can load the reference: it takes that from the path."""
    subject.model().save_pretrained(folder)
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)


def freeze_encoder(model: Any) -> None:
    """Of an encoder that learns, rounding alone may come to keep another token."""
    model.model.get_encoder(modality="image").requires_grad_(False)


class TestGRPO:
    def rewards(self, completions: Sequence[Sequence[int]]) -> list[float]:
        return [float(sum(ids) % 7) for ids in completions]

    def loss(self, subject: Subject, model: Any, reference: Any, groups: dict[int, list[list[int]]]) -> torch.Tensor:
        """The completions of each prompt against each other, and a penalty for leaving the reference."""
        losses = []
        for number, completions in groups.items():
            rewards = torch.tensor(self.rewards(completions))
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            for ids, advantage in zip(completions, advantages, strict=True):
                with torch.no_grad():
                    before = subject.log_probs(reference, subject.examples[number], ids, TEMPERATURE)
                now = subject.log_probs(model, subject.examples[number], ids, TEMPERATURE)
                away = (before - now).exp() - (before - now) - 1
                losses.append(-(now - now.detach()).exp() * advantage + BETA * away)
        return torch.cat(losses).mean()

    def questions(self, subject: Subject) -> Any:
        from datasets import Dataset

        return Dataset.from_list(
            [
                {
                    "images": example.images,
                    "prompt": said("user", example.question, len(example.images)),
                    "number": number,
                }
                for number, example in enumerate(subject.examples)
            ]
        )

    def test_equals_a_loop_by_hand(self, subject: Subject, tmp_path: Path) -> None:
        from trl import GRPOConfig, GRPOTrainer

        steps: list[dict[int, list[list[int]]]] = []
        subject = replace(subject, begins=True)

        def reward(completion_ids: list[list[int]], number: list[int], **kwargs: Any) -> list[float]:
            groups: dict[int, list[list[int]]] = {}
            for ids, each in zip(completion_ids, number, strict=True):
                groups.setdefault(each, []).append(ids)
            steps.append(groups)
            return self.rewards(completion_ids)

        data = self.questions(subject)
        arguments = GRPOConfig(
            num_generations=2,
            max_completion_length=5,
            beta=BETA,
            temperature=TEMPERATURE,
            trust_remote_code=True,
            **settings(tmp_path / "out", per_device_train_batch_size=4),
        )
        trained, by_hand, reference = repo_of(subject, tmp_path / "repo"), subject.model(), subject.model().eval()
        for model in (trained, by_hand):
            freeze_encoder(model)
        trainer = GRPOTrainer(
            trained, reward_funcs=reward, args=arguments, train_dataset=data, processing_class=subject.processor
        )
        assert type(trainer.ref_model).__name__ == type(trained).__name__
        run = train(trainer)
        assert len(steps) == STEPS and all(len(ids) == 2 for groups in steps for ids in groups.values())
        losses = train_by_hand(
            by_hand, [lambda model, groups=groups: self.loss(subject, model, reference, groups) for groups in steps]
        )
        require_same(run, trained, by_hand, losses, subject)

    def test_a_reference_that_trl_loads_from_a_stock_repo_is_dense(self, subject: Subject, tmp_path: Path) -> None:
        """As README warns: TRL knows where the trained model came from, not that it was pruned."""
        from trl import GRPOConfig, GRPOTrainer

        trainer = GRPOTrainer(
            subject.model(),
            reward_funcs=lambda completion_ids, **kwargs: self.rewards(completion_ids),
            args=GRPOConfig(num_generations=2, beta=BETA, **settings(tmp_path)),
            train_dataset=self.questions(subject),
            processing_class=subject.processor,
        )
        assert not type(trainer.ref_model).__name__.startswith("VisPruner")
