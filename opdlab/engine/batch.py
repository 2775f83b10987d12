"""A rollout under all policies of a method: what `plan` sees, and what the loss pass reads.

Everything is lazy: a method that only asks for rewards runs no model. Batch statistics made here
are over the whole batch, whatever the micro-batches of the loss pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.engine.needs import Access, parse_need
from opdlab.engine.not_finite import check_graded
from opdlab.engine.passes import compute
from opdlab.engine.rows import Rows
from opdlab.engine.signals import Signals
from opdlab.errors import MissingPolicy, TokenizerMismatch
from opdlab.models.graded import Graded


class Judge(Protocol):
    """The part of a task that a batch reads: its verifier, if there is one, and the scores."""

    @property
    def verify(self) -> Callable[[Prompt, str], Any] | None:
        """The verifier; None for none."""
        ...

    def scores(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Score texts by the verifier.

        Args:
            prompts: The prompt of each text.
            texts: The completions, as many.

        Returns:
            One score per text, from 0 to 1.
        """
        ...


class Processes(Protocol):
    """The processes that share a training step."""

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over all processes.

        Args:
            values: A tensor of any shape, the same shape in every process.

        Returns:
            The sum, the same in every process.
        """
        ...

    def gather(self, values: Tensor) -> Tensor:
        """Put the rows `[n, ...]` of all processes together, in the order of their ranks.

        `n` may differ among the processes.

        Args:
            values: `[n, ...]` of this process.

        Returns:
            `[N, ...]`, the same in every process.
        """
        ...


class OneProcess:
    """A step that runs in this process alone."""

    def sum(self, values: Tensor) -> Tensor:
        """Return the values themselves.

        Args:
            values: A tensor of any shape.

        Returns:
            `values`, not a copy.
        """
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Return the values themselves.

        Args:
            values: A tensor `[n, ...]`.

        Returns:
            `values`, not a copy.
        """
        return values


class Batch:
    """A rollout under all policies of a method.

    Args:
        rollout: The completions.
        policies: The policies by name.
        task: The task; None for rollouts of no task.
        step: Number of the training step, from 0.
        processes: The processes that share the step; this one alone by default.

    Attributes:
        rollout: `B` completions of at most `T` tokens.
        policies: The policies that the method reads: graders of the rollout, and writers under
            `….text`.
        task: The task of the prompts, with its verifier; None for rollouts of no task.
        step: Number of the training step, from 0.
        notes: Notes of a plan beside its columns, by name: notes of `opdlab.data.notes`, or plain
            JSON data.
    """

    def __init__(
        self,
        rollout: Rollout,
        policies: Mapping[str, Any],
        task: Judge | None = None,
        step: int = 0,
        processes: Processes | None = None,
    ) -> None:
        self.rollout, self.policies, self.task, self.step = rollout, dict(policies), task, step
        self.notes: dict[str, Any] = {}
        self._processes = processes or OneProcess()
        self._states: dict[str, Graded] = {}

    @property
    def distributions(self) -> list[str]:
        """Names of the policies that grade the student's own tokens.

        These are all policies but `….text` and `….spans`.
        """
        return [name for name in self.policies if parse_need(name).access is Access.LOGITS]

    @property
    def mask(self) -> Tensor:
        """`[B, T]`, true on completion tokens."""
        return self.rollout.mask

    @property
    def learn(self) -> Tensor:
        """`[B, T]`, true on the tokens that the loss sees."""
        return self.rollout.learn

    @property
    def token(self) -> Tensor:
        """The completion tokens in a row, `[tokens]`."""
        return self.rollout.ids[self.mask]

    def states(self, name: str) -> Graded:
        """Let a policy grade the whole rollout, without gradient; computed once.

        Args:
            name: The policy, as in `policies`.

        Returns:
            The policy's hidden states with its head, or a server's top log-probs.

        Raises:
            MissingPolicy: There is no policy of this name.
            TokenizerMismatch: The rollout is written in other tokens than the policy's.
            NonFinite: The policy's log-probs are NaN.
        """
        if name not in self.policies:
            raise MissingPolicy(
                f"There is no policy {name!r} here; there are {', '.join(self.policies)}. Name it"
                " in the method's `needs`."
            )
        if name not in self._states:
            try:
                with torch.no_grad():
                    graded = self.policies[name].grade(self.rollout)
            except TokenizerMismatch as error:
                raise TokenizerMismatch(f"{name!r} cannot grade this rollout. {error}") from None
            check_graded(name, graded)
            self._states[name] = graded
        return self._states[name]

    def map(self, function: Callable[[Rows], Any], needs: Sequence[str] | None = None) -> Any:
        """Run a function of rows over the whole batch, without gradient and in constant memory.

        Args:
            function: Gives `[n, ...]`, or a dict of them, for `n` tokens.
            needs: The distributions that the rows carry; all of the batch by default.

        Returns:
            `[B, T, ...]`, zero in the padding, or a dict of them.
        """
        states = {name: self.states(name) for name in needs or self.distributions}
        out = compute(function, states, self.token)
        if isinstance(out, Mapping):
            return {name: self.spread(values) for name, values in out.items()}
        return self.spread(out)

    @cached_property
    def signals(self) -> Signals:
        """Numbers by name, `[B, T]`, computed when asked for: `batch.signals["teacher_entropy"]`.

        See `opdlab.engine.signals.full` for what there is.
        """
        return Signals(self.distributions, self.states, self.map)

    @cached_property
    def rewards(self) -> Tensor:
        """The verifier's score of each completion, `[B]`.

        Raises:
            MissingPolicy: There is no verifier.
        """
        if self.task is None or self.task.verify is None:
            raise MissingPolicy(
                "This batch has no verifier. Use a task with verify=, or a method that learns from"
                " a teacher."
            )
        return torch.tensor(
            self.task.scores(self.rollout.prompts, self.rollout.texts),
            device=self.rollout.ids.device,
        )

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor of any shape over all processes.

        Args:
            values: A tensor of any shape, the same shape in every process.

        Returns:
            The sum, the same in every process.
        """
        return self._processes.sum(values)

    def gather(self, values: Tensor, where: Tensor | None = None) -> Tensor:
        """Gather the values of the learned tokens of all processes.

        Args:
            values: `[B, T, ...]` of this process.
            where: `[B, T]`, which tokens count; those of `learn` by default.

        Returns:
            `[N, ...]`, the same in every process, for statistics of the whole step: quantiles,
            thresholds, counts.
        """
        return self._processes.gather(values[self.learn if where is None else where])

    def mean(self, values: Tensor, where: Tensor | None = None) -> Tensor:
        """Compute the mean over the learned tokens of all processes; NaN where there are none.

        Args:
            values: `[B, T, ...]` of this process.
            where: `[B, T]`, which tokens count; those of `learn` by default.

        Returns:
            `[...]` in float64, the same in every process.
        """
        chosen = values[self.learn if where is None else where].double()
        count = torch.full_like(chosen.sum(0), len(chosen))
        return self._processes.sum(chosen.sum(0)) / self._processes.sum(count)

    def flatten(self, values: Tensor) -> Tensor:
        """Put the tokens of all completions in a row, without the padding.

        Args:
            values: `[B, T, ...]`.

        Returns:
            `[tokens, ...]`, completion by completion.
        """
        return values[self.mask]

    def spread(self, flat: Tensor) -> Tensor:
        """Put tokens in a row back into their completions: the inverse of `flatten`.

        Args:
            flat: `[tokens, ...]`, completion by completion.

        Returns:
            `[B, T, ...]`, zero in the padding.
        """
        out = flat.new_zeros(*self.mask.shape, *flat.shape[1:])
        out[self.mask] = flat
        return out


def return_to_go(reward: Tensor, mask: Tensor, discount: float) -> Tensor:
    """Sum the rewards from each token on: `sum over s >= t of discount^(s - t) reward_s`.

    Args:
        reward: `[B, T]`.
        mask: `[B, T]`, true on the tokens that count.
        discount: From 0 (the token's own reward) to 1.

    Returns:
        `[B, T]`, zero outside the mask.
    """
    out, carry = torch.zeros_like(reward), torch.zeros_like(reward[:, 0])
    for t in reversed(range(reward.shape[1])):
        carry = reward[:, t] * mask[:, t] + discount * carry
        out[:, t] = carry
    return out * mask
