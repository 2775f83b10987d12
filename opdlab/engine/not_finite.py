"""Explain why a loss is NaN or infinite at one token, and say what to do about it."""

from __future__ import annotations

import torch
from torch import Tensor

from opdlab.engine.rows import LogProbs, Rows
from opdlab.errors import NonFinite
from opdlab.models.graded import Graded, States, TopLogprobs
from opdlab.models.routed import Routed

SHOWN = 3  # ids in a message


def explain(row: Rows) -> str:
    """Say why the loss of a single row is not finite.

    Args:
        row: One row.

    Returns:
        Sentences with a space before; "" where the row does not tell.
    """
    student = row["student"]
    for name, logp in row.distributions.items():
        if bool(_nan(logp).any()):
            return f" {_broken(name)}"
    for name, column in row.columns.items():
        if column.dtype.is_floating_point and not bool(torch.isfinite(column).all()):
            return (
                f" The plan's column {name!r} is {_first_bad(column)} here. Return finite numbers"
                " from plan."
            )
    for name, logp in row.distributions.items():
        if isinstance(logp, Tensor) and name != "student":
            if ruled_out := _ruled_out(logp[0], student[0]):
                return f" {_without_probability(name, 'the student', ruled_out)}"
            if ruled_out := _ruled_out(student[0], logp[0]):
                return f" {_without_probability('student', f'the {name}', ruled_out)}"
        elif isinstance(logp, TopLogprobs) and bool(torch.isneginf(logp.sampled).any()):
            return f" {_without_probability(name, 'the student', [int(logp.token[0])])}"
    return ""


def check_graded(name: str, graded: Graded) -> None:
    """Refuse a policy whose log-probs are NaN, as of broken weights.

    Args:
        name: The policy's name, for the message.
        graded: Its states or log-probs of all tokens of a rollout.

    Raises:
        NonFinite: Its hidden states are NaN, or its log-probs of the first token are.
    """
    if isinstance(graded, Routed):
        for inner, part in zip(graded.names, graded.parts, strict=True):
            check_graded(inner, part)
    numbers: list[Tensor] = []
    if isinstance(graded, TopLogprobs):
        numbers = [graded.top, graded.sampled]
    elif isinstance(graded, States) and len(graded.hidden):
        # NaN in the head's weights shows in every token, so one token is enough.
        numbers = [graded.hidden.detach(), graded.part(slice(0, 1)).logp()]
    if any(bool(values.isnan().any()) for values in numbers):
        raise NonFinite(_broken(name))


def _nan(logp: LogProbs) -> Tensor:
    if isinstance(logp, TopLogprobs):
        return torch.cat([logp.top.flatten(), logp.sampled]).isnan()
    return logp.isnan()


def _broken(name: str) -> str:
    if name == "student":
        return (
            "The student's log-probs are NaN: its weights or its precision are broken. Load it"
            " anew, or go back to an earlier checkpoint and lower the learning rate."
        )
    return (
        f"The log-probs of {name!r} are NaN: its weights or its precision are broken. Load another"
        f" {name}, or in float32."
    )


def _first_bad(column: Tensor) -> float:
    flat = column.flatten()
    return float(flat[~torch.isfinite(flat)][0])


def _ruled_out(logp: Tensor, other: Tensor) -> list[int]:
    """Ids that have no probability here and some there."""
    ruled_out = torch.isneginf(logp) & ~torch.isneginf(other)
    return [int(token) for token in ruled_out.nonzero()[:, 0]]


def _without_probability(name: str, other: str, ids: list[int]) -> str:
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    tokens = f"token{'s' * (len(ids) > 1)} {', '.join(map(str, ids[:SHOWN]))}{more}"
    return (
        f"{name!r} gives {tokens} no probability at all (-inf), and {other} gives some, so a"
        " divergence that divides by it is infinite. A lower learning rate does not help. Use a"
        " bounded divergence (jensen_shannon, total_variation), a mixture (skew_reverse_kl,"
        " skew_forward_kl, generalized_jsd), or a floor in a loss of your own:"
        f" rows[{name!r}].clamp(min=-30)."
    )
