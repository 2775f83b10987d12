"""Divergences on the kept top tokens of a trace plus one bucket for all other tokens.

By the data-processing inequality such a divergence is a lower bound of the one over the whole
vocabulary, and equals it where the policies agree on all that lies in the bucket. The columns of a
trace, where it has them, are exact: these fill the gaps.
"""

from __future__ import annotations

import numpy as np

from opdlab.data.trace import Trace

DUST = 1e-9  # a tail below this is rounding, not mass


def has_top(trace: Trace, *policies: str) -> bool:
    """Return whether the trace kept the top tokens of these policies.

    Args:
        trace: The trace.
        policies: Names of policies.

    Returns:
        Whether `support` is there, and `<policy>_top` and `<policy>_tail` of each of them.
    """
    return {
        "support",
        *(f"{name}_top" for name in policies),
        *(f"{name}_tail" for name in policies),
    } <= set(trace.table.column_names)


def coarse(trace: Trace, policy: str) -> np.ndarray:
    """Return log-probs of the kept tokens, then of the bucket, `[n, S + 1]`.

    -inf at repeats, and where a tail is only dust.

    Args:
        trace: A trace that kept the top tokens of `policy`.
        policy: The policy's name.

    Returns:
        In nats, S the width of the support; no bucket where the trace has no rows.
    """
    top = trace.column(f"{policy}_top").astype(float)
    if not len(trace):
        return top
    tail = trace.column(f"{policy}_tail").astype(float)
    bucket = np.log(tail, out=np.full(len(tail), -np.inf), where=tail > DUST)
    return np.concatenate([top, bucket[:, None]], 1)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return KL(p || q) of log-probs over the last axis, in nats.

    +inf where q rules out a token that p does not.

    Args:
        p: `[…, K]` log-probs; -inf for what cannot happen.
        q: The same of the other distribution.

    Returns:
        `[…]`, in nats.
    """
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q)).sum(-1))


def jsd(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return ½ KL(p || m) + ½ KL(q || m), m = ½ p + ½ q, in nats.

    Args:
        p: `[…, K]` log-probs; -inf for what cannot happen.
        q: The same of the other distribution.

    Returns:
        `[…]`, in nats.
    """
    middle = np.logaddexp(p, q) - np.log(2)
    return np.asarray(0.5 * (kl(p, middle) + kl(q, middle)))


def overlap(trace: Trace, policy: str) -> np.ndarray:
    """Return the share of the policy's k likeliest tokens that are among the student's.

    k is `width(trace)`, the tokens that the trace kept of each policy.

    Args:
        trace: A trace that kept the top tokens of the student and of `policy`.
        policy: The policy's name.

    Returns:
        `[n]`, from 0 to 1.
    """
    k = width(trace)
    mine, theirs = (_likeliest(trace.column(f"{name}_top"), k) for name in ("student", policy))
    return (mine & theirs).sum(1) / k if k else np.zeros(len(trace))


def width(trace: Trace) -> int:
    """Return how many likeliest tokens of each policy the trace kept.

    The support is the sampled token and as many of each policy.

    Args:
        trace: The trace.

    Returns:
        The number of tokens; 0 for a trace without rows or without top tokens.
    """
    have = [name for name in trace.policies if f"{name}_top" in trace.table.column_names]
    return (trace.column("support").shape[1] - 1) // len(have) if len(trace) and have else 0


def _likeliest(top: np.ndarray, k: int) -> np.ndarray:
    """Return a mask of the k largest entries of each row of the support."""
    place = np.argsort(np.argsort(-top, 1, kind="stable"), 1)
    return (place < k) & ~np.isneginf(top)
