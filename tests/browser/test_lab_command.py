"""`opdlab lab`, as a reader starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from browser.jupyter import FOLDERS

pytestmark = pytest.mark.browser
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@pytest.fixture
def address(tmp_path):
    """Where a running `opdlab lab` says that it is, with its token."""
    env = (
        os.environ | {name: str(tmp_path / name.lower()) for name in FOLDERS} | {"BROWSER": "true"}
    )
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "opdlab.commands.cli", "lab", "--port", "18888"],
            env=env,
            stdout=log,
            stderr=log,
        )
    try:
        for _ in range(3000):
            assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            if "is running at" in (tmp_path / "log").read_text():
                break
            time.sleep(0.2)
        (said,) = Path(env["JUPYTER_RUNTIME_DIR"]).glob("jpserver-*.json")
        told = json.loads(said.read_text())
        assert told["hostname"] == "127.0.0.1"
        assert len(told["token"]) > 20  # a guard, though only this machine can come in
        yield f"http://127.0.0.1:{told['port']}/lab/tree/README.md?token={told['token']}"
        assert (
            "lab/tree/README.md" in (tmp_path / "log").read_text()
        )  # what it sends the browser to
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:  # it waits for the kernel of the notebook
            server.kill()
            server.wait()


def test_it_opens_at_the_index_and_trusts_the_series(address, browser):
    page = browser.new_page()
    page.goto(address)
    page.wait_for_selector(
        ".jp-MarkdownViewer h1 >> text=The notebooks", timeout=600_000
    )  # rendered, not its source
    assert page.locator(".jp-MarkdownViewer a >> text=30_privileged").first.is_visible()
    assert page.locator(".jp-MarkdownViewer img").count() == len(list(NOTEBOOKS.glob("*.ipynb")))
    link = page.locator(".jp-MarkdownViewer a >> text=00_start").first
    assert (
        page.request.get(link.evaluate("(a) => a.href")).json()["nbformat"] == 4
    )  # it leads to the notebook
    page.goto(address.replace("README.md", "00_start.ipynb"))
    # The series is trusted: the view that the script draws, and not its still picture.
    page.wait_for_selector(".jp-OutputArea-output .opd-lens[data-mounted]", timeout=600_000)
    page.close()
