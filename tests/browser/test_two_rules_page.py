"""TwoRules in a real browser: what is dragged and chosen is what Python says."""

from __future__ import annotations

import numpy as np
import pytest
from viz.traces import NASTY, made, several

from opdlab.viz import TwoRules

pytestmark = pytest.mark.browser
WORDS = [*map(str.encode, NASTY[:6]), *[b" a", b" b"] * 8]


def counts(page) -> list[int]:
    rows = page.locator(".opd-set[data-set]").all()
    return [int(row.locator("> .opd-value").nth(1).text_content()) for row in rows]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lines_and_names_change_the_sets(open_page, tmp_path, axe, scheme):
    trace = several(made(WORDS, seed=1), made(WORDS, seed=2))
    n = len(trace)
    trace = trace.with_columns(share=np.full(n, 1 / n), type=[NASTY[i % 2] for i in range(n)])
    view = TwoRules(trace, title=NASTY[0])
    page = open_page(
        view.to_html(tmp_path / "r.html"),
        color_scheme=scheme,
        viewport={"width": 480, "height": 1100},
    )
    assert counts(page) == view.table["tokens"].tolist()
    sliders = page.get_by_role("slider")
    sliders.first.focus()
    for _ in range(3):
        sliders.first.press("Shift+ArrowRight")
    view.a = {**view.a, "value": float(sliders.first.get_attribute("aria-valuenow"))}
    assert counts(page) == view.table["tokens"].tolist()
    box = page.locator(".opd-stage").nth(1).bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 20, steps=3)
    page.mouse.up()
    page.get_by_role("group", name="Rule B").get_by_role("button").click()
    view.b = {
        **view.b,
        "sign": "<=",
        "value": float(sliders.nth(1).get_attribute("aria-valuenow")),
    }
    assert counts(page) == view.table["tokens"].tolist()
    page.get_by_label("What rule A reads").select_option("type")
    page.get_by_label("Name that rule A wants").select_option(NASTY[1])
    view.a = {"key": "type", "sign": "=", "value": NASTY[1]}
    assert counts(page) == view.table["tokens"].tolist()
    strip = page.locator(".opd-strip")
    strip.press("Home")
    strip.press("d")
    at = int(
        page.locator(
            ".opd-token[aria-selected='true'], .opd-byte[aria-selected='true']"
        ).first.get_attribute("data-i")
    )
    apart = [i for i in range(1, len(WORDS)) if view.sets[i] in (1, 2)]
    assert at == apart[0]
    assert page.evaluate("window.broken") is None
    axe(page)


def test_ten_thousand_tokens_follow_a_line_quickly(open_page, tmp_path):
    trace = made([f" w{i % 50}".encode() for i in range(10_000)])
    page = open_page(TwoRules(trace).to_html(tmp_path / "long.html"))
    before = counts(page)
    ms = page.evaluate("""() => {
      const line = document.querySelector(".opd-handle"), begin = performance.now();
      line.dispatchEvent(new KeyboardEvent("keydown", { key: "End", bubbles: true }));
      document.querySelector(".opd-strip").getBoundingClientRect();
      return performance.now() - begin;
    }""")
    assert counts(page) != before
    assert sum(counts(page)) == 10_000
    assert ms < 1500
