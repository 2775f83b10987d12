"""Any tokens, prompts and texts of a teacher through the views of methods: nothing runs, nothing vanishes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from viz.traces import NASTY, made

from opdlab.viz import Audits, Forks, PrivilegeLens, Regimes, View

pytestmark = pytest.mark.browser
foreign = st.sampled_from(NASTY) | st.text(max_size=6)
pieces = st.lists(foreign.map(str.encode) | st.binary(max_size=3), min_size=2, max_size=9)
TAGS = {"div", "span", "b", "button", "label", "select", "option", "canvas", "input", "output", "script", "style"}


def views(tokens: list[bytes], text: str) -> list[View]:
    """The four views of a trace whose tokens, prompt, types and texts are foreign."""
    n = len(tokens)
    trace = made(tokens, ("student", "teacher", "teacher+hint"), prompt=text, plan={"weight": np.ones(n)})
    trace = trace.with_columns(type=[text if i % 2 else "skill" for i in range(n)])
    window = {"sample": 0, "position": 0, "student": [0, 1], "teacher": [1, 0], "distance": 0.5, "kept": True, "plan": [[0.5, 0], [0, 0.5]]}
    said = b"".join(tokens).decode("utf-8", "replace")
    audit = {"sample": 0, "start": 0, "length": 1, "text": said, "continuations": [text, said], "similarity": [0.5, 1.0], "prior": 0.2,
             "weight": 0.5}  # fmt: skip
    trace.meta["notes"] = {"windows": [window], "audits": [audit]}
    regimes = Regimes(trace, title=text)
    regimes.region = [-100.0, 100.0, -1.0, 3.0]
    return [regimes, PrivilegeLens(trace, title=text), Forks(trace, title=text), Audits(trace, title=text)]


def test_any_texts_stay_texts(open_page, tmp_path):
    page = open_page(views([b"a", b"b"], "x")[0].to_html(tmp_path / "p.html"))

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
    @given(pieces, foreign)
    def check(tokens, text):
        whole = b"".join(tokens).decode("utf-8", "replace")
        for view in views(tokens, text):
            page.set_content(view.html())
            page.wait_for_selector("[data-mounted]")
            if not isinstance(view, Regimes):
                strip = page.locator(".opd-strip")
                assert strip.evaluate("node => [...node.children].map((n) => n.textContent).join('')") == whole
                assert page.locator(".opd-prompt").text_content() == text
            if isinstance(view, Audits):
                assert {text, whole} <= set(page.locator(".opd-written").all_text_contents())
            tags = page.evaluate("[...document.querySelectorAll('.opd *:not(svg, svg *)')].map((n) => n.localName)")
            assert set(tags) <= TAGS
            assert page.evaluate("window.broken") is None

    check()


def test_nothing_at_all_is_drawn(open_page, tmp_path):
    view = Regimes(made([]))
    page = open_page(view.to_html(tmp_path / "p.html"))
    assert "0 of 0 tokens" in page.locator(".opd-note").text_content()
