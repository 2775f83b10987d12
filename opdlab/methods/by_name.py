"""Find methods by the names that a command line and a config file have for them."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from opdlab import methods
from opdlab.engine.needs import did_you_mean
from opdlab.errors import InvalidValue, OpdlabError, UnknownOption
from opdlab.losses.divergences import TopK
from opdlab.methods.contract import Method
from opdlab.support.expect import shortened


def list_methods() -> list[str]:
    """List the names of opdlab's methods.

    Returns:
        The names of their classes, in alphabetical order.
    """
    return sorted(kind for kind in methods.__all__ if kind not in ("Method", "method"))


def find_method(name: str) -> type[Any]:
    """Find the class of a method.

    Args:
        name: A name of `opdlab.methods`; capitals, hyphens and underscores do not matter.

    Returns:
        The class.

    Raises:
        OpdlabError: There is no such method.
    """
    wanted = name.lower().replace("-", "").replace("_", "").replace("+", "plus")
    by_lower_case = {kind.lower(): kind for kind in list_methods()}
    if wanted not in by_lower_case:
        raise OpdlabError(
            f"There is no method {name!r}. Use one of {', '.join(list_methods())}; capitals and"
            " hyphens do not matter."
        )
    found: type[Any] = getattr(methods, by_lower_case[wanted])
    return found


def make_method(name: str, options: Mapping[str, Any], where: str = "[method]") -> Method:
    """Make a method of its name and plain options, as a config file has them.

    Args:
        name: See `find_method`.
        options: Fields of the method. `top_k` may be a number or a table of the fields of `TopK`;
            False stands for None where a field may be None, since TOML has no None.
        where: The place of the options, for errors.

    Returns:
        The method.

    Raises:
        OpdlabError: There is no such method.
        UnknownOption: The method has no such option.
        InvalidValue: An option has a value that cannot be right.
    """
    kind = find_method(name)
    if kind is methods.Combined:
        return _make_combined(options, where)
    known = [field.name for field in fields(kind)]
    for key in options:
        if key not in known:
            takes = f"It takes {', '.join(known)}." if known else "It takes none."
            raise UnknownOption(
                f"{where} has {key!r}, which is no option of {kind.__name__}."
                f" {did_you_mean(key, known)}{takes}"
            )
    hints = get_type_hints(kind)
    made: Method = kind(
        **{key: _read_option(where, key, value, hints[key]) for key, value in options.items()}
    )
    return made


def _make_combined(options: Mapping[str, Any], where: str) -> Method:
    """Make a `Combined` of tables, each with the name and the options of a method."""
    for key in options:
        if key not in ("methods", "weights"):
            raise UnknownOption(
                f"{where} has {key!r}, which is no option of Combined."
                f" {did_you_mean(key, ('methods', 'weights'))}It takes methods, weights."
            )
    tables = options.get("methods", ())
    is_list = isinstance(tables, Sequence) and not isinstance(tables, str)
    if not is_list or not all(isinstance(one, Mapping) and "name" in one for one in tables):
        raise InvalidValue(
            f"{where} has methods={shortened(tables)}. Give a list of tables, each with the name of"
            ' a method: methods = [{name = "opd"}, {name = "grpo"}].'
        )
    made = []
    for number, table in enumerate(tables):
        own = {key: value for key, value in table.items() if key != "name"}
        made.append(make_method(table["name"], own, f"{where}.methods[{number}]"))
    return methods.Combined(*made, weights=options.get("weights"))


def _read_option(where: str, key: str, value: Any, hint: Any) -> Any:
    if value is False and allows_none(hint):
        return None
    if key == "top_k" and isinstance(value, Mapping):
        names = [field.name for field in fields(TopK)]
        if unknown := [one for one in value if one not in names]:
            raise UnknownOption(
                f"{where} has top_k={shortened(dict(value))}, and a support has no"
                f" {unknown[0]!r}. It takes {', '.join(names)}."
            )
        if "k" not in value:
            raise InvalidValue(f"{where} has a top_k without k. Give the number, as k=20.")
        return TopK(**value)
    return value


def allows_none(hint: Any) -> bool:
    """Tell whether a type allows None.

    Args:
        hint: A type, as `get_type_hints` gives it.

    Returns:
        True for `X | None`.
    """
    is_union = isinstance(hint, types.UnionType) or get_origin(hint) is Union
    return is_union and type(None) in get_args(hint)
