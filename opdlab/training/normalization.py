"""Each token's share in the mean of a step's loss, by the rule of `Settings.normalize`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opdlab.data.rollout import Rollout


def token_weights(
    rollout: Rollout, rule: str, max_new_tokens: int, total: Callable[[Tensor], Tensor]
) -> Tensor:
    """Compute each token's share of the step's mean.

    Counted over the tokens that the loss sees and over all processes, so neither micro-batches nor
    the split among processes matter. Tokens that the loss does not see have no share.

    Args:
        rollout: The step's rollout in this process.
        rule: "token", "sequence" or "constant".
        max_new_tokens: The divisor of "constant".
        total: Adds up a tensor over all processes.

    Returns:
        `[tokens]`, zero on tokens that the loss does not see.
    """
    learned = rollout.learn.sum(1).double()  # [B]
    local = torch.stack([torch.full_like(learned[:1].sum(), len(rollout)), learned.sum()])
    completions, tokens = total(local).tolist()
    if rule == "token":
        per_row = torch.full_like(learned, 1 / max(tokens, 1))
    elif rule == "sequence":
        per_row = 1 / (completions * learned.clamp(min=1))
    else:  # constant
        per_row = torch.full_like(learned, 1 / (completions * max_new_tokens))
    spread = per_row.float().repeat_interleave(rollout.lengths)
    return torch.where(rollout.learned, spread, 0.0)
