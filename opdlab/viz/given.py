"""Check what a view was given: completions that are there, traces by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opdlab.data.trace import Trace
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.support.expect import expect, shortened


def check_traces(value: Any, where: str, example: str, kinds: tuple[type, ...] = (Trace,)) -> None:
    """Check a dict of traces.

    Args:
        value: The value that the user passed.
        where: The view, for the error.
        example: A right value as code, for the error.
        kinds: The classes that its entries may have.

    Raises:
        InvalidValue: It is no dict, or holds something else.
    """
    if not isinstance(value, Mapping):
        raise InvalidValue(
            f"{where} got {shortened(value)}. Give traces by name or step, as {example}."
        )
    for name, trace in value.items():
        if not isinstance(trace, kinds):
            expect(trace, Trace, where, f"{{{name!r}: …}}")


def select_completion(trace: Trace, sample: int, of: str = "The trace") -> Trace:
    """Return the rows of one completion, which has tokens unless its text is empty.

    Args:
        trace: The trace.
        sample: The completion's number.
        of: The trace in words, for the error.

    Returns:
        A trace of this completion alone.

    Raises:
        OpdlabError: The trace does not have it, or has no row of it.
    """
    texts = trace.meta["texts"]
    if not 0 <= sample < len(texts):
        raise OpdlabError(
            f"{of} has completions 0 to {len(texts) - 1}, not {sample}. Give sample=0 up to"
            f" {len(texts) - 1}."
        )
    rows = trace.sample(sample) if len(trace) else trace
    if not len(rows) and texts[sample]:
        held = ", ".join(map(str, sorted(set(trace.column("sample").tolist()))))
        raise OpdlabError(
            f"{of} holds no row of completion {sample}, only of {held or 'none'}. Give sample="
            " one of these."
        )
    return rows
