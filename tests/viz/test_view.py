"""What all views share: traits both ways, the live widget, renderers, pictures."""

from __future__ import annotations

import sys

import nbformat
import pytest
from nbconvert import HTMLExporter
from viz.traces import made

from opdlab.errors import OpdlabError
from opdlab.viz import TokenLens, camera, payload, set_renderer, view


@pytest.fixture
def lens() -> TokenLens:
    return TokenLens(made([b"a", b" b", b"c"]), title="One")


@pytest.fixture(autouse=True)
def default_renderer():
    yield
    view._renderer.clear()


def test_traits_are_attributes_that_can_be_watched(lens):
    seen = []
    lens.on("selected", seen.append)
    assert lens.selected == 2  # the largest
    lens.selected = 1
    lens.selected = 1
    lens.brush = (0, 1)
    assert seen == [1]
    assert lens.traits == {
        "selected": 1,
        "hovered": -1,
        "brush": [0, 1],
        "channel": "log_ratio",
        "tracks": [],
        "pins": [],
    }
    assert lens.df.iloc[lens.selected]["token"] == "·b"
    with pytest.raises(TypeError, match=r"selected is of type int, not str \('x'\)\. Give a int"):
        lens.selected = "x"
    with pytest.raises(
        OpdlabError, match=r"TokenLens has no 'nothing' to watch\. It has selected, hovered"
    ):
        lens.on("nothing", print)


def test_the_live_widget_mirrors_the_view_both_ways(lens):
    widget, seen = lens.live(), []
    lens.on("selected", seen.append)
    assert lens.live() is widget
    assert payload.unpack(widget.packed)["title"] == "One"
    lens.selected = 1
    assert widget.selected == 1
    widget.selected = 2
    assert lens.selected == 2
    assert seen == [1, 2]
    lens.title = "Two"
    lens.refresh()
    assert payload.unpack(widget.packed)["title"] == "Two"


def test_a_live_view_leaves_its_picture_for_readers_without_a_kernel(lens):
    widget = lens.live()
    bundle, _ = widget._repr_mimebundle_(include=None, exclude=None)
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == widget.model_id
    assert bundle["text/html"] == lens.html(script=False)
    assert "Largest log ratio" in bundle["text/html"]
    assert bundle["text/plain"] == repr(widget) == repr(lens)
    assert " object at 0x" not in str(bundle)
    output = nbformat.v4.new_output("execute_result", data=bundle, execution_count=1)
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("lens.live()", outputs=[output])]
    )
    html, _ = HTMLExporter().from_notebook_node(book)
    assert "Largest log ratio" in html


def test_the_page_may_ask_and_hears_of_errors(lens):
    class Asking(TokenLens):
        def answer(self, question):
            return {"double": 2 * question["n"]}

    widget, sent = Asking(lens.trace).live(), []
    widget.send = sent.append
    for message in ({"id": 1, "ask": {"n": 4}}, {"id": 2, "ask": None}, {"id": 3, "ask": {}}):
        widget._handle_custom_msg(message, [])
    assert sent == [
        {"id": 1, "answer": {"double": 8}},
        {"id": 2, "answer": None},
        {"id": 3, "error": "KeyError: 'n'"},
    ]


def test_the_renderer_is_chosen_by_call_or_environment(lens, monkeypatch):
    assert "<script" in lens._repr_mimebundle_()["text/html"]
    set_renderer("static")
    assert "<script" not in lens._repr_mimebundle_()["text/html"]
    assert "rgba(" in lens._repr_mimebundle_()["text/html"]
    set_renderer("live")
    bundle, _ = lens._repr_mimebundle_()
    assert set(bundle) == {"application/vnd.jupyter.widget-view+json", "text/html", "text/plain"}
    assert bundle["text/plain"] == repr(lens)
    view._renderer.clear()
    monkeypatch.setenv("OPDLAB_RENDERER", "static")
    assert view.renderer() == "static"
    monkeypatch.setenv("OPDLAB_RENDERER", "nice")
    with pytest.raises(OpdlabError, match=r"no renderer 'nice'\. Use html, live or static"):
        view.renderer()


def test_without_anywidget_live_says_what_to_install(lens, monkeypatch):
    monkeypatch.setitem(sys.modules, "anywidget", None)
    monkeypatch.delitem(sys.modules, "opdlab.viz.live", raising=False)
    with pytest.raises(
        OpdlabError, match=r"need anywidget .*Install it: pip install 'opdlab\[notebooks\]'"
    ):
        lens.live()


def test_without_a_browser_to_png_says_what_to_install(lens, tmp_path, monkeypatch):
    monkeypatch.setenv("OPDLAB_BROWSER", str(tmp_path / "nowhere"))
    with pytest.raises(
        OpdlabError, match=r"No browser to draw with: looked for .*nowhere. Install Chromium"
    ):
        lens.to_png(tmp_path / "x.png")
    monkeypatch.delenv("OPDLAB_BROWSER")
    monkeypatch.setattr(camera, "MAC", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OpdlabError, match="looked for chromium, chromium-browser"):
        camera.browser()
    assert list(tmp_path.iterdir()) == []


def test_a_browser_that_dies_is_an_error(lens, tmp_path, monkeypatch):
    monkeypatch.setenv("OPDLAB_BROWSER", "/bin/false")
    with pytest.raises(OpdlabError, match="stopped or fell silent"):
        lens.to_png(tmp_path / "x.png")
