"""Cases that exercises are tried on: random log-probs, rows of a loss, the gradient of a loss."""

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
    """Draw log-probs of a student and of a teacher.

    Args:
        n: The number of rows.
        vocab: The number of tokens, `V`.
        seed: The seed of the draw.
        scale: The standard deviation of the logits; a larger one gives more confident rows.

    Returns:
        Student and teacher, `[n, V]` each, in float64.
    """
    generator = torch.Generator().manual_seed(seed)
    student = scale * torch.randn(n, vocab, generator=generator, dtype=torch.float64)
    teacher = scale * torch.randn(n, vocab, generator=generator, dtype=torch.float64)
    return student.log_softmax(-1), teacher.log_softmax(-1)


def random_rows(n: int = 5, vocab: int = 7, seed: int = 0, **columns: Tensor) -> Rows:
    """Draw rows as a loss gets them.

    Args:
        n: The number of rows.
        vocab: The number of tokens, `V`.
        seed: The seed of the draw.
        columns: Columns of a plan, `[n, ...]` each.

    Returns:
        Log-probs of student (with gradient) and teacher, and for each row a token that the student
        sampled.
    """
    student, teacher = random_log_probs(n, vocab, seed)
    generator = torch.Generator().manual_seed(seed)
    token = torch.multinomial(student.exp(), 1, generator=generator)[:, 0]
    return Rows({"student": student.requires_grad_(), "teacher": teacher}, token, columns)


def evaluate_loss(loss: Callable[[Rows], Any], rows: Rows) -> dict[str, Any]:
    """Compute what two losses must share to train the same: value and gradient.

    Args:
        loss: A function of rows, as a reader wrote it, so its result may be anything.
        rows: Rows whose student carries a gradient.

    Returns:
        `value`, the result of the loss (`[n]` if it is right), and `gradient`, the gradient of its
        sum in the student's logits, `[n, V]`; None for a loss that returns None.

    Raises:
        WrongAnswer: The result is a tensor without gradient. A comparison could not tell this from
            a gradient that cancels.
    """
    value = loss(rows)
    if value is None:
        return {"value": None, "gradient": None}
    if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
        raise WrongAnswer(NO_GRADIENT)
    if not isinstance(value, Tensor) or not value.requires_grad:
        return {"value": value, "gradient": torch.zeros_like(rows.student)}
    (slope,) = torch.autograd.grad(value.sum(), rows.student, allow_unused=True)
    slope = torch.zeros_like(rows.student) if slope is None else slope
    # From log-probs to logits: the log-softmax takes the mean slope under the student off.
    in_logits = slope - rows.student.detach().exp() * slope.sum(-1, keepdim=True)
    return {"value": value, "gradient": in_logits}
