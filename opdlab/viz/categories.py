"""Kinds of tokens: names and small codes as channels, each with a letter of its own, so that colour
never stands alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from opdlab.viz.channels import Channel

MOST = 8  # kinds that get a colour of their own; the rest are one
REST = "other"
# What small integers in a column mean, by the method that planned it; the same name means nothing
# in a column of another's.
CODES: dict[str, dict[str, tuple[str, ...]]] = {
    "DOPD": {"route": ("LH", "LL", "HT", "HS")},  # as `opdlab.methods.dopd.Route`; -1 is none
    "EOPD": {"gated": ("no", "yes")},
    "TOPD": {"divergent": ("no", "yes")},
}
MEANINGS = {
    "route": (
        "DOPD: gap low or high (L, H); confidence high or low, or the teacher's or the student's"
        " lead"
    )
}
RANKS = (1, 10, 100)
RANK_NAMES = ("1", "2–10", "11–100", "over 100")


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds names."""
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or (pa.types.is_dictionary(kind) and is_text(kind.value_type))
    )


def of_names(
    make: Callable[..., Channel], key: str, values: Sequence[str | None]
) -> Channel | None:
    """A channel of a column of names, commonest first; where there are more than `MOST`, the rarest
    are one. None for no name.
    """
    counted = Counter(v for v in values if v is not None)
    names = [name for name, _ in counted.most_common(MOST if len(counted) <= MOST else MOST - 1)]
    if not names:
        return None
    code = {name: float(i) for i, name in enumerate(names)}
    rest = float(len(names))
    at = np.array([np.nan if v is None else code.get(v, rest) for v in values])
    return _channel(make, key, at, [*names, REST] if len(counted) > MOST else names)


def of_flags(make: Callable[..., Channel], key: str, values: Sequence[bool | None]) -> Channel:
    """A channel of a boolean column; None in it is none of the two."""
    at = np.array([np.nan if value is None else float(value) for value in values])
    return _channel(make, key, at, ("no", "yes"))


def of_codes(
    make: Callable[..., Channel],
    key: str,
    values: np.ndarray,
    names: Sequence[str],
    formula: str = "",
) -> Channel | None:
    """A channel of integers that stand for `names`, -1 for none of them; None where a value is
    something else.
    """
    if (
        values.dtype.kind not in "iub"
        or not len(values)
        or values.min() < -1
        or values.max() >= len(names)
    ):
        return None
    at = values.astype(float)
    return _channel(make, key, np.where(at < 0, np.nan, at), names, formula)


def ranked(make: Callable[..., Channel], key: str, label: str, rank: np.ndarray) -> Channel:
    """Ranks in four bins: the favourite, and powers of ten."""
    at = np.searchsorted(RANKS, rank).astype(float)
    return make(
        key,
        label,
        at,
        "",
        "ordinal",
        less="favourite",
        more="far down",
        names=RANK_NAMES,
        marks=RANK_NAMES,
        formula="place of the sampled token among all, by probability",
    )


def marks(names: Sequence[str]) -> tuple[str, ...]:
    """Short marks of names, each its own: the first letters that tell it apart, two at most, else
    its number.
    """
    out: list[str] = []
    short = max(map(len, names), default=0) <= 2
    for i, name in enumerate(names):
        word = "".join(c for c in name if c.isalnum())
        options = [*([name] if short else [word[:1].upper(), word[:2]]), str(i + 1), f"#{i + 1}"]
        out.append(
            next(
                o
                for o in options
                if o and len(o) <= 2 and o.isprintable() and o.strip() and o not in out
            )
        )
    return tuple(out)


def _channel(
    make: Callable[..., Channel], key: str, at: np.ndarray, names: Sequence[str], formula: str = ""
) -> Channel:
    return make(
        key,
        key.replace("_", " "),
        at,
        "",
        "category",
        names=tuple(names),
        marks=marks(names),
        formula=formula,
    )
