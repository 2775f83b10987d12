"""Off-policy baselines: cross-entropy on text that somebody else wrote.

Sequence KD (Kim and Rush, arXiv 1606.07947) trains on the teacher's samples, SFT on the task's
reference answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from opdlab.engine.rows import Rows


@dataclass(frozen=True)
class SequenceKD:
    """`-log p(y_t)` on completions that the teacher writes.

    Looks at no distribution, so any teacher that writes will do.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    on_policy: ClassVar[float] = 0.0
    writer: ClassVar[str] = "teacher"

    def loss(self, rows: Rows) -> Tensor:
        return -rows.logp


@dataclass(frozen=True)
class SFT:
    """`-log p(y_t)` on each prompt's `answer`. Needs no teacher."""

    needs: ClassVar[tuple[str, ...]] = ()
    on_policy: ClassVar[float] = 0.0
    writer: ClassVar[str] = "answer"

    def loss(self, rows: Rows) -> Tensor:
        return -rows.logp
