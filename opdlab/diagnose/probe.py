"""What all diagnoses begin with: text that the student wrote, graded token by token under some
policies.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from opdlab.data.prompt import Prompt, expect_prompts
from opdlab.data.rollout import Rollout
from opdlab.engine.batch import Batch
from opdlab.engine.passes import compute
from opdlab.engine.rows import Rows
from opdlab.errors import OpdlabError
from opdlab.models.policy import Policy
from opdlab.models.same_tokens import check_same_tokens
from opdlab.support.validation import Count, validate
from opdlab.tasks import Task
from opdlab.tasks.task import Split

ALL = "all"  # the row of a table that counts every token, whatever its type


def ask(
    task: Task | None, prompts: int | Sequence[Prompt], seed: int, split: Split = "test"
) -> list[Prompt]:
    """The prompts themselves, or that many of the task's (all of them, where it holds out fewer).

    Raises:
        InvalidValue: `prompts` is neither a number nor a list of prompts.
    """
    if isinstance(prompts, (Prompt, Iterable)):
        return expect_prompts(prompts, "A diagnosis")
    count: int = validate("A diagnosis", {"prompts": prompts}, {"prompts": Count})["prompts"]
    if task is None:
        raise OpdlabError(
            "There is nothing to ask the student. Give a task, prompts=[…] or a rollout."
        )
    return task.prompts(count, seed, split)


def write(
    policy: Any,
    task: Task | None,
    prompts: int | Sequence[Prompt],
    n: int,
    seed: int,
    split: Split = "test",
    max_new_tokens: int | None = None,
) -> Rollout:
    """`n` completions a prompt at temperature 1, of the task's length unless told otherwise (64
    without a task).
    """
    length = max_new_tokens or (task.max_new_tokens if task else 64)
    return policy.sample(ask(task, prompts, seed, split), n, max_new_tokens=length, seed=seed)


def grade(
    rollout: Rollout, fn: Callable[[Rows], Mapping[str, Tensor]], policies: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Per-token numbers `[tokens]` of `fn` on the rows of all `policies` (the first is the
    student), in constant memory.

    Raises TokenizerMismatch before any model runs, and OpdlabError for a rollout without tokens.
    """
    if not rollout.tokens:
        raise OpdlabError(
            f"None of the {len(rollout)} completions has a token to grade. Allow more tokens, or"
            " mend the student first."
        )
    student = next(iter(policies.values()))
    for name, policy in policies.items():
        if isinstance(policy, Policy):
            check_same_tokens(student, policy, name)
    batch = Batch(rollout, policies)
    out = compute(fn, {name: batch.states(name) for name in policies}, batch.token)
    return {name: column.cpu().numpy() for name, column in out.items()}


def frame(
    rollout: Rollout, columns: Mapping[str, Any], task: Task | None = None, tokenizer: Any = None
) -> pd.DataFrame:
    """One row a token:

    `sample`, `position`, `token_id`, the `type` where the task knows it ("all" elsewhere), and the
    columns.
    """
    lengths = rollout.lengths.tolist()
    types = (
        task.token_types(rollout, tokenizer)
        if task is not None and task.types is not None
        else [[ALL] * n for n in lengths]
    )
    return pd.DataFrame(
        {
            "sample": np.repeat(np.arange(len(lengths)), lengths),
            "position": np.concatenate([np.arange(n) for n in lengths]),
            "token_id": rollout.ids[rollout.mask].cpu().numpy(),
            "type": [name for row in types for name in row],
            **columns,
        }
    )


def by_type(tokens: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Means of the columns over all tokens and by type, the commonest type first, with the count in
    `tokens`.
    """
    parts = [(ALL, tokens), *((name, part) for name, part in tokens.groupby("type") if name != ALL)]
    rows = {name: {"tokens": len(part), **part[list(columns)].mean()} for name, part in parts}
    return (
        pd.DataFrame.from_dict(rows, orient="index")
        .astype({"tokens": int})
        .sort_values("tokens", ascending=False, kind="stable")
    )


def render(sentence: str, table: pd.DataFrame) -> str:
    """A result for a notebook: everything that came from a model or a file is escaped."""
    return f"<p>{html.escape(sentence)}</p>{table.to_html(escape=True, float_format=_number, max_rows=40)}"


def _number(x: float) -> str:
    """Three digits, without powers of ten."""
    if abs(x) < 5e-4:
        return "0"
    return f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"
