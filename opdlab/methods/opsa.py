"""On-policy self-adaptation: push down the least likely tokens, without a teacher (OPSA).

    loss_t = - A_t p(y_t) / sg p(y_t)   on the 20 % of the batch's tokens of least p(y_t), else 0

    A_t = -1/2                                              fixed
    A_t = -1/2 - (H_t - H_min) / (2 (H_max - H_min))        entropy-adaptive

`H_t` is the student's entropy where the token was drawn; its range is that of the chosen tokens.
Ding and Zhang (arXiv 2608.31046) report that this does as well as OPD on several models, so that
what OPD teaches need not come from its teacher. `opdlab.controls` asks that question of a run.

The selection over the whole batch, and the adaptive form, are those of the authors' code. There the
loss is a mean over the chosen tokens; here it is one over all tokens, as of every method, which is
five times smaller. AdamW makes the same steps of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opdlab.data.column import Column
from opdlab.engine.batch import Batch
from opdlab.engine.rows import Rows
from opdlab.errors import InvalidValue
from opdlab.methods.policy_gradient import advantage_column, policy_gradient_loss, sampler_column
from opdlab.support.validation import Finite, Flag, PositiveShare, validate_fields


@dataclass(frozen=True)
class OPSA:
    """Push down the least likely tokens of the batch, without a teacher.

    Attributes:
        share: The share of the batch's tokens that are pushed down, the least likely ones.
        advantage: Their advantage, below zero. In the adaptive form it is that of the chosen token
            of least entropy.
        adaptive: Whether tokens of more entropy are pushed harder, up to twice `advantage`.

    Raises:
        InvalidValue: The share is not one, or the advantage is not below zero.
    """

    share: PositiveShare = 0.2
    advantage: Finite = -0.5
    adaptive: Flag = True

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.advantage >= 0:
            raise InvalidValue(
                f"OPSA got advantage={self.advantage:g}, which would make unlikely tokens likelier."
                " Use a number below zero, as -0.5."
            )

    def plan(self, batch: Batch) -> dict[str, Column]:
        """Choose the least likely tokens and give them their advantages.

        Args:
            batch: The step's rollout.

        Returns:
            `chosen`, `advantage` (zero on other tokens) and `sampler_logp`, `[B, T]` each.
        """
        rollout, learn = batch.rollout, batch.learn
        chosen = least_likely(batch, self.share)
        advantage = torch.full_like(rollout.logp, self.advantage)
        if self.adaptive:
            entropy = rollout.entropy.to(rollout.logp)
            among = batch.gather(entropy, chosen)
            low, high = (among.min(), among.max()) if len(among) else (0.0, 0.0)
            width = float(high - low)
            place = (entropy - low) / width if width > 1e-12 else torch.ones_like(entropy)
            advantage = advantage * (1 + place)
        return {
            "chosen": Column(
                chosen.long().masked_fill(~learn, -1),
                "whether the token is among the least likely of the batch",
                labels=("left alone", "pushed down"),
                hues=("student", "minus"),
            ),
            "advantage": advantage_column(
                torch.where(chosen, advantage, 0.0), "below zero on the least likely tokens", ""
            ),
            "sampler_logp": sampler_column(rollout.logp),
        }

    def loss(self, rows: Rows) -> Tensor:
        """Compute the policy-gradient loss.

        Args:
            rows: A chunk of `n` tokens, with the columns of `plan`.

        Returns:
            `[n]`.
        """
        return policy_gradient_loss(rows)


def least_likely(batch: Batch, share: float) -> Tensor:
    """Find the learned tokens of least probability, over all processes.

    Args:
        batch: The step's rollout.
        share: Their share of all learned tokens; at least one token is chosen.

    Returns:
        `[B, T]`, whether a token is among them. Of equal tokens the first are taken.
    """
    return highest(batch, -batch.rollout.logp, share)


def highest(batch: Batch, score: Tensor, share: float) -> Tensor:
    """Find the learned tokens with the highest scores, over all processes.

    Args:
        batch: The step's rollout.
        score: `[B, T]`, a number per token.
        share: The share of all learned tokens that is wanted; at least one token is chosen.

    Returns:
        `[B, T]`, whether a token is among them. Of equal tokens the first are taken.
    """
    learn = batch.learn
    everyone = batch.gather(score)
    count = max(1, int(share * len(everyone) + 1e-9)) if len(everyone) else 0
    taken = torch.zeros(len(everyone), dtype=torch.bool, device=score.device)
    taken[everyone.argsort(descending=True, stable=True)[:count]] = True
    chosen = torch.zeros_like(learn)
    chosen[learn] = taken[batch.number(learn)[learn]]
    return chosen
