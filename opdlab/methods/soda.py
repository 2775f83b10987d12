"""SODA: prefer the teacher's answer to that of the student before training (arXiv 2604.03873).

    Δ  = β [ log p(y_T) / p_0(y_T) - log p(y_0) / p_0(y_0) ]
    L  = - log sigmoid(Δ)
    dL = - β sigmoid(-Δ) [ d log p(y_T) - d log p(y_0) ]

y_T is written by the teacher and y_0 by p_0, the student before training. The abstract confirms the
pair, the frozen snapshot and a preference objective. Our reading: the standard DPO form (arXiv
2305.18290), β, and that the snapshot writes anew in each step, from the same frozen law that a data
set made once would hold.

A sequence's loss is computed as a loss of its tokens: the plan knows Δ at the current parameters,
so every token gets the pair's loss as its value and ∓ β sigmoid(-Δ) as the slope of its log-prob.
That is the exact gradient, for one update per rollout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from opdlab.data.column import Column, Kind
from opdlab.engine.batch import Batch
from opdlab.engine.rows import Rows
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.support.validation import Finite, validate_fields


@dataclass(frozen=True)
class SODA:
    """Learn from pairs of answers: the teacher's and the snapshot's.

    Any teacher that writes will do. `distill` gives the first half of the rows to the teacher and
    the second, prompt by prompt, to the snapshot. With normalize="sequence", which the recipe sets,
    the loss is the mean over pairs.

    Attributes:
        beta: β, the weight of the distance to the snapshot; above 0.

    Raises:
        InvalidValue: beta is not a positive number.
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

    def plan(self, batch: Batch) -> dict[str, Column]:
        """Compare the two answers of each pair, and take the slope of the pair's loss.

        Args:
            batch: The teacher's answers and then the snapshot's, to the same prompts.

        Returns:
            `preferred`, `delta`, `pair_loss` (nats) and `slope`, `[B]` each.

        Raises:
            OpdlabError: The rows are not the teacher's answers and then the snapshot's.
        """
        half = len(batch.rollout) // 2
        _check_pairs(batch, half)
        log_ratio = batch.map(
            lambda rows: rows.logp - rows.logp_of("reference"), needs=("student", "reference")
        )
        log_ratio = (log_ratio * batch.learn).sum(1)
        sign = torch.cat([log_ratio.new_ones(half), -log_ratio.new_ones(half)])
        delta = (self.beta * (log_ratio[:half] - log_ratio[half:])).repeat(2)
        slope = -sign * self.beta * (-delta).sigmoid()
        # The engine takes the mean over the two sequences of a pair, and over a sequence's tokens.
        undo_means = 2 * batch.learn.sum(1)
        return {
            "preferred": Column(
                sign,
                "1 for the teacher's answer, −1 for the snapshot's",
                kind=Kind.SIGNED,
                less="rejected",
                more="preferred",
            ),
            "delta": Column(
                delta, "β times the pair's log-ratio, teacher's answer first", kind=Kind.SIGNED
            ),
            "pair_loss": Column(softplus(-delta), "−log sigmoid(Δ)", unit="nats", kind=Kind.AMOUNT),
            "slope": Column(slope * undo_means, "slope of the loss in the token's log-prob"),
        }

    def loss(self, rows: Rows) -> Tensor:
        """Compute the pair's loss, with the gradient of the token's part.

        Args:
            rows: A chunk of `n` tokens, with the columns `pair_loss` and `slope`.

        Returns:
            `[n]`, in nats.
        """
        return rows.pair_loss + rows.slope * (rows.logp - rows.logp.detach())


def _check_pairs(batch: Batch, half: int) -> None:
    """Raise OpdlabError unless the halves are answers of the two writers to the same prompts."""
    writers, prompts = batch.rollout.writer, batch.rollout.prompts
    if (
        set(writers[:half]) != {"teacher"}
        or set(writers[half:]) != {"reference"}
        or prompts[:half] != prompts[half:]
    ):
        raise OpdlabError(
            f"SODA compares pairs, but the rows are by {', '.join(sorted(set(writers)))}. Give it"
            " the teacher's answers first and then the snapshot's to the same prompts, as distill"
            " does."
        )
