"""Curves of a run: small multiples over its steps, as a Plotly figure.

Plotly is imported when the first figure is made, not with this module: that takes longer than all
pictures together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from opdlab.errors import OpdlabError

if TYPE_CHECKING:
    import plotly.graph_objects as go

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


def curves(history: pd.DataFrame, keys: Sequence[str] | None = None, columns: int = 2) -> go.Figure:
    """Draw the numbers of a run over its steps, a small plot for each.

    From 24 points on, a running mean lies over the pale raw values.

    Args:
        history: `run.history`.
        keys: Its columns; by default those of `KEYS` that it has.
        columns: Plots in a row.

    Returns:
        A Plotly figure with a titled plot for each column that has values.

    Raises:
        OpdlabError: The history is empty.
        KeyError: The history has no such column.
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
    figure = _empty_plots(shown, columns)
    steps = pd.Series(range(1, len(history) + 1), index=history.index)
    for i, key in enumerate(shown):
        for line in _lines(key, history.get("step", steps), history[key]):
            figure.add_trace(line, row=i // columns + 1, col=i % columns + 1)
    for i in range(max(0, len(shown) - columns), len(shown)):
        figure.update_xaxes(title_text="step", row=i // columns + 1, col=i % columns + 1)
    return figure


def _empty_plots(shown: Sequence[str], columns: int) -> go.Figure:
    """A grid of plots with their titles at the left."""
    from plotly.subplots import make_subplots

    import opdlab.viz.plotly_template  # noqa: F401  # registers the template

    rows = max(1, -(-len(shown) // columns))
    figure = make_subplots(
        rows,
        columns,
        subplot_titles=[_LABELS.get(key, key.replace("_", " ")) for key in shown],
        horizontal_spacing=0.11,
        vertical_spacing=min(0.42 / rows, 0.3),
    )
    figure.update_layout(template="opdlab", height=28 + 168 * rows, showlegend=False)
    figure.update_annotations(xanchor="left", font_size=13)
    for note, i in zip(figure.layout.annotations, range(len(shown)), strict=True):
        note.x = figure.layout[f"xaxis{i + 1 if i else ''}"].domain[0]
    return figure


def _lines(key: str, steps: pd.Series, values: pd.Series) -> list[go.Scatter]:
    """The raw values, and their running mean where there are many; sparse values as dots."""
    import plotly.graph_objects as go

    from opdlab.viz.plotly_template import AMOUNT, STUDENT, TEACHER

    there = values.notna()
    steps, values = steps[there], values[there].astype(float)
    colours = {"reward": TEACHER, "accuracy": TEACHER, "reverse_kl": STUDENT, "loss": STUDENT}
    colour = colours.get(key, AMOUNT)
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
