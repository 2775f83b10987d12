"""Notebook 20: the loss of one update of OPD, the signal of GRPO, and an interval over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from opdlab.engine.batch import Batch
from opdlab.losses.divergences import forward_kl, reverse_kl
from opdlab.methods.grpo import GRPO
from opdlab.notebook.cases import NO_GRADIENT
from opdlab.notebook.checking import Exercise, WrongAnswer

NORMAL_QUANTILE = 1.959964  # of 0.975


def loss(logits: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Solve 20.1: the mean reverse KL over all tokens.

    Args:
        logits: The student's logits, `[B, T, V]`.
        teacher: Log-probs, `[B, T, V]`.
        mask: True for tokens and false for padding, `[B, T]`.

    Returns:
        The mean, one number in nats per token.
    """
    student = logits.log_softmax(-1)
    kl = (student.exp() * (student - teacher)).sum(-1)
    return kl[mask].mean()


def _reference_loss(logits: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return reverse_kl(logits.log_softmax(-1), teacher)[mask].mean()


def _cases_of_loss() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator, cases = torch.Generator().manual_seed(0), []
    for lengths in ([3, 6, 1], [5, 2, 4, 6]):
        shape = len(lengths), 6, 5
        logits = torch.randn(shape, generator=generator, dtype=torch.float64)
        teacher = torch.randn(shape, generator=generator, dtype=torch.float64)
        mask = torch.arange(6) < torch.tensor(lengths)[:, None]
        cases.append((logits.requires_grad_(), teacher.log_softmax(-1), mask))
    return cases


def _observe_loss(
    function: Callable[..., Tensor], logits: Tensor, teacher: Tensor, mask: Tensor
) -> dict[str, Any]:
    """The loss and its gradient in the logits."""
    value = function(logits, teacher, mask)
    if value is None:
        return {"loss": None, "gradient": None}
    if isinstance(value, Tensor) and not value.requires_grad:
        raise WrongAnswer(NO_GRADIENT)
    if not isinstance(value, Tensor):
        return {"loss": value, "gradient": torch.zeros_like(logits)}
    is_number = value.dim() == 0
    return {
        "loss": value,
        "gradient": torch.autograd.grad(value, logits)[0] if is_number else None,
    }


def _mean_of_texts(logits: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    kl = reverse_kl(logits.log_softmax(-1), teacher) * mask
    return (kl.sum(1) / mask.sum(1)).mean()


def _with_detached_weight(logits: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    student = logits.log_softmax(-1)
    return (student.exp().detach() * (student - teacher)).sum(-1)[mask].mean()


def _padding_counted(logits: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return reverse_kl(logits.log_softmax(-1), teacher).mean()


def _forward_loss(logits: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return forward_kl(logits.log_softmax(-1), teacher)[mask].mean()


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
        request="return the mean reverse KL over all tokens, a number",
        confirmation="that is the loss of one update of OPD",
        reference=_reference_loss,
        solution=loss,
        cases=_cases_of_loss,
        observe=_observe_loss,
        mistakes={
            (
                "that is a mean over texts of means over their tokens. Count all tokens alike."
            ): _mean_of_texts,
            (
                "the weight is detached, so the gradients of all tokens cancel. Let the student's "
                "probabilities carry gradient."
            ): _with_detached_weight,
            "padding is counted: take the tokens of the mask only.": _padding_counted,
            ("that is the forward KL. Use the student's probabilities as weights."): _forward_loss,
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
