"""The first steps of every diagnosis: the student's texts, and numbers of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor

from opdlab.data.prompt import Prompt, expect_prompts
from opdlab.data.rollout import Rollout
from opdlab.engine.batch import Batch
from opdlab.engine.passes import compute
from opdlab.engine.rows import Rows
from opdlab.errors import EmptyPrompts, OpdlabError
from opdlab.models.policy import as_policy
from opdlab.models.protocols import Grader, Sampler
from opdlab.models.same_tokens import check_same_tokens
from opdlab.support.validation import Count, validate
from opdlab.tasks import Task
from opdlab.tasks.task import Split


def choose_prompts(
    task: Task | None, prompts: int | Sequence[Prompt], seed: int, split: Split = "test"
) -> list[Prompt]:
    """Return the prompts themselves, or that many of the task's.

    A task that holds out fewer prompts gives all of them.

    Args:
        task: Where prompts come from; it may be None if `prompts` is a list.
        prompts: The prompts, or how many of the task's.
        seed: Decides which of the task's prompts are drawn.
        split: The split that the task's prompts are from.

    Returns:
        The prompts.

    Raises:
        InvalidValue: `prompts` is neither a number nor a list of prompts.
        EmptyPrompts: It is a list without prompts.
        OpdlabError: It is a number, and there is no task.
    """
    if isinstance(prompts, (Prompt, Iterable)):
        given = expect_prompts(prompts, "A diagnosis")
        if not given:
            raise EmptyPrompts("A diagnosis got no prompts. Give some, or a number of the task's.")
        return given
    count: int = validate("A diagnosis", {"prompts": prompts}, {"prompts": Count})["prompts"]
    if task is None:
        raise OpdlabError(
            "There is nothing to ask the student. Give a task, prompts=[…] or a rollout."
        )
    return task.prompts(count, seed, split)


def write_rollout(
    policy: Sampler,
    task: Task | None,
    prompts: int | Sequence[Prompt],
    n: int,
    seed: int,
    split: Split = "test",
    max_new_tokens: int | None = None,
) -> Rollout:
    """Write completions of each prompt at temperature 1.

    Args:
        policy: The policy that writes.
        task: Where prompts come from; it may be None if `prompts` is a list.
        prompts: The prompts, or how many of the task's.
        n: Completions of each prompt.
        seed: Seed of prompts and texts.
        split: The split that the task's prompts are from.
        max_new_tokens: Length limit of a text; by default the task's number, or 64 without a task.

    Returns:
        The texts, those of one prompt next to each other.
    """
    length = max_new_tokens or (task.max_new_tokens if task else 64)
    asked = choose_prompts(task, prompts, seed, split)
    turns = task.sample_options if task else {}
    return policy.sample(asked, n, max_new_tokens=length, seed=seed, **turns)


def measure_tokens(
    rollout: Rollout,
    measure: Callable[[Rows], Mapping[str, Tensor]],
    graders: Mapping[str, Grader],
) -> dict[str, np.ndarray]:
    """Run a function on the rows of all graders, in constant memory.

    Args:
        rollout: The student's texts.
        measure: Gives numbers `[n]` by name for `n` tokens.
        graders: The graders by name, the student first.

    Returns:
        The numbers of every token, `[tokens]` each.

    Raises:
        TokenizerMismatch: A policy has other tokens than the student. No model has run then.
        OpdlabError: The rollout has no tokens.
    """
    if not rollout.tokens:
        raise OpdlabError(
            f"None of the {len(rollout)} completions has a token to grade. Allow more tokens, or"
            " mend the student first."
        )
    student = as_policy(next(iter(graders.values())))
    for name, grader in graders.items():
        policy = as_policy(grader)
        if student is not None and policy is not None:
            check_same_tokens(student, policy, name)
    batch = Batch(rollout, graders)
    out = compute(measure, {name: batch.states(name) for name in graders}, batch.token)
    return {name: column.cpu().numpy() for name, column in out.items()}
