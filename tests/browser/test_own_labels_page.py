"""Labels and colours of a user's own column, in a real browser: in the strip, or at the token."""

from __future__ import annotations

import pytest
from viz.traces import NASTY, made

from opdlab.data.column import Column
from opdlab.viz import Compare, Scrubber, Timeline, TokenLens

pytestmark = pytest.mark.browser
WORDS = [b"one", b" two", b" three"]
LABELS = ("imitate", NASTY[0])


def routed(*codes):
    route = Column(list(codes), labels=LABELS, hues=("teacher", ""))
    return made(WORDS).with_columns(route=route)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_lens_tints_by_the_hue_of_the_label(open_page, tmp_path, axe, scheme):
    lens = TokenLens(routed(0, 1, -1), channel="route")
    view = open_page(lens.to_html(tmp_path / "lens.html"), color_scheme=scheme)
    looks = view.locator(".opd-strip .opd-ink").evaluate_all(
        "nodes => nodes.map((n) => n.className)"
    )
    assert ["opd-k-teacher" in look for look in looks] == [True, False, False]
    assert "opd-k1" in looks[1]
    colour = view.locator(".opd-key .opd-k-teacher").evaluate(
        "node => getComputedStyle(node).getPropertyValue('--hue')"
    )
    assert colour.strip() == "#0072b2"
    axe(view, ".opd-lens")


@pytest.mark.parametrize("kind", [Timeline, Compare, Scrubber])
def test_other_views_name_the_label_at_the_token(open_page, tmp_path, kind):
    first, other = routed(0, 1, -1), routed(1, 0, -1)
    view = {
        Timeline: lambda: Timeline(first),
        Compare: lambda: Compare({"old": first, "new": other}),
        Scrubber: lambda: Scrubber({0: other, 10: first}),
    }[kind]()
    page = open_page(view.to_html(tmp_path / "view.html"))
    strip = page.locator(".opd-strip").first
    said = page.locator(".opd-item:has(> .opd-soft)")
    strip.locator("[data-i='0']").click()
    texts = [" ".join(text.split()) for text in said.all_text_contents()]
    if kind is Compare:
        assert texts == [f"new, route S {LABELS[1]}", "old, route I imitate"]
    else:
        assert texts == ["route I imitate"]
    strip.locator("[data-i='2']").click()
    assert said.count() == 0  # without a label nothing is named
