"""Check that a view was given what it draws, and say how to get it otherwise."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from opdlab.errors import InvalidValue
from opdlab.trace import Trace
from opdlab.validation import shortened

_TRACE = "Use a Trace, as opdlab.score(rollout, student, teacher), step.trace() or Trace.load('….parquet') gives."
_FROM = {
    "Rollout": "That is a rollout. Grade it first: opdlab.score(rollout, student, teacher).",
    "Step": "That is one step of a run. Take its trace: step.trace().",
    "Run": "That is a training run. Take the trace of its last step, run.last.trace(), or draw it with RunBoard(run).",
}


def given_trace(value: Any, where: str, name: str = "trace") -> Trace:
    """Return `value` if it is a trace.

    Raises:
        InvalidValue: It is something else, as a rollout, a step or a path.
    """
    if isinstance(value, Trace):
        return value
    if isinstance(value, (str, os.PathLike)):
        how = f"Read it: Trace.load({shortened(os.fspath(value))})."
    else:
        how = _FROM.get(type(value).__name__, _TRACE)
    raise InvalidValue(f"{where} got {name}={shortened(value)}. {how}")


def given_traces(value: Any, where: str, example: str, kinds: tuple[type, ...] = (Trace,)) -> None:
    """Check a dict of traces.

    Raises:
        InvalidValue: It is no dict, or holds something else; the message shows `example`.
    """
    if not isinstance(value, Mapping):
        raise InvalidValue(f"{where} got {shortened(value)}. Give traces by name or step, as {example}.")
    for name, trace in value.items():
        if not isinstance(trace, kinds):
            given_trace(trace, where, f"{{{name!r}: …}}")
