"""The state that a method keeps from step to step.

It is saved where the method says how; elsewhere the user is warned that a checkpoint loses it.

A method that keeps running statistics offers

    state_dict() -> {name: tensor, or a value that JSON holds}
    load_state_dict(state)          the same mapping back, tensors on the device that they came from

as `torch.nn.Module` does. A method with `parts` (`Combined`) keeps what its parts keep, under
`<part>/<name>`. Checkpoints hold that state, a resumed run goes on with it, and a step
that fails or is interrupted leaves it as it was. A method may remember things without saying so
(attributes, variables of an enclosing function, globals). These are compared with what they were at
the beginning: what has moved is named, since it is lost.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from opdlab.errors import DamagedFile, InvalidValue, OpdlabError
from opdlab.methods.contract import HasParts
from opdlab.models.fingerprints import describe, digest

FILE = "method.safetensors"

_PLAIN = (bool, int, float, str, list, dict, set, deque, Tensor, np.ndarray, torch.Generator)
_LIBRARIES = {
    "opdlab",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "accelerate",
    "datasets",
    "pandas",
    "numpy",
    "builtins",
}
_MOST = 1000  # entries of a container that are looked at, half of them at each end


def keeps_state(method: Any) -> bool:
    """Tell whether a method says how its state is saved.

    Args:
        method: The method.

    Returns:
        True if it has `state_dict` and `load_state_dict`, False if it has neither.

    Raises:
        OpdlabError: It has one half of the protocol only.
    """
    return bool(_holders(method))


def _holders(method: Any, prefix: str = "") -> dict[str, Any]:
    """The methods that keep a state, by what stands before the names of their values."""
    found = {prefix: method} if _keeps_own_state(method) else {}
    for name, part in _parts_of(method).items():
        found |= _holders(part, f"{prefix}{name}/")
    return found


def _parts_of(method: Any) -> Mapping[str, Any]:
    return method.parts if isinstance(method, HasParts) else {}


def _load_state(method: Any, state: Mapping[str, Any]) -> None:
    """Give each method that keeps a state its own values back."""
    for prefix, holder in _holders(method).items():
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        holder.load_state_dict(own)


def _keeps_own_state(method: Any) -> bool:
    halves = [callable(getattr(method, name, None)) for name in ("state_dict", "load_state_dict")]
    if halves[0] != halves[1]:
        there, missing = (
            ("state_dict", "load_state_dict") if halves[0] else ("load_state_dict", "state_dict")
        )
        raise OpdlabError(
            f"{type(method).__name__} has {there} but no {missing}. Give it both, or neither."
        )
    return all(halves)


def read_state(method: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a method's state: copies of its tensors, and the rest as JSON holds it.

    Args:
        method: A method that keeps state.

    Returns:
        The tensors by name, and the plain values by name.

    Raises:
        InvalidValue: `state_dict` returned something that cannot be saved.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for prefix, holder in _holders(method).items():
        own_tensors, own_plain = _read_own_state(holder)
        tensors |= {f"{prefix}{name}": value for name, value in own_tensors.items()}
        plain |= {f"{prefix}{name}": value for name, value in own_plain.items()}
    return tensors, plain


def _read_own_state(method: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    owner = type(method).__name__
    state = method.state_dict()
    if not isinstance(state, Mapping):
        raise InvalidValue(
            f"{owner}.state_dict() returned a {type(state).__name__}. Return a dict of tensors and"
            " plain values."
        )
    tensors, plain = {}, {}
    for name, value in state.items():
        if not isinstance(name, str):
            raise InvalidValue(f"{owner}.state_dict() has the key {name!r}. Use texts as keys.")
        if isinstance(value, Tensor):
            tensors[name] = value.detach().clone().contiguous()
        else:
            _check_plain(value, f"{owner}.state_dict()[{name!r}]")
            plain[name] = json.loads(json.dumps(value))  # a copy
    return tensors, plain


def _check_plain(value: Any, where: str) -> None:
    if value is None or isinstance(value, (bool, int, float, str)):
        return
    if isinstance(value, list):
        for i, one in enumerate(value):
            _check_plain(one, f"{where}[{i}]")
        return
    if isinstance(value, dict):
        for key, one in value.items():
            if not isinstance(key, str):
                raise InvalidValue(f"{where} has the key {key!r}. Use texts as keys.")
            _check_plain(one, f"{where}[{key!r}]")
        return
    raise InvalidValue(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold. Use tensors at the "
        "top, and numbers, texts, True, False, None, lists and dicts anywhere."
    )


def write_state(method: Any, folder: Path) -> None:
    """Save the state of a method that has one into a checkpoint's folder.

    Args:
        method: The method; one without state writes nothing.
        folder: The checkpoint's folder.
    """
    if not keeps_state(method):
        return
    tensors, plain = read_state(method)
    accelerated = [name for name, value in tensors.items() if value.device.type != "cpu"]
    said = json.dumps({"plain": plain, "accelerated": accelerated})
    (folder / FILE).write_bytes(
        save({name: value.cpu() for name, value in tensors.items()}, metadata={"state": said})
    )


def restore_state(method: Any, folder: Path, device: torch.device) -> None:
    """Give a method the state that a checkpoint holds, if it has one.

    Args:
        method: The method.
        folder: The checkpoint's folder.
        device: The device for tensors that were not on a CPU when they were saved.

    Raises:
        DamagedFile: The file cannot be read.
        OpdlabError: The method has no state and the checkpoint does, or the other way round.
    """
    path = folder / FILE
    if keeps_state(method) != path.exists():
        said = (
            "holds no state of the method" if keeps_state(method) else "holds a state of the method"
        )
        has = "has state_dict" if keeps_state(method) else "has no state_dict and load_state_dict"
        raise OpdlabError(
            f"{folder} {said}, but {type(method).__name__} {has}. Give the method that the run was"
            " trained with."
        )
    if path.exists():
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                said = json.loads(file.metadata()["state"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedFile(
                f"{path} cannot be read ({error}). Resume from an earlier checkpoint: step=N."
            ) from error
        for name in said["accelerated"]:
            tensors[name] = tensors[name].to(device)
        _load_state(method, {**tensors, **said["plain"]})


@contextlib.contextmanager
def restoring_on_failure(method: Any, is_counted: Callable[[], bool]) -> Iterator[None]:
    """Put a method's state back if the block fails before its step is counted.

    So a step that is repeated counts nothing twice.

    Args:
        method: The method; nothing is done for one without state.
        is_counted: Tells whether the step counts already.

    Yields:
        Nothing; the block runs once.
    """
    if not keeps_state(method):
        yield
        return
    tensors, plain = read_state(method)
    try:
        yield
    except BaseException:
        if not is_counted():
            _load_state(method, {**tensors, **plain})
        raise


class Memory:
    """Watches for what a method remembers without saying so.

    `Memory(method)` at the beginning of a run; `moved()` later names what is no longer as it was.

    Attributes:
        method: The method that is watched.

    Raises:
        OpdlabError: The method has one half of the protocol of state only.
        InvalidValue: Its state cannot be saved.
    """

    def __init__(self, method: Any) -> None:
        self.method = method
        # What the parts of a method keep without saying so is looked at part by part.
        self._is_saved = _keeps_own_state(method)
        if keeps_state(method):
            read_state(method)  # what cannot be saved is refused before the first step
        self._before = _remembered_values(method)
        self._told = False

    def moved(self) -> list[str]:
        """Name the attributes, enclosing variables and globals that changed since the beginning.

        Returns:
            Their names, sorted.
        """
        now = _remembered_values(self.method)
        return sorted(
            name
            for name in now.keys() | self._before.keys()
            if now.get(name) != self._before.get(name)
        )

    def forgotten(self) -> list[str]:
        """Name what has changed and no checkpoint holds; warns the first time.

        Returns:
            Their names, sorted; none for a method that saves its state.
        """
        names = [] if self._is_saved else self.moved()
        if names and not self._told:
            self._told = True
            warnings.warn(
                f"{type(self.method).__name__} keeps {', '.join(names)} from step to step, and "
                "checkpoints do not hold that: a resumed run starts with what the method is given"
                " with then. Give the method state_dict() and load_state_dict(state).",
                stacklevel=2,
            )
        return names


def _remembered_values(method: Any) -> dict[str, str]:
    """Fingerprints of the values that a method's functions can change, by name."""
    if parts := _parts_of(method):
        return {
            f"{part}: {name}": value
            for part, one in parts.items()
            for name, value in ({} if _keeps_own_state(one) else _remembered_values(one)).items()
        }
    held: dict[str, Any] = {}
    own = dict(getattr(method, "__dict__", {}))
    own |= {
        name: getattr(method, name)
        for name in getattr(type(method), "__slots__", ())
        if hasattr(method, name)
    }
    if not type(method).__module__.startswith("opdlab."):
        shared = {
            name: value
            for name, value in vars(type(method)).items()
            if isinstance(value, _PLAIN) and not name.startswith("__")
        }
        own = {**shared, **own}
    held.update(
        {
            f"{type(method).__name__}.{name}": value
            for name, value in own.items()
            if not inspect.isroutine(value)
        }
    )
    if not type(method).__module__.startswith("opdlab.") or any(
        inspect.isroutine(value) for value in own.values()
    ):
        functions = [getattr(method, name, None) for name in ("plan", "loss")] + [
            v for v in own.values() if inspect.isroutine(v)
        ]
        for function in functions:
            held.update(_reachable_values(function))
    return {name: digest(json.dumps(_state_of(value))) for name, value in held.items()}


def _reachable_values(function: Any) -> dict[str, Any]:
    """Variables outside of a function that it reads or writes, if they can hold a state."""
    if function is None:
        return {}
    function = inspect.unwrap(getattr(function, "__func__", function))
    if not inspect.isfunction(function):
        return {}
    if (function.__module__ or "").startswith("opdlab."):  # None for functions made by exec
        return {}
    try:
        reached = inspect.getclosurevars(function)
    except (TypeError, ValueError):
        return {}
    found = {
        f"{name} (of {function.__qualname__})": value for name, value in reached.nonlocals.items()
    }
    found.update(
        {
            f"{name} (a global of {function.__qualname__})": value
            for name, value in reached.globals.items()
        }
    )
    return {
        name: value
        for name, value in found.items()
        if value is None or isinstance(value, _PLAIN) or _is_record(value)
    }


def _is_record(value: Any) -> bool:
    """Tell whether it is an object with attributes, of a class of the user's own."""
    if isinstance(value, (type, ModuleType)) or (
        callable(value) and not isinstance(value, nn.Module)
    ):
        return False
    return hasattr(value, "__dict__") and type(value).__module__.split(".")[0] not in _LIBRARIES


def _state_of(value: Any, depth: int = 3) -> Any:
    """`describe`, and into the attributes of the user's own objects."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, nn.Module):
        return describe(value)
    if _is_record(value) and depth:
        return {name: _state_of(one, depth - 1) for name, one in sorted(vars(value).items())}
    if isinstance(value, dict) and depth:
        value = [[str(key), one] for key, one in value.items()]
    if isinstance(value, (list, tuple, set, deque)) and depth:
        values = sorted(value, key=repr) if isinstance(value, set) else list(value)
        ends = values if len(values) <= _MOST else values[: _MOST // 2] + values[-_MOST // 2 :]
        return [len(values), *(_state_of(one, depth - 1) for one in ends)]
    return describe(value)
