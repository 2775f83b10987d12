"""Exercises that check themselves: the reader's function is compared with the library's.

    @opd.notebook.exercise("00.1")
    def my_loss(rows):
        raise NotImplementedError

Running the cell prints ✓, or a sentence that says what is wrong. `my_loss` is then the reader's
function if it is right, else the reference solution, so the notebook runs to its end either way.
Exercises are data (`opdlab.notebook.exercises`); hints stand in the notebook.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
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
MODULE = re.compile(r"notebook_(\d\d)_\w+")  # the modules that hold the exercises of a notebook
DIGITS = (4, 6, 8, 10)  # how many digits are shown, until two different numbers look different

# Who wrote the function that the notebook uses after an exercise, by key of the exercise.
_authors: dict[str, str] = {}


class WrongAnswer(Exception):
    """A mistake that the `observe` function of an exercise recognised; its message is shown.

    It is for mistakes that a comparison of values cannot name.
    """


def call(function: Function, *case: Any) -> Any:
    """Call a function on a case.

    An exercise observes a function in this way by default.

    Args:
        function: The reader's function or the library's.
        case: The arguments.

    Returns:
        The function's result.
    """
    return function(*case)


@dataclass(frozen=True)
class Exercise:
    """A function to write, with all that is needed to judge an answer.

    Attributes:
        key: Notebook and number, such as "11.1".
        request: The task in one line. It follows "… is not written yet: ", as in "return the KL".
        confirmation: The sentence after ✓, without its full stop.
        reference: The library's function, which the answer must agree with on every case.
        solution: A short function as the notebook shows it, used until the answer is right.
        cases: Makes the arguments of all cases, anew at every call.
        mistakes: Functions that readers write instead, by the sentence that names the mistake.
        observe: Gives what is compared of a function on a case; its result by default.
        tolerance: Relative tolerance of the comparison.
    """

    key: str
    request: str
    confirmation: str
    reference: Function
    solution: Function
    cases: Callable[[], Iterable[tuple[Any, ...]]]
    mistakes: Mapping[str, Function] = field(default_factory=dict)
    observe: Callable[..., Any] = call
    tolerance: float = 1e-5

    def judge(self, function: Function) -> str | None:
        """Compare a function with the reference on all cases.

        Args:
            function: The reader's function.

        Returns:
            A sentence that says what is wrong, or None for a right answer.

        Raises:
            NotImplementedError: The function raised it, as a stub does.
        """
        for case, same_case in zip(self.cases(), self.cases(), strict=True):
            wanted = self.observe(self.reference, *case)
            try:
                got = self.observe(function, *same_case)
            except NotImplementedError:
                raise
            except WrongAnswer as mistake:
                return str(mistake)
            except Exception as error:  # a reader can write anything
                return f"it stopped with {_describe_error(error, function)}"
            if difference := describe_difference(got, wanted, self.tolerance):
                return self._name_mistake(function) or difference
        return None

    def _name_mistake(self, function: Function) -> str | None:
        """The sentence of the known mistake that a function equals on all cases."""
        for sentence, mistake in self.mistakes.items():
            try:
                if self._is_same(function, mistake):
                    return sentence
            # The function may stop on a case that the first difference came before.
            except Exception:  # nosec B112  # the next mistake is tried
                continue
        return None

    def _is_same(self, function: Function, mistake: Function) -> bool:
        for case, same_case in zip(self.cases(), self.cases(), strict=True):
            got, wrong = self.observe(function, *case), self.observe(mistake, *same_case)
            if describe_difference(got, wrong, self.tolerance) is not None:
                return False
        return True


def exercise(key: str) -> Callable[[Function], Function]:
    """Decorate the reader's function: print whether it is right, and go on with a right one.

    Args:
        key: The exercise, such as "00.1".

    Returns:
        A decorator. It returns the reader's function if that is right, else the reference solution.

    Raises:
        OpdlabError: There is no exercise of that key.
    """
    task = find_exercise(key)

    def check(function: Function) -> Function:
        meanwhile = "Until then the notebook uses the reference solution."
        _authors[key] = "the reference solution's"
        try:
            wrong = task.judge(function)
        except NotImplementedError:
            print(f"… {key} is not written yet: {task.request}. {meanwhile}")
            return task.solution
        if wrong:
            print(f"✗ {key}: {wrong} {meanwhile}")
            return task.solution
        _authors[key] = "yours"
        print(f"✓ {key}: {task.confirmation}.")
        return function

    return check


def author(key: str) -> str:
    """Say who wrote the function that the notebook uses after an exercise.

    Args:
        key: The exercise, e.g. "22.3". Its cell must have run.

    Returns:
        "yours" if the reader's own answer passed, else "the reference solution's". Both fit into
        "trajectory term: {author} 1.004, the library's 1.004".

    Raises:
        OpdlabError: The exercise has not run in this session.
    """
    if key not in _authors:
        raise OpdlabError(f"Exercise {find_exercise(key).key} has not run yet. Run its cell first.")
    return _authors[key]


def find_exercise(key: str) -> Exercise:
    """Find an exercise by its key.

    Args:
        key: The notebook's number and the exercise's, such as "00.1".

    Returns:
        The exercise.

    Raises:
        OpdlabError: There is none. The message lists what there is.
    """
    number = key.split(".", maxsplit=1)[0]
    if number not in list_notebooks():
        raise OpdlabError(
            f"There is no exercise {key!r}. There are exercises for the notebooks "
            f"{', '.join(list_notebooks())}."
        )
    known = list_exercises(number)
    if key not in known:
        raise OpdlabError(
            f"There is no exercise {key!r}. Notebook {number} has {', '.join(known)}."
        )
    return known[key]


def list_notebooks() -> list[str]:
    """List the numbers of the notebooks that have exercises, such as "00" and "10".

    Returns:
        The numbers, in order.
    """
    return sorted(_modules())


def list_exercises(number: str) -> dict[str, Exercise]:
    """List the exercises of a notebook by key, in the notebook's order.

    Args:
        number: The notebook's number, such as "00".

    Returns:
        Exercises by key.
    """
    module = importlib.import_module(f"{exercises.__name__}.{_modules()[number]}")
    return {each.key: each for each in module.EXERCISES}


def _modules() -> dict[str, str]:
    """The modules of exercises, by number of their notebook."""
    names = [module.name for module in pkgutil.iter_modules(exercises.__path__)]
    return {match[1]: name for name in names if (match := MODULE.fullmatch(name))}


def describe_difference(got: Any, wanted: Any, tolerance: float) -> str | None:
    """Say how a result differs from the wanted one.

    Args:
        got: The result of the reader's function, which may be anything.
        wanted: A number, a tensor, a text, or a tuple or dict of these.
        tolerance: Relative tolerance for numbers.

    Returns:
        A sentence, or None where they agree.
    """
    if got is None:
        return "it returned None. Is there a return?"
    if isinstance(wanted, Mapping):
        return _compare_by_name(got, wanted, tolerance)
    if isinstance(wanted, (tuple, list)) and not _is_list_of_numbers(wanted):
        if not isinstance(got, (tuple, list)) or len(got) != len(wanted):
            return f"{len(wanted)} results are wanted; you returned {_kind(got)}."
        return _compare_by_name(dict(enumerate(got, 1)), dict(enumerate(wanted, 1)), tolerance)
    right, numbers = _as_numbers(wanted), _as_numbers(got)
    if isinstance(wanted, (str, bool)) or right is None:
        is_equal = type(got) is type(wanted) and got == wanted
        return None if is_equal else f"it returned {got!r}, wanted {wanted!r}."
    if numbers is None or numbers.shape != right.shape:
        returned = _shape(numbers) if numbers is not None else _kind(got)
        return f"{_shape(right)} is wanted; you returned {returned}."
    return _compare_numbers(numbers, right, tolerance)


def _is_list_of_numbers(value: tuple[Any, ...] | list[Any]) -> bool:
    return bool(value) and all(isinstance(each, (int, float)) for each in value)


def _compare_by_name(got: Any, wanted: Mapping[Any, Any], tolerance: float) -> str | None:
    if not isinstance(got, Mapping) or set(got) != set(wanted):
        there = ", ".join(map(str, got)) if isinstance(got, Mapping) else _kind(got)
        return f"results by name are wanted: {', '.join(map(str, wanted))}; you returned {there}."
    for name, value in wanted.items():
        if difference := describe_difference(got[name], value, tolerance):
            return f"{name if isinstance(name, str) else f'result {name}'}: {difference}"
    return None


def _compare_numbers(got: Tensor, wanted: Tensor, tolerance: float) -> str | None:
    size = wanted.abs().nan_to_num(0, 0, 0).max().item() if wanted.numel() else 0.0
    absolute = tolerance * max(1e-3, size)

    def is_close(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, rtol=tolerance, atol=absolute, equal_nan=True)

    if is_close(got, wanted):
        return None
    if is_close(-got, wanted):
        return "the sign is wrong."
    if bool(
        (got.abs() <= 1e-12 * size).all()
    ):  # a gradient that cancels leaves rounding, not zeros
        return "it is zero everywhere."
    ratio = got / wanted
    if wanted.numel() > 1 and bool(ratio.isfinite().all()):
        factor = ratio.flatten()[0]
        if is_close(got, factor * wanted):
            return f"it is {factor.item():.3g} times what is wanted."
    return _worst_value(got, wanted)


def _worst_value(got: Tensor, wanted: Tensor) -> str:
    """The place where two results differ most, with as many digits as it takes to see it."""
    place = int((got - wanted).abs().nan_to_num(torch.inf).flatten().argmax())
    index = [int(i) for i in np.unravel_index(place, tuple(wanted.shape))]
    at = f" at {index}" if wanted.dim() else ""
    mine, right = got.flatten()[place].item(), wanted.flatten()[place].item()
    digits = next((n for n in DIGITS if f"{mine:.{n}g}" != f"{right:.{n}g}"), 17)
    return f"the values differ: {mine:.{digits}g}{at}, wanted {right:.{digits}g}."


def _as_numbers(value: Any) -> Tensor | None:
    """The value in float64 without gradient; None for a value that is no number."""
    try:
        return torch.as_tensor(value).detach().double()
    except (TypeError, ValueError, RuntimeError):
        return None


def _shape(values: Tensor) -> str:
    return f"shape {list(values.shape)}" if values.dim() else "one number"


def _kind(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"{len(value)} results"
    return f"a {type(value).__name__}"


def _describe_error(error: Exception, function: Function) -> str:
    """The error, and the line of the reader's cell where it happened."""
    # A method made of a function keeps it as `function`.
    code = getattr(getattr(function, "function", function), "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.line for frame in frames if code and frame.filename == code.co_filename]
    where = f" (in the line `{lines[-1]}`)" if lines and lines[-1] else ""
    return f"{type(error).__name__}: {str(error).rstrip('.')}{where}."
