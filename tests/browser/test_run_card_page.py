"""The card in a real browser: it fits, it can be read, and it becomes a picture."""

from __future__ import annotations

import struct

import pytest
from viz.test_run_board import troubled
from viz.test_run_card import AFTER, BEFORE
from viz.traces import NASTY, made

from opdlab.viz import RunCard, page

pytestmark = pytest.mark.browser


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 480)])
def test_it_fits_and_can_be_read(open_page, tmp_path, axe, scheme, width):
    card = RunCard(
        troubled(),
        BEFORE,
        AFTER,
        samples=made([text.encode() for text in NASTY], prompt=NASTY[0]),
        title=NASTY[2],
    )
    view = open_page(
        page(tmp_path / "p.html", title="t", lenses=[("", card)]),
        color_scheme=scheme,
        viewport={"width": width, "height": 900},
    )
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    assert view.locator(".opd-plot").count() == 4
    was, now = (view.locator(f".opd-{name}").bounding_box()["x"] for name in ("was", "is"))
    line = view.locator(".opd-line01").bounding_box()
    assert (now - was) / line["width"] == pytest.approx(0.5, abs=0.01)
    assert view.evaluate("window.broken") is None
    axe(view)


def test_it_becomes_a_picture(tmp_path):
    raw = RunCard(troubled(), BEFORE, AFTER).to_png(tmp_path / "card.png", width=800).read_bytes()
    assert (raw[:4], struct.unpack(">I", raw[16:20])[0]) == (b"\x89PNG", 1600)
