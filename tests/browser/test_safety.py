"""Tokens, prompts, titles and names are data: in every view nothing of them runs, becomes markup or
gets lost.
"""

from __future__ import annotations

import pytest
from browser.any_pieces import ALL, STRIPS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from viz.traces import NASTY, byte_pieces

from opdlab import viz
from opdlab.viz.glyphs import group_pieces

pytestmark = pytest.mark.browser
nasty = (
    st.sampled_from(NASTY).map(str.encode)
    | st.text(max_size=5).map(str.encode)
    | st.binary(max_size=3)
)
HUGE = [
    b"a",
    b"<img src=x onerror=window.broken=1> " * 30_000,
    *byte_pieces(" \U0001f917", 2),
    b" z",
]  # the second has 1 MB

# What a view may be made of; scripts are the data and the module, styles and titles are its own.
TAGS = {
    "div",
    "span",
    "b",
    "button",
    "input",
    "select",
    "option",
    "label",
    "output",
    "canvas",
    "svg",
    "path",
    "circle",
    "rect",
    "line",
    "g",
    "text",
    "title",
    "figure",
    "figcaption",
    "table",
    "caption",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "ol",
    "ul",
    "li",
    "script",
    "style",
    "i",
    "small",
    "p",
    "dl",
    "dt",
    "dd",
    "details",
    "summary",
    "textarea",
    "datalist",
    "code",
    "h3",
    "h4",
    "polyline",
    "polygon",
    "ins",
    "del",
}
LOOK = """(wanted) => {
  const all = [...document.querySelectorAll(".opd, .opd *")];
  const strips = [...document.querySelectorAll(".opd-strip")];
  const live = document.querySelector("[data-mounted]");
  const inside = (node) => [...node.children].map((child) => child.textContent).join("");
  const acts = (name) => name.startsWith("on") || name === "href" || name === "src";
  const text = (node) => (live ? inside(node) : node.textContent);
  return {
    tags: [...new Set(all.map((node) => node.localName))],
    handlers: all.flatMap((node) => node.getAttributeNames().filter(acts)),
    scripts: document.querySelectorAll("script").length,
    broken: window.broken ?? null,
    strips: strips.length,
    lost: strips.filter((node) => text(node) !== wanted).map((node) => text(node).slice(0, 200)),
  };
}"""


def check(view, make, least, pieces, text, still) -> None:
    drawn, wanted = make(pieces, text), "".join(group.text for group in group_pieces(pieces))
    view.set_content(drawn.html())
    if not still:
        view.wait_for_selector("[data-mounted]")
    found = view.evaluate(
        LOOK, wanted.replace("\0", "") if still else wanted
    )  # HTML cannot hold NUL
    assert set(found["tags"]) <= TAGS
    assert (found["handlers"], found["broken"], found["lost"], found["scripts"]) == (
        [],
        None,
        [],
        0 if still else 2,
    )
    assert found["strips"] >= least
    for words in (repr(drawn), drawn.static()):
        assert words


@pytest.mark.parametrize("name", ALL)
def test_any_text_is_shown_as_it_is_and_nothing_runs(open_page, tmp_path, name):
    make, kind = ALL[name], name.split()[0]
    least, still = STRIPS.get(kind, 0), not getattr(viz, kind).scripts
    path = tmp_path / "empty.html"
    path.write_text("<!doctype html><meta charset=utf-8>", encoding="utf-8")
    view = open_page(path)
    check(view, make, least, [text.encode() for text in NASTY], NASTY[0], still)
    check(view, make, least, HUGE, NASTY[2], still)

    @settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(nasty, min_size=1, max_size=10), st.sampled_from(NASTY))
    def any_text(pieces, text):
        check(view, make, least, pieces, text, still)

    any_text()
