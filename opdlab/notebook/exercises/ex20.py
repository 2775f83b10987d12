"""Notebook 20: the loss of one update of OPD, what GRPO is told instead, and an interval over
seeds.
"""

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


def loss(logits: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    student = logits.log_softmax(-1)
    kl = (student.exp() * (student - teacher)).sum(-1)
    return kl[mask].mean()


def library(logits: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return reverse_kl(logits.log_softmax(-1), teacher)[mask].mean()


def by_text(logits: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    kl = reverse_kl(logits.log_softmax(-1), teacher) * mask
    return (kl.sum(1) / mask.sum(1)).mean()


def detached(logits: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    student = logits.log_softmax(-1)
    return (student.exp().detach() * (student - teacher)).sum(-1)[mask].mean()


def learnt(
    function: Callable[..., Tensor], logits: Tensor, teacher: Tensor, mask: Tensor
) -> dict[str, Any]:
    value = function(logits, teacher, mask)
    if isinstance(value, Tensor) and not value.requires_grad:
        raise WrongAnswer(NO_GRADIENT)
    if not isinstance(value, Tensor) or not value.requires_grad:
        return {"loss": value, "gradient": None if value is None else torch.zeros_like(logits)}
    return {
        "loss": value,
        "gradient": torch.autograd.grad(value, logits)[0] if value.dim() == 0 else None,
    }


def rollouts() -> list[tuple[Tensor, Tensor, Tensor]]:
    made, out = torch.Generator().manual_seed(0), []
    for lengths in ([3, 6, 1], [5, 2, 4, 6]):
        logits, teacher = (
            torch.randn(len(lengths), 6, 5, generator=made, dtype=torch.float64) for _ in range(2)
        )
        mask = torch.arange(6) < torch.tensor(lengths)[:, None]
        out.append((logits.requires_grad_(), teacher.log_softmax(-1), mask))
    return out


def advantage(rewards: Tensor, n: int) -> Tensor:
    groups = rewards.view(-1, n)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def planned(rewards: Tensor, n: int) -> Tensor:
    batch = SimpleNamespace(rollout=SimpleNamespace(n=n, logp=rewards), rewards=rewards)
    return GRPO().plan(cast(Batch, batch))["advantage"]


def centred(rewards: Tensor, n: int) -> Tensor:
    groups = rewards.view(-1, n)
    return (groups - groups.mean(1, keepdim=True)).flatten()


def graded() -> list[tuple[Tensor, int]]:
    return [
        (torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1]), 4),
        (torch.tensor([0.5, 1, 0, 0, 0, 1.0]), 3),
    ]


def interval(values: Sequence[float]) -> tuple[float, float]:
    from scipy import stats

    n, mean = len(values), sum(values) / len(values)
    deviation = (sum((v - mean) ** 2 for v in values) / (n - 1)) ** 0.5
    return mean, float(stats.t.ppf(0.975, n - 1)) * deviation / n**0.5


def tested(values: Sequence[float]) -> tuple[float, float]:
    from scipy import stats

    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return (low + high) / 2, (high - low) / 2


def normal(values: Sequence[float]) -> tuple[float, float]:
    mean, half = interval(values)
    from scipy import stats

    return mean, half / float(stats.t.ppf(0.975, len(values) - 1)) * 1.959964


EXERCISES = (
    Exercise(
        "20.1",
        asks="return the mean reverse KL over all tokens, a number",
        says="that is the loss of one update of OPD",
        truth=library,
        solution=loss,
        cases=rollouts,
        look=learnt,
        mistakes={
            "that is a mean over texts of means over their tokens. Count all tokens alike.": (
                by_text
            ),
            "the weight is detached, so the gradients of all tokens cancel. Let the student's probabilities carry gradient.": (
                detached
            ),
            "padding is counted: take the tokens of the mask only.": (
                lambda x, q, mask: reverse_kl(x.log_softmax(-1), q).mean()
            ),
            "that is the forward KL. Weigh by the student's probabilities.": lambda x, q, mask: (
                forward_kl(x.log_softmax(-1), q)[mask].mean()
            ),
        },
    ),
    Exercise(
        "20.2",
        asks=(
            "return each text's reward less the mean of its group, over the group's standard"
            " deviation"
        ),
        says="that is all that GRPO learns from",
        truth=planned,
        solution=advantage,
        cases=graded,
        close=1e-4,
        mistakes={
            "the mean is over all texts. Compare the n texts of one prompt.": lambda r, n: (
                (r - r.mean()) / (r.std() + 1e-4)
            ),
            "it is not divided by the standard deviation of the group (that is Dr. GRPO's choice).": (
                centred
            ),
        },
    ),
    Exercise(
        "20.3",
        asks="return the mean and the half width of its 95 % interval over seeds",
        says="that is how sure a few seeds make us",
        truth=tested,
        solution=interval,
        cases=lambda: [([0.61, 0.55, 0.7],), ([0.1, 0.3, 0.2, 0.25, 0.4],)],
        mistakes={
            "1.96 is right for many seeds. For three it is Student's t, 4.30.": normal,
            "that is the spread of single runs. The mean is surer: divide by the square root of their number.": lambda v: (
                interval(v)[0],
                interval(v)[1] * math.sqrt(len(v)),
            ),
        },
    ),
)
