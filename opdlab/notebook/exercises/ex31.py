"""Notebook 31: DOPD's route, its loss, and the weight that the teacher is left with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opdlab.diagnose.privilege import split_gap
from opdlab.engine.rows import Rows
from opdlab.methods import DOPD
from opdlab.methods import dopd as library
from opdlab.notebook.cases import random_log_probs, evaluate_loss
from opdlab.notebook.checking import Exercise

WEIGHTS = (0.6, 0.3, 1.0, 0.6)


def route(teacher: Tensor, student: Tensor, share: float = 0.95) -> Tensor:
    gap, sure = (teacher - student).abs(), teacher.exp() + student.exp()
    kept = gap <= gap.quantile(share)
    low = torch.where(sure >= sure[kept].mean(), 0, 1)
    high = torch.where(teacher >= student, 2, 3)
    return torch.where(gap < gap[kept].mean(), low, high)


def signed(teacher: Tensor, student: Tensor) -> Tensor:
    """The gap without the absolute value."""
    gap, sure = teacher - student, teacher.exp() + student.exp()
    kept = gap <= gap.quantile(0.95)
    low = torch.where(sure >= sure[kept].mean(), 0, 1)
    return torch.where(gap < gap[kept].mean(), low, torch.where(teacher >= student, 2, 3))


def strict(teacher: Tensor, student: Tensor) -> Tensor:
    """Ties on the wrong side."""
    gap, sure = (teacher - student).abs(), teacher.exp() + student.exp()
    kept = gap <= gap.quantile(0.95)
    low = torch.where(sure >= sure[kept].mean(), 0, 1)
    return torch.where(gap <= gap[kept].mean(), low, torch.where(teacher >= student, 2, 3))


def told(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Log-probs of sampled tokens under the told teacher and the told student."""
    made = torch.Generator().manual_seed(seed)
    teacher, student = (
        -2 * torch.rand(n, generator=made, dtype=torch.float64) ** 2 for _ in range(2)
    )
    return teacher, student


def tied() -> tuple[Tensor, Tensor]:
    """A self-teacher: no gap anywhere, so all are as large as their mean."""
    same = torch.tensor([0.5, 0.25, 0.5, 1.0], dtype=torch.float64).log()
    return same, same.clone()


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def dopd(rows: Rows) -> Tensor:
    s, t, own = rows.student, rows["teacher+hint"], rows["student+hint"]
    m = torch.logaddexp(s, t) - math.log(2)
    js = (kl(s, m) + kl(t, m)) / 2
    table = torch.stack([0.6 * kl(s, t), 0.3 * kl(s, own), js, 0.6 * kl(s, own)])
    return table.gather(0, rows.route[None])[0]


def unweighted(rows: Rows) -> Tensor:
    return dopd(rows) / torch.tensor(WEIGHTS, dtype=torch.float64)[rows.route]


def taught(rows: Rows) -> Tensor:
    """All four to the teacher."""
    return dopd(
        Rows({**rows.distributions, "student+hint": rows["teacher+hint"]}, rows.token, rows.columns)
    )


def forward(rows: Rows) -> Tensor:
    s, t, own = rows.student, rows["teacher+hint"], rows["student+hint"]
    m = torch.logaddexp(s, t) - math.log(2)
    js = (kl(s, m) + kl(t, m)) / 2
    return torch.stack([0.6 * kl(t, s), 0.3 * kl(own, s), js, 0.6 * kl(own, s)]).gather(
        0, rows.route[None]
    )[0]


def routed() -> list[tuple[Rows]]:
    out = []
    for seed in (0, 1):
        (s, t), (own, _) = random_log_probs(8, 6, seed=seed), random_log_probs(8, 6, seed=seed + 10)
        rows = {"student": s.requires_grad_(), "teacher+hint": t, "student+hint": own}
        out.append((Rows(rows, torch.zeros(8, dtype=torch.long), {"route": torch.arange(8) % 4}),))
    return out


def weight(
    student: Tensor, teacher_told: Tensor, student_told: Tensor, mean_gap: float, mean_sure: float
) -> Tensor:
    low = (teacher_told - student_told).abs() < mean_gap
    sure = teacher_told.exp() + student_told.exp() >= mean_sure
    light = low & sure
    teachers = ~low & (teacher_told >= student_told)
    return (student.exp() * (0.6 * light + 1.0 * teachers)).sum()


def heard(
    student: Tensor, teacher_told: Tensor, student_told: Tensor, mean_gap: float, mean_sure: float
) -> Tensor:
    """The library's, as `diagnose.privilege` reports it."""
    rows = {
        "student": student,
        "teacher": teacher_told,
        "teacher+hint": teacher_told,
        "student+hint": student_told,
    }
    given = Rows({name: law[None] for name, law in rows.items()}, torch.zeros(1, dtype=torch.long))
    return split_gap(given, (mean_gap, mean_sure), DOPD())["teacher_weight"][0]


def weighed() -> list[tuple[Tensor, Tensor, Tensor, float, float]]:
    out = []
    for seed in range(3):
        (s, t), (own, _) = random_log_probs(1, 6, seed=seed), random_log_probs(1, 6, seed=seed + 20)
        out.append((s[0], t[0], own[0], 0.8, 0.3))
    return out


EXERCISES = (
    Exercise(
        "31.1",
        asks="return the route of every token, 0 to 3, [n]",
        says="the same routes, ties and trimming included",
        truth=lambda t, s: library.route(t, s, torch.ones(len(t), dtype=torch.bool)),
        solution=route,
        cases=lambda: [told(40, 0), told(200, 1), tied()],
        mistakes={
            "the gap is an absolute value: a teacher that thinks less of the token differs as much.": (
                signed
            ),
            "ties are high: A equal to its mean belongs to HT or HS. A student that is its own teacher then is all HT.": (
                strict
            ),
            "the top 5 % of the gaps leave the two means. They are routed all the same.": (
                lambda t, s: route(t, s, 1.0)
            ),
            "teacher and student are swapped in who leads.": lambda t, s: torch.tensor(
                [0, 1, 3, 2]
            )[route(t, s)],
        },
    ),
    Exercise(
        "31.2",
        asks="return the loss of every token, [n]",
        says="four regimes, two teachers, and the library's gradient",
        truth=lambda rows: DOPD().loss(rows),
        solution=dopd,
        cases=routed,
        look=evaluate_loss,
        mistakes={
            "the weights are missing: 0.6, 0.3, 1 and 0.6.": unweighted,
            "all four go to the teacher. LL and HS are the told student's.": taught,
            "the KLs of LH, LL and HS are reverse ones: weighted by the student that is trained.": (
                forward
            ),
        },
    ),
    Exercise(
        "31.3",
        asks="return the teacher's mean weight at a prefix, one number",
        says="the teacher_weight of diagnose.privilege",
        truth=heard,
        solution=weight,
        cases=weighed,
        mistakes={
            "the expectation is under the bare student, who writes; you weighed by the told one.": (
                lambda s, t, own, a, q: weight(own, t, own, a, q)
            ),
            "LH is light: it counts 0.6.": lambda s, t, own, a, q: (
                weight(s, t, own, a, q)
                + 0.4 * (s.exp() * (((t - own).abs() < a) & (t.exp() + own.exp() >= q))).sum()
            ),
            "HS goes to the student, not to the teacher.": lambda s, t, own, a, q: (
                weight(s, t, own, a, q) + (s.exp() * (((t - own).abs() >= a) & (t < own))).sum()
            ),
        },
    ),
)
