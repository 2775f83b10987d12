"""A form that the teacher keeps to and the student hardly ever writes: the support as a knob.

A text has `places` tokens. At each place the teacher wants one token, number 0, and the student
gives it the probability `support`. A text that leaves the form never comes back, and off the form
student and teacher agree, so only the places on the form teach anything.

The reverse KL of a place changes with the student's probability p of a token as
p (log(p / q) - KL): where p is next to nothing, so is the gradient, whatever the teacher wants
there. That of the forward KL is p - q.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdlab.data.prompt import Prompt
from opdlab.exact.table import Table, starts
from opdlab.support.validation import Count, PositiveShare, Seed, validate_fields


@dataclass(frozen=True)
class SupportWorld:
    """A form of a few tokens, outside of what the student writes.

    Attributes:
        support: The student's probability of the teacher's token at each place, before training.
        places: Tokens of the form.
        vocab: Number of tokens `V`.
        error: The teacher's probability of all other tokens together.
        seed: Seed of how both spread the rest over the other tokens.

    Raises:
        InvalidValue: A value is out of its range.
    """

    support: PositiveShare = 0.01
    places: Count = 1
    vocab: Count = 8
    error: PositiveShare = 0.03
    seed: Seed = 0

    def __post_init__(self) -> None:
        validate_fields(self)

    def student(self) -> Tensor:
        """Return the student's logits before training.

        Returns:
            `[places, V]` in float64.
        """
        return self._peaked(self.support, 2 * self.seed)

    def teacher(self) -> Tensor:
        """Return the teacher's logits.

        Returns:
            `[places, V]` in float64.
        """
        return self._peaked(1 - self.error, 2 * self.seed + 1)

    @staticmethod
    def visits(logits: Tensor) -> Tensor:
        """Return the probability that a text is still on the form at each place.

        Args:
            logits: Of the writer, `[..., places, V]`.

        Returns:
            `[..., places]`; 1 at the first.
        """
        logp = logits.log_softmax(-1)[..., 0]
        return (logp.cumsum(-1) - logp).exp()

    @staticmethod
    def accuracy(logits: Tensor) -> Tensor:
        """Return the probability that a text has the whole form.

        Args:
            logits: Of the writer, `[..., places, V]`.

        Returns:
            `[...]`.
        """
        return logits.log_softmax(-1)[..., 0].sum(-1).exp()

    def policies(self) -> dict[str, Table]:
        """Return student and teacher as tables over all prefixes, equal off the form.

        Returns:
            "student" and "teacher", with one prompt and texts of `places` tokens.
        """
        size = starts(self.vocab, self.places)
        form = [starts(self.vocab, t) for t in range(self.places)]  # the prefixes 0, 00, 000, …
        prompts = (Prompt("Write the form.", id="form"),)
        tables = {}
        for name, logits in (("student", self.student()), ("teacher", self.teacher())):
            rows = torch.zeros(1, size, self.vocab, dtype=torch.float64)
            rows[0, form] = logits
            tables[name] = Table(rows, prompts, self.places)
        return tables

    def _peaked(self, right: float, seed: int) -> Tensor:
        """Logits with probability `right` on token 0, the rest spread at random."""
        noise = torch.randn(
            self.places,
            self.vocab - 1,
            generator=torch.Generator().manual_seed(seed),
            dtype=torch.float64,
        )
        rest = noise.softmax(-1) * (1 - right)
        first = torch.full((self.places, 1), right, dtype=torch.float64)
        return torch.cat([first, rest], -1).log()
