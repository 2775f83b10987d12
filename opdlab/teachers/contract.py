"""What can teach: something that grades a rollout's tokens, something that writes texts, or both."""

from __future__ import annotations

import inspect
from typing import Any

from opdlab.models.protocols import Grader, Writer
from opdlab.support.expect import refusal

__all__ = ["Grader", "Writer", "expect_teacher"]


def expect_teacher(value: Any, where: str, name: str = "teacher") -> Grader | Writer:
    """Return `value` if it can teach: a policy, or an object that grades tokens or writes texts.

    Args:
        value: What the user passed.
        where: The function that was called, for the error.
        name: The argument's name, for the error.

    Raises:
        InvalidValue: It can do neither.
    """
    if inspect.isclass(value) or not isinstance(value, (Grader, Writer)):
        raise refusal("Teacher", value, where, name)
    return value
