"""The contract of a teacher: it grades tokens (`Grader`), writes texts (`Writer`), or both.

A teacher may also have `check(student, prompts, max_new_tokens)` (`Checked`), which is called
before a run begins. Nothing needs to inherit from these protocols: a class of your own with the
right methods takes part.
"""

from __future__ import annotations

import inspect
from typing import Any

from opdlab.models.protocols import Checked, Grader, Writer
from opdlab.support.expect import refusal

__all__ = ["Checked", "Grader", "Writer", "expect_teacher"]


def expect_teacher(value: Any, where: str, name: str = "teacher") -> Grader | Writer:
    """Return `value` if it can teach: a policy, or an object that grades tokens or writes texts.

    Args:
        value: The object that the user passed.
        where: The function that was called, for the error.
        name: The argument's name, for the error.

    Returns:
        `value` itself.

    Raises:
        InvalidValue: It can do neither.
    """
    if inspect.isclass(value) or not isinstance(value, (Grader, Writer)):
        raise refusal("Teacher", value, where, name)
    return value
