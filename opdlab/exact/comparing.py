"""Find out whether a plan compares completions: whether a column depends on the batch around it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opdlab.data.rollout import Rollout
from opdlab.engine.batch import Batch
from opdlab.engine.needs import Access, parse_need
from opdlab.engine.planned import Planned, run_plan
from opdlab.errors import OpdlabError

if TYPE_CHECKING:
    from opdlab.tasks import Task

ALONE = 4  # completions that are planned for alone


def find_compared(
    method: Any, policies: Mapping[str, Any], rollout: Rollout, task: Task | None = None
) -> str | None:
    """Find a column that a plan makes differently when other completions stand beside one.

    The plan runs on all completions, on every second one, and on a few alone. Texts that a plan
    asks a teacher for are drawn anew each time, so such a plan is not asked.

    Args:
        method: The method.
        policies: Tables by name.
        rollout: Completions to plan for.
        task: For methods that learn from a verifier.

    Returns:
        The name of the first such column; None if there is none, and for methods without a plan
        or with a teacher that writes.
    """
    writes = any(parse_need(name).access is Access.TEXT for name in method.needs)
    if not hasattr(method, "plan") or writes or len(rollout) < 2:
        return None
    last = len(rollout) - 1
    alone = sorted({round(i * last / (ALONE - 1)) for i in range(ALONE)})
    parts = [range(0, len(rollout), 2), range(1, len(rollout), 2), *([i] for i in alone)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parts of a batch, which no training step sees
        whole = run_plan(method, Batch(rollout, policies, task))
        for rows in parts if whole.columns else []:
            column = _differs(whole, list(rows))
            if column is not None:
                return column
    return None


def _differs(whole: Planned, rows: Sequence[int]) -> str | None:
    """The first column that is another if the batch holds these completions only."""
    batch = whole.batch
    part = Batch(
        batch.rollout.select(rows), batch.policies, batch.task, row=torch.tensor(list(rows))
    )
    try:
        found = run_plan(whole.method, part).columns
    except OpdlabError:  # as of a group mean, which takes the whole group
        return next(iter(whole.columns))
    tokens = whole.tokens_of(rows)
    for name, column in whole.columns.items():
        if not _is_same(column[tokens], found[name]):
            return name
    return None


def _is_same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return torch.allclose(one.double(), other.double(), rtol=1e-6, atol=1e-9, equal_nan=True)
