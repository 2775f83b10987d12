"""Rules that choose tokens to train on: a number per token, and a method that trains on the top.

    entropy     H(p)                                       (many papers)
    lowest      -log p(y)                                  the least likely tokens (2608.31046)
    tip         h + d - h d                                TIP (2604.14084)
    gap         |log q(y) - log p(y)|                      DOPD's gap (2606.30626)
    distance    transport cost between the windows of student and teacher, TOPD (2606.00305)
    reverse_kl  KL(p || q)
    random      a number drawn for the token

p is the student and q the teacher, y the sampled token. TIP's h and d are the entropy and the
divergence, each divided by its largest value in the batch (that normaliser is our reading). DOPD
reads the gap under a hint; here both are read as the run reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opdlab.data.column import Column
from opdlab.data.seeds import seed_of
from opdlab.engine.batch import Batch
from opdlab.engine.rows import Rows
from opdlab.errors import InvalidValue
from opdlab.losses import reverse_kl
from opdlab.methods import windows
from opdlab.methods.dopd import gap
from opdlab.methods.opsa import highest
from opdlab.support.expect import shortened
from opdlab.support.validation import PositiveShare, validate_fields

Rule = Callable[[Batch], Tensor]
WINDOW = 4  # tokens that the rule "distance" looks ahead


def _entropy(batch: Batch) -> Tensor:
    return batch.signals["student_entropy"].double()


def _lowest(batch: Batch) -> Tensor:
    return -batch.rollout.logp.double()


def _reverse_kl(batch: Batch) -> Tensor:
    return batch.signals["teacher_reverse_kl"].double()


def _tip(batch: Batch) -> Tensor:
    h, d = (_of_largest(batch, values) for values in (_entropy(batch), _reverse_kl(batch)))
    return h + d - h * d


def _gap(batch: Batch) -> Tensor:
    return gap(batch.signals["teacher_logp"].double(), batch.signals["student_logp"].double())


def _distance(batch: Batch) -> Tensor:
    """TOPD's distance at every token; at the end of a text the windows are as long as fits."""
    rollout, policies = batch.rollout, batch.policies
    points = [(int(b), int(t)) for b, t in batch.learn.nonzero()]
    theirs = windows.write(policies["teacher"], rollout, points, WINDOW)
    ours = windows.slices(rollout, points, WINDOW)
    both = [i for i in range(len(points)) if ours[i] and theirs[i]]
    costs = windows.costs([ours[i] for i in both], [theirs[i] for i in both], "student", policies)
    out = torch.zeros(rollout.ids.shape, dtype=torch.float64)
    for i, value in zip(both, windows.solve(costs)[0].tolist(), strict=True):
        out[points[i]] = value
    return out


def _random(batch: Batch) -> Tensor:
    return batch.random(seed_of(0, batch.step, 17)).double()


RULES: dict[str, Rule] = {
    "entropy": _entropy,
    "lowest": _lowest,
    "tip": _tip,
    "gap": _gap,
    "distance": _distance,
    "reverse_kl": _reverse_kl,
    "random": _random,
}


@dataclass(frozen=True)
class TopTokens:
    """OPD on the share of the batch's tokens that a rule puts highest, and on no other.

    Attributes:
        rule: A name of `RULES`.
        share: The share of the batch's tokens.

    Raises:
        InvalidValue: There is no such rule, or the share is not one.
    """

    rule: str = "reverse_kl"
    share: PositiveShare = 0.05

    needs: ClassVar[tuple[str, ...]] = ("teacher",)
    formula: ClassVar[str] = "where(chosen == 1, sum(student * log(student / teacher)), 0)"

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.rule not in RULES:
            raise InvalidValue(
                f"TopTokens has no rule {shortened(self.rule)}. Use one of {', '.join(RULES)}."
            )

    def plan(self, batch: Batch) -> dict[str, Column]:
        """Choose the tokens.

        Args:
            batch: The step's rollout under all policies.

        Returns:
            `chosen [B, T]`, 1 on tokens that are trained.
        """
        score = RULES[self.rule](batch).to(batch.rollout.ids.device)
        chosen = highest(batch, score, self.share)
        return {
            "chosen": Column(
                chosen.long().masked_fill(~batch.learn, -1),
                "whether the rule puts the token among the highest",
                labels=("left alone", "trained"),
                hues=("student", "teacher"),
            )
        }

    def loss(self, rows: Rows) -> Tensor:
        """Compute the reverse KL of the chosen tokens.

        Args:
            rows: A chunk of `n` tokens, with the column `chosen`.

        Returns:
            `[n]`, in nats; zero on tokens that are not chosen.
        """
        at = (rows.chosen == 1).nonzero()[:, 0]
        student, teacher = rows.student.index_select(0, at), rows.teacher.index_select(0, at)
        return torch.zeros_like(rows.logp).index_add(0, at, reverse_kl(student, teacher))


def _of_largest(batch: Batch, values: Tensor) -> Tensor:
    """Values as shares of the largest in the batch."""
    everyone = batch.gather(values)
    most = float(everyone.max()) if len(everyone) else 0.0
    return values / most if most > 0 else torch.zeros_like(values)
