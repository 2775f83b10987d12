"""OPD with the turn as the unit: weights by turn, and a choice of turns.

    loss_t = w_k · KL(p || q)          for a token t of turn k

    w_k ∝ γ^k                                          unit "token": as in OPD where γ = 1
    w_k ∝ γ^k / (tokens of turn k)                     unit "turn": every turn counts alike
    w_k = 0 unless the mean KL of turn k is among the highest ⌈ρ · turns⌉ of its conversation

The weights of a conversation have the mean 1 over its tokens, so the learning rate means the same.
Long tool calls and thoughts otherwise outweigh a short answer, and turns that the student has long
learnt outweigh the one that it gets wrong.

Work on agents (TurnOPD, ATOD, ReOPD) takes the turn as the unit of on-policy distillation; opdlab
knows these papers by name only. So all of this is our reading of the idea and no paper's formula.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from opdlab.data.column import Column, Kind
from opdlab.engine.batch import Batch
from opdlab.engine.rows import Rows
from opdlab.losses import reverse_kl
from opdlab.support.validation import Positive, PositiveShare, validate_fields


@dataclass(frozen=True)
class TurnOPD:
    """Reverse KL with a weight for each turn of a conversation; all of it is our reading.

    A completion of one turn is trained as by `OPD()`.

    Attributes:
        unit: "turn" lets every turn count alike, however long it is; "token" every token.
        discount: γ, the weight of a turn against the one before it; above 1 stresses late turns.
        keep: ρ, the share of a conversation's turns that are trained on, those of highest mean KL;
            rounded up.

    Raises:
        InvalidValue: A value is out of its range.
    """

    unit: Literal["turn", "token"] = "turn"
    discount: Positive = 1.0
    keep: PositiveShare = 1.0

    needs: ClassVar[tuple[str, ...]] = ("teacher",)

    def __post_init__(self) -> None:
        validate_fields(self)

    def plan(self, batch: Batch) -> dict[str, Column]:
        """Compute the weight of each turn.

        Args:
            batch: The step's rollout under all policies.

        Returns:
            `turn_weight [B, T]`; 0 on tokens of turns that are left out.
        """
        kl = batch.signals["teacher_reverse_kl"] if self.keep < 1 else None
        weight = torch.zeros(batch.mask.shape, device=batch.mask.device)
        for b in range(len(batch.rollout)):
            own, turn = batch.learn[b], batch.rollout.turn[b]
            turns = turn[own].unique().tolist()
            if not turns:
                continue
            kept = set(turns)
            if kl is not None:
                means = {k: float(kl[b][own & (turn == k)].mean()) for k in turns}
                most = math.ceil(self.keep * len(turns) - 1e-9)
                kept = set(sorted(turns, key=lambda k: -means[k])[:most])
            for k in kept:
                of_turn = own & (turn == k)
                size = float(of_turn.sum()) if self.unit == "turn" else 1.0
                weight[b] = torch.where(of_turn, self.discount**k / size, weight[b])
            weight[b] *= float(own.sum()) / float(weight[b].sum())
        return {
            "turn_weight": Column(
                weight,
                "weight of the token's turn, 1 on average over the conversation",
                kind=Kind.AMOUNT,
                less="left out",
                more="stressed",
            )
        }

    def loss(self, rows: Rows) -> Tensor:
        """Compute the weighted reverse KL.

        Args:
            rows: A chunk of `n` tokens, with the column `turn_weight`.

        Returns:
            `[n]`, in nats.
        """
        return rows.turn_weight.to(rows.student.dtype) * reverse_kl(rows.student, rows.teacher)
