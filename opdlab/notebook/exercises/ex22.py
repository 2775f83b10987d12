"""Notebook 22: how far two windows are apart, how many alarms are false, and the trajectory term."""

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
    from scipy.optimize import linear_sum_assignment

    s, t = (
        torch.nn.functional.normalize(student, dim=-1),
        torch.nn.functional.normalize(teacher, dim=-1),
    )
    cost = 1 - s @ t.T
    rows, columns = linear_sum_assignment(cost)
    return cost[rows, columns].mean().item()


def diagonal(student: Tensor, teacher: Tensor) -> float:
    return (1 - torch.cosine_similarity(student, teacher, dim=-1)).mean().item()


def nearest(student: Tensor, teacher: Tensor) -> float:
    s, t = (
        torch.nn.functional.normalize(student, dim=-1),
        torch.nn.functional.normalize(teacher, dim=-1),
    )
    return (1 - s @ t.T).min(1).values.mean().item()


def unscaled(student: Tensor, teacher: Tensor) -> float:
    return distance(student, teacher) * len(student)


def vectors() -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(k, 6, generator=made).double(), torch.randn(k, 6, generator=made).double())
        for k in (4, 8, 8)
    ]
    s, t = pairs[1]
    return [*pairs, (s, torch.cat([s[3:5], t[:4], s[:2]]))]  # partly the same tokens, elsewhere


def rate(high: Sequence[float], low: Sequence[float]) -> float:
    limit = torch.tensor(low).double().quantile(0.75)
    return (torch.tensor(high).double() <= limit).double().mean().item()


def alarms() -> list[tuple[Sequence[float], Sequence[float]]]:
    made = torch.Generator().manual_seed(0)
    draw = lambda n, shift: (shift + torch.rand(n, generator=made)).double().tolist()
    return [
        (draw(40, 0.3), draw(40, 0.0)),
        (draw(25, 0.6), draw(60, 0.1)),
        ([0.0, 0.0, 0.5, 0.9], [0.0, 0.0, 0.0, 0.3]),
    ]


def trajectory(logp: Tensor, teacher: Tensor, plan: Tensor) -> Tensor:
    told = logp[:, teacher]
    return -(plan * told).sum()


def library(logp: Tensor, teacher: Tensor, plan: Tensor) -> Tensor:
    """TOPD's loss of a window's rows with the term, less its loss without it."""
    columns = {"target": teacher.expand(len(logp), -1), "target_weight": plan}
    rows = Rows({"student": logp, "teacher": logp}, logp.argmax(-1), columns)
    return TOPD(weight=1.0).loss(rows).sum() - TOPD(weight=0.0).loss(rows).sum()


def windows() -> list[tuple[Tensor, Tensor, Tensor]]:
    made = torch.Generator().manual_seed(1)
    out = []
    for seed in range(2):
        logp, teacher = random_log_probs(5, 9, seed)[0], torch.randint(9, (5,), generator=made)
        out.append((logp, teacher, solve([torch.rand(5, 5, generator=made).double()], 0.1)[1][0]))
    return out


EXERCISES = (
    Exercise(
        "22.1",
        asks="return the transport distance of two windows of vectors [K, H], a number",
        says="that is how far the two futures are apart",
        truth=lambda s, t: transport(s, t)[0],
        solution=distance,
        cases=vectors,
        mistakes={
            "that compares word by word, in order. The plan may match any word with any other.": (
                diagonal
            ),
            "each word of the student takes the nearest of the teacher's, so one may be taken twice. Each has a mass of 1/K.": (
                nearest
            ),
            "it is the sum. Each of the K words has a mass of 1/K: take the mean.": unscaled,
        },
    ),
    Exercise(
        "22.2",
        asks="return the share of `high` at or below the upper quartile of `low`",
        says="that is the rate of false alarms",
        truth=lambda high, low: float(false_alarm_rate(high, low)),
        solution=rate,
        cases=alarms,
        mistakes={
            "that is the share of real forks. Count the distances at or below the limit.": (
                lambda high, low: 1 - rate(high, low)
            ),
            "the limit is the upper quartile, 0.75, and not the median.": lambda high, low: (
                (torch.tensor(high).double() <= torch.tensor(low).double().quantile(0.5))
                .double()
                .mean()
                .item()
            ),
        },
    ),
    Exercise(
        "22.3",
        asks="return -sum_ij plan_ij log p(T_j | x_<t+i), a number",
        says="that is the trajectory term of one window",
        truth=library,
        solution=trajectory,
        cases=windows,
        mistakes={
            "i and j are swapped: rows of the plan are places of the student's window, columns the teacher's words.": lambda logp, teacher, plan: (
                trajectory(logp, teacher, plan.T)
            ),
            "the sign is wrong: likelier teacher's words make a lower loss.": (
                lambda logp, teacher, plan: -trajectory(logp, teacher, plan)
            ),
            "that is the diagonal target, which ignores the plan.": lambda logp, teacher, plan: (
                -logp.gather(-1, teacher[:, None]).mean()
            ),
        },
    ),
)
