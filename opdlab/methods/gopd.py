"""Generalised OPD: reward extrapolation beyond the teacher (G-OPD and ExOPD, arXiv 2602.12125).

    max  E_{y ~ p} sum_t [ λ log( q(y_t) / r(y_t) ) - KL(p || r) ]        q teacher, r reference
    A_t = sg[ λ (log q - log r) - (log p - log r) ]  at the sampled token
    loss_t = -A_t p(y_t) / sg p(y_t)

At every prefix the optimum is p* ∝ r^(1-λ) q^λ. For λ = 1 that is the teacher (plain OPD, whatever
the reference), and for λ > 1 the teacher sharpened away from the reference. The same objective on
the full vocabulary is not implemented.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opdlab.data.column import Column
from opdlab.engine.batch import Batch
from opdlab.engine.rows import Rows
from opdlab.errors import InvalidValue
from opdlab.methods.policy_gradient import (
    advantage_column,
    policy_gradient_loss,
    sampler_column,
)
from opdlab.support.validation import Number, validate_fields


@dataclass(frozen=True)
class GOPD:
    """Reward the student for going beyond the teacher, as `OPD(estimator="sampled")` otherwise.

    The reference is the student before training. The paper's "reward correction" takes the model
    that the teacher was trained from: give distill `policies={"reference": base}`. Each token is
    credited with its own reward only.

    Attributes:
        scale: λ, above 0. The paper extrapolates with 1.25 (the default) and finds 1.5 worse.

    Raises:
        InvalidValue: scale is not a positive number.
    """

    scale: Number = 1.25

    needs: ClassVar[tuple[str, ...]] = ("teacher", "reference")

    def __post_init__(self) -> None:
        validate_fields(self)
        if not 0 < self.scale < math.inf:
            raise InvalidValue(
                f"GOPD got scale={self.scale}, the weight of the teacher's reward. Use a number"
                " above 0; 1 is plain OPD."
            )

    def plan(self, batch: Batch) -> dict[str, Column]:
        """Compute the advantage of each sampled token.

        Args:
            batch: The step's rollout under all policies.

        Returns:
            `advantage` and `sampler_logp`, `[B, T]` each, in nats.
        """
        logp = batch.map(
            lambda rows: torch.stack([rows.logp_of("teacher"), rows.logp_of("reference")], -1),
            needs=self.needs,
        )
        q, r = logp.unbind(-1)
        p = batch.rollout.logp
        # λ (q - r) - (p - r), written as OPD's advantage and what goes beyond it, so that λ = 1 is
        # OPD to the last bit.
        advantage = q - p
        if self.scale != 1:
            advantage = advantage + (self.scale - 1) * (q - r)
        formula = "λ (log q − log r) − (log p − log r), y the sampled token"
        return {
            "advantage": advantage_column(advantage, formula),
            "sampler_logp": sampler_column(p),
        }

    def loss(self, rows: Rows) -> Tensor:
        """Compute the policy-gradient loss -ratio A.

        Args:
            rows: A chunk of `n` tokens, with the columns of `plan`.

        Returns:
            `[n]`.
        """
        return policy_gradient_loss(rows)
