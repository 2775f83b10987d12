"""The regimes map in a real browser: what is dragged, brushed and listed is what Python says."""

from __future__ import annotations

import numpy as np
import pytest
from viz.traces import NASTY, made

from opdlab.viz import Regimes, TokenLens, page
from opdlab.viz.regimes import QUADRANTS

pytestmark = pytest.mark.browser
WORDS = [*map(str.encode, NASTY), *(f" w{i}".encode() for i in range(60))]


@pytest.fixture(scope="module")
def regimes() -> Regimes:
    n = len(WORDS)
    trace = made(WORDS, plan={"route": np.arange(n) % 3 - 1}).with_columns(
        share=np.full(n, 1 / n), type=[NASTY[i % 3] for i in range(n)]
    )
    return Regimes(trace, title=NASTY[2])


def read(view) -> dict[str, list[float]]:
    """The table of quadrants as it reads, in percent."""
    cells = view.locator(".opd-quadrant").all()
    texts = [cell.locator(".opd-value").all_text_contents() for cell in cells]
    return dict(
        zip(QUADRANTS, [[float(t.strip("<> %")) for t in row] for row in texts], strict=True)
    )


def agrees(view, regimes) -> bool:
    want = regimes.quadrants.drop(columns="tokens")
    return all(
        abs(a - b) <= 0.06
        for name, row in read(view).items()
        for a, b in zip(row, want.loc[name], strict=True)
    )


def rows_of(lines) -> list[int]:
    return [int(r) for r in lines.evaluate_all("nodes => nodes.map((n) => n.dataset.row)")]


def test_lines_and_groups_change_the_shares(open_page, tmp_path, regimes, axe):
    view = open_page(regimes.to_html(tmp_path / "p.html"), viewport={"width": 1200, "height": 900})
    assert agrees(view, regimes)
    moved = Regimes(regimes.trace)

    handle = view.locator(".opd-handle-x")
    handle.focus()
    for _ in range(12):
        handle.press("ArrowRight")
    at = float(handle.get_attribute("aria-valuenow"))
    moved.thresholds = {**moved.thresholds, "log_ratio": at}
    assert at > 0
    assert agrees(view, moved)
    handle.press("Home")
    assert agrees(view, regimes)
    box = handle.bounding_box()
    view.mouse.move(box["x"] + 5, box["y"] + 100)
    view.mouse.down()
    view.mouse.move(box["x"] - 95, box["y"] + 130, steps=3)
    view.mouse.up()
    moved.thresholds = {
        **moved.thresholds,
        "log_ratio": float(handle.get_attribute("aria-valuenow")),
    }
    assert moved.thresholds["log_ratio"] < 0
    assert agrees(view, moved)
    handle.press("Home")

    view.locator("select[data-axis=by]").select_option("type")
    chips = view.locator(".opd-chip")
    assert (
        chips.locator("span:first-of-type").all_text_contents() == regimes.groupings["type"].names
    )
    chips.first.click()
    moved = Regimes(regimes.trace, by="type")
    moved.hidden = [moved.groupings["type"].names[0]]
    assert agrees(view, moved)
    view.locator("select[data-axis=x]").select_option("student_entropy")
    moved.x = "student_entropy"
    assert agrees(view, moved)
    assert view.evaluate("window.broken") is None
    axe(view, ".opd-regimes")


def test_a_region_lists_its_tokens_and_marks_them_in_other_views(open_page, tmp_path, regimes):
    path = page(
        tmp_path / "p.html", title="p", lenses=[("", regimes), ("", TokenLens(regimes.trace))]
    )
    view = open_page(path, viewport={"width": 1200, "height": 1400})
    plot, lens = view.locator(".opd-points"), view.locator(".opd-lens")
    lines = view.locator(".opd-kwic-line")
    assert lines.count() == 0
    frame = plot.bounding_box()
    view.mouse.move(frame["x"] + 2, frame["y"] + 2)
    view.mouse.down()
    view.mouse.move(frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] - 2, steps=3)
    view.mouse.up()
    rows = rows_of(lines)
    kl, df = regimes.trace.column("teacher_reverse_kl"), regimes.df
    assert rows == sorted(rows, key=lambda i: -kl[i])
    assert 0 < len(rows) <= 60
    assert df.x[rows].max() < df.x.max()
    plot.focus()
    plot.press("4")  # high x, low y
    rows = rows_of(lines)
    assert sorted(rows) == df.index[df.quadrant == QUADRANTS[3]].tolist()
    assert f"{len(rows)} tokens" in view.locator(".opd-kwic-head").text_content()

    chosen = lens.locator("[role=option][aria-selected='true']")
    assert (
        int(chosen.get_attribute("data-i")) == rows[0]
    )  # what is largest in the region, in the linked strip
    view.locator(".opd-kwic").press("ArrowDown")
    assert int(chosen.get_attribute("data-i")) == rows[1]
    lines.nth(2).click()
    assert int(chosen.get_attribute("data-i")) == rows[2]
    here = lines.nth(2).locator(".opd-kwic-here")
    assert here.text_content().strip() == WORDS[rows[2]].decode().strip()
    for look, part in (
        (".opd-before", WORDS[max(0, rows[2] - 8) : rows[2]]),
        (".opd-after", WORDS[rows[2] + 1 : rows[2] + 9]),
    ):
        assert lines.nth(2).locator(look).text_content().replace("∅", "") == b"".join(part).decode()
    assert lens.locator(".opd-brushed").count() > 0
    plot.press("Escape")
    assert lines.count() == 0
    assert lens.locator(".opd-brushed").count() == 0


def test_it_fits_and_reads_in_the_dark(open_page, tmp_path, regimes, axe):
    regimes.region = [-50.0, 50.0, 0.0, 2.0]
    view = open_page(
        regimes.to_html(tmp_path / "d.html"),
        viewport={"width": 480, "height": 900},
        color_scheme="dark",
    )
    assert view.locator(".opd-kwic-line").count() == 60
    assert view.evaluate("document.documentElement.scrollWidth") <= 480
    axe(view, ".opd-regimes")
    still = open_page(regimes.to_html(tmp_path / "d.html"), java_script_enabled=False)
    assert "% of KL" in still.locator(".opd-still").text_content()
    assert still.locator(".opd-stage rect").count() > 5


def test_nothing_at_all_is_drawn(open_page, tmp_path):
    view = open_page(Regimes(made([])).to_html(tmp_path / "p.html"))
    assert "0 of 0 tokens" in view.locator(".opd-note").text_content()
