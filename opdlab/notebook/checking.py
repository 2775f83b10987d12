"""Exercises that check themselves: what the reader wrote is compared with the library, and what is
wrong with it is said.

    @opd.notebook.exercise("00.1")
    def my_loss(rows):
        raise NotImplementedError

Running the cell prints ✓ or what is wrong, and `my_loss` is then the reader's function if it is
right, else the solution, so the notebook goes on either way. Exercises are data
(`opdlab.notebook.exercises`); hints stay in the notebook.
"""

from __future__ import annotations

import importlib
import pkgutil
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opdlab.errors import OpdlabError
from opdlab.notebook import exercises

Function = Callable[..., Any]
_authors: dict[
    str, str
] = {}  # exercise key -> author of the function that the notebook goes on with


class WrongAnswer(Exception):
    """Raised by an exercise's `look` when it recognises a mistake that no comparison of values can
    name.

    The message is the sentence that the reader sees.
    """


def call(function: Function, *case: Any) -> Any:
    """How a function is looked at if the exercise says nothing else: by what it returns."""
    return function(*case)


@dataclass(frozen=True)
class Exercise:
    """One thing to write.

    key: notebook and number, "11.1". asks: what to return, after "return …" or "let it …". says:
        what the right answer is, after ✓.
    truth: the library's own, which the reader's must agree with on every case. solution: a dozen
        lines as the notebook shows
    them. cases: makes the arguments, anew at every call. look: what is compared of a function at a
    case, its value by default.
    mistakes: functions that readers write instead, by the sentence that says so. close: relative
        tolerance.
    """

    key: str
    asks: str
    says: str
    truth: Function
    solution: Function
    cases: Callable[[], Iterable[tuple[Any, ...]]]
    mistakes: Mapping[str, Function] = field(default_factory=dict)
    look: Callable[..., Any] = call
    close: float = 1e-5

    def judge(self, function: Function) -> str | None:
        """What is wrong with a function, in a sentence, or None; raises NotImplementedError where
        the function does.
        """
        for mine, yours in zip(self.cases(), self.cases(), strict=True):
            want = self.look(self.truth, *mine)
            try:
                got = self.look(function, *yours)
            except NotImplementedError:
                raise
            except WrongAnswer as mistake:
                return str(mistake)
            except Exception as error:  # whatever a reader can write
                return f"it stopped with {_said(error, function)}"
            if wrong := compared(got, want, self.close):
                return self._named(function) or wrong
        return None

    def _named(self, function: Function) -> str | None:
        """The known mistake that a function is, on all cases."""
        for sentence, mistake in self.mistakes.items():
            pairs = zip(self.cases(), self.cases(), strict=True)
            try:
                if all(
                    compared(self.look(function, *a), self.look(mistake, *b), self.close) is None
                    for a, b in pairs
                ):
                    return sentence
            except Exception:  # another case may break what the first did not
                continue
        return None


def exercise(key: str) -> Callable[[Function], Function]:
    """Decorator of what the reader writes: says how it does, and gives back the reader's function
    or the solution.
    """
    task = find(key)

    def check(function: Function) -> Function:
        on = "Until then the notebook goes on with the library's."
        _authors[key] = "the reference solution's"
        try:
            wrong = task.judge(function)
        except NotImplementedError:
            print(f"… {key} is not written yet: {task.asks}. {on}")
            return task.solution
        if wrong:
            print(f"✗ {key}: {wrong} {on}")
            return task.solution
        _authors[key] = "yours"
        print(f"✓ {key}: {task.says}.")
        return function

    return check


def author(key: str) -> str:
    """Say who wrote the function that a notebook goes on with after an exercise.

    Args:
        key: The exercise, e.g. "20.1". Its cell must have run.

    Returns:
        "yours" if the reader's own answer passed, else "the reference solution's". Both fit into
        "loss of the first update: {author} 0.39, the library's 0.39".

    Raises:
        OpdlabError: The exercise has not run in this session.
    """
    if key not in _authors:
        raise OpdlabError(f"Exercise {find(key).key} has not run yet. Run its cell first.")
    return _authors[key]


def find(key: str) -> Exercise:
    """The exercise of a key; raises OpdlabError for one that there is not."""
    number = key.split(".", maxsplit=1)[0]
    if number not in numbers():
        raise OpdlabError(
            f"There is no exercise {key!r}. There are exercises for the notebooks"
            f" {', '.join(numbers())}."
        )
    known = of(number)
    if key not in known:
        raise OpdlabError(
            f"There is no exercise {key!r}. Notebook {number} has {', '.join(known)}."
        )
    return known[key]


def numbers() -> list[str]:
    """The notebooks that have exercises: "00", "11", …"""
    return sorted(
        module.name.removeprefix("ex") for module in pkgutil.iter_modules(exercises.__path__)
    )


def of(number: str) -> dict[str, Exercise]:
    """The exercises of a notebook, by key."""
    return {e.key: e for e in importlib.import_module(f"{exercises.__name__}.ex{number}").EXERCISES}


def compared(got: Any, want: Any, close: float) -> str | None:
    """How a result differs from the wanted one, in a sentence, or None."""
    if got is None:
        return "it returned None. Is there a return?"
    if isinstance(want, Mapping):
        return _compared_by_name(got, want, close)
    if isinstance(want, (tuple, list)) and not (
        want and all(isinstance(x, (int, float)) for x in want)
    ):
        if not isinstance(got, (tuple, list)) or len(got) != len(want):
            return f"{len(want)} results are wanted; you returned {_kind(got)}."
        return _compared_by_name(dict(enumerate(got, 1)), dict(enumerate(want, 1)), close)
    wanted, numbers = _numbers(want), _numbers(got)
    if isinstance(want, (str, bool)) or wanted is None:
        return (
            None
            if type(got) is type(want) and got == want
            else f"it returned {got!r}, wanted {want!r}."
        )
    if numbers is None or numbers.shape != wanted.shape:
        return (
            f"{_shape(wanted)} is wanted; you returned"
            f" {_shape(numbers) if numbers is not None else _kind(got)}."
        )
    return _compared_numbers(numbers, wanted, close)


def _compared_by_name(got: Any, want: Mapping[Any, Any], close: float) -> str | None:
    if not isinstance(got, Mapping) or set(got) != set(want):
        there = ", ".join(map(str, got)) if isinstance(got, Mapping) else _kind(got)
        return f"results by name are wanted: {', '.join(map(str, want))}; you returned {there}."
    wrong = {name: compared(got[name], value, close) for name, value in want.items()}
    return next(
        (
            f"{name if isinstance(name, str) else f'result {name}'}: {said}"
            for name, said in wrong.items()
            if said
        ),
        None,
    )


def _compared_numbers(got: Tensor, want: Tensor, close: float) -> str | None:
    least = close * max(1e-3, want.abs().nan_to_num(0, 0, 0).max().item() if want.numel() else 0)
    same = lambda a, b: torch.allclose(a, b, rtol=close, atol=least, equal_nan=True)
    if same(got, want):
        return None
    if same(-got, want):
        return "the sign is wrong."
    size = want.abs().nan_to_num(0, 0, 0).max() if want.numel() else 0
    if (
        got.abs() <= 1e-12 * size
    ).all():  # a gradient that cancels leaves rounding, not exact zeros
        return "it is zero everywhere."
    ratio = got / want
    if want.numel() > 1 and ratio.isfinite().all() and same(got, ratio.flatten()[0] * want):
        return f"it is {ratio.flatten()[0].item():.3g} times what is wanted."
    where = int((got - want).abs().nan_to_num(torch.inf).flatten().argmax())
    at = f" at {[int(i) for i in np.unravel_index(where, tuple(want.shape))]}" if want.dim() else ""
    mine, right = got.flatten()[where].item(), want.flatten()[where].item()
    digits = next((n for n in (4, 6, 8, 10) if f"{mine:.{n}g}" != f"{right:.{n}g}"), 17)
    return f"the values differ: {mine:.{digits}g}{at}, wanted {right:.{digits}g}."


def _numbers(value: Any) -> Tensor | None:
    """Float64, without gradient; None for what is no number."""
    try:
        return torch.as_tensor(value).detach().double()
    except (TypeError, ValueError, RuntimeError):
        return None


def _shape(x: Tensor) -> str:
    return f"shape {list(x.shape)}" if x.dim() else "one number"


def _kind(value: Any) -> str:
    return (
        f"{len(value)} results" if isinstance(value, (tuple, list)) else f"a {type(value).__name__}"
    )


def _said(error: Exception, function: Function) -> str:
    """The error, and the line of the reader's cell where it happened."""
    code = getattr(getattr(function, "function", function), "__code__", None)
    lines = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if code and f.filename == code.co_filename
    ]
    where = f" (in the line `{lines[-1].line}`)" if lines and lines[-1].line else ""
    return f"{type(error).__name__}: {str(error).rstrip('.')}{where}."
