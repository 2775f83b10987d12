"""Columns that describe themselves, so that every picture can show them.

A method's `plan` returns plain tensors or `Column`s. A trace keeps the description beside the
values, so no view needs to know which method planned them:

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
    """The way to read and draw the values of a column."""

    AMOUNT = "amount"  # a size from 0 up
    SIGNED = "signed"  # two sides of 0
    CATEGORY = "category"  # a whole number that stands for a label, -1 for none
    FLAG = "flag"  # yes or no


@dataclass(frozen=True)
class Description:
    """Say what the values of a column are.

    Attributes:
        kind: How to read the values. None leaves it to the values, when they are drawn; a column
            with labels is a category.
        unit: Such as "nats", "tokens", "bytes" or "%"; "" for a plain number.
        label: The column's name for people; its own name by default.
        labels: The names of a category's values 0, 1, 2, …
        hues: The colour of each label: "student", "teacher", "amount", "minus", or "" for one of
            its own.
        description: One line that says what the column is, such as "log T(y) − log S(y)".
        compares: The two policies that it compares, the teacher's side first.
        threshold: The value from which a token counts as high, where the method has one.
        less: The meaning of a small (or negative) value, such as "agree".
        more: The meaning of a large (or positive) value, such as "apart".

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
        for name in ("unit", "label", "description", "less", "more"):
            _check_text(name, getattr(self, name))
        for name in ("labels", "hues"):
            self._set(name, _read_texts(name, getattr(self, name)))
        self._set("kind", _read_kind(self.kind, self.labels))
        if self.hues and (len(self.hues) != len(self.labels) or not set(self.hues) <= set(HUES)):
            raise InvalidValue(
                f"Column got hues={shortened(self.hues)}. Use one of {', '.join(map(repr, HUES))}"
                " for each label."
            )
        if self.compares is not None:
            self._set("compares", _read_pair(self.compares))
        if self.threshold is not None:
            self._set("threshold", _read_number(self.threshold))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen for everybody else

    def as_json(self) -> dict[str, Any]:
        """Give the fields that say something, as a trace stores them.

        Returns:
            The fields by name, without those that are empty; tuples as lists, the kind as its text.
        """
        stored: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if value not in ("", (), None):
                stored[name] = list(value) if isinstance(value, tuple) else value
        return stored | ({"kind": self.kind.value} if self.kind else {})

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Description:
        """Read what `as_json` wrote; fields of later versions are left out.

        Args:
            stored: Fields by name; those that are missing take their defaults.

        Returns:
            The description.

        Raises:
            InvalidValue: A field holds something else.
        """
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in stored.items() if name in known})


class Column:
    """Hold the values of a column with their description.

    Args:
        values: A tensor or array `[B, T]`, `[B, T, K]` or `[B]`, or one number for all tokens.
        description: A `Description`, or the text of its field `description`.
        fields: Other fields of `Description`: `unit`, `kind`, `labels`, `compares`, `threshold`, …

    Attributes:
        values: The values as they were given.
        description: The `Description`, complete.

    Raises:
        InvalidValue: A field of the description is unknown or not of its type.
    """

    def __init__(self, values: Any, description: Description | str = "", **fields: Any) -> None:
        known = Description.__dataclass_fields__
        if unknown := [name for name in fields if name not in known]:
            raise InvalidValue(
                f"Column got {', '.join(unknown)}. Its fields are {', '.join(known)}."
            )
        self.values = values
        if isinstance(description, Description):
            self.description = replace(description, **fields) if fields else description
        else:
            self.description = Description(description=description, **fields)

    def __repr__(self) -> str:
        shape = list(getattr(self.values, "shape", ()))  # one plain number has no shape
        return f"Column({shape}, {self.description.as_json()})"


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise InvalidValue(f"Column got {name}={shortened(value)}. Use a text.")


def _read_kind(kind: Any, labels: tuple[str, ...]) -> Kind | None:
    """Read a kind, which must be a category exactly where there are labels."""
    try:
        found = None if kind is None else Kind(kind)
    except ValueError:
        known = ", ".join(repr(one.value) for one in Kind)
        raise InvalidValue(f"Column got kind={shortened(kind)}. Use {known}, or None.") from None
    if labels and found is None:
        return Kind.CATEGORY
    if bool(labels) != (found is Kind.CATEGORY):
        raise InvalidValue(
            f"Column got kind={found and found.value!r} and labels={shortened(labels)}. A category"
            " needs the label of each value; nothing else has labels."
        )
    return found


def _read_texts(name: str, values: Any) -> tuple[str, ...]:
    is_list = isinstance(values, Sequence) and not isinstance(values, (str, bytes))
    if not is_list or not all(isinstance(value, str) for value in values):
        raise InvalidValue(f"Column got {name}={shortened(values)}. Use a tuple of texts.")
    return tuple(values)


def _read_pair(values: Any) -> tuple[str, str]:
    names = _read_texts("compares", values)
    if len(names) != 2:
        raise InvalidValue(
            f"Column got compares={shortened(values)}. Use the names of two policies."
        )
    return names[0], names[1]


def _read_number(value: Any) -> float:
    """Read a number; those of numpy and PyTorch are numbers too, texts and booleans are not."""
    try:
        if isinstance(value, (str, bytes, bool)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidValue(
            f"Column got threshold={shortened(value)}. Use a number, or None."
        ) from None
