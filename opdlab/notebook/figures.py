"""Pictures of the notebooks: arms with their seeds, cosines, the survey as a map, and the loop.

They are here so that the notebooks show the technique and not the plotting.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from opdlab.errors import OpdlabError
from opdlab.viz import embed
from opdlab.viz.plotly_template import AMOUNT, GREY, STUDENT, TEACHER

if TYPE_CHECKING:
    import plotly.graph_objects as go

GREEN = "#009E73"
PINK = "#CC79A7"
HUES = (TEACHER, STUDENT, GREEN, AMOUNT, PINK, GREY)

# Names that several notebooks draw, each with one colour in all of them.
COLOURS = {
    "reverse KL": STUDENT,
    "forward KL": GREEN,
    "Jensen-Shannon": AMOUNT,
    "own texts": STUDENT,
    "teacher's texts": TEACHER,
}

# Who teaches, by the survey's column `access`.
TEACHERS = {
    "white-box": ("another model, with probabilities", TEACHER),
    "teacher-free": ("the student itself", STUDENT),
    "black-box": ("another model that only writes", GREEN),
}
# The lanes of the map, each with the survey's axes that it holds, from top to bottom.
LANES = {
    "<b>the loss</b><br>divergence, reward": (
        "4.1 fixed divergence",
        "4.2 adaptive divergence",
        "4.3 with reinforcement",
    ),
    "<b>another teacher</b><br>which one, how it is read": (
        "5.1.1 external, white-box",
        "5.1.2 external, black-box",
    ),
    "<b>itself as teacher</b><br>hint, feedback, past": (
        "5.2.1 self, privileged information",
        "5.2.2 self, pure",
        "5.2.3 self, external feedback",
    ),
    "<b>what counts</b><br>tokens, prompts, cost": (
        "6.1 weights of tokens and samples",
        "6.2 curriculum",
        "6.3 compute",
    ),
    "<b>later</b><br>not yet sorted": ("after v4",),
}
_ACROSS = 4  # dots beside each other in a month


def summarize_seeds(values: pd.DataFrame) -> pd.DataFrame:
    """Summarise an arm's seeds by their mean and its 95 % interval (Student's t).

    Args:
        values: One row per arm and one column per seed.

    Returns:
        One row per arm, with `mean`, `low` and `high` (NaN with fewer than two seeds) and `seeds`,
        the list of the values.
    """
    from scipy.stats import t

    n = values.count(axis=1)
    half = t.ppf(0.975, (n - 1).clip(lower=1)) * values.std(axis=1) / n**0.5
    mean = values.mean(axis=1)
    seeds = [row[~np.isnan(row)].tolist() for row in values.to_numpy(float)]
    table = {"mean": mean, "low": mean - half, "high": mean + half}
    return pd.DataFrame(table).assign(seeds=seeds)


def draw_arms(
    panels: Mapping[str, pd.DataFrame],
    title: str,
    axis: str,
    limits: tuple[float, float] | None = None,
    colours: Sequence[str] = HUES,
    mark: float | Sequence[float] | None = None,
) -> go.Figure:
    """Draw one row per arm: a small dot for each seed, the mean, and its interval as a line.

    Args:
        panels: Tables with the columns `mean`, `low`, `high` and perhaps `seeds`, by the title of
            their panel; all have the same arms in the same order. One panel may have "" as title.
        title: The title of the figure.
        axis: What the numbers are, with their unit; `<br>` begins a second line.
        limits: The ends of the axis; the intervals are cut there. By default as the data need.
        colours: One colour per arm; repeated if there are more arms.
        mark: A value to mark by a dotted line, such as that before training; or one for each panel.

    Returns:
        A Plotly figure.

    Raises:
        OpdlabError: There is no panel, or the panels have different arms.
    """
    from plotly.subplots import make_subplots

    arms = [list(table.index) for table in panels.values()]
    if not arms or any(one != arms[0] for one in arms):
        raise OpdlabError("draw_arms needs panels with the same arms in the same order.")
    figure = make_subplots(
        1, len(panels), shared_yaxes=True, subplot_titles=list(panels), horizontal_spacing=0.04
    )
    for column, table in enumerate(panels.values(), 1):
        for trace in _arm_traces(table, limits, colours):
            figure.add_trace(trace, row=1, col=column)
    marks = [mark] * len(panels) if mark is None or isinstance(mark, (int, float)) else mark
    for column, value in enumerate(marks, 1):
        if value is not None:
            figure.add_vline(x=value, line_dash="dot", line_color=GREY, line_width=1, col=column)
    ends = limits and [limits[0] - 0.02 * np.ptp(limits), limits[1] + 0.02 * np.ptp(limits)]
    figure.update_xaxes(range=ends, showgrid=True)
    figure.add_annotation(  # one for all panels, in the middle below them
        text=axis,
        x=0.5,
        xref="paper",
        y=0,
        yref="paper",
        yanchor="top",
        yshift=-21,
        showarrow=False,
        font_size=12,
    )
    figure.update_yaxes(
        tickvals=list(range(len(arms[0]))),
        ticktext=[str(arm) for arm in arms[0]],
        range=[len(arms[0]) - 0.4, -0.6],
        showgrid=False,
        nticks=None,
    )
    more_lines = 16 * axis.count("<br>")
    return figure.update_layout(
        template="opdlab",
        title=title,
        height=130 + 38 * len(arms[0]) + more_lines,
        margin_t=64 if any(panels) else 40,
        margin_b=60 + more_lines,
        showlegend=False,
    )


def _arm_traces(
    table: pd.DataFrame, limits: tuple[float, float] | None, colours: Sequence[str]
) -> list[go.Scatter]:
    """The interval, the mean and the seeds of every arm; seeds lie below, so nothing hides them."""
    import plotly.graph_objects as go

    lowest, highest = limits or (-np.inf, np.inf)
    traces = []
    for place, (arm, row) in enumerate(table.iterrows()):
        colour = colours[place % len(colours)]
        ends = [max(row["low"], lowest), min(row["high"], highest)]
        said = f"{arm}: {row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        line = {"color": colour, "width": 4}
        shown = {"cliponaxis": False}  # also a mark on the very edge
        traces.append(go.Scatter(x=ends, y=[place, place], mode="lines", line=line, opacity=0.4))
        marker = {"color": colour, "size": 11, "line": {"color": "white", "width": 1}}
        traces.append(
            go.Scatter(
                x=[row["mean"]],
                y=[place],
                mode="markers",
                marker=marker,
                hovertext=[said],
                hoverinfo="text",
                **shown,
            )
        )
        seeds = row["seeds"] if "seeds" in table else []
        dots = {"color": colour, "size": 6, "symbol": "circle-open", "line": {"width": 1.5}}
        below = [place + 0.28] * len(seeds)
        traces.append(go.Scatter(x=seeds, y=below, mode="markers", marker=dots, **shown))
    return traces


# The values of an arm that `draw_changes` marks: their name, symbol and colour, None for the arm's.
_CHANGE_MARKS: dict[str, tuple[str, str, str | None]] = {
    "before": ("before training", "circle-open", GREY),
    "hinted": ("with the hint", "line-ns-open", AMOUNT),
    "after": ("after training, without it", "circle", None),
}


def draw_changes(changes: pd.DataFrame, title: str, axis: str, colours: Sequence[str]) -> go.Figure:
    """Draw one row per arm: the part of a hint's effect that training kept, and the part lost.

    A strong line leads from before training to after it, and a pale line on to the score with the
    hint, if that is higher. Small circles are single seeds.

    Args:
        changes: One row per arm with shares `before` training, of the `hinted` student, and `after`
            training without the hint, and `seeds`, the list of each seed's share after training.
        title: The title of the figure.
        axis: What the numbers are.
        colours: The colour of each arm's lines and of its dots after training.

    Returns:
        A Plotly figure.

    Raises:
        OpdlabError: There are not as many colours as arms.
    """
    import plotly.graph_objects as go

    if len(colours) != len(changes):
        raise OpdlabError(
            f"draw_changes has {len(changes)} arms and {len(colours)} colours. Give one each."
        )
    figure, rows = go.Figure(), list(range(len(changes)))
    for place, (before, hinted, after), colour in zip(
        rows, changes[["before", "hinted", "after"]].to_numpy(), colours, strict=True
    ):
        line = {"color": colour, "width": 5}
        drawn = {"y": [place] * 2, "mode": "lines", "line": line, "showlegend": False}
        figure.add_scatter(x=[before, after], **drawn)
        if hinted > after:
            figure.add_scatter(x=[after, hinted], opacity=0.3, **drawn)
    shown = {"mode": "markers", "cliponaxis": False}
    for column, (name, symbol, own_colour) in _CHANGE_MARKS.items():
        hue = list(colours) if own_colour is None else own_colour
        line = {"width": 3, "color": hue}
        marker = {"symbol": symbol, "size": 13, "color": hue, "line": line}
        figure.add_scatter(x=changes[column], y=rows, name=name, marker=marker, **shown)
    below = [place + 0.3 for place in rows]
    seeds = pd.DataFrame({"x": list(changes["seeds"]), "y": below, "hue": list(colours)})
    seeds = seeds.explode("x")  # one row per seed
    dots = {"symbol": "circle-open", "size": 6, "color": seeds["hue"], "line": {"width": 1.5}}
    figure.add_scatter(x=seeds["x"], y=seeds["y"], name="the same, one seed", marker=dots, **shown)
    figure.update_xaxes(range=[-0.04, 1.04], title=axis)
    figure.update_yaxes(
        tickvals=rows,
        ticktext=[str(arm) for arm in changes.index],
        range=[len(rows) - 0.4, -0.6],
        nticks=None,
        showgrid=False,
    )
    return figure.update_layout(
        template="opdlab",
        title=title,
        height=150 + 40 * len(rows),
        margin_t=60,
        legend={"orientation": "h", "y": -0.27},
    )


# How the events of runs are drawn: an alarm of the name that the run is about, others, a fall.
EVENTS: dict[str, dict[str, Any]] = {
    "its own alarm": {"symbol": "diamond", "color": TEACHER, "size": 11},
    "another alarm": {"symbol": "diamond-open", "color": GREY, "size": 8},
    "the score has fallen": {"symbol": "x", "color": STUDENT, "size": 9},
}


def draw_events(
    ends: Mapping[tuple[str, int], int],
    events: Sequence[tuple[str, int, int, str]],
    labels: Mapping[str, str],
    title: str,
) -> go.Figure:
    """Draw runs as lines over their steps, and what happened on them as marks.

    Args:
        ends: The last step of each run, by its case and seed. Runs of a case stand together.
        events: (case, seed, step, kind) each; `kind` is a key of `EVENTS`.
        labels: What stands beside each case.
        title: The title of the figure.

    Returns:
        A Plotly figure.
    """
    import plotly.graph_objects as go

    seeds: dict[str, list[int]] = {}
    for case, seed in ends:
        seeds.setdefault(case, []).append(seed)
    heights = {
        (case, seed): lane + (i - (len(seeds[case]) - 1) / 2) * 0.25
        for lane, case in enumerate(seeds)
        for i, seed in enumerate(seeds[case])
    }
    figure = go.Figure()
    line = {"color": "rgba(128,128,128,0.45)", "width": 1}
    for run, end in ends.items():
        y = [heights[run]] * 2
        figure.add_scatter(x=[1, end], y=y, mode="lines", line=line, showlegend=False)
    for kind, marker in EVENTS.items():
        found = [(heights[case, seed], step) for case, seed, step, what in events if what == kind]
        y, x = ([place for place, _ in found], [step for _, step in found])
        figure.add_scatter(x=x, y=y, mode="markers", marker=marker, name=kind)
    ticks = {"tickvals": list(range(len(seeds))), "ticktext": [labels[case] for case in seeds]}
    figure.update_yaxes(**ticks, nticks=None, range=[len(seeds) - 0.4, -0.6], showgrid=False)
    return figure.update_layout(
        template="opdlab",
        title=title,
        height=140 + 62 * len(seeds),
        xaxis_title="step",
        legend={"orientation": "h", "y": -0.2},
    )


def draw_cosines(
    cosines: pd.DataFrame, verdicts: Sequence[str], title: str, axis: str
) -> go.Figure:
    """Draw, for each loss, the cosines of its gradient with those of some divergences.

    The names of the divergences stand beside the dots of the first row.

    Args:
        cosines: One row per loss, one column per divergence, from left to right in the first row;
            NaN in a row without a gradient.
        verdicts: What each loss trains; it stands at the right of its row.
        title: The title of the figure.
        axis: What the numbers are.

    Returns:
        A Plotly figure.

    Raises:
        OpdlabError: There are not as many verdicts as losses.
    """
    import plotly.graph_objects as go

    if len(verdicts) != len(cosines):
        raise OpdlabError(
            f"draw_cosines has {len(cosines)} losses and {len(verdicts)} verdicts. Give one each."
        )
    figure, rows = go.Figure(), list(range(len(cosines)))
    for place, (_, row) in enumerate(cosines.iterrows()):
        if row.isna().all():
            figure.add_annotation(text="no gradient on average", x=0, y=place, showarrow=False)
            continue
        line = {"color": "rgba(128,128,128,0.4)", "width": 2}
        figure.add_scatter(
            x=[row.min(), row.max()], y=[place] * 2, mode="lines", line=line, hoverinfo="skip"
        )
    sides = ["top left", *["top right"] * (cosines.shape[1] - 1)]
    for name, side, hue, symbol in zip(
        cosines, sides, (STUDENT, TEACHER, AMOUNT), ("diamond", "circle", "square"), strict=False
    ):
        colour = COLOURS.get(name, hue)
        figure.add_scatter(
            x=cosines[name],
            y=rows,
            mode="markers+text",
            marker={"color": colour, "size": 13, "symbol": symbol},
            text=[name, *[""] * (len(rows) - 1)],
            textposition=side,
            textfont_color=colour,
            name=name,
            cliponaxis=False,
            hovertemplate="%{y}: %{x:.2f}",
        )
    _label_cosines(figure, [str(name) for name in cosines.index], verdicts, axis)
    margin = {"r": 190, "t": 36, "b": 66}
    return figure.update_layout(
        template="opdlab", title=title, height=120 + 40 * len(rows), showlegend=False, margin=margin
    )


def _label_cosines(
    figure: go.Figure, losses: Sequence[str], verdicts: Sequence[str], axis: str
) -> None:
    """Name the losses at the left, their verdicts at the right, and what cosines mean below."""
    for y, verdict in [(-1.1, "it trains"), *enumerate(verdicts)]:
        figure.add_annotation(
            text=verdict,
            x=1.1,
            xref="paper",
            y=y,
            xanchor="left",
            align="left",
            showarrow=False,
        )
    guides = {-1: "the opposite", 0: "unrelated", 1: "the same"}
    figure.update_xaxes(
        range=[-1.08, 1.08],
        tickvals=list(guides),
        ticktext=[f"{at}<br>{words}" for at, words in guides.items()],
        showgrid=True,
        title=axis,
    )
    figure.update_yaxes(
        tickvals=list(range(len(losses))),
        ticktext=losses,
        nticks=None,
        range=[len(losses) - 0.5, -1.4],
        showgrid=False,
    )


def draw_survey(field: pd.DataFrame, named: Collection[str], title: str) -> go.Figure:
    """Draw the survey's methods by date and by what they change, with the names of some.

    Args:
        field: `opd.notebook.survey()`.
        named: Names of the methods whose dots are filled and carry their name.
        title: The title of the figure.

    Returns:
        A Plotly figure.
    """
    import plotly.graph_objects as go

    lane_of = {axis: lane for lane, axes in LANES.items() for axis in axes}
    shown = field.sort_values("date").reset_index()
    shown["lane"] = shown["axis"].map(lane_of)
    shown["is_named"] = shown["name"].isin(list(named))
    years, months = shown["date"].dt.strftime("%Y"), shown["date"].dt.strftime("%b")
    shown["when"] = months.where(years == "2026", years)
    columns = {when: i for i, when in enumerate(dict.fromkeys(shown["when"]))}
    # Named dots lie on top of their column, next to the names above the lane.
    shown = shown.sort_values("is_named", ascending=False, kind="stable")
    rank = shown.groupby(["lane", "when"]).cumcount()
    shown["x"] = shown["when"].map(columns) + (rank % _ACROSS - (_ACROSS - 1) / 2) * 0.21
    labels = _place_names(shown[shown["is_named"]])
    above = shown["name"].map(labels).groupby(shown["lane"]).max().fillna(-1) + 1
    tops, bottom = _lane_tops(shown["lane"], rank, above.to_dict())
    shown["y"] = shown["lane"].map(tops) + rank // _ACROSS
    figure = go.Figure()
    for access, (_, colour) in TEACHERS.items():
        part = shown[shown["access"] == access]
        fills = [colour if is_named else "rgba(0,0,0,0)" for is_named in part["is_named"]]
        marker = {"size": 8, "color": fills, "line": {"color": colour, "width": 1.2}}
        figure.add_scatter(
            x=part["x"],
            y=part["y"],
            mode="markers",
            marker=marker,
            text=part["name"] + "<br>" + part["line"],
            hoverinfo="text",
        )
    for row in shown[shown["is_named"]].itertuples():
        _add_name(figure, row.name, row.x, row.y, row.y - 1.1 - labels[row.name])
    _label_map(figure, shown, columns, tops, bottom)
    *_, unsorted = LANES
    top = tops[unsorted] - above[unsorted] - 1.3
    figure.add_hrect(top, bottom, fillcolor=GREY, opacity=0.12, line_width=0, layer="below")
    margin = {"l": 20, "r": 8, "t": 80, "b": 40}
    return figure.update_layout(
        template="opdlab", title=title, height=570, showlegend=False, margin=margin
    )


def _place_names(named: pd.DataFrame) -> dict[str, int]:
    """Find a row above its lane for each name, 0 next to the dots, so that no two names touch."""
    rows: dict[str, int] = {}
    for _, lane in named.groupby("lane"):
        ends: list[float] = []  # the last column that a row's names reach
        for name, x in lane.sort_values("x")[["name", "x"]].itertuples(index=False):
            half = 0.09 * len(_shorten(name)) + 0.1  # in columns
            free = (i for i, end in enumerate(ends) if end <= x - half)
            row = next(free, len(ends))
            ends[row : row + 1] = [x + half]
            rows[name] = row
    return rows


def _shorten(name: str) -> str:
    """A name without what stands in brackets or behind a slash."""
    return name.partition(" (")[0].partition(" / ")[0]


def _lane_tops(
    lanes: pd.Series, rank: pd.Series, above: Mapping[str, float]
) -> tuple[dict[str, float], float]:
    """The place of each lane's first row of dots, below its rows of names, and the place below."""
    tops, place = {}, 0.0
    for lane in LANES:
        tops[lane] = place + 1.0 * above[lane]
        place = tops[lane] + 2.2 + (rank[lanes == lane].max() // _ACROSS)
    return tops, place


def _add_name(figure: go.Figure, name: str, x: float, dot: float, text: float) -> None:
    """Write a method's name above its dot, with a line between them."""
    line = {"color": GREY, "width": 0.7}
    figure.add_shape(type="line", x0=x, x1=x, y0=dot - 0.35, y1=text + 0.4, line=line)
    figure.add_annotation(text=_shorten(name), x=x, y=text, showarrow=False, font_size=11)


def _label_map(
    figure: go.Figure,
    shown: pd.DataFrame,
    columns: Mapping[str, int],
    tops: Mapping[str, float],
    bottom: float,
) -> None:
    """Write the axes and the key of the map."""
    counts = shown["lane"].value_counts()
    ticks = {
        "tickvals": list(tops.values()),
        "ticktext": [f"{lane}<br>{counts[lane]} methods" for lane in tops],
    }
    first = -1.2
    figure.update_yaxes(**ticks, nticks=None, range=[bottom, first], showgrid=False)
    figure.update_xaxes(tickvals=list(columns.values()), ticktext=list(columns), tickangle=0)
    figure.update_xaxes(title="first version on arXiv: by years, then by the months of 2026")
    teachers = " &nbsp; ".join(
        f'<span style="color:{colour}">●</span> {label}' for label, colour in TEACHERS.values()
    )
    key = f"Who teaches: {teachers}<br>Filled dots with a name run in opdlab."
    figure.add_annotation(
        text=key,
        x=0,
        xref="paper",
        xanchor="left",
        xshift=-140,
        y=1,
        yref="paper",
        yshift=30,
        align="left",
        showarrow=False,
        font_size=11,
    )


class Drawing:
    """An SVG as the output of a cell; freezing adds a picture for pages that strip SVG.

    Args:
        svg: The markup. It may use the colours of the views, such as `var(--opd-teacher-hue)`.
        words: What the drawing says, as text.
    """

    def __init__(self, svg: str, words: str) -> None:
        self.svg, self.words = svg, words

    def __repr__(self) -> str:
        return self.words

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        html = (
            f'<div class="opd">{embed.style(*embed.STYLES)}'
            f'<div class="opd-view"><div class="opd-box">{self.svg}</div></div></div>'
        )
        return {"text/html": html, "text/plain": self.words}


_LOOP_WORDS = """\
Three steps, again and again:
1 the student writes            3 8 + 2 3 = 5 1
2 the teacher grades each token only the 5 is graded down: the teacher wanted a 6 there
3 the student learns            the probability of 5 falls, that of 6 rises"""


def draw_loop() -> Drawing:
    """Draw the loop of on-policy distillation with an example.

    Returns:
        An output for a notebook: the student writes, the teacher grades, the student learns.
    """
    student, teacher = "var(--opd-student-hue)", "var(--opd-teacher-hue)"
    heads = ("1 · The student writes", "2 · The teacher grades", "3 · The student learns")
    hues = (student, teacher, student)
    parts = [_draw_box(20 + 248 * i, head, hues[i]) for i, head in enumerate(heads)]
    parts += [_draw_arrow(f"M{244 + 248 * i} 74 h16") for i in range(2)]
    parts.append(_draw_arrow("M628 132 v22 h-496 v-18"))
    parts.append(_draw_text(380, 172, "new texts with the new weights, in every step", 11))
    text = "3 8 + 2 3 = 5 1".split()
    for i, token in enumerate(text):
        parts.append(_draw_token(38 + 23 * i, 86, token))
        parts.append(_draw_token(286 + 23 * i, 78, token, student if i == 6 else ""))
    parts.append(_draw_text(434, 112, "wanted: 6", 12, teacher))
    for x, token, sign, hue in ((582, "5", "less", student), (674, "6", "more", teacher)):
        parts.append(_draw_token(x - 34, 86, token, hue))
        parts.append(_draw_text(x + 12, 86, sign, 13))
    body = "".join(parts)
    svg = (
        '<svg viewBox="0 0 760 186" role="img" style="display:block;width:100%;max-width:760px"'
        f' fill="currentColor"><title>{_LOOP_WORDS.splitlines()[0]}</title>'
        '<defs><marker id="opd-tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7"'
        ' markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z"/></marker></defs>'
        f"{body}</svg>"
    )
    return Drawing(svg, _LOOP_WORDS)


def _draw_box(x: int, head: str, hue: str) -> str:
    return (
        f'<rect x="{x}" y="16" width="222" height="116" rx="8" fill="none" stroke="{hue}"'
        f' stroke-width="1.5"/>{_draw_text(x + 111, 42, head, 14, hue)}'
    )


def _draw_text(x: int, y: int, text: str, size: int, hue: str = "") -> str:
    readable = f"color-mix(in srgb, {hue} 75%, var(--opd-text))"  # also on a dark page
    fill = f' style="fill:{readable}"' if hue else ""
    return f'<text x="{x}" y="{y}" text-anchor="middle" font-size="{size}"{fill}>{text}</text>'


def _draw_token(x: int, y: int, token: str, hue: str = "") -> str:
    back = (
        f'<rect x="{x}" y="{y - 15}" width="20" height="22" rx="3" fill="{hue}" opacity="0.45"/>'
        if hue
        else ""
    )
    return f'{back}<g font-family="monospace">{_draw_text(x + 10, y, token, 14)}</g>'


def _draw_arrow(path: str) -> str:
    return (
        f'<path d="{path}" fill="none" stroke="currentColor" stroke-width="1.3" opacity="0.6"'
        ' marker-end="url(#opd-tip)"/>'
    )
