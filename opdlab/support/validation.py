"""Validate what a user passes, with pydantic, and answer in opdlab's own words.

A value is described once, by its type: `steps: Count` in a dataclass, `seed: Seed` in a signature.
The types below carry a sentence that completes "Use …", which becomes the second half of the error:

    Settings got micro_batch=-1. Use a whole number of at least 1, or None.

Numbers of numpy count as Python's own; booleans, strings and tensors are no numbers, and nothing is
rounded or converted from text.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import numbers
import os
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import (
    Annotated,
    Any,
    ClassVar,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PydanticUserError,
    SkipValidation,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import CoreSchema, core_schema

from opdlab.errors import InvalidValue, UnknownOption
from opdlab.support.expect import advice, shortened

_Value = TypeVar("_Value")
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _read_number(value: Any) -> Any:
    """Read numpy's scalars as Python's; refuse booleans, since `True` for a count is a slip."""
    if isinstance(value, (bool, np.bool_)):
        raise ValueError("a boolean is no number")
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise ValueError("no number")  # strings and tensors of one element are no numbers either


def _check_temperature(value: float) -> float:
    """Refuse temperatures near 0: logits divided by them leave the range of float32."""
    if 0 < value < 1e-3:
        raise ValueError("too near 0")
    return value


def _read_flag(value: Any) -> Any:
    return bool(value) if isinstance(value, np.bool_) else value


# Strict: "3" is no count, 2.0 is no count, NaN and infinity are no amounts.
Count = Annotated[
    int,
    BeforeValidator(_read_number),
    Field(strict=True, ge=1, description="a whole number of at least 1"),
]
Whole = Annotated[
    int, BeforeValidator(_read_number), Field(strict=True, description="a whole number")
]
CountOrZero = Annotated[
    int,
    BeforeValidator(_read_number),
    Field(strict=True, ge=0, description="a whole number of at least 0"),
]
Seed = Annotated[
    int,
    BeforeValidator(_read_number),
    Field(strict=True, ge=0, lt=1 << 32, description="a whole number from 0 to 2**32 - 1"),
]
# One generator of PyTorch starts with such a number; `opdlab.data.seeds.seed_of` makes them.
GeneratorSeed = Annotated[
    int,
    BeforeValidator(_read_number),
    Field(strict=True, ge=0, lt=1 << 64, description="a whole number from 0 to 2**64 - 1"),
]
Amount = Annotated[
    float,
    BeforeValidator(_read_number),
    Field(strict=True, ge=0, allow_inf_nan=False, description="a finite number of at least 0"),
]
AmountOrInfinity = Annotated[
    float,
    BeforeValidator(_read_number),
    Field(strict=True, ge=0, description="a number of at least 0; infinity is allowed"),
]
Number = Annotated[float, BeforeValidator(_read_number), Field(strict=True, description="a number")]
Positive = Annotated[
    float,
    BeforeValidator(_read_number),
    Field(strict=True, gt=0, allow_inf_nan=False, description="a finite number above 0"),
]
Finite = Annotated[
    float,
    BeforeValidator(_read_number),
    Field(strict=True, allow_inf_nan=False, description="a finite number"),
]
Share = Annotated[
    float,
    BeforeValidator(_read_number),
    Field(strict=True, ge=0, le=1, allow_inf_nan=False, description="a number from 0 to 1"),
]
PositiveShare = Annotated[
    float,
    BeforeValidator(_read_number),
    Field(strict=True, gt=0, le=1, allow_inf_nan=False, description="a number above 0, at most 1"),
]
ShareBelowOne = Annotated[
    float,
    BeforeValidator(_read_number),
    Field(strict=True, ge=0, lt=1, allow_inf_nan=False, description="a number from 0 to below 1"),
]
Temperature = Annotated[
    float,
    BeforeValidator(_read_number),
    Field(
        strict=True,
        ge=0,
        allow_inf_nan=False,
        description="0 for the likeliest token, or a finite number of at least 0.001",
    ),
    AfterValidator(_check_temperature),
]
Flag = Annotated[bool, BeforeValidator(_read_flag), Field(strict=True, description="True or False")]
Folder = Annotated[
    str | os.PathLike[str], Field(description="the path of a folder, as 'runs/first'")
]
Text = Annotated[str, Field(strict=True, description="a text")]


def _read_path(value: Any) -> Any:
    """Refuse an empty path, which is the working directory."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ValueError("no path")
    return value


def _read_list(value: Any) -> Any:
    """Read ranges, arrays, tensors and columns of tables as lists."""
    if isinstance(value, range):
        return list(value)
    return value.tolist() if hasattr(value, "tolist") else value


FilePath = Annotated[
    str | os.PathLike[str],
    BeforeValidator(_read_path),
    Field(description="the path of a file, as 'runs/first.html'"),
]
Numbers = Annotated[
    Sequence[Number], BeforeValidator(_read_list), Field(description="a list of numbers")
]
NumbersByRow = Annotated[
    Mapping[int, Number], Field(description="a dict of numbers by completion, as {0: 1.0}")
]
Thresholds = Annotated[
    Mapping[str, Finite], Field(description="a dict of numbers by column, as {'log_ratio': 1.0}")
]
WholeNumbers = Annotated[
    Sequence[Whole], BeforeValidator(_read_list), Field(description="a list of whole numbers")
]
Texts = Annotated[Sequence[Text], Field(description="a list of texts")]
ByName = Annotated[
    Mapping[str, Any], Field(description="a dict of policies by name, as {'reference': policy}")
]
Unchecked = Annotated[_Value, SkipValidation]  # for arguments that the function itself looks at
Addresses = Annotated[
    str | Sequence[str],
    Field(description="the address of a server, or a list of those of servers of one model"),
]


def validate_fields(instance: Any) -> None:
    """Check the annotated fields of a frozen dataclass, from its `__post_init__`.

    Converted values, such as Python's numbers for numpy's, are put back.

    Args:
        instance: The dataclass object; its fields may be replaced.

    Raises:
        InvalidValue: A field has a value that its type does not allow. The message names the class,
            the field, the value and what would be right.
    """
    kind = type(instance)
    for name, adapter in _adapters(cast(Hashable, kind)).items():
        if name in kind.__dataclass_fields__:
            object.__setattr__(
                instance,
                name,
                _validate_value(kind.__name__, name, getattr(instance, name), adapter),
            )


def validate_arguments(function: _Function) -> _Function:
    """Check a function's annotated arguments before it runs, and refuse unknown ones.

    Annotations that cannot be read here, such as types that are imported for type checkers alone,
    let every value pass.

    Args:
        function: The function or method to decorate.

    Returns:
        A function with the same signature, which checks and then calls it.

    Raises:
        UnknownOption: A call has an unknown argument or lacks one.
        InvalidValue: A call has an argument with a value that its type does not allow.
    """
    signature = inspect.signature(function)
    owner = function.__qualname__.removesuffix(".__init__").removesuffix(".__call__")

    @functools.wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        try:
            bound = signature.bind(*args, **options)
        except TypeError as error:
            raise UnknownOption(
                f"{owner}: {error}. It takes {_list_parameters(signature)}."
            ) from None
        for name, adapter in _adapters(function).items():
            if name in bound.arguments:
                bound.arguments[name] = _validate_value(owner, name, bound.arguments[name], adapter)
        return function(*bound.args, **bound.kwargs)

    return checked  # type: ignore[return-value]


def validate(owner: str, values: Mapping[str, Any], types: Mapping[str, Any]) -> dict[str, Any]:
    """Check some values by name against types.

        validate("distill", {"steps": 3}, {"steps": Count})

    Args:
        owner: The function that was called, for errors.
        values: The values, by name.
        types: The type of each.

    Returns:
        The values as Python's own.

    Raises:
        InvalidValue: A value is not what its type allows.
    """
    checks = {name: _adapter(types[name]) for name in values}
    return {
        name: value
        if (check := checks[name]) is None
        else _validate_value(owner, name, value, check)
        for name, value in values.items()
    }


class _Names(dict[str, Any]):
    """Names for reading annotations; those imported for type checkers alone stand for anything."""

    def __missing__(self, name: str) -> Any:
        return Any


@functools.cache
def _adapters(owner: Hashable) -> dict[str, TypeAdapter[Any]]:
    """Make the checks of a class's fields or a function's arguments, by name.

    Fields and arguments that only `Any` describes have none.
    """
    if isinstance(owner, type):
        hints = {
            name: hint for base in reversed(owner.__mro__) for name, hint in _hints(base).items()
        }
    else:
        hints = _hints(owner)
    hints.pop("return", None)
    checks = {
        name: _adapter(hint)
        for name, hint in hints.items()
        if hint is not Any and get_origin(hint) is not ClassVar
    }
    return {name: adapter for name, adapter in checks.items() if adapter is not None}


def _hints(owner: Any) -> dict[str, Any]:
    """Read the annotations of a function, or of a class without its bases, in their module."""
    module = inspect.getmodule(owner)
    names = _Names({**vars(builtins), **vars(module)} if module else {})
    hints = {}
    for name, written in dict(
        vars(owner).get("__annotations__", {}) if isinstance(owner, type) else owner.__annotations__
    ).items():
        holder = type("Holder", (), {"__annotations__": {name: written}})
        try:
            hints[name] = get_type_hints(holder, localns=names, include_extras=True)[name]
        except Exception:  # what cannot be read here cannot be checked here
            hints[name] = Any
    return hints


def _adapter(hint: Any) -> TypeAdapter[Any] | None:
    """Make the check of a type; None for types that pydantic cannot check."""
    try:
        return TypeAdapter(
            _by_instance(hint), config=ConfigDict(arbitrary_types_allowed=True, strict=True)
        )
    except PydanticUserError:
        return None


@dataclass(frozen=True)
class _IsInstance:
    """A check by `isinstance` alone; pydantic's `InstanceOf` also needs to know how to write one.

    Attributes:
        kind: The class.
    """

    kind: type

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        """Make the check, as pydantic asks for it.

        Args:
            source: The annotated type.
            handler: Makes other checks.

        Returns:
            The check in pydantic's terms.
        """
        return core_schema.is_instance_schema(self.kind)


def _by_instance(hint: Any) -> Any:
    """Let dataclasses and models in a hint be checked by `isinstance`.

    Pydantic would make one of a dict.
    """
    is_pydantic = isinstance(hint, type) and issubclass(hint, BaseModel)
    if is_pydantic or (isinstance(hint, type) and is_dataclass(hint)):
        return Annotated[Any, _IsInstance(hint)]
    if isinstance(hint, types.UnionType) or get_origin(hint) is Union:
        return Union[tuple(_by_instance(part) for part in get_args(hint))]  # noqa: UP007
    if get_origin(hint) in (list, tuple, dict, Sequence, Mapping):
        origin: Any = get_origin(hint)
        return origin[tuple(_by_instance(part) for part in get_args(hint))]
    return hint


def _validate_value(owner: str, name: str, value: Any, adapter: TypeAdapter[Any]) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise InvalidValue(
            f"{owner} got {name}={shortened(value)}. {_advice(adapter, error, value)}"
        ) from None


def _advice(adapter: TypeAdapter[Any], error: ValidationError, value: Any) -> str:
    """Say what to do instead.

    Objects that are known to be mixed up are told apart; for the rest, the type says what is right.
    """
    wanted = [
        str(one["ctx"]["class"])
        for one in error.errors()
        if one["type"] == "is_instance_of" and not one["loc"]
    ]
    told = advice(wanted[0], value) if len(wanted) == 1 else ""
    return told or f"Use {_say_wanted(adapter, error)}."


def _say_wanted(adapter: TypeAdapter[Any], error: ValidationError) -> str:
    """Say what would be right, from the descriptions of the type; else in pydantic's own words."""
    try:
        schema = adapter.json_schema()
    except Exception:  # some types have none
        schema = {}
    said = _describe(schema)
    return said or "; ".join(
        str(one["msg"]).removeprefix("Input should be ") for one in error.errors()
    )


def _describe(schema: Mapping[str, Any]) -> str:
    if "description" in schema and "properties" not in schema:
        return str(schema["description"])
    if "enum" in schema or "const" in schema:
        return " or ".join(repr(choice) for choice in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "null":
        return "None"
    parts = [_describe(part) for part in schema.get("anyOf", [])]
    return ", or ".join(parts) if parts and all(parts) else ""


def _list_parameters(signature: inspect.Signature) -> str:
    return ", ".join(name for name in signature.parameters if name not in ("self", "cls"))
