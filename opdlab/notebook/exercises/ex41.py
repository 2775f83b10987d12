"""Notebook 41: acceptance, repetition, and an alarm."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from opdlab.diagnose import Health, Limits
from opdlab.losses.divergences import total_variation
from opdlab.notebook.cases import random_log_probs
from opdlab.notebook.checking import Exercise


def acceptance(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.minimum(student, teacher).exp().sum(-1)


def repetition(ids: Sequence[int]) -> float:
    triples = list(zip(ids, ids[1:], ids[2:], strict=False))
    return 1 - len(set(triples)) / len(triples) if len(triples) > 1 else 0.0


def measured(ids: Sequence[int]) -> float:
    from opdlab.diagnose.health import repetition as library

    return float(library(torch.tensor([list(ids)]), torch.tensor([len(ids)])))


def pairs(ids: Sequence[int]) -> float:
    found = list(pairwise(ids))
    return 1 - len(set(found)) / len(found) if len(found) > 1 else 0.0


def twice(ids: Sequence[int]) -> float:
    """Counts the first of equal triples as well."""
    triples = list(zip(ids, ids[1:], ids[2:], strict=False))
    return sum(triples.count(t) > 1 for t in triples) / len(triples) if len(triples) > 1 else 0.0


def per_token(ids: Sequence[int]) -> float:
    return repetition(ids) * (len(ids) - 2) / max(len(ids), 1)


def rings(values: Sequence[float], window: int, share: float) -> int:
    mean = lambda part: sum(part) / len(part)
    for i in range(window, len(values) + 1):
        if mean(values[i - window : i]) < share * mean(values[:window]):
            return i
    return 0


def library(values: Sequence[float], window: int, share: float) -> int:
    """The library's: the alarm for an entropy collapse, of a run that has only its entropy."""
    watch = Health(Limits(window=window, entropy=share))
    for i, value in enumerate(values, 1):
        watch.note({"step": float(i), "entropy": value})
    return watch.alarms[0].step if watch.alarms else 0


def one_step(values: Sequence[float], window: int, share: float) -> int:
    begun = sum(values[:window]) / window
    return next((i for i, v in enumerate(values, 1) if i >= window and v < share * begun), 0)


def early(values: Sequence[float], window: int, share: float) -> int:
    return max(0, rings(values, window, share) - 1)


def from_first(values: Sequence[float], window: int, share: float) -> int:
    return next(
        (
            i
            for i in range(window, len(values) + 1)
            if sum(values[i - window : i]) / window < share * values[0]
        ),
        0,
    )


def falling() -> list[tuple[list[float], int, float]]:
    slow = [1.0, 0.8, 0.9, 0.7, 0.6, 0.5, 0.2, 0.6, 0.3, 0.2, 0.1, 0.1]
    high = [2.0, 1.0, 1.0, 0.9, 0.6, 0.55, 0.5, 0.4]
    return [
        (slow, 3, 0.5),
        (high, 3, 0.5),
        (slow, 1, 0.55),
        ([1.0, 1.0, 0.9], 2, 0.5),
        ([1.0, 0.1], 3, 0.5),
    ]


TEXTS = [
    ([1, 2, 3, 1, 2, 3, 1],),
    ([5, 5, 5, 5],),
    ([1, 2],),
    ([1, 2, 3, 4, 1, 2, 4],),
    ([1, 2, 1, 2, 1, 2, 3, 1],),
]

EXERCISES = (
    Exercise(
        "41.1",
        asks="return the acceptance of every row, [n]",
        says="one minus the total variation",
        truth=lambda s, t: 1 - total_variation(s, t),
        solution=acceptance,
        cases=lambda: [random_log_probs(seed=0), random_log_probs(8, 4, seed=1, scale=2.0)],
        mistakes={
            "that is the total variation, which is one minus the acceptance.": lambda s, t: (
                1 - acceptance(s, t)
            ),
            "the larger of the two was taken, not the smaller.": lambda s, t: (
                torch.maximum(s, t).exp().sum(-1)
            ),
            "that is the mean over the vocabulary. Sum over it.": lambda s, t: (
                acceptance(s, t) / s.shape[-1]
            ),
        },
    ),
    Exercise(
        "41.2",
        asks="return the share of triples that stood in the text before",
        says="the meter of the repetition alarm",
        truth=measured,
        solution=repetition,
        cases=lambda: TEXTS,
        mistakes={
            "those are pairs of tokens. Take three at a time.": pairs,
            "the first of equal triples is no repetition. Count only those that stood there before.": (
                twice
            ),
            "that is divided by the number of tokens. Divide by the number of triples.": per_token,
        },
    ),
    Exercise(
        "41.3",
        asks="return the step at which the alarm rings, or 0",
        says="it rings where the library's does",
        truth=library,
        solution=rings,
        cases=falling,
        mistakes={
            "one low step sets it off. Compare the mean of the last `window` values.": one_step,
            "steps are counted from 1.": early,
            "the beginning is the mean of the first `window` values, not the first value.": (
                from_first
            ),
        },
    ),
)
