"""Notebook 51: the pull of two divergences, the memory of a LoRA, the largest micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opdlab.losses.divergences import forward_kl, reverse_kl
from opdlab.notebook.cases import random_log_probs
from opdlab.notebook.checking import Exercise

GIB = 2.0**30
Shapes = Sequence[tuple[int, int]]  # inputs and outputs of linear layers


def training_bytes(shapes: Shapes, rank: int) -> int:
    """Solve 51.2: the bytes of an adapter in training.

    Args:
        shapes: Inputs and outputs of each adapted layer.
        rank: The adapter's rank.

    Returns:
        Bytes of weights, gradient and two moments, in float32.
    """
    numbers = sum(rank * (inputs + outputs) for inputs, outputs in shapes)
    return numbers * 4 * (1 + 1 + 2)


def _reference_bytes(shapes: Shapes, rank: int) -> int:
    """Each of A and B, with its gradient and its two moments, in float32."""
    return sum(4 * 4 * (inputs * rank + rank * outputs) for inputs, outputs in shapes)


def _cases_of_bytes() -> list[tuple[Shapes, int]]:
    return [
        ([(576, 576), (576, 192), (1536, 576)], 16),
        ([(1024, 3072)] * 28, 8),
        ([(64, 256)], 1),
    ]


def _whole_matrices(shapes: Shapes, rank: int) -> int:
    return 16 * sum(inputs * outputs for inputs, outputs in shapes)


def _weights_alone(shapes: Shapes, rank: int) -> int:
    return training_bytes(shapes, rank) // 4


def _without_moments(shapes: Shapes, rank: int) -> int:
    return training_bytes(shapes, rank) // 2


def micro_batch(fixed: float, each: float, free: float, rows: int) -> int:
    """Solve 51.3: the largest number of completions in one backward pass.

    Args:
        fixed: Bytes that are used whatever the size.
        each: Bytes per completion.
        free: Bytes that are free.
        rows: Completions of the whole batch.

    Returns:
        A number from 0 to `rows`.
    """
    room = free - fixed
    return max(0, min(rows, int(room // each)))


def _reference_micro_batch(fixed: float, each: float, free: float, rows: int) -> int:
    return max([n for n in range(1, rows + 1) if fixed + n * each <= free], default=0)


def _cases_of_micro_batch() -> list[tuple[float, float, float, int]]:
    return [
        (10 * GIB, 0.5 * GIB, 24 * GIB, 64),
        (1.0, 2.0, 9.0, 8),
        (1.0, 2.0, 100.0, 8),
        (5.0, 1.0, 4.0, 8),
        (5.0, 2.0, 6.0, 8),
    ]


def _fixed_forgotten(fixed: float, each: float, free: float, rows: int) -> int:
    return micro_batch(0, each, free, rows)


def _more_than_the_rows(fixed: float, each: float, free: float, rows: int) -> int:
    return micro_batch(fixed, each, free, 10**9)


def _negative(fixed: float, each: float, free: float, rows: int) -> int:
    return min(rows, int((free - fixed) // each))


def pulls(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Solve 51.1: how two divergences move the student's logits.

    Args:
        student: Log-probs at one token, `[V]`.
        teacher: Likewise.

    Returns:
        Minus the gradient in the student's logits: of the forward KL, and of the reverse KL.
    """
    p, q = student.exp(), teacher.exp()
    gap = teacher - student
    return q - p, p * (gap - (p * gap).sum())


def _reference_pulls(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The library's divergences, by autograd."""
    pulled = []
    for divergence in (forward_kl, reverse_kl):
        logits = student.clone().requires_grad_()
        value = divergence(logits.log_softmax(-1), teacher)
        pulled.append(-torch.autograd.grad(value, logits)[0])
    return pulled[0], pulled[1]


def _cases_of_pulls() -> list[tuple[Tensor, Tensor]]:
    random = zip(*random_log_probs(n=3), strict=True)
    never_said = torch.tensor([1e-6, 1 - 1e-6], dtype=torch.float64).log()
    return [*random, (never_said, torch.tensor([0.95, 0.05], dtype=torch.float64).log())]


def _pulls_uphill(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    forward, reverse = pulls(student, teacher)
    return -forward, -reverse


def _pulls_swapped(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    forward, reverse = pulls(student, teacher)
    return reverse, forward


def _without_the_mean(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    p, q = student.exp(), teacher.exp()
    return q - p, p * (teacher - student)


EXERCISES = (
    Exercise(
        "51.1",
        request=(
            "return minus the gradient in the student's logits, of the forward KL and of the "
            "reverse KL"
        ),
        confirmation="only the reverse one carries the factor p",
        reference=_reference_pulls,
        solution=pulls,
        cases=_cases_of_pulls,
        mistakes={
            "these are the gradients; a step goes against them.": _pulls_uphill,
            "the two are swapped: the forward KL comes first.": _pulls_swapped,
            (
                "the softmax takes a mean off: subtract the mean of the gap under the student."
            ): _without_the_mean,
        },
    ),
    Exercise(
        "51.2",
        request=(
            "return the bytes of an adapter of this rank in training: weights, gradient and two "
            "moments, in float32"
        ),
        confirmation="training keeps no more than that beside the model",
        reference=_reference_bytes,
        solution=training_bytes,
        cases=_cases_of_bytes,
        mistakes={
            (
                "that is the whole matrix. An adapter is A, inputs × rank, and B, rank × outputs."
            ): _whole_matrices,
            (
                "that is the weights alone; each also has a gradient and two moments of AdamW."
            ): _weights_alone,
            "the two moments of AdamW are missing.": _without_moments,
        },
    ),
    Exercise(
        "51.3",
        request="return the most completions, up to rows, whose backward pass fits, or 0",
        confirmation="it does not change the result of a step",
        reference=_reference_micro_batch,
        solution=micro_batch,
        cases=_cases_of_micro_batch,
        mistakes={
            "subtract the memory that is always used first.": _fixed_forgotten,
            "a batch has no more than `rows` completions.": _more_than_the_rows,
            "a micro-batch cannot be negative: where nothing fits, return 0.": _negative,
        },
    ),
)
