"""Committed notebooks where they are not trusted: JupyterLab, Notebook 7, and rules like GitHub's.

These front ends strip scripts, styles and SVG from outputs, and leave the still pictures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import bleach
import pytest
from browser.jupyter import SPEC, Lab
from browser.measure_pages import whole_notebooks

pytestmark = pytest.mark.browser
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SHOWN = """(images) => images.map((image) => ({
  width: image.naturalWidth,
  shown: image.getBoundingClientRect().width,
  words: image.alt,
}))"""
# The allow-list of GitHub's html-pipeline, as far as it concerns what a view has.
GITHUB_TAGS = {"a", "b", "br", "code", "details", "div", "em", "img", "p", "picture", "pre"}
GITHUB_TAGS |= {"source", "span", "strong", "summary", "table", "tbody", "td", "th", "tr"}
GITHUB_ATTRIBUTES = {"img": ["src", "alt", "width"], "source": ["srcset", "media"]}


def views_of(path: Path) -> list[str]:
    """The HTML outputs of a notebook that are views."""
    book = json.loads(path.read_text(encoding="utf-8"))
    outputs = [output for cell in book["cells"] for output in cell.get("outputs", [])]
    html = ["".join(output.get("data", {}).get("text/html", "")) for output in outputs]
    return [text for text in html if '<div class="opd opd-' in text]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_view_carries_its_picture_in_light_and_dark(path):
    for html in views_of(path):
        still = re.search(r'<picture class="opd-still">(.*?)</picture>', html, re.DOTALL)
        assert still, "freeze the notebook again: opdlab freeze"
        addresses = re.findall(r'(?:src|srcset)="data:image/png;base64,([^"]+)"', still[1])
        assert len(addresses) == 2
        assert addresses[0] != addresses[1]
        assert "prefers-color-scheme: dark" in still[1]


@pytest.fixture
def foreign(lab: Lab) -> Iterator[list[str]]:
    """A notebook that nobody has signed, with a view of each kind; the kinds."""
    views: dict[str, dict] = {}
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                html = "".join(output.get("data", {}).get("text/html", ""))
                kind = re.search(r'<div class="opd (opd-\w+)', html)
                if kind:
                    views.setdefault(kind[1], {**cell, "source": "", "outputs": [output]})
    book = {"cells": list(views.values()), "metadata": SPEC, "nbformat": 4, "nbformat_minor": 5}
    (lab.root / "foreign_views.ipynb").write_text(json.dumps(book))
    with whole_notebooks(lab):
        yield list(views)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("front_end", ["lab/tree", "notebooks"], ids=["JupyterLab", "Notebook 7"])
def test_an_untrusted_notebook_shows_its_pictures(lab: Lab, foreign, front_end, dark):
    page = lab.open_afresh("foreign_views.ipynb", dark=dark, front_end=front_end)
    images = page.locator(".jp-OutputArea-output .opd img")
    page.wait_for_function(
        "count => document.querySelectorAll('.jp-OutputArea-output .opd img').length === count",
        arg=len(foreign),
    )
    for image in images.evaluate_all(SHOWN):
        assert image["width"] == 760
        assert image["shown"] > 500
        assert ":" in image["words"]
    assert page.locator("[data-mounted]").count() == 0  # no script ran
    assert page.locator(".opd script, .opd style, .opd svg").count() == 0
    styled = page.locator(".opd-when-styled").all()
    assert styled
    assert all(one.is_hidden() for one in styled)
    page.context.close()


def test_rules_like_those_of_github_leave_the_words_and_no_code():
    for html in views_of(NOTEBOOKS / "00_start.ipynb"):
        without_code = re.sub(r"<(script|style).*?</\1>", "", html, flags=re.DOTALL)
        options = {"tags": GITHUB_TAGS, "attributes": GITHUB_ATTRIBUTES, "strip": True}
        left = bleach.clean(without_code, protocols=["http", "https"], **options)
        assert "<img" in left
        assert 'alt="TokenLens' in left
        assert "Largest log ratio" in left
        assert "opd-data" not in left
        with_data = bleach.clean(without_code, protocols=["https", "data"], **options)
        assert 'src="data:image/png;base64,' in with_data
