"""Generalised OPD: reward extrapolation beyond the teacher (G-OPD and ExOPD, arXiv 2602.12125).

    max  E_{y ~ p} sum_t [ λ log( q(y_t) / r(y_t) ) - KL(p || r) ],      q the teacher, r a reference
    A_t = sg[ λ (log q - log r) - (log p - log r) ]  at the sampled token,      loss_t = -A_t p(y_t) / sg p(y_t)

At every prefix the optimum is p* ∝ r^(1-λ) q^λ: the teacher for λ = 1 (plain OPD, whatever the
reference), and for λ > 1 the teacher sharpened away from the reference. Left out: the same on the
full vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opdlab.engine.batch import Batch
from opdlab.engine.rows import Rows
from opdlab.errors import InvalidValue
from opdlab.support.validation import Number, validate_fields


@dataclass(frozen=True)
class GOPD:
    """`scale` is λ; the paper extrapolates with 1.25 and finds 1.5 worse.

    The reference is the student before training. The paper's "reward correction" takes the model
    that the teacher was trained from instead: `policies={"reference": base}`. Token-local, as
    `OPD(estimator="sampled")` without a discount.
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

    def plan(self, batch: Batch) -> dict[str, Tensor]:
        logp = batch.map(
            lambda rows: torch.stack([rows.logp_of("teacher"), rows.logp_of("reference")], -1),
            needs=self.needs,
        )
        teacher, reference = logp.unbind(-1)
        advantage = teacher - batch.rollout.logp
        if self.scale != 1:  # λ(q - r) - (p - r), written as what goes beyond OPD
            advantage = advantage + (self.scale - 1) * (teacher - reference)
        return {"advantage": advantage, "sampler_logp": batch.rollout.logp}

    def loss(self, rows: Rows) -> Tensor:
        ratio = (rows.logp - rows.sampler_logp).exp()  # 1, but it carries the gradient
        return -ratio * rows.advantage
