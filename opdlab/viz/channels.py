"""Channels of a trace: the numbers and kinds that can colour its tokens.

They come from the trace's columns: log-probs, entropies and divergences of each policy, kept top
tokens, and columns that a method's plan or a user added. Those are drawn as they describe
themselves (`trace.describe`), and by their values where nobody described them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from opdlab.data.column import Description, Kind
from opdlab.data.trace import Trace
from opdlab.viz import kept, payload
from opdlab.viz.categories import (
    channel_of_codes,
    channel_of_flags,
    channel_of_names,
    channel_of_ranks,
    is_text,
)
from opdlab.viz.channel import Channel, ChannelKind, describe_channel
from opdlab.viz.turns import learned_rows

# Columns that every trace may have, and the numbers that it may have of each policy, such as
# `<policy>_logp`: these are drawn in their own way.
GIVEN = (
    "run",
    "step",
    "sample",
    "prompt",
    "position",
    "token_id",
    "support",
    "grad_norm",
)
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
# Deflated bytes that a page of a text of 10,000 tokens carries, about: 115 kB as base64. Longer
# texts get more.
ROOM = 85_000


def find_channels(trace: Trace) -> dict[str, Channel]:
    """Return all channels that the trace has columns or top tokens for, by key, minor ones last.

    Those of the first rival have plain keys (`log_ratio`), those of the others begin with the
    rival's name (`teacher+hint_log_ratio`).

    Args:
        trace: The trace.

    Returns:
        Channels of `[n]` values, one for each row of the trace.
    """
    compared: list[list[Channel]] = []
    for i, rival in enumerate(find_rivals(trace)):
        compared.append(list(_compare_with(trace, rival, is_first=i == 0)))
    first, rest = compared[:1], compared[1:]
    alone = [_channels_of_policy(trace, name) for name in trace.policies]
    groups = [*first, *alone, *rest, _own_channels(trace)]
    found = [_without_replies(trace, channel) for group in groups for channel in group]
    return {channel.key: channel for channel in sorted(found, key=_is_minor)}


def find_log_probs(trace: Trace) -> dict[str, Channel]:
    """Return the log-probs of the sampled tokens, which no strip shows by themselves.

    Args:
        trace: The trace.

    Returns:
        A channel `<policy>_logp` of each policy that has them, by key.
    """
    have = trace.table.column_names
    return {
        f"{name}_logp": _without_replies(
            trace,
            Channel(
                f"{name}_logp",
                f"log-prob, {name}",
                _numbers(trace, f"{name}_logp"),
                less="unlikely",
                more="likely",
                against="" if name == "student" else name,
                formula=f"log-prob of the sampled token under {name}",
            ),
        )
        for name in trace.policies
        if f"{name}_logp" in have
    }


def _without_replies(trace: Trace, channel: Channel) -> Channel:
    """The channel with NaN where a tool or a user spoke: those numbers are not the student's."""
    learned = learned_rows(trace)
    if learned is None or channel.kind == "category":
        return channel
    return replace(channel, values=np.where(learned, np.asarray(channel.values, float), np.nan))


def find_rivals(trace: Trace) -> list[str]:
    """Return the policies that the student is compared with, in order.

    Args:
        trace: The trace.

    Returns:
        All policies of the trace but "student".
    """
    return [name for name in trace.policies if name != "student"]


def find_kinds(trace: Trace) -> dict[str, Channel]:
    """Return the channels of the trace whose values are names: routes, gates, types, flags.

    Args:
        trace: The trace.

    Returns:
        The channels of kind "category", by key.
    """
    return {
        key: channel for key, channel in find_channels(trace).items() if channel.kind == "category"
    }


def find_labelled_kinds(trace: Trace) -> dict[str, Channel]:
    """Return the kinds whose names stand in a column's description, as those of a method's plan.

    Args:
        trace: The trace.

    Returns:
        Those of `find_kinds` whose column describes its labels, by key.
    """
    kinds = find_kinds(trace)
    return {key: kind for key, kind in kinds.items() if trace.describe(key).labels}


def describe_fitting(
    found: Mapping[str, Channel],
    limits: Mapping[str, float],
    keep: Sequence[str] = (),
    spent: int = 0,
) -> list[dict[str, Any]]:
    """Describe the channels that a page has room for, as the page reads them.

    All channels of a short text; of a long one as many as fit into `ROOM`, the first ones first.

    Args:
        found: The channels, by key.
        limits: The size that gets full colour, by key.
        keep: Keys that are carried in any case.
        spent: Bytes of `ROOM` that something else takes.

    Returns:
        The channels that fit, in their order, each as `describe_channel` gives it.
    """
    out = []
    for key, channel in found.items():
        described = describe_channel(channel, limits[key])
        cost = (
            payload.measure_cost(described["values"]) if len(channel.values) > payload.LONG else 0
        )
        if spent + cost <= ROOM * max(1.0, len(channel.values) / 10_000) or key in keep:
            out.append(described)
            spent += cost
    return out


def _is_minor(channel: Channel) -> bool:
    return channel.minor


def _compare_with(trace: Trace, rival: str, is_first: bool) -> Iterator[Channel]:
    """The student compared with one rival.

    T and S are the two distributions at a position, y the token sampled there.
    """
    prefix, suffix = ("", "") if is_first else (f"{rival}_", f" · {rival}")
    have = set(trace.table.column_names)
    if {"student_logp", f"{rival}_logp"} <= have:
        with np.errstate(invalid="ignore"):
            log_ratio = _numbers(trace, f"{rival}_logp") - _numbers(trace, "student_logp")
        yield Channel(
            f"{prefix}log_ratio",
            f"log ratio{suffix}",
            log_ratio,
            kind="ratio",
            less="student over-confident",
            more=f"{rival} prefers",
            against=rival,
            formula="log T(y) − log S(y), y the sampled token",
        )
    yield from _divergences(trace, rival, prefix, suffix)
    if {"student_entropy", f"{rival}_entropy"} <= have:
        yield Channel(
            f"{prefix}entropy_gap",
            f"ΔH{suffix}",
            _numbers(trace, f"{rival}_entropy") - _numbers(trace, "student_entropy"),
            kind="signed",
            less=f"{rival} surer",
            more="student surer",
            against=rival,
            formula="H(T) − H(S)",
            minor=True,
        )
    if f"{rival}_rank" in have:
        ranks = trace.column(f"{rival}_rank")
        yield channel_of_ranks(f"{prefix}rank", f"{rival} rank", ranks, against=rival, minor=True)
    if f"{rival}_overlap" in have or kept.has_top(trace, "student", rival):
        is_exact = f"{rival}_overlap" in have
        shared = _numbers(trace, f"{rival}_overlap") if is_exact else kept.overlap(trace, rival)
        yield Channel(
            f"{prefix}overlap",
            f"top-k overlap{suffix}",
            100 * shared,
            unit="%",
            fixed=100.0,
            less="none shared",
            more="all shared",
            against=rival,
            formula=f"share of {rival}'s top k that the student's top k has too",
            minor=True,
        )


def _divergences(trace: Trace, rival: str, prefix: str, suffix: str) -> Iterator[Channel]:
    """The divergences to one rival that the trace has, exact or bounded from below."""
    for key, label, formula in (
        ("reverse_kl", "reverse KL", "KL(S ‖ T)"),
        ("forward_kl", "forward KL", "KL(T ‖ S)"),
        ("jsd", "JSD", "½ KL(S ‖ M) + ½ KL(T ‖ M), M = ½ S + ½ T"),
    ):
        values, how = _divergence(trace, rival, key)
        if values is not None:
            yield Channel(
                prefix + key,
                label + suffix,
                values,
                less="agree",
                more="disagree",
                against=rival,
                formula=formula + how,
                minor=key != "reverse_kl",
            )


def _divergence(trace: Trace, rival: str, key: str) -> tuple[np.ndarray | None, str]:
    """The exact column, else a coarse one, else a bound from the kept top tokens.

    With it goes how it was found, where it is not exact.
    """
    have = trace.table.column_names
    if f"{rival}_{key}" in have:
        return _numbers(trace, f"{rival}_{key}"), ""
    if f"{rival}_coarse_{key}" in have:
        how = ", on the tokens that the teacher told: a lower bound"
        return _numbers(trace, f"{rival}_coarse_{key}"), how
    if not kept.has_top(trace, "student", rival):
        return None, ""
    student, teacher = kept.coarse(trace, "student"), kept.coarse(trace, rival)
    how = ", on the kept top tokens and one bucket: a lower bound"
    if key == "reverse_kl":
        return kept.kl(student, teacher), how
    if key == "forward_kl":
        return kept.kl(teacher, student), how
    return kept.jsd(student, teacher), how


def _channels_of_policy(trace: Trace, name: str) -> list[Channel]:
    """The numbers of one policy alone."""
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


def _own_channels(trace: Trace) -> list[Channel]:
    """Loss, share of the gradient, the plan's columns, and further columns by name."""
    have = trace.table.column_names
    known = [name for name in ("loss", "share", *trace.meta.get("plan", [])) if name in have]
    # Strips show turns, and who wrote them, in a way of their own.
    shown = {"turn", "learn"} if learned_rows(trace) is not None else set()
    added = [name for name in have if not _is_given(trace, name) and name not in shown]
    found = (_channel_of_column(trace, name) for name in dict.fromkeys([*known, *added]))
    return [channel for channel in found if channel is not None]


def _is_given(trace: Trace, name: str) -> bool:
    """Tell whether a column is drawn in a way of its own, or not at all."""
    return name in GIVEN or any(
        name == f"{policy}_{number}" for policy in trace.policies for number in NUMBERS
    )


def _channel_of_column(trace: Trace, name: str) -> Channel | None:
    """A column as it describes itself, else by its values; None for lists and for no values."""
    kind, said = trace.table[name].type, trace.describe(name)
    if is_text(kind):
        return channel_of_names(name, trace.table[name].to_pylist(), said)
    values = trace.column(name)
    if pa.types.is_boolean(kind) or (said.kind is Kind.FLAG and values.ndim == 1):
        return channel_of_flags(name, trace.table[name].to_pylist(), said)
    if values.ndim != 1 or values.dtype.kind not in "fiu":
        return None
    codes = channel_of_codes(name, values, said) if said.labels else None
    return codes or _channel_of_numbers(trace, name, values.astype(float), said)


def _channel_of_numbers(trace: Trace, name: str, values: np.ndarray, said: Description) -> Channel:
    if name == "share":
        formula = "the token's part of all gradient norms"
        return Channel(name, "share of gradient", 100.0 * values, "%", formula=formula)
    is_signed = said.kind is Kind.SIGNED or (said.kind is None and bool((values < 0).any()))
    kind: ChannelKind = "signed" if is_signed else "amount"
    rival = said.compares[0] if said.compares else ""
    return Channel(
        name,
        said.label or name.replace("_", " "),
        values,
        said.unit or ("nats" if name == "loss" else ""),
        kind,
        less=said.less or ("negative" if is_signed else ""),
        more=said.more or ("positive" if is_signed else ""),
        against=rival if rival in find_rivals(trace) else "",
        formula=said.description,
    )


def _numbers(trace: Trace, name: str) -> np.ndarray:
    return trace.column(name).astype(float)
