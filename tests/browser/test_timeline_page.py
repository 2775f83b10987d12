"""Timeline in a real browser: lines answer the pointer and keys, the threshold moves the forks,
strips follow.
"""

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
    made_each = [
        made(WORDS).with_columns(student_logp=np.zeros(6), teacher_logp=np.array(g, float))
        for g in gaps
    ]
    trace = several(*made_each)
    line = Timeline(trace, rewards=[1, 0, 1])
    view = open_page(
        page(tmp_path / "t.html", title="t", lenses=[("", line), ("", TokenLens(trace, 1))]),
        color_scheme=scheme,
    )
    root, told = view.locator(".opd-timeline.opd"), view.locator(".opd-timeline-told")
    buttons = view.locator(".opd-timeline-list .opd-button")
    assert [t.split("tokens")[1] for t in buttons.all_text_contents()] == [
        "fork at 2 ·c",
        "fork at 3 ·d",
        "no fork",
    ]
    assert "rollout 0" in told.text_content()
    field = view.get_by_label("Threshold of a fork")
    field.fill("4")
    field.press("Enter")
    assert [t.split("tokens")[1] for t in buttons.all_text_contents()] == [
        "fork at 3 ·d",
        "fork at 3 ·d",
        "no fork",
    ]
    assert root.locator(".opd-timeline-fork:visible").count() == 4  # two in each plot

    area = view.get_by_role("slider").first
    box = area.bounding_box()
    at = lambda i, y: (box["x"] + box["width"] * i / 5, box["y"] + box["height"] * y)
    view.mouse.move(*at(4, 0.02))  # the highest line is the third
    assert "rollout 2" in told.text_content()
    assert "log ratio so far +5" in told.text_content()
    view.mouse.click(*at(5, 1))  # the lowest the second
    assert root.locator(".opd-timeline-text [aria-selected='true']").text_content() == " f"
    assert (
        view.locator(".opd-lens [aria-selected='true']").get_attribute("data-i") == "5"
    )  # the lens of that completion follows
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


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 480)])
def test_many_rollouts_have_a_plot_each(open_page, tmp_path, axe, scheme, width):
    falls = [
        made(WORDS).with_columns(student_logp=np.zeros(6), teacher_logp=np.full(6, -0.25 * i))
        for i in range(8)
    ]
    path = page(
        tmp_path / "t.html", title="t", lenses=[("", Timeline(several(*falls), rewards=[0, 1] * 4))]
    )
    view = open_page(path, color_scheme=scheme, viewport={"width": width, "height": 900})
    own, told = view.locator(".opd-timeline-own > .opd-plot"), view.locator(".opd-timeline-told")
    captions = [
        [*map(str.strip, text.split("6 tokens"))]
        for text in own.locator("figcaption").all_text_contents()
    ]
    assert captions[4:7] == [
        ["rollout 4reward 0", "fork at 2 ·c"],
        ["rollout 5reward 1", "fork at 2 ·c"],
        ["rollout 6reward 0", "fork at 1 ·b"],
    ]
    assert (
        "rollout 2" in told.text_content()
    )  # the first one that forks, at its last token: 6 · 0.5 = 3 nats
    assert [plot.locator(".opd-l").count() for plot in own.all()] == [1] * 8
    assert view.locator(".opd-plot").count() == 9  # and that of the KL, of all
    assert own.locator(".opd-timeline-fork:visible").count() == 6
    assert (
        own.locator(".opd-timeline-dot:visible").count()
        == own.locator(".opd-lp-now[d^=M]").count()
        == 1
    )
    ends = [
        (y, plot.locator(".opd-lp-x").all_text_contents())
        for plot in own.all()
        for y in [plot.locator(".opd-lp-y").all_text_contents()]
    ]
    assert ends == [(["0", "−10.5"], ["0", "5"])] * 8  # one scale
    lines = {plot.bounding_box()["x"] for plot in own.all()}
    assert len(lines) == (2 if width == 480 else 4)
    assert view.evaluate("document.documentElement.scrollWidth") <= width

    own.nth(5).get_by_role("button").click()
    assert told.text_content().startswith("rollout 5·cposition 2")
    reached = own.get_by_role("slider").and_(view.locator("[tabindex='0']"))
    assert reached.count() == 1  # of eight plots Tab goes to one
    view.keyboard.press("Tab")
    view.keyboard.press("ArrowDown")
    view.keyboard.press("ArrowRight")
    focused = view.evaluate(
        "[...document.querySelectorAll('.opd-timeline-own > .opd-plot')].findIndex((p) =>"
        " p.contains(document.activeElement) )"
    )
    assert focused == 6
    assert reached.get_attribute("aria-valuetext").startswith("rollout 6, position 3, ·d")
    box = own.nth(7).get_by_role("slider").bounding_box()
    at = lambda i: (box["x"] + box["width"] * i / 5, box["y"] + 1)
    view.mouse.move(*at(1))  # above the line, in the plot of its own
    assert told.text_content().startswith("rollout 7·bposition 1")
    view.mouse.down()
    view.mouse.move(*at(3))
    view.mouse.up()
    assert own.locator(".opd-timeline-band:visible").count() == 1
    assert (
        view.locator(".opd-timeline-text .opd-brushed").count() == 0
    )  # of rollout 7, while rollout 6 is looked at
    own.nth(7).get_by_role("button").click()
    assert view.locator(".opd-timeline-text .opd-brushed").all_text_contents() == [" b", " c", " d"]
    axe(view)


def test_the_turns_of_a_conversation_have_their_sums(open_page, tmp_path, axe):
    learn, turn = [True, True, False, False, True, True], [0, 0, 0, 0, 1, 1]
    gaps = np.array([-1, -1, -9, -9, 0.25, 0.5])
    trace = made(WORDS).with_columns(
        student_logp=np.zeros(6), teacher_logp=gaps, learn=np.array(learn), turn=np.array(turn)
    )
    line = Timeline(trace)
    (first, second) = line.data()["turns"]
    assert (first["first"], first["tokens"], first["log_ratio"]) == (0, 2, -2)
    assert (second["first"], second["tokens"], second["log_ratio"]) == (4, 2, 0.75)
    view = open_page(page(tmp_path / "t.html", title="t", lenses=[("", line)]))
    turns = view.get_by_role("group", name="Turns").get_by_role("button")
    told = turns.all_text_contents()
    assert [text.split("tokens")[0] for text in told] == ["turn 12 ", "turn 22 "]
    assert "log ratio +0.75" in told[1]
    turns.nth(1).click()
    assert "position 4" in view.locator(".opd-timeline-told").text_content()
    assert turns.nth(1).get_attribute("aria-pressed") == "true"
    assert turns.nth(0).get_attribute("aria-pressed") == "false"
    axe(view)
