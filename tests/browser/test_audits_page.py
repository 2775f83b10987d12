"""The audit view in a real browser: chunks, the teacher's texts and the weights are those of the
notes.
"""

from __future__ import annotations

import numpy as np
import pytest
from viz.traces import NASTY, made, with_notes

from opdlab.data.notes import Chunks
from opdlab.viz import Audits, TokenLens, page

pytestmark = pytest.mark.browser
WORDS = [*map(str.encode, NASTY), *(f" w{i}".encode() for i in range(20))]


@pytest.fixture(scope="module")
def audits() -> Audits:
    n, at = len(WORDS), np.arange(len(WORDS))
    trace = made(
        WORDS,
        ("student", "reference"),
        prompt=NASTY[0],
        plan={"weight": at / n, "similarity": at / n},
    )
    text = lambda first: b"".join(WORDS[first : first + 2]).decode()
    note = lambda first, answers, phi, prior: {
        "sample": 0,
        "start": first,
        "length": 2,
        "text": text(first),
        "continuations": answers,
        "similarity": phi,
        "prior": prior,
        "weight": (sum(phi) + prior) / (len(phi) + 1),
    }
    found = [
        note(2, [NASTY[0], text(2), NASTY[0]], [0.1, 1.0, 0.1], 0.9),
        note(24, ["", " \n", "x"], [0.0, 0.25, 0.5], 0.2),
        note(30, [text(30)] * 3, [1.0] * 3, 0.6),
    ]
    noted = with_notes(trace, chunks=Chunks(found, facts={"alpha": 1.0}))
    return Audits(noted, title=NASTY[2])


def test_chunks_texts_and_weights(open_page, tmp_path, audits, axe):
    path = page(
        tmp_path / "p.html", title="p", lenses=[("", audits), ("", TokenLens(audits.trace))]
    )
    view = open_page(path, viewport={"width": 1000, "height": 1200})
    root = view.locator(".opd-audits")
    verdict, strip, chosen = (
        root.locator(".opd-verdict"),
        root.locator(".opd-strip"),
        root.locator("[aria-selected='true']"),
    )
    values = lambda: [
        float(text) for text in root.locator(".opd-audit-sums .opd-value").all_text_contents()
    ]
    answers = root.locator(".opd-answer.opd-of-teacher")
    assert (
        strip.evaluate("node => [...node.children].map((n) => n.textContent).join('')")
        == b"".join(WORDS).decode()
    )
    assert root.locator(".opd-audited").evaluate_all(
        "nodes => nodes.map((n) => Number(n.dataset.i))"
    ) == [2, 3, 24, 25, 30, 31]
    assert (
        verdict.text_content() == "weight 0.237: the teacher writes something else"
    )  # the least weight first
    assert values() == [0.2, 0.25, 0.237]
    assert answers.locator(".opd-value").all_text_contents() == ["0.5", "0.25", "0"]
    assert answers.locator(".opd-written").all_text_contents() == ["x", " \n", ""]
    assert answers.last.locator(".opd-mark").get_attribute("data-mark") == "∅"  # of an empty answer

    view.locator(
        ".opd-lens [data-i='3']"
    ).click()  # a linked view chooses; any token of the chunk does
    assert verdict.text_content() == "weight 0.525: the teacher is of more than one mind"
    assert answers.locator(".opd-written").all_text_contents() == [
        b"".join(WORDS[2:4]).decode(),
        NASTY[0],
    ]
    assert answers.locator(".opd-times").all_text_contents() == ["", "×2"]
    assert "(1.2 + 1 · 0.9) / (3 + 1)" in root.locator(".opd-audit-sums").text_content()

    bands = root.locator(".opd-band")
    assert bands.count() == root.locator(".opd-summit").count() == 3
    bands.nth(2).click(position={"x": 3, "y": 5})
    assert chosen.get_attribute("data-i") == "30"
    assert verdict.text_content() == "weight 0.9: the teacher writes the same"
    heights = {root.locator(".opd-panel").bounding_box()["height"]}
    strip.press("ArrowLeft")
    assert verdict.text_content() == "not audited: held near the reference"
    heights.add(root.locator(".opd-panel").bounding_box()["height"])
    strip.press("n")
    assert chosen.get_attribute("data-i") == "30"
    root.get_by_role("button", name="Next chunk").click()
    assert chosen.get_attribute("data-i") == "24"  # after the largest weight the least
    root.locator(".opd-dot-mark[data-row='2']").dispatch_event("click")
    assert chosen.get_attribute("data-i") == "2"
    heights.add(root.locator(".opd-panel").bounding_box()["height"])
    assert len(heights) == 1
    assert view.evaluate("window.broken") is None
    axe(view, ".opd-audits")


def test_it_fits_and_reads_in_the_dark(open_page, tmp_path, audits, axe):
    path = audits.to_html(tmp_path / "d.html")
    view = open_page(path, viewport={"width": 480, "height": 900}, color_scheme="dark")
    assert view.locator(".opd-band").count() == 3
    assert view.evaluate("document.documentElement.scrollWidth") <= 480
    curve, box = (
        view.locator(".opd-curve svg").bounding_box(),
        view.locator(".opd-audits").bounding_box(),
    )
    assert curve["x"] + curve["width"] < box["x"] + box["width"]
    axe(view)
    still = open_page(path, java_script_enabled=False)
    assert "3 audited chunks" in still.locator(".opd-bar").text_content()
