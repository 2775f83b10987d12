"""Entropy-aware OPD: cover the teacher where it is undecided (EOPD, arXiv 2603.07079).

    loss_t = KL(p || q)  +  w · 1[ H(q) > τ ] · KL(q || p) on the teacher's top k

The forward KL is added to the reverse KL and does not replace it. Reverse KL alone picks one of the
tokens that an undecided teacher allows, and loses the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from opdlab.data.column import Column
from opdlab.engine.batch import Batch
from opdlab.engine.rows import Rows
from opdlab.losses import TopK, entropy, forward_kl, reverse_kl
from opdlab.support.validation import Amount, AmountOrInfinity, Count, validate_fields


@dataclass(frozen=True)
class EOPD:
    """Reverse KL, and the forward KL too at tokens where the teacher's entropy is high.

    The paper confirms the sum, the gate by the teacher's entropy and the teacher's top k. The
    default numbers, and counting the mass outside the top k as one more outcome, are ours.

    Attributes:
        threshold: τ, of the teacher's entropy in nats; infinity closes the gate.
        k: Size of the support of the forward KL, in tokens.
        weight: w, of the forward KL.

    Raises:
        InvalidValue: A value is out of its range.
    """

    threshold: AmountOrInfinity = 0.8
    k: Count = 16
    weight: Amount = 1.0

    needs: ClassVar[tuple[str, ...]] = ("teacher",)

    def __post_init__(self) -> None:
        validate_fields(self)

    def plan(self, batch: Batch) -> dict[str, Column]:
        """Mark the tokens where the teacher's entropy is above the threshold.

        Args:
            batch: The step's rollout under all policies.

        Returns:
            `gated [B, T]`, 1 at these tokens and 0 elsewhere.
        """
        high = batch.map(lambda rows: entropy(rows.teacher), needs=("teacher",)) > self.threshold
        gated = Column(
            high.long(),
            "whether the teacher's entropy is above the threshold",
            labels=("reverse KL alone", "gated: forward KL too"),
        )
        return {"gated": gated}

    def loss(self, rows: Rows) -> Tensor:
        """Compute the reverse KL, and at gated tokens add the forward KL.

        Args:
            rows: A chunk of `n` tokens, with the column `gated`.

        Returns:
            `[n]`, in nats.
        """
        loss = reverse_kl(rows.student, rows.teacher)
        at = rows.gated.nonzero()[:, 0]
        student, teacher = rows.student.index_select(0, at), rows.teacher.index_select(0, at)
        top = TopK(self.k)
        ids = top.support(teacher)
        added = forward_kl(top.coarse(student, ids), top.coarse(teacher, ids))
        return loss.index_add(0, at, self.weight * added)
