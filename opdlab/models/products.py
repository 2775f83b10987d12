"""Multiply by the matrix of a head, with results in float32 whatever the matrix is in.

A product of bfloat16 matrices is added up in float32, and `torch.nn.functional.linear` then rounds
the sums to bfloat16: to 8 bits, so a logit of 20 is off by up to 0.06, and that is what log-probs,
divergences and the differences between two policies would be made of. transformers and TRL round
here, and cast what is left to float32.

opdlab asks for the sums themselves. Where the device can give them (`torch.mm(out_dtype=)`: CUDA
from PyTorch 2.8 on, and XPU) this costs nothing: the same product, and no pass that casts the
result. A CPU cannot. There the matrix is cast a block of its rows at a time, so that no float32
copy of it exists. On a core without bfloat16 instructions, 96 rows times 64,000 x 1,024 numbers
took 0.21 CPU seconds so, and 1.26 by PyTorch's own bfloat16 product; a single row took 0.04 and
0.02. Elsewhere results are rounded as in other libraries.

Student, teacher and sampler all read their heads through here, so they round alike.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Of a product on a CPU with few rows (`_multiply`).
LARGE_MATRIX = 2**22
FEWEST_TO_PAD, PADDED_ROWS = 6, 16
FEWEST_TO_TURN, MOST_TO_TURN = 2, 8
# Bytes of the float32 copy of a block of the matrix on a CPU.
CAST_BYTES = 4 << 20  # stays in a cache

FULL = (torch.float32, torch.float64)


def project(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, memory: Tensor | None = None
) -> Tensor:
    """Compute `hidden @ weight.T + bias`.

    Args:
        hidden: `[n, H]`, on the device of `weight`; it is cast to its dtype.
        weight: `[V, H]`.
        bias: `[V]`, or None.
        memory: At least `n` rows of `[V]` that may be overwritten with the result, where it is a
            matrix of the same type on the same device and no gradient is wanted.

    Returns:
        `[n, V]` in float32, or in float64 where `weight` is. It carries a gradient where one is
        wanted.
    """
    hidden = hidden.to(weight.dtype)
    if weight.dtype in FULL:
        if memory is not None and _fits(memory, hidden, weight):
            into = memory[: len(hidden)]
            if bias is None:
                return torch.mm(hidden, weight.T, out=into)
            return torch.addmm(bias, hidden, weight.T, out=into)
        return _multiply(hidden, weight, bias)
    product: Tensor = _Product.apply(hidden, weight)  # type: ignore[no-untyped-call]
    return product if bias is None else product.add_(bias)


@torch.no_grad()
def project_back(slope: Tensor, weight: Tensor) -> Tensor:
    """Compute `slope @ weight`, the gradient for the rows of `project`.

    Args:
        slope: `[n, V]`.
        weight: `[V, H]`.

    Returns:
        `[n, H]` in float32, or in float64 where `weight` is.
    """
    if weight.dtype in FULL:
        return slope.to(weight.dtype) @ weight
    if weight.device.type == "cpu":
        out = torch.zeros(len(slope), weight.shape[1])
        for piece in _blocks(weight):
            out.addmm_(slope[:, piece].float(), weight[piece].float())
        return out
    return _add_up(slope.to(weight.dtype), weight)


class _Product(torch.autograd.Function):
    """`hidden @ weight.T` in float32, of matrices in a lower precision."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        if weight.device.type != "cpu":
            return _add_up(hidden, weight.T)
        wide = hidden.float()
        out = wide.new_empty(len(hidden), len(weight))
        for piece in _blocks(weight):
            torch.mm(wide, weight[piece].float().T, out=out[:, piece])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad
        return (
            project_back(slope, weight).to(hidden.dtype) if wants_hidden else None,
            slope.to(weight.dtype).T @ hidden if wants_weight else None,
        )


def _add_up(one: Tensor, other: Tensor) -> Tensor:
    """Compute `one @ other` in float32, of matrices in a lower precision."""
    if gives_float32(one.device, one.dtype):
        return torch.mm(one, other, out_dtype=torch.float32)
    return (one @ other).float()


@functools.cache
def gives_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether a device gives the float32 sums of a product in a lower precision.

    The question is put to the device itself, once, since the answer depends on PyTorch's version
    and on how it was built.

    Args:
        device: The device.
        dtype: The dtype of the matrices.

    Returns:
        Whether `torch.mm` takes `out_dtype=torch.float32` there.
    """
    tiny = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(tiny, tiny, out_dtype=torch.float32)
    except (TypeError, RuntimeError):  # unknown to this version, or to this device
        return False
    return True


def _blocks(weight: Tensor) -> list[slice]:
    """Cut the rows of a matrix such that the float32 copy of one part stays small."""
    size = max(1, CAST_BYTES // (4 * weight.shape[1]))
    return [slice(i, min(i + size, len(weight))) for i in range(0, len(weight), size)]


def _fits(memory: Tensor, hidden: Tensor, weight: Tensor) -> bool:
    """Tell whether the logits of many rows can stand in some memory."""
    is_alike = (memory.dtype, memory.device) == (weight.dtype, weight.device)
    is_large = PADDED_ROWS <= len(hidden) <= len(memory)  # few rows have ways of their own
    return is_alike and is_large and not torch.is_grad_enabled()


def _multiply(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `hidden @ weight.T + bias`, `[n, V]`, in the way that is fast for few rows on a CPU.

    MKL reads a large float32 matrix several times for a few rows. Which other way reads it once
    depends on the processor, and is chosen by its kind, so that a run repeats bit for bit.

    - With AVX-512, 16 rows read it once, and 6 to 15 rows as often as there are threes of them.
      Rows of zeros beside them help (8 rows of 32,000 tokens: 11.8 to 7.1 ms on an Intel Xeon).
    - Without it, padding takes longer, and `weight @ hidden.T` is faster for up to 8 rows (14.8 to
      8.2 ms on an AMD EPYC).
    """
    rows = len(hidden)
    is_float = weight.device.type == "cpu" and weight.dtype == torch.float32
    if not is_float or weight.numel() < LARGE_MATRIX:
        return functional.linear(hidden, weight, bias)
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        if FEWEST_TO_PAD <= rows < PADDED_ROWS:
            padded = functional.pad(hidden, (0, 0, 0, PADDED_ROWS - rows))
            return functional.linear(padded, weight, bias)[:rows]
    elif FEWEST_TO_TURN <= rows <= MOST_TO_TURN:
        logits = (weight @ hidden.T).T.contiguous()
        return logits if bias is None else logits.add_(bias)
    return functional.linear(hidden, weight, bias)
