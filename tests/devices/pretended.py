"""Accelerator cards that are not there: tensors that say `card:0` and compute on the CPU.

A tensor on a card wraps a real CPU tensor. Every operation of PyTorch, forward and backward, passes
`run`, which refuses what a machine with GPUs refuses: operands on different devices, an index or a
generator of another device, NumPy views of a card's memory. What it allows, it computes, so numbers
can be compared with those of the CPU.

PyTorch has one name for devices of this kind in a process ("privateuse1"), and starts its threads
for backward passes once. So this needs a fresh process: see test_devices.py. Backward passes work
on card:0 alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ATEN = torch.ops.aten
MAY_CROSS = (ATEN._to_copy.default, ATEN.copy_.default)
# Indices may lie on the CPU, whatever is indexed.
INDEXING = (
    ATEN.index.Tensor,
    ATEN.index_put.default,
    ATEN.index_put_.default,
    ATEN._index_put_impl_.default,
)


# What a program on the CPU cannot go on without: the numbers of a card, or how many there are.
ASKING = (ATEN.nonzero.default, ATEN.masked_select.default, ATEN.equal.default)
WAITS: list[str] = []  # the operations so far that waited for a card


class MixedDevices(RuntimeError):
    """An operation got tensors of different devices."""


class OnCard(Tensor):
    """A tensor that says it is on a card.

    Attributes:
        inner: The CPU tensor that holds its numbers.
    """

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> OnCard:
        out = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=device,
        )
        out.inner = inner
        return out

    def tolist(self) -> Any:
        """PyTorch copies from a card by itself here, but not from a subclass."""
        return self.detach().cpu().tolist()

    def __repr__(self) -> str:
        return f"OnCard({self.inner}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})


class Cards(TorchDispatchMode):
    """Sends what makes tensors on a card to `run` as well."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})


def run(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Check the devices of an operation's tensors and compute it on the CPU."""
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    if waits(operation, args, kwargs, tensors):
        WAITS.append(str(operation))
    if operation is ATEN._local_scalar_dense.default:  # `.item()`, which copies by itself
        return operation(_inner(args[0]))
    device = _device_of(operation, args, kwargs, tensors)
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = operation(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if device.type != "card":
        return out
    # What is written in place stays the same tensor.
    known = {id(one.inner): one for one in tensors if isinstance(one, OnCard)}
    return tree_map(lambda one: _place(one, device, known), out)


def waits(
    operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
) -> bool:
    """Tell whether a program waits here until a card has done all that it was given."""
    if not any(one.device.type == "card" for one in tensors):
        return False
    if operation is ATEN._local_scalar_dense.default or operation in ASKING:
        return True
    if operation is ATEN._to_copy.default:
        return kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
    if operation is ATEN.copy_.default:
        return args[0].device.type == "cpu"
    # Where a mask is true must be counted first.
    is_mask = (one.dtype == torch.bool for one in tree_leaves(args[1:2]) if isinstance(one, Tensor))
    return operation in INDEXING and any(is_mask)


def _device_of(
    operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
) -> torch.device:
    """The device of an operation's result."""
    if kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != device.type:
            raise MixedDevices(f"{operation}: a generator of {generator.device} for {device}")
        if operation not in MAY_CROSS:
            _same(operation, tensors)
        return device
    if operation is ATEN.copy_.default:
        return args[0].device
    if operation in MAY_CROSS:
        return tensors[0].device
    if operation in INDEXING:
        indices = {id(one) for one in tree_leaves(args[1]) if isinstance(one, Tensor)}
        tensors = [one for one in tensors if id(one) not in indices or one.device.type != "cpu"]
    return _same(operation, tensors)


def _same(operation: Any, tensors: list[Tensor]) -> torch.device:
    """The device of tensors that are on one, beside scalars of the CPU."""
    devices = {one.device for one in tensors if one.dim() > 0 or one.device.type != "cpu"}
    if len(devices) > 1:
        raise MixedDevices(f"{operation} got tensors on {sorted(map(str, devices))}")
    return devices.pop() if devices else torch.device("cpu")


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnCard) else value


def _place(value: Any, device: torch.device, known: dict[int, OnCard]) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, OnCard):
        return value
    before = known.get(id(value))
    return OnCard(value, device) if before is None else before


class _Module(backend_registration._DummyBackendModule):
    """What PyTorch asks of `torch.card`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def device_count(self) -> int:
        return 2


def register() -> None:
    """Make the device name `card` known, once in a process and before any backward pass."""
    backend_registration._setup_privateuseone_for_python_backend("card", _Module())


@contextmanager
def cards() -> Iterator[None]:
    """Let code in the block make tensors on `card:0` and `card:1`."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(…, device=…) is seen
    try:
        with Cards():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
