"""Compare in a real browser: strips that move together, the pair that is subtracted, what changed
most.
"""

from __future__ import annotations

import numpy as np
import pytest
from viz.traces import made

from opdlab.viz import Compare
from opdlab.viz.markup import format_number

pytestmark = pytest.mark.browser
WORDS = [b"The", b" cat", b" sat", b" on", b" the", b" mat"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_strips_pairs_and_changes(open_page, tmp_path, axe, scheme):
    traces = {
        name: made(WORDS, seed=i, prompt="Where?")
        for i, name in enumerate(("early", "late", "<b>last</b>"))
    }
    compared = Compare(traces, title="Three checkpoints")
    view = open_page(compared.to_html(tmp_path / "c.html"), color_scheme=scheme)
    strips, numbers = view.locator(".opd-strip").all(), view.locator(".opd-versus-number")
    shown = lambda: [float(t.replace("−", "-")) for t in numbers.all_text_contents()]
    row = lambda i: compared.df.iloc[i][[*compared.names, "difference"]].astype(float).tolist()
    assert len(strips) == 4
    np.testing.assert_allclose(shown(), row(compared.selected), rtol=6e-3, atol=6e-4)
    strips[1].locator("[data-i='3']").hover()
    np.testing.assert_allclose(shown(), row(3), rtol=6e-3, atol=6e-4)
    strips[3].locator("[data-i='4']").click()
    assert [s.locator("[aria-selected='true']").get_attribute("data-i") for s in strips] == [
        "4"
    ] * 4

    changed = view.locator(".opd-changed .opd-word")
    assert changed.all_text_contents() == list(compared.changed["token"])
    rest = compared.df["difference"].abs().drop(compared.changed.index).max()
    last = view.locator(".opd-changed > li").last.text_content()
    assert (
        last == f"all others by at most {format_number(float(rest))}"
        if len(compared.changed) < len(WORDS)
        else "→" in last
    )
    view.get_by_label("minuend").select_option("2")
    compared.pair = [2, 0]
    assert changed.all_text_contents() == list(compared.changed["token"])
    assert view.locator(".opd-versus .opd-more").text_content() == "<b>last</b> higher"
    view.locator(".opd-changed .opd-button").first.click()
    assert strips[0].locator("[aria-selected='true']").get_attribute("data-i") == str(
        compared.changed.index[0]
    )
    cells = view.locator(".opd-rho td").all_text_contents()
    assert cells[0] == ""
    found = [float(c.replace("−", "-")) for c in cells if c]
    np.testing.assert_allclose(found, compared.correlation.to_numpy().ravel(), atol=2e-3)

    strips[2].press("2")
    compared.channel = "reverse_kl"
    view.mouse.move(2, 2)
    chosen = int(strips[0].locator("[aria-selected='true']").get_attribute("data-i"))
    np.testing.assert_allclose(shown(), row(chosen), rtol=6e-3, atol=6e-4)
    assert view.locator("[aria-pressed='true']").text_content() == "reverse KL"
    axe(view)


def test_many_traces_fit_a_narrow_page(open_page, tmp_path):
    compared = Compare({f"told something long, number {i}": made(WORDS, seed=i) for i in range(6)})
    view = open_page(compared.to_html(tmp_path / "c.html"), viewport={"width": 480, "height": 900})
    right = "(node) => node.getBoundingClientRect().right"
    assert view.locator(".opd-rho").evaluate(right) <= view.locator(".opd-versus-panel").evaluate(
        right
    )
    assert (
        view.get_by_role("columnheader", name="told something long, number 5").text_content() == "6"
    )
