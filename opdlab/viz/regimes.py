"""Regimes: which tokens a routing rule touches, as a scatter of two numbers cut into quadrants."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from opdlab.data.trace import Trace
from opdlab.errors import OpdlabError, UnknownColumn
from opdlab.support.expect import expect
from opdlab.viz import markup, payload
from opdlab.viz.axes import Axis, axes, gap_sides
from opdlab.viz.channels import Channel
from opdlab.viz.glyphs import visible
from opdlab.viz.sorts import Sort, sorts
from opdlab.viz.view import Trait, View

EXACT = 5000  # tokens up to which the page gets single precision
QUADRANTS = (
    "low x, high y",
    "high x, high y",
    "low x, low y",
    "high x, low y",
)  # as they lie in the picture
WIDE, HIGH = 48, 30  # cells of the picture that needs no script


class Regimes(View):
    """Which tokens does a routing rule touch?

    All tokens of a trace as points, two lines to drag, and what each quadrant holds.

    x, y: keys of `axes` (`log_ratio`, `gap`, `confidence`, `reverse_kl`, entropies, `max_p`,
        `rank`, any plan column);
    `log_ratio` gives way to the first there is. thresholds: where the lines lie, by axis; the
    others begin at DOPD's means of the step where the trace has them, else at zero or the mean. by:
    what sorts the points, a key of `sorts` (`route`, `gated`, `audited`, `divergent`, `type`); the
    first there is by default, "" for none. Raises UnknownColumn for a key that is not there.

    Traits: `x`, `y`, `by`, `thresholds` {axis: value}, `hidden` (names of groups), and `region` [x
        low, x high, y low, y high],
    what is brushed ([]: nothing). `quadrants` is the table, `picked` the brushed rows of `df`. In
    the text that is looked at, `brush` becomes the runs of picked rows, [first, last, first, last,
    …].
    """

    name, scripts, styles = "regimes", ("regimes.js",), ("regimes.css",)
    x = Trait("log_ratio")
    y = Trait("confidence")
    by = Trait("")
    thresholds = Trait({})
    hidden = Trait([])
    region = Trait([])

    def __init__(
        self,
        trace: Trace,
        x: str = "log_ratio",
        y: str = "confidence",
        thresholds: Mapping[str, float] | None = None,
        by: str | None = None,
        title: str = "",
    ) -> None:
        super().__init__()
        expect(trace, Trace, type(self).__name__, "trace")
        self.trace, self.title = trace, title
        if not self.axes:
            raise OpdlabError(
                "The trace has no numbers to draw. Make it with opdlab.score(…), or take one of"
                " training: step.trace()."
            )
        spare = [key for key in self.axes if key not in (x, y)] or list(
            self.axes
        )  # what stands in for a default that is not there
        wanted = {"x": x if x in self.axes or x != "log_ratio" else spare.pop(0)}
        wanted["y"] = y if y in self.axes or y != "confidence" else (spare or list(self.axes))[0]
        lines = {key: axis.start for key, axis in self.axes.items()}
        for name in [*wanted.values(), *(thresholds or {})]:
            if name not in self.axes:
                raise UnknownColumn(
                    f"The trace has no axis {name!r}. It has {', '.join(self.axes)}."
                )
        if by and by not in self.sorts:
            raise UnknownColumn(
                f"Nothing sorts the tokens by {by!r}. There is"
                f" {', '.join(self.sorts) or 'nothing that does'}."
            )
        self.x, self.y = wanted["x"], wanted["y"]
        self.thresholds = lines | {key: float(value) for key, value in (thresholds or {}).items()}
        self.by = next(iter(self.sorts), "") if by is None else by

    @cached_property
    def axes(self) -> dict[str, Axis]:
        return axes(self.trace)

    @cached_property
    def sorts(self) -> dict[str, Sort]:
        return sorts(self.trace)

    @property
    def df(self) -> pd.DataFrame:
        """The trace's rows with `token`, the two numbers `x` and `y`, the `quadrant` ("" where a
        number is missing) and the `kind`.
        """
        x, y = self._values(self.x), self._values(self.y)
        right, up = x >= self.thresholds[self.x], y >= self.thresholds[self.y]
        quadrant = np.where(
            np.isnan(x) | np.isnan(y), "", np.array(QUADRANTS)[np.where(up, 0, 2) + right]
        )
        kind = (
            [self.sorts[self.by].names[i] for i in self.sorts[self.by].index]
            if self.by in self.sorts
            else ""
        )
        tokens = [visible(piece) for piece in self.trace.tokens()]
        return self.trace.to_pandas().assign(token=tokens, x=x, y=y, quadrant=quadrant, kind=kind)

    @property
    def quadrants(self) -> pd.DataFrame:
        """What each quadrant holds of the tokens that are shown:

        `tokens`, and shares of tokens, `kl` and `gradient`, in percent.
        """
        return _table(self._shown(), self._amounts())

    @property
    def picked(self) -> pd.DataFrame:
        """The rows of `df` inside the brushed region."""
        if not self.region:
            return self.df.iloc[:0]
        df = self._shown()
        inside = [
            df[name].clip(*self.axes[key].ends).between(*ends)
            for name, key, ends in (("x", self.x, self.region[:2]), ("y", self.y, self.region[2:]))
        ]
        return df[inside[0] & inside[1]]

    def data(self) -> dict[str, Any]:
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
        sorted_by = [
            {"key": k.key, "names": k.names, "hues": k.hues, "index": k.index}
            for k in self.sorts.values()
        ]
        amounts = {key: values.astype(drawn) for key, values in self._amounts().items()}
        return {
            "title": self.title,
            "text": payload.text(self.trace),
            "axes": described,
            "sorts": sorted_by,
            "amounts": amounts,
        }

    def static(self) -> str:
        title = markup.title(self.title)
        x, y = self.axes[self.x], self.axes[self.y]
        head = markup.safe(f"{_named(y)} over {_named(x)}, {len(self.trace):,} tokens")
        return (
            f'{title}<div class="opd-bar"><span>{head}</span></div><div'
            f' class="opd-stage">{_picture(x, y, self.thresholds)}</div><div'
            f' class="opd-still">{_rows(self.quadrants)}</div>'
        )

    def __repr__(self) -> str:
        head = (
            f"Regimes: {self.title + ', ' if self.title else ''}{len(self.trace)} tokens by"
            f" {self.x} and {self.y}"
        )
        lines = (
            f"lines at {markup.number(self.thresholds[self.x])} and"
            f" {markup.number(self.thresholds[self.y])}"
        )
        rows = [f"{name:<14} {', '.join(_shares(row))}" for name, row in self.quadrants.iterrows()]
        bars = markup.sparkline(Channel("", "", self._values(self.x)))
        return "\n".join(
            [f"{head}, {lines}", f"{bars} {self.axes[self.x].label} along the tokens", *rows]
        )

    def _values(self, key: str) -> np.ndarray:
        if key not in self.axes:
            raise UnknownColumn(f"The trace has no axis {key!r}. It has {', '.join(self.axes)}.")
        return self.axes[key].values

    def _shown(self) -> pd.DataFrame:
        df = self.df
        return df[~df["kind"].isin(self.hidden)] if self.hidden else df

    def _amounts(self) -> dict[str, np.ndarray]:
        """What a token has of the total:

        `kl` to the teacher of the gap, and the `gradient`, where the trace has them.
        """
        out, have = {}, self.trace.table.column_names
        sides = gap_sides(self.trace)
        if sides and f"{sides[0]}_reverse_kl" in have:
            kl = self.trace.column(f"{sides[0]}_reverse_kl").astype(float)
            finite = kl[np.isfinite(kl)]
            out["kl"] = np.clip(
                np.nan_to_num(kl, posinf=finite.max(initial=1.0)), 0, None
            )  # an infinite one must not be all there is
        if "share" in have:
            out["gradient"] = self.trace.column("share").astype(float)
        return out


def _table(df: pd.DataFrame, amounts: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Tokens without a quadrant count nowhere, also not in what the shares are of."""
    df = df.assign(**{key: values[df.index] for key, values in amounts.items()})
    df = df[df["quadrant"] != ""]
    sums = df.groupby("quadrant")[list(amounts)].sum().reindex(QUADRANTS).fillna(0.0)
    tokens = df["quadrant"].value_counts().reindex(QUADRANTS).fillna(0).astype(int)
    share = lambda column: 100.0 * column / (column.sum() or 1.0)
    return pd.DataFrame(
        {
            "tokens": tokens,
            "of tokens": share(tokens),
            **{f"of {key}": share(sums[key]) for key in amounts},
        }
    )


def _shares(row: Any) -> list[str]:
    names = {"of tokens": "of tokens", "of kl": "of KL", "of gradient": "of gradient"}
    return [f"{markup.number(row[key])} % {name}" for key, name in names.items() if key in row]


def _rows(table: pd.DataFrame) -> str:
    cells = (
        f"<div><b>{name}</b> {' · '.join(_shares(row))}</div>" for name, row in table.iterrows()
    )
    return "".join(cells)


def _named(axis: Axis) -> str:
    return f"{axis.label}{f' ({axis.unit})' if axis.unit else ''}"


def _picture(x: Axis, y: Axis, lines: Mapping[str, float]) -> str:
    """The density of the points in cells, and the two lines, as a small drawing of numbers alone."""
    there = ~(np.isnan(x.values) | np.isnan(y.values))
    cells = [
        np.minimum((axis.spread(axis.values[there]) * n).astype(int), n - 1)
        for axis, n in ((x, WIDE), (y, HIGH))
    ]
    count = np.zeros((WIDE, HIGH))
    np.add.at(count, tuple(cells), 1)
    strong = np.sqrt(count / (count.max() or 1.0))
    marks = "".join(
        f'<rect x="{i}" y="{HIGH - 1 - j}" width="1" height="1" fill="rgb(138,111,192)"'
        f' fill-opacity="{0.15 + 0.85 * strong[i, j]:.2f}"/>'
        for i, j in np.argwhere(count > 0)
    )
    right, up = (float(axis.spread(lines[axis.key])) for axis in (x, y))
    stroke = 'stroke="#808080" stroke-width="0.15"'
    return (
        f'<svg viewBox="0 0 {WIDE} {HIGH}" width="100%" style="max-height:320px">{marks}<line'
        f' x1="{WIDE * right:.2f}" x2="{WIDE * right:.2f}" y1="0" y2="{HIGH}" {stroke}/><line'
        f' y1="{HIGH * (1 - up):.2f}" y2="{HIGH * (1 - up):.2f}" x1="0" x2="{WIDE}"'
        f" {stroke}/></svg>"
    )
