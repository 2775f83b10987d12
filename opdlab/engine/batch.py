"""A rollout under all policies of a method: what `plan` sees, and what the loss pass reads.

Everything is lazy: a method that only asks for rewards runs no model. Batch statistics made here
are over the whole batch, whatever the micro-batches of the loss pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from opdlab.data.prompt import Prompt, name_of
from opdlab.data.rollout import Rollout
from opdlab.engine.needs import Access, parse_need
from opdlab.engine.not_finite import check_graded
from opdlab.engine.passes import compute
from opdlab.engine.rows import Rows
from opdlab.engine.signals import Signals
from opdlab.errors import BadVerifier, MissingPolicy, OpdlabError, TokenizerMismatch
from opdlab.models.graded import Graded
from opdlab.models.places import seeded
from opdlab.models.policy import as_policy
from opdlab.models.routed import join_graded


class Judge(Protocol):
    """The part of a task that a batch reads: its verifier, if there is one, and the scores."""

    @property
    def verify(self) -> Callable[[Prompt, str], Any] | None:
        """The verifier; None for none."""
        ...

    @property
    def feedback(self) -> Callable[[Prompt, str], Any] | None:
        """Says in words what is wrong with a text; None for none."""
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

    @property
    def index(self) -> int:
        """Number of this process, from 0."""
        ...

    @property
    def count(self) -> int:
        """The number of processes."""
        ...

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
    """A step that runs in this process alone.

    Attributes:
        index: 0.
        count: 1.
    """

    index = 0
    count = 1

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
        row: The number of each completion in the whole step, `[B]`; 0, 1, 2, … by default.
        awaited: By policy, functions that wait for grades of this rollout which are under way.

    Attributes:
        rollout: `B` completions of at most `T` tokens.
        policies: The policies that the method reads: graders of the rollout, and writers under
            `….text`.
        task: The task of the prompts, with its verifier; None for rollouts of no task.
        step: Number of the training step, from 0.
        row: The number of each completion in the whole step, over all processes, `[B]`.
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
        row: Tensor | None = None,
        awaited: Mapping[str, Callable[[], Graded]] | None = None,
    ) -> None:
        self.rollout, self.policies, self.task, self.step = rollout, dict(policies), task, step
        self.notes: dict[str, Any] = {}
        here = rollout.ids.device
        self.row = torch.arange(len(rollout), device=here) if row is None else row.to(here)
        self._processes = processes or OneProcess()
        self._states: dict[str, Graded] = {}
        self._hints: tuple[str | None, ...] | None = None
        self._awaited = awaited or {}

    def with_logp(self, logp: Tensor, entropy: Tensor | None = None) -> Batch:
        """Make the same batch with other log-probs of its sampled tokens.

        Args:
            logp: `[B, T]`, in place of `rollout.logp`.
            entropy: `[B, T]`, in place of `rollout.entropy`, which stays by default.

        Returns:
            A batch that keeps what its policies have graded.
        """
        same = Batch(
            replace(
                self.rollout,
                logp=logp,
                entropy=self.rollout.entropy if entropy is None else entropy,
            ),
            self.policies,
            self.task,
            self.step,
            self._processes,
            self.row,
            self._awaited,
        )
        same._states, same._hints = self._states, self._hints
        return same

    def tell(self, hints: Sequence[str | None]) -> None:
        """Give each completion a hint of its own, in place of its prompt's.

        The policies whose names end with "+hint" read it. A completion without one is graded
        without any.

        Args:
            hints: One hint, or None, for each completion.

        Raises:
            OpdlabError: There is not one for each completion, or a policy has graded already.
        """
        hinted = [name for name in self._states if parse_need(name).hinted]
        if len(hints) != len(self.rollout) or hinted:
            graded = f", and {hinted[0]!r} has graded already" if hinted else ""
            raise OpdlabError(
                f"tell got {len(hints)} hints for {len(self.rollout)} completions{graded}. Give one"
                " hint or None for each, before anything reads a hinted policy."
            )
        self._hints = tuple(hints)

    def feedback(self, prompt: Prompt, text: str) -> str | None:
        """Ask the task what is wrong with a text.

        Args:
            prompt: The question.
            text: The answer.

        Returns:
            The task's words; None where it has none.

        Raises:
            BadVerifier: The task's feedback fails, or is neither a text nor None.
        """
        if self.task is None or self.task.feedback is None:
            return None
        try:
            said = self.task.feedback(prompt, text)
        except Exception as error:
            raise BadVerifier(
                f"The task's feedback failed on prompt {name_of(prompt)}: {type(error).__name__}:"
                f" {error}. Mend it, or let it return None where nothing is to be said."
            ) from error
        if not isinstance(said, str | None):
            raise BadVerifier(
                f"The task's feedback returned a {type(said).__name__} for prompt"
                f" {name_of(prompt)}. Return a text, or None where nothing is to be said."
            )
        return said if said and said.strip() else None

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
                    is_told = self._hints is not None and parse_need(name).hinted
                    graded = self._grade_told(name) if is_told else self._grade(name)
            except TokenizerMismatch as error:
                raise TokenizerMismatch(f"{name!r} cannot grade this rollout. {error}") from None
            check_graded(name, graded)
            self._states[name] = graded
        return self._states[name]

    def _grade(self, name: str) -> Graded:
        if name in self._awaited:
            return self._awaited[name]()
        graded: Graded = self.policies[name].grade(self.rollout)
        return graded

    def _grade_told(self, name: str) -> Graded:
        """Let a hinted policy grade each completion with the hint that `tell` gave it."""
        policy, rollout, hints = self.policies[name], self.rollout, self._hints or ()
        local = as_policy(policy)
        told = [i for i, hint in enumerate(hints) if hint is not None]
        rest = [i for i, hint in enumerate(hints) if hint is None]
        parts, rows = [], []
        if told:
            prompts = tuple(replace(rollout.prompts[i], hint=hints[i]) for i in told)
            parts.append(policy.grade(replace(rollout.select(told), prompts=prompts)))
            rows.append(told)
        if rest:
            plain = policy if local is None else local.without_context()
            parts.append(plain.grade(rollout.select(rest)))
            rows.append(rest)
        return join_graded(parts, rows, rollout)

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
            `[N, ...]`, completion by completion, the same in every process and for any number of
            processes. For statistics of the whole step: quantiles, thresholds, counts.
        """
        where = self.learn if where is None else where
        chosen = self._processes.gather(values[where])
        if self._processes.count == 1:
            return chosen
        rows = self._processes.gather(self.row[:, None].expand_as(where)[where])
        return chosen[rows.argsort(stable=True)]

    def number(self, where: Tensor) -> Tensor:
        """Number some tokens in the order of `gather`, over all processes.

        With it a plan finds its own tokens in what it computed for all of them:

            chosen = decide(batch.gather(values, where))        # [N], all processes
            ours = chosen[batch.number(where)[where]]           # this process's, as values[where]

        Args:
            where: `[B, T]`, which tokens count.

        Returns:
            `[B, T]`, numbers from 0, and -1 elsewhere.
        """
        numbers = self._first(where.sum(1))[:, None] + where.cumsum(1) - 1
        return numbers.masked_fill(~where, -1)

    def largest(self, value: int) -> int:
        """Return the largest of the numbers that the processes have.

        Args:
            value: This process's number.

        Returns:
            The largest, the same in every process.
        """
        return int(self._processes.gather(self.row.new_tensor([value])).max())

    def random(self, seed: int) -> Tensor:
        """Draw a number from 0 to 1 for every token, whatever the number of processes.

        Args:
            seed: The same seed gives the same numbers; it should follow from `step`.

        Returns:
            `[B, T]`, on the CPU's generator and the rollout's device.
        """
        shape = self.largest(int(self.row.max()) + 1), self.largest(self.mask.shape[1])
        drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
        return drawn.to(self.row.device)[self.row, : self.mask.shape[1]]

    def write(
        self, name: str, prompts: Sequence[Prompt], n: int, rows: Sequence[int], **options: Any
    ) -> Any:
        """Let a policy that writes answer prompts of the plan's own, for all processes alike.

        Every process must call it, also with no prompts.

        Args:
            name: The writer, as "teacher.text".
            prompts: The questions of this process, completion by completion.
            n: Texts for each prompt.
            rows: The completion of this process that each question belongs to, in order.
            options: What `Writer.write` takes; `seed` is needed, the same in every process.

        Returns:
            What the writer gives: `n` texts for each prompt. Nothing is asked without prompts.
        """
        counts = torch.bincount(torch.tensor(rows, dtype=torch.long), minlength=len(self.row))
        first = self._first(counts.to(self.row.device)).tolist()
        before = [i - rows.index(row) for i, row in enumerate(rows)]
        if not prompts:
            return []
        writer, seed = self.policies[name], options.pop("seed")
        is_shared = self._processes.count > 1
        places = [first[row] + i for row, i in zip(rows, before, strict=True)]
        random = seeded(writer.write, seed, places if is_shared else None, self._processes.index)
        return writer.write(prompts, n, **options, **random)

    def _first(self, counts: Tensor) -> Tensor:
        """Number things that completions have, `counts [B]` each: the number of each one's first.

        The numbers run over the completions of all processes, in order.
        """
        rows, everyone = self._processes.gather(self.row), self._processes.gather(counts)
        order = rows.argsort()
        before = everyone[order].cumsum(0) - everyone[order]
        return before[torch.searchsorted(rows[order], self.row)]

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
        # A token that does not count takes no time either: what a tool says, and how much, changes
        # no weight.
        carry = torch.where(mask[:, t], reward[:, t] + discount * carry, carry)
        out[:, t] = carry
    return out * mask
