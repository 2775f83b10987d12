"""Groupings: columns that part the tokens of a trace into a few groups.

Such as a method's routes and gates, or ground-truth types.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from opdlab.data.column import Description, Kind
from opdlab.data.trace import Trace
from opdlab.viz.categories import are_codes

MOST = 12  # groups that can be told apart
NONE = "none"  # the group of tokens without a label


@dataclass(frozen=True, eq=False)
class Grouping:
    """The group of every token.

    Attributes:
        key: The column.
        names: The names of the groups.
        index: `[n]`, the place in `names` of each token's group.
        hues: A colour for each group: "student", "teacher", "amount", "minus", or "" for one of
            its own.
    """

    key: str
    names: list[str]
    index: np.ndarray
    hues: list[str]


def find_groupings(trace: Trace) -> dict[str, Grouping]:
    """Return the columns with 2 to `MOST` groups, by name.

    First the columns that describe their labels, then `type`, then the plan's other columns.

    Args:
        trace: The trace.

    Returns:
        Groupings of all rows of the trace, by column.
    """
    have = trace.table.column_names
    labelled = [name for name in have if trace.describe(name).labels]
    candidates = dict.fromkeys([*labelled, "type", *trace.meta.get("plan", [])])
    found = {name: _group(trace, name) for name in candidates if name in have}
    return {name: grouping for name, grouping in found.items() if grouping is not None}


def _group(trace: Trace, name: str) -> Grouping | None:
    """Group the tokens by a column; None where its values are not few."""
    values, said = trace.column(name), trace.describe(name)
    if values.ndim != 1 or not len(values):
        return None
    if said.labels and are_codes(values, len(said.labels)):
        return _group_by_labels(name, values, said)
    if values.dtype.kind == "f" and (np.isnan(values).any() or (values != np.rint(values)).any()):
        return None
    words = [_word(value, said) for value in values.tolist()]
    if name == "type" or values.dtype.kind not in "fiub":
        names = [word for word, _ in Counter(words).most_common()]
    else:  # numbers in their order
        names = list(dict.fromkeys(words[i] for i in np.argsort(values, kind="stable")))
    return _grouping(name, words, names, [""] * len(names))


def _group_by_labels(name: str, values: np.ndarray, said: Description) -> Grouping | None:
    """Group by the labels of a description, in their order; tokens without one come last."""
    known = np.nan_to_num(values.astype(float), nan=-1).astype(int)
    words = [said.labels[code] if code >= 0 else NONE for code in known.tolist()]
    hues = dict(zip(said.labels, said.hues or [""] * len(said.labels), strict=True))
    names = [label for label in dict.fromkeys([*said.labels, NONE]) if label in words]
    return _grouping(name, words, names, [hues.get(label, "") for label in names])


def _grouping(key: str, words: list[str], names: list[str], hues: list[str]) -> Grouping | None:
    if not 1 < len(names) <= MOST:
        return None
    place = {word: i for i, word in enumerate(names)}
    return Grouping(key, names, np.array([place[word] for word in words]), hues)


def _word(value: object, said: Description) -> str:
    if value is None:
        return NONE
    if isinstance(value, bool) or said.kind is Kind.FLAG:
        return "yes" if value else "no"
    return f"{int(value)}" if isinstance(value, (int, float)) else str(value)
