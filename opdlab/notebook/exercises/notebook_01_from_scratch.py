"""Notebook 01: which rows predict a text, and the loss of a large vocabulary in chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opdlab.losses.divergences import reverse_kl
from opdlab.notebook.checking import Exercise


def predictions(logits: Tensor, start: int) -> Tensor:
    """Solve 01.1: the log-probs that the tokens from `start` on are drawn from.

    Args:
        logits: Logits at every position of prompt and text, `[B, S, V]`.
        start: The position of the first token of the text.

    Returns:
        Log-probs, `[B, S - start, V]`.
    """
    return logits[:, start - 1 : -1].log_softmax(-1)


def gradient_in_chunks(hidden: Tensor, head: Tensor, teacher: Tensor, chunk: int) -> Tensor:
    """Solve 01.2: the gradient of the mean reverse KL in the hidden states, chunk by chunk.

    Args:
        hidden: Hidden states, `[n, H]`.
        head: The weights of the output head, `[V, H]`.
        teacher: Log-probs of the teacher, `[n, V]`.
        chunk: The most tokens whose logits may exist at once.

    Returns:
        The gradient, `[n, H]`.
    """
    parts = []
    for i in range(0, len(hidden), chunk):
        piece = hidden[i : i + chunk].detach().requires_grad_()
        student = (piece @ head.T).log_softmax(-1)
        kl = (student.exp() * (student - teacher[i : i + chunk])).sum(-1)
        parts.append(torch.autograd.grad(kl.sum() / len(hidden), piece)[0])
    return torch.cat(parts)


def _reference_predictions(logits: Tensor, start: int) -> Tensor:
    return torch.log_softmax(logits, -1)[:, start - 1 : logits.shape[1] - 1]


def _reference_gradient(hidden: Tensor, head: Tensor, teacher: Tensor, chunk: int) -> Tensor:
    leaf = hidden.detach().requires_grad_()
    loss = reverse_kl((leaf @ head.T).log_softmax(-1), teacher).mean()
    return torch.autograd.grad(loss, leaf)[0]


def _cases_of_predictions() -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(2, 7, 5, generator=generator, dtype=torch.float64), 3),
        (torch.randn(1, 4, 6, generator=generator, dtype=torch.float64), 1),
    ]


def _cases_of_gradient() -> list[tuple[Any, ...]]:
    generator, cases = torch.Generator().manual_seed(1), []
    for n, chunk in ((7, 3), (6, 2), (5, 8)):
        hidden = torch.randn(n, 4, generator=generator, dtype=torch.float64)
        head = torch.randn(9, 4, generator=generator, dtype=torch.float64)
        teacher = torch.randn(n, 9, generator=generator, dtype=torch.float64).log_softmax(-1)
        cases.append((hidden, head, teacher, chunk))
    return cases


def _mean_of_each_chunk(hidden: Tensor, head: Tensor, teacher: Tensor, chunk: int) -> Tensor:
    starts = range(0, len(hidden), chunk)
    parts = [slice(i, i + chunk) for i in starts]
    return torch.cat(
        [_reference_gradient(hidden[part], head, teacher[part], chunk) for part in parts]
    )


def _sum_over_tokens(hidden: Tensor, head: Tensor, teacher: Tensor, chunk: int) -> Tensor:
    return _reference_gradient(hidden, head, teacher, chunk) * len(hidden)


EXERCISES = (
    Exercise(
        "01.1",
        request="return the log-probs that the tokens from `start` on are drawn from",
        confirmation="each token with the row before it",
        reference=_reference_predictions,
        solution=predictions,
        cases=_cases_of_predictions,
        mistakes={
            "these are the rows *at* the tokens. The row before a token predicts it: begin at "
            "start - 1 and leave out the last row.": (
                lambda logits, start: logits[:, start:].log_softmax(-1)
            ),
            "these are logits. Normalise them: .log_softmax(-1).": (
                lambda logits, start: logits[:, start - 1 : -1]
            ),
            "these are probabilities. Return their logs: .log_softmax(-1).": (
                lambda logits, start: logits[:, start - 1 : -1].softmax(-1)
            ),
            "the last row predicts a token that was never written. Leave it out.": (
                lambda logits, start: logits[:, start - 1 :].log_softmax(-1)
            ),
        },
    ),
    Exercise(
        "01.2",
        request="return the gradient of the mean reverse KL in the hidden states, [n, H]",
        confirmation="the gradient of the whole, without the logits of the whole",
        reference=_reference_gradient,
        solution=gradient_in_chunks,
        cases=_cases_of_gradient,
        mistakes={
            "every chunk is divided by its own number of tokens. Divide by the number of all "
            "tokens, or the last, shorter chunk weighs more.": _mean_of_each_chunk,
            "that is the gradient of the sum. Divide by the number of all tokens.": (
                _sum_over_tokens
            ),
        },
    ),
)
