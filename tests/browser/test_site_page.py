"""A part of the documentation site, built, and opened from disk in Chromium without a network."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # website/ is part of the repository, not of the package

from website import build  # noqa: E402

pytestmark = pytest.mark.browser
PAGES = ("docs/glossary.md", "notebooks/00_start.ipynb", "DOPD")
PAPER = "node => getComputedStyle(node).backgroundColor"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the built pages."""
    return build.build(tmp_path_factory.mktemp("site"), PAGES).built


@pytest.fixture
def visit(browser, site) -> Iterator[Callable[..., Page]]:
    """Opens a page of the site; afterwards, none may have thrown or asked for anything outside."""
    troubles: list[str] = []
    contexts = []

    def show(name: str, **options) -> Page:
        context = browser.new_context(offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on("request", lambda request: note(request.url))
        page.goto((site / name).as_uri())
        return page

    def note(url: str) -> None:
        if not url.startswith((site.as_uri(), "data:", "blob:", "about:")):
            troubles.append(url)

    yield show
    for context in contexts:
        context.close()
    assert troubles == []


def test_the_views_of_a_notebook_respond_and_follow_the_theme(visit, axe):
    page = visit("notebooks/00_start.html", viewport={"width": 1200, "height": 800})
    page.wait_for_selector(".opd-lens[data-mounted]")
    strip = page.locator(".opd-lens .opd-strip").first
    strip.locator("[data-i='3']").click()
    assert strip.locator("[aria-selected='true']").get_attribute("data-i") == "3"
    lens = page.locator(".opd-lens").first
    light = lens.evaluate(PAPER)
    assert light == page.locator("body").evaluate(PAPER) == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.body.dataset.mdColorScheme === 'slate'")
    dark = lens.evaluate(PAPER)
    assert dark == page.locator("body").evaluate(PAPER)
    assert max(map(int, re.findall(r"\d+", dark)[:3])) < 60
    assert lens.evaluate("node => getComputedStyle(node).colorScheme") == "dark"
    axe(page, within="article", only=["color-contrast", "aria-required-children", "image-alt"])


@pytest.mark.parametrize("width", [390, 1200])
def test_a_page_has_no_serious_problem_and_fits_its_screen(visit, axe, width):
    page = visit("index.html", viewport={"width": width, "height": 800})
    page.wait_for_selector(".opd-lens[data-mounted]")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    axe(page, within="body")


@pytest.mark.parametrize(("width", "is_beside"), [(480, False), (1200, True)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_method_has_equation_and_code_side_by_side(visit, axe, width, is_beside, scheme):
    view = {"width": width, "height": 800}
    page = visit("methods/dopd.html", viewport=view, color_scheme=scheme)
    equation, code = (page.locator(".site-pair > div").nth(i).bounding_box() for i in (0, 1))
    assert (code["x"] >= equation["x"] + equation["width"]) == is_beside
    assert (code["y"] >= equation["y"] + equation["height"]) == (not is_beside)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    axe(page, within="article")


def test_the_search_finds_reverse_kl_without_a_server(visit):
    page = visit("index.html")
    page.wait_for_selector(".opd-lens[data-mounted]")
    page.keyboard.press("Control+k")
    page.keyboard.type("reverse KL")
    found = page.get_by_text(re.compile(r"^\d+ results$"))
    found.wait_for()
    assert int((found.text_content() or "").split()[0]) >= 3


def test_a_place_that_is_not_there_ends_the_build(tmp_path):
    site = build.write_site(tmp_path, ["docs/glossary.md"])
    page = site.source / "docs" / "glossary.md"
    page.write_text(page.read_text(encoding="utf-8") + "\n[x](glossary.md#nowhere)\n")
    with pytest.raises(SystemExit, match="the site was not built"):
        build.render(site)
