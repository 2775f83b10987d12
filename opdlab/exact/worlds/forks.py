"""Forks: after the teacher's branch follows a procedure that the student has never walked.

A text has `wordings` places where both sides only prefer different words, then a fork, then `depth`
tokens. At the fork the teacher takes branch A and the student branch B. On A every token of the
procedure is new to the student; on B it knows its way, and so does the teacher. A wrong token ends
what can be learned: from there both agree.

Token numbers: the wordings use 0 (the teacher's word) and 1 (the student's); the fork 0 (A) and 1
(B); step i of A wants 2 + i mod m, step i of B 2 + m + i mod m, with m tokens for each branch.

A step on the logits of B's step i moves A's step i by `reach` times as much: how far what is
learned in a context that the student writes holds in the context where it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from opdlab.exact.worlds.pulls import peaked
from opdlab.support.validation import (
    Count,
    CountOrZero,
    PositiveShare,
    Seed,
    Share,
    validate_fields,
)

A, B = 0, 1
TOKENS = 4  # m, the tokens of each branch


@dataclass(frozen=True)
class ForkWorld:
    """A fork, a procedure behind it, and wordings before it.

    Attributes:
        depth: Tokens of the procedure behind the fork.
        reach: How far a step in B's context moves the logits in A's, from 0 to 1.
        wordings: Places where both sides only prefer different words.
        window: K, tokens of a window of TOPD.
        first: The student's probability of A at the fork before training.
        known: The student's probability of each right token of A before training.
        error: What both leave to other tokens where they are sure.
        seed: Seed of the start, and of how much the teacher dislikes the student's words.

    Raises:
        InvalidValue: A value is out of its range.
    """

    depth: Count = 4
    reach: Share = 0.0
    wordings: CountOrZero = 0
    window: Count = 4
    first: PositiveShare = 0.05
    known: PositiveShare = 0.05
    error: PositiveShare = 0.03
    seed: Seed = 0

    def __post_init__(self) -> None:
        validate_fields(self)

    @property
    def vocab(self) -> int:
        """Number of tokens `V`."""
        return 2 + 2 * TOKENS

    @property
    def length(self) -> int:
        """Tokens of a text: each wording and its window, fork, procedure and room for a window."""
        return self.wordings * self.window + 1 + self.depth + self.window

    @cached_property
    def right(self) -> Tensor:
        """The teacher's token in each state, `[states]`: wordings, fork, steps of A, steps of B."""
        steps = torch.arange(self.depth) % TOKENS
        zeros = torch.zeros(self.wordings + 1, dtype=torch.long)
        return torch.cat([zeros, 2 + steps, 2 + TOKENS + steps])

    @property
    def fork(self) -> int:
        """The place of the fork among the states."""
        return self.wordings

    @property
    def steps(self) -> tuple[slice, slice]:
        """The places of the steps of A and of B among the states."""
        begin = self.wordings + 1
        return slice(begin, begin + self.depth), slice(begin + self.depth, begin + 2 * self.depth)

    def teacher(self) -> Tensor:
        """Return the teacher's log-probs.

        Returns:
            `[states, V]` in float64. It gives the student's words between 0.3 and 0.006, branch B
            0.05, and any other token less than all of these.
        """
        rows = peaked(self.right, 1 - self.error, self.vocab)
        disliked = 0.3 * 0.02 ** torch.rand(self.wordings, generator=self._random(0)).double()
        second = torch.cat([disliked, torch.tensor([0.05], dtype=torch.float64)])
        rows[: self.fork + 1] = 1e-3
        rows[: self.fork + 1, 1] = second
        rows[: self.fork + 1, 0] = 1 - second - 1e-3 * (self.vocab - 2)
        return rows.log()

    def student(self) -> Tensor:
        """Return the student's logits before training.

        Returns:
            `[states, V]` in float64.
        """
        on_a, fork = self.steps[A], self.fork
        mass = torch.full(self.right.shape, 1 - self.error, dtype=torch.float64)
        mass[on_a] = self.known
        token = self.right.clone()
        token[: fork + 1] = 1  # its own words, and branch B
        rows = peaked(token, mass, self.vocab)
        rows[fork] = self.first / (self.vocab - 2)
        rows[fork, A] = self.first
        rows[fork, B] = 1 - 2 * self.first
        logits = rows.log()
        logits[on_a] += 0.5 * torch.randn(
            self.depth, self.vocab, generator=self._random(1), dtype=torch.float64
        )
        return logits

    def kernel(self) -> Tensor:
        """Return how far a step in one state moves the logits in another.

        Returns:
            `[states, states]`: 1 on the diagonal, `reach` between the same steps of A and B.
        """
        out = torch.eye(len(self.right), dtype=torch.float64)
        on_a, on_b = (torch.arange(len(self.right))[part] for part in self.steps)
        out[on_a, on_b] = out[on_b, on_a] = self.reach
        return out

    def visits(self, logits: Tensor) -> Tensor:
        """Return the chance that a text comes to each state.

        Args:
            logits: Of the writer, `[..., states, V]`.

        Returns:
            `[..., states]`; 1 at wordings and fork.
        """
        out = torch.ones_like(logits[..., 0])
        logp = logits.log_softmax(-1)
        for branch, part in zip((A, B), self.steps, strict=True):
            right = logp[..., part, :].gather(
                -1, self.right[part].expand(logits[..., part, 0].shape)[..., None]
            )[..., 0]
            before = right.cumsum(-1) - right
            out[..., part] = (logp[..., self.fork, branch, None] + before).exp()
        return out

    def accuracy(self, logits: Tensor) -> Tensor:
        """Return the chance that a text takes A and gets its whole procedure right.

        Args:
            logits: Of the writer, `[..., states, V]`.

        Returns:
            `[...]`.
        """
        logp, part = logits.log_softmax(-1), self.steps[A]
        right = logp[..., part, :].gather(
            -1, self.right[part].expand(logits[..., part, 0].shape)[..., None]
        )
        return (logp[..., self.fork, A] + right.sum((-1, -2))).exp()

    def points(self, logits: Tensor) -> Tensor:
        """Return the chance that TOPD looks at each state of a text, and finds a real divergence.

        In a text of this length it looks at one token, that of highest teacher NLL: a token that
        neither side wants; else the louder of the fork and the wordings. A wording is a false
        alarm, so its texts have no point; nor has a text without an error.

        Args:
            logits: Of the writer, `[..., states, V]`.

        Returns:
            `[..., states]`: where the windows begin. At the fork branch B or another token was
            taken.
        """
        p, teacher = logits.softmax(-1), self.teacher()
        words = p[..., : self.fork, :]
        quiet = words[..., :2].sum(-1).prod(-1)  # no wording with a token that nobody wants
        louder = teacher[: self.fork, 1] < teacher[self.fork, B]
        unseen = torch.where(louder, words[..., 0] / words[..., :2].sum(-1), 1.0).prod(-1)
        visits = self.visits(logits)
        right = p.gather(-1, self.right.expand(logits.shape[:-1])[..., None])[..., 0]
        out = visits * (1 - right)
        on_b = self.steps[B]
        clean = p[..., self.fork, B] * right[..., on_b].prod(-1)
        out[..., self.fork] = p[..., self.fork, 2:].sum(-1) + clean * unseen
        out[..., : self.fork] = 0
        return out * quiet[..., None]

    def _random(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(2 * self.seed + stream)
