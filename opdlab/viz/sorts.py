"""Sorts: what parts the tokens of a trace into a few groups, such as a method's routes and gates,
or ground-truth types.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from opdlab.data.trace import Trace
from opdlab.methods.dopd import Route
from opdlab.viz import provenance

MOST = 12  # groups that can be told apart
FIRST = ("route", "divergent", "audited", "gated", "type")  # what sorts at first, where it is there
_ROUTES = {
    int(Route.LH): "LH agree, sure",
    int(Route.LL): "LL agree, unsure",
    int(Route.HT): "HT teacher leads",
    int(Route.HS): "HS student leads",
    -1: "none",
}
_FORKS = ("no candidate", "false alarm", "real fork")
# What a column's numbers mean where the method planned it; a column of the same name of somebody
# else keeps its numbers.
_MEANT = {
    "route": ("DOPD", _ROUTES),
    "audited": ("OmniOPD", {0: "anchored", 1: "audited"}),
    "gated": ("EOPD", {0: "reverse KL alone", 1: "gated: forward KL too"}),
    "divergent": ("TOPD", {}),
}
_HUES = {
    "HT teacher leads": "teacher",
    "HS student leads": "student",
    "LH agree, sure": "amount",
    "LL agree, unsure": "minus",
}


@dataclass(frozen=True, eq=False)
class Sort:
    """`names` of the groups and, for each token, which it is in:

    `index [n]`. `hues`: a side's colour, or "" for one of its own.
    """

    key: str
    names: list[str]
    index: np.ndarray
    hues: list[str]


def sorts(trace: Trace) -> dict[str, Sort]:
    """All that can sort the tokens: columns of the plan and `type`, with 2 to `MOST` different
    values.
    """
    columns = [
        name for name in ("type", *trace.meta.get("plan", [])) if name in trace.table.column_names
    ]
    found = {name: made for name in columns if (made := _of(trace, name))}
    order = [
        *(name for name in FIRST if name in found),
        *(name for name in found if name not in FIRST),
    ]
    return {name: found[name] for name in order}


def _of(trace: Trace, name: str) -> Sort | None:
    values = trace.column(name)
    if values.ndim != 1 or not len(values):
        return None
    if values.dtype.kind == "f" and (np.isnan(values).any() or (values != np.rint(values)).any()):
        return None
    method, meant = _MEANT.get(name, ("", {}))
    is_meant = (
        bool(method)
        and name in trace.meta.get("plan", [])
        and provenance.is_planned_by(trace, method)
    )
    if is_meant and name == "divergent":
        words = _forks(trace, values)
        names = [word for word in _FORKS if word in words]
    else:
        words = [_word(value, meant if is_meant else {}) for value in values.tolist()]
        if (
            name == "type" or values.dtype.kind not in "fiub"
        ):  # the commonest first, else as the values go
            names = [word for word, _ in Counter(words).most_common()]
        else:
            names = list(dict.fromkeys(words[i] for i in np.argsort(values, kind="stable")))
    if not 1 < len(names) <= MOST:
        return None
    place = {word: i for i, word in enumerate(names)}
    hues = [_HUES.get(word, "") if is_meant and name == "route" else "" for word in names]
    return Sort(name, names, np.array([place[word] for word in words]), hues)


def _word(value: object, meant: Mapping[int, str]) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return meant.get(int(value), f"{int(value)}")
    return str(value)


def _forks(trace: Trace, values: np.ndarray) -> list[str]:
    """TOPD's column says which tokens are real forks; its window distance, which were candidates at
    all.
    """
    tried = (
        ~np.isnan(trace.column("window_distance"))
        if "window_distance" in trace.table.column_names
        else values > 0
    )
    return [_FORKS[i] for i in np.where(values > 0, 2, tried.astype(int))]
