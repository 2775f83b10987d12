"""What all views promise, of every view: it declares itself, and has a live twin, text, a still
picture, and rows that `selected` points into.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import pandas as pd
import pytest
from browser.any_pieces import ALL
from viz.traces import NASTY, made, several

from opdlab import viz
from opdlab.errors import OpdlabError
from opdlab.viz import payload
from opdlab.viz.markup import BARS
from opdlab.viz.method_map import example_results
from opdlab.viz.table import table_of_views

PIECES = [text.encode() for text in NASTY]
README = Path(viz.__file__).with_name("README.md")
BY_NAME = {view.__name__: view for view in viz.VIEWS}


def test_every_view_is_registered():
    exported = [getattr(viz, name) for name in viz.__all__]
    classes = {one for one in exported if inspect.isclass(one) and issubclass(one, viz.View)}
    assert set(viz.VIEWS) == classes - {viz.View}
    assert len({view.name for view in viz.VIEWS}) == len(viz.VIEWS)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_view_says_what_it_answers_and_what_it_takes(name):
    view = BY_NAME[name]
    assert view.caption.endswith("?")
    assert view.caption[0].isupper()
    assert view.takes
    given = {
        "Compare": {"a": made([b"a"]), "b": made([b"a"])},
        "Scrubber": {0: made([b"a"])},
        "RunBoard": pd.DataFrame({"loss": [1.0]}),
        "RunCard": pd.DataFrame({"loss": [1.0]}),
        "Playground": "forward_kl",
        "MethodMap": example_results(),
        "Arms": viz.Arms.example().controls,
    }
    example = view.example()
    assert type(example) is view
    trace = getattr(example, "whole", getattr(example, "trace", None))
    if name == "Rollouts":
        trace = several(trace, trace)
    fitting = given.get(name, trace)
    if name not in ("Alignment", "Branches", "Why"):  # of more than a trace
        assert view.fits(fitting)
    for other in (None, 3, [], made([])):
        assert not view.fits(other) or name == "TokenLens"


@pytest.mark.parametrize("view", [viz.TokenLens, viz.Timeline, viz.PrivilegeLens, viz.TailAudit])
def test_a_view_of_one_completion_refuses_one_that_is_not_there(view):
    trace = made([b"a", b"b"], ("student", "teacher", "teacher+hint"))
    with pytest.raises(OpdlabError, match="completion"):
        view.of_trace(trace, 7)


def test_the_table_of_the_readme_is_that_of_the_registry():
    text = README.read_text(encoding="utf-8")
    assert table_of_views() in text, "write it anew: python -m opdlab.viz.table"


@pytest.mark.parametrize("name", ALL)
def test_a_view_keeps_its_promises(name):
    view = ALL[name](PIECES, NASTY[0])
    kind = name.split()[0]
    assert type(view).__name__ == kind
    assert kind in repr(view).splitlines()[0]
    # A sparkline; of the kinds that the lens shows, in numbers.
    assert set(repr(view)) & set(BARS if kind != "TokenLens" else "1")
    bundle = view._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"}
    assert "<script>" not in view.static()
    assert len(view.df)
    if not view.scripts:  # a still picture
        with pytest.raises(OpdlabError, match="still picture"):
            view.live()
        return
    widget = view.live()
    assert payload.unpack(widget.packed)["title"] == NASTY[0]
    assert {trait: getattr(widget, trait) for trait in view.traits} == view.traits
    if view.selected >= 0:
        assert len(view.df.iloc[[view.selected]])
    widget.selected = 2
    assert view.selected == 2
    view.brush = [1, 3]
    assert widget.brush == [1, 3]
