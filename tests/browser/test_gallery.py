"""The gallery of the shipped world: every view on one page, in a real browser, and what `opdlab
show` makes of any trace.
"""

from __future__ import annotations

import pytest
from viz.traces import made

from opdlab import viz
from opdlab.commands.gallery import complete, gallery
from opdlab.errors import OpdlabError
from opdlab.viz.overview import overview

pytestmark = pytest.mark.browser


def test_every_view_on_one_page(tmp_path, open_page, axe):
    path = gallery(tmp_path, quick=True)
    tab = open_page(path, viewport={"width": 480, "height": 900}, color_scheme="dark")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 480
    axe(tab, only=["color-contrast"])
    names = tab.eval_on_selector_all(".opd[class*=opd-]", "nodes => nodes.map((n) => n.className)")
    shown = {name.split("opd-")[-1] for name in names}
    assert shown == {view.name for view in viz.VIEWS}
    assert all(
        tab.eval_on_selector_all(".opd-box", "boxes => boxes.map((b) => b.children.length > 0)")
    )
    with pytest.raises(OpdlabError, match="no gallery of 'moon'"):
        gallery(tmp_path, "moon")


def test_a_view_without_a_scene_shows_its_example():
    lens = viz.TokenLens(made([b"a"]))
    views = complete([lens])
    assert views[0] is lens
    assert [type(view) for view in views] == list(viz.VIEWS)


def test_show_draws_what_a_trace_has(tmp_path, open_page):
    alone = overview(made([b"a", b" b"], ("student",)))
    assert [type(view) for _, view in alone] == [viz.TokenLens, viz.TwoRules]
    hinted = overview(made([b"a", b" b", b"c"], ("student", "teacher", "teacher+hint")))
    kinds = [type(view) for _, view in hinted]
    regimes = [viz.Regimes, viz.TwoRules, viz.Disagreements]
    assert kinds == [viz.TokenLens, viz.Timeline, *regimes, viz.PrivilegeLens, viz.TailAudit]
    tab = open_page(viz.page(tmp_path / "all.html", title="all", lenses=hinted))
    assert tab.locator(".opd").count() == len(kinds)
