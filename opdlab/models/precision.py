"""Choose the precision of forward passes: that of the weights, or bfloat16 autocast for a while.

A run with `precision="bf16"` wraps everything that asks a model for numbers (writing, grading, the
loss pass) in `autocast_backbones(True)`. This changes the backbone alone: heads, log-probs, draws
and the arithmetic of plans and losses stay in float32, so plan and loss see the same numbers, and
autocast never reaches a user's code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_backbones_in_bf16: ContextVar[bool] = ContextVar("backbones_in_bf16", default=False)


@contextmanager
def autocast_backbones(enabled: bool) -> Iterator[None]:
    """Run backbones under bfloat16 autocast until the block ends, if `enabled`.

    Args:
        enabled: Whether to use bfloat16; False switches it off inside an outer block.

    Yields:
        Nothing.
    """
    token = _backbones_in_bf16.set(enabled)
    try:
        yield
    finally:
        _backbones_in_bf16.reset(token)


def backbone_autocast(device: torch.device) -> torch.autocast:
    """Make the autocast of a backbone's forward passes: on only in `autocast_backbones(True)`.

    Accelerate's would be one for the life of a process, but a notebook may hold runs of both
    precisions.

    Args:
        device: The model's device.

    Returns:
        A context manager around the passes.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=_backbones_in_bf16.get())


def without_autocast(device: torch.device) -> torch.autocast:
    """Compute in the tensors' own precision, whatever autocast is on around.

    Args:
        device: The device of the tensors.

    Returns:
        A context manager around the computation.
    """
    return torch.autocast(device.type, enabled=False)
