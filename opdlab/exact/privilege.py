"""A world of single tokens in which it is known what a hint tells and what it takes skill to do.

Every token has a type; the hint p is a symbol z, uniform and independent of the prompt x. Each
policy is a table of probabilities [type, hint, token], so that every expectation is a sum over all
tokens y, weighted as the bare student S(y|x) would write them: nothing is sampled. The total gap of
a token splits in two exact ways (both sums are telescopes):

    G = log T(y|x,p) - log S(y|x)
      = [log T(x,p) - log S(x,p)]     capability with the hint
      + [log S(x,p) - log S(x)]       the student's information
      = [log T(x,p) - log T(x)]       the teacher's information
      + [log T(x)   - log S(x)]       capability without the hint

Half of both is the Shapley split; their difference, the interaction, is what needs the hint *and*
the skill. Left out: everything that depends on earlier tokens (`opdlab.exact` has tables over
prefixes).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opdlab.errors import OpdlabError

TYPES = {
    "E": "easy: everybody knows it",
    "C": "capability: the teacher knows it, the student is weak",
    "I": "information: the hint itself, known to whoever is told",
    "B": "both: follows from the hint, by a skill that the student lacks",
    "D": "derived: as C, from the student's own prefix (which a single token does not show)",
    "X": "noise: nobody knows, nothing to learn",
    "R": "two right answers: teacher and student prefer different ones",
}
POLICIES = ("teacher", "teacher+hint", "student", "student+hint")


@dataclass(frozen=True)
class Split:
    """Split the total gap of sampled tokens into its parts, in nats; any shape.

    Attributes:
        gap: Log-prob under the hinted teacher less that under the bare student.
        capability_with_hint: Hinted teacher less hinted student.
        information_of_student: Hinted student less bare student; with the line above it makes the
            gap.
        information_of_teacher: Hinted teacher less bare teacher.
        capability_without_hint: Bare teacher less bare student; with the line above it makes the
            gap.
    """

    gap: Tensor
    capability_with_hint: Tensor
    information_of_student: Tensor
    information_of_teacher: Tensor
    capability_without_hint: Tensor

    @property
    def interaction(self) -> Tensor:
        """The part that only hint and skill together explain.

        It is the difference of the two capabilities, and of the two informations.
        """
        return self.capability_with_hint - self.capability_without_hint

    @property
    def capability(self) -> Tensor:
        """Shapley's share of the skill."""
        return (self.capability_with_hint + self.capability_without_hint) / 2

    @property
    def information(self) -> Tensor:
        """Shapley's share of the hint; with `capability` it makes the whole gap."""
        return (self.information_of_student + self.information_of_teacher) / 2


def split(logp: Mapping[str, Any]) -> Split:
    """Split the gap of sampled tokens in both ways: by the student's hint, and by the teacher's.

    Args:
        logp: Log-probs of the tokens in nats, any shape, under each of `POLICIES` by name.

    Returns:
        The parts, in the same shape.
    """
    teacher, told_teacher, student, told_student = (
        torch.as_tensor(logp[name]) for name in POLICIES
    )
    return Split(
        told_teacher - student,
        told_teacher - told_student,
        told_student - student,
        told_teacher - teacher,
        teacher - student,
    )


@dataclass(frozen=True)
class World:
    """A world of single tokens of the seven `TYPES`.

    Attributes:
        vocab: Number of tokens, and of hints.
        error: The probability that a policy which knows the right token leaves to the others.
        weak: The student's probability of the right token where it is weak.
        second: The probability that either side puts on the other right answer of type R.
        shares: The number of tokens of each type, in the order of `TYPES`.

    Raises:
        OpdlabError: A number is out of its range.
    """

    vocab: int = 16
    error: float = 0.05
    weak: float = 0.4
    second: float = 0.1
    shares: tuple[int, ...] = (8, 2, 3, 1, 2, 2, 2)

    def __post_init__(self) -> None:
        if (
            self.vocab < 3
            or len(self.shares) != len(TYPES)
            or min(self.shares) < 0
            or not sum(self.shares)
        ):
            raise OpdlabError(
                f"World got vocab={self.vocab}, shares={self.shares}. Use at least 3 tokens and one"
                f" share for each of {', '.join(TYPES)}."
            )
        if not (0 < self.error < 1 and 0 < self.weak < 1 and 0 < self.second < 1 - self.error):
            raise OpdlabError(
                f"World got error={self.error}, weak={self.weak}, second={self.second}. Use"
                " probabilities between 0 and 1, second below 1 - error."
            )

    def logp(self, policy: str) -> Tensor:
        """Return all log-probs of a policy; without a hint they are the same for all hints.

        Args:
            policy: One of `POLICIES`.

        Returns:
            `[types, hints, V]` in float64, nats.
        """
        place = POLICIES.index(policy)
        return torch.stack([row[place] for row in self._rows()]).log()

    def law(self) -> Tensor:
        """Return the probability of type, hint and token y where the bare student writes.

        Returns:
            `[types, hints, V]` in float64; it sums to one.
        """
        shares = torch.tensor(self.shares, dtype=torch.float64) / sum(self.shares)
        return shares[:, None, None] / self.vocab * self.logp("student").exp()

    def split(self) -> Split:
        """Split the gap of every token in both ways.

        Returns:
            The parts, `[types, hints, V]` each, in nats.
        """
        return split({name: self.logp(name) for name in POLICIES})

    def mean(self, value: Tensor) -> dict[str, float]:
        """Compute the exact mean of a number over the student's tokens of each type.

        Args:
            value: `[types, hints, V]`.

        Returns:
            One mean per type, by its letter.
        """
        weight = self.logp("student").exp() / self.vocab
        return dict(zip(TYPES, (weight * value).sum((1, 2)).tolist(), strict=True))

    def tokens(self, size: int = 1200) -> tuple[Tensor, Tensor, Tensor]:
        """Return a batch in which every y occurs exactly as often as it is likely.

        What holds on it holds in expectation.

        Args:
            size: Tokens per hint and share.

        Returns:
            Type, hint and token ids, `[n]` each.

        Raises:
            OpdlabError: The probabilities are no whole numbers of `size` tokens.
        """
        want = self.law() * size * self.vocab * sum(self.shares)
        count = want.round()
        if (want - count).abs().max() > 1e-6:
            raise OpdlabError(
                f"In {size} tokens the probabilities of this world are no whole numbers. Use a"
                " common multiple of them."
            )
        kind, hint, token = torch.unravel_index(
            torch.arange(count.numel()).repeat_interleave(count.flatten().long()), count.shape
        )
        return kind, hint, token

    def _rows(self) -> list[tuple[Tensor, ...]]:
        """Probabilities `[hints, V]` of the four policies for each of `TYPES`."""
        fixed = torch.zeros(self.vocab, dtype=torch.long)
        z = torch.arange(self.vocab)
        other = (z + 1) % self.vocab  # what follows from the hint by a skill

        def sure(right: Tensor) -> Tensor:
            return self._peak(right, 1 - self.error)

        def weak(right: Tensor) -> Tensor:
            return self._peak(right, self.weak)

        flat = torch.full((self.vocab, self.vocab), 1 / self.vocab, dtype=torch.float64)
        first, second = self._two(0, 1), self._two(1, 0)
        skill = (sure(fixed), sure(fixed), weak(fixed), weak(fixed))
        return [
            (sure(fixed), sure(fixed), sure(fixed), sure(fixed)),
            skill,
            (flat, sure(z), flat, sure(z)),
            (flat, sure(other), flat, weak(other)),
            skill,
            (flat, flat, flat, flat),
            (first, first, second, second),
        ]

    def _peak(self, right: Tensor, p: float) -> Tensor:
        """`p` on the right token of each hint, the rest spread evenly."""
        out = torch.full((self.vocab, self.vocab), (1 - p) / (self.vocab - 1), dtype=torch.float64)
        return out.scatter(1, right[:, None], p)

    def _two(self, liked: int, accepted: int) -> Tensor:
        """Two right answers; the wrong ones get as little as elsewhere."""
        wrong = self.error / (self.vocab - 1)
        row = torch.full((self.vocab,), wrong, dtype=torch.float64)
        row[accepted] = self.second
        row[liked] = 1 - self.second - (self.vocab - 2) * wrong
        return row.expand(self.vocab, -1)


@dataclass(frozen=True)
class Floor:
    """The least mean divergence from a hinted teacher for a student without the hint, in nats.

    Attributes:
        forward_kl: KL(teacher || student).
        reverse_kl: KL(student || teacher).
        jensen_shannon: The Jensen-Shannon divergence.
    """

    forward_kl: float
    reverse_kl: float
    jensen_shannon: float


def floor(vocab: int = 16, error: float = 0.05) -> Floor:
    """Compute the floors of a token that only the hint tells (type I), in closed form.

    The teacher puts 1 - error on z and spreads the rest over the other tokens; the uniform student
    is best for all three. A student that goes lower on given prompts has memorised their hints.

    Args:
        vocab: Number of tokens.
        error: As in `World`.

    Returns:
        The three floors, in nats.
    """
    right, wrong, flat = 1 - error, error / (vocab - 1), 1 / vocab

    def kl(a: tuple[float, float], b: tuple[float, float]) -> float:
        counts = (1, vocab - 1)
        return sum(n * x * math.log(x / y) for n, x, y in zip(counts, a, b, strict=True))

    teacher, student = (right, wrong), (flat, flat)
    middle = ((right + flat) / 2, (wrong + flat) / 2)
    return Floor(
        kl(teacher, student), kl(student, teacher), (kl(teacher, middle) + kl(student, middle)) / 2
    )


def information(logp: Tensor) -> Tensor:
    """Return I(Y; P) in nats under equally likely hints, the floor of the mean forward KL.

    It is reached at the mean of the hinted teachers: E_p KL(T_p || S) = I(Y; P) + KL(mean || S).

    Args:
        logp: Log-probs `[..., hints, V]` of the hinted teachers.

    Returns:
        `[...]`.
    """
    mean = logp.logsumexp(-2, keepdim=True) - math.log(logp.shape[-2])
    divergence: Tensor = torch.linalg.vecdot(logp.exp(), logp - mean)
    return divergence.mean(-1)


def geometric_floor(logp: Tensor) -> Tensor:
    """Return -log Z, Z = sum_y exp(E_p log T_p(y)), the floor of the mean reverse KL.

    It is reached at the geometric mean of the hinted teachers.

    Args:
        logp: Log-probs `[..., hints, V]` of the hinted teachers.

    Returns:
        `[...]`.
    """
    return -logp.mean(-2).logsumexp(-1)
