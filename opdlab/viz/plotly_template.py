"""The Plotly template "opdlab", which suits light and dark pages alike; importing registers it."""

from __future__ import annotations

import plotly.graph_objects as go
import plotly.io as pio

TEACHER, STUDENT, AMOUNT = "#0072B2", "#D55E00", "#8A6FC0"
GREY, GRID = "#808080", "rgba(128,128,128,0.22)"


def _template() -> go.layout.Template:
    """Return transparent paper with mid-grey text and grid, readable on white and near-black."""
    axis = {
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": GRID,
        "ticks": "",
        "automargin": True,
        "title": {"font": {"size": 12}},
    }
    clear = "rgba(0,0,0,0)"
    return go.layout.Template(
        layout={
            "paper_bgcolor": clear,
            "plot_bgcolor": clear,
            "colorway": [TEACHER, STUDENT, AMOUNT, "#009E73", "#CC79A7", GREY],
            "font": {
                "color": GREY,
                "size": 12,
                "family": "system-ui, -apple-system, 'Segoe UI', Inter, 'Noto Sans', sans-serif",
            },
            "xaxis": axis | {"showgrid": False, "showline": True},
            "yaxis": axis | {"nticks": 5},
            "margin": {"l": 44, "r": 12, "t": 32, "b": 40},
            "shapedefaults": {"line": {"color": GREY}},
            "hovermode": "closest",
            "hoverlabel": {"font": {"size": 12}},
        }
    )


pio.templates["opdlab"] = _template()
