"""Notebook 10: the road, one gradient under two prefix laws, and excess accumulated error."""

from __future__ import annotations

import torch
from torch import Tensor

from opdlab import exact
from opdlab.diagnose.exposure import excess_error
from opdlab.exact import Table
from opdlab.losses.divergences import forward_kl
from opdlab.methods import OPD
from opdlab.notebook.checking import Exercise


def regret(error: float, back: float, horizon: int) -> float:
    off, total = 0.0, 0.0
    for _ in range(horizon):
        off = (1 - off) * error + off * (1 - back)
        total += off
    return total


def road(error: float, back: float, horizon: int) -> float:
    """The library's: `back` is what nobody taught, or what a teacher did."""
    return exact.Chain(error, horizon, lost=back).regret("teacher")


def forever(error: float, back: float, horizon: int) -> float:
    return regret(error, 0.0, horizon)


def last(error: float, back: float, horizon: int) -> float:
    off = 0.0
    for _ in range(horizon):
        off = (1 - off) * error + off * (1 - back)
    return off


def late(error: float, back: float, horizon: int) -> float:
    return regret(error, back, horizon) - last(error, back, horizon)


def pull(student: Table, teacher: Table, visits: Tensor) -> Tensor:
    p, q = student.logp.exp(), teacher.logp.exp()
    return visits[..., None] * (p - q)


def engine(student: Table, teacher: Table, visits: Tensor) -> Tensor:
    """The library's: what a step of OPD with the forward KL does on texts of whoever `visits` is
    of.
    """
    policies = {"student": student, "teacher": teacher}
    writer = "student" if torch.equal(visits, exact.visits(student)) else "teacher"
    return exact.gradient(OPD("forward_kl"), policies, writer=writer)


def two() -> tuple[Table, Table]:
    return exact.Table.random(3, 3, seed=1), exact.Table.random(3, 3, seed=2, scale=2.0)


def pulled() -> list[tuple[Table, Table, Tensor]]:
    student, teacher = two()
    return [(student, teacher, exact.visits(by)) for by in (student, teacher)]


def excess(student: Table, teacher: Table) -> Tensor:
    kl = forward_kl(student.logp, teacher.logp)[0]
    sums, first = [], 0
    for t in range(student.length):
        here = slice(first, first + student.vocab**t)
        sums.append(
            torch.stack([(exact.visits(by)[0] * kl)[here].sum() for by in (student, teacher)])
        )
        first = here.stop
    own, other = torch.stack(sums).cumsum(0).T
    return 100 * (own - other) / other


def enumerated(student: Table, teacher: Table) -> Tensor:
    """The library's, from all texts with their probabilities."""
    rollout = exact.everything(student.prompts, student.vocab, student.length)
    kl = forward_kl(student.logp, teacher.logp)[student.where(rollout)].view(len(rollout), -1)
    table = excess_error(kl, kl, exact.law(student, rollout), exact.law(teacher, rollout))
    return torch.tensor(table["excess"].to_numpy())


def alone(student: Table, teacher: Table) -> Tensor:
    kl = forward_kl(student.logp, teacher.logp)[0]
    sizes = [student.vocab**t for t in range(student.length)]
    parts = [
        torch.stack([x.sum() for x in (exact.visits(by)[0] * kl).split(sizes)])
        for by in (student, teacher)
    ]
    return 100 * (parts[0] - parts[1]) / parts[1]


EXERCISES = (
    Exercise(
        "10.1",
        asks="return the expected number of steps that end off the road",
        says="the walk costs what the library's chain says",
        truth=road,
        solution=regret,
        cases=lambda: [(0.01, 0.0, 1), (0.1, 0.0, 20), (0.1, 0.9, 20), (0.2, 0.3, 7)],
        mistakes={
            "nobody ever comes back in it: the chance `back` is not used.": forever,
            "that is the chance to be off the road after the last step. Add up all steps.": last,
            "the cost is taken before each step and not after it, so the last step is free.": late,
        },
    ),
    Exercise(
        "10.2",
        asks=(
            "return the gradient of the forward KL at every prefix, times how often it is visited,"
            " [X, S, V]"
        ),
        says="that is what a training step does, in expectation",
        truth=engine,
        solution=pull,
        cases=pulled,
        mistakes={
            "it leads away from the teacher: the gradient of a loss points uphill, from teacher to student.": lambda s, t, visits: (
                -pull(s, t, visits)
            ),
            "all prefixes count alike. Multiply by visits[..., None].": lambda s, t, visits: pull(
                s, t, torch.ones_like(visits)
            ),
            "that is the difference of log-probs; the slope of a softmax is one of probabilities.": lambda s, t, visits: (
                visits[..., None] * (s.logp - t.logp)
            ),
        },
    ),
    Exercise(
        "10.3",
        asks="return ExAccErr up to each position, in %, shape [T]",
        says="the same, from enumerating every text",
        truth=enumerated,
        solution=excess,
        cases=lambda: [two(), (exact.Table.random(2, 4, seed=3), exact.Table.random(2, 4, seed=4))],
        mistakes={
            "each position stands alone. The error accumulates: add up to l (cumsum) before you compare.": (
                alone
            ),
            "it is a share and not per cent.": lambda s, t: excess(s, t) / 100,
            "that compares the teacher's prefixes with the student's, the wrong way round.": (
                lambda s, t: -100 * (e := excess(s, t) / 100) / (1 + e)
            ),
        },
    ),
)
