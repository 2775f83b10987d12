"""Notebook 41: acceptance, repetition, and an alarm."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from opdlab.diagnose import Health, Limits
from opdlab.diagnose.vitals import repetition as library_repetition
from opdlab.losses.divergences import total_variation
from opdlab.notebook.cases import random_log_probs
from opdlab.notebook.checking import Exercise


def acceptance(student: Tensor, teacher: Tensor) -> Tensor:
    """Solve 41.1: the probability that the teacher accepts the student's token.

    Args:
        student: Log-probs, `[n, V]`.
        teacher: Log-probs, `[n, V]`.

    Returns:
        The probability, `[n]`.
    """
    return torch.minimum(student, teacher).exp().sum(-1)


def _reference_acceptance(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 - total_variation(student, teacher)


def _cases_of_acceptance() -> list[tuple[Tensor, Tensor]]:
    return [random_log_probs(seed=0), random_log_probs(8, 4, seed=1, scale=2.0)]


def _total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 - acceptance(student, teacher)


def _larger_of_both(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.maximum(student, teacher).exp().sum(-1)


def _mean_over_vocabulary(student: Tensor, teacher: Tensor) -> Tensor:
    return acceptance(student, teacher) / student.shape[-1]


def repetition(ids: Sequence[int]) -> float:
    """Solve 41.2: the share of triples that occurred before.

    Args:
        ids: The tokens of a text.

    Returns:
        The share, from 0 to 1; 0 for fewer than four tokens.
    """
    triples = list(zip(ids, ids[1:], ids[2:], strict=False))
    return 1 - len(set(triples)) / len(triples) if len(triples) > 1 else 0.0


def _reference_repetition(ids: Sequence[int]) -> float:
    return float(library_repetition(torch.tensor([list(ids)]), torch.tensor([len(ids)])))


def _cases_of_repetition() -> list[tuple[list[int]]]:
    return [
        ([1, 2, 3, 1, 2, 3, 1],),
        ([5, 5, 5, 5],),
        ([1, 2],),
        ([1, 2, 3, 4, 1, 2, 4],),
        ([1, 2, 1, 2, 1, 2, 3, 1],),
    ]


def _pairs_of_tokens(ids: Sequence[int]) -> float:
    pairs = list(pairwise(ids))
    return 1 - len(set(pairs)) / len(pairs) if len(pairs) > 1 else 0.0


def _first_of_each_counted(ids: Sequence[int]) -> float:
    triples = list(zip(ids, ids[1:], ids[2:], strict=False))
    if len(triples) < 2:
        return 0.0
    return sum(triples.count(triple) > 1 for triple in triples) / len(triples)


def _divided_by_tokens(ids: Sequence[int]) -> float:
    return repetition(ids) * (len(ids) - 2) / max(len(ids), 1)


def rings(values: Sequence[float], window: int, share: float) -> int:
    """Solve 41.3: the step at which the alarm rings, or 0.

    Args:
        values: A metric at each step.
        window: Steps to average over.
        share: The alarm rings below this share of the first mean.

    Returns:
        The step, from 1; 0 if the alarm never rings.
    """

    def mean(part: Sequence[float]) -> float:
        return sum(part) / len(part)

    for i in range(window, len(values) + 1):
        if mean(values[i - window : i]) < share * mean(values[:window]):
            return i
    return 0


def _reference_rings(values: Sequence[float], window: int, share: float) -> int:
    """The alarm for an entropy collapse, of a run of which only the entropy is known."""
    watch = Health(Limits(window=window, entropy=share))
    for step, value in enumerate(values, 1):
        watch.note({"step": float(step), "entropy": value})
    return watch.alarms[0].step if watch.alarms else 0


def _cases_of_rings() -> list[tuple[list[float], int, float]]:
    slow = [1.0, 0.8, 0.9, 0.7, 0.6, 0.5, 0.2, 0.6, 0.3, 0.2, 0.1, 0.1]
    high_at_first = [2.0, 1.0, 1.0, 0.9, 0.6, 0.55, 0.5, 0.4]
    return [
        (slow, 3, 0.5),
        (high_at_first, 3, 0.5),
        (slow, 1, 0.55),
        ([1.0, 1.0, 0.9], 2, 0.5),
        ([1.0, 0.1], 3, 0.5),
    ]


def _single_low_step(values: Sequence[float], window: int, share: float) -> int:
    limit = share * sum(values[:window]) / window
    steps = range(window, len(values) + 1)
    return next((i for i in steps if values[i - 1] < limit), 0)


def _counted_from_zero(values: Sequence[float], window: int, share: float) -> int:
    return max(0, rings(values, window, share) - 1)


def _against_first_value(values: Sequence[float], window: int, share: float) -> int:
    limit = share * values[0]
    steps = range(window, len(values) + 1)
    return next((i for i in steps if sum(values[i - window : i]) / window < limit), 0)


EXERCISES = (
    Exercise(
        "41.1",
        request="return the acceptance of every row, [n]",
        confirmation="that is one minus the total variation",
        reference=_reference_acceptance,
        solution=acceptance,
        cases=_cases_of_acceptance,
        mistakes={
            "that is the total variation, which is one minus the acceptance.": _total_variation,
            "the larger of the two was taken, not the smaller.": _larger_of_both,
            "that is the mean over the vocabulary. Sum over it.": _mean_over_vocabulary,
        },
    ),
    Exercise(
        "41.2",
        request="return the share of triples that occurred earlier in the text",
        confirmation="that is the measure of the repetition alarm",
        reference=_reference_repetition,
        solution=repetition,
        cases=_cases_of_repetition,
        mistakes={
            "those are pairs of tokens. Take three at a time.": _pairs_of_tokens,
            (
                "the first of equal triples is no repetition. Count only those that occurred "
                "before."
            ): _first_of_each_counted,
            (
                "that is divided by the number of tokens. Divide by the number of triples."
            ): _divided_by_tokens,
        },
    ),
    Exercise(
        "41.3",
        request="return the step at which the alarm rings, or 0",
        confirmation="it rings at the same steps as the library's",
        reference=_reference_rings,
        solution=rings,
        cases=_cases_of_rings,
        mistakes={
            (
                "one low step sets it off. Compare the mean of the last `window` values."
            ): _single_low_step,
            "steps are counted from 1.": _counted_from_zero,
            (
                "the beginning is the mean of the first `window` values, not the first value."
            ): _against_first_value,
        },
    ),
)
