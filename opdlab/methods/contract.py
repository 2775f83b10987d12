"""The contract of a method, and the way to make one from a bare function.

    plan(batch) -> columns      no gradient, whole batch: what should each token be told?
    loss(rows)  -> [n]          gradient, a chunk of tokens: tell it

A method is any object with `needs` and `loss`; the rest is optional. `as_method` makes one of a
class or of a bare function, and refuses everything else in words.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, overload, runtime_checkable

from torch import Tensor

from opdlab.engine.batch import Batch
from opdlab.engine.needs import parse_needs
from opdlab.errors import InvalidValue
from opdlab.support.expect import shortened

if TYPE_CHECKING:
    from opdlab.engine.rows import Rows

Loss = Callable[["Rows"], Tensor]
Planner = Callable[[Batch], Mapping[str, Tensor]]
DEFAULT_NEEDS = ("teacher",)  # what a bare function reads unless it says otherwise


@runtime_checkable
class Method(Protocol):
    """`needs` names what the method looks at besides the student's own distribution
    (`opdlab.training.resolution`): `teacher`, `reference` (the student before training), `ema`,
    any of them told hints (`teacher+hint`), or `teacher.text` (a teacher that only writes).

    Optional: `plan(batch) -> {name: [B, T] or [B, T, K] or [B]}`; `on_policy`, the share of prompts
        whose completion the
    student writes (1); `writer`, who writes the others ("teacher", "answer", a policy of `needs`,
    or several of them, each of whom writes all, in that order); `recipe`, the settings of `distill`
    that the method's paper trains with, as `{"normalize": "sequence"}` (they go before the task's
    own); `state_dict()` and `load_state_dict(state)`, for a method that keeps something from step
    to step (`opdlab.training.method_state`).
    """

    @property
    def needs(self) -> tuple[str, ...]: ...

    def loss(self, rows: Rows) -> Tensor: ...


@dataclass(frozen=True)
class FunctionMethod:
    """A bare loss function as a method."""

    function: Loss
    needs: tuple[str, ...]
    planner: Planner | None = None

    def plan(self, batch: Batch) -> Mapping[str, Tensor]:
        return self.planner(batch) if self.planner else {}

    def loss(self, rows: Rows) -> Tensor:
        return self.function(rows)

    def __call__(self, rows: Rows) -> Tensor:
        return self.function(rows)


@overload
def method(needs: Loss, plan: Planner | None = None) -> FunctionMethod: ...
@overload
def method(
    needs: Sequence[str] = DEFAULT_NEEDS, plan: Planner | None = None
) -> Callable[[Loss], FunctionMethod]: ...
def method(needs: Any = DEFAULT_NEEDS, plan: Planner | None = None) -> Any:
    """Make a method of a loss function, as a decorator with or without arguments.

        @opdlab.method(needs=("teacher", "reference"))
        def my_loss(rows): ...  # -> [n]

    Args:
        needs: The names of the policies that the loss reads; one name may be given alone.
        plan: The method's plan, a function of the batch.

    Raises:
        InvalidValue: A name cannot be read, or a function does not take what it is given.
    """
    if callable(needs):
        return method_of_function(needs, DEFAULT_NEEDS, plan)
    names = (needs,) if isinstance(needs, str) else needs
    parse_needs(names, "opdlab.method")
    return lambda function: method_of_function(function, names, plan)


def student_share(method: Any) -> float:
    """The share of prompts whose completion the student writes: the method's `on_policy`, 1 by default."""
    return float(getattr(method, "on_policy", 1.0))


def writer_names(method: Any) -> tuple[str, ...]:
    """Who writes the other completions: the method's `writer`, the teacher by default."""
    writer = getattr(method, "writer", "teacher")
    return (writer,) if isinstance(writer, str) else tuple(writer)


def name_of(method: Any) -> str:
    """The name of a method for people: its class, or the name of the function that it was made of."""
    function = getattr(method, "function", None) if isinstance(method, FunctionMethod) else method
    while isinstance(function, partial):
        function = function.args[0] if function.func is _of_rows else function.func
    return str(getattr(function, "__name__", type(function).__name__))


def method_of_function(function: Any, needs: Sequence[str], plan: Planner | None) -> FunctionMethod:
    if not callable(function):
        raise InvalidValue(
            f"opdlab.method got {shortened(function)}. Put it above a loss function: def"
            " my_loss(rows)."
        )
    name = name_of(function)
    names = tuple(str(need) for need in parse_needs(needs, name))
    if isinstance(function, FunctionMethod):
        return FunctionMethod(function.function, names, plan or function.planner)
    if plan is not None:
        if not callable(plan):
            raise InvalidValue(
                f"{name} has plan={shortened(plan)}. Make it a function of the batch, or leave it"
                " out."
            )
        check_takes_one(plan, f"the plan of {name}", "batch")
    if _takes_two_distributions(function):
        return FunctionMethod(partial(_of_rows, function), names, plan)
    check_takes_one(function, name, "rows")
    return FunctionMethod(function, names, plan)


def _of_rows(pair: Callable[..., Tensor], rows: Rows) -> Tensor:
    return pair(rows.student, rows.teacher)


def _takes_two_distributions(function: Callable[..., Any]) -> bool:
    """Whether it takes the student's and the teacher's log-probs, as those of `opdlab.losses`,
    rather than rows.
    """
    required = [
        name
        for name, one in parameters_of(function)
        if one.default is one.empty and one.kind in _POSITIONAL
    ]
    return len(required) == 2 and required[0] not in ("rows", "row", "batch", "chunk")


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def parameters_of(function: Callable[..., Any]) -> list[tuple[str, inspect.Parameter]]:
    """What a function takes; nothing for those of C, which cannot be asked."""
    try:
        return list(inspect.signature(function).parameters.items())
    except (TypeError, ValueError):
        return []


def check_takes_one(function: Callable[..., Any], name: str, what: str) -> None:
    """Raise InvalidValue unless a function can be called with one argument."""
    try:
        inspect.signature(function).bind(object())
    except TypeError:
        takes = ", ".join(str(one) for _, one in parameters_of(function)) or "nothing"
        raise InvalidValue(
            f"{name} takes {takes}, but it is called with {what} alone. Write it as a function of"
            f" one argument, {what}."
        ) from None
    except (
        ValueError
    ):  # functions of C do not say what they take, and methods must at least take self
        if inspect.ismethod(function):
            own = name.rpartition(".")[2]
            raise InvalidValue(
                f"{name} takes nothing, not even self. Write it as def {own}(self, {what})."
            ) from None
