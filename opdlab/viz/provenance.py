"""Which method made the columns and notes of a trace, so that a name alone never gives a column a
meaning or a colour.

`Step.trace()` marks a trace with the class whose plan made its columns (`trace.planner_of`). Traces
that were written before there was a mark count as a method's only if the values show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from opdlab.data.trace import Trace

# What a note of each method holds: by name, the keys of each entry of a list, or of the note
# itself.
_NOTES: dict[str, dict[str, tuple[str, ...]]] = {
    "DOPD": {"thresholds": ("gap", "confidence")},
    "TOPD": {
        "windows": ("sample", "position", "student", "teacher", "distance"),
        "topd": ("threshold",),
    },
    "OmniOPD": {
        "audits": (
            "sample",
            "start",
            "length",
            "text",
            "continuations",
            "similarity",
            "prior",
            "weight",
        )
    },
    "SpanOPD": {"spans": ("sample", "teacher", "spans", "kl")},
}


def is_planned_by(trace: Trace, method: str) -> bool:
    """Whether the plan of opdlab's `method` ("DOPD", …) made the columns that this trace lists as
    planned.
    """
    mark = trace.meta.get("method")
    if isinstance(mark, Mapping):
        planner = str(mark.get("planner", ""))
        return planner.startswith("opdlab.") and planner.rpartition(".")[2] == method
    return _shows(trace, method)


def notes_of(trace: Trace, method: str) -> dict[str, Any]:
    """The notes that opdlab's `method` left in this trace, by name; nothing of what others have
    noted under these names.
    """
    found = trace.meta.get("notes")
    if not isinstance(found, Mapping) or (
        "method" in trace.meta and not is_planned_by(trace, method)
    ):
        return {}
    return {
        name: found[name]
        for name, keys in _NOTES[method].items()
        if name in found and _has_shape(found[name], keys)
    }


def gap_of_plan(trace: Trace) -> tuple[str, str] | None:
    """The two policies that a column `gap` is between, as DOPD plans it, found by its values; None
    for any other column.
    """
    columns = trace.table.column_names
    if (
        "gap" not in columns
        or "teacher+hint_logp" not in columns
        or "teacher+hint" not in trace.policies
    ):
        return None
    gap = trace.column("gap")
    if gap.dtype.kind not in "fiu" or gap.ndim != 1:
        return None
    others = [
        name for name in trace.policies if name != "teacher+hint" and f"{name}_logp" in columns
    ]
    is_same = lambda name: np.allclose(
        gap_between(trace, "teacher+hint", name), gap, atol=1e-5, equal_nan=True
    )
    return next((("teacher+hint", name) for name in others if is_same(name)), None)


def gap_between(trace: Trace, teacher: str, student: str) -> np.ndarray:
    """`|log q_T - log q_S|` of the sampled tokens, `[rows]`; 0 where both rule a token out."""
    with np.errstate(invalid="ignore"):
        gap = np.abs(
            trace.column(f"{teacher}_logp").astype(float) - trace.column(f"{student}_logp")
        )
    return np.nan_to_num(gap, nan=0.0, posinf=np.inf)


def _shows(trace: Trace, method: str) -> bool:
    """Whether a trace without a mark shows by its values that a method planned it."""
    planned = set(trace.meta.get("plan", []))
    if method == "DOPD":
        return {"route", "gap"} <= planned and gap_of_plan(trace) is not None
    if method == "TOPD":
        return {"divergent", "window_distance"} <= planned and "topd" in notes_of(trace, method)
    if method == "OmniOPD":
        return {"audited", "weight", "similarity"} <= planned and "audits" in notes_of(
            trace, method
        )
    return False  # one column of zeros and ones (EOPD's `gated`) shows nothing


def _has_shape(note: Any, keys: tuple[str, ...]) -> bool:
    entries = note if isinstance(note, list) else [note]
    return all(isinstance(entry, Mapping) and set(keys) <= set(entry) for entry in entries)
