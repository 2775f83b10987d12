"""Independent tokens of a student and a teacher some distance apart, for estimators.

Every state is a distribution of its own over V tokens: nothing follows from a token but the next
state. What an estimator does to it is the question that is left: the sampled token's weight w(u),
u = q / p, moves the logits by the mean of w(u) (onehot(y) - p) over the tokens y of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdlab.exact.table import Table
from opdlab.support.validation import Amount, Count, Seed, validate_fields


@dataclass(frozen=True)
class PairWorld:
    """States of one token each.

    Attributes:
        distance: Standard deviation of the logits of both sides. At 0.1 they hardly differ; at 3
            most of the mass of each is where the other has next to none.
        states: Number of states.
        vocab: Number of tokens `V`.
        seed: Seed of the logits.

    Raises:
        InvalidValue: A value is out of its range.
    """

    distance: Amount = 1.0
    states: Count = 16
    vocab: Count = 10
    seed: Seed = 0

    def __post_init__(self) -> None:
        validate_fields(self)

    def student(self) -> Tensor:
        """Return the student's logits before training.

        Returns:
            `[states, V]` in float64.
        """
        return self._normal(0)

    def teacher(self) -> Tensor:
        """Return the teacher's logits.

        Returns:
            `[states, V]` in float64.
        """
        return self._normal(1)

    @staticmethod
    def gap(student: Tensor, teacher: Tensor) -> Tensor:
        """Return the total variation between both sides, the mean over states.

        Args:
            student: Logits `[..., states, V]`.
            teacher: Logits of a shape that fits.

        Returns:
            `[...]`, from 0 (equal) to 1.
        """
        return ((student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1) / 2).mean(-1)

    def policies(self) -> dict[str, Table]:
        """Return both sides as tables: each state is a prompt that one token answers.

        Returns:
            "student" and "teacher".
        """
        prompts = Table.random(self.vocab, 1, self.states).prompts
        return {
            "student": Table(self.student()[:, None], prompts, 1),
            "teacher": Table(self.teacher()[:, None], prompts, 1),
        }

    def _normal(self, side: int) -> Tensor:
        generator = torch.Generator().manual_seed(2 * self.seed + side)
        noise = torch.randn(self.states, self.vocab, generator=generator, dtype=torch.float64)
        return self.distance * noise
