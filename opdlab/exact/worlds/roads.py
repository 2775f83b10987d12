"""A road, the ground beside it, and a student of limited capacity: who should write the texts?

At each of `horizon` steps a text is on the road or off it. On the road one token goes on, a
different one at each step; every other token leads off. Off the road the last token of the
vocabulary leads back. The teacher knows the road; beside it, it is wrong as often as `noise` says.

The student's logits are a fixed start plus features times weights, so what is learned in one state
moves the others; with fewer features than states it cannot be right everywhere, and the states that
its texts visit decide where it is (`opdlab.exact.Chain` is the same walk without learning).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from opdlab.data.prompt import Prompt
from opdlab.exact.table import Table, starts
from opdlab.exact.worlds.pulls import peaked
from opdlab.support.validation import Count, PositiveShare, Seed, Share, validate_fields

ON, OFF = 0, 1


@dataclass(frozen=True)
class RoadWorld:
    """A walk with a way back.

    Attributes:
        horizon: Steps of a text.
        noise: The teacher's share of noise off the road: 0 knows the way back, 1 is all noise.
        capacity: Features per state; at 1 all states can be right.
        vocab: Number of tokens `V`.
        error: The teacher's chance of a wrong token where it knows the right one.
        known: The student's chance of the right token on the road before training.
        seed: Seed of road, noise, start and features.

    Raises:
        InvalidValue: A value is out of its range.
    """

    horizon: Count = 8
    noise: Share = 0.0
    capacity: PositiveShare = 1.0
    vocab: Count = 8
    error: PositiveShare = 0.02
    known: PositiveShare = 0.6
    seed: Seed = 0

    def __post_init__(self) -> None:
        validate_fields(self)

    @cached_property
    def right(self) -> Tensor:
        """The token that is right in each state, `[horizon, 2]`: the road's, and the way back."""
        road = torch.randint(self.vocab - 1, (self.horizon,), generator=self._random(0))
        return torch.stack([road, torch.full_like(road, self.vocab - 1)], -1)

    def teacher(self) -> Tensor:
        """Return the teacher's log-probs.

        Returns:
            `[horizon, 2, V]` in float64: on the road, off it.
        """
        sure = peaked(self.right, 1 - self.error, self.vocab)
        noise = (3 * self._normal(1, self.horizon, self.vocab)).softmax(-1)
        off = (1 - self.noise) * sure[:, OFF] + self.noise * noise
        return torch.stack([sure[:, ON], off], 1).log()

    def student(self) -> Tensor:
        """Return the student's logits before training; off the road it is hardly right.

        Returns:
            `[horizon, 2, V]` in float64.
        """
        chance = torch.tensor([self.known, 1 / self.vocab]).expand(self.horizon, 2)
        start = peaked(self.right, chance, self.vocab).log()
        return start + 0.3 * self._normal(2, self.horizon, 2, self.vocab)

    def kernel(self) -> Tensor:
        """Return how far a step in one state moves the logits in another.

        Returns:
            `[2 horizon, 2 horizon]`, 1 on the diagonal; of rank `capacity` times that.
        """
        states = 2 * self.horizon
        if self.capacity == 1:
            return torch.eye(states, dtype=torch.float64)
        features = self._normal(3, states, max(1, round(self.capacity * states)))
        features = features / features.norm(dim=-1, keepdim=True)
        alike: Tensor = features @ features.T
        return alike

    def visits(self, logits: Tensor) -> Tensor:
        """Return the chance that a text is in each state.

        Args:
            logits: Of the writer, `[..., horizon, 2, V]`.

        Returns:
            `[..., horizon, 2]`; at every step it sums to 1.
        """
        going = self._right_of(logits)
        at = torch.zeros_like(going[..., 0, :])
        at[..., ON] = 1
        out = []
        for t in range(self.horizon):
            out.append(at)
            at = self._after(at, going[..., t, :])
        return torch.stack(out, -2)

    def on_road(self, logits: Tensor) -> Tensor:
        """Return the share of steps after which a text is on the road.

        Args:
            logits: Of the writer, `[..., horizon, 2, V]`.

        Returns:
            `[...]`, from 0 to 1.
        """
        going, visits = self._right_of(logits), self.visits(logits)
        return (visits * going).sum(-1).mean(-1)

    def policies(self, logits: Tensor) -> dict[str, Table]:
        """Return the teacher, and a student with given logits, as tables over all prefixes.

        Args:
            logits: Of the student, `[horizon, 2, V]`.

        Returns:
            "student" and "teacher".
        """
        states = self.states_of_prefixes()
        prompts = (Prompt("Walk.", id="road"),)
        return {
            name: Table(rows.reshape(-1, self.vocab)[states][None], prompts, self.horizon)
            for name, rows in (("student", logits), ("teacher", self.teacher()))
        }

    def states_of_prefixes(self) -> Tensor:
        """Return the state `2 t + (on or off)` that each prefix of a table leads to.

        Returns:
            `[prefixes]`.
        """
        out = torch.zeros(starts(self.vocab, self.horizon), dtype=torch.long)
        for t in range(self.horizon - 1):
            first, last = starts(self.vocab, t), starts(self.vocab, t + 1)
            right = self.right.flatten()[out[first:last]]
            tokens = torch.arange(self.vocab)
            off = (tokens != right[:, None]).long()
            out[last : starts(self.vocab, t + 2)] = (2 * (t + 1) + off).flatten()
        return out

    def _right_of(self, logits: Tensor) -> Tensor:
        """The chance of the right token in each state, `[..., horizon, 2]`."""
        index = self.right.expand(logits.shape[:-1])[..., None]
        return logits.log_softmax(-1).gather(-1, index)[..., 0].exp()

    @staticmethod
    def _after(at: Tensor, right: Tensor) -> Tensor:
        """Move texts by a step: the right token leads to the road from everywhere."""
        on = (at * right).sum(-1)
        return torch.stack([on, 1 - on], -1)

    def _random(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(4 * self.seed + stream)

    def _normal(self, stream: int, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._random(stream), dtype=torch.float64)
