"""A road and the ground beside it: why the training prefixes matter, in closed form.

A text is a walk of `T` steps. One wrong step leads off the road, and every step that ends off it
costs 1. A student is trained until it errs with chance `error` where it was trained. On the
teacher's prefixes that is the road only: once off it, the student was never told what to do. On its
own prefixes it is wherever it walks, as far as the teacher knows (Ross, Gordon and Bagnell 2011,
arXiv 1011.0686: regret of order error T² against error T).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opdlab.errors import OpdlabError

Prefixes = Literal["teacher", "student"]


@dataclass(frozen=True)
class Chain:
    """A walk along a road.

    Attributes:
        error: Chance of a wrong step where the student was trained.
        horizon: Steps `T`.
        oracle: Whether the teacher knows the way back. A teacher that does not stays off the road,
            and so does a student that learns from it.
        lost: Chance that a step leads back where nobody taught it (0: the ground beside the road is
            absorbing).

    Raises:
        OpdlabError: A chance is not one, or there is no step.
    """

    error: float
    horizon: int
    oracle: bool = True
    lost: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.error <= 1 or not 0 <= self.lost <= 1 or self.horizon < 1:
            raise OpdlabError(
                f"Chain got error={self.error}, lost={self.lost}, horizon={self.horizon}. Use"
                " chances from 0 to 1 and at least one step."
            )

    def matrix(self, prefixes: Prefixes) -> Tensor:
        """Return the chances of where a step leads.

        Args:
            prefixes: The prefixes that the student was trained on.

        Returns:
            `[2, 2]` in float64: row on the road, row off it; columns likewise.

        Raises:
            OpdlabError: There are no such prefixes.
        """
        if prefixes not in ("teacher", "student"):
            raise OpdlabError(f"Chain knows no prefixes {prefixes!r}. Use 'teacher' or 'student'.")
        taught = prefixes == "student" and self.oracle
        back = 1 - self.error if taught else self.lost
        return torch.tensor([[1 - self.error, self.error], [back, 1 - back]], dtype=torch.float64)

    def visits(self, prefixes: Prefixes) -> Tensor:
        """Return the chance to be on the road and off it after each step.

        Args:
            prefixes: The prefixes that the student was trained on.

        Returns:
            `[T, 2]` in float64; each row sums to 1.
        """
        move, at, out = self.matrix(prefixes), torch.tensor([1.0, 0.0], dtype=torch.float64), []
        for _ in range(self.horizon):
            at = at @ move
            out.append(at)
        return torch.stack(out)

    def regret(self, prefixes: Prefixes) -> float:
        """Return the expected steps off the road; a teacher that starts on the road has none.

        Args:
            prefixes: The prefixes that the student was trained on.

        Returns:
            From 0 to T, in steps.
        """
        return float(self.visits(prefixes)[:, 1].sum())
