"""The fork explorer in a real browser: what is shown at a token, what the threshold says, and that
nothing foreign runs.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
from viz.traces import NASTY, made, with_notes

from opdlab.data.notes import Windows
from opdlab.viz import Forks, TokenLens, page
from opdlab.viz.glyphs import show_piece

pytestmark = pytest.mark.browser
WORDS = [*map(str.encode, NASTY), *(f" w{i}".encode() for i in range(20))]


@pytest.fixture(scope="module")
def forks() -> Forks:
    trace = made(WORDS, prompt=NASTY[0])
    note = lambda at, other, distance: {
        "sample": 0,
        "position": at,
        "student": [at, at + 1, at + 2],
        "teacher": [at, other, at + 2],
        "distance": distance,
        "kept": distance > 0.2,
        "plan": [[0.3333, 0, 0], [0, 0.3333, 0], [0, 0, 0.3333]],
    }
    found = [note(0, 3, 0.4), note(5, 6, 0.0), note(9, 2, 0.15), note(30, 31, 0.8)]
    del found[3]["plan"]
    noted = with_notes(trace, windows=Windows(found, threshold=0.2))
    return Forks(noted, title=NASTY[2])


def test_windows_plan_and_threshold(open_page, tmp_path, forks, axe):
    path = page(tmp_path / "p.html", title="p", lenses=[("", forks), ("", TokenLens(forks.trace))])
    view = open_page(path, viewport={"width": 1000, "height": 1200})
    verdict, root = view.locator(".opd-verdict"), view.locator(".opd-forks")
    assert verdict.text_content() == "◆ real fork: distance 0.8 > 0.2"
    assert "kept no plan" in view.locator(".opd-plan-box").text_content()
    marks = root.locator("[data-fork]").evaluate_all(
        "nodes => nodes.map((n) => [Number(n.dataset.i), n.dataset.fork])"
    )
    assert marks == [[0, "◆"], [5, "◇"], [9, "◇"], [30, "◆"]]
    strip = root.locator(".opd-strip")
    assert (
        strip.evaluate("node => [...node.children].map((n) => n.textContent).join('')")
        == b"".join(WORDS).decode()
    )

    view.locator(".opd-lens [data-i='9']").click()  # a linked view chooses
    chips = [
        row.locator(".opd-chip-word").all_text_contents()
        for row in root.locator(".opd-window-row").all()
    ]
    names = {i: show_piece(WORDS[i]) for i in (2, 9, 10, 11)}
    assert chips == [[names[9], names[10], names[11]], [names[9], names[2], names[11]]]
    assert root.locator(".opd-differs").all_text_contents() == [names[10], names[2]]
    assert root.locator(".opd-mass").count() == 3
    assert root.locator(".opd-mass.opd-same").count() == 2
    assert (
        root.locator(".opd-mass title").first.text_content() == f"{names[9]} to {names[9]}: 33.3 %"
    )
    assert verdict.text_content() == "◇ false alarm: distance 0.15 ≤ 0.2"

    handle = root.locator(".opd-line-handle")
    handle.focus()
    for _ in range(10):
        handle.press("ArrowLeft")
    assert verdict.text_content().startswith("◆ real fork: distance 0.15 > 0.1")
    assert root.locator(".opd-dot-mark.opd-solid").count() == 3
    assert "3 real forks" in root.locator(".opd-key-line").text_content()
    box = handle.bounding_box()
    view.mouse.move(box["x"] + 6, box["y"] + 30)
    view.mouse.down()
    view.mouse.move(box["x"] + 700, box["y"] + 30, steps=4)
    view.mouse.up()
    assert verdict.text_content().startswith("◇ false alarm")
    assert root.locator(".opd-dot-mark.opd-solid").count() == 1

    strip.press("n")
    assert root.locator("[aria-selected='true']").get_attribute("data-i") == "30"
    strip.press("ArrowLeft")
    assert verdict.text_content() == "no windows from here"
    root.get_by_role("button", name="Next fork").click()
    assert root.locator("[aria-selected='true']").get_attribute("data-i") == "30"
    root.locator(".opd-dot-mark[data-row='5']").dispatch_event("click")
    assert root.locator("[aria-selected='true']").get_attribute("data-i") == "5"
    assert view.evaluate("window.broken") is None
    axe(view, ".opd-forks")


@pytest.mark.parametrize("width", [480, 1000])
def test_counts_of_crowded_distances_keep_clear_of_the_line_and_of_each_other(
    open_page, tmp_path, width
):
    trace, places = made(WORDS), range(len(WORDS))
    distances = [0.0] * 12 + [0.4] * 8 + [0.404] * 9 + [0.8] * (len(WORDS) - 29)
    found = [
        {"sample": 0, "position": i, "student": [i], "teacher": [i], "distance": distances[i]}
        for i in places
    ]
    view = open_page(
        Forks(with_notes(trace, windows=Windows(found))).to_html(tmp_path / "f.html"),
        viewport={"width": width, "height": 900},
    )
    counts = view.locator(".opd-dots-more")
    assert sum(int(n) for n in counts.all_text_contents()) == len(WORDS) - view.locator(
        ".opd-dot-mark"
    ).evaluate_all("nodes => new Set(nodes.map((n) => n.getAttribute('transform'))).size")
    handle = view.locator(".opd-line-handle")
    for _ in range(2):  # at 0, and on the crowd in the middle
        boxes = counts.evaluate_all(
            "nodes => nodes.map((n) => n.getBoundingClientRect()).map(({ left, right, top }) =>"
            " [left, right, top])"
        )
        line = handle.bounding_box()
        middle, low = (
            line["x"] + line["width"] / 2,
            line["y"] - 12 + 17,
        )  # where the sign over the line ends
        assert all(top >= low for _, _, top in boxes)
        assert not [1 for left, right, _ in boxes if left < middle < right]
        assert all(a[1] < b[0] for a, b in pairwise(sorted(boxes)))
        while float(handle.get_attribute("aria-valuenow")) < 0.4:
            handle.press("PageUp")


def test_it_fits_and_reads_in_the_dark(open_page, tmp_path, forks, axe):
    path = forks.to_html(tmp_path / "d.html")
    view = open_page(path, viewport={"width": 480, "height": 900}, color_scheme="dark")
    view.locator("[data-i='0']").click()
    assert view.locator(".opd-mass").count() == 3
    assert view.evaluate("document.documentElement.scrollWidth") <= 480
    axe(view)
    still = open_page(path, java_script_enabled=False)
    assert "2 real forks, 2 false alarms" in still.locator(".opd-bar").text_content()
