"""Exact probabilities of what a table writes, and the expectations that follow.

All differentiable in `table.logits`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opdlab.data.rollout import Rollout
from opdlab.exact.table import Table, everything


def law(table: Table, rollout: Rollout) -> Tensor:
    """Compute the probability of each completion.

    Args:
        table: The table that writes the completions.
        rollout: Completions of the table's prompts.

    Returns:
        `[N]` in float64; over `everything` it sums to one per prompt.
    """
    own = table.logp[table.where(rollout)].gather(-1, rollout.ids[rollout.mask][:, None])[:, 0]
    spread = torch.zeros(rollout.ids.shape, dtype=torch.float64).masked_scatter(rollout.mask, own)
    return spread.sum(1).exp()


def visits(table: Table) -> Tensor:
    """Compute the probability that a text of the table passes each prefix.

    The prefixes of one length sum to one, less what has ended before.

    Args:
        table: The table that writes the texts.

    Returns:
        `[X, S]` in float64, with a gradient if the table's logits have one.
    """
    p, level, out, first = table.logp.exp(), table.logits.new_ones(len(table.prompts), 1), [], 0
    for _ in range(table.length):
        out.append(level)
        going = level[..., None] * p[:, first : first + level.shape[1]]
        if table.eos is not None:
            going = going.index_fill(-1, torch.tensor([table.eos]), 0.0)
        first += level.shape[1]
        level = going.flatten(1)
    return torch.cat(out, 1)


def expectation(table: Table, value: Callable[[Rollout], Tensor]) -> Tensor:
    """Return `E_{y ~ table(.|x)} value(y)` for every prompt.

    Args:
        table: The table.
        value: Maps all completions to `[N, ...]`.

    Returns:
        `[X, ...]`.
    """
    rollout = everything(table.prompts, table.vocab, table.length, eos=table.eos, by=table)
    values = value(rollout)
    weighted = law(table, rollout).view(-1, *[1] * (values.dim() - 1)) * values
    return weighted.view(len(table.prompts), -1, *values.shape[1:]).sum(1)
