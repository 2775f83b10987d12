"""Rollouts in a real browser: only rows in sight exist; sorting, filtering, choosing; the strip
below.
"""

from __future__ import annotations

import numpy as np
import pytest
from viz.traces import made, several

from opdlab.viz import Rollouts, TokenLens, page

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_sort_filter_choose(open_page, tmp_path, axe, scheme):
    rng, words = np.random.default_rng(0), [b"a", b" b", b" c", b" d", b" e"]
    traces = []
    for i in range(300):
        gap = rng.normal(size=5)
        trace = made(words, prompt=f"Question {i}?", finish="length" if i % 3 == 0 else "stop")
        traces.append(
            trace.with_columns(
                student_logp=np.zeros(5), teacher_logp=gap, teacher_reverse_kl=abs(gap)
            )
        )
    trace = several(*traces)
    whole = Rollouts(trace, rewards=[i % 2 for i in range(300)])
    view = open_page(
        page(tmp_path / "r.html", title="t", lenses=[("", whole), ("", TokenLens(trace, 7))]),
        color_scheme=scheme,
    )
    grid, rows = view.get_by_role("grid"), view.locator(".opd-grid-room > .opd-grid-row")
    first = lambda: int(rows.first.locator(".opd-grid-cell").first.text_content())
    chosen = lambda: int(
        view.locator(".opd-grid-room [aria-selected='true'] .opd-grid-cell").first.text_content()
    )
    assert rows.count() < 30
    by_kl = whole.table.sort_values("reverse_kl", ascending=False, kind="stable").index
    assert first() == chosen() == whole.rollout == by_kl[0]
    assert view.locator("[aria-sort='descending']").text_content() == "mean KL"

    view.get_by_role("button", name="mean log ratio").click()
    assert first() == whole.table["log_ratio"].idxmax()
    view.get_by_role("button", name="mean log ratio").click()
    assert first() == whole.table["log_ratio"].idxmin()

    grid.focus()
    grid.press("End")
    assert chosen() == whole.table["log_ratio"].idxmax()
    assert view.locator(".opd-rollouts-text .opd-prompt").text_content() == f"Question {chosen()}?"
    assert view.locator(".opd-rollouts-text .opd-strip").text_content() == "a b c d e"
    assert view.locator(f"#{grid.get_attribute('aria-activedescendant')}").is_visible()

    view.get_by_label("Filter prompts").fill("question 29")
    assert view.locator(".opd-rollouts-bar [role=status]").text_content() == "11 of 300 rollouts"
    view.get_by_label("Finish").select_option("length")
    assert view.locator(".opd-rollouts-bar [role=status]").text_content() == "3 of 300 rollouts"
    assert rows.count() == 3
    rows.nth(1).click()
    view.locator(".opd-rollouts-text [data-i]").nth(2).hover()
    gap = trace.sample(chosen()).column("teacher_logp")[2]
    assert (
        f"log ratio {gap:+.3g} nats".replace("-", "−")
        in view.locator(".opd-timeline-told").text_content()
    )

    view.locator(
        ".opd-lens [data-i='3']"
    ).click()  # a lens of another rollout on the page opens it here
    assert view.locator(".opd-rollouts-text .opd-prompt").text_content() == "Question 7?"
    assert view.locator(".opd-rollouts-text [aria-selected='true']").text_content() == " d"
    axe(view, ".opd-rollouts")


@pytest.mark.parametrize("width", [480, 900])
def test_no_heading_is_cut_and_nothing_scrolls_sideways(open_page, tmp_path, width):
    text = [
        b"It begins like this",
        b" and goes on for quite a while",
        b" until it ends with",
        b" forty-two.",
    ]
    view = Rollouts(
        several(*[made(text, prompt=f"How long is text {i}?") for i in range(3)]), rewards=[1, 0, 1]
    )
    tab = open_page(view.to_html(tmp_path / "r.html"), viewport={"width": width, "height": 900})
    heads = tab.locator(".opd-grid-head > .opd-grid-cell:visible")
    names = [name.strip() for name in heads.all_text_contents()]
    assert {"prompt", "…text", "reward", "mean KL", "log ratio"} <= set(names)
    assert ("mean log ratio" in names) == (width == 900)
    for each in tab.locator(
        ".opd-grid-head button:visible"
    ).all():  # sorted by each, so that each has its arrow
        each.click()
        assert (
            heads.evaluate_all(
                "nodes => nodes.filter((n) => n.scrollWidth > n.clientWidth).map((n) =>"
                " n.textContent)"
            )
            == []
        )
    assert tab.locator(".opd-grid").evaluate("node => node.scrollWidth <= node.clientWidth")
    assert tab.locator(".opd-grid-body").evaluate("node => node.clientHeight") == 3 * 30
    end = tab.locator(".opd-grid-end").first  # cut at its beginning, not at its end
    assert end.evaluate("""(node) => {
      const cell = node.getBoundingClientRect(), text = node.firstChild.getBoundingClientRect();
      return text.left < cell.left && Math.abs(text.right - cell.right) < 2;
    }""")
