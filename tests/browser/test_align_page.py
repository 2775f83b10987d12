"""The alignment view in a real browser: the page draws what the still picture does, keys walk it,
nothing in it runs.
"""

from __future__ import annotations

import pytest
from viz.traces import NASTY, byte_pieces

from opdlab.viz import Alignment, page

pytestmark = pytest.mark.browser

OURS, THEIRS = (
    [b"4", b" 7", b" =", b" 85", b"", b" ok"],
    [b"4", b" ", b"7", b" = ", b"8", b"5", b" ok"],
)
SEEN = """nodes => nodes.map((n) => {
  const path = n.querySelector("path").getAttribute("d");
  return [n.textContent, path, n.className, n.style.minWidth];
})"""


def test_the_page_is_the_still_picture_and_can_be_walked(open_page, tmp_path, axe):
    view = Alignment(OURS, THEIRS, kl=[0.0, -2.0, 1.5, 0.5], title=NASTY[0])
    live, still = (
        open_page(view.to_html(tmp_path / "a.html")),
        open_page(view.to_html(tmp_path / "b.html"), java_script_enabled=False),
    )
    drawn, want = (p.locator(".opd-pair").evaluate_all(SEEN) for p in (live, still))
    assert drawn == want
    assert [words for words, *_ in drawn] == ["44", "·7·7", "·=·85∅·=·85", "·ok·ok"]
    tokens = live.locator(".opd-toks").evaluate_all("nodes => nodes.map((n) => n.className)")
    assert "opd-teacher" in tokens[2]
    assert "opd-student" in tokens[4]
    rows, panel = live.locator(".opd-rows2"), live.locator(".opd-align-facts")
    rows.focus()
    rows.press("n")
    assert panel.locator("div").all_text_contents() == [
        "span 1 · 1:2 · 2 bytes · log q − log p +2 nats ▲",
        "student·7",
        "teacher· 7",
    ]
    rows.press("n")
    rows.press("n")
    assert live.locator("[aria-selected=true]").get_attribute("data-span") == "1"  # round again
    rows.press("End")
    assert rows.get_attribute("aria-activedescendant") == live.locator(
        "[data-span='3']"
    ).get_attribute("id")
    live.locator("[data-span='2']").hover()
    assert "span 2 · 2:3" not in panel.text_content()
    assert "span 2 · 3:3" in panel.text_content()
    live.mouse.move(2, 2)
    assert "span 3" in panel.text_content()
    axe(live)


def test_any_tokens_fit_a_narrow_dark_page(open_page, tmp_path, axe):
    tokens = [text.encode() for text in NASTY]
    nasty, differ = (
        Alignment(tokens, byte_pieces(b"".join(tokens).decode(), 3)),
        Alignment([b"same", b" here"], [b"same", b" there"]),
    )
    lenses = [("", view) for view in (nasty, differ, Alignment([], []))]
    live = open_page(
        page(tmp_path / "p.html", title="t", lenses=lenses),
        color_scheme="dark",
        viewport={"width": 480, "height": 900},
    )
    assert live.locator(".opd-unmatched").count() == 1
    assert live.evaluate("window.broken") is None
    assert live.evaluate("document.documentElement.scrollWidth") <= 480
    names = set(
        live.evaluate("[...document.querySelectorAll('.opd-alignment *')].map((n) => n.localName)")
    )
    assert names <= {"div", "span", "b", "svg", "path", "script"}
    axe(live)
