"""The contract of a method, and the way to make one from a bare function.

    plan(batch) -> columns      no gradient, whole batch: what should each token be told?
    loss(rows)  -> [n]          gradient, a chunk of tokens: tell it

A method is any object with `needs` and `loss`; the rest is optional. `as_method` makes one of a class or of a bare function,
and refuses everything else in words.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, overload, runtime_checkable

from torch import Tensor

from opdlab.batch import Batch
from opdlab.errors import InvalidValue
from opdlab.expect import is_model
from opdlab.needs import did_you_mean, parse_needs
from opdlab.validation import Share, shortened, validate

if TYPE_CHECKING:
    from opdlab.rows import Rows

Loss = Callable[["Rows"], Tensor]
Planner = Callable[[Batch], Mapping[str, Tensor]]
DEFAULT_NEEDS = ("teacher",)  # what a bare function reads unless it says otherwise


@runtime_checkable
class Method(Protocol):
    """`needs` names what the method looks at besides the student's own distribution (`opdlab.roles`): `teacher`, `reference`
    (the student before training), `ema`, any of them told hints (`teacher+hint`), or `teacher.text` (a teacher that only writes).

    Optional: `plan(batch) -> {name: [B, T] or [B, T, K] or [B]}`; `on_policy`, the share of prompts whose completion the
    student writes (1); `writer`, who writes the others ("teacher", "answer", a policy of `needs`, or several of them, each of
    whom writes all, in that order); `recipe`, the settings of `distill` that the
    method's paper trains with, as `{"normalize": "sequence"}` (they go before the task's own); `state_dict()` and
    `load_state_dict(state)`, for a method that keeps something from step to step (`opdlab.method_state`)."""

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
def method(needs: Sequence[str] = DEFAULT_NEEDS, plan: Planner | None = None) -> Callable[[Loss], FunctionMethod]: ...
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
        return _of_function(needs, DEFAULT_NEEDS, plan)
    names = (needs,) if isinstance(needs, str) else needs
    parse_needs(names, "opdlab.method")
    return lambda function: _of_function(function, names, plan)


def as_method(value: Any, where: str = "distill", needs: Sequence[str] | str | None = None) -> Method:
    """Make a method of what a user gives as one.

    Args:
        value: A method, the class of one (made with its defaults), or a loss function of rows, or of the student's and the
            teacher's log-probs. A function reads the teacher, unless it has an attribute `needs` or `needs` is given.
        where: The function that was called, for errors.
        needs: What a bare function reads.

    Returns:
        The method itself where `value` is one.

    Raises:
        InvalidValue: It is none of these, as a name, or an object without a loss.
    """
    if inspect.isclass(value):
        value = _instance(value, where)
    if isinstance(value, str):
        raise InvalidValue(f"{where} got the text {shortened(value)} for a method. {_named(value)}")
    if hasattr(value, "loss"):
        if needs is not None:
            raise InvalidValue(f"{where} got needs={shortened(needs)} beside {name_of(value)}, which names its own. Leave needs out.")
        return _checked(value, where)
    if not callable(value) or is_model(value):
        raise InvalidValue(
            f"{where} got {shortened(value)}. Give a loss (a function of rows), a method, as opdlab.OPD(), or the class of one: an object "
            "without a loss trains nothing."
        )
    own = getattr(value, "needs", DEFAULT_NEEDS) if needs is None else needs
    return _of_function(value, (own,) if isinstance(own, str) else own, getattr(value, "plan", None))


def name_of(method: Any) -> str:
    """The name of a method for people: its class, or the name of the function that it was made of."""
    function = getattr(method, "function", None) if isinstance(method, FunctionMethod) else method
    while isinstance(function, partial):
        function = function.args[0] if function.func is _of_rows else function.func
    return str(getattr(function, "__name__", type(function).__name__))


def _instance(kind: type, where: str) -> Any:
    """An object of a class, made with its defaults."""
    if kind is Method or not (hasattr(kind, "loss") or _is_callable_class(kind)):
        raise InvalidValue(f"{where} got the class {kind.__name__}, which has no loss. Use a method, as opdlab.OPD().")
    required = [name for name, one in _parameters(kind) if one.default is one.empty and one.kind not in _VARIADIC]
    if required:
        raise InvalidValue(
            f"{where} got the class {kind.__name__}, which needs {', '.join(required)}. "
            f"Make a method of it: {kind.__name__}({required[0]}=…)."
        )
    try:
        return kind()
    except TypeError as error:
        raise InvalidValue(
            f"{where} got the class {kind.__name__}, which cannot be made without arguments ({error}). Make an object of it."
        ) from None


def _is_callable_class(kind: type) -> bool:
    """Whether objects of the class can be called; calling the class itself makes one, which every class can."""
    return any("__call__" in vars(base) for base in kind.__mro__ if base is not object)


def _checked(value: Any, where: str) -> Method:
    """A method whose parts fit the contract."""
    name = name_of(value)
    if not callable(value.loss):
        raise InvalidValue(f"{where} got {name}, whose loss is {shortened(value.loss)}. Make it a function of rows: def loss(self, rows).")
    _check_takes_one(value.loss, f"{name}.loss", "rows")
    if not hasattr(value, "needs"):
        raise InvalidValue(f"{where} got {name}, which does not say what it reads. Give it needs = ('teacher',), or () for nothing.")
    parse_needs(value.needs, name)
    if hasattr(value, "plan"):
        if not callable(value.plan):
            raise InvalidValue(
                f"{where} got {name}, whose plan is {shortened(value.plan)}. Make it a function of the batch, or leave it out."
            )
        _check_takes_one(value.plan, f"{name}.plan", "batch")
    _check_writers(value, name)
    if not isinstance(getattr(value, "recipe", {}), Mapping):
        raise InvalidValue(f"{name} has recipe={shortened(value.recipe)}. Use a dict of settings, as {{'normalize': 'sequence'}}.")
    return value


def _check_writers(value: Any, name: str) -> None:
    share = getattr(value, "on_policy", 1.0)
    validate(name, {"on_policy": share}, {"on_policy": Share})
    writer = getattr(value, "writer", "teacher")
    names = (writer,) if isinstance(writer, str) else writer
    known = ("teacher", "answer", *value.needs)
    if not isinstance(names, Sequence) or not names or any(one not in known for one in names):
        raise InvalidValue(f"{name} has writer={shortened(writer)}. Use {', '.join(map(repr, dict.fromkeys(known)))}, or a tuple of these.")


def _of_function(function: Any, needs: Sequence[str], plan: Planner | None) -> FunctionMethod:
    if not callable(function):
        raise InvalidValue(f"opdlab.method got {shortened(function)}. Put it above a loss function: def my_loss(rows).")
    name = name_of(function)
    names = tuple(str(need) for need in parse_needs(needs, name))
    if isinstance(function, FunctionMethod):
        return FunctionMethod(function.function, names, plan or function.planner)
    if plan is not None:
        if not callable(plan):
            raise InvalidValue(f"{name} has plan={shortened(plan)}. Make it a function of the batch, or leave it out.")
        _check_takes_one(plan, f"the plan of {name}", "batch")
    if _takes_two_distributions(function):
        return FunctionMethod(partial(_of_rows, function), names, plan)
    _check_takes_one(function, name, "rows")
    return FunctionMethod(function, names, plan)


def _of_rows(pair: Callable[..., Tensor], rows: Rows) -> Tensor:
    return pair(rows.student, rows.teacher)


def _takes_two_distributions(function: Callable[..., Any]) -> bool:
    """Whether it takes the student's and the teacher's log-probs, as those of `opdlab.divergence`, rather than rows."""
    required = [name for name, one in _parameters(function) if one.default is one.empty and one.kind in _POSITIONAL]
    return len(required) == 2 and required[0] not in ("rows", "row", "batch", "chunk")


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _parameters(function: Callable[..., Any]) -> list[tuple[str, inspect.Parameter]]:
    """What a function takes; nothing for those of C, which cannot be asked."""
    try:
        return list(inspect.signature(function).parameters.items())
    except (TypeError, ValueError):
        return []


def _check_takes_one(function: Callable[..., Any], name: str, what: str) -> None:
    """Raise InvalidValue unless a function can be called with one argument."""
    try:
        inspect.signature(function).bind(object())
    except TypeError:
        takes = ", ".join(str(one) for _, one in _parameters(function)) or "nothing"
        raise InvalidValue(
            f"{name} takes {takes}, but it is called with {what} alone. Write it as a function of one argument, {what}."
        ) from None
    except ValueError:  # functions of C do not say what they take, and methods must at least take self
        if inspect.ismethod(function):
            own = name.rpartition(".")[2]
            raise InvalidValue(f"{name} takes nothing, not even self. Write it as def {own}(self, {what}).") from None


def _named(name: str) -> str:
    """What to write instead of a method's name."""
    from opdlab import methods

    known = [one for one in methods.__all__ if one not in ("Method", "method")]
    same = {one.lower(): one for one in known}
    found = same.get(name.lower().replace("-", "").replace("_", "").replace("+", "plus"))
    if found:
        return f"Use the method itself: opdlab.{found}()."
    return f"{did_you_mean(name, known)}Use one of opdlab's methods itself, as opdlab.OPD(); there are {', '.join(known)}."
