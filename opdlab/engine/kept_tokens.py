"""The top tokens that a training step keeps for its trace, with the slopes of its loss on them.

A trace with them explains a token's update by itself: what each policy wanted there, and which
tokens the loss moved, before the weights changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from opdlab.engine import signals
from opdlab.engine.rows import Rows
from opdlab.models.graded import TopLogprobs


@dataclass(frozen=True)
class KeptTokens:
    """Keep the likeliest tokens of every policy, and the slopes of the loss on them.

    With `P` policies, `S = 1 + k P` tokens are kept at most, in `16 S + 4 P (S + 1) + 8` bytes per
    token of the rollout: 424 for `k = 8` and two policies.

    Attributes:
        k: Top tokens of each policy.
    """

    k: int

    def measure(self, rows: Rows) -> dict[str, Tensor]:
        """Keep the top tokens, as `opdlab.score` does.

        Args:
            rows: Tokens under all policies.

        Returns:
            `support [n, S]` and, of each policy whose distribution is known, `<policy>_top [n, S]`
            and `<policy>_tail [n]`.
        """
        support = signals.support_of(rows, self.k)
        out = {"support": support}
        for name, logp in rows.distributions.items():
            if not isinstance(logp, TopLogprobs):
                out |= signals.top_on(support, name, rows[name])
        return out

    def slopes(
        self, numbers: Mapping[str, Tensor], after: Tensor, before: Tensor
    ) -> dict[str, Tensor]:
        """Keep the gradient of each token's loss on its top tokens.

        Args:
            numbers: What `measure` gave.
            after: The gradient in the student's log-probs (after the softmax), `[n, V]`.
            before: The gradient in its logits (before the softmax), `[n, V]`.

        Returns:
            `logp_gradient` and `logit_gradient`, `[n, S + 1]` each: a value for each token of
            `support`, and the sum over all others last.
        """
        support = numbers["support"]
        return {
            "logp_gradient": _on(support, after),
            "logit_gradient": _on(support, before),
        }

    def blank(self, columns: Mapping[str, Tensor], learned: Tensor) -> dict[str, Tensor]:
        """Say that no top tokens are known where the loss does not look.

        Args:
            columns: A step's columns by name, `[tokens, ...]`, zero there.
            learned: Whether the loss sees a token, `[tokens]`.

        Returns:
            The columns with no ids there, and all mass in the tails.
        """
        fill: dict[str, float] = {"support": -1, "_top": -torch.inf, "_tail": 1}
        out = dict(columns)
        for name, values in columns.items():
            for end, nothing in fill.items():
                if name.endswith(end):
                    where = learned.view(-1, *[1] * (values.dim() - 1))
                    out[name] = values.masked_fill(~where, nothing)
        return out


def _on(support: Tensor, slope: Tensor) -> Tensor:
    """Values `[n, V]` on the kept tokens, and the sum of all others, `[n, S + 1]`."""
    place, is_repeat = support.clamp(min=0), support < 0
    kept = slope.gather(-1, place).masked_fill(is_repeat, 0.0)
    # Not the difference of two sums, which rounding would leave beside 0 where all are kept.
    rest = slope.scatter(-1, place, 0.0)
    # Repeats were written to id 0: put its value back, unless it is in the support itself.
    rest[:, 0] = torch.where((support == 0).any(-1), 0.0, slope[:, 0])
    return torch.cat([kept, rest.sum(-1, keepdim=True)], -1)
