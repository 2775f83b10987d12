"""Notebook 11: every f-divergence in one line, the generalised JSD, and strength."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opdlab.losses import Generator, generalized_jsd
from opdlab.notebook.cases import random_log_probs
from opdlab.notebook.checking import Exercise

Function = Callable[[Tensor], Tensor]
Divergence = Callable[[Tensor, Tensor], Tensor]

ANY_KIND = ("forward_kl", "jensen_shannon", "pearson", "total_variation")
SMOOTH = ("forward_kl", "reverse_kl", "jensen_shannon", "squared_hellinger", "pearson", "jeffreys")


def divergence(f: Function, student: Tensor, teacher: Tensor) -> Tensor:
    """Solve 11.1: any f-divergence of every row.

    Args:
        f: The generator as a function of log u, with u = teacher / student.
        student: Log-probs, `[n, V]`.
        teacher: Log-probs, `[n, V]`.

    Returns:
        The divergence, `[n]` in nats.
    """
    return (student.exp() * f(teacher - student)).sum(-1)


def _generator_of(function: Callable[..., Tensor]) -> Generator:
    """The generator whose bound method a case holds."""
    generator: Generator = function.__self__  # type: ignore[attr-defined]
    return generator


def _reference_divergence(f: Function, student: Tensor, teacher: Tensor) -> Tensor:
    return _generator_of(f).divergence(student, teacher)


def _cases_of_divergence() -> list[tuple[Function, Tensor, Tensor]]:
    return [(Generator(name).f, *random_log_probs(seed=i)) for i, name in enumerate(ANY_KIND)]


def _ratio_upside_down(f: Function, student: Tensor, teacher: Tensor) -> Tensor:
    return (student.exp() * f(student - teacher)).sum(-1)


def _weighted_by_teacher(f: Function, student: Tensor, teacher: Tensor) -> Tensor:
    return (teacher.exp() * f(teacher - student)).sum(-1)


def _f_of_the_ratio(f: Function, student: Tensor, teacher: Tensor) -> Tensor:
    return (student.exp() * f((teacher - student).exp())).sum(-1)


def jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Solve 11.2: the generalised JSD divided by its strength.

    Args:
        student: Log-probs, `[n, V]`.
        teacher: Log-probs, `[n, V]`.
        beta: The teacher's share of the middle, between 0 and 1.

    Returns:
        The divergence, `[n]` in nats.
    """
    p, q = student.exp(), teacher.exp()
    m = beta * q + (1 - beta) * p
    teacher_to_middle = (q * (q / m).log()).sum(-1)
    student_to_middle = (p * (p / m).log()).sum(-1)
    return (beta * teacher_to_middle + (1 - beta) * student_to_middle) / (beta * (1 - beta))


def _reference_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    return generalized_jsd(student, teacher, beta, normalize=True)


def _cases_of_jsd() -> list[tuple[Tensor, Tensor, float]]:
    return [(*random_log_probs(seed=i), beta) for i, beta in enumerate((0.5, 0.1, 0.9))]


def _not_divided(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    return beta * (1 - beta) * jsd(student, teacher, beta)


def _mixture_of_log_probs(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    p, q, m = student.exp(), teacher.exp(), beta * teacher + (1 - beta) * student
    total = beta * (q * (teacher - m)).sum(-1) + (1 - beta) * (p * (student - m)).sum(-1)
    return total / (beta * (1 - beta))


def _beta_for_the_student(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    return jsd(student, teacher, 1 - beta)


def strength(divergence: Divergence, teacher: Tensor) -> Tensor:
    """Solve 11.3: the strength of a divergence, measured close to the teacher.

    Args:
        divergence: A function of the log-probs of student and teacher, `[V]` each.
        teacher: Log-probs, `[V]`.

    Returns:
        The strength, one number; 1 for the KL divergences.
    """
    q = teacher.exp()
    tilt = torch.linspace(-1, 1, len(q), dtype=q.dtype)
    p = q * (1 + 1e-3 * (tilt - (q * tilt).sum()))
    return 2 * divergence(p.log(), teacher) / ((p - q) ** 2 / q).sum()


def _reference_strength(divergence: Divergence, teacher: Tensor) -> Tensor:
    return torch.tensor(_generator_of(divergence).curvature)


def _cases_of_strength() -> list[tuple[Divergence, Tensor]]:
    return [
        (Generator(name).divergence, random_log_probs(seed=i)[1][0])
        for i, name in enumerate(SMOOTH)
    ]


def _half_of_it(divergence: Divergence, teacher: Tensor) -> Tensor:
    return strength(divergence, teacher) / 2


def _student_not_normalised(divergence: Divergence, teacher: Tensor) -> Tensor:
    q = teacher.exp()
    p = q * (1 + 1e-3 * torch.linspace(-1, 1, len(q), dtype=q.dtype))
    return 2 * divergence(p.log(), teacher) / ((p - q) ** 2 / q).sum()


EXERCISES = (
    Exercise(
        "11.1",
        request="return E over the student's tokens of f(u), [n], where f takes log u",
        confirmation="that one line is every f-divergence",
        reference=_reference_divergence,
        solution=divergence,
        cases=_cases_of_divergence,
        mistakes={
            "the ratio is upside down: u is teacher over student.": _ratio_upside_down,
            (
                "the expectation is under the student, but the weight here is the teacher's."
            ): _weighted_by_teacher,
            "f takes log u here, not u.": _f_of_the_ratio,
        },
    ),
    Exercise(
        "11.2",
        request="return the generalised JSD of every row divided by beta (1 - beta), [n]",
        confirmation="that is the JSD divided by its strength",
        reference=_reference_jsd,
        solution=jsd,
        cases=_cases_of_jsd,
        mistakes={
            "that is the plain form. Divide by beta (1 - beta).": _not_divided,
            "the middle is a mixture of probabilities, not of log-probs.": _mixture_of_log_probs,
            "beta belongs to the teacher, in the middle and in the sum.": _beta_for_the_student,
        },
    ),
    Exercise(
        "11.3",
        request="return 2 D / chi² for a student close to the teacher",
        confirmation="that is f''(1), the strength of a divergence",
        reference=_reference_strength,
        solution=strength,
        cases=_cases_of_strength,
        tolerance=0.005,
        mistakes={
            "that is half of the wanted number: D is about ½ f''(1) chi².": _half_of_it,
            (
                "the student does not sum to one. Subtract the tilt's mean under the teacher."
            ): _student_not_normalised,
        },
    ),
)
