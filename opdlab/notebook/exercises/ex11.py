"""Notebook 11: every f-divergence in one line, the generalised JSD in its own strength, and
strength itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opdlab.losses.divergences import Generator, generalized_jsd
from opdlab.notebook.cases import random_log_probs
from opdlab.notebook.checking import Exercise

Divergence = Callable[[Tensor, Tensor], Tensor]
SMOOTH = ("forward_kl", "reverse_kl", "jensen_shannon", "squared_hellinger", "pearson", "jeffreys")


def divergence(f: Callable[[Tensor], Tensor], student: Tensor, teacher: Tensor) -> Tensor:
    return (student.exp() * f(teacher - student)).sum(-1)


def library(f: Callable[[Tensor], Tensor], student: Tensor, teacher: Tensor) -> Tensor:
    return f.__self__.divergence(student, teacher)  # type: ignore[attr-defined]


def generated() -> list[tuple[Callable[[Tensor], Tensor], Tensor, Tensor]]:
    return [
        (Generator(name).f, *random_log_probs(seed=i))
        for i, name in enumerate(("forward_kl", "jensen_shannon", "pearson", "total_variation"))
    ]


def jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    p, q = student.exp(), teacher.exp()
    m = beta * q + (1 - beta) * p
    to_middle = lambda a: (a * (a / m).log()).sum(-1)
    return (beta * to_middle(q) + (1 - beta) * to_middle(p)) / (beta * (1 - beta))


def geometric(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    p, q, m = student.exp(), teacher.exp(), beta * teacher + (1 - beta) * student
    return (beta * (q * (teacher - m)).sum(-1) + (1 - beta) * (p * (student - m)).sum(-1)) / (
        beta * (1 - beta)
    )


def strength(divergence: Divergence, teacher: Tensor) -> Tensor:
    q = teacher.exp()
    tilt = torch.linspace(-1, 1, len(q), dtype=q.dtype)
    p = q * (1 + 1e-3 * (tilt - (q * tilt).sum()))
    return 2 * divergence(p.log(), teacher) / ((p - q) ** 2 / q).sum()


def spread(divergence: Divergence, teacher: Tensor) -> Tensor:
    """The forgotten part: without the mean taken out, p does not sum to one."""
    q = teacher.exp()
    p = q * (1 + 1e-3 * torch.linspace(-1, 1, len(q), dtype=q.dtype))
    return 2 * divergence(p.log(), teacher) / ((p - q) ** 2 / q).sum()


def tilted() -> list[tuple[Divergence, Tensor]]:
    return [
        (Generator(name).divergence, random_log_probs(seed=i)[1][0])
        for i, name in enumerate(SMOOTH)
    ]


EXERCISES = (
    Exercise(
        "11.1",
        asks="return E over the student's tokens of f(u), [n], where f takes log u",
        says="one line, and it is every f-divergence",
        truth=library,
        solution=divergence,
        cases=generated,
        mistakes={
            "the ratio is upside down: u is teacher over student.": lambda f, s, t: divergence(
                lambda x: f(-x), s, t
            ),
            "the expectation is under the student, but the weight here is the teacher's.": (
                lambda f, s, t: (t.exp() * f(t - s)).sum(-1)
            ),
            "f takes log u here, not u.": lambda f, s, t: (s.exp() * f((t - s).exp())).sum(-1),
        },
    ),
    Exercise(
        "11.2",
        asks="return the generalised JSD of every row divided by beta (1 - beta), [n]",
        says="that is the JSD in its own strength",
        truth=lambda s, t, beta: generalized_jsd(s, t, beta, normalize=True),
        solution=jsd,
        cases=lambda: [
            (*random_log_probs(seed=0), 0.5),
            (*random_log_probs(seed=1), 0.1),
            (*random_log_probs(seed=2), 0.9),
        ],
        mistakes={
            "that is the bare form. Divide by beta (1 - beta).": lambda s, t, beta: (
                beta * (1 - beta) * jsd(s, t, beta)
            ),
            "the middle is a mixture of probabilities, not of log-probs.": geometric,
            "beta belongs to the teacher, in the middle and in the sum.": lambda s, t, beta: jsd(
                s, t, 1 - beta
            ),
        },
    ),
    Exercise(
        "11.3",
        asks="return 2 D / chi² for a student close to the teacher",
        says="that is f''(1), the strength of a divergence",
        truth=lambda d, teacher: torch.tensor(d.__self__.curvature),
        solution=strength,
        cases=tilted,
        close=0.005,
        mistakes={
            "it is half of what is wanted: D is about ½ f''(1) chi².": lambda d, teacher: (
                strength(d, teacher) / 2
            ),
            "the student does not sum to one. Take the mean of the tilt under the teacher out of it.": (
                spread
            ),
        },
    ),
)
