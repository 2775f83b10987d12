"""Views in marimo, which has an environment of its own: `make test-frontends`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("marimo")
from playwright.sync_api import Page, sync_playwright

PORT = 27180
PATIENCE = 300_000  # milliseconds
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """The notebook as an app; afterwards, nothing may have thrown or been asked for outside."""
    command = [sys.executable, "-m", "marimo", "run", str(HERE / "app.py")]
    command += ["--headless", "--no-token", "--port", str(PORT)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, env={**os.environ, "DO_NOT_TRACK": "1"}, **quiet)
    troubles: list[str] = []
    try:
        wait(f"http://127.0.0.1:{PORT}/health")
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
            )
            tab = chromium.new_page()
            tab.set_default_timeout(PATIENCE)
            tab.on("pageerror", lambda error: troubles.append(str(error)))
            tab.goto(f"http://127.0.0.1:{PORT}")
            yield tab
            chromium.close()
    finally:
        server.terminate()
        server.wait(30)
    assert troubles == []


def wait(address: str) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(address, timeout=10).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("marimo did not start")


def test_a_live_view_responds_and_python_hears_of_it(page):
    strip = page.locator(".opd-lens .opd-strip[role=listbox]")
    strip.locator("[data-i='3']").click()
    page.get_by_text(re.compile("selected: 3")).wait_for()


def test_a_view_that_is_not_live_is_a_still_picture_and_says_so(page):
    notes = page.locator(".opd-lens .opd-bare")
    notes.nth(1).wait_for()
    assert notes.count() == 2
    assert "as a live view" in (notes.first.text_content() or "")
