"""Off-policy baselines: cross-entropy on text that somebody else wrote.

    loss_t = -log p(y_t)

Sequence-level distillation (Kim and Rush, arXiv 1606.07947) trains on the teacher's samples,
supervised fine-tuning on the task's reference answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from opdlab.engine.rows import Rows


@dataclass(frozen=True)
class SequenceKD:
    """Train by cross-entropy on completions that the teacher writes.

    It reads no distribution, so any teacher that writes will do.

    Attributes:
        needs: Empty; no distribution is read.
        on_policy: 0; the student writes nothing.
        writer: The teacher.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    on_policy: ClassVar[float] = 0.0
    writer: ClassVar[str] = "teacher"

    def loss(self, rows: Rows) -> Tensor:
        """Compute the cross-entropy -log p of each token.

        Args:
            rows: A chunk of `n` tokens.

        Returns:
            `[n]`, in nats.
        """
        return -rows.logp


@dataclass(frozen=True)
class SFT:
    """Train by cross-entropy on the `answer` of each prompt; needs no teacher.

    Attributes:
        needs: Empty; no distribution is read.
        on_policy: 0; the student writes nothing.
        writer: The prompts' answers.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    on_policy: ClassVar[float] = 0.0
    writer: ClassVar[str] = "answer"

    def loss(self, rows: Rows) -> Tensor:
        """Compute the cross-entropy -log p of each token.

        Args:
            rows: A chunk of `n` tokens.

        Returns:
            `[n]`, in nats.
        """
        return -rows.logp
