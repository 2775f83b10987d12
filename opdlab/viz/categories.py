"""Categories as channels: names, flags, codes and ranks.

Each kind of token has a letter or two of its own, so that colour never stands alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from opdlab.data.column import Description
from opdlab.viz.channel import Channel

MOST = 8  # kinds that get a colour of their own; the rest share one
REST = "other"
RANKS = (1, 10, 100)
RANK_NAMES = ("1", "2–10", "11–100", "over 100")
FLAG_NAMES = ("no", "yes")


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds names.

    Args:
        kind: The type of an Arrow column.

    Returns:
        True for strings, large strings and dictionaries of them.
    """
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def channel_of_names(
    key: str, values: Sequence[str | None], said: Description | None = None
) -> Channel | None:
    """Make a channel of a column of names, the commonest first.

    Where there are more than `MOST` names, the rarest become one kind, "other".

    Args:
        key: The column's name.
        values: `[n]` names, None for none.
        said: The column's description.

    Returns:
        A category, or None for a column without any name.
    """
    counted = Counter(value for value in values if value is not None)
    kept = MOST if len(counted) <= MOST else MOST - 1
    names = [name for name, _ in counted.most_common(kept)]
    if not names:
        return None
    code = {name: float(i) for i, name in enumerate(names)}
    rest = float(len(names))
    at = np.array([np.nan if value is None else code.get(value, rest) for value in values])
    return _category(key, at, [*names, REST] if len(counted) > MOST else names, said)


def channel_of_flags(
    key: str, values: Sequence[bool | float | None], said: Description | None = None
) -> Channel:
    """Make a channel of yes and no; None and NaN are neither.

    Args:
        key: The column's name.
        values: `[n]` flags or numbers; any number but 0 is a yes.
        said: The column's description.

    Returns:
        A category with the names "no" and "yes".
    """
    at = [np.nan if value is None else float(value) for value in values]
    at = [value if np.isnan(value) else float(bool(value)) for value in at]
    return _category(key, np.array(at), FLAG_NAMES, said)


def channel_of_codes(key: str, values: np.ndarray, said: Description) -> Channel | None:
    """Make a channel of whole numbers that stand for the labels of a description.

    Args:
        key: The column's name.
        values: `[n]` codes from 0; -1 and NaN stand for no label.
        said: The column's description, with `labels`.

    Returns:
        A category, or None where a value is something else than a code.
    """
    if not are_codes(values, len(said.labels)):
        return None
    at = values.astype(float)
    return _category(key, np.where(at < 0, np.nan, at), said.labels, said)


def are_codes(values: np.ndarray, labels: int) -> bool:
    """Return whether all values are whole numbers from -1 to `labels` - 1, or NaN.

    Args:
        values: `[n]` of any type.
        labels: The number of labels.

    Returns:
        False also for no values, and for values that are not numbers.
    """
    if values.dtype.kind not in "fiub" or not len(values):
        return False
    known = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    return bool(((known == np.rint(known)) & (known >= -1) & (known < labels)).all())


def channel_of_ranks(
    key: str, label: str, rank: np.ndarray, against: str = "", minor: bool = False
) -> Channel:
    """Make a channel of ranks in four steps: the favourite, and powers of ten.

    Args:
        key: The channel's key.
        label: The name that people read.
        rank: `[n]` ranks of the sampled token, 1 for the likeliest.
        against: The policy whose ranks they are; "" for the student's.
        minor: Whether the page offers the channel under "more".

    Returns:
        An ordinal channel with the names "1", "2–10", "11–100" and "over 100".
    """
    return Channel(
        key,
        label,
        np.searchsorted(RANKS, rank).astype(float),
        "",
        "ordinal",
        less="favourite",
        more="far down",
        against=against,
        minor=minor,
        names=RANK_NAMES,
        marks=RANK_NAMES,
        formula="place of the sampled token among all, by probability",
    )


def choose_marks(names: Sequence[str]) -> tuple[str, ...]:
    """Return a short mark for each name, all different.

    The first words where all of them have one or two letters ("LH agree, sure" is "LH"), else the
    first letters that tell a name apart, two at most, else its number.

    Args:
        names: The names of a category, in order.

    Returns:
        One or two characters for each name.
    """
    first = [(name.split() or [""])[0] for name in names]
    short = all(len(word) <= 2 for word in first)
    out: list[str] = []
    for i, name in enumerate(names):
        letters = "".join(c for c in name if c.isalnum())
        words = [first[i]] if short else [letters[:1].upper(), letters[:2]]
        options = [*words, str(i + 1), f"#{i + 1}"]
        free = (option for option in options if _is_mark(option) and option not in out)
        out.append(next(free, "·"))  # of so many kinds that no letters are left
    return tuple(out)


def _is_mark(text: str) -> bool:
    return 0 < len(text) <= 2 and text.isprintable() and bool(text.strip())


def _category(
    key: str, at: np.ndarray, names: Sequence[str], said: Description | None = None
) -> Channel:
    said = said or Description()
    return Channel(
        key,
        said.label or key.replace("_", " "),
        at,
        "",
        "category",
        names=tuple(names),
        marks=choose_marks(names),
        hues=said.hues,
        formula=said.description,
    )
