"""What a method really does to a student, exactly: its own plan and loss, through the engine, over
every completion.

Nothing here knows a formula of any method. The expected gradient is the sum over all completions of
their probability times what a training step would do with them; no gradient runs through the
sampling, as in training. Central differences of any objective are the other side of the comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opdlab.data.rollout import Rollout
from opdlab.engine.batch import Batch
from opdlab.engine.passes import Pass
from opdlab.engine.planned import run_plan
from opdlab.exact.laws import law
from opdlab.exact.table import Table, everything
from opdlab.methods.conversion import as_method

if TYPE_CHECKING:
    from opdlab.tasks import Task


def gradient(
    method: Any, policies: Mapping[str, Any], *, writer: str = "student", task: Task | None = None
) -> Tensor:
    """The expected gradient `[X, S, V]` for the student's logits of `sum_t loss_t`, a completion
    being written by `writer`.

    policies: tables by name (`student`, and what the method needs). Each prompt counts once. The
        plan sees all completions
    in one batch, so it must give a row what it would give that row alone: for a plan that compares
    rows (group means, quantiles), sum `gradient_on` over the batches that may occur.
    """
    by: Table = policies[writer]
    rollout = everything(by.prompts, by.vocab, by.length, eos=by.eos, by=by)
    return gradient_on(method, policies, rollout, law(by, rollout).detach(), task=task)


def gradient_on(
    method: Any,
    policies: Mapping[str, Any],
    rollout: Rollout,
    weight: Tensor,
    *,
    task: Task | None = None,
) -> Tensor:
    """Gradient `[X, S, V]` of `sum_b weight_b sum_t loss_bt` on a given rollout: one training
    step's plan and loss pass.

    weight: `[N]`, one a completion. A bare loss function is a method without a plan, a class is
        made with its defaults.
    """
    student: Table = policies["student"]
    flat = loss_pass(method, policies, rollout, weight, task=task).gradient
    return torch.zeros_like(student.logits).index_put_(
        student.where(rollout), flat, accumulate=True
    )


def loss_pass(
    method: Any,
    policies: Mapping[str, Any],
    rollout: Rollout,
    weight: Tensor,
    *,
    task: Task | None = None,
) -> Pass:
    """The engine's own numbers for `gradient_on`, token by token:

    `loss`, weighted `gradient [tokens, V]`, `grad_norm`.
    """
    chosen: Any = as_method(method, "exact.gradient")
    planned = run_plan(chosen, Batch(rollout, policies, task))
    return planned.gradient(weight.repeat_interleave(rollout.lengths))


def differences(objective: Callable[[Table], Tensor], table: Table, step: float = 1e-5) -> Tensor:
    """Central differences of a number in every logit, `[X, S, V]`; the error is about step² (and
    1e-16 / step).
    """
    out = torch.zeros_like(table.logits).flatten()
    with torch.no_grad():
        for i in range(out.numel()):
            nudge = (
                torch.zeros_like(out).index_fill(0, torch.tensor([i]), step).view_as(table.logits)
            )
            out[i] = (objective(table.moved(nudge)) - objective(table.moved(-nudge))) / (2 * step)
    return out.view_as(table.logits)
