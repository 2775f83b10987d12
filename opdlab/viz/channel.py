"""Channel: one number or one kind per token, with what a picture needs to draw it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from opdlab.viz import payload

_FLOOR = {"nats": 0.1}  # a strip where nothing happens stays pale
ChannelKind = Literal["ratio", "signed", "amount", "ordinal", "category"]


@dataclass(frozen=True, eq=False)
class Channel:
    """One value per token, and how to colour, name and explain it.

    Attributes:
        key: The name in `channels`, such as "log_ratio" or a column's name.
        label: The name that people read.
        values: `[n]`. Of kind "category" and "ordinal" they index `names`; NaN is none of them.
        unit: Such as "nats" or "%"; "" for plain numbers.
        kind: "ratio" is drawn from orange to blue, "signed" from grey to violet, "amount" in violet
            from zero, "ordinal" in steps, "category" in a colour of its own for each name.
        less: The meaning of small (or negative) values.
        more: The meaning of large (or positive) values.
        against: The policy that the student is compared with; "" for none.
        formula: One line that says how the values are computed.
        fixed: The size that gets full colour; 0 for the 98th percentile of the sizes.
        minor: Whether the page offers the channel under "more".
        names: The names of a category's or an ordinal's values.
        marks: A letter or two for each name, so that colour never stands alone.
        hues: The colour of each name: "student", "teacher", "amount", "minus", or "" for one of its
            own. Empty where every name has one of its own.
    """

    key: str
    label: str
    values: np.ndarray
    unit: str = "nats"
    kind: ChannelKind = "amount"
    less: str = ""
    more: str = ""
    against: str = ""
    formula: str = ""
    fixed: float = 0.0
    minor: bool = False
    names: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    hues: tuple[str, ...] = ()

    @property
    def limit(self) -> float:
        """Return the size that gets full colour.

        The 98th percentile, so that a single outlier does not pale the rest.
        """
        if self.names or self.fixed:
            return self.fixed or max(1.0, len(self.names) - 1.0)
        size = np.abs(self.values[np.isfinite(self.values)])
        top = float(np.quantile(size, 0.98)) if len(size) else 0.0
        return max(top, _FLOOR.get(self.unit, 0.0)) or 1.0

    def peaks(self, n: int = 5) -> list[int]:
        """Return the `n` tokens of largest size, largest first.

        NaN and values too pale to see do not count. Categories have no peaks.

        Args:
            n: The largest number of tokens returned.

        Returns:
            Rows of `values`; fewer than `n` where only few count.
        """
        if self.kind == "category":
            return []
        size = np.nan_to_num(np.abs(self.values), nan=0.0, posinf=np.inf)
        return [int(i) for i in np.argsort(-size, kind="stable")[:n] if size[i] > 0.05 * self.limit]


def describe_channel(channel: Channel, limit: float) -> dict[str, Any]:
    """Return a channel as the page reads it (see `payload`).

    Args:
        channel: The channel.
        limit: The size that gets full colour, as of several channels that compare.

    Returns:
        The fields of the channel with `limit`, `peaks`, and `values` in few bytes.
    """
    return {
        "key": channel.key,
        "label": channel.label,
        "unit": channel.unit,
        "kind": channel.kind,
        "less": channel.less,
        "more": channel.more,
        "against": channel.against,
        "minor": channel.minor,
        "formula": channel.formula,
        "names": channel.names,
        "marks": channel.marks,
        "hues": channel.hues,
        "limit": limit,
        "values": _compact_values(channel, limit),
        "peaks": channel.peaks(),
    }


def _compact_values(channel: Channel, limit: float) -> np.ndarray:
    if channel.names:
        return np.asarray(np.nan_to_num(channel.values, nan=-1), int)
    if channel.minor:
        return payload.compact_to_colours(channel.values, limit)
    return payload.compact(channel.values)
