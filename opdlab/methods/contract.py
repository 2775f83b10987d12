"""The contract of a method, and the decorator that makes one of a loss function.

    plan(batch) -> columns      no gradient, whole batch: decide what each token should be told
    loss(rows)  -> [n]          with gradient, a chunk of tokens: compute it

A method is any object with `needs` and `loss` (`Method`); all other parts are optional, each with a
protocol of its own. `opdlab.methods.conversion.as_method` accepts classes and functions too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, overload, runtime_checkable

from torch import Tensor

from opdlab.data.column import Column
from opdlab.data.formula import read_formula
from opdlab.engine.batch import Batch
from opdlab.engine.needs import parse_needs
from opdlab.errors import InvalidValue
from opdlab.support.expect import shortened

if TYPE_CHECKING:
    from opdlab.engine.rows import Rows

Columns = Mapping[str, "Tensor | Column"]
Loss = Callable[["Rows"], Tensor]
Planner = Callable[[Batch], Columns]
DEFAULT_NEEDS = ("teacher",)  # the needs of a bare function that states none


@runtime_checkable
class Method(Protocol):
    """The parts of every method: the distributions that it reads, and a loss.

    A method may also be a `HasPlan`, `HasShare`, `HasWriter`, `HasRecipe`, `HasParts` or
    `HasFormula`. It may have `verifies = True` (it learns from the task's verifier), `least_n`
    (samples per prompt that it compares at least), `closed_form(rows)` where it knows the gradient
    of its loss (`opdlab.engine.closed_form`), and `state_dict()` with `load_state_dict(state)`
    where it keeps something from step to step (`opdlab.training.method_state`).
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """The policies that it reads besides the student.

        "teacher", "reference" (the student before training), "ema", any other name that
        `policies=` gives; with "+hint" where the policy sees the hint, as "teacher.text" for a
        teacher that only writes, or as "teacher.spans" for one with other tokens.
        """
        ...

    def loss(self, rows: Rows) -> Tensor:
        """Compute the loss of each token from its row alone.

        Args:
            rows: A chunk of `n` tokens.

        Returns:
            `[n]`, with a gradient in the student's log-probs.
        """
        ...


@runtime_checkable
class HasPlan(Protocol):
    """A method that looks at the whole batch before the loss runs."""

    def plan(self, batch: Batch) -> Columns:
        """Compute what the loss reads beside the log-probs, from the whole batch.

        Args:
            batch: The step's rollout under all policies.

        Returns:
            Columns by name, `[B, T]`, `[B, T, K]` or `[B]`; the loss reads them as `rows.<name>`.
        """
        ...


@runtime_checkable
class HasShare(Protocol):
    """A method that says for which share of prompts the student writes the completion."""

    @property
    def on_policy(self) -> float:
        """The share, from 0 to 1; 1 for a method that does not say."""
        ...


@runtime_checkable
class HasWriter(Protocol):
    """A method that says who writes the completions that the student does not write."""

    @property
    def writer(self) -> str | tuple[str, ...]:
        """Name "teacher" (the default), "answer", a policy of `needs`, or several.

        Each of several writes all prompts, in that order.
        """
        ...


@runtime_checkable
class HasRecipe(Protocol):
    """A method that brings the settings its paper trains with."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Settings of `distill`, such as `{"normalize": "sequence"}`.

        They go before those of the task, and the user's go before both.
        """
        ...


@runtime_checkable
class HasParts(Protocol):
    """A method made of other methods, each of which plans and keeps its state as it does alone."""

    @property
    def parts(self) -> Mapping[str, Method]:
        """The methods by name; the names are identifiers, and the same for equal methods."""
        ...


@runtime_checkable
class HasForms(Protocol):
    """A method made of an f-divergence, of which `audit` tries other generators."""

    def form(self, c: float) -> Method:
        """Return the method made of `f + c (u - 1)`.

        Args:
            c: The multiple of `u - 1` that is added to the generator.

        Returns:
            A new method.
        """
        ...


@runtime_checkable
class HasFormula(Protocol):
    """A method that declares the formula of its loss, for traces and pictures."""

    @property
    def formula(self) -> str:
        """One line over the columns of a trace (`opdlab.data.formula`)."""
        ...


@dataclass(frozen=True)
class FunctionMethod:
    """A loss function as a method; it can still be called as the function.

    Attributes:
        function: The loss, `rows -> [n]`.
        needs: The policies that it reads.
        planner: Its plan, `batch -> columns`, or None.
        formula: The formula of the loss (`opdlab.data.formula`); "" for none.
    """

    function: Loss
    needs: tuple[str, ...]
    planner: Planner | None = None
    formula: str = ""

    def plan(self, batch: Batch) -> Columns:
        """Call the planner.

        Args:
            batch: The step's rollout under all policies.

        Returns:
            The planner's columns by name; none without a planner.
        """
        return self.planner(batch) if self.planner else {}

    def loss(self, rows: Rows) -> Tensor:
        """Call the function.

        Args:
            rows: A chunk of `n` tokens.

        Returns:
            The function's value, `[n]`.
        """
        return self.function(rows)

    def __call__(self, rows: Rows) -> Tensor:
        """Call the function itself."""
        return self.function(rows)


@overload
def method(needs: Loss, plan: Planner | None = None, formula: str = "") -> FunctionMethod: ...
@overload
def method(
    needs: Sequence[str] = DEFAULT_NEEDS, plan: Planner | None = None, formula: str = ""
) -> Callable[[Loss], FunctionMethod]: ...
def method(needs: Any = DEFAULT_NEEDS, plan: Planner | None = None, formula: str = "") -> Any:
    """Make a method of a loss function, as a decorator with or without arguments.

        @opdlab.method(needs=("teacher", "reference"))
        def my_loss(rows): ...  # -> [n]

    Args:
        needs: The names of the policies that the loss reads; one name may be given alone.
        plan: The method's plan, a function of the batch.
        formula: The formula of the loss, one line over the columns of a trace
            (`opdlab.data.formula`), for `viz.Equation`. The computation is the function's alone.

    Returns:
        A method, or a decorator that makes one.

    Raises:
        InvalidValue: A name or the formula cannot be read, or a function does not take what it is
            given.
    """
    if formula:
        read_formula(formula, "opdlab.method's formula")
    if callable(needs):
        return _with_formula(method_of_function(needs, DEFAULT_NEEDS, plan), formula)
    names = (needs,) if isinstance(needs, str) else needs
    parse_needs(names, "opdlab.method")

    def decorate(function: Loss) -> FunctionMethod:
        return _with_formula(method_of_function(function, names, plan), formula)

    return decorate


def recipe_of(method: Any) -> Mapping[str, Any]:
    """Return the settings that the method's paper trains with; none where it names none.

    Args:
        method: A method.

    Returns:
        Settings of `distill` by name.
    """
    return getattr(method, "recipe", {})


def needs_verifier(method: Any) -> bool:
    """Return whether a method learns from the task's verifier: its `verifies`, False by default.

    Args:
        method: The method.

    Returns:
        Its `verifies`; False for a method that does not say.
    """
    return bool(getattr(method, "verifies", False))


def tells_hints(method: Any) -> bool:
    """Return whether a method gives the hints itself (`Batch.tell`): its `tells`, False by default.

    Args:
        method: The method.

    Returns:
        Its `tells`; False for a method that does not say. The prompts then need hints.
    """
    return bool(getattr(method, "tells", False))


def fewest_completions(method: Any) -> int:
    """Return how many completions of a prompt a method compares: its `least_n`, 1 by default.

    Args:
        method: The method.

    Returns:
        Its `least_n`; 1 for a method that does not say.
    """
    return int(getattr(method, "least_n", 1))


def student_share(method: object) -> float:
    """Return the share of prompts whose completion the student writes.

    Args:
        method: The method.

    Returns:
        From 0 to 1; 1 for a method that does not say.
    """
    return float(method.on_policy) if isinstance(method, HasShare) else 1.0


def writer_names(method: object) -> tuple[str, ...]:
    """Return the names of those who write the other completions.

    Args:
        method: The method.

    Returns:
        Its `writer` as a tuple; `("teacher",)` for a method that does not say.
    """
    writer = method.writer if isinstance(method, HasWriter) else "teacher"
    return (writer,) if isinstance(writer, str) else tuple(writer)


def name_of(method: Any) -> str:
    """Return the name of a method for people: its class, or the function that it was made of.

    Args:
        method: A method, a function, or a partial of one.

    Returns:
        The name.
    """
    function = method.function if isinstance(method, FunctionMethod) else method
    while isinstance(function, partial):
        function = function.args[0] if function.func is _loss_of_pair else function.func
    return str(getattr(function, "__name__", type(function).__name__))


def method_of_function(function: Any, needs: Sequence[str], plan: Planner | None) -> FunctionMethod:
    """Make a method of a loss function of rows, or of two distributions.

    Args:
        function: `rows -> [n]`, or a function of the log-probs of student and teacher `[n, V]`.
        needs: The policies that it reads.
        plan: Its plan, or None; one of a `FunctionMethod` is kept.

    Returns:
        The method; its needs are read and without repeats.

    Raises:
        InvalidValue: It is no function, takes something else, or a name cannot be read.
    """
    if not callable(function):
        raise InvalidValue(
            f"opdlab.method got {shortened(function)}. Put it above a loss function: def"
            " my_loss(rows)."
        )
    name = name_of(function)
    names = tuple(str(need) for need in parse_needs(needs, name))
    if isinstance(function, FunctionMethod):
        return replace(function, needs=names, planner=plan or function.planner)
    if plan is not None:
        if not callable(plan):
            raise InvalidValue(
                f"{name} has plan={shortened(plan)}. Make it a function of the batch, or leave it"
                " out."
            )
        check_takes_one(plan, f"the plan of {name}", "batch")
    if _takes_two_distributions(function):
        return FunctionMethod(partial(_loss_of_pair, function), names, plan)
    check_takes_one(function, name, "rows")
    return FunctionMethod(function, names, plan)


def _with_formula(method: FunctionMethod, formula: str) -> FunctionMethod:
    return replace(method, formula=formula or method.formula)


def _loss_of_pair(pair: Callable[..., Tensor], rows: Rows) -> Tensor:
    return pair(rows.student, rows.teacher)


def _takes_two_distributions(function: Callable[..., Any]) -> bool:
    """Tell whether a function takes the log-probs of student and teacher rather than rows."""
    required = [
        name
        for name, parameter in parameters_of(function)
        if parameter.default is parameter.empty and parameter.kind in _POSITIONAL
    ]
    return len(required) == 2 and required[0] not in ("rows", "row", "batch", "chunk")


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def parameters_of(function: Callable[..., Any]) -> list[tuple[str, inspect.Parameter]]:
    """Return the parameters of a function; none for functions of C, which cannot be asked.

    Args:
        function: Any callable.

    Returns:
        Names and parameters, in order.
    """
    try:
        return list(inspect.signature(function).parameters.items())
    except (TypeError, ValueError):
        return []


def check_takes_one(function: Callable[..., Any], name: str, argument: str) -> None:
    """Check that a function can be called with one argument.

    Args:
        function: The function.
        name: Its name, for the error.
        argument: The name of the argument, for the error.

    Raises:
        InvalidValue: It cannot.
    """
    try:
        inspect.signature(function).bind(object())
    except TypeError:
        takes = ", ".join(str(one) for _, one in parameters_of(function)) or "nothing"
        raise InvalidValue(
            f"{name} takes {takes}, but it is called with {argument} alone. Write it as a function"
            f" of one argument, {argument}."
        ) from None
    except ValueError:
        # Functions of C do not say what they take; a method of a class must at least take self.
        if inspect.ismethod(function):
            own = name.rpartition(".")[2]
            raise InvalidValue(
                f"{name} takes nothing, not even self. Write it as def {own}(self, {argument})."
            ) from None
