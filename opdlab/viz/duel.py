"""The duel: at each token, the few tokens that the policies wanted most, side by side, and the mass of all others."""

from __future__ import annotations

from typing import Any

import numpy as np

from opdlab.trace import Trace
from opdlab.viz.glyphs import visible

ROWS = 9  # the sampled token and eight more: what the panel has room for
LEAST = 1e-3  # a token that no policy gives as much is not shown by itself


def duel(trace: Trace) -> dict[str, Any] | None:
    """`rows`: token ids, likeliest (under any policy) first. `p`, `other`: probabilities by policy; `rank` where known.

    None for a trace that kept no top tokens. The sampled token is always among the rows; what is not shown is in `other`.
    """
    have = set(trace.table.column_names)
    names = [name for name in trace.policies if f"{name}_top" in have]
    if "support" not in have or not names or not len(trace):
        return None
    ids = trace.column("support")  # [n, S]; -1 is a repeat, [:, 0] the sampled token
    p = {name: np.where(ids < 0, 0.0, np.exp(trace.column(f"{name}_top").astype(float))) for name in names}
    best = np.where(ids < 0, -1.0, np.max(list(p.values()), axis=0))
    first = np.where(np.arange(ids.shape[1]) == 0, np.inf, best)
    shown = np.argsort(-first, axis=1, kind="stable")[:, :ROWS]
    pick = lambda x, order: np.take_along_axis(x, order, 1)
    shown = pick(shown, np.argsort(-pick(best, shown), axis=1, kind="stable"))
    rows = pick(ids, shown)
    real = (rows >= 0) & ((pick(best, shown) >= LEAST) | (shown == 0))
    return {
        "rows": [row[keep].tolist() for row, keep in zip(rows, real, strict=True)],
        "p": {name: [_short(row[keep]) for row, keep in zip(pick(x, shown), real, strict=True)] for name, x in p.items()},
        "other": {name: _short(_left(trace, name) + x.sum(1) - (pick(x, shown) * real).sum(1)) for name, x in p.items()},
        "rank": {name: trace.column(f"{name}_rank").tolist() for name in names if f"{name}_rank" in have},
        "words": {str(i): visible(trace.piece(i)) for i in sorted({*rows[real].tolist()})},
    }


def _left(trace: Trace, name: str) -> np.ndarray:
    return trace.column(f"{name}_tail").astype(float)


def _short(p: np.ndarray) -> list[float]:
    return [float(f"{x:.4g}") for x in p.clip(0, 1)]
