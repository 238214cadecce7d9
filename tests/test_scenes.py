"""Scenes of the accuracy benchmark: reproducible, disjoint splits, and answers that hold in the picture."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("easy_vqa")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import scenes
from scenes import (
    COLORS,
    IMAGE_SIZE,
    NUMBERS,
    QUESTION_TYPES,
    SHAPES,
    SPLITS,
    Scene,
    easy_vqa_questions,
    generate_scene,
    prompt,
)

MANY = 250


@pytest.fixture(scope="module")
def many() -> list[Scene]:
    return [generate_scene("test", 5, index) for index in range(MANY)]


def test_the_same_split_seed_and_index_give_the_same_scene() -> None:
    first, again = (generate_scene("validation", 3, 14) for _ in range(2))
    assert first.image.tobytes() == again.image.tobytes()
    assert first.objects == again.objects
    assert first.questions == again.questions


@pytest.mark.parametrize("other", [("test", 3, 14), ("train", 3, 14), ("validation", 4, 14), ("validation", 3, 15)])
def test_another_split_seed_or_index_gives_another_scene(other: tuple[str, int, int]) -> None:
    assert generate_scene("validation", 3, 14).image.tobytes() != generate_scene(*other).image.tobytes()


def test_no_digit_image_is_in_two_splits_and_every_split_has_all_digits() -> None:
    images = {split: {image.tobytes() for image in scenes._digits(split)[0]} for split in SPLITS}
    assert sum(map(len, images.values())) == len(set().union(*images.values())) == 1797
    for split in SPLITS:
        assert set(scenes._digits(split)[1]) == set(range(10))


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split must be one of train, validation, test"):
        generate_scene("dev", 0, 0)
    with pytest.raises(ValueError, match="split must be one of"):
        next(easy_vqa_questions("dev"))


@pytest.mark.core
def test_objects_lie_in_the_picture_apart_from_each_other_and_cover_about_a_tenth(many: list[Scene]) -> None:
    covered = np.zeros((MANY, IMAGE_SIZE, IMAGE_SIZE), int)
    for number, scene in enumerate(many):
        assert scene.image.size == (IMAGE_SIZE, IMAGE_SIZE)
        for o in scene.objects:
            left, top, right, bottom = o.box
            assert 0 <= left < right <= IMAGE_SIZE and 0 <= top < bottom <= IMAGE_SIZE
            covered[number, top:bottom, left:right] += 1
    assert covered.max() == 1
    assert 0.06 < covered.mean() < 0.13


def test_shapes_are_drawn_in_their_color_where_their_box_is(many: list[Scene]) -> None:
    for scene in many:
        pixels = np.asarray(scene.image).astype(int)
        for o in scene.objects:
            left, top, right, bottom = o.box
            middle = pixels[(top + bottom) // 2, (left + right) // 2]
            if o.kind == "shape":
                nearest = min(COLORS, key=lambda name: np.abs(middle - np.array(COLORS[name])).sum())
                assert nearest == o.color
            else:
                assert pixels[top:bottom, left:right].min(-1).max() > 190


def test_most_scenes_have_one_digit_and_every_type_of_question_occurs(many: list[Scene]) -> None:
    digits = [sum(o.kind == "digit" for o in scene.objects) for scene in many]
    assert set(digits) == {0, 1}
    assert 0.7 < np.mean(digits) < 0.9
    assert {q.type for scene in many for q in scene.questions} == set(QUESTION_TYPES)


def test_every_answer_is_one_word_and_every_question_is_asked_once(many: list[Scene]) -> None:
    for scene in many:
        assert all(q.answer and " " not in q.answer for q in scene.questions)
        assert len({q.text for q in scene.questions}) == len(scene.questions)


def test_the_named_boxes_are_those_of_objects(many: list[Scene]) -> None:
    for scene in many:
        boxes = {o.box for o in scene.objects}
        for q in scene.questions:
            assert set(q.boxes) <= boxes
            assert q.boxes or q.answer in ("no", "zero")


def test_answers_hold_in_the_picture(many: list[Scene]) -> None:
    checked: Counter[str] = Counter()
    for scene in many:
        for q in scene.questions:
            assert q.answer == _answer(scene, q.type, q.text.rstrip("?").split()), q
            checked[q.type] += 1
    assert min(checked[name] for name in QUESTION_TYPES) > 100


def test_absent_things_are_hard_to_rule_out(many: list[Scene]) -> None:
    hard = []
    for scene in many:
        shapes = [o for o in scene.objects if o.kind == "shape"]
        for q in scene.questions:
            if q.type == "exist" and q.answer == "no":
                color, shape = q.text.rstrip("?").split()[-2:]
                near = [any(o.color == color for o in shapes), any(o.shape == shape for o in shapes)]
                assert any(near)
                hard.append(all(near))
    assert np.mean(hard) > 0.4


@pytest.mark.parametrize("kind", ["exist", "relation"])
def test_yes_and_no_are_equally_frequent(many: list[Scene], kind: str) -> None:
    answers = [q.answer == "yes" for scene in many for q in scene.questions if q.type == kind]
    assert 0.4 < np.mean(answers) < 0.6


@pytest.mark.core
def test_easy_vqa_is_read_at_the_size_of_the_scenes_and_split_by_picture() -> None:
    pictures = {split: {item.image_id for item in easy_vqa_questions(split)} for split in ("train", "validation")}
    assert not pictures["train"] & pictures["validation"]
    assert len(pictures["validation"]) == 400
    items = list(easy_vqa_questions("test", 30))
    assert len(items) == 30
    assert all(item.image.size == (IMAGE_SIZE, IMAGE_SIZE) for item in items)
    assert {item.question.type for item in items} == {"color", "shape", "exist"}
    assert len(list(easy_vqa_questions("test"))) == 9673


def test_the_prompt_has_one_image_and_ends_where_the_answer_begins() -> None:
    assert prompt("Which digit is shown?") == "USER: <image>\nWhich digit is shown? ASSISTANT:"


def _answer(scene: Scene, kind: str, words: list[str]) -> str:
    """Answer from the objects alone, read off the words of the question."""
    shapes = [o for o in scene.objects if o.kind == "shape"]

    def find(color: str, shape: str) -> list[scenes.SceneObject]:
        return [o for o in shapes if (o.color, o.shape) == (color, shape)]

    def the(name: list[str]) -> scenes.SceneObject:
        (found,) = [o for o in scene.objects if o.kind == "digit"] if name[-1] == "digit" else find(*name[-2:])
        return found

    if kind == "color":
        (found,) = [o for o in shapes if o.shape == words[-1]]
        return str(found.color)
    if kind == "shape":
        (found,) = [o for o in shapes if o.color == words[4]]
        return str(found.shape)
    if kind == "digit":
        return str(the(["digit"]).digit)
    if kind == "exist":
        return "yes" if find(*words[-2:]) else "no"
    if kind == "count":
        word = words[2]
        singular = "cross" if word == "crosses" else word.rstrip("s")
        matching = [o for o in shapes if word == "shapes" or word == o.color or singular == o.shape]
        assert word == "shapes" or word in COLORS or singular in SHAPES
        return NUMBERS[len(matching)]
    if kind == "where":
        x, y = the(words[2:]).center
        return f"{'bottom' if y > IMAGE_SIZE / 2 else 'top'}-{'right' if x > IMAGE_SIZE / 2 else 'left'}"
    before = words.index("left") if "left" in words else words.index("above")
    first, second = the(words[2:before]), the(words[before:])
    holds = first.center[0] < second.center[0] if "left" in words else first.center[1] < second.center[1]
    return "yes" if holds else "no"
