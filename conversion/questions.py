"""Put questions about a picture to a model, and judge the answers; with the sample scene and its true answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedModel

from .checkpoint_io import read_json

SCENE = Path(__file__).parent / "assets" / "scene.png"
NEW_TOKENS = 16
RIGHT, WRONG = "(right)", "(wrong)"


@dataclass(frozen=True)
class Question:
    """A question; for one of the sample scene also its type and its true answer."""

    text: str
    type: str | None = None
    answer: str | None = None


def scene_questions() -> list[Question]:
    """Return the questions of the sample scene, in the order in which it was generated with them."""
    stored = read_json(SCENE.with_suffix(".json"))["questions"]
    return [Question(entry["question"], entry["type"], entry["answer"]) for entry in stored]


def questions_about(picture: Path | None, text: str | None = None) -> list[Question]:
    """Return the one question `text`, or all that are known about a picture; known ones bring their true answers."""
    known = scene_questions() if picture == SCENE else []
    if text is None:
        return known
    return [question for question in known if question.text == text] or [Question(text)]


def model_inputs(model: PreTrainedModel, processor: Any, photo: Image.Image, question: str) -> Any:
    """Return what `generate` takes to answer a question, in the words of the processor's chat template."""
    content = [{"type": "image", "image": photo}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=photo, text=prompt, return_tensors="pt").to(model.device, model.dtype)


def ask(model: PreTrainedModel, processor: Any, photo: Image.Image, question: str) -> str:
    """Return the answer as the model gives it now, greedily and in at most 16 tokens."""
    inputs = model_inputs(model, processor, photo, question)
    sequences = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def is_right(answer: str, expected: str) -> bool:
    """Is it the expected word and no other? Capitals do not count."""
    return answer.strip().casefold() == expected.strip().casefold()


def judged(answer: str, expected: str | None) -> str:
    """Return the answer with its mark, where the true one is known."""
    if expected is None:
        return answer
    return f"{answer} {RIGHT if is_right(answer, expected) else WRONG}"
