"""Axes: the numbers of a trace's tokens that a scatter can be drawn over, each with its scale and a
line to begin with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from opdlab.data.trace import Trace
from opdlab.viz import provenance
from opdlab.viz.channels import Channel, channels, rivals

HEAVY = 8  # times the mean size from which a largest value counts as a tail


@dataclass(frozen=True, eq=False)
class Axis:
    """`values [n]` in `unit`. `start`: where its line lies at first; values from it on are high.

    `scale`: "linear", "log", or "asinh": linear to about `soft` and logarithmic from there, on both
    sides of zero.
    """

    key: str
    label: str
    values: np.ndarray
    unit: str = ""
    scale: str = "linear"
    soft: float = 1.0
    start: float = 0.0
    less: str = ""
    more: str = ""

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the largest finite value, and the start; apart from each other."""
        finite = self.values[np.isfinite(self.values)]
        low, high = (float(f(np.append(finite, self.start))) for f in (np.min, np.max))
        return (low, high) if high > low else (low, low + 1.0)

    def spread(self, values: Any) -> np.ndarray:
        """Values as places from 0 (least) to 1 (largest), as the page draws them; infinities lie at
        the ends.
        """
        low, high = (self._bent(np.array(end)) for end in self.ends)
        return np.clip((self._bent(np.asarray(values, float)) - low) / (high - low), 0, 1)

    def _bent(self, values: np.ndarray) -> np.ndarray:
        if self.scale == "log":
            return np.log(np.maximum(values, 1e-30))
        return np.arcsinh(values / self.soft) if self.scale == "asinh" else values


def axes(trace: Trace) -> dict[str, Axis]:
    """All axes that the trace has columns for: the channels, and the gap, confidence, rank and
    certainty of the first rival.

    `gap` is |log q_T - log q_S| of the sampled token and `confidence` q_S + q_T, as DOPD routes by
    them; where the trace has the gap of DOPD's plan, they are of the two policies that it was taken
    from, and their lines those of that step.
    """
    amounts = [c for c in channels(trace).values() if c.kind in ("ratio", "signed", "amount")]
    found = {c.key: _of_channel(c, _noted(trace).get(c.key)) for c in amounts}
    made = {axis.key: axis for axis in [*_pair(trace), *_sure(trace)]}
    own = (
        {"gap"} if "gap" in found and provenance.gap_of_plan(trace) is None else set()
    )  # a column of that name which means something else
    return found | {key: axis for key, axis in made.items() if key not in own}


def gap_sides(trace: Trace) -> tuple[str, str] | None:
    """Teacher and student of the gap: those of DOPD's plan where its column is there, else the
    first rival and the student.
    """
    first = rivals(trace)[:1]
    graded = first and {"student_logp", f"{first[0]}_logp"} <= set(trace.table.column_names)
    return provenance.gap_of_plan(trace) or ((first[0], "student") if graded else None)


def _pair(trace: Trace) -> list[Axis]:
    sides = gap_sides(trace)
    if sides is None:
        return []
    gap, sure = (
        provenance.gap_between(trace, *sides),
        sum(np.exp(trace.column(f"{name}_logp").astype(float)) for name in sides),
    )
    note = _noted(trace)
    return [
        _of_channel(Channel("gap", "gap", gap, less="agree", more="apart"), note.get("gap")),
        Axis(
            "confidence",
            "confidence q_S + q_T",
            sure,
            start=note.get("confidence", _mean(sure)),
            less="unsure",
            more="sure",
        ),
    ]


def _sure(trace: Trace) -> list[Axis]:
    """How certain the first rival is: its largest probability and the rank that it gives the
    sampled token.
    """
    out, have = [], trace.table.column_names
    for name in rivals(trace)[:1]:
        if f"{name}_top" in have:
            best = np.exp(trace.column(f"{name}_top").astype(float).max(1, initial=-np.inf))
            out.append(
                Axis(
                    "max_p",
                    f"largest p of {name}",
                    best,
                    start=0.5,
                    less="undecided",
                    more="decided",
                )
            )
        if f"{name}_rank" in have:
            rank = trace.column(f"{name}_rank").astype(float)
            out.append(
                Axis(
                    "rank",
                    f"rank by {name}",
                    rank,
                    scale="log",
                    start=2.0,
                    less="favourite",
                    more="far down",
                )
            )
    return out


def _of_channel(channel: Channel, line: float | None) -> Axis:
    """A channel as an axis; its line lies at `line`, else at zero where there are two sides, else
    at the mean.
    """
    size = np.abs(channel.values[np.isfinite(channel.values)])
    mean = _mean(size)
    tail = channel.unit == "nats" or (len(size) > 0 and size.max() > HEAVY * mean)
    start = line if line is not None else 0.0 if channel.kind in ("ratio", "signed") else mean
    return Axis(
        channel.key,
        channel.label,
        channel.values,
        channel.unit,
        "asinh" if tail else "linear",
        min(max(mean, 0.01), 1.0),
        start,
        channel.less,
        channel.more,
    )


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else 0.0


def _noted(trace: Trace) -> dict[str, float]:
    """The means that DOPD routed by, kept in the step's notes."""
    found = provenance.notes_of(trace, "DOPD").get("thresholds", {})
    return {key: float(value) for key, value in found.items() if isinstance(value, (int, float))}
