"""Channels: the numbers of a trace that can colour its tokens, each with its unit, its sign and its range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from opdlab.trace import Trace
from opdlab.viz.payload import numbers

_FLOOR = {"nats": 0.1}  # a strip where nothing happens stays pale


@dataclass(frozen=True, eq=False)
class Channel:
    """`values [n]` in `unit`. `kind`: "ratio" (orange - blue), "signed" (grey - violet) or "amount" (violet, from zero).

    `less` and `more` say what the two ends mean; `against` is the policy that the student is compared with, if any.
    """

    key: str
    label: str
    values: np.ndarray
    unit: str = "nats"
    kind: str = "amount"
    less: str = ""
    more: str = ""
    against: str = ""

    @property
    def limit(self) -> float:
        """The size that gets full colour: the 98th percentile, so that one outlier does not pale the rest."""
        size = np.abs(self.values[np.isfinite(self.values)])
        top = float(np.quantile(size, 0.98)) if len(size) else 0.0
        return max(top, _FLOOR.get(self.unit, 0.0)) or 1.0

    def peaks(self, n: int = 5) -> list[int]:
        """The tokens of largest size, largest first; NaN and what is pale do not count."""
        size = np.nan_to_num(np.abs(self.values), nan=0.0, posinf=np.inf)
        return [int(i) for i in np.argsort(-size, kind="stable")[:n] if size[i] > 0.05 * self.limit]


def described(channel: Channel, limit: float) -> dict[str, Any]:
    """A channel as the page reads it (`payload`): its words, the value that gets full colour, its values and peaks."""
    keys = ("key", "label", "unit", "kind", "less", "more", "against")
    return {k: getattr(channel, k) for k in keys} | {"limit": limit, "values": numbers(channel.values), "peaks": channel.peaks()}


def rivals(trace: Trace) -> list[str]:
    """The policies that the student is compared with, in order."""
    return [name for name in trace.policies if name != "student"]


def channels(trace: Trace) -> dict[str, Channel]:
    """All channels that the trace has columns for, by key; those of the first rival carry plain keys (`log_ratio`)."""
    made: list[Channel] = []
    for i, name in enumerate(rivals(trace)):
        made += _against(trace, name, first=i == 0)
    entropies = [Channel(f"{name}_entropy", f"{name} entropy", _numbers(trace, f"{name}_entropy"), less="certain", more="undecided",
                         against="" if name == "student" else name)
                 for name in trace.policies if f"{name}_entropy" in trace.table.column_names]  # fmt: skip
    own = [c for name in _own(trace) if (c := _column(trace, name))]
    return {c.key: c for c in [*made[:2], *entropies, *made[2:], *own]}


def _against(trace: Trace, name: str, first: bool) -> list[Channel]:
    prefix, suffix = ("", "") if first else (f"{name}_", f" · {name}")
    out = []
    if {"student_logp", f"{name}_logp"} <= set(trace.table.column_names):
        with np.errstate(invalid="ignore"):
            gap = _numbers(trace, f"{name}_logp") - _numbers(trace, "student_logp")
        out.append(Channel(f"{prefix}log_ratio", f"log ratio{suffix}", gap, kind="ratio", less="student over-confident",
                           more=f"{name} prefers", against=name))  # fmt: skip
    if f"{name}_reverse_kl" in trace.table.column_names:
        out.append(Channel(f"{prefix}reverse_kl", f"reverse KL{suffix}", _numbers(trace, f"{name}_reverse_kl"),
                           less="agree", more="disagree", against=name))  # fmt: skip
    return out


def _own(trace: Trace) -> list[str]:
    """Columns that say what the method did: loss, share of the gradient, and the plan's."""
    return [name for name in ("loss", "share", *trace.meta.get("plan", [])) if name in trace.table.column_names]


def _column(trace: Trace, name: str) -> Channel | None:
    values = trace.column(name)
    if values.ndim != 1 or values.dtype.kind not in "fiub":
        return None
    if name == "share":
        return Channel(name, "share of gradient", 100.0 * values, "%")
    values, signed = values.astype(float), bool((values < 0).any())
    return Channel(name, name.replace("_", " "), values, "nats" if name == "loss" else "", "signed" if signed else "amount",
                   less="negative" if signed else "", more="positive" if signed else "")  # fmt: skip


def _numbers(trace: Trace, name: str) -> np.ndarray:
    return trace.column(name).astype(float)
