"""GRPO, the reinforcement-learning baseline: only the verifier teaches (Shao et al., arXiv
2402.03300).

    A = (r - mean r) / std r   over the n samples of a prompt,     loss_t = -min(ratio A, clip(ratio, 1 ± eps) A)

Left out: the KL to a reference, as most current recipes do; use a method with `reference` in its
needs to have one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opdlab.engine.batch import Batch
from opdlab.engine.rows import Rows
from opdlab.errors import OpdlabError
from opdlab.support.validation import Flag, PositiveShare, validate_fields


@dataclass(frozen=True)
class GRPO:
    """`scale=False` leaves out the division by the standard deviation (Dr.

    GRPO, arXiv 2503.20783). clip: how far the ratio may leave 1 before a token stops counting,
    above 0 and at most 1.
    """

    scale: Flag = True
    clip: PositiveShare = 0.2

    needs: ClassVar[tuple[str, ...]] = ()
    verifies: ClassVar[bool] = True
    least_n: ClassVar[int] = 2

    def __post_init__(self) -> None:
        validate_fields(self)

    def plan(self, batch: Batch) -> dict[str, Tensor]:
        n = batch.rollout.n
        if n < 2:
            raise OpdlabError(
                "GRPO compares the samples of a prompt, but there is one sample a prompt. Use n=4"
                " or more."
            )
        groups = batch.rewards.view(-1, n)
        advantage = groups - groups.mean(1, keepdim=True)
        if self.scale:
            advantage = advantage / (groups.std(1, keepdim=True) + 1e-4)
        return {"advantage": advantage.flatten(), "sampler_logp": batch.rollout.logp}

    def loss(self, rows: Rows) -> Tensor:
        ratio = (rows.logp - rows.sampler_logp).exp()
        return -torch.min(
            ratio * rows.advantage, ratio.clamp(1 - self.clip, 1 + self.clip) * rows.advantage
        )
