"""What the kept top tokens say by themselves: divergences on them plus one bucket for all other
tokens.

By the data-processing inequality such a divergence is a lower bound of the one over the whole
vocabulary, and equals it where the policies agree on all that lies in the bucket. The columns of a
trace, where it has them, are exact: these fill the gaps.
"""

from __future__ import annotations

import numpy as np

from opdlab.data.trace import Trace

DUST = 1e-9  # a tail below this is rounding, not mass


def has_top(trace: Trace, *policies: str) -> bool:
    """Whether the trace kept the top tokens of these policies."""
    return {
        "support",
        *(f"{name}_top" for name in policies),
        *(f"{name}_tail" for name in policies),
    } <= set(trace.table.column_names)


def coarse(trace: Trace, policy: str) -> np.ndarray:
    """Log-probs of the kept tokens, then of the bucket:

    `[n, S + 1]`, -inf at repeats and where a tail is only dust.
    """
    top, tail = (
        trace.column(f"{policy}_top").astype(float),
        trace.column(f"{policy}_tail").astype(float),
    )
    return (
        np.concatenate(
            [top, np.log(tail, out=np.full(len(tail), -np.inf), where=tail > DUST)[:, None]], 1
        )
        if len(trace)
        else top
    )


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) of log-probs over the last axis, nats; +inf where q rules out what p does not."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q)).sum(-1)


def jsd(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """½ KL(p || m) + ½ KL(q || m), m = ½ p + ½ q, nats."""
    middle = np.logaddexp(p, q) - np.log(2)
    return 0.5 * (kl(p, middle) + kl(q, middle))


def overlap(trace: Trace, policy: str) -> np.ndarray:
    """Share of the policy's k likeliest tokens that are among the student's, where k is what the
    trace kept of each.
    """
    k = width(trace)
    mine, theirs = (_likeliest(trace.column(f"{name}_top"), k) for name in ("student", policy))
    return (mine & theirs).sum(1) / k if k else np.zeros(len(trace))


def width(trace: Trace) -> int:
    """How many likeliest tokens of each policy the trace kept: the support is the sampled token and
    as many of each.
    """
    have = [name for name in trace.policies if f"{name}_top" in trace.table.column_names]
    return (trace.column("support").shape[1] - 1) // len(have) if len(trace) and have else 0


def _likeliest(top: np.ndarray, k: int) -> np.ndarray:
    """Which entries of the support are the k largest of their row."""
    place = np.argsort(np.argsort(-top, 1, kind="stable"), 1)
    return (place < k) & ~np.isneginf(top)
