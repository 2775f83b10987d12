"""Parts that the policy-gradient methods share: a detached advantage of the sampled token.

    loss_t = - ratio_t A_t,      ratio_t = p(y_t) / p_sampler(y_t)

In the first update after sampling the ratio is 1, but it carries the gradient of log p(y_t).
"""

from __future__ import annotations

from torch import Tensor

from opdlab.data.column import Column, Kind
from opdlab.engine.rows import Rows


def importance_ratio(rows: Rows) -> Tensor:
    """Compute p(y) / p_sampler(y) of the sampled tokens.

    Args:
        rows: A chunk of `n` tokens, with the column `sampler_logp`.

    Returns:
        `[n]`, with a gradient.
    """
    return (rows.logp - rows.sampler_logp).exp()


def policy_gradient_loss(rows: Rows) -> Tensor:
    """Compute the policy-gradient loss -ratio A.

    Args:
        rows: A chunk of `n` tokens, with the columns `advantage` and `sampler_logp`.

    Returns:
        `[n]`.
    """
    return -importance_ratio(rows) * rows.advantage


def advantage_column(advantage: Tensor, formula: str, unit: str = "nats") -> Column:
    """Describe an advantage for a trace.

    Args:
        advantage: `[B, T]`, or `[B]` for one per completion.
        formula: Its formula, in one line.
        unit: "nats", or "" for a plain number.

    Returns:
        The column, signed.
    """
    return Column(
        advantage,
        formula,
        unit=unit,
        kind=Kind.SIGNED,
        less="made less likely",
        more="made more likely",
    )


def sampler_column(logp: Tensor) -> Column:
    """Describe the sampler's log-probs for a trace.

    Args:
        logp: Log-probs of the sampled tokens when they were drawn, `[B, T]`, in nats.

    Returns:
        The column.
    """
    return Column(logp, "log-prob of the token when it was sampled", unit="nats")
