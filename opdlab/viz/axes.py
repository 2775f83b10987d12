"""Axes: the numbers of a trace's tokens that a scatter can be drawn over.

Each axis has its scale and the place at which its line begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from opdlab.data.trace import Trace
from opdlab.viz.channel import Channel
from opdlab.viz.channels import find_channels, find_rivals

HEAVY = 8  # times the mean size from which a largest value counts as a tail


@dataclass(frozen=True, eq=False)
class Axis:
    """One number per token, and how a scatter spreads it.

    Attributes:
        key: The name in `find_axes`.
        label: The name that people read.
        values: `[n]`, in `unit`.
        unit: Such as "nats"; "" for plain numbers.
        scale: "linear", "log", or "asinh": linear to about `soft` and logarithmic from there, on
            both sides of zero.
        soft: See `scale`.
        start: The place of the axis' line at first; values from it on are high.
        less: The meaning of small values.
        more: The meaning of large values.
    """

    key: str
    label: str
    values: np.ndarray
    unit: str = ""
    scale: Literal["linear", "log", "asinh"] = "linear"
    soft: float = 1.0
    start: float = 0.0
    less: str = ""
    more: str = ""

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the largest of the finite values and the start, apart from each other."""
        finite = np.append(self.values[np.isfinite(self.values)], self.start)
        low, high = float(finite.min()), float(finite.max())
        return (low, high) if high > low else (low, low + 1.0)

    def spread(self, values: Any) -> np.ndarray:
        """Return values as places from 0 (least) to 1 (largest), as the page draws them.

        Infinities lie at the ends.

        Args:
            values: Numbers of any shape, in the axis' unit.

        Returns:
            Places of the same shape.
        """
        low, high = (self._bend(np.array(end)) for end in self.ends)
        return np.asarray(
            np.clip((self._bend(np.asarray(values, float)) - low) / (high - low), 0, 1)
        )

    def _bend(self, values: np.ndarray) -> np.ndarray:
        if self.scale == "log":
            return np.asarray(np.log(np.maximum(values, 1e-30)))
        return np.asarray(np.arcsinh(values / self.soft)) if self.scale == "asinh" else values


def find_axes(trace: Trace) -> dict[str, Axis]:
    """Return all axes that the trace has columns for, by key.

    The channels that are numbers, with their line at the threshold that the plan describes; and
    `gap`, `confidence`, `max_p` and `rank` of the first rival where no column has that name. `gap`
    is |log q_T − log q_S| of the sampled token, `confidence` q_S + q_T (see `compared_sides`).

    Args:
        trace: The trace.

    Returns:
        The axes by key, `[n]` values each; empty for a trace without numbers.
    """
    found = {}
    for channel in find_channels(trace).values():
        if channel.kind in ("ratio", "signed", "amount"):
            line = trace.describe(channel.key).threshold
            found[channel.key] = _axis_of_channel(channel, line)
    for axis in [*_axes_of_pair(trace), *_axes_of_certainty(trace)]:
        found.setdefault(axis.key, axis)
    return found


def find_sides(trace: Trace) -> tuple[str, str] | None:
    """Return the teacher's and the student's side of `gap` and `confidence`.

    The two policies that the plan's first comparing column compares, else the first rival and the
    student; None where the trace has not the log-probs of both.

    Args:
        trace: The trace.

    Returns:
        (teacher, student) by name, or None.
    """
    have = trace.table.column_names
    described = [trace.describe(name).compares for name in trace.meta.get("columns", {})]
    usual = [(rival, "student") for rival in find_rivals(trace)[:1]]
    for sides in [*described, *usual]:
        if sides is not None and all(f"{name}_logp" in have for name in sides):
            return sides
    return None


def _axes_of_pair(trace: Trace) -> Iterator[Axis]:
    """The distance and the sum of two policies' probabilities of the sampled token."""
    sides = find_sides(trace)
    if sides is None:
        return
    teacher, student = (trace.column(f"{name}_logp").astype(float) for name in sides)
    with np.errstate(invalid="ignore"):
        gap = np.nan_to_num(np.abs(teacher - student), nan=0.0, posinf=np.inf)
    yield _axis_of_channel(
        Channel("gap", "gap", gap, less="agree", more="apart"), trace.describe("gap").threshold
    )
    confidence = np.exp(teacher) + np.exp(student)
    line = trace.describe("confidence").threshold
    yield Axis(
        "confidence",
        "confidence q_S + q_T",
        confidence,
        start=_mean(confidence) if line is None else line,
        less="unsure",
        more="sure",
    )


def _axes_of_certainty(trace: Trace) -> Iterator[Axis]:
    """The first rival's largest probability, and the rank that it gives the sampled token."""
    have = trace.table.column_names
    for name in find_rivals(trace)[:1]:
        if f"{name}_top" in have:
            yield Axis(
                "max_p",
                f"largest p of {name}",
                np.exp(trace.column(f"{name}_top").astype(float).max(1, initial=-np.inf)),
                start=0.5,
                less="undecided",
                more="decided",
            )
        if f"{name}_rank" in have:
            yield Axis(
                "rank",
                f"rank by {name}",
                trace.column(f"{name}_rank").astype(float),
                scale="log",
                start=2.0,
                less="favourite",
                more="far down",
            )


def _axis_of_channel(channel: Channel, line: float | None) -> Axis:
    """A channel as an axis.

    Its line is at `line`, else at zero where there are two sides, else at the mean.
    """
    size = np.abs(channel.values[np.isfinite(channel.values)])
    mean = _mean(size)
    if line is None:
        line = 0.0 if channel.kind in ("ratio", "signed") else mean
    has_tail = channel.unit == "nats" or (len(size) > 0 and size.max() > HEAVY * mean)
    return Axis(
        channel.key,
        channel.label,
        channel.values,
        channel.unit,
        "asinh" if has_tail else "linear",
        soft=min(max(mean, 0.01), 1.0),
        start=line,
        less=channel.less,
        more=channel.more,
    )


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else 0.0
