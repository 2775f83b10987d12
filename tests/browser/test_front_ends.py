"""Frozen notebooks and live views in further front ends: nbconvert's HTML with and without scripts,
sandboxed frames as of hosted notebook services. JupyterLab and Notebook 7: test_lab.py and
test_untrusted.py; marimo: tests/with_marimo. docs/front_ends.md has the table.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from urllib.parse import quote

import nbformat
import pytest
from nbconvert import HTMLExporter

from opdlab import viz
from opdlab.viz import embed

pytestmark = pytest.mark.browser
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "00_start.ipynb"
LENS = ".opd-lens[data-mounted] .opd-strip"


def frozen_view() -> str:
    """The first view of the notebook, as it was frozen."""
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            text = "".join(output.get("data", {}).get("text/html", ""))
            if '<div class="opd opd-lens' in text:
                return text
    raise AssertionError("the notebook has no TokenLens")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The notebook as `jupyter nbconvert --to html` writes it."""
    page, _ = HTMLExporter().from_notebook_node(nbformat.read(NOTEBOOK, as_version=4))
    path = tmp_path_factory.mktemp("exported") / "00_start.html"
    path.write_text(page, encoding="utf-8")
    return path


def test_the_html_of_nbconvert_responds_without_a_network(browser, exported):
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(exported.as_uri(), wait_until="domcontentloaded")
    page.wait_for_selector(LENS)
    strip = page.locator(LENS).first
    strip.locator("[data-i='3']").click()
    assert strip.locator("[aria-selected='true']").get_attribute("data-i") == "3"
    assert page.locator(".opd-bare").count() == 0  # no view says that it is still
    context.close()


def test_the_html_of_nbconvert_shows_pictures_where_scripts_are_off(browser, exported):
    context = browser.new_context(
        java_script_enabled=False,
        offline=True,
        color_scheme="dark",
        viewport={"width": 1000, "height": 800},
    )
    page = context.new_page()
    page.goto(exported.as_uri(), wait_until="domcontentloaded")
    picture = page.locator(".opd-lens .opd-still img").first
    picture.wait_for()
    assert picture.bounding_box()["width"] == 760
    page.locator(".opd-lens .opd-bare").first.wait_for()  # visible after a while
    context.close()


@pytest.mark.parametrize(("address", "kind"), [("srcdoc", "frozen"), ("data", "fresh")])
def test_a_view_responds_in_a_sandbox_that_shares_nothing_with_its_page(
    browser, tmp_path, address, kind
):
    view = frozen_view() if kind == "frozen" else viz.TokenLens.example().html()
    inner = embed.document("view", "", view)
    if address == "srcdoc":
        source = f'srcdoc="{html.escape(inner)}"'
    else:
        source = f'src="data:text/html;charset=utf-8,{quote(inner)}"'
    path = tmp_path / "page.html"
    path.write_text(f'<iframe sandbox="allow-scripts" {source} width="800" height="900"></iframe>')
    context = browser.new_context(offline=True)
    page = context.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.goto(path.as_uri())
    strip = page.frame_locator("iframe").locator(LENS)
    strip.locator("[data-i='2']").click()
    assert strip.locator("[aria-selected='true']").get_attribute("data-i") == "2"
    strip.press("End")
    assert strip.locator("[aria-selected='true']").get_attribute("data-i") != "2"
    (inside,) = [one for one in page.frames if one != page.main_frame]
    assert inside.evaluate("origin") == "null"
    assert not inside.evaluate("(() => { try { return !!localStorage } catch { return false } })()")
    assert troubles == []
    context.close()


@pytest.mark.parametrize("kind", ["frozen", "fresh"])
def test_a_view_says_that_it_is_still_in_a_sandbox_without_scripts(browser, tmp_path, kind):
    view = frozen_view() if kind == "frozen" else viz.TokenLens.example().html()
    inner = embed.document("view", "", view)
    path = tmp_path / "page.html"
    path.write_text(f'<iframe sandbox srcdoc="{html.escape(inner)}" width="800" height="900">')
    context = browser.new_context()
    page = context.new_page()
    page.goto(path.as_uri())
    frame = page.frame_locator("iframe")
    frame.locator(".opd-still img" if kind == "frozen" else ".opd-strip").first.wait_for()
    frame.locator(".opd-bare").wait_for()
    said = frame.locator(".opd-bare").text_content() or ""
    assert re.match("A still picture: no script runs here", said)
    context.close()


def test_a_view_that_no_script_draws_says_nothing_about_scripts():
    assert 'class="opd-bare"' not in viz.RunCard.example().html()
    assert 'class="opd-bare"' in viz.TokenLens.example().html(script=False)
