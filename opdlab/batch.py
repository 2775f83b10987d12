"""A rollout under all policies of a method: what `plan` sees, and where the loss pass takes its states from.

Everything is lazy: a method that only asks for rewards runs no model. Batch statistics made here are over the whole
batch, whatever the micro-batches of the loss pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opdlab.columns import flatten, run_plan
from opdlab.errors import MissingPolicy, PartialDistribution
from opdlab.not_finite import check_graded
from opdlab.partial import Partial
from opdlab.policy import Policy, Prompt
from opdlab.rollout import Rollout, sample
from opdlab.rows import Rows, States, compute
from opdlab.same_tokens import check_written_with
from opdlab.signals import Signals

if TYPE_CHECKING:
    from opdlab.tasks import Task


class Batch:
    """`rollout` (`B` completions of at most `T` tokens), `policies` by name, the `task` with its verifier, the `step`.

    `notes`: what a plan wants remembered beside its columns (texts, say); plain JSON data, kept in the step's trace.
    """

    def __init__(self, rollout: Rollout, policies: Mapping[str, Any], task: Task | None = None, step: int = 0) -> None:
        self.rollout, self.policies, self.task, self.step = rollout, dict(policies), task, step
        self.notes: dict[str, Any] = {}
        self._states: dict[str, States] = {}

    @property
    def distributions(self) -> list[str]:
        """Names of the policies that grade the student's own tokens (so without `.text` and `.spans`)."""
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
        """Hidden states of one policy on the whole rollout, without gradient; computed once. A teacher that is no local
        model gives what its `grade(rollout)` returns."""
        if name not in self.policies:
            raise MissingPolicy(f"There is no policy {name!r} here; there are {', '.join(self.policies)}. Name it in the method's `needs`.")
        if name not in self._states:
            with torch.no_grad():
                policy: Any = self.policies[name]
                local = isinstance(policy, Policy)
                if local:
                    check_written_with(policy, self.rollout, name)
                states = States(policy.hidden(self.rollout), policy.head) if local else policy.grade(self.rollout)
                check_graded(name, states)
                self._states[name] = states
        return self._states[name]

    def map(self, fn: Callable[[Rows], Any], needs: Sequence[str] | None = None) -> Any:
        """Any function of rows over the whole batch, without gradient and in constant memory.

        `[n, ...]` becomes `[B, T, ...]`, zero in the padding; a dict of tensors becomes a dict. `needs` names the
        distributions that the rows carry (all policies by default).
        """
        states = {name: self.states(name) for name in needs or self.distributions}
        out = compute(fn, states, self.token)
        return {key: self.spread(value) for key, value in out.items()} if isinstance(out, Mapping) else self.spread(out)

    @cached_property
    def signals(self) -> Signals:
        """Numbers by name, `[B, T]`, computed when asked for: `batch.signals["teacher_entropy"]`. See `opdlab.signals.full`."""
        return Signals(self)

    @cached_property
    def rewards(self) -> Tensor:
        """The verifier's score of each completion, `[B]`."""
        if self.task is None or self.task.verify is None:
            raise MissingPolicy("This batch has no verifier. Use a task with verify=, or a method that learns from a teacher.")
        return torch.tensor(self.task.scores(self.rollout.prompts, self.rollout.texts), device=self.rollout.ids.device)

    def spread(self, flat: Tensor) -> Tensor:
        """`[tokens, ...]` to `[B, T, ...]`, zero in the padding."""
        out = flat.new_zeros(*self.mask.shape, *flat.shape[1:])
        out[self.mask] = flat
        return out

    def flat(self, name: str, column: Any) -> Tensor:
        """A plan's column as `[tokens, ...]`; see `opdlab.columns` for what it may be."""
        return flatten(self, name, column)


def return_to_go(reward: Tensor, mask: Tensor, discount: float) -> Tensor:
    """`sum over s >= t of discount^(s-t) reward_s`, `[B, T] -> [B, T]`: what a token's choice leads to."""
    out, carry = torch.zeros_like(reward), torch.zeros_like(reward[:, 0])
    for t in reversed(range(reward.shape[1])):
        carry = reward[:, t] * mask[:, t] + discount * carry
        out[:, t] = carry
    return out * mask


def rehearse(method: Any, policies: Mapping[str, Any], task: Task, prompt: Prompt) -> None:
    """Plan and loss once on two tokens, with made-up log-probs of the teachers that give only some (they have a `k`).

    So a loss that they cannot feed is refused before anything is written. Raises PartialDistribution; what else goes wrong on
    made-up data is left to the first step.
    """
    if not any(hasattr(policy, "k") for policy in policies.values()):
        return
    student = policies["student"]
    made = {name: policy if isinstance(policy, Policy) else _Made(policy, student) for name, policy in policies.items()}
    try:
        batch = Batch(sample(student, [prompt], max_new_tokens=2), made, task)
        columns = run_plan(method, batch)
        states = {name: batch.states(name) for name in batch.distributions}
        compute(lambda rows: method.loss(rows).detach(), states, batch.token, columns)
    except PartialDistribution:
        raise
    except Exception:
        return


class _Made:
    """Stands for a served teacher in a rehearsal: uniform log-probs, no texts, no requests."""

    def __init__(self, teacher: Any, student: Policy) -> None:
        self.vocab = student.weights.vocab_size
        self.k = min(getattr(teacher, "k", self.vocab), self.vocab)

    def grade(self, rollout: Rollout) -> Partial:
        n, logp = rollout.tokens, -math.log(self.vocab)
        token = rollout.ids[rollout.mask]
        ids = torch.arange(self.k, device=token.device).expand(n, self.k)
        return Partial(
            ids, torch.full_like(ids, logp, dtype=torch.float32), torch.full_like(token, logp, dtype=torch.float32), token, self.vocab
        )
