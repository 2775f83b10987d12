"""The contract of a verifier: called with a prompt and a text, it gives one number from 0 to 1.

Every score in opdlab, in training, evaluation and diagnosis, comes through `score_text`, so a
verifier means the same everywhere. Rewards of another range are refused and not scaled: pass@k
calls a score above 0.5 right, intervals rest on the bounds, and a mean of scores is an accuracy
only within them.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from opdlab.data.prompt import Prompt
from opdlab.errors import BadVerifier, InvalidValue
from opdlab.support.expect import shortened

CONTRACT = (
    "Return one number from 0 to 1 (True and False count as 1 and 0); scale rewards of another"
    " range to it."
)


def score_text(verify: Callable[[Prompt, str], Any], prompt: Prompt, text: str, task: str) -> float:
    """Let a verifier score one text.

    Args:
        verify: The task's verifier.
        prompt: The question.
        text: The answer.
        task: The task's name, for errors.

    Returns:
        The score, from 0 to 1.

    Raises:
        BadVerifier: The verifier fails (its error is the cause), or returns anything but a number
            from 0 to 1.
    """
    try:
        value = verify(prompt, text)
    except Exception as error:
        raise BadVerifier(
            f"The verifier of {task} failed on prompt {_named(prompt)} with the text"
            f" {shortened(text)}: {type(error).__name__}: {error}. Mend it, or let it return 0.0"
            " for texts that it cannot judge."
        ) from error
    score = _number(value)
    if score is None or not 0 <= score <= 1:
        raise BadVerifier(
            f"The verifier of {task} returned {shortened(value)} for prompt {_named(prompt)}."
            f" {CONTRACT}"
        )
    return score


def check_callable(function: Any, arguments: tuple[str, ...], owner: str, name: str) -> None:
    """Check that a user's function can be called with these positional arguments.

    Args:
        function: The function.
        arguments: Names of the arguments.
        owner: The object that got it, for the error.
        name: The name of the function's argument, for the error.

    Raises:
        InvalidValue: It is no function, or its signature takes other arguments.
    """
    wanted = f"Use a function {name}({', '.join(arguments)})"
    if not callable(function):
        raise InvalidValue(
            f"{owner} got {name}={shortened(function)}, which cannot be called. {wanted}."
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins do not tell
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise InvalidValue(
            f"{owner} got a {name} that takes {signature}: {error}. {wanted}."
        ) from None


def _number(value: Any) -> float | None:
    """A finite number as a float, or None.

    Numbers of Python and numpy count, and tensors or arrays without dimensions.
    """
    if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, np.bool_ | numbers.Real):
        try:
            number = float(value)
        except (OverflowError, ValueError):  # an integer too large for a float
            return None
        return number if math.isfinite(number) else None
    return None


def _named(prompt: Prompt | None) -> str:
    if prompt is None:
        return "None"
    return repr(prompt.id) if prompt.id else shortened(prompt.text or prompt.messages)
