"""Pages and curves: one file, nothing fetched, written whole or not at all."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest
from viz.traces import NASTY, made

from opdlab.errors import OpdlabError
from opdlab.viz import TokenLens, curves, embed, page, payload


def history(steps: int = 40) -> pd.DataFrame:
    step = np.arange(1, steps + 1)
    accuracy = np.where(step % 10 == 0, step / steps, np.nan)
    return pd.DataFrame(
        {
            "step": step,
            "loss": 1 / step,
            "reverse_kl": 1 / step,
            "reward": step / steps,
            "accuracy": accuracy,
            "lr": 1e-3,
        }
    )


def test_curves_draw_what_the_history_has():
    figure = curves(history())
    assert type(figure) is go.Figure
    assert [note.text for note in figure.layout.annotations] == [
        "loss",
        "reverse KL, nats",
        "reward",
        "accuracy, greedy",
    ]
    assert figure.layout.template == pio.templates["opdlab"]
    raw, mean, *_ = figure.data
    np.testing.assert_allclose(raw.y, history()["loss"])
    assert mean.y[20] == pytest.approx(history()["loss"].rolling(5, center=True).mean()[20])
    dots = figure.data[-1]
    assert list(dots.x) == [10, 20, 30, 40]
    assert dots.mode == "lines+markers"


def test_curves_of_chosen_keys_and_of_one_step():
    assert [note.text for note in curves(history(), ["lr"]).layout.annotations] == ["learning rate"]
    assert len(curves(history(1)).data) == 3  # no accuracy yet


def test_curves_name_what_is_missing():
    with pytest.raises(KeyError, match="no nothing; it has step, loss"):
        curves(history(), ["loss", "nothing"])
    with pytest.raises(OpdlabError, match=r"no step has run\. Train first"):
        curves(pd.DataFrame())


def test_template_suits_light_and_dark():
    layout = pio.templates["opdlab"].layout
    assert layout.paper_bgcolor == layout.plot_bgcolor == "rgba(0,0,0,0)"
    assert layout.font.color == "#808080"


def test_page_stands_alone(tmp_path):
    lens = TokenLens(made([b"a", b" b"]))
    figure = go.Figure(go.Scatter(y=[1, 2], name="</script><script>x()</script>"))
    path = page(
        tmp_path / "deep" / "run.html",
        title="A <b>run</b>",
        summary=[("accuracy", 0.35, "85 %", None)],
        figures=[figure, figure],
        lenses=[("before", lens), ("after", lens)],
        note="One.\n\nTwo <i>x</i>.",
    )
    text = path.read_text(encoding="utf-8")
    assert "<title>A &lt;b&gt;run&lt;/b&gt;</title>" in text
    assert "<p>Two &lt;i&gt;x&lt;/i&gt;.</p>" in text
    assert '<th scope="row">accuracy</th><td>0.35</td><td>85 %</td><td></td>' in text
    assert "default-src 'none'" in text
    assert text.count("plotly.js v") == 1
    assert text.count("export default") == 1
    assert "</script><script>x()" not in text
    assert not re.search(
        r"<(?:script|img|link|iframe)[^>]+(?:src|href)=",
        re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL),
    )


def test_page_without_figures_is_small(tmp_path):
    assert TokenLens(made([b"a"])).to_html(tmp_path / "lens.html").stat().st_size < 73_000


def test_lenses_of_a_page_share_their_scale(tmp_path):
    small, large = (
        made([b"a", b"b"]).with_columns(student_logp=[0.0, 0.0], teacher_logp=[-gap, -gap])
        for gap in (1.0, 4.0)
    )
    text = page(
        tmp_path / "p.html", title="t", lenses=[("", TokenLens(small)), ("", TokenLens(large))]
    ).read_text("utf-8")
    blocks = [json.loads(b)["packed"] for b in re.findall(r'class="opd-data">(.*?)</script>', text)]
    assert [payload.unpack(base64.b64decode(b))["channels"][0]["limit"] for b in blocks] == [
        4.0,
        4.0,
    ]


@pytest.mark.parametrize("text", NASTY)
def test_captions_and_cells_are_text(tmp_path, text):
    html = page(
        tmp_path / "p.html",
        title=text,
        note=text,
        summary=[(text, text)],
        lenses=[(text, TokenLens(made([b"a"])))],
    ).read_text("utf-8")
    assert "<img" not in html
    assert html.count("<script") == 2  # the data of the lens and the module


def test_a_failed_write_leaves_the_old_page(tmp_path):
    path = embed.write(tmp_path / "p.html", "old")
    with pytest.raises(UnicodeEncodeError):
        embed.write(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_view_saved_without_a_title_has_its_question_for_one(tmp_path):
    lens = TokenLens.of_trace(made([b"a", b"b"]))
    text = lens.to_html(tmp_path / "lens.html").read_text(encoding="utf-8")
    assert f"<title>TokenLens: {TokenLens.caption}</title>" in text
    lens.title = "Mine"
    text = lens.to_html(tmp_path / "lens.html").read_text(encoding="utf-8")
    assert "<title>Mine</title>" in text
