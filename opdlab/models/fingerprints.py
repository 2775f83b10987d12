"""Make fingerprints: short names for large things, equal exactly where the things are.

Weights, tokenizers, functions and plain values get one each, as something that JSON holds. A
checkpoint keeps them to tell whether a run is resumed with what it was begun with. They guard
against mix-ups, not against forgery: of a large tensor only some entries are read, at least one in
every row.
"""

from __future__ import annotations

import ast
import dis
import functools
import hashlib
import inspect
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

SPREAD = 4096  # entries read of a tensor that has more, besides one in every row
# By tokenizer, its size and digest: to hash 150,000 tokens takes 0.1 s.
_VOCABULARIES: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, str]] = WeakKeyDictionary()

# Fields of a model's configuration that change no number, or that opdlab compares in another way.
_NEUTRAL = {
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def digest(*parts: str | bytes) -> str:
    """Make sixteen hexadecimal digits that stand for texts or bytes, in order.

    Args:
        parts: Texts or bytes; the digits depend on where one ends and the next begins.

    Returns:
        The beginning of a SHA-256.
    """
    whole = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()[:16]


def tensor_digest(value: Tensor) -> str:
    """Make a fingerprint of a tensor.

    All entries of a small one are read; of a large one, a spread of entries and one in every row.

    Args:
        value: A tensor of any shape and dtype, both of which count.

    Returns:
        Sixteen hexadecimal digits.
    """
    flat = value.detach().reshape(-1)
    if flat.numel() > 2 * SPREAD:
        width = value.shape[-1]
        rows = torch.arange(flat.numel() // width)
        spread = torch.arange(SPREAD) * (flat.numel() // SPREAD)
        places = torch.cat([rows * width + rows * 7919 % width, spread])
        flat = flat[places.to(flat.device)]
    data = b"" if flat.is_meta else flat.contiguous().cpu().view(torch.uint8).numpy().tobytes()
    return digest(str(value.dtype), str(tuple(value.shape)), data)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Make a fingerprint of named tensors, whatever their order.

    Args:
        tensors: Tensors by name.

    Returns:
        Sixteen hexadecimal digits.
    """
    return digest(*(f"{name} {tensor_digest(tensors[name])}" for name in sorted(tensors)))


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Take the model's own tensors, under the names that they have without adapters.

    PEFT wraps a layer that it adapts: the original is then `layer.base_layer`, or
    `layer.original_module` where the adapter holds a copy that is trained whole.

    Args:
        model: The model, with or without adapters.

    Returns:
        Parameters and buffers by name. They are not copies.
    """
    kept = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            kept[name] = "original_module"
        elif isinstance(module, BaseTunerLayer):
            kept[name] = "base_layer"
    found = {}
    for name, value in model.state_dict(keep_vars=True).items():
        bare = _bare_name(name, kept)
        if bare is not None:
            found[bare] = value
    return found


def _bare_name(name: str, kept: Mapping[str, str]) -> str | None:
    """`name` without the wrappers around it; None for what a wrapper has added."""
    parts, out = name.split("."), []
    i = 0
    while i < len(parts):
        out.append(parts[i])
        child = kept.get(".".join(parts[: i + 1]))
        i += 1
        if child is not None:
            if parts[i] != child:
                return None
            i += 1
            while kept.get(".".join(parts[:i])) is not None:  # a wrapper in a wrapper
                if parts[i] != kept[".".join(parts[:i])]:
                    return None
                i += 1
    return ".".join(out).removeprefix("base_model.model.")


def adapter_digest(model: nn.Module, state: Mapping[str, Tensor]) -> str | None:
    """Make a fingerprint of what an adapter adds to a model.

    Args:
        model: The model with the adapter on it.
        state: The adapter's tensors, as PEFT names them.

    Returns:
        None for an adapter that changes nothing yet.
    """
    whole = {key: value for key, value in state.items() if "lora_" not in key}
    # Of an adapter without pairs of matrices or whole modules nothing is known.
    changes = not whole and not any("_B" in key for key in state)
    for key, second in state.items():
        if "_B" in key:  # a product of two matrices changes nothing while one of them is zero
            partner = key.replace("lora_B", "lora_A").replace("embedding_B", "embedding_A")
            first = state.get(partner, second)  # a bias has none
            changes |= bool(first.any()) and bool(second.any())
    if whole and not changes:  # modules that are trained whole change nothing while they are copies
        base = base_tensors(model)
        changes = any(
            key not in base or not torch.equal(value, base[key]) for key, value in whole.items()
        )
    return tensors_digest(state) if changes else None


def model_config(model: nn.Module) -> dict[str, Any]:
    """Take the settings of a transformers model that change its numbers.

    Those that equal the defaults of its family are left out.

    Args:
        model: A transformers model.

    Returns:
        The settings by name, as JSON holds them.
    """
    config: Any = model.config
    return {
        key: describe(value) for key, value in config.to_diff_dict().items() if key not in _NEUTRAL
    }


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Make a fingerprint of a tokenizer's tokens and their ids.

    Two tokenizers share it exactly if every id is the same text in both.

    Args:
        tokenizer: The tokenizer; its fingerprint is kept until tokens are added.

    Returns:
        A SHA-256 in hexadecimal digits.
    """
    size, known = _VOCABULARIES.get(tokenizer, (-1, ""))
    if size != len(tokenizer):  # tokens can be added
        listed = json.dumps(sorted(tokenizer.get_vocab().items()))
        known = hashlib.sha256(listed.encode()).hexdigest()
        _VOCABULARIES[tokenizer] = len(tokenizer), known
    return known


def function_description(function: Any) -> dict[str, Any]:
    """Describe a function or class: its place, its code, and the plain values it was made with.

    Args:
        function: A function, a class or a `functools.partial`.

    Returns:
        Its `name` and `source`, and under `given` the plain values, if there are any.
    """
    out: dict[str, Any] = {"name": qualified_name(function)}
    if isinstance(function, functools.partial):
        inner = function_description(function.func)
        return {**inner, "given": describe([list(function.args), function.keywords])}
    function = inspect.unwrap(function)
    out["source"] = source_digest(function)
    code = getattr(function, "__code__", None)  # classes and built-in functions have none
    if code is None:
        return out
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    held = {
        name: describe(_contents(cell))
        for name, cell in cells
        if name not in written_names(function)
    }
    if held or function.__defaults__ or function.__kwdefaults__:
        out["given"] = [
            held,
            describe(list(function.__defaults__ or ())),
            describe(function.__kwdefaults__ or {}),
        ]
    return out


def written_names(function: Any) -> set[str]:
    """List the names of enclosing functions that a function assigns to (`nonlocal`).

    Args:
        function: A function, or anything else.

    Returns:
        The names; none for classes and built-in functions.
    """
    code = getattr(function, "__code__", None)  # classes and built-in functions have none
    if code is None:
        return set()
    stores = [one for one in dis.get_instructions(code) if one.opname == "STORE_DEREF"]
    return {str(one.argval) for one in stores} & set(code.co_freevars)


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


def source_digest(thing: Any) -> str | None:
    """Make a fingerprint of the code of a function or class, without comments and layout.

    Args:
        thing: A function or class.

    Returns:
        Sixteen hexadecimal digits; None where the source is not at hand.
    """
    try:
        source = textwrap.dedent(inspect.getsource(thing))
    except (OSError, TypeError):
        return None
    try:
        return digest(ast.dump(ast.parse(source)))
    except (SyntaxError, ValueError):  # a lambda in the middle of an expression
        return digest(source)


def describe(value: Any, depth: int = 6) -> Any:
    """Describe a value as JSON holds it.

    Args:
        value: Plain values stay as they are; others become their kind and a fingerprint of what is
            in them.
        depth: How far into nested values to look.

    Returns:
        Lists, dicts and plain values, nested at most `depth` deep.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if depth == 0:
        return {"kind": _kind(value)}
    inner = functools.partial(describe, depth=depth - 1)
    if isinstance(value, Enum):
        return inner(value.value)
    if isinstance(value, Tensor):
        return {"tensor": tensor_digest(value)}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return {
            "array": digest(
                str(value.dtype), str(value.shape), np.ascontiguousarray(value).tobytes()
            )
        }
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): inner(one) for key, one in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((inner(one) for one in value), key=repr)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [inner(one) for one in value]
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": digest(bytes(value))}
    return _describe_object(value, inner)


def _describe_object(value: Any, inner: Callable[[Any], Any]) -> Any:
    if isinstance(value, nn.Module):
        return {"kind": _kind(value), "tensors": tensors_digest(value.state_dict())}
    if isinstance(value, torch.Generator):
        return {"generator": tensor_digest(value.get_state())}
    if is_dataclass(value) and not isinstance(value, type):
        return {
            "kind": _kind(value),
            **{f.name: inner(getattr(value, f.name)) for f in fields(value)},
        }
    if isinstance(value, (type, ModuleType)):
        return {"kind": value.__name__ if isinstance(value, ModuleType) else qualified_name(value)}
    if inspect.isroutine(value) or isinstance(value, functools.partial):
        return function_description(value)
    return {"kind": _kind(value)}


def qualified_name(thing: Any) -> str:
    """Name a class or function with its module.

    Of opdlab's own modules only the package counts, since they may be moved.

    Args:
        thing: A class or function; of any other object its class is named.

    Returns:
        Such as "torch.nn.modules.linear.Linear", or "opdlab.OPD".
    """
    # Anything may be asked for its name here, also objects without one.
    module = str(getattr(thing, "__module__", "?"))
    name = getattr(thing, "__qualname__", type(thing).__name__)
    return f"opdlab.{name}" if module.partition(".")[0] == "opdlab" else f"{module}.{name}"


def _kind(value: Any) -> str:
    return qualified_name(type(value))
