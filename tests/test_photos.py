"""Pictures of photographs, things and signs: reproducible, disjoint splits, answers that hold and can be seen."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import photos
from photos import PHOTO_QUESTION_TYPES, PHOTO_SIZE, Photo, Thing, generate_photo
from scenes import NUMBERS

pytestmark = pytest.mark.photo

MANY = 150
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def many() -> dict[str, list[Photo]]:
    return {split: [generate_photo(split, 5, index) for index in range(MANY)] for split in SPLITS}


@pytest.fixture(scope="module")
def tested(many: dict[str, list[Photo]]) -> list[Photo]:
    return many["test"]


def things_of(photo: Photo) -> list[Thing]:
    return [o for o in photo.things if o.kind == "thing"]


def test_the_same_split_seed_and_index_give_the_same_picture() -> None:
    first, again = (generate_photo("validation", 3, 14) for _ in range(2))
    assert first.image.tobytes() == again.image.tobytes()
    assert (first.things, first.questions, first.background) == (again.things, again.questions, again.background)
    for other in (("test", 3, 14), ("train", 3, 14), ("validation", 4, 14), ("validation", 3, 15)):
        assert first.image.tobytes() != generate_photo(*other).image.tobytes()
    with pytest.raises(ValueError, match="split must be one of train, validation, test"):
        generate_photo("dev", 0, 0)


def test_there_are_at_least_150_classes_and_no_name_has_two_meanings() -> None:
    assert len(photos.CLASSES) >= 150
    names = [*photos.CLASSES, *photos.WORDS, *photos.CARDS, *photos.PHOTOGRAPH_NAMES, *photos.SQUARE_NAMES, *NUMBERS]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    drawn = {photos._glyph(name).tobytes() for name in photos.CLASSES}
    assert len(drawn) == len(photos.CLASSES)


@pytest.mark.core
def test_no_pixel_of_a_photograph_is_in_two_splits(many: dict[str, list[Photo]]) -> None:
    for split, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        compared = 0
        for a in many[split]:
            for b in many[other]:
                if a.background.photograph == b.background.photograph:
                    (l1, t1, r1, b1), (l2, t2, r2, b2) = a.background.pixels, b.background.pixels
                    assert min(r1, r2) <= max(l1, l2) + 1e-9 or min(b1, b2) <= max(t1, t2) + 1e-9
                    compared += 1
        assert compared > 100
    own = {split: {photo.background.photograph.file for photo in many[split]} for split in SPLITS}
    assert len(own["test"] - own["train"]) == len(photos.PHOTOGRAPHS["test"])


def test_the_background_is_what_it_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read lies in the part of its split: with the rest of the photograph blanked, nothing blank is seen."""
    whole = photos._photograph

    def blanked(photograph: photos.Photograph) -> photos.Image.Image:
        image = whole(photograph).copy()
        width, height = image.size
        left, top, right, bottom = photos.PARTS["test"]
        seen = image.crop(
            box := (round(left * width), round(top * height), round(right * width), round(bottom * height))
        )
        blank = photos.Image.new("RGB", image.size, (255, 0, 255))
        blank.paste(seen, box[:2])
        return blank if photograph in photos.PHOTOGRAPHS["train"] else image

    for index in range(30):
        rng = photos.scene_rng("test", 8, index)
        expected = np.asarray(photos._background(rng, "test")[0]).astype(int)
        with monkeypatch.context() as patched:
            patched.setattr(photos, "_photograph", blanked)
            found = np.asarray(photos._background(photos.scene_rng("test", 8, index), "test")[0]).astype(int)
        # Bicubic interpolation looks two pixels across the edge, which is at most a dozen pixels of the picture.
        assert np.abs(found - expected)[16:-16, 16:-16].mean() < 1


def test_tests_have_other_sizes_and_angles_than_training() -> None:
    for bands in (photos.SIDES, photos.LETTERS):
        seen, unseen = ({v for band in bands[name] for v in range(*band)} for name in ("train", "unseen"))
        assert seen and unseen and not seen & unseen
    for turns in (photos.TURNS, photos.SIGN_TURNS):
        assert turns["train"][1] <= turns["unseen"][0]


@pytest.mark.core
def test_things_lie_apart_in_the_picture_and_can_be_seen(tested: list[Photo]) -> None:
    shares, changed = [], []
    for index, photo in enumerate(tested):
        assert photo.image.size == (PHOTO_SIZE, PHOTO_SIZE)
        covered = np.zeros((PHOTO_SIZE, PHOTO_SIZE), int)
        bare = np.asarray(photos._background(photos.scene_rng("test", 5, index), "test")[0]).astype(int)
        differs = np.abs(np.asarray(photo.image).astype(int) - bare).max(-1) > 30
        for o in photo.things:
            left, top, right, bottom = o.box
            assert 0 <= left < right <= PHOTO_SIZE and 0 <= top < bottom <= PHOTO_SIZE
            covered[top:bottom, left:right] += 1
            changed.append(differs[top:bottom, left:right].mean())
        assert covered.max() == 1
        assert not np.abs(np.asarray(photo.image).astype(int) - bare)[covered == 0].any()
        shares.append(covered.mean())
    assert 0.15 < np.mean(shares) < 0.4
    assert np.min(changed) > 0.05 and np.mean(changed) > 0.4


@pytest.mark.core
def test_every_type_occurs_and_every_answer_is_one_word(tested: list[Photo]) -> None:
    assert {q.type for photo in tested for q in photo.questions} == set(PHOTO_QUESTION_TYPES)
    for photo in tested:
        boxes = {o.box for o in photo.things}
        assert all(q.answer and " " not in q.answer and set(q.boxes) <= boxes for q in photo.questions)
        assert len({q.text for q in photo.questions}) == len(photo.questions)


@pytest.mark.core
def test_answers_hold_in_the_picture_and_are_the_only_ones(tested: list[Photo]) -> None:
    checked: Counter[str] = Counter()
    for photo in tested:
        for q in photo.questions:
            assert _answers(photo, q) == {q.answer}, q
            checked[q.type] += 1
    assert min(checked[kind] for kind in PHOTO_QUESTION_TYPES) > 40


@pytest.mark.core
def test_answers_are_balanced(tested: list[Photo], many: dict[str, list[Photo]]) -> None:
    questions = [q for photos_of in many.values() for photo in photos_of for q in photo.questions]
    exist = [q.answer for q in questions if q.type == "exist"]
    assert exist.count("yes") == exist.count("no")
    rates = photos.guess_rates(questions)
    assert rates.keys() == set(PHOTO_QUESTION_TYPES)
    assert max(rates[kind] for kind in ("what", "compare", "read")) < 0.04
    assert rates["where"] < 0.13 and rates["photograph"] < 0.17 and rates["attribute"] < 0.22 and rates["count"] < 0.37
    assert rates["exist"] == 0.5 and rates["tilt"] < 0.6


@pytest.mark.core
def test_half_of_what_is_absent_is_like_something_there(tested: list[Photo]) -> None:
    near = []
    for photo in tested:
        groups = {photos.GROUP_OF[o.name] for o in things_of(photo)}
        for q in photo.questions:
            if q.type == "exist" and q.answer == "no":
                near.append(photos.GROUP_OF[q.text.rstrip("?").split()[-1]] in groups)
    assert 0.45 < np.mean(near) < 0.85  # half by choice, and some of the other half


def _answers(photo: Photo, q: photos.Question) -> set[str]:
    """All words that answer a question, read off its words and the things alone."""
    words, things, background = q.text.rstrip("?").split(), things_of(photo), photo.background
    counts = Counter(o.name for o in things)
    if q.type == "what":
        if words[-1] == "card":
            return {o.name for o in things if o.color == words[-2]}
        return {o.name for o in photo.things if _square(o) == words[-1]}
    if q.type in ("where", "attribute"):
        of = [o for o in things if o.name == (words[-1])]
        return {_square(o) if q.type == "where" else str(o.color) for o in of}
    if q.type == "count":
        return {NUMBERS[counts[words[5]]]}
    if q.type == "compare":
        axis, last = {"left": (0, 0), "right": (0, -1), "up": (1, 0), "down": (1, -1)}[words[-1]]
        return {sorted((o.center[axis], o.name) for o in things)[last][1]}
    if q.type == "read":
        signs = [o for o in photo.things if o.kind == "sign"]
        return {o.name for o in signs if words[-1] == "written" or o.color == words[-2]}
    if q.type == "exist":
        return {"yes" if counts[words[-1]] else "no"}
    if q.type == "photograph":
        return {str(background.photograph.name)}
    return {"yes" if background.tilted else "no"}


def _square(o: Thing) -> str:
    x, y = o.center
    return f"{'abcd'[int(x // 84)]}-{('one', 'two', 'three', 'four')[int(y // 84)]}"


@pytest.mark.core
def test_letters_lie_where_they_are_said_to_be(tested: list[Photo]) -> None:
    """Along a sign, in its box and in order; ink and ground of each letter differ around its center."""
    for photo in tested:
        grey = np.asarray(photo.image.convert("L")).astype(int)
        for o in (o for o in photo.things if o.kind == "sign"):
            left, top, right, bottom = o.box
            assert len(o.letters) == len(o.name) == 4
            assert list(o.letters) == sorted(o.letters)
            for x, y in o.letters:
                assert left < x < right and top < y < bottom
                around = grey[int(y) - 8 : int(y) + 9, int(x) - 8 : int(x) + 9]
                assert np.ptp(around) > 80
