"""Put questions about a picture to a model, and judge the answers; with the sample scene and its true answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoProcessor, PreTrainedModel

import vispruner

from .base_checkpoint import refuse_unsafe, resolve_base
from .checkpoint_io import has_weights, read_json, read_tensor_headers
from .foreign_code import own_code_only
from .published_layout import layout_facts, refuse_endless
from .repo_config import EMBEDDED_CONFIGS, EMBEDDED_PREFIX, TOY, hub_config_names, load_repo_config
from .verify_worker import VIDEO_EXTRA, needs_video_packages

SCENE = Path(__file__).parent / "assets" / "scene.png"
PHOTOGRAPHS = tuple(SCENE.with_name(name) for name in ("chelsea.jpg", "astronaut.jpg", "coffee.jpg"))
PHOTOGRAPH_QUESTION = "Is the photograph tilted?"  # of few that `embedded/photo-llava` learned about any photograph
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


def where_and_how(source: str | None) -> tuple[str, dict[str, Any]]:
    """Return where a model lies, and, where that is embedded in the package (None: the toy), how it is pruned."""
    name = TOY if source is None else source
    if not name.startswith(EMBEDDED_PREFIX):
        return name, {}
    return str(resolve_base(name)), load_repo_config(EMBEDDED_CONFIGS[name]).vispruner_config


def load_model(source: str, **options: Any) -> PreTrainedModel:
    """Load a built repo or a stock checkpoint, folder or Hub id, but no code of it; ValueError for what is neither."""
    refuse_unsafe(source)
    if source in hub_config_names() and not Path(source).exists():
        raise ValueError(f"{source} is a config and no repo: `vispruner build {source} --out DIR`, then give DIR")
    with own_code_only(), _said_of(source):
        _require_its_weights(Path(source))
        return vispruner.load(source, dtype="auto", **options).eval()


def _require_its_weights(folder: Path) -> None:
    """Refuse a folder whose config.json asks for other tensors than are there, before any is made."""
    if not has_weights(folder):  # of a thin repo, or of one on the Hub, whose weights come from there
        return
    config, headers = read_json(folder / "config.json"), read_tensor_headers(folder)
    refuse_endless(config, len(headers))
    facts = layout_facts(config, {name: header.shape for name, header in headers.items()}, are_published=False)
    if facts.problems:
        raise ValueError(f"the weights of {folder} are not those of its config.json: {'; '.join(facts.problems)}")


@contextmanager
def _said_of(source: str) -> Iterator[None]:
    """Blame the files of a repo for whatever its classes make of them; what is an error of its own kind stays that."""
    try:
        yield
    except (ValueError, OSError, ImportError, MemoryError, SafetensorError):
        raise
    except Exception as error:
        raise ValueError(f"{source} does not load: {type(error).__name__}: {error}") from error


def load_processor(source: str) -> Any:
    """Load a stock processor, never code of its repo; ValueError says what to install for one that needs more."""
    try:
        with own_code_only(), _said_of(source):
            return AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except (ImportError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"the processor of {source} is code of its repo or of another, which is never run"
            ) from error
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
    if model.model.compares_in_clip:
        inputs.update(model.question_inputs([question]))
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
