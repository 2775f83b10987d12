"""Questions about a trace, answered with plain data that programs can read.

`opdlab trace FILE worst --json` prints these answers. Every answer names its `schema` and its
`question`; docs/trace.md describes the fields. No model is loaded.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from opdlab.data.trace import Trace
from opdlab.errors import InvalidValue, OpdlabError, UnknownColumn
from opdlab.support.expect import expect, shortened
from opdlab.support.validation import Count, CountOrZero, Text, Texts, Unchecked, validate_arguments
from opdlab.viz.channel import Channel
from opdlab.viz.channels import find_channels, find_log_probs

SCHEMA = "opdlab.trace/1"
_CONDITION = re.compile(r"\s*(\S(?:.*?\S)?)\s*(>=|<=|!=|==|=|>|<)\s*(.*?)\s*", re.DOTALL)
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    "==": operator.eq,
    "=": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_PLACES = ("sample", "position")  # columns of whole numbers that a condition may name, too


@validate_arguments
def describe(trace: Unchecked[Trace]) -> dict[str, Any]:
    """Say what a trace holds: completions, policies, and every channel with its range.

    Args:
        trace: The trace.

    Returns:
        Plain data: `tokens`, `policies`, `method`, `completions` and `channels`.
    """
    expect(trace, Trace, "describe", "trace")
    samples = trace.column("sample")
    method = trace.meta.get("method") or {}
    return {
        **_head("describe"),
        "tokens": len(trace),
        "policies": trace.policies,
        "method": method.get("name") if isinstance(method, Mapping) else str(method),
        "completions": [
            {
                "sample": i,
                "tokens": int((samples == i).sum()),
                "finish": trace.meta["finish"][i],
                "prompt": trace.meta["prompts"][i],
            }
            for i in range(len(trace.meta["texts"]))
        ],
        "channels": [_describe_channel(channel) for channel in _find_numbers(trace).values()],
    }


@validate_arguments
def worst(
    trace: Unchecked[Trace], by: Text = "", n: Count = 10, context: CountOrZero = 8
) -> dict[str, Any]:
    """Find the tokens where a channel is largest in size.

    Args:
        trace: The trace.
        by: The channel's key; by default the first that has numbers, as `log_ratio`.
        n: The largest number of tokens.
        context: Tokens of text before and after each.

    Returns:
        Plain data: the tokens, largest first, and the share of the channel's sum of sizes that they
        hold.

    Raises:
        UnknownColumn: There is no such channel, or it has no numbers.
    """
    expect(trace, Trace, "worst", "trace")
    channel = _numeric_channel(trace, by)
    size = np.abs(np.asarray(channel.values, float))
    known = np.flatnonzero(~np.isnan(size))
    rows = known[np.argsort(-size[known], kind="stable")][:n]
    finite = np.where(np.isfinite(size), size, 0.0)
    total = finite.sum()
    return {
        **_head("worst"),
        "by": channel.key,
        "unit": channel.unit,
        "share": _plain(finite[rows].sum() / total if total else None),
        "tokens": _describe_tokens(trace, rows, context),
    }


@validate_arguments
def where(
    trace: Unchecked[Trace], conditions: Texts, n: CountOrZero = 50, context: CountOrZero = 8
) -> dict[str, Any]:
    """Find the tokens for which all conditions hold.

    Args:
        trace: The trace.
        conditions: Such as "reverse_kl > 1", "type = number", "token = the", "sample = 3": a
            channel's key, a comparison, and a number or a name.
        n: The largest number of tokens that are listed; all are counted.
        context: Tokens of text before and after each.

    Returns:
        Plain data: the number of tokens, their shares of all tokens and of each channel's sum of
        sizes, and the first `n` of them.

    Raises:
        InvalidValue: A condition cannot be read.
        UnknownColumn: There is no such channel.
    """
    expect(trace, Trace, "where", "trace")
    channels = _find_numbers(trace)
    chosen = np.ones(len(trace), bool)
    for condition in conditions:
        chosen &= _holds(trace, channels, condition)
    rows = np.flatnonzero(chosen)
    return {
        **_head("where"),
        "conditions": list(conditions),
        "count": len(rows),
        "share_of_tokens": _plain(len(rows) / len(trace) if len(trace) else None),
        "share_of": {
            key: _share(channel, chosen)
            for key, channel in channels.items()
            if channel.kind == "amount" and not channel.names and channel.unit in ("nats", "%")
        },
        "tokens": _describe_tokens(trace, rows[:n], context),
    }


@validate_arguments
def compare(
    trace: Unchecked[Trace],
    other: Unchecked[Trace],
    by: Text = "",
    n: Count = 10,
    context: CountOrZero = 8,
) -> dict[str, Any]:
    """Compare two traces channel by channel; token by token where they hold the same tokens.

    Args:
        trace: The first trace, such as one before training.
        other: The second.
        by: The channel by which tokens are listed, as in `worst`.
        n: The largest number of tokens that are listed.
        context: Tokens of text before and after each.

    Returns:
        Plain data: the mean of every shared channel in both, and, where the tokens are the same,
        those whose value changed most.

    Raises:
        UnknownColumn: One of the traces has no such channel.
    """
    expect(trace, Trace, "compare", "trace")
    expect(other, Trace, "compare", "other")
    first, second = _find_numbers(trace), _find_numbers(other)
    is_same = _places(trace) == _places(other)
    means = [
        {
            "key": key,
            "unit": channel.unit,
            "first": _mean(channel),
            "second": _mean(second[key]),
        }
        for key, channel in first.items()
        if key in second and not channel.names
    ]
    changed: list[dict[str, Any]] = []
    chosen = _numeric_channel(trace, by)
    after = _numeric_channel(other, chosen.key)
    if is_same:
        with np.errstate(invalid="ignore"):
            change = np.asarray(after.values, float) - np.asarray(chosen.values, float)
        known = np.flatnonzero(~np.isnan(change))
        rows = known[np.argsort(-np.abs(change[known]), kind="stable")][:n]
        changed = _describe_tokens(trace, rows, context)
        for record, row in zip(changed, rows, strict=True):
            record["first"] = _plain(chosen.values[row])
            record["second"] = _plain(after.values[row])
            record["change"] = _plain(change[row])
    return {
        **_head("compare"),
        "same_tokens": is_same,
        "by": chosen.key,
        "means": means,
        "tokens": changed,
    }


def _head(question: str) -> dict[str, Any]:
    return {"schema": SCHEMA, "question": question}


def _find_numbers(trace: Trace) -> dict[str, Channel]:
    """All channels, and the log-probs that they are made of."""
    return find_channels(trace) | find_log_probs(trace)


def _numeric_channel(trace: Trace, by: str) -> Channel:
    """The channel of a key, or the first; one of names has no size."""
    numeric = {key: one for key, one in _find_numbers(trace).items() if not one.names}
    if not numeric:
        raise OpdlabError(
            "The trace has no numbers to sort by. Make it with opdlab.score(…), or take one of"
            " training: step.trace()."
        )
    key = by or next(iter(numeric))
    if key not in numeric:
        raise UnknownColumn(
            f"The trace has no channel {shortened(key)} of numbers. It has {', '.join(numeric)}."
        )
    return numeric[key]


def read_condition(condition: str, where: str = "where") -> tuple[str, str, str]:
    """Part a condition into a channel's key, a comparison and a value.

    Args:
        condition: Such as "reverse_kl > 1" or "type = number".
        where: The function that was called, for the error.

    Returns:
        The key, one of `>=`, `<=`, `!=`, `==`, `=`, `>`, `<`, and the value as text.

    Raises:
        InvalidValue: It cannot be read.
    """
    found = _CONDITION.fullmatch(condition)
    if not found:
        raise InvalidValue(
            f"{where} got the condition {shortened(condition)}. Use a channel, a comparison and a"
            " value: 'reverse_kl > 1' or 'type = number'."
        )
    key, sign, value = found.groups()
    return key, sign, value


def _holds(trace: Trace, channels: Mapping[str, Channel], condition: str) -> np.ndarray:
    """Mark the tokens that a condition holds for, `[n]`."""
    key, sign, value = read_condition(condition)
    compare = _COMPARISONS[sign]
    if key == "token":
        texts = [piece.decode("utf-8", "replace").strip() for piece in trace.tokens()]
        return _same(np.array(texts, object), value, sign, condition)
    if key in _PLACES:
        return np.asarray(compare(trace.column(key), read_number(value, condition)), bool)
    if key not in channels:
        raise UnknownColumn(
            f"The trace has no channel {shortened(key)}. It has token, sample, position,"
            f" {', '.join(channels)}."
        )
    channel = channels[key]
    if channel.names:
        return _same(np.array(_names(channel), object), value, sign, condition)
    return np.asarray(
        compare(np.asarray(channel.values, float), read_number(value, condition)), bool
    )


def _same(values: np.ndarray, value: str, sign: str, condition: str) -> np.ndarray:
    if sign not in ("=", "==", "!="):
        raise InvalidValue(
            f"where got the condition {shortened(condition)}, which compares names by size. Use ="
            " or !=."
        )
    equal = np.array([one == value for one in values], bool)
    return ~equal if sign == "!=" else equal


def read_number(value: str, condition: str, where: str = "where") -> float:
    """Read the value of a condition as a number.

    Args:
        value: Its text; "inf" and "-inf" are numbers.
        condition: The whole condition, for the error.
        where: The function that was called, for the error.

    Returns:
        The number.

    Raises:
        InvalidValue: It is none.
    """
    try:
        number = float(value.replace("−", "-"))
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise InvalidValue(
            f"{where} got the condition {shortened(condition)}, whose value is no number. Use one,"
            " as in 'reverse_kl > 1'."
        )
    return number


def _names(channel: Channel) -> list[str | None]:
    """The name of every token's value; None for no value."""
    index = np.nan_to_num(np.asarray(channel.values, float), nan=-1).astype(int)
    return [channel.names[i] if 0 <= i < len(channel.names) else None for i in index]


def _share(channel: Channel, chosen: np.ndarray) -> float | str | None:
    size = np.abs(np.asarray(channel.values, float))
    finite = np.where(np.isfinite(size), size, 0.0)
    total = finite.sum()
    return _plain(finite[chosen].sum() / total if total else None)


def _mean(channel: Channel) -> float | str | None:
    values = np.asarray(channel.values, float)
    finite = values[np.isfinite(values)]
    return _plain(finite.mean() if len(finite) else None)


def _places(trace: Trace) -> list[list[int]]:
    return [trace.column(name).tolist() for name in ("sample", "position", "token_id")]


def _describe_channel(channel: Channel) -> dict[str, Any]:
    said: dict[str, Any] = {
        "key": channel.key,
        "label": channel.label,
        "unit": channel.unit,
        "meaning": channel.formula,
        "less": channel.less,
        "more": channel.more,
        "against": channel.against or None,
    }
    values = np.asarray(channel.values, float)
    known = values[~np.isnan(values)]
    said["missing"] = len(values) - len(known)
    if channel.names:
        counts = dict.fromkeys(channel.names, 0)
        for name in _names(channel):
            if name is not None:
                counts[name] += 1
        return said | {"counts": counts}
    finite = known[np.isfinite(known)]
    return said | {
        "mean": _plain(finite.mean() if len(finite) else None),
        "least": _plain(known.min() if len(known) else None),
        "most": _plain(known.max() if len(known) else None),
    }


def _describe_tokens(
    trace: Trace, rows: Sequence[int] | np.ndarray, context: int
) -> list[dict[str, Any]]:
    """A record for each row: its place, its text with that around it, and every channel there."""
    if not len(rows):
        return []
    channels, pieces = _find_numbers(trace), trace.tokens()
    samples, positions = trace.column("sample"), trace.column("position")
    token_ids = trace.column("token_id")
    names = {key: _names(channel) for key, channel in channels.items() if channel.names}
    records = []
    for row in map(int, rows):
        own = np.flatnonzero(samples == samples[row])
        first, last = int(own[0]), int(own[-1])
        records.append(
            {
                "sample": int(samples[row]),
                "position": int(positions[row]),
                "token_id": int(token_ids[row]),
                "token": _text(pieces[row : row + 1]),
                "before": _text(pieces[max(first, row - context) : row]),
                "after": _text(pieces[row + 1 : min(last, row + context) + 1]),
                "values": {
                    key: names[key][row] if key in names else _plain(channel.values[row])
                    for key, channel in channels.items()
                },
            }
        )
    return records


def _text(pieces: Sequence[bytes]) -> str:
    return b"".join(pieces).decode("utf-8", "replace")


def _plain(value: Any) -> float | str | None:
    """A number that JSON can hold: None for no number, a text for an infinite one."""
    if value is None or math.isnan(value):
        return None
    number = float(value)
    if math.isinf(number):
        return "inf" if number > 0 else "-inf"
    return number
