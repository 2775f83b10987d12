"""Validate what a user passes, with pydantic, and answer in opdlab's own words.

A value is described once, by its type: `steps: Count` in a dataclass, `seed: Seed` in a signature. The types below carry a
sentence that completes "Use …", which becomes the second half of the error:

    Settings got micro_batch=-1. Use a whole number of at least 1, or None.

Numbers of numpy count as Python's own; booleans, strings and tensors are no numbers, and nothing is rounded or converted
from text.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import numbers
import reprlib
from collections.abc import Callable, Hashable, Mapping
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin, get_type_hints

import numpy as np
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from opdlab.errors import InvalidValue

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _python_number(value: Any) -> Any:
    """Numpy's scalars as Python's; a boolean is refused, since `True` for a count is a slip."""
    if isinstance(value, (bool, np.bool_)):
        raise ValueError("a boolean is no number")
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise ValueError("no number")  # strings and tensors of one element are no numbers either


def _python_flag(value: Any) -> Any:
    return bool(value) if isinstance(value, np.bool_) else value


# Strict: "3" is no count, 2.0 is no count, NaN and infinity are no amounts.
Count = Annotated[int, BeforeValidator(_python_number), Field(strict=True, ge=1, description="a whole number of at least 1")]
CountOrZero = Annotated[int, BeforeValidator(_python_number), Field(strict=True, ge=0, description="a whole number of at least 0")]
Whole = Annotated[int, BeforeValidator(_python_number), Field(strict=True, description="a whole number")]
Seed = Annotated[
    int, BeforeValidator(_python_number), Field(strict=True, ge=0, lt=1 << 32, description="a whole number from 0 to 2**32 - 1")
]
Amount = Annotated[
    float, BeforeValidator(_python_number), Field(strict=True, ge=0, allow_inf_nan=False, description="a finite number of at least 0")
]
Positive = Annotated[
    float, BeforeValidator(_python_number), Field(strict=True, gt=0, allow_inf_nan=False, description="a finite number above 0")
]
Finite = Annotated[float, BeforeValidator(_python_number), Field(strict=True, allow_inf_nan=False, description="a finite number")]
Share = Annotated[
    float, BeforeValidator(_python_number), Field(strict=True, ge=0, le=1, allow_inf_nan=False, description="a number from 0 to 1")
]
PositiveShare = Annotated[
    float,
    BeforeValidator(_python_number),
    Field(strict=True, gt=0, le=1, allow_inf_nan=False, description="a number above 0, at most 1"),
]
Flag = Annotated[bool, BeforeValidator(_python_flag), Field(strict=True, description="True or False")]
Text = Annotated[str, Field(strict=True, description="a text")]


def validate_fields(instance: Any) -> None:
    """Check the annotated fields of a frozen dataclass, from its `__post_init__`; converted values are put back.

    Raises:
        InvalidValue: A field has a value that its type does not allow. The message names the class, the field, the value
            and what would be right.
    """
    kind = type(instance)
    for name, adapter in _adapters(cast(Hashable, kind)).items():
        if name in kind.__dataclass_fields__:
            object.__setattr__(instance, name, _validated(kind.__name__, name, getattr(instance, name), adapter))


def validate_arguments(function: _Function) -> _Function:
    """Check a function's annotated arguments before it runs, and refuse those that it does not have.

    Only arguments whose annotation says something that can be checked here are looked at: types that are imported for type
    checkers alone pass.

    Raises:
        InvalidValue: An argument is unknown, missing or has a value that its type does not allow.
    """
    signature = inspect.signature(function)
    owner = function.__qualname__.removesuffix(".__init__").removesuffix(".__call__")

    @functools.wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        try:
            bound = signature.bind(*args, **options)
        except TypeError as error:
            raise InvalidValue(f"{owner}: {error}. It takes {_listed(signature)}.") from None
        for name, adapter in _adapters(function).items():
            if name in bound.arguments:
                bound.arguments[name] = _validated(owner, name, bound.arguments[name], adapter)
        return function(*bound.args, **bound.kwargs)

    return checked  # type: ignore[return-value]


def validate(owner: str, values: Mapping[str, Any], types: Mapping[str, Any]) -> dict[str, Any]:
    """Check some values by name against types, as `validate("distill", {"steps": 3}, {"steps": Count})`.

    Raises:
        InvalidValue: A value is not what its type allows.
    """
    return {name: _validated(owner, name, value, _adapter(types[name])) for name, value in values.items()}


class _Names(dict[str, Any]):
    """Names for reading annotations: what is imported for type checkers alone stands for anything."""

    def __missing__(self, name: str) -> Any:
        return Any


@functools.cache
def _adapters(owner: Hashable) -> dict[str, TypeAdapter[Any]]:
    """The checks of a class's fields or a function's arguments, by name; those that only `Any` describes are left out."""
    module = inspect.getmodule(owner)
    names = _Names({**vars(builtins), **vars(module)} if module else {})
    hints = get_type_hints(owner, localns=names, include_extras=True)
    hints.pop("return", None)
    return {name: _adapter(hint) for name, hint in hints.items() if hint is not Any}


def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=None if _has_own_config(hint) else ConfigDict(arbitrary_types_allowed=True))


def _has_own_config(hint: Any) -> bool:
    """pydantic takes no second configuration for dataclasses and models, also where they stand as `InstanceOf[…]`."""
    hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return isinstance(hint, type) and (hasattr(hint, "__dataclass_fields__") or hasattr(hint, "model_fields"))


def _validated(owner: str, name: str, value: Any, adapter: TypeAdapter[Any]) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise InvalidValue(f"{owner} got {name}={shortened(value)}. Use {_wanted(adapter, error)}.") from None


def shortened(value: Any) -> str:
    """The `repr` of a foreign value, short and on one line, for an error message."""
    try:
        said = reprlib.repr(value)
    except Exception:
        said = f"a {type(value).__name__}"
    return " ".join(said.split())


def _wanted(adapter: TypeAdapter[Any], error: ValidationError) -> str:
    """What would be right, from the descriptions of the type; else pydantic's own words."""
    try:
        schema = adapter.json_schema()
    except Exception:
        schema = {}
    said = _described(schema)
    return said or "; ".join(str(one["msg"]).removeprefix("Input should be ") for one in error.errors())


def _described(schema: Mapping[str, Any]) -> str:
    if "description" in schema and "properties" not in schema:
        return str(schema["description"])
    if "enum" in schema or "const" in schema:
        return " or ".join(repr(choice) for choice in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "null":
        return "None"
    parts = [_described(part) for part in schema.get("anyOf", [])]
    return ", or ".join(parts) if parts and all(parts) else ""


def _listed(signature: inspect.Signature) -> str:
    return ", ".join(name for name in signature.parameters if name not in ("self", "cls"))
