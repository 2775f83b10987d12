"""Notebook 22: the distance of two windows, the rate of false alarms, and the trajectory term."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opdlab.engine.rows import Rows
from opdlab.methods.futures import false_alarm_rate
from opdlab.methods.topd import TOPD
from opdlab.methods.windows import solve, transport
from opdlab.notebook.cases import random_log_probs
from opdlab.notebook.checking import Exercise


def distance(student: Tensor, teacher: Tensor) -> float:
    """Solve 22.1: the transport distance of two windows.

    Args:
        student: The vectors of a window, `[K, H]`.
        teacher: The vectors of another window, `[K, H]`.

    Returns:
        The mean cosine distance under the best assignment.
    """
    from scipy.optimize import linear_sum_assignment

    cost = _cosine_cost(student, teacher)
    rows, columns = linear_sum_assignment(cost)
    return cost[rows, columns].mean().item()


def _cosine_cost(student: Tensor, teacher: Tensor) -> Tensor:
    s = torch.nn.functional.normalize(student, dim=-1)
    t = torch.nn.functional.normalize(teacher, dim=-1)
    return 1 - s @ t.T


def _reference_distance(student: Tensor, teacher: Tensor) -> float:
    return transport(student, teacher)[0]


def _cases_of_distance() -> list[tuple[Tensor, Tensor]]:
    generator, pairs = torch.Generator().manual_seed(0), []
    for k in (4, 8, 8):
        student = torch.randn(k, 6, generator=generator).double()
        pairs.append((student, torch.randn(k, 6, generator=generator).double()))
    student, teacher = pairs[1]
    partly_the_same = torch.cat([student[3:5], teacher[:4], student[:2]])
    return [*pairs, (student, partly_the_same)]


def _in_order(student: Tensor, teacher: Tensor) -> float:
    return (1 - torch.cosine_similarity(student, teacher, dim=-1)).mean().item()


def _nearest_of_each(student: Tensor, teacher: Tensor) -> float:
    return _cosine_cost(student, teacher).min(1).values.mean().item()


def _summed(student: Tensor, teacher: Tensor) -> float:
    return distance(student, teacher) * len(student)


def rate(high: Sequence[float], low: Sequence[float]) -> float:
    """Solve 22.2: the share of false alarms.

    Args:
        high: Window distances at positions of high loss.
        low: Window distances at positions of low loss; their upper quartile is the limit.

    Returns:
        The share of `high` within the limit, from 0 to 1.
    """
    limit = torch.tensor(low).double().quantile(0.75)
    return (torch.tensor(high).double() <= limit).double().mean().item()


def _reference_rate(high: Sequence[float], low: Sequence[float]) -> float:
    return float(false_alarm_rate(high, low))


def _cases_of_rate() -> list[tuple[Sequence[float], Sequence[float]]]:
    generator = torch.Generator().manual_seed(0)

    def draw(n: int, shift: float) -> list[float]:
        return (shift + torch.rand(n, generator=generator)).double().tolist()

    return [
        (draw(40, 0.3), draw(40, 0.0)),
        (draw(25, 0.6), draw(60, 0.1)),
        ([0.0, 0.0, 0.5, 0.9], [0.0, 0.0, 0.0, 0.3]),
    ]


def _rate_of_real_forks(high: Sequence[float], low: Sequence[float]) -> float:
    return 1 - rate(high, low)


def _with_the_median(high: Sequence[float], low: Sequence[float]) -> float:
    limit = torch.tensor(low).double().quantile(0.5)
    return (torch.tensor(high).double() <= limit).double().mean().item()


def trajectory(logp: Tensor, teacher: Tensor, plan: Tensor) -> Tensor:
    """Solve 22.3: the trajectory term of one window.

    Args:
        logp: The student's log-probs in the window, `[K, V]`.
        teacher: The teacher's tokens in the window, `[K]`.
        plan: The transport plan, `[K, K]`.

    Returns:
        The term, one number in nats.
    """
    logp_of_teacher_tokens = logp[:, teacher]
    return -(plan * logp_of_teacher_tokens).sum()


def _reference_trajectory(logp: Tensor, teacher: Tensor, plan: Tensor) -> Tensor:
    """TOPD's loss of a window's rows with the term, minus its loss without it."""
    columns = {"target": teacher.expand(len(logp), -1), "target_weight": plan}
    rows = Rows({"student": logp, "teacher": logp}, logp.argmax(-1), columns)
    return TOPD(weight=1.0).loss(rows).sum() - TOPD(weight=0.0).loss(rows).sum()


def _cases_of_trajectory() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator, cases = torch.Generator().manual_seed(1), []
    for seed in range(2):
        logp, _ = random_log_probs(5, 9, seed)
        teacher = torch.randint(9, (5,), generator=generator)
        _, plans = solve([torch.rand(5, 5, generator=generator).double()], 0.1)
        cases.append((logp, teacher, plans[0]))
    return cases


def _plan_transposed(logp: Tensor, teacher: Tensor, plan: Tensor) -> Tensor:
    return trajectory(logp, teacher, plan.T)


def _sign_wrong(logp: Tensor, teacher: Tensor, plan: Tensor) -> Tensor:
    return -trajectory(logp, teacher, plan)


def _diagonal_target(logp: Tensor, teacher: Tensor, plan: Tensor) -> Tensor:
    return -logp.gather(-1, teacher[:, None]).mean()


EXERCISES = (
    Exercise(
        "22.1",
        request="return the transport distance of two windows of vectors [K, H], a number",
        confirmation="that is how far the two continuations are apart",
        reference=_reference_distance,
        solution=distance,
        cases=_cases_of_distance,
        mistakes={
            (
                "that compares token by token, in order. The plan may match any token with any "
                "other."
            ): _in_order,
            (
                "each token of the student takes the nearest of the teacher's, so one may be taken "
                "twice. Each has a mass of 1/K."
            ): _nearest_of_each,
            "that is the sum. Each of the K tokens has a mass of 1/K: take the mean.": _summed,
        },
    ),
    Exercise(
        "22.2",
        request="return the share of `high` at or below the upper quartile of `low`",
        confirmation="that is the rate of false alarms",
        reference=_reference_rate,
        solution=rate,
        cases=_cases_of_rate,
        mistakes={
            (
                "that is the share of real forks. Count the distances at or below the limit."
            ): _rate_of_real_forks,
            "the limit is the upper quartile, 0.75, and not the median.": _with_the_median,
        },
    ),
    Exercise(
        "22.3",
        request="return -sum_ij plan_ij log p(T_j | x_<t+i), a number",
        confirmation="that is the trajectory term of one window",
        reference=_reference_trajectory,
        solution=trajectory,
        cases=_cases_of_trajectory,
        mistakes={
            (
                "i and j are swapped: rows of the plan are positions of the student's window, "
                "columns the teacher's tokens."
            ): _plan_transposed,
            (
                "the sign is wrong: where the teacher's tokens are more likely, the loss is lower."
            ): _sign_wrong,
            "that is the diagonal target, which ignores the plan.": _diagonal_target,
        },
    ),
)
