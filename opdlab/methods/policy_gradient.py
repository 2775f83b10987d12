"""Parts that the policy-gradient methods share: a detached advantage of the sampled token.

    loss_t = - ratio_t A_t,      ratio_t = p(y_t) / p_sampler(y_t)

In the first update after sampling the ratio is 1, but it carries the gradient of log p(y_t).
"""

from __future__ import annotations

from torch import Tensor

from opdlab.data.column import Column, Kind
from opdlab.engine.rows import Rows


def importance_ratio(rows: Rows) -> Tensor:
    """Return p(y) / p_sampler(y) of the sampled tokens, `[n]`, from the column `sampler_logp`."""
    return (rows.logp - rows.sampler_logp).exp()


def policy_gradient_loss(rows: Rows) -> Tensor:
    """Return -ratio A, `[n]`, from the columns `advantage` and `sampler_logp`."""
    return -importance_ratio(rows) * rows.advantage


def advantage_column(advantage: Tensor, formula: str, unit: str = "nats") -> Column:
    """Describe an advantage for a trace.

    Args:
        advantage: `[B, T]`, or `[B]` for one per completion.
        formula: How it is computed, in one line.
        unit: "nats", or "" for a plain number.
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
    """Describe the sampler's log-probs `[B, T]` for a trace."""
    return Column(logp, "log-prob of the token when it was sampled", unit="nats")
