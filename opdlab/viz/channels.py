"""Channels: the numbers and kinds of a trace that can colour its tokens, each with its unit, its
sign, its range and formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from opdlab.data.trace import Trace
from opdlab.viz import categories, kept, payload, provenance

# Columns that every trace may have, and the numbers that it may have of each policy, as
# `<policy>_logp`: drawn in their own way.
GIVEN = ("run", "step", "sample", "prompt", "position", "token_id", "support", "grad_norm")
NUMBERS = (
    "logp",
    "entropy",
    "rank",
    "top",
    "tail",
    "overlap",
    "reverse_kl",
    "forward_kl",
    "jsd",
    "coarse_reverse_kl",
    "coarse_forward_kl",
    "coarse_jsd",
)
_FLOOR = {"nats": 0.1}  # a strip where nothing happens stays pale
# deflated bytes that a page of a text of 10,000 tokens carries, about: 115 kB as base64; of longer
# ones more
ROOM = 85_000


@dataclass(frozen=True, eq=False)
class Channel:
    """`values [n]` in `unit`.

    `kind`: "ratio" (orange - blue), "signed" (grey - violet), "amount" (violet, from zero),
    "ordinal" or "category" (values index `names`, NaN for none; `marks` are their letters, so that
    colour is never alone).

    `less` and `more` say what the two ends mean; `against` is the policy that the student is
    compared with, if any; `formula` says in one line what it is; `fixed` gets full colour, instead
    of the 98th percentile. `minor`: offered under "more".
    """

    key: str
    label: str
    values: np.ndarray
    unit: str = "nats"
    kind: str = "amount"
    less: str = ""
    more: str = ""
    against: str = ""
    formula: str = ""
    fixed: float = 0.0
    minor: bool = False
    names: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()

    @property
    def limit(self) -> float:
        """The size that gets full colour: the 98th percentile, so that one outlier does not pale
        the rest.
        """
        if self.names or self.fixed:
            return self.fixed or max(1.0, len(self.names) - 1.0)
        size = np.abs(self.values[np.isfinite(self.values)])
        top = float(np.quantile(size, 0.98)) if len(size) else 0.0
        return max(top, _FLOOR.get(self.unit, 0.0)) or 1.0

    def peaks(self, n: int = 5) -> list[int]:
        """The tokens of largest size, largest first; NaN and what is pale do not count, and kinds
        have none.
        """
        if self.kind == "category":
            return []
        size = np.nan_to_num(np.abs(self.values), nan=0.0, posinf=np.inf)
        return [int(i) for i in np.argsort(-size, kind="stable")[:n] if size[i] > 0.05 * self.limit]


def described(channel: Channel, limit: float) -> dict[str, Any]:
    """A channel as the page reads it (`payload`): its words, the value that gets full colour, its
    values and peaks.

    Kinds travel as small integers, -1 for none; minor channels of long texts in the 16 steps that
    colours have.
    """
    keys = (
        "key",
        "label",
        "unit",
        "kind",
        "less",
        "more",
        "against",
        "formula",
        "minor",
        "names",
        "marks",
    )
    return {k: getattr(channel, k) for k in keys} | {
        "limit": limit,
        "values": _drawn(channel, limit),
        "peaks": channel.peaks(),
    }


def fitting(
    found: Mapping[str, Channel],
    limits: Mapping[str, float],
    keep: Sequence[str] = (),
    spent: int = 0,
) -> list[dict[str, Any]]:
    """The channels, described, that a page has room for: all of a short text; of a long one those
    that fit, the first ones first.

    keep: keys that are carried in any case. spent: bytes of `ROOM` that something else takes.
    """
    out = []
    for key, channel in found.items():
        made = described(channel, limits[key])
        cost = payload.cost(made["values"]) if len(channel.values) > payload.LONG else 0
        if spent + cost <= ROOM * max(1.0, len(channel.values) / 10_000) or key in keep:
            out.append(made)
            spent += cost
    return out


def rivals(trace: Trace) -> list[str]:
    """The policies that the student is compared with, in order."""
    return [name for name in trace.policies if name != "student"]


def channels(trace: Trace) -> dict[str, Channel]:
    """All channels that the trace has columns or top tokens for, by key, minor ones last.

    Those of the first rival carry plain keys (`log_ratio`), those of others the rival's name
    (`teacher+hint_log_ratio`).
    """
    made = [_against(trace, name, first=i == 0) for i, name in enumerate(rivals(trace))]
    first, rest = made[0] if made else [], [c for some in made[1:] for c in some]
    entropies = [c for name in trace.policies for c in _alone(trace, name)]
    found = [c for c in [*first, *entropies, *rest, *_own(trace)] if c is not None]
    return {c.key: c for c in sorted(found, key=lambda c: c.minor)}


def _drawn(channel: Channel, limit: float) -> np.ndarray:
    if channel.names:
        return np.nan_to_num(channel.values, nan=-1).astype(int)
    return (
        payload.coarser(channel.values, limit) if channel.minor else payload.numbers(channel.values)
    )


def _against(trace: Trace, name: str, first: bool) -> list[Channel | None]:
    """What the student is to one rival.

    T and S are the two distributions at a position, y the token sampled there.
    """
    prefix, suffix = ("", "") if first else (f"{name}_", f" · {name}")
    have, minor = set(trace.table.column_names), partial(Channel, against=name, minor=True)

    def divergence(
        key: str, label: str, formula: str, kind: Callable[..., Channel]
    ) -> Channel | None:
        values, how = _divergence(trace, name, key)
        return (
            None
            if values is None
            else kind(
                prefix + key,
                label + suffix,
                values,
                less="agree",
                more="disagree",
                formula=formula + how,
            )
        )

    out: list[Channel | None] = []
    if {"student_logp", f"{name}_logp"} <= have:
        with np.errstate(invalid="ignore"):
            gap = _numbers(trace, f"{name}_logp") - _numbers(trace, "student_logp")
        out.append(
            Channel(
                f"{prefix}log_ratio",
                f"log ratio{suffix}",
                gap,
                kind="ratio",
                less="student over-confident",
                more=f"{name} prefers",
                against=name,
                formula="log T(y) − log S(y), y the sampled token",
            )
        )
    out.append(divergence("reverse_kl", "reverse KL", "KL(S ‖ T)", partial(Channel, against=name)))
    out.append(divergence("forward_kl", "forward KL", "KL(T ‖ S)", minor))
    out.append(divergence("jsd", "JSD", "½ KL(S ‖ M) + ½ KL(T ‖ M), M = ½ S + ½ T", minor))
    if {"student_entropy", f"{name}_entropy"} <= have:
        gap = _numbers(trace, f"{name}_entropy") - _numbers(trace, "student_entropy")
        out.append(
            minor(
                f"{prefix}entropy_gap",
                f"ΔH{suffix}",
                gap,
                kind="signed",
                less=f"{name} surer",
                more="student surer",
                formula="H(T) − H(S)",
            )
        )
    if f"{name}_rank" in have:
        out.append(
            categories.ranked(minor, f"{prefix}rank", f"{name} rank", trace.column(f"{name}_rank"))
        )
    if kept.has_top(trace, "student", name) or f"{name}_overlap" in have:
        shared = (
            _numbers(trace, f"{name}_overlap")
            if f"{name}_overlap" in have
            else kept.overlap(trace, name)
        )
        out.append(
            minor(
                f"{prefix}overlap",
                f"top-k overlap{suffix}",
                100 * shared,
                unit="%",
                fixed=100.0,
                less="none shared",
                more="all shared",
                formula=f"share of {name}'s top k that the student's top k has too",
            )
        )
    return out


def _divergence(trace: Trace, name: str, key: str) -> tuple[np.ndarray | None, str]:
    """The exact column, else a coarse one, else what the kept top tokens say; and how it came about
    where it is not exact.
    """
    columns = trace.table.column_names
    if f"{name}_{key}" in columns:
        return _numbers(trace, f"{name}_{key}"), ""
    if f"{name}_coarse_{key}" in columns:
        return (
            _numbers(trace, f"{name}_coarse_{key}"),
            ", on the tokens that the teacher told: a lower bound",
        )
    if not kept.has_top(trace, "student", name):
        return None, ""
    student, rival = kept.coarse(trace, "student"), kept.coarse(trace, name)
    how = {"reverse_kl": kept.kl, "forward_kl": lambda s, t: kept.kl(t, s), "jsd": kept.jsd}[key]
    return how(student, rival), ", on the kept top tokens and one bucket: a lower bound"


def _alone(trace: Trace, name: str) -> list[Channel]:
    """What one policy is by itself."""
    out, against = [], "" if name == "student" else name
    if f"{name}_entropy" in trace.table.column_names:
        out.append(
            Channel(
                f"{name}_entropy",
                f"{name} entropy",
                _numbers(trace, f"{name}_entropy"),
                less="certain",
                more="undecided",
                against=against,
                formula=f"H of {name} over the vocabulary",
            )
        )
    if f"{name}_tail" in trace.table.column_names:
        out.append(
            Channel(
                f"{name}_tail",
                f"{name} tail mass",
                100 * _numbers(trace, f"{name}_tail"),
                "%",
                less="all kept",
                more="much not kept",
                against=against,
                formula="mass outside of the kept tokens",
                minor=True,
            )
        )
    return out


def _own(trace: Trace) -> list[Channel | None]:
    """What the method did and what the user added: loss, share of the gradient, the plan's columns,
    further columns by name.
    """
    known = [
        name
        for name in ("loss", "share", *trace.meta.get("plan", []))
        if name in trace.table.column_names
    ]
    added = [name for name in trace.table.column_names if not _is_given(trace, name)]
    return [_column(trace, name) for name in dict.fromkeys([*known, *added])]


def _is_given(trace: Trace, name: str) -> bool:
    return name in GIVEN or any(
        name == f"{policy}_{number}" for policy in trace.policies for number in NUMBERS
    )


def _column(trace: Trace, name: str) -> Channel | None:
    """A column as a channel, with the values that it holds; codes of a method are named where that
    method made them.
    """
    kind = trace.table[name].type
    if categories.is_text(kind):
        return categories.of_names(Channel, name, trace.table[name].to_pylist())
    if pa.types.is_boolean(kind):
        return categories.of_flags(Channel, name, trace.table[name].to_pylist())
    values = trace.column(name)
    if values.ndim != 1 or values.dtype.kind not in "fiu":
        return None
    for method, named in categories.CODES.items():
        if (
            name in named
            and name in trace.meta.get("plan", [])
            and provenance.is_planned_by(trace, method)
        ):
            return categories.of_codes(
                Channel, name, values, named[name], categories.MEANINGS.get(name, "")
            )
    if name == "share":
        return Channel(
            name,
            "share of gradient",
            100.0 * values,
            "%",
            formula="the token's part of all gradient norms",
        )
    values, signed = values.astype(float), bool((values < 0).any())
    return Channel(
        name,
        name.replace("_", " "),
        values,
        "nats" if name == "loss" else "",
        "signed" if signed else "amount",
        less="negative" if signed else "",
        more="positive" if signed else "",
    )


def _numbers(trace: Trace, name: str) -> np.ndarray:
    return trace.column(name).astype(float)
