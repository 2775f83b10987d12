"""Notebook 40: the split of the gap, the floor of information, and the illusion index."""

from __future__ import annotations

import math

import pandas as pd
from torch import Tensor

from opdlab import exact
from opdlab.diagnose import Privilege, illusion
from opdlab.notebook.cases import random_log_probs
from opdlab.notebook.checking import Exercise


def split(
    teacher: Tensor, teacher_told: Tensor, student: Tensor, student_told: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    told, bare = teacher_told - student_told, teacher - student
    capability = (told + bare) / 2
    return capability, teacher_told - student - capability, told - bare


def library(*logp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = exact.privilege.split(dict(zip(exact.privilege.POLICIES, logp, strict=True)))
    return found.capability, found.information, found.interaction


def one_path(
    teacher: Tensor, teacher_told: Tensor, student: Tensor, student_told: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        teacher_told - student_told,
        student_told - student,
        (teacher_told - student_told) - (teacher - student),
    )


def graded() -> list[tuple[Tensor, ...]]:
    return [
        tuple(law[:, 0] for seed in seeds for law in random_log_probs(6, seed=seed))
        for seeds in ((0, 1), (2, 3))
    ]


def floor(logp: Tensor) -> Tensor:
    mean = logp.exp().mean(0).log()
    return (logp.exp() * (logp - mean)).sum(-1).mean()


def geometric(logp: Tensor) -> Tensor:
    mean = logp.mean(0).log_softmax(-1)
    return (logp.exp() * (logp - mean)).sum(-1).mean()


def backwards(logp: Tensor) -> Tensor:
    mean = logp.exp().mean(0).log()
    return (mean.exp() * (mean - logp)).sum(-1).mean()


def index(train_before: float, train_after: float, held_before: float, held_after: float) -> float:
    fall = train_before - train_after
    return 1 - (held_before - held_after) / fall if fall > 0.01 else math.nan


def measured(kl: float) -> Privilege:
    """A measurement of one token of which only the KL matters."""
    zero = (
        "gap",
        "capability",
        "information",
        "interaction",
        "reverse_kl",
        "floor",
        "entropy",
        "teacher_weight",
        "route",
    )
    return Privilege(
        pd.DataFrame({"type": ["secret"], "forward_kl": [kl], **dict.fromkeys(zero, 0.0)}),
        pd.DataFrame(),
        0.0,
    )


def published(*kls: float) -> float:
    before, after, held_before, held_after = map(measured, kls)
    return illusion([before, after], [held_before, held_after]).index


EXERCISES = (
    Exercise(
        "40.1",
        asks="return capability, information and interaction, [n] each",
        says="both telescopes, shared as Shapley does",
        truth=library,
        solution=split,
        cases=graded,
        mistakes={
            "that is the first telescope alone. Take the mean of both capabilities; the rest of the gap is information.": (
                one_path
            ),
            "the interaction is the other way round: capability when told, minus capability when not.": lambda *logp: (
                *split(*logp)[:2],
                -split(*logp)[2],
            ),
            "capability and information are swapped.": lambda *logp: (
                split(*logp)[1],
                split(*logp)[0],
                split(*logp)[2],
            ),
        },
    ),
    Exercise(
        "40.2",
        asks="return I(Y; P) of the hinted teachers, one number in nats",
        says="no student without the hint goes below",
        truth=exact.privilege.information,
        solution=floor,
        cases=lambda: [
            (random_log_probs(4, seed=0)[0],),
            (random_log_probs(8, 3, seed=1, scale=3.0)[1],),
        ],
        mistakes={
            "the mean is one of log-probs, which is the floor's place for the reverse KL. Average probabilities.": (
                geometric
            ),
            "the KL runs from the mean to each teacher; the student imitates each teacher, so it runs the other way.": (
                backwards
            ),
            "that is summed over the hints. Hints are equally likely: take the mean.": (
                lambda logp: len(logp) * floor(logp)
            ),
        },
    ),
    Exercise(
        "40.3",
        asks="return 1 - held-out fall / training fall, or nan",
        says="the same as opdlab.diagnose.illusion",
        truth=published,
        solution=index,
        cases=lambda: [
            (2.0, 1.0, 2.0, 1.5),
            (2.0, 0.5, 2.0, 3.0),
            (1.0, 0.2, 1.0, 0.2),
            (1.0, 0.995, 1.0, 1.2),
            (1.0, 1.5, 1.0, 1.0),
        ],
        mistakes={
            "that is the share that transfers. The illusion is the rest: 1 minus it.": (
                lambda *kls: 1 - index(*kls)
            ),
            "there was nothing to transfer in one of the cases: where training fell by at most 0.01 nats, return nan.": lambda a, b, c, d: (
                1 - (c - d) / (a - b)
            ),
            "training and held-out are swapped.": lambda a, b, c, d: index(c, d, a, b),
        },
    ),
)
