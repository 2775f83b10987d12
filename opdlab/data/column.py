"""Columns that describe themselves: what a number per token is, so that every picture can show it.

A method's `plan` returns plain tensors or `Column`s. A trace keeps the description beside the values,
so no view needs to know which method planned them:

    Column(route, labels=("imitate", "steady"), description="how the token is taught")
    Column(gap, unit="nats", compares=("teacher+hint", "student+hint"), threshold=mean_gap)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from typing import Any

from opdlab.errors import InvalidValue
from opdlab.support.expect import shortened

HUES = ("", "student", "teacher", "amount", "minus")


class Kind(str, Enum):
    """How the values of a column are read and drawn."""

    AMOUNT = "amount"  # a size from 0 up
    SIGNED = "signed"  # two sides of 0
    CATEGORY = "category"  # a whole number that stands for a label, -1 for none
    FLAG = "flag"  # yes or no


@dataclass(frozen=True)
class Description:
    """What the values of a column are.

    Attributes:
        kind: How to read the values. None: told by the values, when they are drawn.
        unit: Such as "nats", "tokens", "bytes" or "%"; "" for a plain number.
        label: The column's name for people; its own name by default.
        labels: What the values 0, 1, 2, … of a category stand for.
        hues: The colour of each label: "student", "teacher", "amount", "minus", or "" for one of its own.
        description: One line that says what it is, such as "log T(y) − log S(y)".
        compares: The two policies that it compares, the teacher's side first.
        threshold: The value from which a token counts as high, where the method has one.
        less: What a small (or negative) value means.
        more: What a large (or positive) value means.

    Raises:
        InvalidValue: A field is not of its type, or labels and kind do not belong together.
    """

    kind: Kind | None = None
    unit: str = ""
    label: str = ""
    labels: tuple[str, ...] = ()
    hues: tuple[str, ...] = ()
    description: str = ""
    compares: tuple[str, str] | None = None
    threshold: float | None = None
    less: str = ""
    more: str = ""

    def __post_init__(self) -> None:
        kind = Kind.CATEGORY if self.labels and self.kind is None else self.kind
        object.__setattr__(self, "kind", None if kind is None else _kind(kind))
        for name in ("unit", "label", "description", "less", "more"):
            if not isinstance(getattr(self, name), str):
                raise InvalidValue(
                    f"Column got {name}={shortened(getattr(self, name))}. Use a text."
                )
        for name in ("labels", "hues"):
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        if bool(self.labels) != (self.kind is Kind.CATEGORY):
            raise InvalidValue(
                f"Column got kind={self.kind and self.kind.value!r} and labels={shortened(self.labels)}. A"
                " category needs the label of each value; nothing else has labels."
            )
        if self.hues and (len(self.hues) != len(self.labels) or not set(self.hues) <= set(HUES)):
            raise InvalidValue(
                f"Column got hues={shortened(self.hues)}. Use one of {', '.join(map(repr, HUES))} for each"
                " label."
            )
        if self.compares is not None:
            compares = _texts("compares", self.compares)
            if len(compares) != 2:
                raise InvalidValue(
                    f"Column got compares={shortened(self.compares)}. Use the names of two policies."
                )
            object.__setattr__(self, "compares", compares)
        if self.threshold is not None:
            object.__setattr__(self, "threshold", float(self.threshold))

    def as_json(self) -> dict[str, Any]:
        """The fields that say something, as a trace stores them."""
        stored = {
            name: value for name, value in asdict(self).items() if value not in ("", (), None)
        }
        return stored | ({"kind": self.kind.value} if self.kind else {})

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Description:
        """Read what `as_json` wrote; fields of later versions are left out.

        Raises:
            InvalidValue: A field holds something else.
        """
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in stored.items() if name in known})


class Column:
    """The values of a column with their description.

    Args:
        values: A tensor or array `[B, T]`, `[B, T, K]` or `[B]`, or one number for all tokens.
        description: A `Description`, or the text of its field `description`.
        fields: Other fields of `Description`: `unit`, `kind`, `labels`, `compares`, `threshold`, …

    Raises:
        InvalidValue: A field of the description is not of its type.
    """

    def __init__(self, values: Any, description: Description | str = "", **fields: Any) -> None:
        self.values = values
        if isinstance(description, Description):
            self.description = replace(description, **fields) if fields else description
            return
        try:
            self.description = Description(description=description, **fields)
        except TypeError:
            known = ", ".join(Description.__dataclass_fields__)
            raise InvalidValue(f"Column got {', '.join(fields)}. Its fields are {known}.") from None

    def __repr__(self) -> str:
        shape = list(getattr(self.values, "shape", ()))
        return f"Column({shape}, {self.description.as_json()})"


def _kind(kind: Any) -> Kind:
    try:
        return Kind(kind)
    except ValueError:
        known = ", ".join(repr(one.value) for one in Kind)
        raise InvalidValue(f"Column got kind={shortened(kind)}. Use {known}, or None.") from None


def _texts(name: str, values: Any) -> tuple[str, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise InvalidValue(f"Column got {name}={shortened(values)}. Use a tuple of texts.")
    if not all(isinstance(value, str) for value in values):
        raise InvalidValue(f"Column got {name}={shortened(values)}. Use a tuple of texts.")
    return tuple(values)
