"""Put questions about a picture to a model, and judge the answers; with the sample scene and its true answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoProcessor, PreTrainedModel

from .checkpoint_io import read_json
from .verify_worker import VIDEO_EXTRA, needs_video_packages

SCENE = Path(__file__).parent / "assets" / "scene.png"
NEW_TOKENS = 16
RIGHT, WRONG = "(right)", "(wrong)"
Picture = Image.Image | Sequence[Image.Image]  # a photo, or the frames of a video


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


def load_processor(source: str) -> Any:
    """Load a stock processor; ValueError says what to install for one that needs more than this package does."""
    try:
        return AutoProcessor.from_pretrained(source)
    except (ImportError, ValueError) as error:
        if needs_video_packages(error):
            raise ValueError(f"the processor of {source} does not load: {VIDEO_EXTRA}") from error
        raise


def model_inputs(model: PreTrainedModel, processor: Any, picture: Picture, question: str) -> Any:
    """Return what `generate` takes to answer a question, in the words of the processor's chat template."""
    kind = "image" if isinstance(picture, Image.Image) else "video"
    content = [{"type": kind, kind: picture}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    visual: dict[str, Any] = {"images": picture}
    if not isinstance(picture, Image.Image):  # frames of one size, that of the first
        frames = [np.asarray(frame.resize(picture[0].size)) for frame in picture]
        visual = {"videos": [[np.stack(frames)]], "do_sample_frames": False}
    inputs = processor(text=prompt, return_tensors="pt", **visual)
    for name, renamed in model.renamed_inputs.items():
        if name in inputs:
            inputs[renamed] = inputs.pop(name)
    return inputs.to(model.device, model.dtype)


def ask(model: PreTrainedModel, processor: Any, picture: Picture, question: str) -> str:
    """Return the answer as the model gives it now, greedily and in at most 16 tokens."""
    inputs = model_inputs(model, processor, picture, question)
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
