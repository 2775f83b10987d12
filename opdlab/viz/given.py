"""Check that a view of several traces was given them by name or step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opdlab.data.trace import Trace
from opdlab.errors import InvalidValue
from opdlab.support.expect import expect, shortened


def given_traces(value: Any, where: str, example: str, kinds: tuple[type, ...] = (Trace,)) -> None:
    """Check a dict of traces.

    Raises:
        InvalidValue: It is no dict, or holds something else; the message shows `example`.
    """
    if not isinstance(value, Mapping):
        raise InvalidValue(
            f"{where} got {shortened(value)}. Give traces by name or step, as {example}."
        )
    for name, trace in value.items():
        if not isinstance(trace, kinds):
            expect(trace, Trace, where, f"{{{name!r}: …}}")
