"""Notebook 40: the split of the gap, the floor of information, and the illusion index."""

from __future__ import annotations

import math

import pandas as pd
from torch import Tensor

from opdlab import exact
from opdlab.diagnose import Privilege, illusion
from opdlab.notebook.cases import random_log_probs
from opdlab.notebook.checking import Exercise

Split = tuple[Tensor, Tensor, Tensor]  # capability, information, interaction

# Columns of a measurement that the index does not read.
NOT_READ = (
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


def split(
    teacher: Tensor, hinted_teacher: Tensor, student: Tensor, hinted_student: Tensor
) -> Split:
    """Solve 40.1: capability, information and interaction.

    Args:
        teacher: Log-probs of the tokens, `[n]`.
        hinted_teacher: The same with the hint.
        student: Log-probs of the tokens, `[n]`.
        hinted_student: The same with the hint.

    Returns:
        Capability, information and interaction, `[n]` each in nats.
    """
    with_hint, without_hint = hinted_teacher - hinted_student, teacher - student
    capability = (with_hint + without_hint) / 2
    information = hinted_teacher - student - capability
    return capability, information, with_hint - without_hint


def _reference_split(*logp: Tensor) -> Split:
    found = exact.privilege.split(dict(zip(exact.privilege.POLICIES, logp, strict=True)))
    return found.capability, found.information, found.interaction


def _cases_of_split() -> list[tuple[Tensor, ...]]:
    cases = []
    for first, second in ((0, 1), (2, 3)):
        four = (*random_log_probs(6, seed=first), *random_log_probs(6, seed=second))
        cases.append(tuple(log_probs[:, 0] for log_probs in four))
    return cases


def _first_order_only(
    teacher: Tensor, hinted_teacher: Tensor, student: Tensor, hinted_student: Tensor
) -> Split:
    capability, information = hinted_teacher - hinted_student, hinted_student - student
    return capability, information, capability - (teacher - student)


def _interaction_reversed(*logp: Tensor) -> Split:
    capability, information, interaction = split(*logp)
    return capability, information, -interaction


def _parts_swapped(*logp: Tensor) -> Split:
    capability, information, interaction = split(*logp)
    return information, capability, interaction


def floor(logp: Tensor) -> Tensor:
    """Solve 40.2: the information in the hint.

    Args:
        logp: The teacher's log-probs under each hint, `[P, V]`.

    Returns:
        The mutual information of token and hint, one number in nats.
    """
    mean = logp.exp().mean(0).log()
    return (logp.exp() * (logp - mean)).sum(-1).mean()


def _cases_of_floor() -> list[tuple[Tensor]]:
    return [(random_log_probs(4, seed=0)[0],), (random_log_probs(8, 3, seed=1, scale=3.0)[1],)]


def _geometric_mean(logp: Tensor) -> Tensor:
    mean = logp.mean(0).log_softmax(-1)
    return (logp.exp() * (logp - mean)).sum(-1).mean()


def _kl_from_the_mean(logp: Tensor) -> Tensor:
    mean = logp.exp().mean(0).log()
    return (mean.exp() * (mean - logp)).sum(-1).mean()


def _summed_over_hints(logp: Tensor) -> Tensor:
    return len(logp) * floor(logp)


def index(train_before: float, train_after: float, held_before: float, held_after: float) -> float:
    """Solve 40.3: the illusion index.

    Args:
        train_before: KL on training prompts before training, in nats.
        train_after: The same after training.
        held_before: KL on held-out prompts before training.
        held_after: The same after training.

    Returns:
        The index; NaN if the fall in training is not above 0.01.
    """
    fall = train_before - train_after
    return 1 - (held_before - held_after) / fall if fall > 0.01 else math.nan


def _reference_index(
    train_before: float, train_after: float, held_before: float, held_after: float
) -> float:
    training = [_measurement(train_before), _measurement(train_after)]
    return illusion(training, [_measurement(held_before), _measurement(held_after)]).index


def _measurement(kl: float) -> Privilege:
    """A measurement of one token, of which only the KL matters here."""
    token = {"type": ["secret"], "forward_kl": [kl], **dict.fromkeys(NOT_READ, 0.0)}
    return Privilege(pd.DataFrame(token), pd.DataFrame(), 0.0)


def _cases_of_index() -> list[tuple[float, float, float, float]]:
    return [
        (2.0, 1.0, 2.0, 1.5),
        (2.0, 0.5, 2.0, 3.0),
        (1.0, 0.2, 1.0, 0.2),
        (1.0, 0.995, 1.0, 1.2),
        (1.0, 1.5, 1.0, 1.0),
    ]


def _share_that_transfers(*kls: float) -> float:
    return 1 - index(*kls)


def _never_nan(
    train_before: float, train_after: float, held_before: float, held_after: float
) -> float:
    return 1 - (held_before - held_after) / (train_before - train_after)


def _prompts_swapped(
    train_before: float, train_after: float, held_before: float, held_after: float
) -> float:
    return index(held_before, held_after, train_before, train_after)


EXERCISES = (
    Exercise(
        "40.1",
        request="return capability, information and interaction, [n] each",
        confirmation="the mean of both splits, which is the Shapley value",
        reference=_reference_split,
        solution=split,
        cases=_cases_of_split,
        mistakes={
            (
                "that is the first split alone. Take the mean of both capabilities; the rest of the"
                " gap is information."
            ): _first_order_only,
            (
                "the interaction is the other way round: capability with the hint minus capability "
                "without it."
            ): _interaction_reversed,
            "capability and information are swapped.": _parts_swapped,
        },
    ),
    Exercise(
        "40.2",
        request="return I(Y; P) of the hinted teachers, one number in nats",
        confirmation="no student without the hint gets below it",
        reference=exact.privilege.information,
        solution=floor,
        cases=_cases_of_floor,
        mistakes={
            (
                "the mean is one of log-probs, which is the best student for the reverse KL. "
                "Average probabilities."
            ): _geometric_mean,
            (
                "the KL runs from the mean to each teacher; the student imitates each teacher, so "
                "it runs the other way."
            ): _kl_from_the_mean,
            (
                "that is summed over the hints. Hints are equally likely: take the mean."
            ): _summed_over_hints,
        },
    ),
    Exercise(
        "40.3",
        request="return 1 - held-out fall / training fall, or nan",
        confirmation="the same as opdlab.diagnose.illusion",
        reference=_reference_index,
        solution=index,
        cases=_cases_of_index,
        mistakes={
            (
                "that is the share that transfers. The illusion is the rest: 1 minus it."
            ): _share_that_transfers,
            (
                "in one of the cases there was nothing to transfer: where training fell by at most "
                "0.01 nats, return nan."
            ): _never_nan,
            "training and held-out are swapped.": _prompts_swapped,
        },
    ),
)
