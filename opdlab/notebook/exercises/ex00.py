"""Notebook 00: the two KLs as losses."""

from __future__ import annotations

from torch import Tensor

from opdlab import losses
from opdlab.engine.rows import Rows
from opdlab.notebook.cases import random_rows, evaluate_loss
from opdlab.notebook.checking import Exercise


def my_loss(rows: Rows) -> Tensor:
    return (rows.student.exp() * (rows.student - rows.teacher)).sum(-1)


def forward(rows: Rows) -> Tensor:
    return (rows.teacher.exp() * (rows.teacher - rows.student)).sum(-1)


def cases() -> list[tuple[Rows]]:
    return [(random_rows(seed=0),), (random_rows(8, 4, seed=1),)]


def detached(rows: Rows) -> Tensor:
    return (rows.student.exp().detach() * (rows.student - rows.teacher)).sum(-1)


SUMMED = (
    "one number a token is wanted, shape [n], but this is summed over the tokens as well. Sum over"
    " the vocabulary only, dim=-1."
)

EXERCISES = (
    Exercise(
        "00.1",
        asks="return the reverse KL of every row, shape [n]",
        says="that is the reverse KL",
        truth=lambda r: losses.reverse_kl(r.student, r.teacher),
        solution=my_loss,
        cases=cases,
        look=evaluate_loss,
        mistakes={
            "that is the forward KL. Weigh by the student's probabilities instead.": forward,
            SUMMED: lambda r: my_loss(r).sum(),
            "the weight is detached, so the gradients of all tokens cancel. Let the student's probabilities carry gradient.": (
                detached
            ),
            "the weight is a log-prob. Weigh by probabilities: .exp().": (
                lambda r: (r.student * (r.student - r.teacher)).sum(-1)
            ),
            "that is the sampled log-ratio, not its mean over the vocabulary.": lambda r: (
                r.logp - r.logp_of("teacher")
            ),
        },
    ),
    Exercise(
        "00.2",
        asks="return the forward KL of every row, shape [n]",
        says="that is the forward KL",
        truth=lambda r: losses.forward_kl(r.student, r.teacher),
        solution=forward,
        cases=cases,
        look=evaluate_loss,
        mistakes={
            "that is the reverse KL again. Weigh by the teacher's probabilities.": my_loss,
            SUMMED: lambda r: forward(r).sum(),
            "only one of weight and difference is swapped: this is minus the reverse KL's sum under the teacher.": lambda r: (
                (r.teacher.exp() * (r.student - r.teacher)).sum(-1)
            ),
        },
    ),
)
