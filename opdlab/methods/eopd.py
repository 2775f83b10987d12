"""Entropy-aware OPD: cover the teacher where it is undecided (EOPD, arXiv 2603.07079).

    loss_t = KL(p || q)  +  weight · 1[ H(q) > threshold ] · KL(q || p) on the teacher's top k

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
from opdlab.losses.divergences import TopK, entropy, forward_kl, reverse_kl
from opdlab.support.validation import Amount, AmountOrInfinity, Count, validate_fields


@dataclass(frozen=True)
class EOPD:
    """threshold: of the teacher's entropy, in nats; infinity closes the gate. k: size of the
    support of the forward KL. weight: of the forward KL.

    The paper confirms the sum, the gate by the teacher's entropy and the teacher's top k. Ours are
    the numbers, as far as we could check, and that the mass outside the top k counts as one more
    outcome.
    """

    threshold: AmountOrInfinity = 0.8
    k: Count = 16
    weight: Amount = 1.0

    needs: ClassVar[tuple[str, ...]] = ("teacher",)

    def __post_init__(self) -> None:
        validate_fields(self)

    def plan(self, batch: Batch) -> dict[str, Column]:
        high = batch.map(lambda rows: entropy(rows.teacher), needs=("teacher",)) > self.threshold
        return {
            "gated": Column(
                high.long(),
                "whether the teacher's entropy is above the threshold",
                labels=("reverse KL alone", "gated: forward KL too"),
            )
        }

    def loss(self, rows: Rows) -> Tensor:
        loss = reverse_kl(rows.student, rows.teacher)
        at = rows.gated.nonzero()[:, 0]
        student, teacher = rows.student.index_select(0, at), rows.teacher.index_select(0, at)
        top = TopK(self.k)
        ids = top.support(teacher)
        return loss.index_add(
            0, at, self.weight * forward_kl(top.coarse(student, ids), top.coarse(teacher, ids))
        )
