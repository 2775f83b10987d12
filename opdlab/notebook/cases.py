"""What exercises are tried on: random laws in float64, rows as a loss gets them, and what a loss
trains on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opdlab.engine.rows import Rows
from opdlab.notebook.checking import WrongAnswer

NO_GRADIENT = (
    "it carries no gradient, so it trains nothing. Leave out .detach() and torch.no_grad()."
)


def random_log_probs(
    n: int = 5, vocab: int = 7, seed: int = 0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probs of a student and of a teacher, `[n, V]` each, in float64."""
    made = torch.Generator().manual_seed(seed)
    student, teacher = (
        scale * torch.randn(n, vocab, generator=made, dtype=torch.float64) for _ in range(2)
    )
    return student.log_softmax(-1), teacher.log_softmax(-1)


def random_rows(n: int = 5, vocab: int = 7, seed: int = 0, **columns: Tensor) -> Rows:
    """What a loss gets: student (with gradient) and teacher, and a token for each of `n` rows."""
    student, teacher = random_log_probs(n, vocab, seed)
    token = torch.multinomial(student.exp(), 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    return Rows({"student": student.requires_grad_(), "teacher": teacher}, token, columns)


def evaluate_loss(loss: Callable[[Rows], Any], given: Rows) -> dict[str, Any]:
    """What a loss says and does: its value `[n]` and the slope of its sum in the student's logits,
    `[n, V]`.

    Raises:
        WrongAnswer: The loss is a tensor without gradient, which no comparison tells from a
            gradient that cancels.
    """
    value = loss(given)
    if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
        raise WrongAnswer(NO_GRADIENT)
    if not isinstance(value, Tensor) or not value.requires_grad:
        return {
            "value": value,
            "gradient": None if value is None else torch.zeros_like(given.student),
        }
    (slope,) = torch.autograd.grad(value.sum(), given.student, allow_unused=True)
    slope = torch.zeros_like(given.student) if slope is None else slope
    return {
        "value": value,
        "gradient": slope - given.student.detach().exp() * slope.sum(-1, keepdim=True),
    }
