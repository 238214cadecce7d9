"""What the tasks vispruner_scenes and vispruner_photos of lmms-eval ask: accuracy.py's questions, in its order."""

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
from photos import Photo, generate_photo
from scenes import Scene, generate_scene

GENERATORS = {"scenes": generate_scene, "photos": generate_photo}


@lru_cache(maxsize=64)
def drawn(dataset: str, split: str, seed: int, index: int) -> Scene | Photo:
    return GENERATORS[dataset](split, seed, index)


def questions(dataset: Dataset) -> Dataset:
    """Return the questions that the only row of scenes.json or photos.json stands for."""
    (chosen,) = dataset
    which = {name: chosen[name] for name in ("dataset", "split", "seed")}
    rows = (
        {**which, "index": index, "type": q.type, "question": q.text, "answer": q.answer}
        for index in count()
        for q in drawn(**which, index=index).questions
    )
    return Dataset.from_list(list(islice(rows, chosen["questions"])))


def picture(doc: dict[str, Any]) -> list[Image.Image]:
    return [drawn(doc["dataset"], doc["split"], doc["seed"], doc["index"]).image]


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Right is the expected word, whole, upper and lower case alike."""
    return {"accuracy": float(results[0].strip().lower() == doc["answer"].lower())}
