"""Placebos: methods and teachers that keep the form of a training signal and drop its content."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from opdlab.data.column import Column
from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.engine.batch import Batch
from opdlab.engine.rows import Rows
from opdlab.errors import PartialDistribution
from opdlab.methods.formulas import POLICY_GRADIENT
from opdlab.methods.policy_gradient import advantage_column, policy_gradient_loss, sampler_column
from opdlab.models.graded import States, TopLogprobs
from opdlab.models.protocols import Checked, Grader
from opdlab.tasks.splits import question_of
from opdlab.tasks.task import Split, Task


@dataclass(frozen=True)
class OwnTexts:
    """Cross-entropy on the texts that the student has just written: SFT without a supervisor.

    Its expected gradient is zero, so it only follows the chance of what was drawn.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    formula: ClassVar[str] = "-student_logp"

    def loss(self, rows: Rows) -> Tensor:
        """Compute the cross-entropy of each token.

        Args:
            rows: A chunk of `n` tokens.

        Returns:
            `[n]`, in nats.
        """
        return -rows.logp


@dataclass(frozen=True)
class SignOnly:
    """Only whether the teacher finds a token likelier than the student does, as +1 or -1.

    Attributes:
        needs: The name of the teacher, as the method that is controlled reads it.
    """

    needs: tuple[str, ...] = ("teacher",)

    formula: ClassVar[str] = POLICY_GRADIENT

    def plan(self, batch: Batch) -> dict[str, Column]:
        """Compute the signs.

        Args:
            batch: The step's rollout under all policies.

        Returns:
            `advantage` and `sampler_logp`, `[B, T]` each.
        """
        (name,) = self.needs

        def grade(rows: Rows) -> Tensor:
            return rows.logp_of(name)

        logp = batch.rollout.logp
        sign = (batch.map(grade, needs=(name,)) - logp).sign()
        return {
            "advantage": advantage_column(sign, "sign of log T(y) − log S(y)", ""),
            "sampler_logp": sampler_column(logp),
        }

    def loss(self, rows: Rows) -> Tensor:
        """Compute the policy-gradient loss.

        Args:
            rows: A chunk of `n` tokens, with the columns of `plan`.

        Returns:
            `[n]`.
        """
        return policy_gradient_loss(rows)


@dataclass(frozen=True, eq=False)
class ShuffledTeacher:
    """A teacher whose grades are those of another completion of the batch, at the same place.

    What depends on the place in a text alone survives, such as the form of an answer. What depends
    on this prompt and this text does not. A token that is alone at its place gets the grade of any
    other token.

    Attributes:
        teacher: The teacher whose grades are given to other completions.
    """

    teacher: Grader
    seed: int = 0

    def grade(self, rollout: Rollout) -> States:
        """Grade a rollout, and exchange the grades.

        Args:
            rollout: The completions.

        Returns:
            The teacher's states in another order; the same one for the same rollout.

        Raises:
            PartialDistribution: The teacher is a server that gives only some log-probs. Those of
                another token do not say how likely this token is.
        """
        graded = self.teacher.grade(rollout)
        if isinstance(graded, TopLogprobs) or not isinstance(graded, States):
            raise PartialDistribution(
                "The arm 'shuffled' needs the teacher's whole distribution, and this one gives some"
                " log-probs. Leave the arm out, or use a local teacher."
            )
        order = exchange(rollout, self.seed)
        return graded.part(order)

    def check(self, student: Any, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Let the teacher check what it must before a run.

        Args:
            student: The policy that trains.
            prompts: Prompts of the run.
            max_new_tokens: Length limit of completions, in tokens.
        """
        if isinstance(self.teacher, Checked):
            self.teacher.check(student, prompts, max_new_tokens)


def exchange(rollout: Rollout, seed: int = 0) -> Tensor:
    """Give each token another one at the same place of another completion.

    Args:
        rollout: The completions.
        seed: Changes the order.

    Returns:
        `[tokens]`, the number of the other token. A token keeps its own number only if there is no
        other.
    """
    mask = rollout.mask.cpu()
    number = torch.full(mask.shape, -1).masked_scatter(mask, torch.arange(int(mask.sum())))
    drawn = int(rollout.ids.sum()) + 1_000_003 * seed  # other texts are exchanged in another order
    generator = torch.Generator().manual_seed(drawn)
    order = number.clone()
    for t in range(mask.shape[1]):
        rows = mask[:, t].nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        order[rows, t] = number[rows.roll(1), t]
    flat = order[mask]
    alone = flat == torch.arange(len(flat))
    flat[alone] = (flat[alone] + len(flat) // 2) % max(1, len(flat))
    return flat.to(rollout.ids.device)


def with_other_hints(task: Task) -> Task:
    """Make the same task with each prompt's hint exchanged for that of another prompt.

    Args:
        task: A task whose prompts have hints.

    Returns:
        A task with the same prompts, answers and verifier.
    """

    def draw(n: int, seed: int, split: Split) -> Iterable[Prompt]:
        # One prompt more than asked for, so that a batch of one has another prompt's hint too.
        return exchange_hints(list(task.draw(n + 1, seed, split)))[:n]

    pool = {split: exchange_hints(list(prompts)) for split, prompts in task.pool.items()}
    return replace(task, draw=draw, pool=pool, name=f"{task.name}, other hints", origin={})


def exchange_hints(prompts: list[Prompt]) -> list[Prompt]:
    """Give each prompt the hint of the next one that asks something else.

    Args:
        prompts: The prompts.

    Returns:
        The prompts with other hints; a prompt keeps its own if all ask the same.
    """
    out = []
    for i, prompt in enumerate(prompts):
        later = (prompts[(i + step) % len(prompts)] for step in range(1, len(prompts)))
        other = next((one for one in later if question_of(one) != question_of(prompt)), prompt)
        out.append(replace(prompt, hint=other.hint))
    return out
