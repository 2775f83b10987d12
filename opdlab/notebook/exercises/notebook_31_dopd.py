"""Notebook 31: DOPD's route, its loss, and the weight that the teacher gets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opdlab.diagnose.privilege import split_gap
from opdlab.engine.rows import Rows
from opdlab.methods import DOPD
from opdlab.methods import dopd as library
from opdlab.notebook.cases import evaluate_loss, random_log_probs
from opdlab.notebook.checking import Exercise

WEIGHTS = (0.6, 0.3, 1.0, 0.6)  # of LH, LL, HT and HS


def route(teacher: Tensor, student: Tensor) -> Tensor:
    """Solve 31.1: the route of every token.

    Args:
        teacher: The hinted teacher's log-probs of the sampled tokens, `[n]`.
        student: The hinted student's log-probs of them, `[n]`.

    Returns:
        The number of the route, 0 to 3, `[n]`.
    """
    return _route(teacher, student, 0.95)


def _route(teacher: Tensor, student: Tensor, quantile: float) -> Tensor:
    """The route, with the means over the gaps up to a quantile."""
    gap, sure = (teacher - student).abs(), teacher.exp() + student.exp()
    kept = gap <= gap.quantile(quantile)
    low = torch.where(sure >= sure[kept].mean(), 0, 1)
    high = torch.where(teacher >= student, 2, 3)
    return torch.where(gap < gap[kept].mean(), low, high)


def _reference_route(teacher: Tensor, student: Tensor) -> Tensor:
    return library.route(teacher, student, torch.ones(len(teacher), dtype=torch.bool))


def _random_sampled(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Log-probs of sampled tokens under the hinted teacher and the hinted student."""
    generator = torch.Generator().manual_seed(seed)
    teacher = -2 * torch.rand(n, generator=generator, dtype=torch.float64) ** 2
    student = -2 * torch.rand(n, generator=generator, dtype=torch.float64) ** 2
    return teacher, student


def _self_teacher() -> tuple[Tensor, Tensor]:
    """A self-teacher: there is no gap anywhere, so every gap equals the mean."""
    same = torch.tensor([0.5, 0.25, 0.5, 1.0], dtype=torch.float64).log()
    return same, same.clone()


def _cases_of_route() -> list[tuple[Tensor, Tensor]]:
    return [_random_sampled(40, 0), _random_sampled(200, 1), _self_teacher()]


def _signed_gap(teacher: Tensor, student: Tensor) -> Tensor:
    gap, sure = teacher - student, teacher.exp() + student.exp()
    kept = gap <= gap.quantile(0.95)
    low = torch.where(sure >= sure[kept].mean(), 0, 1)
    return torch.where(gap < gap[kept].mean(), low, torch.where(teacher >= student, 2, 3))


def _ties_low(teacher: Tensor, student: Tensor) -> Tensor:
    gap, sure = (teacher - student).abs(), teacher.exp() + student.exp()
    kept = gap <= gap.quantile(0.95)
    low = torch.where(sure >= sure[kept].mean(), 0, 1)
    return torch.where(gap <= gap[kept].mean(), low, torch.where(teacher >= student, 2, 3))


def _not_trimmed(teacher: Tensor, student: Tensor) -> Tensor:
    return _route(teacher, student, 1.0)


def _leads_swapped(teacher: Tensor, student: Tensor) -> Tensor:
    return torch.tensor([0, 1, 3, 2])[route(teacher, student)]


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def dopd(rows: Rows) -> Tensor:
    """Solve 31.2: the loss of every token.

    Args:
        rows: Log-probs of student, `teacher+hint` and `student+hint`, `[n, V]` each, and the column
            `route`.

    Returns:
        The loss, `[n]`.
    """
    s, t, own = rows.student, rows["teacher+hint"], rows["student+hint"]
    m = torch.logaddexp(s, t) - math.log(2)
    js = (_kl(s, m) + _kl(t, m)) / 2
    table = torch.stack([0.6 * _kl(s, t), 0.3 * _kl(s, own), js, 0.6 * _kl(s, own)])
    return table.gather(0, rows.route[None])[0]


def _reference_loss(rows: Rows) -> Tensor:
    return DOPD().loss(rows)


def _cases_of_loss() -> list[tuple[Rows]]:
    cases = []
    for seed in (0, 1):
        student, teacher = random_log_probs(8, 6, seed=seed)
        own, _ = random_log_probs(8, 6, seed=seed + 10)
        distributions = {
            "student": student.requires_grad_(),
            "teacher+hint": teacher,
            "student+hint": own,
        }
        token = torch.zeros(8, dtype=torch.long)
        cases.append((Rows(distributions, token, {"route": torch.arange(8) % 4}),))
    return cases


def _without_weights(rows: Rows) -> Tensor:
    return dopd(rows) / torch.tensor(WEIGHTS, dtype=torch.float64)[rows.route]


def _all_to_the_teacher(rows: Rows) -> Tensor:
    distributions = {**rows.distributions, "student+hint": rows["teacher+hint"]}
    return dopd(Rows(distributions, rows.token, rows.columns))


def _forward_kls(rows: Rows) -> Tensor:
    s, t, own = rows.student, rows["teacher+hint"], rows["student+hint"]
    m = torch.logaddexp(s, t) - math.log(2)
    js = (_kl(s, m) + _kl(t, m)) / 2
    table = torch.stack([0.6 * _kl(t, s), 0.3 * _kl(own, s), js, 0.6 * _kl(own, s)])
    return table.gather(0, rows.route[None])[0]


def weight(
    student: Tensor,
    hinted_teacher: Tensor,
    hinted_student: Tensor,
    mean_gap: float,
    mean_sure: float,
) -> Tensor:
    """Solve 31.3: the mean weight of the teacher at a prefix.

    Args:
        student: Log-probs, `[V]`.
        hinted_teacher: Log-probs, `[V]`.
        hinted_student: Log-probs, `[V]`.
        mean_gap: The limit of a small gap, in nats.
        mean_sure: The limit of a sure pair, as a sum of two probabilities.

    Returns:
        The expected weight, one number.
    """
    low = (hinted_teacher - hinted_student).abs() < mean_gap
    sure = hinted_teacher.exp() + hinted_student.exp() >= mean_sure
    light = low & sure
    teachers = ~low & (hinted_teacher >= hinted_student)
    return (student.exp() * (0.6 * light + 1.0 * teachers)).sum()


def _reference_weight(
    student: Tensor,
    hinted_teacher: Tensor,
    hinted_student: Tensor,
    mean_gap: float,
    mean_sure: float,
) -> Tensor:
    """As `diagnose.privilege` reports it."""
    log_probs = {
        "student": student,
        "teacher": hinted_teacher,
        "teacher+hint": hinted_teacher,
        "student+hint": hinted_student,
    }
    one_row = {name: values[None] for name, values in log_probs.items()}
    rows = Rows(one_row, torch.zeros(1, dtype=torch.long))
    return split_gap(rows, (mean_gap, mean_sure), DOPD())["teacher_weight"][0]


def _cases_of_weight() -> list[tuple[Tensor, Tensor, Tensor, float, float]]:
    cases = []
    for seed in range(3):
        student, teacher = random_log_probs(1, 6, seed=seed)
        own, _ = random_log_probs(1, 6, seed=seed + 20)
        cases.append((student[0], teacher[0], own[0], 0.8, 0.3))
    return cases


def _under_the_hinted_student(
    student: Tensor, teacher: Tensor, own: Tensor, mean_gap: float, mean_sure: float
) -> Tensor:
    return weight(own, teacher, own, mean_gap, mean_sure)


def _full_weight_for_lh(
    student: Tensor, teacher: Tensor, own: Tensor, mean_gap: float, mean_sure: float
) -> Tensor:
    light = ((teacher - own).abs() < mean_gap) & (teacher.exp() + own.exp() >= mean_sure)
    return weight(student, teacher, own, mean_gap, mean_sure) + 0.4 * (student.exp() * light).sum()


def _hs_to_the_teacher(
    student: Tensor, teacher: Tensor, own: Tensor, mean_gap: float, mean_sure: float
) -> Tensor:
    students = ((teacher - own).abs() >= mean_gap) & (teacher < own)
    return weight(student, teacher, own, mean_gap, mean_sure) + (student.exp() * students).sum()


EXERCISES = (
    Exercise(
        "31.1",
        request="return the route of every token, 0 to 3, [n]",
        confirmation="the same routes, ties and trimming included",
        reference=_reference_route,
        solution=route,
        cases=_cases_of_route,
        mistakes={
            (
                "the gap is an absolute value: a token that the teacher finds less likely differs "
                "as much."
            ): _signed_gap,
            (
                "ties are high: a gap equal to the mean belongs to HT or HS. All tokens of a "
                "student that is its own teacher are HT."
            ): _ties_low,
            (
                "the top 5 % of the gaps leave the two means. They are routed all the same."
            ): _not_trimmed,
            "teacher and student are swapped in the comparison of HT and HS.": _leads_swapped,
        },
    ),
    Exercise(
        "31.2",
        request="return the loss of every token, [n]",
        confirmation="four regimes, two teachers, and the library's gradient",
        reference=_reference_loss,
        solution=dopd,
        cases=_cases_of_loss,
        observe=evaluate_loss,
        mistakes={
            "the weights are missing: 0.6, 0.3, 1 and 0.6.": _without_weights,
            (
                "all four have the teacher as target. LL and HS have the hinted student."
            ): _all_to_the_teacher,
            (
                "the KLs of LH, LL and HS are reverse ones: their weights are the probabilities of "
                "the student that is trained."
            ): _forward_kls,
        },
    ),
    Exercise(
        "31.3",
        request="return the teacher's mean weight at a prefix, one number",
        confirmation="the teacher_weight of diagnose.privilege",
        reference=_reference_weight,
        solution=weight,
        cases=_cases_of_weight,
        mistakes={
            (
                "the expectation is under the student without the hint, which writes; you used the "
                "hinted student."
            ): _under_the_hinted_student,
            "LH has a lower weight: it counts 0.6.": _full_weight_for_lh,
            "HS goes to the student, not to the teacher.": _hs_to_the_teacher,
        },
    ),
)
