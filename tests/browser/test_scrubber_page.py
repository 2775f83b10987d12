"""The scrubber in a real browser: steps by slider, key and button; what each step shows; words that
changed.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from viz.traces import NASTY, made

from opdlab.viz import Scrubber, page
from opdlab.viz.markup import format_number

pytestmark = pytest.mark.browser
TOKENS = [b"The", b" cat", b" sat", b"."]
GAP = np.array([4.0, -2.0, 1.0, 0.0])


def views() -> tuple[Scrubber, Scrubber]:
    base = made([*TOKENS, *(text.encode() for text in NASTY)])
    gap = np.resize(GAP, len(base))
    move = lambda k: base.with_columns(
        teacher_logp=np.full(len(base), -0.5), student_logp=-0.5 - gap / (1 + k)
    )
    history = pd.DataFrame(
        {
            "step": range(1, 21),
            "reverse_kl": np.linspace(2, 1, 20),
            "accuracy": [np.nan] * 19 + [0.75],
        }
    )
    texts = {
        0: [b"a", b" b", b" c"],
        10: [b"a", b" x", b" c"],
        20: [b"a", b" x", b" c", *(text.encode() for text in NASTY)],
    }
    live = {step: made(pieces, prompt=NASTY[2], seed=step) for step, pieces in texts.items()}
    return Scrubber({10 * k: move(k) for k in range(3)}, history, title=NASTY[0]), Scrubber(live)


def test_every_step_is_shown_and_reached_by_slider_keys_and_buttons(open_page, tmp_path, axe):
    probe = views()[0]
    view = open_page(probe.to_html(tmp_path / "p.html"), reduced_motion="no-preference")
    first = view.locator(".opd-scrubber")
    at, tints = (
        first.locator(".opd-at"),
        lambda: first.locator("[data-i] > .opd-ink").evaluate_all(
            "n => n.slice(0, 4).map((x) => x.className)"
        ),
    )
    steps, sides = (
        [],
        lambda: [
            next((s for s in ("student", "teacher", "amount") if f"opd-{s}" in look), "")
            for look in tints()
        ],
    )
    first.locator("[data-i='1']").click()
    for k in range(3):
        first.get_by_role("slider").fill(str(k))
        steps.append((at.text_content(), tints()))
        assert sides() == ["teacher", "student", "teacher", ""]
        p = np.round(255 * np.exp(-0.5 + 2 / (1 + k))) / 255
        shown = ">99.8" if p >= 1 else f"{100 * p:.0f}"  # the page knows probabilities in 255ths
        assert f"student{shown} %" in first.locator(".opd-wish").text_content()
        told = first.locator(".opd-kpis figcaption .opd-soft").all_text_contents()
        want = float(probe.table["reverse_kl"][k])
        assert abs(float(told[0].split()[0]) - want) < 2e-3 * want
        assert told[1].startswith(
            format_number(float(probe.history["reverse_kl"][10 * k - 1])) if k else "–"
        )
    assert [s for s, _ in steps] == ["step 0 of 20", "step 10 of 20", "step 20 of 20"]
    assert len({tuple(look) for _, look in steps}) == 3
    strip = first.locator(".opd-strip")
    strip.focus()
    strip.press("[")
    strip.press("[")
    strip.press("[")
    assert at.text_content() == "step 0 of 20"
    strip.press("]")
    assert (at.text_content(), tints()) == steps[1]
    first.get_by_role("slider").press("]")
    assert at.text_content() == "step 20 of 20"

    first.get_by_role("button", name="Δ from step 0").click()
    assert sides() == ["teacher", "teacher", "teacher", ""]  # the three that moved came nearer
    assert "nearer to the teacher" in first.locator(".opd-legend").text_content()
    first.get_by_role("slider").fill("0")
    assert sides() == ["", "", "", ""]
    first.get_by_role("button", name="▶ play").click()
    first.locator(".opd-at", has_text="step 20 of 20").wait_for(timeout=120_000)
    first.get_by_role("button", name="▶ play").wait_for()  # it stops by itself


def test_small_probabilities_are_seen_and_not_called_nothing(open_page, tmp_path):
    base = made(TOKENS)
    move = lambda k: base.with_columns(
        teacher_logp=np.log([0.05] * 4), student_logp=np.log([0.08 / 10**k] * 4)
    )
    view = open_page(Scrubber({k: move(k) for k in range(3)}).to_html(tmp_path / "p.html"))
    view.locator("[data-i='1']").click()
    said = []
    for k in range(3):
        view.get_by_role("slider").fill(str(k))
        said.append(view.locator(".opd-wish .opd-value").all_text_contents())
    assert [student for student, _ in said] == ["7.8 %", "0.8 %", "<0.2 %"]
    assert {teacher for _, teacher in said} == {"5.1 %"}
    assert view.locator(".opd-fate .opd-lp-y").all_text_contents() == ["0.1", "0"]


def test_texts_of_each_step_are_shown_with_the_words_that_changed(open_page, tmp_path, axe):
    live = views()[1]
    view = open_page(live.to_html(tmp_path / "p.html"))
    second = view.locator(".opd-scrubber")
    words = lambda: [
        (n.evaluate("n => n.localName"), n.text_content())
        for n in second.locator(".opd-diff > *").all()
    ]
    text = second.locator(".opd-strip [data-i]").evaluate_all(
        "nodes => nodes.map((n) => n.textContent).join('')"
    )
    assert text.replace("\0", "") == b"".join(live.traces[2].tokens()).decode().replace("\0", "")
    assert words()[0] == ("span", "a x")
    second.get_by_role("slider").press("[")
    assert words() == [("span", "a"), ("del", "b"), ("ins", "x"), ("span", " c")]
    assert second.locator(".opd-diff").text_content() == "a b x c"
    second.locator("[data-i='4']").click()  # the second token of the second text
    assert second.locator("[aria-selected='true']").count() == 1
    second.get_by_role("button", name="first step").click()
    second.get_by_role("slider").press("[")
    assert second.locator(".opd-diff-bar").text_content().endswith("the first step")
    assert second.locator(".opd-strip").get_attribute("data-finish") == "stop"
    assert view.evaluate("window.broken") is None
    names = set(
        view.evaluate("[...document.querySelectorAll('.opd-scrubber *')].map((n) => n.localName)")
    )
    assert names <= {
        "div",
        "span",
        "button",
        "input",
        "figure",
        "figcaption",
        "b",
        "svg",
        "path",
        "ins",
        "del",
        "script",
    }
    axe(view)


def test_a_calm_narrow_dark_page_has_no_play_and_fits(open_page, tmp_path, axe):
    view = open_page(
        page(tmp_path / "p.html", title="t", lenses=[("", v) for v in views()]),
        color_scheme="dark",
        reduced_motion="reduce",
        viewport={"width": 480, "height": 900},
    )
    assert view.get_by_role("button", name="play").count() == 0
    assert view.evaluate("document.documentElement.scrollWidth") <= 480
    axe(view)
