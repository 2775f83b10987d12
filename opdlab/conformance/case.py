"""A loss with its spec under a name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opdlab.conformance.spec import Spec
from opdlab.errors import InvalidValue
from opdlab.support.expect import shortened
from opdlab.support.validation import Text, validate_fields


@dataclass(frozen=True)
class Case:
    """A loss with its spec.

    Attributes:
        name: The name in the report.
        loss: A function with the arguments of the spec's kind.
        spec: How it is called, and what it claims.
        mistake: Name of the mistake that it is known to make, or "".
        about: A sentence about it, with its source.

    Raises:
        InvalidValue: The loss is no function, or the spec is none.
    """

    name: Text
    loss: Callable[..., Any]
    spec: Spec
    mistake: Text = ""
    about: Text = ""

    def __post_init__(self) -> None:
        if not callable(self.loss) or not isinstance(self.spec, Spec):
            raise InvalidValue(
                f"Case got loss={shortened(self.loss)}, spec={shortened(self.spec)}. Use a function"
                " and an opdlab.conformance.Spec."
            )
        validate_fields(self)
