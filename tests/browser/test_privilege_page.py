"""The privilege lens in a real browser: flags, bars and sums are Python's."""

from __future__ import annotations

import numpy as np
import pytest
from viz.traces import NASTY, made

from opdlab.viz import PrivilegeLens
from opdlab.viz.markup import format_number

pytestmark = pytest.mark.browser
WORDS = [*map(str.encode, NASTY), *(f" w{i}".encode() for i in range(30))]


@pytest.fixture(scope="module")
def lens() -> PrivilegeLens:
    trace = made(WORDS, ("student", "teacher", "teacher+hint", "teacher+wrong"), prompt=NASTY[0])
    trace = trace.with_columns(type=[NASTY[i % 3] if i % 2 else "skill" for i in range(len(WORDS))])
    return PrivilegeLens(trace, wrong="teacher+wrong", title=NASTY[2])


def flagged(view) -> list[int]:
    return view.locator("[data-leak]").evaluate_all(
        "nodes => nodes.map((n) => Number(n.dataset.i))"
    )


def test_flags_bars_and_sums(open_page, tmp_path, lens, axe):
    view = open_page(lens.to_html(tmp_path / "p.html"), viewport={"width": 1000, "height": 1300})
    df, table = lens.df, lens.table
    assert (
        view.locator(".opd-strip").evaluate(
            "node => [...node.children].map((n) => n.textContent).join('')"
        )
        == b"".join(WORDS).decode()
    )
    assert flagged(view) == df.index[df.leak].tolist() != []
    for i in (3, int(df.leak.idxmax())):
        view.locator(f"[data-i='{i}']").hover()
        names = {
            "gap": "gap",
            "information": "information_teacher",
            "capability": "capability_bare",
            "wrong": "information_wrong",
        }
        for key, column in names.items():
            assert view.locator(
                f".opd-split [data-channel='{key}'] .opd-value"
            ).text_content().split()[0] == format_number(df[column][i], True)
        widths = view.locator(".opd-policy .opd-fill").evaluate_all(
            "nodes => nodes.map((n) => parseFloat(n.style.width))"
        )
        sides = [f"{name}_logp" for name in ("student", "teacher", "teacher+hint", "teacher+wrong")]
        np.testing.assert_allclose(widths, 100 * np.exp(df.loc[i, sides].astype(float)), atol=0.2)
        assert ("⚑" in view.locator(".opd-verdict").text_content()) == df.leak[i]

    falls = view.locator(".opd-fall-row")
    totals = [
        format_number(df[f"{name}_logp"].sum()) for name in ("student", "teacher", "teacher+hint")
    ]
    assert [falls.nth(k).locator(".opd-value").text_content() for k in (0, 2, 4)] == totals
    ends = falls.locator(".opd-fill").evaluate_all(
        "nodes => nodes.map((n) => [parseFloat(n.style.left), parseFloat(n.style.width)])"
    )
    assert ends[1][0] == pytest.approx(
        min(ends[0][0], ends[2][0]), abs=0.1
    )  # a step lies between the two totals
    assert ends[1][1] == pytest.approx(abs(ends[0][0] - ends[2][0]), abs=0.1)

    knob = view.locator(".opd-undecided input")
    knob.fill("2.2")
    knob.press("ArrowRight")
    moved = PrivilegeLens(lens.trace, wrong="teacher+wrong")
    moved.undecided = float(knob.input_value())
    assert moved.undecided == 2.21
    assert flagged(view) == moved.df.index[moved.df.leak].tolist() != df.index[df.leak].tolist()
    rows = {
        row.get_attribute("data-type"): row.locator(".opd-count").last.text_content()
        for row in view.locator("[data-type]").all()
    }
    assert list(rows) == list(table.index)
    assert all(
        abs(float(text.strip(" %")) - 100 * moved.table["leak"][kind]) < 0.06
        for kind, text in rows.items()
    )

    strip = view.locator(".opd-strip")
    strip.press("Home")
    assert (
        view.locator(".opd-privilege-head .opd-soft").text_content()
        == "sampled at position 0 · skill"
    )
    heights = set()
    for i in range(0, len(WORDS), 5):
        view.locator(f"[data-i='{i}']").hover()
        heights.add(view.locator(".opd-panel").bounding_box()["height"])
    assert len(heights) == 1
    assert view.evaluate("window.broken") is None
    axe(view)


def test_it_fits_and_reads_in_the_dark(open_page, tmp_path, lens, axe):
    path = lens.to_html(tmp_path / "d.html")
    view = open_page(path, viewport={"width": 480, "height": 900}, color_scheme="dark")
    assert view.locator("[data-leak]").count()
    assert view.evaluate("document.documentElement.scrollWidth") <= 480
    cells = view.locator(".opd-mean").evaluate_all("""nodes => nodes.map((node) => {
      const of = (part) => part.getBoundingClientRect(), row = of(node.parentNode);
      const bar = of(node.querySelector(".opd-track"));
      const words = of(node.querySelector(".opd-value"));
      return [row.top, words.top, words.bottom, bar.top, bar.bottom, row.bottom];
    })""")
    assert cells
    assert all(
        cell == sorted(cell) for cell in cells
    )  # each number over its bar, both within their row
    axe(view)
    still = open_page(path, java_script_enabled=False)
    assert lens.sentence in still.locator(".opd-peaks").text_content()
