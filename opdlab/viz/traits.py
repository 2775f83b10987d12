"""Traits: attributes of a view that the page shares."""

from __future__ import annotations

import copy
from typing import Any, Protocol


class HasTraits(Protocol):
    """Whatever keeps the values of its traits: a `View`."""

    _traits: dict[str, Any]

    def _set(self, name: str, value: Any) -> None: ...


class Trait:
    """An attribute that Python and the page share, both ways.

    A reader's clicks change it, and setting it changes the page of the live widget.

    Args:
        default: The value at first. Its type is the trait's type; a value of another type raises
            TypeError.
    """

    def __init__(self, default: Any) -> None:
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, view: HasTraits | None, owner: type | None = None) -> Any:
        if view is None:
            return self
        return view._traits.get(self.name, copy.copy(self.default))

    def __set__(self, view: HasTraits, value: Any) -> None:
        view._set(self.name, self.convert(value))

    def convert(self, value: Any) -> Any:
        """Return a value as one of the trait's type.

        Args:
            value: The value. Integers of numpy fit an int, and tuples fit a list.

        Returns:
            The value, of the type of `default`.

        Raises:
            TypeError: It is of another type.
        """
        kind = type(self.default)
        if kind is int and hasattr(value, "__index__"):
            return int(value)
        if kind is list and isinstance(value, tuple):
            return list(value)
        if not isinstance(value, kind):
            raise TypeError(
                f"{self.name} is of type {kind.__name__}, not {type(value).__name__} ({value!r})."
                f" Give a {kind.__name__}."
            )
        return value


def find_traits(kind: type) -> dict[str, Trait]:
    """Return the traits of a class and its bases, by name, the base's first.

    Args:
        kind: The class of a view.

    Returns:
        The traits by name.
    """
    found = {}
    for owner in reversed(kind.__mro__):
        for name, value in vars(owner).items():
            if isinstance(value, Trait):
                found[name] = value
    return found
