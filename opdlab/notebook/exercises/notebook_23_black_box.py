"""Notebook 23: where to ask a teacher that only writes, the weight of its answers, and the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from opdlab.engine.rows import Rows
from opdlab.losses.divergences import forward_kl, reverse_kl
from opdlab.methods import OmniOPD
from opdlab.methods.omniopd import posterior, select_chunks
from opdlab.methods.similarity import edit, rouge1
from opdlab.notebook.cases import evaluate_loss, random_log_probs
from opdlab.notebook.checking import Exercise

Similarity = Callable[[str, str], float]


def select(entropy: Tensor, length: int, limit: int) -> list[int]:
    """Solve 23.1: the starts of the chunks.

    Args:
        entropy: The student's entropy at each position, `[T]` in nats.
        length: Tokens per chunk.
        limit: Most chunks.

    Returns:
        Positions from 0, ascending; the chunks neither overlap nor pass the end.
    """
    chosen: list[int] = []
    for t in entropy.argsort(descending=True, stable=True).tolist():
        fits = t + length <= len(entropy)
        apart = all(abs(t - other) >= length for other in chosen)
        if fits and apart and len(chosen) < limit:
            chosen.append(t)
    return sorted(chosen)


def _cases_of_select() -> list[tuple[Tensor, int, int]]:
    generator = torch.Generator().manual_seed(0)
    random = [
        (torch.rand(tokens, generator=generator, dtype=torch.float64), length, limit)
        for tokens, length, limit in ((24, 4, 3), (24, 3, 4), (40, 5, 4))
    ]
    neighbours = torch.tensor([0.9, 1.0, 0.8, 0.1, 0.2, 0.5]).double()
    highest_at_the_end = torch.tensor([0.1, 0.2, 0.3, 0.9]).double()
    return [*random, (neighbours, 2, 2), (highest_at_the_end, 2, 2)]


def _overlapping(entropy: Tensor, length: int, limit: int) -> list[int]:
    room = entropy[: len(entropy) - length + 1]
    return sorted(room.argsort(descending=True, stable=True)[:limit].tolist())


def _beyond_the_end(entropy: Tensor, length: int, limit: int) -> list[int]:
    after = torch.full((length,), -math.inf).double()
    return select(torch.cat([entropy, after]), length, limit)


def _sorted_by_entropy(entropy: Tensor, length: int, limit: int) -> list[int]:
    return sorted(select(entropy, length, limit), key=lambda t: -entropy[t])


def weight(
    text: str, continuations: Sequence[str], logp: Tensor, alpha: float, similarity: Similarity
) -> Tensor:
    """Solve 23.2: the weight of a chunk.

    Args:
        text: The chunk's text.
        continuations: The texts of the teacher from the chunk's start.
        logp: Log-probs of the chunk's tokens, `[K]`.
        alpha: The weight of the student's own certainty, as a number of continuations.
        similarity: Compares two texts, from 0 to 1.

    Returns:
        The weight, one number.
    """
    k = sum(similarity(text, other) for other in continuations)
    prior = logp.mean().exp()
    return (k + alpha * prior) / (len(continuations) + alpha)


def _reference_weight(
    text: str, continuations: Sequence[str], logp: Tensor, alpha: float, similarity: Similarity
) -> Tensor:
    k = math.fsum(similarity(text, other) for other in continuations)
    return posterior(k, len(continuations), logp.mean(), alpha)


def _cases_of_weight() -> list[tuple[str, Sequence[str], Tensor, float, Similarity]]:
    logp = torch.tensor([-0.1, -2.0, -0.7]).double()
    return [
        ("5 1 ;", ["6 1 ;", "6 1 ;", "5 1 ;"], logp, 1.0, rouge1),
        ("total 61", ["total 61", "sum 61"], logp, 2.0, edit),
        ("5", ["6", "6", "6", "6"], logp[:1], 1.0, edit),
    ]


def _probability_of_the_chunk(
    text: str, continuations: Sequence[str], logp: Tensor, alpha: float, similarity: Similarity
) -> Tensor:
    return weight(text, continuations, logp.sum()[None], alpha, similarity)


def _without_prior(
    text: str, continuations: Sequence[str], logp: Tensor, alpha: float, similarity: Similarity
) -> Tensor:
    return weight(text, continuations, logp, 0.0, similarity)


def _mean_similarity(
    text: str, continuations: Sequence[str], logp: Tensor, alpha: float, similarity: Similarity
) -> Tensor:
    n = len(continuations)
    k = sum(similarity(text, other) for other in continuations) / n
    return (k + alpha * logp.mean().exp()) / (n + alpha)


def loss(rows: Rows, beta: float) -> Tensor:
    """Solve 23.3: the loss of OmniOPD.

    Args:
        rows: Log-probs of student and reference, `[n, V]`, and the columns `weight` and `audited`,
            `[n]`.
        beta: The factor of the anchor, for tokens that were not audited.

    Returns:
        The loss, `[n]`.
    """
    audit = -rows.weight * rows.logp
    anchor = (rows.reference.exp() * (rows.reference - rows.student)).sum(-1)
    return torch.where(rows.audited > 0, audit, beta * anchor)


def _reference_loss(rows: Rows, beta: float) -> Tensor:
    return OmniOPD(beta=beta).loss(rows)


def _cases_of_loss() -> list[tuple[Rows, float]]:
    student, reference = random_log_probs(8, 6, seed=3)
    token = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1])
    audited = torch.tensor([1, 1, 0, 0, 1, 0, 0, 1]).double()
    columns = {"audited": audited, "weight": audited * torch.linspace(0.1, 0.9, 8).double()}
    distributions = {"student": student.requires_grad_(), "reference": reference}
    return [(Rows(distributions, token, columns), 0.1)]


def _observe_loss(
    function: Callable[[Rows, float], Tensor], rows: Rows, beta: float
) -> dict[str, Any]:
    return evaluate_loss(lambda given: function(given, beta), rows)


def _anchor_reversed(rows: Rows, beta: float) -> Tensor:
    anchor = beta * reverse_kl(rows.student, rows.reference)
    return torch.where(rows.audited > 0, -rows.weight * rows.logp, anchor)


def _anchor_everywhere(rows: Rows, beta: float) -> Tensor:
    return -rows.weight * rows.logp + beta * forward_kl(rows.student, rows.reference)


def _audit_sign_wrong(rows: Rows, beta: float) -> Tensor:
    anchor = beta * forward_kl(rows.student, rows.reference)
    return torch.where(rows.audited > 0, rows.weight * rows.logp, anchor)


EXERCISES = (
    Exercise(
        "23.1",
        request="return the starts of the chunks, a list of positions in ascending order",
        confirmation="those are the positions where the student is least sure",
        reference=select_chunks,
        solution=select,
        cases=_cases_of_select,
        mistakes={
            (
                "chunks overlap: a start needs a distance of `length` from all that were chosen "
                "before."
            ): _overlapping,
            "a chunk does not fit: it must end within the text.": _beyond_the_end,
            "they are in the order of entropy. Sort them by position.": _sorted_by_entropy,
        },
    ),
    Exercise(
        "23.2",
        request="return (k + alpha p) / (N + alpha) of a chunk",
        confirmation="that is the weight from the teacher's texts and the student's own confidence",
        reference=_reference_weight,
        solution=weight,
        cases=_cases_of_weight,
        mistakes={
            (
                "p is the mean per token: the exp of the mean log-prob, not the probability of the "
                "whole chunk."
            ): _probability_of_the_chunk,
            (
                "the student's own confidence is missing: add alpha p above and alpha below."
            ): _without_prior,
            "k is the sum of the similarities, not their mean.": _mean_similarity,
        },
    ),
    Exercise(
        "23.3",
        request="return the loss of every token, [n]: the audit in chunks, the anchor elsewhere",
        confirmation="that is OmniOPD's loss",
        reference=_reference_loss,
        solution=loss,
        cases=_cases_of_loss,
        observe=_observe_loss,
        mistakes={
            (
                "the anchor is KL(reference || student): the reference comes first."
            ): _anchor_reversed,
            "the anchor is for tokens outside of the chunks only.": _anchor_everywhere,
            (
                "the sign of the first term is wrong: a chunk that the teacher would have written "
                "too becomes more likely."
            ): _audit_sign_wrong,
        },
    ),
)
