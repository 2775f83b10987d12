"""Why in a real browser: the weights of the chosen token, and the layers under them."""

from __future__ import annotations

import pytest
from viz.traces import NASTY

from opdlab.viz import TokenLens, Why, page

pytestmark = pytest.mark.browser
WORDS = [*map(str.encode, NASTY[:6]), b" a", b" b"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_weights_and_layers_are_drawn(open_page, tmp_path, axe, scheme):
    view = Why.example(WORDS, NASTY[0])
    path = page(tmp_path / "p.html", title="p", lenses=[("", view), ("", TokenLens(view.trace))])
    shown = open_page(path, color_scheme=scheme, viewport={"width": 480, "height": 1200})
    panel = shown.locator(".opd-why-panel")
    teacher = panel.locator(".opd-of-teacher")
    reading = view.reasons[len(WORDS) - 1].teacher
    pieces = teacher.locator(".opd-piece")
    assert pieces.count() == len(reading.pieces)
    assert pieces.first.get_attribute("data-part") == "hint"
    assert pieces.first.get_attribute("title") == "hint, −1 nats"
    shares = teacher.locator(".opd-share .opd-value").all_text_contents()
    want = [100 * share for share in reading.shares().values()]
    assert [float(text.strip("<> %")) for text in shares] == pytest.approx(want, abs=0.06)
    assert panel.locator(".opd-plot").count() == 1
    shown.locator(".opd-lens [data-i='3']").click()
    assert "Nobody asked" in panel.text_content()
    shown.locator(".opd-why .opd-strip").press("n")
    assert pieces.count() == len(reading.pieces)
    assert shown.evaluate("window.broken") is None
    axe(shown, ".opd-why")
