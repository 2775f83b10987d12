"""The board in a real browser."""

from __future__ import annotations

import pandas as pd
import pytest
from viz.test_run_board import troubled
from viz.traces import NASTY, made, several

from opdlab.viz import RunBoard, page

pytestmark = pytest.mark.browser

PATHS = "nodes => nodes.map((n) => n.getAttribute('d'))"


def boards() -> tuple[RunBoard, RunBoard]:
    return RunBoard(troubled(), title="<i>x</i>"), RunBoard(
        {"<b>one</b>": troubled(), "two": troubled(30).assign(loss=5.0)}
    )


def test_the_page_draws_what_python_draws_and_reads_it_at_any_step(open_page, tmp_path, axe):
    one, two = boards()
    view = open_page(page(tmp_path / "p.html", title="t", lenses=[("", one), ("", two)]))
    still = open_page(one.to_html(tmp_path / "q.html"), java_script_enabled=False)
    first, second = view.locator(".opd-board").all()
    drawn, want = (
        p.locator(".opd-board >> nth=0 >> .opd-l").evaluate_all(PATHS) for p in (view, still)
    )
    assert len(drawn) == len(want)
    for a, b in zip(
        drawn, want, strict=True
    ):  # the page has single precision, so the last digit may differ
        numbers = [
            [float(x) for x in d.replace("M", " ").replace("L", " ").replace("h0", "").split()]
            for d in (a, b)
        ]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.02)
    assert first.locator(".opd-lp-flag").all_text_contents() == ["1", "3", "2"]
    assert "entropy collapse" in first.locator(".opd-alarms li").first.text_content()
    first.get_by_role("slider").fill("20")
    told = dict(
        zip(
            first.locator("figcaption b").all_text_contents(),
            first.locator("figcaption .opd-soft").all_text_contents(),
            strict=True,
        )
    )
    assert told["accuracy, held out"] == "0.9"
    assert told["student entropy, nats"] == "1"
    first.locator("figure:has-text('length') .opd-lp-area").hover(position={"x": 2, "y": 10})
    assert first.locator(".opd-at").text_content() in ("step 1", "step 2")
    assert second.get_by_role("button").all_text_contents() == ["<b>one</b>", "two"]
    lines = second.locator(".opd-l").count()
    second.get_by_role("button", name="two").click()
    assert second.get_by_role("button", name="two").get_attribute("aria-pressed") == "false"
    assert 0 < second.locator(".opd-l").count() < lines
    axe(view)


def test_dark_and_narrow_it_fits(open_page, tmp_path, axe):
    lenses = [("", board) for board in (*boards(), RunBoard(pd.DataFrame()))]
    view = open_page(
        page(tmp_path / "p.html", title="t", lenses=lenses),
        color_scheme="dark",
        viewport={"width": 480, "height": 900},
    )
    assert view.evaluate("document.documentElement.scrollWidth") <= 480
    axe(view)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_click_on_a_step_opens_its_rollouts(open_page, tmp_path, axe, scheme):
    words = [*map(str.encode, NASTY[:5]), b" a"]
    kept = {
        step: several(*[made(words, seed=step + i, prompt=NASTY[0]) for i in range(2)])
        for step in (1, 20)
    }
    board = RunBoard(troubled(), title=NASTY[2], traces=kept)
    view = open_page(
        board.to_html(tmp_path / "p.html"),
        color_scheme=scheme,
        viewport={"width": 480, "height": 1400},
    )
    lines = view.locator(".opd-kept-line")
    assert lines.count() == 0
    area = view.locator(".opd-lp-area").first
    box = area.bounding_box()
    area.click(position={"x": 0.6 * box["width"], "y": 20})
    assert view.get_by_role("button", name="20", exact=True).get_attribute("aria-pressed") == "true"
    assert lines.count() == 2
    lines.nth(1).click()
    strip = view.locator(".opd-kept-strip .opd-strip")
    assert strip.locator("[role=option]").count() == len(words)
    strip.press("End")
    ratio = kept[20].column("teacher_logp") - kept[20].column("student_logp")
    told = view.locator(".opd-kept-told").text_content()
    assert f"{abs(ratio[-1]):.3g}"[:3] in told
    slider = view.get_by_role("slider")
    slider.press("Home")
    slider.press("Enter")
    assert view.get_by_role("button", name="1", exact=True).get_attribute("aria-pressed") == "true"
    assert strip.count() == 0
    assert view.evaluate("window.broken") is None
    axe(view)
