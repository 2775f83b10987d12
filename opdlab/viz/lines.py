"""Lines over steps as SVG: the half of `static/lines.js` that needs no script, with its look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opdlab.viz.markup import escape, format_number

POINTS = 300  # a line is thinned to about as many
# Of lines; the last three are dashed, each in its own way.
HUES = ("teacher", "student", "amount", "green", "pink", "grey")


@dataclass(frozen=True, eq=False)
class Line:
    """Values over steps.

    Attributes:
        name: The line's name.
        x: Steps.
        y: Values; a gap where one is not finite.
        look: One of `HUES`.
        kind: "line", "faint" (raw values under a mean), "dots" (few values) or "dash".
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    look: str = "amount"
    kind: str = "line"


@dataclass(frozen=True, eq=False)
class Plot:
    """Lines on one scale, with a heading in words.

    Attributes:
        key: The number's name.
        label: Its name for people.
        lines: The lines.
        unit: Their unit.
        told: The words beside the heading.
        x: Least and largest step.
        y: Least and largest value.
        marks: (step, sign) of vertical marks, such as alarms; a mark without a sign has no flag.
    """

    key: str
    label: str
    lines: Sequence[Line]
    unit: str = ""
    told: str = ""
    x: tuple[float, float] = (0.0, 1.0)
    y: tuple[float, float] = (0.0, 1.0)
    marks: Sequence[tuple[float, str]] = field(default_factory=list)

    def data(self) -> dict[str, Any]:
        """Return the plot as `static/lines.js` reads it.

        Returns:
            Plain data and numpy arrays in single precision.
        """
        lines = [
            {
                "name": s.name,
                "x": s.x.astype(np.float32),
                "y": s.y.astype(np.float32),
                "look": s.look,
                "kind": s.kind,
            }
            for s in self.lines
        ]
        return {
            "key": self.key,
            "label": self.label,
            "unit": self.unit,
            "told": self.told,
            "x": list(self.x),
            "y": list(self.y),
            "marks": [list(m) for m in self.marks],
            "lines": lines,
        }

    def _draw(self, line: Line) -> str:
        path = draw_path(line, self.x, self.y)
        return f'<path class="opd-l opd-l-{line.look} opd-l-{line.kind}" d="{path}"/>'

    def html(self) -> str:
        """Return the plot as HTML: numbers and escaped words.

        Returns:
            A `<figure>` that needs the style sheet `lines.css`.
        """
        almost = (self.y[1] - self.y[0]) / 1000
        low, top = (format_number(0.0 if abs(end) < almost else end) for end in self.y)
        first, last = (f"{x:g}".replace("-", "−") for x in self.x)
        drawn = "".join(self._draw(line) for line in self.lines)
        flagged = [(_at(x, self.x), sign) for x, sign in self.marks if sign]
        flags = "".join(
            f'<span class="opd-lp-flag" style="left:{at:.2f}%">{escape(sign)}</span>'
            for at, sign in flagged
        )
        rules = "".join(
            f'<path class="opd-lp-mark" d="M{_at(x, self.x):.2f} 0V100"/>' for x, _ in self.marks
        )
        label = escape(self.label)
        return (
            f'<figure class="opd-plot"><figcaption><b>{label}</b>'
            f' <span class="opd-soft">{escape(self.told)}</span></figcaption>'
            '<div class="opd-lp-box">'
            f'<span class="opd-lp-y">{top}</span><span class="opd-lp-y opd-lp-low">{low}</span>'
            '<div class="opd-lp-area">'
            '<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img"'
            f' aria-label="{label}">'
            f'<path class="opd-lp-grid" d="{GRID}"/>{rules}{drawn}</svg>{flags}</div>'
            f'<span class="opd-lp-x">{first}</span><span class="opd-lp-x opd-lp-last">{last}</span>'
            "</div></figure>"
        )


GRID = "M0 0H100M0 50H100M0 100H100"


def draw_path(line: Line, x: tuple[float, float], y: tuple[float, float]) -> str:
    """Return the SVG path of a line, in hundredths of the box.

    It has gaps where a value is not finite, and a dot where a value stands alone.

    Args:
        line: The line.
        x: The steps at the left and the right edge of the box.
        y: The values at the lower and the upper edge of the box.

    Returns:
        The `d` of an SVG path.
    """
    out, pen = [], False
    for a, b in zip(line.x.tolist(), line.y.tolist(), strict=True):
        if not math.isfinite(b):
            pen = False
            continue
        point = f"{_at(a, x):.2f} {100 - _at(b, y):.2f}"
        out.append(f"L{point}" if pen and line.kind != "dots" else f"M{point}h0")
        pen = True
    return "".join(out)


def find_range(arrays: Sequence[np.ndarray], zero: bool = False) -> tuple[float, float]:
    """Return the range of all finite values, made wider where they are all the same.

    Args:
        arrays: `[n]` values each; NaN and infinities do not count.
        zero: Whether the range reaches down to zero in any case.

    Returns:
        The least and the largest value; 0 and 1 where there is none.
    """
    finite = np.concatenate([a[np.isfinite(a)] for a in arrays]) if arrays else np.zeros(0)
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    low = min(low, 0.0) if zero else low
    return (
        (low, high) if high > low else (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))
    )


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a line with at most `POINTS` points and its two ends.

    Of each stretch the least and the largest value stay, so that peaks survive.

    Args:
        x: `[n]` steps.
        y: `[n]` values; gaps where they are not finite.

    Returns:
        The steps and the values that stay.
    """
    if len(x) <= POINTS:
        return x, y
    keep = {0, len(x) - 1}
    for piece in np.array_split(np.arange(len(x)), POINTS // 2):
        values = y[piece]
        if np.isfinite(values).any():
            keep |= {int(piece[np.nanargmin(values)]), int(piece[np.nanargmax(values)])}
    rows = np.array(sorted(keep))
    return x[rows], y[rows]


def _at(value: float, ends: tuple[float, float]) -> float:
    """Return the place of a value between the ends, in percent."""
    return 100.0 * min(1.0, max(0.0, (value - ends[0]) / ((ends[1] - ends[0]) or 1.0)))
