"""Pictures that no decoder reads well: one line says which file it is, and no more memory is taken than is used."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, features

from vispruner.conversion import picture
from vispruner.conversion.picture import FRAMES, open_photo, open_picture

MUTANTS = 60  # of each kind


def encoded(kind: str) -> bytes:
    image = Image.effect_noise((48, 48), 60).convert("RGB")
    buffer = io.BytesIO()
    frames = {"save_all": True, "append_images": [image.rotate(90), image.rotate(180)]} if kind == "GIF" else {}
    image.save(buffer, format=kind, **frames)
    return buffer.getvalue()


KINDS = ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", *(["AVIF"] if features.check("avif") else [])]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reads_videos", [False, True])
def test_a_mutated_picture_is_read_or_refused_by_name(kind: str, reads_videos: bool, tmp_path: Path) -> None:
    whole, draw = encoded(kind), random.Random(kind)
    path = tmp_path / f"mutant.{kind.lower()}"
    for _ in range(MUTANTS):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(bytes(data[: draw.randrange(len(data))] if draw.random() < 0.3 else data))
        try:
            open_picture(path, reads_videos)
        except OSError as error:
            assert str(error).startswith(f"{path} is not a readable image: ")


@pytest.mark.parametrize("error", [RuntimeError, IndexError, NotImplementedError, MemoryError, KeyError])
def test_whatever_a_decoder_raises_names_the_file(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Image.Image, *arguments: object) -> None:
        raise error("no such box")

    (tmp_path / "photo.png").write_bytes(encoded("PNG"))
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(OSError, match=r"photo\.png is not a readable image"):
        open_photo(tmp_path / "photo.png")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
DDS = b"DDS " + (124).to_bytes(4, "little") + bytes(120)


@pytest.mark.parametrize("data", [POSTSCRIPT, DDS, b"", b"GIF89a"], ids=["postscript", "dds", "empty", "head"])
def test_other_kinds_are_not_even_opened(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: object, **options: object) -> None:
        pytest.fail("a picture ran a program")

    monkeypatch.setattr("subprocess.Popen.__init__", run)
    (tmp_path / "photo.png").write_bytes(data)
    with pytest.raises(OSError, match=r"photo\.png is not a readable image"):
        open_photo(tmp_path / "photo.png")


def test_a_phone_s_photo_is_refused_with_the_kinds_that_are_read(tmp_path: Path) -> None:
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(OSError, match=r"photo\.heic is not .*: it is none of .*JPEG.*PNG.*; save it as one of these"):
        open_photo(tmp_path / "photo.heic")


def animation(path: Path, size: int, frames: int) -> Path:
    images = [Image.new("RGB", (size, size), (4 * number % 256, 0, 0)) for number in range(frames)]
    images[0].save(path, save_all=True, append_images=images[1:])
    return path


def test_the_frames_in_use_are_evenly_spaced(tmp_path: Path) -> None:
    count = 64
    path = animation(tmp_path / "long.gif", 60, count)
    frames = open_picture(path, reads_videos=True)
    assert isinstance(frames, list) and len(frames) == FRAMES
    expected = [number * count // FRAMES for number in range(FRAMES)]
    with Image.open(path) as image:
        for frame, number in zip(frames, expected, strict=True):
            image.seek(number)
            assert frame.tobytes() == image.convert("RGB").tobytes()


def test_only_the_frames_in_use_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = animation(tmp_path / "long.gif", 8, 64)
    taken: list[int] = []
    read: Callable[[Image.Image, int], Image.Image] = picture._frame
    monkeypatch.setattr(picture, "_frame", lambda image, number: taken.append(number) or read(image, number))
    open_picture(path, reads_videos=True)
    assert taken == list(range(0, 64, 8))


def test_an_animation_that_would_take_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = animation(tmp_path / "long.gif", 100, 50)
    for limit, pixels in (("MOST_PIXELS", 50 * 100 * 100), ("MOST_KEPT_PIXELS", FRAMES * 100 * 100)):
        monkeypatch.setattr(picture, limit, pixels)
        assert len(open_picture(path, reads_videos=True)) == FRAMES
        monkeypatch.setattr(picture, limit, pixels - 1)
        with pytest.raises(OSError, match="50 frames of 100 x 100 are too much: make it shorter or smaller"):
            open_picture(path, reads_videos=True)
        monkeypatch.undo()


def test_frames_of_a_folder_are_no_larger_than_those_of_an_animation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "1.png")
    monkeypatch.setattr(picture, "MOST_KEPT_PIXELS", FRAMES * 100 * 100)
    assert len(open_picture(tmp_path, reads_videos=True)) == 1
    monkeypatch.setattr(picture, "MOST_KEPT_PIXELS", FRAMES * 100 * 100 - 1)
    with pytest.raises(OSError, match=r"1\.png is not a readable image: 1 frames of 100 x 100 are too much"):
        open_picture(tmp_path, reads_videos=True)


@pytest.mark.parametrize("size", [(1, 201), (201, 1)])
def test_a_line_is_no_picture(size: tuple[int, int], tmp_path: Path) -> None:
    """Processors bring the shorter side to one size: of a line that fits into a few bytes a terabyte can become."""
    line = Image.new("RGB", size)
    line.save(tmp_path / "line.png")
    line.save(tmp_path / "line.gif", save_all=True, append_images=[Image.new("RGB", size, (9, 0, 0))])
    for name in ("line.png", "line.gif"):
        with pytest.raises(OSError, match=f"{size[0]} x {size[1]} is a line and no picture: crop it"):
            open_picture(tmp_path / name, reads_videos=True)
    Image.new("RGB", (2, 400)).save(tmp_path / "narrow.png")
    assert open_photo(tmp_path / "narrow.png").size == (2, 400)
