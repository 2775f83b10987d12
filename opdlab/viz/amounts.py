"""Amounts of a trace that are shared out among groups of tokens: KL, gradient, loss."""

from __future__ import annotations

import numpy as np

from opdlab.data.trace import Trace
from opdlab.viz.axes import find_sides


def find_amounts(trace: Trace, with_loss: bool = False) -> dict[str, np.ndarray]:
    """Return the amounts that the trace has, by name.

    Args:
        trace: The trace.
        with_loss: Whether to return the size of the loss, too.

    Returns:
        `kl` (nats), `gradient` (share of all norms) and `loss` (its size), `[n]` each, finite and
        at least 0.
    """
    out, have = {}, trace.table.column_names
    sides = find_sides(trace)
    if sides and f"{sides[0]}_reverse_kl" in have:
        kl = trace.column(f"{sides[0]}_reverse_kl").astype(float)
        largest = kl[np.isfinite(kl)].max(initial=1.0)
        # An infinite KL counts as the largest finite one, so that it is not all there is.
        out["kl"] = np.clip(np.nan_to_num(kl, posinf=largest), 0, None)
    if "share" in have:
        out["gradient"] = trace.column("share").astype(float)
    if with_loss and "loss" in have:
        loss = np.abs(trace.column("loss").astype(float))
        out["loss"] = np.where(np.isfinite(loss), loss, 0.0)
    return out
