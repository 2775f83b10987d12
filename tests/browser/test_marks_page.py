"""Marks in a real browser: labels by keyboard and by mouse, and the file that the page offers."""

from __future__ import annotations

import pytest
from viz.traces import NASTY, made

from opdlab.data.labels import Labels
from opdlab.viz import Marks

pytestmark = pytest.mark.browser
WORDS = [*map(str.encode, NASTY[:6]), b" a", b" b"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tokens_are_labelled(open_page, tmp_path, axe, scheme):
    trace = made(WORDS)
    page = open_page(
        Marks(trace, title=NASTY[0]).to_html(tmp_path / "m.html"),
        color_scheme=scheme,
        viewport={"width": 480, "height": 900},
    )
    strip = page.locator(".opd-strip")
    strip.focus()
    strip.press("Home")
    strip.press("m")
    label = page.get_by_label("label (m)")
    label.fill(NASTY[2])
    page.get_by_label("comment").fill(NASTY[0])
    label.press("Enter")
    strip.press("End")
    strip.press("Shift+ArrowLeft")
    label.fill("slip")
    page.get_by_role("button", name="Label", exact=True).click()
    lines = page.locator(".opd-mark-line")
    assert lines.count() == 2
    assert NASTY[0] in lines.first.text_content()
    path = tmp_path / "l.json"
    with page.expect_download() as offered:
        page.get_by_role("button", name="Save as a file").click()
    assert offered.value.suggested_filename == "trace.labels.json"
    offered.value.save_as(path)
    found = Labels(trace, path).as_json()
    assert found == [
        {"sample": 0, "position": 0, "label": NASTY[2], "comment": NASTY[0], "length": 1},
        {"sample": 0, "position": len(WORDS) - 2, "label": "slip", "comment": "", "length": 2},
    ]
    axe(page)
    lines.first.click()
    assert label.input_value() == NASTY[2]
    strip.press("Delete")
    assert lines.count() == 1
    assert "1 label in the trace" in page.locator(".opd-said").text_content()
    assert page.evaluate("window.broken") is None
