"""The system's Chromium, headless, driven by Playwright: for the page's tests and its benchmark."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
COUNT_NODES = """() => {
  const inside = (e) => 1 + (e.shadowRoot ? count(e.shadowRoot) : 0);
  const count = (root) => [...root.querySelectorAll("*")].reduce((sum, e) => sum + inside(e), 0);
  return count(document);
}"""
"""Counts the nodes of a page, those of shadow roots too."""


def chromium() -> str | None:
    """Return the browser's path, from CHROMIUM or by its usual names; None where there is none."""
    found = (os.environ.get("CHROMIUM"), *map(shutil.which, NAMES))
    return next((path for path in found if path), None)


@contextmanager
def opened_browser() -> Iterator[Any]:
    """Open the browser; raise FileNotFoundError saying what to install where there is none."""
    from playwright.sync_api import sync_playwright

    path = chromium()
    if path is None:
        raise FileNotFoundError("no Chromium; install Debian's chromium, or name one in CHROMIUM")
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=list(FLAGS))
        yield opened
        opened.close()
