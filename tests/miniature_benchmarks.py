"""Miniatures of the data sets that `benchmarks/paper.py` reads: their names, splits and columns, with drawn scenes.

Each is a folder of parquet files, named as on the Hub, with the card that names its splits. The questions are those
that the embedded checkpoint was trained on, so that its figures are neither all nor nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

# Appended, not inserted: a folder in it is called lmms_eval like the package.
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from scenes import Question, generate_scene

QUESTIONS = 8
OCR_TOKENS = ["STOP", "24"]
COCO_OBJECTS = (["dog", "dining table"], ["dog", "dining table", "mouse"])  # in even and odd pictures
Asked = tuple[int, Image.Image, Question]


def asked(*types: str, first: int = 0) -> list[Asked]:
    """Return questions of these types, each about a scene of its own, with their number."""
    found: list[Asked] = []
    scene = first
    while len(found) < QUESTIONS:
        drawn = generate_scene("test", 0, scene)
        questions = [question for question in drawn.questions if question.type in types]
        if questions:
            found.append((len(found), drawn.image, questions[scene % len(questions)]))
        scene += 1
    return found


def wide(image: Image.Image) -> Image.Image:
    """Return the picture with a wide dark frame to its left and right: what a centre crop leaves is most of it."""
    return ImageOps.expand(image, border=(image.width // 4, 0), fill=(40, 40, 40))


def write_miniatures(root: Path) -> None:
    """Write all of them below `root`."""
    for name, config, splits, rows in _data_sets():
        _write(root / name, config, splits, rows)


def _write(folder: Path, config: str, splits: Iterable[str], rows: list[dict[str, Any]]) -> None:
    from datasets import Dataset

    (folder / config).mkdir(parents=True, exist_ok=True)
    for split in splits:
        Dataset.from_list(rows).to_parquet(str(folder / config / f"{split}-00000-of-00001.parquet"))
    card = folder / "README.md"
    text = card.read_text() if card.exists() else "---\nconfigs:\n---\n"
    files = "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in splits)
    card.write_text(text.removesuffix("---\n") + f"- config_name: {config}\n  data_files:\n{files}---\n")


def _data_sets() -> Iterable[tuple[str, str, tuple[str, ...], list[dict[str, Any]]]]:
    """Yield (name, config, splits, rows)."""
    own = "lmms-lab-encoder"
    words = asked("color", "shape", "digit")
    yield f"{own}/VQAv2", "default", ("validation",), _rows(words, _vqav2)
    yield f"{own}/GQA", "testdev_balanced_instructions", ("testdev",), _rows(words, _gqa)
    yield (
        f"{own}/GQA",
        "testdev_balanced_images",
        ("testdev",),
        [{"id": str(n), "image": image} for n, image, _ in words],
    )
    yield f"{own}/VizWiz-VQA", "default", ("val",), _rows(words, _vizwiz)
    yield f"{own}/ScienceQA", "ScienceQA-IMG", ("test",), _rows(words, _science)
    yield f"{own}/textvqa", "default", ("validation",), _rows(words, _textvqa)
    there = asked("exist")
    yield f"{own}/POPE", "Full", ("adversarial", "popular", "random"), _rows(there, _pope)
    yield f"{own}/MME", "default", ("test",), _mme()
    for language in ("en", "cn"):
        yield f"{own}/MMBench", language, ("dev",), _rows(words, _mmbench)
    yield f"{own}/MMVet", "default", ("test",), _rows(words, _mmvet)
    yield f"{own}/DocVQA", "DocVQA", ("validation",), _rows(words, _docvqa)
    yield f"{own}/ChartQA", "default", ("test",), _rows(words, _chartqa)
    yield "echo840/OCRBench", "default", ("test",), _rows(words, _ocrbench)
    yield f"{own}/RefCOCO", "default", ("val",), _rows(asked("where"), _refcoco)
    yield "tsunghanwu/mscoco_chair", "default", ("test",), _rows(words, _chair)


def _rows(questions: list[Asked], row: Callable[[int, Image.Image, Question], dict[str, Any]]) -> list[dict[str, Any]]:
    return [row(*question) for question in questions]


def _vqav2(number: int, image: Image.Image, question: Question) -> dict[str, Any]:
    answers = [{"answer": question.answer, "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)]
    return {
        "question_type": "what",
        "multiple_choice_answer": question.answer,
        "answers": answers,
        "image_id": number,
        "answer_type": "other",
        "question_id": number,
        "question": question.text,
        "image": image,
    }


def _gqa(number: int, image: Image.Image, question: Question) -> dict[str, Any]:
    full = f"It is {question.answer}."
    return {
        "id": str(number),
        "imageId": str(number),
        "question": question.text,
        "answer": question.answer,
        "fullAnswer": full,
        "isBalanced": True,
    }


def _vizwiz(number: int, image: Image.Image, question: Question) -> dict[str, Any]:
    return {
        "question_id": f"VizWiz_val_{number:08}",
        "image": image,
        "question": question.text,
        "answers": [question.answer] * 10,
        "category": "other",
    }


def _science(number: int, image: Image.Image, question: Question) -> dict[str, Any]:
    return {
        "image": image,
        "question": question.text,
        "choices": [question.answer, "nothing"],
        "answer": 0,
        "hint": "",
        "task": "closed choice",
        "grade": "grade2",
        "subject": "natural science",
        "topic": "physics",
        "category": "Materials",
        "skill": "Identify",
        "lecture": "",
        "solution": "",
    }


def _textvqa(number: int, image: Image.Image, question: Question) -> dict[str, Any]:
    return {
        "image_id": str(number),
        "question_id": number,
        "question": question.text,
        "question_tokens": question.text.split(),
        "image": wide(image),
        "image_width": 2 * image.width,
        "image_height": image.height,
        "flickr_original_url": "",
        "flickr_300k_url": "",
        "answers": [question.answer] * 10,
        "image_classes": ["Shape"],
        "set_name": "val",
        "ocr_tokens": OCR_TOKENS,
    }


def _pope(number: int, image: Image.Image, question: Question) -> dict[str, Any]:
    return {
        "id": str(number),
        "question_id": str(number),
        "question": question.text,
        "answer": question.answer,
        "image_source": f"COCO_{number}",
        "image": image,
        "category": "adversarial",
    }


def _mme() -> list[dict[str, Any]]:
    """Return pairs of questions about one picture each, of which one is to be answered yes and one no."""
    rows: list[dict[str, Any]] = []
    for scene in range(100):
        drawn = generate_scene("test", 1, scene)
        by_answer = {question.answer: question for question in drawn.questions if question.type == "exist"}
        if len(by_answer) < 2 or len(rows) == QUESTIONS:
            continue
        for answer in ("yes", "no"):
            rows.append(
                {
                    "question_id": f"existence/{scene}.png",
                    "image": drawn.image,
                    "question": f"{by_answer[answer].text} Please answer yes or no.",
                    "answer": answer.capitalize(),
                    "category": "existence" if len(rows) < QUESTIONS - 2 else "code_reasoning",
                }
            )
    return rows


def _mmbench(number: int, image: Image.Image, question: Question) -> dict[str, Any]:
    return {
        "index": number,
        "question": question.text,
        "hint": "nan",
        "answer": "A" if number % 2 else "B",
        "A": question.answer if number % 2 else "nothing",
        "B": "nothing" if number % 2 else question.answer,
        "C": "nan",
        "D": "nan",
        "category": "attribute_recognition",
        "image": image,
        "source": "scenes",
        "L2-category": "finegrained_perception (instance-level)",
        "comment": "nan",
        "split": "dev",
    }


def _mmvet(number: int, image: Image.Image, question: Question) -> dict[str, Any]:
    return {
        "question_id": f"v1_{number}",
        "image": image,
        "question": question.text,
        "answer": question.answer,
        "image_source": "scenes",
        "capability": "rec",
    }


def _docvqa(number: int, image: Image.Image, question: Question) -> dict[str, Any]:
    return {
        "questionId": str(number),
        "question": question.text,
        "question_types": ["handwritten"],
        "image": image,
        "docId": number,
        "ucsf_document_id": "",
        "ucsf_document_page_no": "1",
        "answers": [question.answer],
        "data_split": "val",
    }


def _chartqa(number: int, image: Image.Image, question: Question) -> dict[str, Any]:
    kind = "human_test" if number % 2 else "augmented_test"
    return {"type": kind, "question": question.text, "answer": question.answer, "image": image}


def _ocrbench(number: int, image: Image.Image, question: Question) -> dict[str, Any]:
    return {
        "dataset": "scenes",
        "question": question.text,
        "question_type": "Scene Text-centric VQA",
        "answer": [question.answer],
        "image": image,
    }


def _refcoco(number: int, image: Image.Image, question: Question) -> dict[str, Any]:
    left, top, right, bottom = (float(edge) for edge in question.boxes[0])
    return {
        "question_id": str(number),
        "image": image,
        "question": "Please carefully observe the area circled in the image and come up with a caption for the area.",
        "answer": [question.text, "that one"],
        "segmentation": [left, top, right, top, right, bottom],
        "bbox": [left, top, right - left, bottom - top],
        "iscrowd": 0,
        "file_name": f"COCO_{number}.jpg",
    }


def _chair(number: int, image: Image.Image, question: Question) -> dict[str, Any]:
    return {"question_id": str(number), "image": image, "gt_object": COCO_OBJECTS[number % 2]}
