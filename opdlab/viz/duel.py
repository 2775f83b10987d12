"""The duel: the top candidates of every policy at each token, and the mass of all others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from opdlab.data.trace import Trace
from opdlab.viz import payload
from opdlab.viz.glyphs import show_piece

ROWS = 9  # the sampled token and eight more fit into the panel
LEAST = 1e-3  # a token that no policy gives as much is not shown by itself
# Rows of all tokens together that a page carries; fewer where the text itself is long.
ENTRIES, FEWER = 9000, 4000


def find_duel(
    trace: Trace, beside: Mapping[str, np.ndarray] | None = None
) -> dict[str, Any] | None:
    """Return the top candidates of every policy at each token, as the page reads them.

    Args:
        trace: The trace of one completion, or of several.
        beside: Further numbers of every kept token by name, `[n, S + 1]`, the last for all others.

    Returns:
        None for a trace that kept no top tokens, else:

        - `count [n]`: candidates of each token; 0 where there was no room, since tokens on which
          the policies differ most come first.
        - `row`: the candidates of all tokens, one after the other, as places in `names` and `ids`;
          the likeliest under any policy first, the sampled token always among them.
        - `p[policy]`: their probabilities.
        - `other[policy]`: the mass not shown, for each token that has candidates.
        - `rank[policy] [n]`: the rank of the sampled token.
        - `beside[name]` and `beside_other[name]`: the further numbers, as `p` and `other`.
    """
    have = set(trace.table.column_names)
    policies = [name for name in trace.policies if f"{name}_top" in have]
    if "support" not in have or not policies or not len(trace):
        return None
    ids, p = _find_probabilities(trace, policies)
    rows, shown, real = _select_rows(ids, p)
    real &= _find_room(trace, real)[:, None]
    kept = real.any(1)
    seen, index = np.unique(rows[real], return_inverse=True)
    picked = {name: np.take_along_axis(x, shown, 1) for name, x in p.items()}
    other = {
        name: trace.column(f"{name}_tail") + x.sum(1) - (picked[name] * real).sum(1)
        for name, x in p.items()
    }
    return {
        "count": real.sum(1),
        "row": index,
        "ids": seen,
        "names": [payload.shorten_word(show_piece(trace.piece(int(i)))) for i in seen],
        "p": {name: _compact_share(x[real]) for name, x in picked.items()},
        "other": {name: _compact_share(x[kept]) for name, x in other.items()},
        "rank": {name: trace.column(f"{name}_rank") for name in policies if f"{name}_rank" in have},
        **_find_beside(beside or {}, shown, real),
    }


def _find_beside(
    beside: Mapping[str, np.ndarray], shown: np.ndarray, real: np.ndarray
) -> dict[str, dict[str, np.ndarray]]:
    """Further numbers of the rows that are shown, and their sums over all others."""
    rows, others = {}, {}
    for name, values in beside.items():
        picked = np.take_along_axis(values[:, :-1], shown, 1)
        rows[name] = picked[real].astype(np.float32)
        rest = values.sum(1) - (picked * real).sum(1)
        others[name] = rest[real.any(1)].astype(np.float32)
    return {"beside": rows, "beside_other": others} if beside else {}


def _find_probabilities(
    trace: Trace, policies: list[str]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Token ids `[n, S]`, the sampled token first and -1 for repeats, and their probabilities."""
    ids = trace.column("support")
    top = {name: np.exp(trace.column(f"{name}_top").astype(float)) for name in policies}
    return ids, {name: np.where(ids < 0, 0.0, p) for name, p in top.items()}


def _select_rows(
    ids: np.ndarray, p: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids of the rows to show `[n, ROWS]`, their places in the support, and which are real."""
    best = np.where(ids < 0, -1.0, np.max(list(p.values()), axis=0))
    first = np.where(np.arange(ids.shape[1]) == 0, np.inf, best)
    shown = np.argsort(-first, axis=1, kind="stable")[:, :ROWS]
    shown = np.take_along_axis(
        shown, np.argsort(-np.take_along_axis(best, shown, 1), axis=1, kind="stable"), 1
    )
    rows = np.take_along_axis(ids, shown, 1)
    return rows, shown, (rows >= 0) & ((np.take_along_axis(best, shown, 1) >= LEAST) | (shown == 0))


def _find_room(trace: Trace, real: np.ndarray) -> np.ndarray:
    """Choose the tokens whose rows fit; those on which the policies differ most come first."""
    order = np.argsort(-_measure_disagreement(trace), kind="stable")
    room = np.cumsum(real.sum(1)[order]) <= (FEWER if len(trace) > payload.LONG else ENTRIES)
    out = np.zeros(len(trace), bool)
    out[order[room]] = True
    return out


def _measure_disagreement(trace: Trace) -> np.ndarray:
    rivals = [name for name in trace.policies if name != "student"]
    if not rivals:
        return trace.column("student_entropy").astype(float)
    with np.errstate(invalid="ignore"):
        gaps = [
            np.abs(trace.column(f"{name}_logp").astype(float) - trace.column("student_logp"))
            for name in rivals
        ]
    return np.asarray(np.nan_to_num(np.max(gaps, axis=0), nan=0.0, posinf=1e9))


def _compact_share(p: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(p, 0, 1).astype(np.float16))
