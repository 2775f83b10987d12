"""Notebook 10: the cost of mistakes, one gradient for two writers, and excess accumulated error."""

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
    """Solve 10.1: the expected number of steps that end off the road.

    Args:
        error: The chance to leave the road in a step.
        back: The chance to come back in a step.
        horizon: Number of steps.

    Returns:
        The expected number of steps, from 0 to `horizon`.
    """
    off, total = 0.0, 0.0
    for _ in range(horizon):
        off = (1 - off) * error + off * (1 - back)
        total += off
    return total


def _reference_regret(error: float, back: float, horizon: int) -> float:
    # `lost` is the chance to come back without training, so any `back` can stand there.
    return exact.Chain(error, horizon, lost=back).regret("teacher")


def _never_back(error: float, back: float, horizon: int) -> float:
    return regret(error, 0.0, horizon)


def _off_after_the_last_step(error: float, back: float, horizon: int) -> float:
    off = 0.0
    for _ in range(horizon):
        off = (1 - off) * error + off * (1 - back)
    return off


def _counted_before_each_step(error: float, back: float, horizon: int) -> float:
    return regret(error, back, horizon) - _off_after_the_last_step(error, back, horizon)


def pull(student: Table, teacher: Table, visits: Tensor) -> Tensor:
    """Solve 10.2: the gradient of the forward KL at every prefix, times its visits.

    Args:
        student: Log-probs at every prefix, `[X, S, V]`.
        teacher: Log-probs at every prefix, `[X, S, V]`.
        visits: Expected number of visits of each prefix, `[X, S]`.

    Returns:
        The gradient in the student's logits, `[X, S, V]`.
    """
    p, q = student.logp.exp(), teacher.logp.exp()
    return visits[..., None] * (p - q)


def _reference_pull(student: Table, teacher: Table, visits: Tensor) -> Tensor:
    """The expected step of OPD with the forward KL, on texts of the policy with these visits."""
    policies = {"student": student, "teacher": teacher}
    writer = "student" if torch.equal(visits, exact.visits(student)) else "teacher"
    return exact.gradient(OPD("forward_kl"), policies, writer=writer)


def _random_pair() -> tuple[Table, Table]:
    return exact.Table.random(3, 3, seed=1), exact.Table.random(3, 3, seed=2, scale=2.0)


def _cases_of_pull() -> list[tuple[Table, Table, Tensor]]:
    student, teacher = _random_pair()
    return [(student, teacher, exact.visits(by)) for by in (student, teacher)]


def _uphill(student: Table, teacher: Table, visits: Tensor) -> Tensor:
    return -pull(student, teacher, visits)


def _without_visits(student: Table, teacher: Table, visits: Tensor) -> Tensor:
    return pull(student, teacher, torch.ones_like(visits))


def _difference_of_log_probs(student: Table, teacher: Table, visits: Tensor) -> Tensor:
    return visits[..., None] * (student.logp - teacher.logp)


def excess(student: Table, teacher: Table) -> Tensor:
    """Solve 10.3: the excess accumulated error up to each position, in per cent.

    Args:
        student: A table of one prompt.
        teacher: Likewise, of the same length and vocabulary.

    Returns:
        The excess, `[T]` in per cent.
    """
    kl = forward_kl(student.logp, teacher.logp)[0]
    sums, first = [], 0
    for t in range(student.length):
        here = slice(first, first + student.vocab**t)
        by_writer = [(exact.visits(by)[0] * kl)[here].sum() for by in (student, teacher)]
        sums.append(torch.stack(by_writer))
        first = here.stop
    own, other = torch.stack(sums).cumsum(0).unbind(1)
    return 100 * (own - other) / other


def _reference_excess(student: Table, teacher: Table) -> Tensor:
    """From all texts with their probabilities."""
    rollout = exact.everything(student.prompts, student.vocab, student.length)
    kl = forward_kl(student.logp, teacher.logp)[student.where(rollout)].view(len(rollout), -1)
    table = excess_error(kl, kl, exact.law(student, rollout), exact.law(teacher, rollout))
    return torch.tensor(table["excess"].to_numpy())


def _cases_of_excess() -> list[tuple[Table, Table]]:
    return [
        _random_pair(),
        (exact.Table.random(2, 4, seed=3), exact.Table.random(2, 4, seed=4)),
    ]


def _not_accumulated(student: Table, teacher: Table) -> Tensor:
    kl = forward_kl(student.logp, teacher.logp)[0]
    sizes = [student.vocab**t for t in range(student.length)]
    own, other = (
        torch.stack([part.sum() for part in torch.split(exact.visits(by)[0] * kl, sizes)])
        for by in (student, teacher)
    )
    return 100 * (own - other) / other


def _as_a_share(student: Table, teacher: Table) -> Tensor:
    return excess(student, teacher) / 100


def _writers_swapped(student: Table, teacher: Table) -> Tensor:
    share = excess(student, teacher) / 100
    return -100 * share / (1 + share)


EXERCISES = (
    Exercise(
        "10.1",
        request="return the expected number of steps that end off the road",
        confirmation="the cost equals that of the library's chain",
        reference=_reference_regret,
        solution=regret,
        cases=lambda: [(0.01, 0.0, 1), (0.1, 0.0, 20), (0.1, 0.9, 20), (0.2, 0.3, 7)],
        mistakes={
            "nobody ever comes back in it: the probability `back` is not used.": _never_back,
            (
                "that is the probability of being off the road after the last step. Add them up."
            ): _off_after_the_last_step,
            (
                "the cost is taken before each step and not after it, so the last step is free."
            ): _counted_before_each_step,
        },
    ),
    Exercise(
        "10.2",
        request=(
            "return the gradient of the forward KL at every prefix, times how often it is visited, "
            "[X, S, V]"
        ),
        confirmation="that is the expected gradient of a training step",
        reference=_reference_pull,
        solution=pull,
        cases=_cases_of_pull,
        mistakes={
            (
                "it leads away from the teacher: the gradient of a loss points uphill, from teacher"
                " to student."
            ): _uphill,
            "all prefixes count alike. Multiply by visits[..., None].": _without_visits,
            (
                "that is the difference of log-probs; the gradient of a softmax is a difference of "
                "probabilities."
            ): _difference_of_log_probs,
        },
    ),
    Exercise(
        "10.3",
        request="return ExAccErr up to each position, in %, shape [T]",
        confirmation="enumerating every text gives the same",
        reference=_reference_excess,
        solution=excess,
        cases=_cases_of_excess,
        mistakes={
            (
                "each position stands alone. The error accumulates: add up to l (cumsum) before you"
                " compare."
            ): _not_accumulated,
            "that is a share, not per cent. Multiply by 100.": _as_a_share,
            (
                "that compares the teacher's prefixes with the student's, the wrong way round."
            ): _writers_swapped,
        },
    ),
)
