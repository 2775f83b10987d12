"""Regimes: which tokens a routing rule touches, as a scatter of two numbers cut into quadrants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from opdlab.data.trace import Trace
from opdlab.errors import OpdlabError, UnknownColumn
from opdlab.support.expect import expect
from opdlab.support.validation import Text, Thresholds, Unchecked, validate_arguments
from opdlab.viz import markup, payload
from opdlab.viz.amounts import find_amounts
from opdlab.viz.axes import Axis, find_axes
from opdlab.viz.channel import Channel
from opdlab.viz.channels import find_rivals
from opdlab.viz.glyphs import show_piece
from opdlab.viz.grouping import Grouping, find_groupings
from opdlab.viz.made_up import make_trace
from opdlab.viz.traits import Trait
from opdlab.viz.view import EXAMPLE_TOKENS, EXAMPLE_WORDS, View

if TYPE_CHECKING:
    from typing_extensions import Self

EXACT = 5000  # tokens up to which the page gets single precision
# As they lie in the picture.
QUADRANTS = ("low x, high y", "high x, high y", "low x, low y", "high x, low y")
WIDE, HIGH = 48, 30  # cells of the picture that needs no script


class Regimes(View):
    """All tokens of a trace as points, two lines to drag, and what each quadrant holds.

    Args:
        trace: The trace.
        x: The horizontal axis, a key of `find_axes`: `log_ratio`, `gap`, `confidence`,
            `reverse_kl`, an entropy, `max_p`, `rank`, or any plan column. Where there is no
            `log_ratio`, the first axis takes its place.
        y: The vertical axis.
        thresholds: Places of the lines, by axis. The others begin at the threshold that the plan
            describes, else at zero or the mean.
        by: The column that groups the points, a key of `find_groupings`, such as a method's routes
            or `type`; by default the first there is, "" for none.
        title: The title above.

    Attributes:
        x: The key of the horizontal axis.
        y: The key of the vertical axis.
        by: The column that groups the points.
        thresholds: The place of each axis' line.
        hidden: Names of groups that are not drawn.
        region: The brushed region, [x low, x high, y low, y high]; [] for nothing.
        brush: In the text that is looked at, the runs of brushed rows: [first, last, first, last,
            …].
        trace: The trace.

    Raises:
        OpdlabError: The trace has no numbers.
        UnknownColumn: There is no such axis or grouping.
    """

    caption = "Which tokens does a routing rule touch?"
    name, scripts, styles = "regimes", ("regimes.js",), ("regimes.css",)
    x = Trait("log_ratio")
    y = Trait("confidence")
    by = Trait("")
    thresholds = Trait({})
    hidden = Trait([])
    region = Trait([])

    @validate_arguments
    def __init__(
        self,
        trace: Unchecked[Trace],
        x: Text = "log_ratio",
        y: Text = "confidence",
        thresholds: Thresholds | None = None,
        by: Text | None = None,
        title: Text = "",
    ) -> None:
        super().__init__()
        expect(trace, Trace, type(self).__name__, "trace")
        self.trace, self.title = trace, title
        if not self.axes:
            raise OpdlabError(
                "The trace has no numbers to draw. Make it with opdlab.score(…), or take one of"
                " training: step.trace()."
            )
        # A default that is not there gives way to another axis.
        spare = [key for key in self.axes if key not in (x, y)] or list(self.axes)
        wanted = {"x": x if x in self.axes or x != "log_ratio" else spare.pop(0)}
        wanted["y"] = y if y in self.axes or y != "confidence" else (spare or list(self.axes))[0]
        lines = {key: axis.start for key, axis in self.axes.items()}
        for name in [*wanted.values(), *(thresholds or {})]:
            if name not in self.axes:
                raise UnknownColumn(
                    f"The trace has no axis {name!r}. It has {', '.join(self.axes)}."
                )
        if by and by not in self.groupings:
            raise UnknownColumn(
                f"Nothing sorts the tokens by {by!r}. There is"
                f" {', '.join(self.groupings) or 'nothing that does'}."
            )
        self.x, self.y = wanted["x"], wanted["y"]
        self.thresholds = lines | {key: float(value) for key, value in (thresholds or {}).items()}
        self.by = next(iter(self.groupings), "") if by is None else by

    @classmethod
    def fits(cls, given: object, sample: int = 0) -> bool:
        """Return whether `given` is a trace with tokens, of a student and another policy.

        Args:
            given: Anything.
            sample: Not used: the view shows all completions.

        Returns:
            Whether the view can be made of it.
        """
        return isinstance(given, Trace) and bool(find_rivals(given)) and len(given) > 0

    @classmethod
    def of_trace(cls, trace: Trace, sample: int = 0) -> Self:
        """Make the scatter of all tokens of a trace.

        Args:
            trace: A trace that the view fits.
            sample: Not used: the view shows all completions.

        Returns:
            The view.
        """
        return cls(trace)

    @classmethod
    def example(cls, tokens: Sequence[bytes] = EXAMPLE_TOKENS, words: str = EXAMPLE_WORDS) -> Self:
        """Make the scatter of one completion whose tokens all have the type `words`.

        Args:
            tokens: The bytes of the completion's tokens.
            words: All other texts: title, prompt, names.

        Returns:
            The view.
        """
        trace = make_trace(tokens, prompt=words, finish=words)
        return cls(trace.with_columns(type=[words] * len(tokens)), title=words)

    @cached_property
    def axes(self) -> dict[str, Axis]:
        """The axes of the trace, by key."""
        return find_axes(self.trace)

    @cached_property
    def groupings(self) -> dict[str, Grouping]:
        """The columns that group the tokens, by name."""
        return find_groupings(self.trace)

    @property
    def df(self) -> pd.DataFrame:
        """The trace's rows with `token`, `x`, `y`, `quadrant` and `kind`.

        `kind` is the name of the token's group; `quadrant` is "" where a number is missing.
        """
        x, y = self._values(self.x), self._values(self.y)
        right, up = x >= self.thresholds[self.x], y >= self.thresholds[self.y]
        quadrant = np.where(
            np.isnan(x) | np.isnan(y), "", np.array(QUADRANTS)[np.where(up, 0, 2) + right]
        )
        kind: list[str] | str = ""
        if self.by in self.groupings:
            grouping = self.groupings[self.by]
            kind = [grouping.names[i] for i in grouping.index]
        tokens = [show_piece(piece) for piece in self.trace.tokens()]
        return self.trace.to_pandas().assign(token=tokens, x=x, y=y, quadrant=quadrant, kind=kind)

    @property
    def quadrants(self) -> pd.DataFrame:
        """The tokens shown in each quadrant, and their shares of tokens, KL and gradient, in %."""
        return _count_quadrants(self._select_shown(), find_amounts(self.trace))

    @property
    def picked(self) -> pd.DataFrame:
        """The rows of `df` inside the brushed region."""
        if not self.region:
            return self.df.iloc[:0]
        df = self._select_shown()
        in_x = df["x"].clip(*self.axes[self.x].ends).between(*self.region[:2])
        in_y = df["y"].clip(*self.axes[self.y].ends).between(*self.region[2:])
        return df[in_x & in_y]

    def data(self) -> dict[str, Any]:
        """Return all that the script draws.

        Returns:
            Plain data and numpy arrays, as `static/regimes.js` reads them.
        """
        drawn = np.float32 if len(self.trace) <= EXACT else np.float16
        with np.errstate(over="ignore"):
            described = [
                {
                    "key": a.key,
                    "label": a.label,
                    "unit": a.unit,
                    "scale": a.scale,
                    "soft": a.soft,
                    "start": a.start,
                    "ends": list(a.ends),
                    "less": a.less,
                    "more": a.more,
                    "values": a.values.astype(drawn),
                }
                for a in self.axes.values()
            ]
        grouped = [
            {"key": g.key, "names": g.names, "hues": g.hues, "index": g.index}
            for g in self.groupings.values()
        ]
        amounts = {key: values.astype(drawn) for key, values in find_amounts(self.trace).items()}
        return {
            "title": self.title,
            "text": payload.describe_text(self.trace),
            "axes": described,
            "sorts": grouped,
            "amounts": amounts,
        }

    def static(self) -> str:
        """Return the picture as HTML without a script.

        Returns:
            Markup with the scatter and its quadrants; every foreign string in it is escaped.
        """
        x, y = self.axes[self.x], self.axes[self.y]
        head = markup.escape(f"{_title_axis(y)} over {_title_axis(x)}, {len(self.trace):,} tokens")
        return (
            f"{markup.draw_title(self.title)}"
            f'<div class="opd-bar"><span>{head}</span></div>'
            f'<div class="opd-stage">{_draw_picture(x, y, self.thresholds)}</div>'
            f'<div class="opd-still">{_draw_rows(self.quadrants)}</div>'
            + "".join(
                f'<div class="opd-soft">{markup.escape(line)}</div>' for line in self._groups()
            )
        )

    def __repr__(self) -> str:
        head = (
            f"Regimes: {self.title + ', ' if self.title else ''}{len(self.trace)} tokens by"
            f" {self.x} and {self.y}"
        )
        lines = (
            f"lines at {markup.format_number(self.thresholds[self.x])} and"
            f" {markup.format_number(self.thresholds[self.y])}"
        )
        rows = [
            f"{name:<14} {', '.join(_list_shares(row))}" for name, row in self.quadrants.iterrows()
        ]
        bars = markup.draw_sparkline(Channel("", "", self._values(self.x)))
        along = f"{bars} {self.axes[self.x].label} along the tokens"
        return "\n".join([f"{head}, {lines}", along, *rows, *self._groups()])

    def _groups(self) -> list[str]:
        """A line with the number of tokens in each group, in the words of the column; or none."""
        if not self.by:
            return []
        counts = self.df["kind"].value_counts()
        names = [name for name in self.groupings[self.by].names if name in counts.index]
        return [f"by {self.by}: " + " · ".join(f"{name} {counts[name]:,}" for name in names)]

    def _values(self, key: str) -> np.ndarray:
        if key not in self.axes:
            raise UnknownColumn(f"The trace has no axis {key!r}. It has {', '.join(self.axes)}.")
        return self.axes[key].values

    def _select_shown(self) -> pd.DataFrame:
        df = self.df
        return df[~df["kind"].isin(self.hidden)] if self.hidden else df


def _count_quadrants(df: pd.DataFrame, amounts: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Count tokens and sum amounts by quadrant; tokens without a quadrant count nowhere."""
    df = df.assign(**{key: values[df.index] for key, values in amounts.items()})
    df = df[df["quadrant"] != ""]
    sums = df.groupby("quadrant")[list(amounts)].sum().reindex(QUADRANTS).fillna(0.0)
    tokens = df["quadrant"].value_counts().reindex(QUADRANTS).fillna(0).astype(int)
    shares = {f"of {key}": _percent(sums[key]) for key in amounts}
    return pd.DataFrame({"tokens": tokens, "of tokens": _percent(tokens), **shares})


def _percent(column: pd.Series) -> pd.Series:
    return 100.0 * column / (column.sum() or 1.0)


def _list_shares(row: Any) -> list[str]:
    names = {"of tokens": "of tokens", "of kl": "of KL", "of gradient": "of gradient"}
    return [
        f"{markup.format_number(row[key])} % {name}" for key, name in names.items() if key in row
    ]


def _draw_rows(table: pd.DataFrame) -> str:
    cells = (
        f"<div><b>{name}</b> {' · '.join(_list_shares(row))}</div>"
        for name, row in table.iterrows()
    )
    return "".join(cells)


def _title_axis(axis: Axis) -> str:
    return f"{axis.label}{f' ({axis.unit})' if axis.unit else ''}"


def _draw_picture(x: Axis, y: Axis, lines: Mapping[str, float]) -> str:
    """The density of the points in cells, and the two lines, as SVG."""
    there = ~(np.isnan(x.values) | np.isnan(y.values))
    column = np.minimum((x.spread(x.values[there]) * WIDE).astype(int), WIDE - 1)
    row = np.minimum((y.spread(y.values[there]) * HIGH).astype(int), HIGH - 1)
    count = np.zeros((WIDE, HIGH))
    np.add.at(count, (column, row), 1)
    strong = np.sqrt(count / (count.max() or 1.0))
    marks = "".join(
        f'<rect x="{i}" y="{HIGH - 1 - j}" width="1" height="1" fill="rgb(138,111,192)"'
        f' fill-opacity="{0.15 + 0.85 * strong[i, j]:.2f}"/>'
        for i, j in np.argwhere(count > 0)
    )
    right = WIDE * float(x.spread(lines[x.key]))
    down = HIGH * (1 - float(y.spread(lines[y.key])))
    stroke = 'stroke="#808080" stroke-width="0.15"'
    return (
        f'<svg viewBox="0 0 {WIDE} {HIGH}" width="100%" style="max-height:320px">{marks}'
        f'<line x1="{right:.2f}" x2="{right:.2f}" y1="0" y2="{HIGH}" {stroke}/>'
        f'<line y1="{down:.2f}" y2="{down:.2f}" x1="0" x2="{WIDE}" {stroke}/></svg>'
    )
