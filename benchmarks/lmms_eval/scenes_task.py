"""What the task vispruner_scenes of lmms-eval asks: the questions of `scenes.py`, in the order of accuracy.py."""

from __future__ import annotations

import sys
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image

# After the installed packages, because a folder beside scenes.py is called lmms_eval.
sys.path.append(str(Path(__file__).parent.parent))
from scenes import Scene, generate_scene

scene = lru_cache(maxsize=64)(generate_scene)


def questions(dataset: Dataset) -> Dataset:
    """Return the questions that the only row of scenes.json (split, seed, questions) stands for."""
    (chosen,) = dataset
    split, seed = chosen["split"], chosen["seed"]
    rows = (
        {"split": split, "seed": seed, "scene": index, "type": q.type, "question": q.text, "answer": q.answer}
        for index in count()
        for q in scene(split, seed, index).questions
    )
    return Dataset.from_list(list(islice(rows, chosen["questions"])))


def picture(doc: dict[str, Any]) -> list[Image.Image]:
    drawn: Scene = scene(doc["split"], doc["seed"], doc["scene"])
    return [drawn.image]


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Right is the expected word, whole, upper and lower case alike."""
    return {"accuracy": float(results[0].strip().lower() == doc["answer"].lower())}
