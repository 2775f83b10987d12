"""Notebook 23: where to ask a teacher that only writes, what its answers weigh, and the loss."""

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
from opdlab.notebook.cases import random_log_probs, evaluate_loss
from opdlab.notebook.checking import Exercise

Similarity = Callable[[str, str], float]


def select(entropy: Tensor, length: int, limit: int) -> list[int]:
    chosen: list[int] = []
    for t in entropy.argsort(descending=True, stable=True).tolist():
        fits = t + length <= len(entropy)
        apart = all(abs(t - other) >= length for other in chosen)
        if fits and apart and len(chosen) < limit:
            chosen.append(t)
    return sorted(chosen)


def overlapping(entropy: Tensor, length: int, limit: int) -> list[int]:
    room = entropy[: len(entropy) - length + 1]
    return sorted(room.argsort(descending=True, stable=True)[:limit].tolist())


def spilling(entropy: Tensor, length: int, limit: int) -> list[int]:
    return select(torch.cat([entropy, torch.full((length,), -math.inf).double()]), length, limit)


def entropies() -> list[tuple[Tensor, int, int]]:
    made = torch.Generator().manual_seed(0)
    drawn = [
        (torch.rand(t, generator=made, dtype=torch.float64), c, m)
        for t, c, m in ((24, 4, 3), (24, 3, 4), (40, 5, 4))
    ]
    return [
        *drawn,
        (torch.tensor([0.9, 1.0, 0.8, 0.1, 0.2, 0.5]).double(), 2, 2),
        (torch.tensor([0.1, 0.2, 0.3, 0.9]).double(), 2, 2),
    ]


def weight(
    text: str, continuations: Sequence[str], logp: Tensor, alpha: float, similarity: Similarity
) -> Tensor:
    k = sum(similarity(text, other) for other in continuations)
    prior = logp.mean().exp()
    return (k + alpha * prior) / (len(continuations) + alpha)


def library(
    text: str, continuations: Sequence[str], logp: Tensor, alpha: float, similarity: Similarity
) -> Tensor:
    return posterior(
        math.fsum(similarity(text, other) for other in continuations),
        len(continuations),
        logp.mean(),
        alpha,
    )


def product(
    text: str, continuations: Sequence[str], logp: Tensor, alpha: float, similarity: Similarity
) -> Tensor:
    return weight(text, continuations, logp.sum()[None], alpha, similarity)


def heard() -> list[tuple[str, Sequence[str], Tensor, float, Similarity]]:
    logp = torch.tensor([-0.1, -2.0, -0.7]).double()
    return [
        ("5 1 ;", ["6 1 ;", "6 1 ;", "5 1 ;"], logp, 1.0, rouge1),
        ("total 61", ["total 61", "sum 61"], logp, 2.0, edit),
        ("5", ["6", "6", "6", "6"], logp[:1], 1.0, edit),
    ]


def loss(rows: Rows, beta: float) -> Tensor:
    audit = -rows.weight * rows.logp
    anchor = (rows.reference.exp() * (rows.reference - rows.student)).sum(-1)
    return torch.where(rows.audited > 0, audit, beta * anchor)


def rows() -> list[tuple[Rows, float]]:
    student, reference = random_log_probs(8, 6, seed=3)
    token, audited = (
        torch.tensor([0, 1, 2, 3, 4, 5, 0, 1]),
        torch.tensor([1.0, 1, 0, 0, 1, 0, 0, 1]).double(),
    )
    columns = {"audited": audited, "weight": audited * torch.linspace(0.1, 0.9, 8).double()}
    return [
        (Rows({"student": student.requires_grad_(), "reference": reference}, token, columns), 0.1)
    ]


def look(function: Callable[[Rows, float], Tensor], given: Rows, beta: float) -> dict[str, Any]:
    return evaluate_loss(lambda r: function(r, beta), given)


EXERCISES = (
    Exercise(
        "23.1",
        asks="return the starts of the chunks, a list of places in order",
        says="there the student is least sure",
        truth=select_chunks,
        solution=select,
        cases=entropies,
        mistakes={
            "chunks overlap: a start needs a distance of `length` from all that were chosen before.": (
                overlapping
            ),
            "a chunk does not fit: it must end within the text.": spilling,
            "they are in the order of entropy. Sort them by place.": lambda h, length, limit: (
                sorted(select(h, length, limit), key=lambda t: -h[t])
            ),
        },
    ),
    Exercise(
        "23.2",
        asks="return (k + alpha p) / (N + alpha) of a chunk",
        says="that is what the teacher's texts, and the student's own opinion, weigh",
        truth=library,
        solution=weight,
        cases=heard,
        mistakes={
            "p is the mean per token: the exp of the mean log-prob, not the probability of the whole chunk.": (
                product
            ),
            "the student's own opinion is left out: add alpha p above and alpha below.": (
                lambda text, others, logp, alpha, phi: weight(text, others, logp, 0.0, phi)
            ),
            "k is the sum of the similarities, not their mean.": (
                lambda text, others, logp, alpha, phi: weight(
                    text, others, logp, alpha, lambda a, b: phi(a, b) / len(others)
                )
            ),
        },
    ),
    Exercise(
        "23.3",
        asks="return the loss of every token, [n]: audited tokens learn, the others stay",
        says="that is OmniOPD's loss",
        truth=lambda r, beta: OmniOPD(beta=beta).loss(r),
        solution=loss,
        cases=rows,
        look=look,
        mistakes={
            "the anchor is KL(reference || student): the reference comes first.": lambda r, beta: (
                torch.where(
                    r.audited > 0, -r.weight * r.logp, beta * reverse_kl(r.student, r.reference)
                )
            ),
            "the anchor is for tokens outside of the chunks only.": lambda r, beta: (
                -r.weight * r.logp + beta * forward_kl(r.student, r.reference)
            ),
            "the sign of the first term is wrong: what the teacher would have said as well is to become likelier.": lambda r, beta: (
                torch.where(
                    r.audited > 0, r.weight * r.logp, beta * forward_kl(r.student, r.reference)
                )
            ),
        },
    ),
)
