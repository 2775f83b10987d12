"""Notebook 20: the costs of a run, the signal of GRPO, and an interval over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

from opdlab.engine.batch import Batch
from opdlab.methods.grpo import GRPO
from opdlab.notebook.checking import Exercise

NORMAL_QUANTILE = 1.959964  # of 0.975


def costs(method: str, texts: int, length: int, updates: int) -> tuple[int, int, int]:
    """Solve 20.1: the costs of a run.

    Args:
        method: "SFT", "sequence KD", "OPD" or "GRPO".
        texts: Texts of an update.
        length: Tokens of a text.
        updates: Updates of the run.

    Returns:
        Tokens that the student writes, tokens that the teacher writes, and passes of the teacher
        one after the other.
    """
    tokens = texts * length * updates
    student = tokens if method in ("OPD", "GRPO") else 0
    teacher = tokens if method == "sequence KD" else 0
    passes = {"OPD": updates, "sequence KD": length * updates}.get(method, 0)
    return student, teacher, passes


# Who writes, and who reads what the other wrote.
_ROLES = {
    "SFT": ("nobody", "nobody"),
    "sequence KD": ("teacher", "nobody"),
    "OPD": ("student", "teacher"),
    "GRPO": ("student", "nobody"),
}


def _reference_costs(method: str, texts: int, length: int, updates: int) -> tuple[int, int, int]:
    """Count the run token by token."""
    writer, reader = _ROLES[method]
    wrote, passes = {"student": 0, "teacher": 0, "nobody": 0}, 0
    for _ in range(updates):
        for _ in range(length):
            wrote[writer] += texts
            passes += writer == "teacher"
        passes += reader == "teacher"
    return wrote["student"], wrote["teacher"], passes


def _cases_of_costs() -> list[tuple[str, int, int, int]]:
    sizes = {"SFT": (4, 22, 3), "sequence KD": (8, 5, 7), "OPD": (6, 11, 4), "GRPO": (3, 7, 5)}
    return [(method, *size) for method, size in sizes.items()]


def _written_in_one_pass(
    method: str, texts: int, length: int, updates: int
) -> tuple[int, int, int]:
    student, teacher, passes = costs(method, texts, length, updates)
    return student, teacher, updates if method == "sequence KD" else passes


def _read_token_by_token(
    method: str, texts: int, length: int, updates: int
) -> tuple[int, int, int]:
    student, teacher, passes = costs(method, texts, length, updates)
    return student, teacher, length * updates if method == "OPD" else passes


def _one_text_after_the_other(
    method: str, texts: int, length: int, updates: int
) -> tuple[int, int, int]:
    student, teacher, passes = costs(method, texts, length, updates)
    return student, teacher, passes * texts


def _reading_counted_as_writing(
    method: str, texts: int, length: int, updates: int
) -> tuple[int, int, int]:
    student, teacher, passes = costs(method, texts, length, updates)
    return student, student if method == "OPD" else teacher, passes


def advantage(rewards: Tensor, n: int) -> Tensor:
    """Solve 20.2: the advantage of every text within its group.

    Args:
        rewards: One reward per text, `[B]`, those of a group next to each other.
        n: Texts per group.

    Returns:
        The advantage, `[B]`.
    """
    groups = rewards.view(-1, n)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def _reference_advantage(rewards: Tensor, n: int) -> Tensor:
    # GRPO's plan reads no more of a batch than this.
    batch = SimpleNamespace(rollout=SimpleNamespace(n=n, logp=rewards), rewards=rewards)
    advantage: Tensor = GRPO().plan(cast(Batch, batch))["advantage"].values
    return advantage


def _cases_of_advantage() -> list[tuple[Tensor, int]]:
    return [
        (torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1]), 4),
        (torch.tensor([0.5, 1, 0, 0, 0, 1.0]), 3),
    ]


def _over_all_texts(rewards: Tensor, n: int) -> Tensor:
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def _not_divided_by_deviation(rewards: Tensor, n: int) -> Tensor:
    groups = rewards.view(-1, n)
    return (groups - groups.mean(1, keepdim=True)).flatten()


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Solve 20.3: the mean and the half width of its 95 % interval.

    Args:
        values: One value per seed, two or more.

    Returns:
        The mean and the half width, by Student's t.
    """
    from scipy import stats

    n, mean = len(values), sum(values) / len(values)
    deviation = (sum((v - mean) ** 2 for v in values) / (n - 1)) ** 0.5
    return mean, float(stats.t.ppf(0.975, n - 1)) * deviation / n**0.5


def _reference_interval(values: Sequence[float]) -> tuple[float, float]:
    from scipy import stats

    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return (low + high) / 2, (high - low) / 2


def _cases_of_interval() -> list[tuple[list[float]]]:
    return [([0.61, 0.55, 0.7],), ([0.1, 0.3, 0.2, 0.25, 0.4],)]


def _normal_interval(values: Sequence[float]) -> tuple[float, float]:
    from scipy import stats

    mean, half = interval(values)
    return mean, half / float(stats.t.ppf(0.975, len(values) - 1)) * NORMAL_QUANTILE


def _interval_of_single_runs(values: Sequence[float]) -> tuple[float, float]:
    mean, half = interval(values)
    return mean, half * math.sqrt(len(values))


EXERCISES = (
    Exercise(
        "20.1",
        request="return the tokens of the student, those of the teacher, and the teacher's passes",
        confirmation="that is what each of the six methods costs",
        reference=_reference_costs,
        solution=costs,
        cases=_cases_of_costs,
        mistakes={
            (
                "writing takes one pass for each token of a text, since each token needs the one "
                "before it."
            ): _written_in_one_pass,
            "reading takes one pass for all tokens of the texts.": _read_token_by_token,
            (
                "the texts of an update go through the teacher together. Do not multiply its "
                "passes by their number."
            ): _one_text_after_the_other,
            (
                "OPD's teacher reads the student's tokens, and writes none."
            ): _reading_counted_as_writing,
        },
    ),
    Exercise(
        "20.2",
        request=(
            "return each text's reward minus the mean of its group, over the group's standard "
            "deviation"
        ),
        confirmation="GRPO learns from these numbers alone",
        reference=_reference_advantage,
        solution=advantage,
        cases=_cases_of_advantage,
        tolerance=1e-4,
        mistakes={
            "the mean is over all texts. Compare the n texts of one prompt.": _over_all_texts,
            (
                "it is not divided by the standard deviation of the group (as Dr. GRPO does it)."
            ): _not_divided_by_deviation,
        },
    ),
    Exercise(
        "20.3",
        request="return the mean and the half width of its 95 % interval over seeds",
        confirmation="that is how sure a few seeds make us",
        reference=_reference_interval,
        solution=interval,
        cases=_cases_of_interval,
        mistakes={
            "1.96 is right for many seeds. For three it is Student's t, 4.30.": _normal_interval,
            (
                "that is the spread of single runs. The mean is more certain: divide by the square "
                "root of their number."
            ): _interval_of_single_runs,
        },
    ),
)
