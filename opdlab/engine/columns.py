"""Check the columns that a plan returns: their names, and one value for every token.

A plan may return, for a batch of `B` completions of at most `T` tokens, tensors or numpy arrays
`[B, T]`, `[B, T, K]` or `[B]` (one number per completion, the same for all its tokens), and plain
numbers (the same for all tokens). Where B equals T, a one-dimensional column is still one number
per completion: opdlab cannot see which was meant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opdlab.data.column import Column
from opdlab.engine.batch import Batch
from opdlab.engine.rows import Rows
from opdlab.errors import BadPlan
from opdlab.support.expect import shortened

# Columns of every trace (`opdlab.engine.recording`).
OF_TRACES = (
    *("run", "step", "sample", "prompt", "position", "token_id", "turn", "learn"),
    *("loss", "grad_norm", "share", "support"),
)
# Numbers of every policy in a trace, as `<policy>_logp` (`opdlab.engine.signals`).
OF_POLICIES = (
    *("logp", "entropy", "rank", "top", "tail", "overlap"),
    *("reverse_kl", "forward_kl", "jsd", "coarse_reverse_kl"),
)
USUAL_POLICIES = (
    "student",
    "teacher",
    "reference",
    "ema",
)  # a trace may be scored under them later
OF_ROWS = ("token", "columns", "distributions")  # attributes that only instances of Rows have


def flatten(batch: Batch, name: str, column: Any, graded: Iterable[str] | None = None) -> Tensor:
    """Read a plan's column as `[tokens, ...]`, without gradient, on the rollout's device.

    Args:
        batch: The batch that the plan saw.
        name: The column's name.
        column: Its values.
        graded: Policies whose numbers a trace has; all of the batch by default.

    Returns:
        `[tokens]`, or `[tokens, K]` for a column `[B, T, K]`.

    Raises:
        BadPlan: The name is taken or cannot be read as `rows.<name>`, or the column has not one
            value per token.
    """
    if isinstance(column, Column):
        column = column.values
    check_name(name, batch.policies, list(batch.policies if graded is None else graded))
    if isinstance(column, (bool, int, float, np.bool_, np.number)):
        column = torch.tensor(column).expand(batch.mask.shape)
    column = _as_tensor(name, column).detach().to(batch.mask.device)
    if column.shape == batch.mask.shape[:1]:
        column = column[:, None].expand(batch.mask.shape)
    if column.shape[:2] != batch.mask.shape or column.ndim > 3:
        raise BadPlan(
            f"plan returned column {name!r} with shape {list(column.shape)} for a batch of"
            f" {list(batch.mask.shape)}. Return [B, T], [B, T, K] or [B]; batch.spread turns"
            " [tokens] into [B, T], and a plain number counts for all tokens."
        )
    flat: Tensor = column[batch.mask]
    return flat


def check_name(name: Any, policies: Iterable[str], graded: Iterable[str]) -> None:
    """Refuse a column's name that means something else in a loss or in a trace.

    Args:
        name: The column's name.
        policies: Policies of the batch; `rows.<policy>` means their log-probs.
        graded: Policies whose numbers a trace has, as `<policy>_logp`.

    Raises:
        BadPlan: The name is no identifier, or is taken.
    """
    if not isinstance(name, str) or not name.isidentifier() or name.startswith("__"):
        raise BadPlan(
            f"plan returned a column named {shortened(name)}, which a loss could not read as"
            " rows.<name>. Use letters, digits and underscores, beginning with a letter."
        )
    if hasattr(Rows, name) or name in (*OF_ROWS, *policies):
        raise BadPlan(
            f"plan returned a column named {name!r}, which means something else in a loss. Give it"
            " another name."
        )
    hinted = [f"{policy}+hint" for policy in USUAL_POLICIES]
    owners = {*graded, *USUAL_POLICIES, *hinted}
    if name in OF_TRACES or any(
        name == f"{owner}_{number}" for owner in owners for number in OF_POLICIES
    ):
        raise BadPlan(
            f"plan returned a column named {name!r}, which is a column of every trace and has"
            f" opdlab's own numbers there. Give it another name, such as 'my_{name}'."
        )


def plain_data(value: Any, where: str) -> Any:
    """Turn notes into what JSON can hold: tensors and numpy arrays into lists.

    Args:
        value: A note of the plan, or a part of one.
        where: Its place in the notes, for the error.

    Returns:
        The same data in dicts with texts as keys, lists, texts, numbers, booleans and None.

    Raises:
        BadPlan: There is something else in them. The message says where.
    """
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return plain_data(value.tolist(), where)
    if isinstance(value, Mapping):
        return {str(key): plain_data(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise BadPlan(
        f"plan noted a {type(value).__name__} in batch.notes at {where}. Notes hold numbers, texts,"
        " lists and dicts of them."
    )


def _as_tensor(name: str, column: Any) -> Tensor:
    """A tensor of real numbers or booleans that a trace can hold."""
    if isinstance(column, np.ndarray):
        if column.dtype.kind not in "fiubc":
            raise BadPlan(
                f"plan returned column {name!r} as a numpy array of {column.dtype}. Return numbers"
                " or booleans."
            )
        column = torch.from_numpy(np.array(column, dtype=column.dtype.newbyteorder("=")))
    if not isinstance(column, Tensor):
        raise BadPlan(
            f"plan returned column {name!r} as {shortened(column)} ({type(column).__name__})."
            " Return a tensor or a numpy array [B, T], [B, T, K] or [B], or a number."
        )
    if unusable := _unusable(column):
        kind, way = unusable
        raise BadPlan(f"plan returned column {name!r} as a {kind} tensor. Return {way}.")
    if column.dtype.is_floating_point and column.dtype not in (torch.float32, torch.float64):
        return column.float()  # numpy and Parquet have no bf16
    if column.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return column.long()  # PyTorch computes with few of these
    return column


def _unusable(column: Tensor) -> tuple[str, str] | None:
    """Name a kind of tensor that no trace can hold, and what to return instead.

    None for all other tensors.
    """
    if column.is_complex():
        return "complex", "column.real and column.imag as two columns"
    if column.is_quantized:
        return "quantized", "plain numbers"
    if column.is_meta:
        return "meta", "plain numbers"
    if column.layout != torch.strided:
        return "sparse", "column.to_dense()"
    return None


def is_same(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are equal, NaN counting as equal to NaN.

    Args:
        one: A tensor.
        other: Another, of any shape.

    Returns:
        True if shapes and all values agree.
    """
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
