"""The one conversion of what a user gives as a method: an instance, a class or a function.

`distill`, `audit`, `what_if`, `exact`, the Playground and the TRL bridge all call `as_method`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from opdlab.engine.needs import did_you_mean, parse_needs
from opdlab.errors import InvalidValue
from opdlab.methods.contract import (
    DEFAULT_NEEDS,
    VARIADIC,
    HasRecipe,
    HasShare,
    HasWriter,
    Method,
    check_takes_one,
    method_of_function,
    name_of,
    parameters_of,
)
from opdlab.support.expect import is_model, shortened
from opdlab.support.validation import Share, validate


def as_method(
    value: Any, where: str = "distill", needs: Sequence[str] | str | None = None
) -> Method:
    """Convert what a user gives as a method to a `Method`.

    Args:
        value: A method, a class (made with its defaults), a loss function of rows, or a function
            of the student's and the teacher's log-probs. A function reads the teacher, unless it
            has an attribute `needs` or `needs` is given.
        where: The function that was called, for errors.
        needs: The policies that a bare function reads.

    Returns:
        The method; `value` itself where it is one.

    Raises:
        InvalidValue: `value` is none of these, such as a name or an object without a loss, or its
            parts do not fit the contract.
    """
    if inspect.isclass(value):
        value = _make_instance(value, where)
    if isinstance(value, str):
        raise InvalidValue(
            f"{where} got the text {shortened(value)} for a method. {_advise_on_name(value)}"
        )
    if hasattr(value, "loss"):
        if needs is not None:
            raise InvalidValue(
                f"{where} got needs={shortened(needs)} beside {name_of(value)}, which names its"
                " own. Leave needs out."
            )
        _check_contract(value, where)
        return value  # type: ignore[no-any-return]  # it has needs and loss
    if not callable(value) or is_model(value):
        raise InvalidValue(
            f"{where} got {shortened(value)}. Give a loss (a function of rows), a method, as"
            " opdlab.OPD(), or the class of one: an object without a loss trains nothing."
        )
    own = getattr(value, "needs", DEFAULT_NEEDS) if needs is None else needs
    return method_of_function(
        value, (own,) if isinstance(own, str) else own, getattr(value, "plan", None)
    )


def _make_instance(kind: type, where: str) -> Any:
    """Make an object of a class with its defaults."""
    if kind is Method or not (hasattr(kind, "loss") or _is_callable_class(kind)):
        raise InvalidValue(
            f"{where} got the class {kind.__name__}, which has no loss. Use a method, as"
            " opdlab.OPD()."
        )
    required = [
        name
        for name, one in parameters_of(kind)
        if one.default is one.empty and one.kind not in VARIADIC
    ]
    if required:
        raise InvalidValue(
            f"{where} got the class {kind.__name__}, which needs {', '.join(required)}. Make a"
            f" method of it: {kind.__name__}({required[0]}=…)."
        )
    try:
        return kind()
    except TypeError as error:
        raise InvalidValue(
            f"{where} got the class {kind.__name__}, which cannot be made without arguments"
            f" ({error}). Make an object of it."
        ) from None


def _is_callable_class(kind: type) -> bool:
    """Tell whether objects of the class can be called; every class itself can."""
    return any("__call__" in vars(base) for base in kind.__mro__ if base is not object)


def _check_contract(value: Any, where: str) -> None:
    """Raise InvalidValue unless the parts of a method fit the contract."""
    name = name_of(value)
    if not callable(value.loss):
        raise InvalidValue(
            f"{where} got {name}, whose loss is {shortened(value.loss)}. Make it a function of"
            " rows: def loss(self, rows)."
        )
    check_takes_one(value.loss, f"{name}.loss", "rows")
    if not hasattr(value, "needs"):
        raise InvalidValue(
            f"{where} got {name}, which does not say what it reads. Give it needs = ('teacher',),"
            " or () for nothing."
        )
    parse_needs(value.needs, name)
    # Not isinstance(value, HasPlan), for which a plan of None is no plan.
    if hasattr(value, "plan"):
        if not callable(value.plan):
            raise InvalidValue(
                f"{where} got {name}, whose plan is {shortened(value.plan)}. Make it a function of"
                " the batch, or leave it out."
            )
        check_takes_one(value.plan, f"{name}.plan", "batch")
    _check_writers(value, name)
    if isinstance(value, HasRecipe) and not isinstance(value.recipe, Mapping):
        raise InvalidValue(
            f"{name} has recipe={shortened(value.recipe)}. Use a dict of settings, as"
            " {'normalize': 'sequence'}."
        )


def _check_writers(value: Any, name: str) -> None:
    """Raise InvalidValue unless `on_policy` is a share and `writer` names policies."""
    if isinstance(value, HasShare):
        validate(name, {"on_policy": value.on_policy}, {"on_policy": Share})
    writer = value.writer if isinstance(value, HasWriter) else "teacher"
    names = (writer,) if isinstance(writer, str) else writer
    known = ("teacher", "answer", *value.needs)
    if not isinstance(names, Sequence) or not names or any(one not in known for one in names):
        raise InvalidValue(
            f"{name} has writer={shortened(writer)}. Use"
            f" {', '.join(map(repr, dict.fromkeys(known)))}, or a tuple of these."
        )


def _advise_on_name(name: str) -> str:
    """Say what to write instead of a method's name."""
    # Looked up when it is asked for: the methods themselves may convert what they are given.
    methods = importlib.import_module("opdlab.methods")
    known = [one for one in methods.__all__ if one not in ("Method", "method")]
    same = {one.lower(): one for one in known}
    found = same.get(name.lower().replace("-", "").replace("_", "").replace("+", "plus"))
    if found:
        return f"Use the method itself: opdlab.{found}()."
    return (
        f"{did_you_mean(name, known)}Use one of opdlab's methods itself, as opdlab.OPD(); there are"
        f" {', '.join(known)}."
    )
