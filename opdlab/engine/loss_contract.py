"""Call a user's loss and check its contract: one number per token, from that token's row alone.

A loss sees the tokens of a batch in chunks whose size depends on the memory, so a loss that reads
other rows of its chunk would train something else on another machine. `check_rows_are_independent`
finds such a loss before the first update: it calls the loss on a few rows whole and in two parts,
and compares values and gradients. A loss may therefore be called more often than there are chunks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from opdlab.engine.rows import LogProbs, Rows
from opdlab.errors import BadLoss
from opdlab.models.graded import TopLogprobs

CHECKED_ROWS = 64  # enough for statistics of the rows to show, a small part of a step
CHECKED_BYTES = 4 << 20  # of one [rows, V] float32 tensor; fewer rows where V is large
ENOUGH_ROWS = 16  # with fewer, a statistic of the rows or a random number can go unseen
# How far two evaluations of one row may be apart: relative to that row, and to the largest row of
# all. Rounding differs with the number of rows, by about 1e-6 in float32; what other rows add to a
# loss is usually more than 1e-2.
ROUNDING = {
    torch.float64: (1e-6, 1e-8),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (1e-2, 3e-3),
    torch.bfloat16: (3e-2, 1e-2),
}
NOISE = 1e-6  # nats: below this, numbers are differences of rounded ones

Loss = Callable[[Rows], Tensor]


def call_loss(loss: Loss, rows: Rows) -> Tensor:
    """Call a loss on some rows and check what it gives.

    Args:
        loss: Any function of rows.
        rows: The tokens. The student's log-probs are a leaf that requires a gradient.

    Returns:
        The loss of each token, `[n]`, in float32 or float64.

    Raises:
        BadLoss: The loss gave something else than one real number per token that depends on the
            student, changed what it was given in place, or called backward itself. What the loss
            itself raises comes through as it is.
    """
    student = rows["student"]
    before = _versions(rows)
    with _in_place_on_student():
        value = loss(rows)
    if changed := [name for name, version in _versions(rows).items() if before[name] != version]:
        raise BadLoss(
            f"The loss changed rows.{changed[0]} in place. Other losses, the trace and the next"
            f" call read the same numbers. Work on a copy: rows.{changed[0]}.clone()."
        )
    if student.is_leaf and student.grad is not None:
        raise BadLoss(
            "The loss called backward itself. Return the loss of each token; opdlab computes the"
            " gradient."
        )
    return _checked_value(value, len(rows), student)


def check_rows_are_independent(loss: Loss, rows: Rows) -> bool:
    """Compare the loss of some rows with the loss of two parts of them, value and gradient.

    Args:
        loss: Any function of rows.
        rows: Up to `CHECKED_ROWS` rows, best from many completions, since columns can be the same
            within one. The student's log-probs need not require a gradient.

    Returns:
        Whether the answer can be relied on. It cannot where all rows have the same loss and
        gradient (as where all rewards are 0), since then a statistic of the rows changes nothing;
        check again later.

    Raises:
        BadLoss: The loss of a row depends on other rows, differs when the loss is called again, or
            depends on tensors other than the student's that require a gradient.
    """
    n = len(rows)
    if not n:
        return False
    # Each row has a weight of its own. With equal weights the gradient of a value minus its mean
    # would cancel.
    weight = torch.linspace(0.5, 1.5, n, device=rows.token.device)
    whole, slope, precision = _evaluate(loss, rows, weight)
    if not bool(torch.isfinite(whole).all() and torch.isfinite(slope).all()):
        return False  # the engine finds and names the row
    # Large losses apart from small ones: the parts then have other means, quantiles and maxima than
    # the whole.
    order = whole.argsort(descending=True)
    for part in (order[: (n + 1) // 2], order[(n + 1) // 2 :]):
        if not len(part):
            continue
        try:
            value, part_slope, _ = _evaluate(loss, rows.select(part), weight[part])
        except BadLoss:
            raise
        except Exception as error:
            raise BadLoss(
                f"The loss runs on {n} tokens but not on {len(part)} of them"
                f" ({type(error).__name__}: {error}). It is called on chunks of any size. Treat"
                " each row alone, and compute what needs several tokens in plan."
            ) from error
        differs = _differs(whole[part], value, whole, precision) | _differs(
            slope[part], part_slope, slope, precision
        )
        if bool(differs.any()):
            at = int(differs.nonzero()[0, 0])
            _refuse(loss, rows, weight, part, at, (whole, slope), value, precision)
    return n >= ENOUGH_ROWS and _has_variety(whole, slope)


def spread_index(tokens: int, most: int, device: torch.device) -> Tensor:
    """Choose up to `most` tokens, evenly spread over all of them, and so over completions.

    A single token is taken twice, so that a softmax over tokens shows there too; no tokens give
    none.

    Args:
        tokens: Number of tokens.
        most: The largest number to choose; `CHECKED_ROWS` is another limit.
        device: The device of the indices.

    Returns:
        Indices `[n]` in rising order.
    """
    n = min(max(2, min(most, CHECKED_ROWS, tokens)), 2 * tokens)
    return torch.linspace(0, tokens - 1, n, device=device).round().long()


@contextmanager
def adding_note(note: str) -> Iterator[None]:
    """Add a line to any error raised in the block.

    So the user's traceback says where in opdlab it happened.

    Args:
        note: The line; it is added on Python 3.11 and later.

    Yields:
        Nothing; the block runs once.
    """
    try:
        yield
    except Exception as error:
        if sys.version_info >= (3, 11):
            error.add_note(note)
        raise


def _evaluate(loss: Loss, rows: Rows, weight: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Loss `[n]`, gradient `[n, V]` of its weighted sum, and the lowest precision on the way."""
    leaf = rows["student"].detach().clone().requires_grad_()
    seen = Rows({**rows.distributions, "student": leaf}, rows.token, rows.columns)
    with torch.enable_grad():
        value = call_loss(loss, seen)
        graph = value.grad_fn
        slope = gradient_of_loss(value, weight, leaf)
    return value.detach(), slope, _check_graph(graph, leaf)


def gradient_of_rows(loss: Loss, rows: Rows, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the loss of each token, and the gradient of `sum(weight * loss)` in the log-probs.

    Args:
        loss: Any function of rows.
        rows: The tokens; the student's log-probs need not require a gradient, and are not copied.
        weight: Each token's share of the mean, `[n]`.

    Returns:
        The loss, `[n]`, without gradient, and the gradient, `[n, V]`.

    Raises:
        BadLoss: The loss does not keep its contract.
    """
    leaf = rows["student"].detach().requires_grad_()
    seen = Rows({**rows.distributions, "student": leaf}, rows.token, rows.columns)
    with torch.enable_grad():
        value = call_loss(loss, seen)
        slope = gradient_of_loss(value, weight, leaf)
    return value.detach(), slope


def gradient_of_loss(value: Tensor, weight: Tensor, student: Tensor) -> Tensor:
    """Compute the gradient of `sum(weight * value)` with respect to the student's log-probs.

    Args:
        value: The loss of each token, `[n]`.
        weight: Each token's share of the mean, `[n]`.
        student: The student's log-probs `[n, V]`, of which `value` was computed.

    Returns:
        `[n, V]`.

    Raises:
        BadLoss: The loss does not depend on the student, or broke the graph by an operation in
            place.
    """
    try:
        (slope,) = torch.autograd.grad((value * weight).sum(), student, allow_unused=True)
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise BadLoss(
            "The loss changed a tensor in place that its gradient needs. Use operations without a"
            " trailing underscore, such as x = x.clamp(min=-10) instead of x.clamp_(min=-10)."
        ) from error
    if slope is None:
        raise BadLoss(
            "The loss does not depend on rows.student, so there is nothing to train. Use"
            " rows.student or rows.logp."
        )
    return slope


@contextmanager
def _in_place_on_student() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "in-place operation" not in str(error):
            raise
        raise BadLoss(
            "The loss changes rows.student in place. Work on a copy: rows.student.clone(), or use"
            " operations without a trailing underscore."
        ) from error


def _checked_value(value: Any, n: int, student: Tensor) -> Tensor:
    """The value in float32 or float64, if it is one real number per token."""
    if not isinstance(value, Tensor) or value.shape != (n,):
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise BadLoss(
            f"The loss returned {got} for {n} tokens. Return one number per token, shape [{n}]: sum"
            " over the vocabulary, not over tokens."
        )
    if value.is_complex() or value.layout != torch.strided:
        kind = "complex numbers" if value.is_complex() else "a sparse tensor"
        raise BadLoss(
            f"The loss returned {kind}. Return one real number per token as a plain tensor."
        )
    if value.device != student.device:
        raise BadLoss(
            f"The loss is on {value.device}, the student on {student.device}. Return the loss on"
            " the student's device."
        )
    if not value.requires_grad:
        raise BadLoss(
            "The loss is constant: it carries no gradient. Make it depend on rows.student or"
            " rows.logp, without detach."
        )
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def _check_graph(graph: Any, student: Tensor) -> torch.dtype:
    """Follow the graph of a loss to its leaves; the student's log-probs must be the only one.

    Returns:
        The lowest precision on the way. A product in bf16 that is cast to float32 is only as exact
        as bf16.
    """
    waiting, seen, dtypes = [graph], set[Any](), {student.dtype}
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        dtypes |= {known.dtype for known in getattr(node, "_input_metadata", [])}
        variable = getattr(node, "variable", None)
        if variable is not None and variable is not student:
            raise BadLoss(
                f"The loss depends on a tensor of shape {list(variable.shape)} that requires a"
                " gradient and is not rows.student. opdlab trains the student alone, so that tensor"
                " would never move. Detach it, or train it yourself in plan."
            )
        waiting.extend(next_node for next_node, _ in node.next_functions)
    return max(dtypes & ROUNDING.keys(), key=lambda dtype: ROUNDING[dtype])


def _versions(rows: Rows) -> dict[str, list[int | None]]:
    """Count how often each tensor has been written to, as PyTorch does."""
    distributions = {name: _tensors(value) for name, value in rows.distributions.items()}
    columns = {name: [column] for name, column in rows.columns.items()}
    named = {**distributions, "token": [rows.token], **columns}
    return {name: [_version(tensor) for tensor in tensors] for name, tensors in named.items()}


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _tensors(logp: LogProbs) -> list[Tensor]:
    if isinstance(logp, TopLogprobs):
        return [logp.ids, logp.top, logp.sampled, logp.token]
    return [logp]


def _differs(one: Tensor, other: Tensor, all_rows: Tensor, precision: torch.dtype) -> Tensor:
    """Find the rows that are further apart than rounding explains, `[n]`.

    Args:
        one: Losses `[n]` or gradients `[n, V]`.
        other: The same, computed otherwise.
        all_rows: The losses or gradients of all rows that were compared.
        precision: The lowest precision in which the loss was computed.
    """
    relative, absolute = ROUNDING.get(precision, ROUNDING[torch.float32])
    size = one.abs() if one.ndim == 1 else one.norm(dim=-1)
    gap = (one - other).abs() if one.ndim == 1 else (one - other).norm(dim=-1)
    largest = all_rows.abs().max() if all_rows.ndim == 1 else all_rows.norm(dim=-1).max()
    return ~(gap <= relative * size + absolute * largest + NOISE)  # so that NaN differs


def _has_variety(value: Tensor, slope: Tensor) -> bool:
    """Tell whether rows differ in loss or in gradient."""
    spread = float(value.max() - value.min())
    return spread > 100 * NOISE or float(slope.std(dim=0).max()) > 100 * NOISE


def _refuse(
    loss: Loss,
    rows: Rows,
    weight: Tensor,
    part: Tensor,
    at: int,
    first: tuple[Tensor, Tensor],
    value: Tensor,
    precision: torch.dtype,
) -> None:
    """Raise BadLoss for a row whose loss moved: is the loss random, or does it read other rows?"""
    row, (whole, slope) = int(part[at]), first
    again, slope_again, _ = _evaluate(loss, rows, weight)
    if bool(
        (
            _differs(whole, again, whole, precision)
            | _differs(slope, slope_again, slope, precision)
        ).any()
    ):
        most = int((whole - again).abs().argmax())
        raise BadLoss(
            "The loss is not the same when it is called again on the same rows: it was"
            f" {whole[most]:.6g}, then {again[most]:.6g} for one token. It draws random numbers or"
            " keeps something between calls, which can be neither split nor resumed. Draw in plan,"
            " with torch.Generator().manual_seed(batch.step), and return the numbers as a column."
        )
    moved = (
        f"it is {whole[row]:.6g} among {len(whole)} tokens and {value[at]:.6g} among {len(part)} of"
        " them"
    )
    if not bool(_differs(whole[part], value, whole, precision)[at]):
        moved = f"its gradient is another among {len(whole)} tokens than among {len(part)} of them"
    raise BadLoss(
        f"The loss of a token depends on the other rows that the loss is called with: {moved}. The"
        " engine calls a loss on chunks of any size, so each row must be treated alone. Compute"
        " what needs several tokens (a mean, a quantile, a softmax or a shift over tokens) in"
        " plan(batch), which sees the whole batch, and read it as a column of rows."
    )
