"""A rollout under all policies of a method: what `plan` sees, and where the loss pass takes its
states from.

Everything is lazy: a method that only asks for rewards runs no model. Batch statistics made here
are over the whole batch, whatever the micro-batches of the loss pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opdlab.data.rollout import Rollout
from opdlab.engine.not_finite import check_graded
from opdlab.engine.passes import compute
from opdlab.engine.rows import Rows
from opdlab.engine.signals import Signals
from opdlab.errors import MissingPolicy, TokenizerMismatch
from opdlab.models.graded import States

if TYPE_CHECKING:
    from opdlab.tasks import Task


class Batch:
    """`rollout` (`B` completions of at most `T` tokens), `policies` by name, the `task` with its
    verifier, the `step`.

    `notes`: what a plan wants remembered beside its columns (texts, say); plain JSON data, kept in
    the step's trace.
    """

    def __init__(
        self, rollout: Rollout, policies: Mapping[str, Any], task: Task | None = None, step: int = 0
    ) -> None:
        self.rollout, self.policies, self.task, self.step = rollout, dict(policies), task, step
        self.notes: dict[str, Any] = {}
        self._states: dict[str, States] = {}

    @property
    def distributions(self) -> list[str]:
        """Names of the policies that grade the student's own tokens (so without `.text` and
        `.spans`).
        """
        return [name for name in self.policies if not name.endswith((".text", ".spans"))]

    @property
    def mask(self) -> Tensor:
        """`[B, T]`, true on completion tokens."""
        return self.rollout.mask

    @property
    def token(self) -> Tensor:
        """The completion tokens in a row, `[tokens]`."""
        return self.rollout.ids[self.mask]

    def states(self, name: str) -> States:
        """Hidden states of one policy on the whole rollout, without gradient; computed once.

        A teacher that is no local model gives what its `grade(rollout)` returns.
        """
        if name not in self.policies:
            raise MissingPolicy(
                f"There is no policy {name!r} here; there are {', '.join(self.policies)}. Name it"
                " in the method's `needs`."
            )
        if name not in self._states:
            try:
                with torch.no_grad():
                    states = self.policies[name].grade(self.rollout)
            except TokenizerMismatch as error:
                raise TokenizerMismatch(f"{name!r} cannot grade this rollout. {error}") from None
            check_graded(name, states)
            self._states[name] = states
        return self._states[name]

    def map(self, fn: Callable[[Rows], Any], needs: Sequence[str] | None = None) -> Any:
        """Any function of rows over the whole batch, without gradient and in constant memory.

        `[n, ...]` becomes `[B, T, ...]`, zero in the padding; a dict of tensors becomes a dict.
        `needs` names the distributions that the rows carry (all policies by default).
        """
        states = {name: self.states(name) for name in needs or self.distributions}
        out = compute(fn, states, self.token)
        return (
            {key: self.spread(value) for key, value in out.items()}
            if isinstance(out, Mapping)
            else self.spread(out)
        )

    @cached_property
    def signals(self) -> Signals:
        """Numbers by name, `[B, T]`, computed when asked for:

        `batch.signals["teacher_entropy"]`. See `opdlab.engine.signals.full`.
        """
        return Signals(self.distributions, self.states, self.map)

    @cached_property
    def rewards(self) -> Tensor:
        """The verifier's score of each completion, `[B]`."""
        if self.task is None or self.task.verify is None:
            raise MissingPolicy(
                "This batch has no verifier. Use a task with verify=, or a method that learns from"
                " a teacher."
            )
        return torch.tensor(
            self.task.scores(self.rollout.prompts, self.rollout.texts),
            device=self.rollout.ids.device,
        )

    def flatten(self, values: Tensor) -> Tensor:
        """`[B, T, ...]` to `[tokens, ...]`, rows in order, without the padding."""
        return values[self.mask]

    def spread(self, flat: Tensor) -> Tensor:
        """`[tokens, ...]` to `[B, T, ...]`, zero in the padding."""
        out = flat.new_zeros(*self.mask.shape, *flat.shape[1:])
        out[self.mask] = flat
        return out


def return_to_go(reward: Tensor, mask: Tensor, discount: float) -> Tensor:
    """`sum over s >= t of discount^(s-t) reward_s`, `[B, T] -> [B, T]`: what a token's choice leads
    to.
    """
    out, carry = torch.zeros_like(reward), torch.zeros_like(reward[:, 0])
    for t in reversed(range(reward.shape[1])):
        carry = reward[:, t] * mask[:, t] + discount * carry
        out[:, t] = carry
    return out * mask
