"""What all views promise, of every view: a live twin, text, a still picture, rows that `selected`
points into.
"""

from __future__ import annotations

import pytest
from browser.any_pieces import VIEWS
from viz.traces import NASTY

from opdlab.viz import payload

BARS = "▁▂▃▄▅▆▇█"
PIECES = [text.encode() for text in NASTY]


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_keeps_its_promises(name):
    view = VIEWS[name][0](PIECES, NASTY[0])
    kind = name.split()[0]
    assert type(view).__name__ == kind
    assert kind in repr(view).splitlines()[0]
    assert set(repr(view)) & set(
        BARS if name != "TokenLens" else "1"
    )  # a sparkline; of kinds, which that lens shows, in numbers
    bundle = view._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"}
    assert "<script>" not in view.static()
    assert len(view.df)
    widget = view.live()
    assert payload.unpack(widget.packed)["title"] == NASTY[0]
    assert {trait: getattr(widget, trait) for trait in view.traits} == view.traits
    if view.selected >= 0:
        assert len(view.df.iloc[[view.selected]])
    widget.selected = 2
    assert view.selected == 2
    view.brush = [1, 3]
    assert widget.brush == [1, 3]
