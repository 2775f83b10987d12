"""The machine's own Chromium and a JupyterLab, started once each. In CI they must be there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence

import pytest
from axe_playwright_python.sync_playwright import Axe
from browser.jupyter import Lab
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --disable-dev-shm-usage"
).split()


PATIENCE = 300_000  # milliseconds; a busy machine is no fault of the page
expect.set_options(timeout=PATIENCE)


class PatientBrowser:
    """Chromium, every window of which waits long enough for a slow and busy machine."""

    def __init__(self, chromium: Browser) -> None:
        self.chromium = chromium

    def new_context(self, **options: object) -> BrowserContext:
        context = self.chromium.new_context(**options)
        context.set_default_timeout(PATIENCE)
        return context

    def new_page(self, **options: object) -> Page:
        page = self.chromium.new_page(**options)
        page.set_default_timeout(PATIENCE)
        return page


@pytest.fixture(scope="session")
def browser() -> Iterator[PatientBrowser]:
    """Chromium as found on the machine; nothing is downloaded."""
    path = (
        shutil.which("chromium-headless-shell")  # the same pages for half of the CPU seconds
        or shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "There is no Chromium. Install it: apt-get install chromium."
        )
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield PatientBrowser(chromium)
        chromium.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable[..., Page]]:
    """Opens a file; afterwards, no page may have thrown, complained, asked for a dialog or fetched
    anything, but those foreseen.
    """
    troubles: list[str] = []
    foreseen: list[str] = []
    contexts = []

    def show(path, troubles_foreseen: Sequence[str] = (), **options) -> Page:
        foreseen.extend(troubles_foreseen)
        context = browser.new_context(**{"viewport": {"width": 900, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on(
            "console",
            lambda message: (
                troubles.append(f"{message.type}: {message.text}")
                if message.type == "error"
                else None
            ),
        )
        page.on(
            "dialog",
            lambda dialog: (troubles.append(f"dialog: {dialog.message}"), dialog.dismiss()),
        )
        page.on(
            "request",
            lambda request: (
                troubles.append(f"request: {request.url[:80]}") if request.url != page_url else None
            ),
        )
        page_url = path.as_uri()
        page.goto(page_url)
        return page

    yield show
    for context in contexts:
        context.close()
    assert troubles == foreseen


@pytest.fixture(scope="session")
def axe() -> Callable[..., None]:
    """Asserts that axe finds nothing serious or critical in the views of a page; `only` some of its
    rules, where many nodes take long.
    """
    checker = Axe()

    def check(page: Page, within: str = ".opd", only: Sequence[str] = ()) -> None:
        options = {"resultTypes": ["violations"], **({"runOnly": list(only)} if only else {})}
        found = checker.run(page, context=within, options=options).response["violations"]
        grave = [
            (v["id"], v["nodes"][0]["html"][:160], len(v["nodes"]))
            for v in found
            if v["impact"] in ("serious", "critical")
        ]
        assert not grave

    return check


@pytest.fixture(scope="session")
def lab(browser, tmp_path_factory) -> Iterator[Lab]:
    """One real JupyterLab for all tests; afterwards, no page may have asked for anything outside of
    it.
    """
    server = Lab(tmp_path_factory.mktemp("lab"), browser)
    yield server
    server.close()
    assert not server.foreign()
