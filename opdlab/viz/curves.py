"""Curves of a run: small multiples over steps, and the plotly template that suits light and dark
pages alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from plotly.subplots import make_subplots

from opdlab.errors import OpdlabError

TEACHER, STUDENT, AMOUNT = "#0072B2", "#D55E00", "#8A6FC0"
KEYS = ("loss", "reverse_kl", "entropy", "length", "reward", "accuracy")
_LABELS = {
    "loss": "loss",
    "reverse_kl": "reverse KL, nats",
    "entropy": "student entropy, nats",
    "length": "length, tokens",
    "reward": "reward",
    "accuracy": "accuracy, greedy",
    "cut": "cut off at the limit, share",
    "empty": "empty, share",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "tokens": "tokens a step",
    "generate_s": "sampling, s",
    "seconds": "step, s",
}
_MANY = 24  # steps from which a running mean is drawn over the raw values
_GREY, _GRID = "#808080", "rgba(128,128,128,0.22)"


def curves(history: pd.DataFrame, keys: Sequence[str] | None = None, columns: int = 2) -> go.Figure:
    """Small multiples of `run.history` over its steps: by default those of `KEYS` that it has.

    From 24 points on, a running mean lies over the pale raw values. Raises OpdlabError for an empty
    history and KeyError for a key that it lacks.
    """
    if history.empty:
        raise OpdlabError(
            "The history is empty: no step has run. Train first, for instance with run.train()."
        )
    if missing := [key for key in keys or () if key not in history]:
        raise KeyError(
            f"The history has no {', '.join(missing)}; it has"
            f" {', '.join(map(str, history.columns))}."
        )
    shown = [key for key in keys or KEYS if key in history and history[key].notna().any()]
    columns = max(1, min(columns, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=[_LABELS.get(key, key.replace("_", " ")) for key in shown],
        horizontal_spacing=0.11,
        vertical_spacing=min(0.42 / rows, 0.3),
    )
    for i, key in enumerate(shown):
        steps = (
            history["step"]
            if "step" in history
            else pd.Series(range(1, len(history) + 1), index=history.index)
        )
        for trace in _lines(key, steps, history[key]):
            figure.add_trace(trace, row=i // columns + 1, col=i % columns + 1)
    figure.update_layout(template="opdlab", height=28 + 168 * rows, showlegend=False)
    figure.update_annotations(xanchor="left", font_size=13)
    for note, i in zip(figure.layout.annotations, range(len(shown)), strict=True):
        note.x = figure.layout[f"xaxis{i + 1 if i else ''}"].domain[0]
    for i in range(max(0, len(shown) - columns), len(shown)):
        figure.update_xaxes(title_text="step", row=i // columns + 1, col=i % columns + 1)
    return figure


def _lines(key: str, steps: pd.Series, values: pd.Series) -> list[go.Scatter]:
    """The raw values, and their running mean where there are many; sparse values (accuracy) as
    dots.
    """
    there = values.notna()
    steps, values = steps[there], values[there].astype(float)
    colour = {"reward": TEACHER, "accuracy": TEACHER, "reverse_kl": STUDENT, "loss": STUDENT}.get(
        key, AMOUNT
    )
    hover = f"step %{{x}}<br>{_LABELS.get(key, key)} %{{y:.3~g}}<extra></extra>"
    dots = "lines+markers" if len(values) < _MANY else "lines"
    raw = go.Scatter(
        x=steps,
        y=values,
        mode=dots,
        name=key,
        line={"color": colour, "width": 1.5},
        marker_size=5,
        hovertemplate=hover,
    )
    if len(values) < _MANY:
        return [raw]
    raw.update(opacity=0.35, line_width=1, hoverinfo="skip", hovertemplate=None)
    window = max(5, len(values) // 10)
    mean = values.rolling(window, center=True, min_periods=1).mean()
    hover = hover.replace("<extra>", f"<br>mean of {window} steps<extra>")
    return [
        raw,
        go.Scatter(
            x=steps,
            y=mean,
            mode="lines",
            name=key,
            line={"color": colour, "width": 2.2},
            hovertemplate=hover,
        ),
    ]


def _template() -> go.layout.Template:
    """Transparent paper, mid-grey text and grid: readable on white and on near-black."""
    axis = {
        "gridcolor": _GRID,
        "zeroline": False,
        "linecolor": _GRID,
        "ticks": "",
        "automargin": True,
        "title": {"font": {"size": 12}},
    }
    clear = "rgba(0,0,0,0)"
    return go.layout.Template(
        layout={
            "paper_bgcolor": clear,
            "plot_bgcolor": clear,
            "colorway": [TEACHER, STUDENT, AMOUNT, "#009E73", "#CC79A7", _GREY],
            "font": {
                "color": _GREY,
                "size": 12,
                "family": "system-ui, -apple-system, 'Segoe UI', Inter, 'Noto Sans', sans-serif",
            },
            "xaxis": axis | {"showgrid": False, "showline": True},
            "yaxis": axis | {"nticks": 5},
            "margin": {"l": 44, "r": 12, "t": 32, "b": 40},
            "hovermode": "closest",
            "hoverlabel": {"font": {"size": 12}},
        }
    )


pio.templates["opdlab"] = _template()
