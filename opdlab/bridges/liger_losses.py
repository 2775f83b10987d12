"""Liger's fused JSD, as cases for `conform`; it runs on a CPU without Triton.

`pip install --no-deps liger-kernel==0.8.5` is enough for it.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from torch import Tensor

from opdlab.conformance.case import Case
from opdlab.conformance.contract import Kind, Reduction
from opdlab.conformance.spec import Spec

try:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
except ImportError as error:
    raise ImportError(
        "opdlab.bridges.liger_losses needs Liger, which cannot be imported here. Install it: pip"
        " install --no-deps liger-kernel."
    ) from error

KEYWORDS = {"tokens": "tokens", "temperature": "temperature"}


def fused_jsd(
    student: Tensor,
    student_head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor,
    mask: Tensor,
    *,
    tokens: Tensor,
    hard: float = 0.0,
    **options: Any,
) -> Tensor:
    """Call Liger's fused JSD, without compiling it.

    Args:
        student: Hidden states `[B, T, H]`.
        student_head: `[V, H]`.
        teacher: Hidden states `[B, T, H]`.
        teacher_head: `[V, H]`.
        mask: `[B, T]`, bool.
        tokens: Ids `[B, T]`.
        hard: Weight of the cross entropy; the divergence has the rest. Liger's default is 0.5.
        options: `beta` and `temperature`.

    Returns:
        The loss.
    """
    made = LigerFusedLinearJSDLoss(
        weight_hard_loss=hard, weight_soft_loss=1 - hard, compiled=False, **options
    )
    labels = tokens.masked_fill(~mask, -100).flatten()
    loss: Tensor = made(
        student.flatten(0, 1), student_head, teacher.flatten(0, 1), teacher_head, labels
    )
    return loss


def cases() -> list[Case]:
    """List the cases of the installed Liger.

    Returns:
        Cases, named with Liger's version.
    """
    head = f"Liger {version('liger-kernel')} fused JSD"

    def spec(**more: Any) -> Spec:
        keywords = {**KEYWORDS, **more.pop("keywords", {})}
        return Spec(
            Kind.HIDDEN, keywords=keywords, reduction=Reduction.TOKEN, dtype="float32", **more
        )

    between = {
        "trains": "generalized_jsd",
        "parameters": {"beta": 0.5},
        "keywords": {"beta": "beta"},
    }
    return [
        Case(f"{head}, forward KL", fused_jsd, spec(trains="forward_kl", options={"beta": 0.0})),
        Case(f"{head}, reverse KL", fused_jsd, spec(trains="reverse_kl", options={"beta": 1.0})),
        Case(f"{head}, generalised JSD", fused_jsd, spec(**between)),
        Case(f"{head}, default weights", fused_jsd, spec(**between, options={"hard": 0.5})),
    ]
