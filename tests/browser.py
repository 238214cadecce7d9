"""Drive a real headless Chromium, where this machine has one and Playwright: for tests that are marked `browser`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
CAN_BROWSE = CHROMIUM is not None and find_spec("playwright") is not None
PATIENCE = 120_000  # ms: a machine may be busy; a page that does right needs a second


@contextmanager
def open_page(url: str, width: int = 1300, height: int = 1000) -> Iterator[tuple[Any, list[str]]]:
    """Open a page; yield it and the list of addresses that it asks for. An error of its scripts fails the test."""
    from playwright.sync_api import sync_playwright

    asked: list[str] = []
    thrown: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: thrown.append(str(error)))
        page.goto(url)
        yield page, asked
        browser.close()
    assert not thrown
