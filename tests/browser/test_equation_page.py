"""Equation in a real browser: the numbers in the formula are those of the chosen token."""

from __future__ import annotations

import pytest
from viz.traces import NASTY, made

import opdlab as opd
from opdlab.audit.what_if import what_if
from opdlab.viz import Equation

pytestmark = pytest.mark.browser
WORDS = [*map(str.encode, NASTY[:8]), b" a", b" b"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_formula_is_filled_in(open_page, tmp_path, axe, scheme):
    method = opd.OPD(estimator="sampled")
    trace = made(WORDS, top=len(WORDS) + 6)
    gap = trace.column("teacher_logp") - trace.column("student_logp")
    trace = trace.with_columns(advantage=gap, sampler_logp=trace.column("student_logp"))
    trace.meta["plan"] = ["advantage", "sampler_logp"]
    view = Equation(what_if(trace, method), method=method, title=NASTY[0])
    page = open_page(
        view.to_html(tmp_path / "e.html"),
        color_scheme=scheme,
        viewport={"width": 480, "height": 900},
    )
    maths = page.locator(".opd-math")
    assert maths.nth(0).text_content() == "−advantage · exp(student_logp − sampler_logp)"
    strip = page.locator(".opd-strip")
    strip.focus()
    strip.press("Home")
    for row in (0, 1):
        filled = maths.nth(1).text_content()
        assert f"{gap[row]:.3g}".replace("-", "−") in filled
        assert maths.nth(2).text_content().endswith("as recorded")
        sampled = page.locator(".opd-slope[data-sampled] .opd-value").all_text_contents()
        after = view.trace.column("logp_gradient")[row, 0]
        assert float(sampled[1].replace("−", "-")) == pytest.approx(after, rel=6e-3)
        strip.press("ArrowRight")
    assert page.evaluate("window.broken") is None
    axe(page)


def test_terms_of_a_sum_are_written_out(open_page, tmp_path):
    method = opd.OPD()
    trace = what_if(made(WORDS, top=len(WORDS) + 6), method)
    view = Equation(trace, method=method)
    page = open_page(view.to_html(tmp_path / "e.html"))
    maths = page.locator(".opd-math")
    assert maths.nth(0).text_content() == "Σ [student · log(student / teacher)]"
    filled = maths.nth(1).text_content()
    assert filled.count("log(") == 3
    assert filled.endswith("+ …]")
    assert "as recorded" in maths.nth(2).text_content()
