"""GRPO, the reinforcement-learning baseline: only the verifier teaches (arXiv 2402.03300).

    A      = (r - mean r) / std r                over the n samples of a prompt
    loss_t = -min( ratio_t A, clip(ratio_t, 1 ± ε) A )

The KL to a reference is left out, as in most current recipes; a method with "reference" in its
needs can add it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opdlab.data.column import Column
from opdlab.engine.batch import Batch
from opdlab.engine.rows import Rows
from opdlab.errors import OpdlabError
from opdlab.methods.policy_gradient import advantage_column, importance_ratio, sampler_column
from opdlab.support.validation import Flag, PositiveShare, validate_fields

SMALLEST_STD = 1e-4  # added to a standard deviation, so that equal rewards give an advantage of 0


@dataclass(frozen=True)
class GRPO:
    """Learn from the verifier's scores, compared among the samples of a prompt.

    Needs a task with a verifier and at least two samples per prompt (`n=4`, say).

    Attributes:
        scale: Divide by the standard deviation. False is Dr. GRPO (arXiv 2503.20783).
        clip: ε, how far the ratio may leave 1 before a token stops counting; above 0, at most 1.

    Raises:
        InvalidValue: A value is out of its range.
    """

    scale: Flag = True
    clip: PositiveShare = 0.2

    needs: ClassVar[tuple[str, ...]] = ()
    verifies: ClassVar[bool] = True
    least_n: ClassVar[int] = 2

    def __post_init__(self) -> None:
        validate_fields(self)

    def plan(self, batch: Batch) -> dict[str, Column]:
        """Compute the advantage of each completion over the other samples of its prompt.

        Args:
            batch: The step's rollout, with a verifier.

        Returns:
            `advantage [B]` and `sampler_logp [B, T]` (nats).

        Raises:
            OpdlabError: There is one sample per prompt.
            MissingPolicy: There is no verifier.
        """
        n = batch.rollout.n
        if n < 2:
            raise OpdlabError(
                "GRPO compares the samples of a prompt, but there is one sample per prompt. Use n=4"
                " or more."
            )
        rewards = batch.rewards.view(-1, n)
        advantage = rewards - rewards.mean(1, keepdim=True)
        if self.scale:
            advantage = advantage / (rewards.std(1, keepdim=True) + SMALLEST_STD)
        formula = "reward − mean reward of the prompt's samples" + ", over their std" * self.scale
        return {
            "advantage": advantage_column(advantage.flatten(), formula, unit=""),
            "sampler_logp": sampler_column(batch.rollout.logp),
        }

    def loss(self, rows: Rows) -> Tensor:
        """Compute the clipped policy-gradient loss.

        Args:
            rows: A chunk of `n` tokens, with the columns of `plan`.

        Returns:
            `[n]`.
        """
        return clipped_loss(rows, self.clip)


def clipped_loss(rows: Rows, clip: float) -> Tensor:
    """Compute the clipped policy-gradient loss -min(ratio A, clip(ratio, 1 ± clip) A).

    Args:
        rows: A chunk of `n` tokens, with the columns `advantage` and `sampler_logp`.
        clip: The largest distance of the ratio from 1 that still counts.

    Returns:
        `[n]`.
    """
    ratio = importance_ratio(rows)
    return -torch.min(ratio * rows.advantage, ratio.clamp(1 - clip, 1 + clip) * rows.advantage)
