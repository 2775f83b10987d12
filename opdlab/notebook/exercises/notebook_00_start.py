"""Notebook 00: the reverse and the forward KL as losses."""

from __future__ import annotations

from torch import Tensor

from opdlab import losses
from opdlab.engine.rows import Rows
from opdlab.notebook.cases import evaluate_loss, random_rows
from opdlab.notebook.checking import Exercise


def my_loss(rows: Rows) -> Tensor:
    """Solve 00.1: the reverse KL of every row.

    Args:
        rows: Log-probs of student and teacher, `[n, V]` each.

    Returns:
        The reverse KL, `[n]` in nats.
    """
    return (rows.student.exp() * (rows.student - rows.teacher)).sum(-1)


def forward(rows: Rows) -> Tensor:
    """Solve 00.2: the forward KL of every row.

    Args:
        rows: Log-probs of student and teacher, `[n, V]` each.

    Returns:
        The forward KL, `[n]` in nats.
    """
    return (rows.teacher.exp() * (rows.teacher - rows.student)).sum(-1)


def _reference_reverse(rows: Rows) -> Tensor:
    return losses.reverse_kl(rows.student, rows.teacher)


def _reference_forward(rows: Rows) -> Tensor:
    return losses.forward_kl(rows.student, rows.teacher)


def _cases() -> list[tuple[Rows]]:
    return [(random_rows(seed=0),), (random_rows(8, 4, seed=1),)]


def _with_detached_weight(rows: Rows) -> Tensor:
    return (rows.student.exp().detach() * (rows.student - rows.teacher)).sum(-1)


def _weighted_by_log_prob(rows: Rows) -> Tensor:
    return (rows.student * (rows.student - rows.teacher)).sum(-1)


def _sampled_log_ratio(rows: Rows) -> Tensor:
    return rows.logp - rows.logp_of("teacher")


def _half_swapped(rows: Rows) -> Tensor:
    return (rows.teacher.exp() * (rows.student - rows.teacher)).sum(-1)


SUMMED_OVER_TOKENS = (
    "one number per token is wanted, shape [n], but this is summed over the tokens as well. Sum "
    "over the vocabulary only, dim=-1."
)

EXERCISES = (
    Exercise(
        "00.1",
        request="return the reverse KL of every row, shape [n]",
        confirmation="that is the reverse KL",
        reference=_reference_reverse,
        solution=my_loss,
        cases=_cases,
        observe=evaluate_loss,
        mistakes={
            "that is the forward KL. Use the student's probabilities as weights instead.": forward,
            SUMMED_OVER_TOKENS: lambda rows: my_loss(rows).sum(),
            (
                "the weight is detached, so the gradients of all tokens cancel. Let the student's "
                "probabilities carry gradient."
            ): _with_detached_weight,
            (
                "the weight is a log-prob. Use probabilities as weights: .exp()."
            ): _weighted_by_log_prob,
            (
                "that is the log-ratio of the sampled token, not its mean over the vocabulary."
            ): _sampled_log_ratio,
        },
    ),
    Exercise(
        "00.2",
        request="return the forward KL of every row, shape [n]",
        confirmation="that is the forward KL",
        reference=_reference_forward,
        solution=forward,
        cases=_cases,
        observe=evaluate_loss,
        mistakes={
            "that is the reverse KL again. Use the teacher's probabilities as weights.": my_loss,
            SUMMED_OVER_TOKENS: lambda rows: forward(rows).sum(),
            (
                "only one of weight and difference is swapped, so this is minus the forward KL. "
                "Swap the difference too: teacher minus student."
            ): _half_swapped,
        },
    ),
)
