"""SODA: the teacher's answer is preferred to that of the student as it was (arXiv 2604.03873).

    Delta = beta [ log p(y_T)/p_0(y_T) - log p(y_0)/p_0(y_0) ]      y_T by the teacher, y_0 by p_0, the student before training
    L     = - log sigmoid(Delta),     dL = - beta sigmoid(-Delta) [ d log p(y_T) - d log p(y_0) ]

Confirmed by the abstract: the pair, the frozen snapshot, a preference objective. Our reading: the
standard DPO form (arXiv 2305.18290), beta, and that the snapshot writes anew in each step, from the
same frozen law that a data set made once would hold. A sequence's loss as one of its tokens: the
plan knows Delta at the current parameters, so every token is told the pair's loss as a value and -+
beta sigmoid(-Delta) as the slope of its log-prob. That is the exact gradient, for one update a
rollout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from opdlab.engine.batch import Batch
from opdlab.engine.rows import Rows
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.support.validation import Finite, validate_fields


@dataclass(frozen=True)
class SODA:
    """Any teacher that writes will do.

    `distill` gives the first half of the rows to the teacher and the second, prompt by prompt, to
    the snapshot. Keep normalize="sequence" (the recipe's): then the loss is the mean over pairs.
    """

    beta: Finite = 0.1

    needs: ClassVar[tuple[str, ...]] = ("reference",)
    on_policy: ClassVar[float] = 0.0
    writer: ClassVar[tuple[str, ...]] = ("teacher", "reference")
    recipe: ClassVar[dict[str, Any]] = {"normalize": "sequence"}

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.beta <= 0:
            raise InvalidValue(
                f"SODA got beta={self.beta}, which weighs the distance to the snapshot. Use a"
                " positive number."
            )

    def plan(self, batch: Batch) -> dict[str, Tensor]:
        half = len(batch.rollout) // 2
        who = batch.rollout.writer
        if (
            set(who[:half]) != {"teacher"}
            or set(who[half:]) != {"reference"}
            or batch.rollout.prompts[:half] != batch.rollout.prompts[half:]
        ):
            raise OpdlabError(
                f"SODA compares pairs, but the rows are by {', '.join(sorted(set(who)))}. Give it"
                " the teacher's answers first and then the snapshot's to the same prompts, as"
                " distill does."
            )
        gap = batch.map(
            lambda rows: rows.logp - rows.logp_of("reference"), needs=("student", "reference")
        ).sum(1)
        sign = torch.cat([gap.new_ones(half), -gap.new_ones(half)])
        delta = (self.beta * (gap[:half] - gap[half:])).repeat(2)
        slope = -sign * self.beta * (-delta).sigmoid()
        whole = (
            2 * batch.rollout.lengths
        )  # undoes the mean over two sequences a pair, and over a sequence's tokens
        return {
            "preferred": sign,
            "delta": delta,
            "pair_loss": softplus(-delta),
            "slope": slope * whole,
        }

    def loss(self, rows: Rows) -> Tensor:
        return rows.pair_loss + rows.slope * (rows.logp - rows.logp.detach())
