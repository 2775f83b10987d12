"""Disagreements in a real browser: groups, their places, and tokens chosen in another view."""

from __future__ import annotations

import pytest
from viz.traces import NASTY, made, several

from opdlab.viz import Disagreements, TokenLens, page

pytestmark = pytest.mark.browser
WORDS = [*map(str.encode, NASTY[:6]), *[b" a", b" b"] * 6]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_groups_show_their_places(open_page, tmp_path, axe, scheme):
    trace = several(made(WORDS, seed=1), made(WORDS, seed=2))
    view = Disagreements(trace, least=0.0, title=NASTY[0])
    path = page(tmp_path / "p.html", title="p", lenses=[("", view), ("", TokenLens(trace, 1))])
    shown = open_page(path, color_scheme=scheme, viewport={"width": 480, "height": 1200})
    groups, places = shown.locator(".opd-group"), shown.locator(".opd-place")
    assert groups.count() == len(view.groups)
    first = view.groups.iloc[0]
    assert groups.first.locator("b").all_text_contents() == [first.student, first.teacher]
    assert places.count() == first["count"]
    shown.locator(".opd-groups").press("ArrowDown")
    df = view.df
    rows = [int(r) for r in places.evaluate_all("nodes => nodes.map((n) => n.dataset.row)")]
    assert sorted(rows) == df.index[df.group == 1].tolist()
    shown.get_by_role("button", name="by count").click()
    counts = [
        int(t.split()[0]) for t in shown.locator(".opd-number:nth-child(4)").all_text_contents()
    ]
    assert counts == sorted(counts, reverse=True)
    # A token of the lens, which shows the second completion, leads to its group.
    row = df.index[(df["sample"] == 1) & (df.group >= 0)][-1]
    shown.locator(f".opd-lens [data-i='{df.position[row]}']").click()
    chosen = shown.locator(".opd-place[aria-selected='true']")
    assert int(chosen.get_attribute("data-row")) == row
    assert (
        int(shown.locator(".opd-group[aria-selected='true']").get_attribute("data-row"))
        == df.group[row]
    )
    assert shown.evaluate("window.broken") is None
    axe(shown, ".opd-disagreements")
