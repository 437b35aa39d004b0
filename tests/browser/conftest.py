"""A headless browser without network access; tests are skipped if none is installed.

SCREENSHOTS=folder saves screenshots of the pages.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra: dev)")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


class Opened:
    """An open page, with its requests and its errors."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.requests: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)

    def shoot(self, name: str) -> None:
        """Save a screenshot of the whole page in the folder SCREENSHOTS, if it is set."""
        folder = os.environ.get("SCREENSHOTS")
        if folder:
            self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)

    def check(self, file: Path) -> None:
        """Assert that the page loaded nothing but itself and raised no error."""
        outside = [url for url in self.requests if not url.startswith(("data:", "blob:")) and url != file.as_uri()]
        assert outside == []
        assert self.errors == []


@pytest.fixture
def show(browser: Any) -> Iterator[Any]:
    """Return a function that opens a file in a new context: `show(file, width=..., dark=...)`."""
    contexts = []

    def show(file: Path, width: int = 1280, height: int = 900, dark: bool = False) -> Opened:
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
            accept_downloads=True,
            offline=True,
        )
        contexts.append(context)
        opened = Opened(context.new_page())
        opened.page.goto(file.as_uri())
        return opened

    yield show
    for context in contexts:
        context.close()
