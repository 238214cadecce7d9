"""The HTML report: it says what the model answered, needs nothing from outside, and a browser renders it."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

for needed in ("sklearn", "easy_vqa"):
    pytest.importorskip(needed, reason="the benchmarks need `pip install 'vispruner[benchmarks]'`")

SCENES, SELECTORS, BUDGETS = 2, ["vispruner", "random"], ["25", "12.5"]
IMPORTANT, DIVERSE = (230, 159, 0), (0, 114, 178)
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)


@pytest.fixture(scope="module")
def report() -> ModuleType:
    folder = str(Path(__file__).parent.parent / "benchmarks")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("report")


@pytest.fixture(scope="module")
def page(report: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "report.html"
    options = ["--selectors", *SELECTORS, "--budgets", *BUDGETS, "--scenes", str(SCENES), "--seed", "3"]
    assert report.main([str(out), *options]) == 0
    return out


class Elements(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.slow
def test_every_scene_shows_every_answer_of_every_selector_and_budget(report: ModuleType, page: Path) -> None:
    scenes = report.scene_samples(seed=3, scenes=SCENES)
    answers = [attrs for tag, attrs in Elements(page.read_text()).found if attrs.get("class") in ("right", "wrong")]
    cells = 1 + len(BUDGETS) * 3  # the dense model; vispruner at two ratios and random
    assert [len(scene) > 5 for scene in scenes] == [True] * SCENES
    assert len(answers) == cells * sum(map(len, scenes))


@pytest.mark.slow
def test_the_summary_counts_the_marks(report: ModuleType, page: Path) -> None:
    text = page.read_text()
    counted = [int(count) for count in re.findall(r">(\d+) of \d+<", text)]
    assert sum(counted) == len(re.findall(r'<li class="right"', text))
    assert len(re.findall(r'<li class="wrong"', text)) > 0  # random selection at 12.5 % does not answer everything


@pytest.mark.slow
def test_as_many_patches_are_framed_as_the_budget_says(page: Path) -> None:
    drawings = re.findall(r'aria-label="(\d+) kept patches.*?</svg>', page.read_text(), flags=re.DOTALL)
    framed = [
        drawing.count("z") - re.findall(r'class="dropped" d="(.*?)"', drawing)[0].count("z")
        for drawing in re.findall(r"<use href=.*?</svg>", page.read_text(), flags=re.DOTALL)
    ]
    assert framed == [int(count) for count in drawings]
    assert set(framed) == {36, 18}


@pytest.mark.slow
def test_the_page_needs_nothing_from_outside(page: Path) -> None:
    for tag, attributes in Elements(page.read_text()).found:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("data:", "#"))
    assert "url(" not in page.read_text() and "@import" not in page.read_text()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
def test_chromium_renders_pictures_frames_and_marks(page: Path, tmp_path: Path) -> None:
    shot = tmp_path / "shot.png"
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    profile = [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,1800", f"--screenshot={shot}"]
    subprocess.run([*command, *profile, page.as_uri()], check=True, capture_output=True, timeout=600)
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    for colour in (IMPORTANT, DIVERSE):
        assert (np.abs(pixels - colour).max(axis=-1) < 12).sum() > 1500, f"no frames of colour {colour} were drawn"
    # The embedded picture itself: the symbol that every drawing of the scene refers to fills a square of many colours.
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 2000


def test_answers_are_escaped(report: ModuleType) -> None:
    sample = report.Sample(0, True, Image.new("RGB", (96, 96)), "Is <b>it</b>?", "yes", "exist", None)
    dense = report.Variant("none", 100.0, 144)
    cell = report.Cell(dense, ["<script>"], frozenset(range(144)), frozenset())
    text = report.page([[sample]], [[cell]], 12, "about")
    assert "&lt;script&gt;" in text and "<script>" not in text and "<b>it</b>" not in text


@pytest.mark.parametrize(
    ("arguments", "named"), [(["--selectors", "nonsense"], "nonsense"), (["--budgets", "0"], "--budgets")]
)
def test_what_cannot_be_shown_is_refused_and_writes_nothing(
    report: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert report.main([str(tmp_path / "r.html"), *arguments]) == 2
    assert named in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.photo
def test_photographs_are_shown_through_the_real_tower(report: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "photos.html"
    options = ["--dataset", "photos", "--selectors", "vispruner", "downsample", "--budgets", "11.11", "--scenes", "1"]
    assert report.main([str(out), *options]) == 0
    text = out.read_text()
    (samples,) = report.scene_samples(seed=0, scenes=1, dataset="photos")
    answers = [attrs for _, attrs in Elements(text).found if attrs.get("class") in ("right", "wrong")]
    assert len(answers) == 4 * len(samples)  # dense, vispruner at two ratios, the smaller picture
    assert re.findall(r'aria-label="(\d+) kept patches', text) == ["64", "64"] and "112 x 112 pixels" in text
    assert [attrs["class"] for tag, attrs in Elements(text).found if tag == "image"] == ["photo"]
    assert "Of the test set of photos with seed 0, 1 of the pictures" in text and "of 576 visual tokens" in text
