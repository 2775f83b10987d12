"""Timeline in a real browser: lines answer the pointer and keys, the threshold moves the forks, strips follow."""

from __future__ import annotations

import numpy as np
import pytest
from viz.traces import made, several

from opdlab.viz import Timeline, TokenLens, page

pytestmark = pytest.mark.browser
WORDS = [b"a", b" b", b" c", b" d", b" e", b" f"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lines_forks_and_strips(open_page, tmp_path, axe, scheme):
    gaps = [[-1, -1, -1, -1, 0, 0], [0, 0, 0, -5, 0, 0], [1, 1, 1, 1, 1, 1]]
    made_each = [made(WORDS).with_columns(student_logp=np.zeros(6), teacher_logp=np.array(g, float)) for g in gaps]
    trace = several(*made_each)
    line = Timeline(trace, rewards=[1, 0, 1])
    view = open_page(page(tmp_path / "t.html", title="t", lenses=[("", line), ("", TokenLens(trace, 1))]), color_scheme=scheme)
    root, told = view.locator(".opd-timeline.opd"), view.locator(".opd-timeline-told")
    buttons = view.locator(".opd-timeline-list .opd-button")
    assert [t.split("tokens")[1] for t in buttons.all_text_contents()] == ["fork at 2 ·c", "fork at 3 ·d", "no fork"]
    assert "rollout 0" in told.text_content()
    field = view.get_by_label("Threshold of a fork")
    field.fill("4")
    field.press("Enter")
    assert [t.split("tokens")[1] for t in buttons.all_text_contents()] == ["fork at 3 ·d", "fork at 3 ·d", "no fork"]
    assert root.locator(".opd-timeline-fork:visible").count() == 4  # two in each plot

    area = view.get_by_role("slider").first
    box = area.bounding_box()
    at = lambda i, y: (box["x"] + box["width"] * i / 5, box["y"] + box["height"] * y)
    view.mouse.move(*at(4, 0.02))  # the highest line is the third
    assert "rollout 2" in told.text_content()
    assert "log ratio so far +5" in told.text_content()
    view.mouse.click(*at(5, 1))  # the lowest the second
    assert root.locator(".opd-timeline-text [aria-selected='true']").text_content() == " f"
    assert view.locator(".opd-lens [aria-selected='true']").get_attribute("data-i") == "5"  # the lens of that completion follows
    view.mouse.move(*at(5, 1))
    view.mouse.down()
    view.mouse.move(*at(4, 1))
    view.mouse.move(*at(2, 1))
    view.mouse.up()
    brushed = view.locator(".opd-lens .opd-brushed")
    assert brushed.count() == root.locator(".opd-timeline-text .opd-brushed").count() == 4
    area.focus()
    area.press("Home")
    area.press("ArrowRight")
    area.press("ArrowDown")
    assert "position 1" in area.get_attribute("aria-valuetext")
    area.press("Escape")
    assert brushed.count() == 0
    axe(view)
