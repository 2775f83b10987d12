"""Measure how far the student has gone from its start: KL(p ‖ p_start), nats per token.

Where the method reads the reference, which is the student before training, the divergence is known
on the whole vocabulary, and costs nothing. Elsewhere `Settings.start_kl` asks for it. It then costs
one more pass of the model as it was at the start, and is estimated from the sampled tokens, by a
term that is never below zero and has the right mean (k3):

    E_{y ~ p} [ p_start(y) / p(y) - 1 - log(p_start(y) / p(y)) ] = KL(p ‖ p_start)

Scores of same-family pairs rise with the square root of this number (arXiv 2609.32722).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from opdlab.engine.batch import Batch
from opdlab.engine.passes import compute
from opdlab.engine.rows import Rows
from opdlab.errors import InvalidValue
from opdlab.models.policy import Policy
from opdlab.training.settings import Settings

REFERENCE = "reference_reverse_kl"  # the column that a method with a reference has anyway


def keep_start(
    student: Policy, policies: Mapping[str, object], given: Mapping[str, object], settings: Settings
) -> Policy | None:
    """Keep the student as it is before training, if `start_kl` needs it.

    Args:
        student: The student, before it gets an adapter.
        policies: The policies that the method reads.
        given: The user's `policies=`.
        settings: The settings of the run.

    Returns:
        The frozen student, or None where a reference is at hand or nothing is asked for.
    """
    if not settings.start_kl or has_reference(policies, given):
        return None
    return student.frozen()


def has_reference(policies: Mapping[str, object], given: Mapping[str, object]) -> bool:
    """Tell whether the method's reference is the student before training.

    Args:
        policies: The policies that the method reads.
        given: The user's `policies=`; a reference of the user's own is something else.

    Returns:
        Whether it is.
    """
    return "reference" in policies and "reference" not in given


def check_shards(settings: Settings, *, is_sharded: bool) -> None:
    """Refuse `start_kl` with a sharded student, whose first weights nobody keeps.

    Args:
        settings: The settings of the run.
        is_sharded: Whether the student's weights are spread over processes.

    Raises:
        InvalidValue: Both hold.
    """
    if settings.start_kl and is_sharded:
        raise InvalidValue(
            "distill got start_kl=True with a sharded student, whose weights at the start are not"
            " kept. Leave it out, or use a method that reads the reference."
        )


def measure_start(
    batch: Batch, columns: Mapping[str, Tensor], start: Policy | None, *, reference: bool
) -> dict[str, float]:
    """Compute the distance from the start, over the tokens that the loss sees in all processes.

    Args:
        batch: The step's rollout.
        columns: Numbers of its tokens, `[tokens]` each.
        start: The student before training, where it was kept for this.
        reference: Whether the method's reference is the student before training.

    Returns:
        `start_kl`, in nats per token; nothing where it is not known.
    """
    if reference and REFERENCE in columns:
        return {"start_kl": float(batch.mean(batch.spread(columns[REFERENCE])))}
    if start is None:
        return {}
    with torch.no_grad():
        then = compute(_sampled, {"student": start.grade(batch.rollout)}, batch.token)["logp"]
    log_ratio = (then - columns["student_logp"]).double()
    terms = torch.special.expm1(log_ratio) - log_ratio
    return {"start_kl": float(batch.mean(batch.spread(terms)))}


def _sampled(rows: Rows) -> dict[str, Tensor]:
    return {"logp": rows.logp}
