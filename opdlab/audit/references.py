"""The gradients that a loss is compared with: known divergences and a few other functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from opdlab import exact
from opdlab.losses import DIVERGENCES, forward_kl, reverse_kl

Value = Callable[[Tensor, Tensor], Tensor]  # student, teacher [..., V] -> [...]
SAME_DIRECTION = 1 - 1e-7  # cosine from which two gradients count as one


def log_ratio_squared(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute ½ E_q log² (q / p).

    Args:
        student: Log-probs log p, `[..., V]`.
        teacher: Log-probs log q, `[..., V]`.

    Returns:
        `[...]`.
    """
    return 0.5 * (teacher.exp() * (teacher - student) ** 2).sum(-1)


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute ½ sum (q - p)².

    Args:
        student: Log-probs log p, `[..., V]`.
        teacher: Log-probs log q, `[..., V]`.

    Returns:
        `[...]`.
    """
    return 0.5 * ((teacher.exp() - student.exp()) ** 2).sum(-1)


def reverse_minus_forward(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute KL(p || q) - KL(q || p).

    Args:
        student: Log-probs log p, `[..., V]`.
        teacher: Log-probs log q, `[..., V]`.

    Returns:
        `[...]`, in nats.
    """
    return reverse_kl(student, teacher) - forward_kl(student, teacher)


@dataclass(frozen=True)
class Reference:
    """A function of two distributions whose gradient a loss may have.

    Attributes:
        label: Its name in sentences.
        value: Log-probs of student and teacher `[..., V]` to `[...]`.
    """

    label: str
    value: Value


FIXED = {
    name: Reference(entry.label, entry)
    for name, entry in DIVERGENCES.items()
    if entry.parameter is None and entry.form_of is None
} | {
    "log_ratio_squared": Reference("squared log-ratio", log_ratio_squared),
    "squared_error": Reference("squared error of the probabilities", squared_error),
    "reverse_minus_forward": Reference("reverse KL minus the forward KL", reverse_minus_forward),
}
FAMILIES = [name for name, entry in DIVERGENCES.items() if entry.parameter is not None]


@dataclass(frozen=True)
class Match:
    """The comparison of a gradient with that of one divergence.

    Attributes:
        divergence: The name of the divergence.
        label: Its name in sentences, with the parameter where it has one.
        target: The policy that the divergence is to.
        credit: "token" for the gradient at the prefixes that are visited, "text" for that of the
            sum over whole texts, where the visits depend on the student too.
        cosine: Cosine of the two gradients.
        ratio: Length of the loss's gradient over that of the divergence.
    """

    divergence: str
    label: str
    target: str
    credit: str
    cosine: float
    ratio: float

    @property
    def exact(self) -> bool:
        """Whether the gradients have the same direction, or opposite ones."""
        return abs(self.cosine) > SAME_DIRECTION


@dataclass(frozen=True)
class Comparison:
    """A gradient beside those of divergences from a student to one target.

    Attributes:
        gradient: The gradient `[X, S, V]` of the loss.
        student: The student.
        name: The target's name.
        target: The target.
        credit: As in `Match`.
        visits: Frequency of each prefix in somebody else's texts, `[X, S]`; None where the student
            writes.
    """

    gradient: Tensor
    student: exact.Table
    name: str
    target: exact.Table
    credit: str
    visits: Tensor | None

    def reference(self, divergence: Value) -> Tensor:
        """Compute the gradient of a divergence summed over a text, by autograd.

        Args:
            divergence: Takes log-probs of student and target `[..., V]` and gives `[...]`.

        Returns:
            The gradient in the student's logits, `[X, S, V]`.
        """
        leaf = self.student.logits.clone().requires_grad_()
        live = exact.Table(leaf, self.student.prompts, self.student.length, self.student.eos)
        if self.visits is not None:
            weight = self.visits
        else:
            weight = exact.visits(live if self.credit == "text" else self.student)
        total = (weight * divergence(live.logp, self.target.logp)).sum()
        return torch.autograd.grad(total, leaf)[0]

    def match(self, divergence: Value, name: str, label: str) -> Match:
        """Compare the gradient with that of one divergence.

        Args:
            divergence: Takes log-probs of student and target `[..., V]` and gives `[...]`.
            name: Its name.
            label: Its name in sentences.

        Returns:
            The match; cosine and ratio are 0 where a gradient they divide by is zero.
        """
        other = self.reference(divergence)
        length, other_length = self.gradient.norm().item(), other.norm().item()
        cosine = ratio = 0.0
        if length and other_length:
            cosine = (self.gradient * other).sum().item() / (length * other_length)
        if other_length:
            ratio = length / other_length
        return Match(name, label, self.name, self.credit, cosine, ratio)

    def fit(self, name: str) -> Match:
        """Compare the gradient with that of the closest member of a family of divergences.

        Tries a grid of nine parameters, then searches around the best.

        Args:
            name: A divergence of `opdlab.losses.DIVERGENCES` that has a parameter.

        Returns:
            The match with the largest absolute cosine.
        """
        entry = DIVERGENCES[name]
        parameter = entry.parameter
        assert parameter is not None

        def at(value: float) -> Match:
            label = f"{entry.label} ({parameter.name} {value:.3g})"
            options: dict[str, Any] = {parameter.name: value}
            return self.match(partial(entry, **options), name, label)

        def loss(value: float) -> float:
            return -abs(at(float(value)).cosine)

        grid = [parameter.low + (parameter.high - parameter.low) * i / 8 for i in range(9)]
        best = min(range(9), key=lambda i: loss(grid[i]))
        around = (grid[max(best - 1, 0)], grid[min(best + 1, 8)])
        options = {"xatol": 1e-6, "maxiter": 40}
        found = minimize_scalar(loss, bounds=around, method="bounded", options=options)
        return at(float(found.x))


def matches(
    gradient: Tensor,
    student: exact.Table,
    targets: Mapping[str, exact.Table],
    visits: Tensor | None,
) -> list[Match]:
    """Compare a gradient with those of all known divergences.

    Args:
        gradient: The gradient `[X, S, V]` of a loss.
        student: The student.
        targets: Policies that the student may be drawn to, by name.
        visits: Frequency of each prefix in somebody else's texts, `[X, S]`; None where the student
            writes.

    Returns:
        The matches, the closest first. Families are fitted only where no fixed divergence is exact.
    """
    credits = ("token", "text") if visits is None and student.length > 1 else ("token",)
    comparisons = [
        Comparison(gradient, student, name, target, credit, visits)
        for name, target in targets.items()
        for credit in credits
    ]
    found = [
        comparison.match(known.value, name, known.label)
        for comparison in comparisons
        for name, known in FIXED.items()
    ]
    if not any(match.exact for match in found):
        found += [comparison.fit(name) for comparison in comparisons for name in FAMILIES]
    return sorted(found, key=lambda match: (-round(abs(match.cosine), 9), match.credit == "text"))
