"""The tail audit in a real browser: the slider moves curves, strip and badge."""

from __future__ import annotations

import pytest
from viz.traces import made

from opdlab.viz import TailAudit

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_k_moves_everything(open_page, tmp_path, axe, scheme):
    audit = TailAudit(made([f" t{i}".encode() for i in range(12)], top=4), title="Audit")
    view = open_page(audit.to_html(tmp_path / "t.html"), color_scheme=scheme)
    slider, badge, told = (
        view.get_by_role("slider"),
        view.locator(".opd-tail-badge"),
        view.locator(".opd-tail-told"),
    )
    colours = lambda: view.locator(".opd-strip .opd-ink").evaluate_all(
        "nodes => nodes.map((n) => n.className)"
    )
    before, seen = colours(), []
    for key in ("Home", "ArrowRight"):
        slider.press(key)
        audit.k = 1 + len(seen)
        row = audit.df.iloc[5]
        view.locator("[data-i='5']").hover()
        seen.append(badge.text_content())
        assert f"top-{audit.k} covers {100 * row.student_mass:.3g} %" in seen[-1]
        assert f"reads {row.bucket:.2g}"[:9] in seen[-1]
        assert (
            f"The student's top {audit.k} cover"
            f" {100 * audit.curve.loc[audit.k, 'student_mass']:.3g} %" in told.text_content()
        )
    assert colours() != before
    view.get_by_role("button", name="uncovered mass").click()
    assert view.locator(".opd-legend").text_content().startswith("all covered")
    view.locator(".opd-strip").press("]")
    assert view.locator("output").text_content() == "3"
    axe(view)
