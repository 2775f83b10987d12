"""The exact effect of a method on a student, by its own plan and loss, over every completion.

Nothing here knows a formula of any method. The expected gradient is the sum over all completions of
their probability times the gradient of a training step on them; no gradient runs through the
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
    """Compute the expected gradient of `sum_t loss_t` for the student's logits.

    Each prompt counts once. The plan sees all completions in one batch, so it must give a row what
    it would give that row alone. For a plan that compares rows (group means, quantiles), sum
    `gradient_on` over the batches that may occur.

    Args:
        method: Anything that `as_method` takes.
        policies: Tables by name: "student", and those that the method needs.
        writer: The policy that writes the completions.
        task: For methods that learn from a verifier.

    Returns:
        `[X, S, V]`, like the student's logits.
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
    """Compute the gradient of `sum_b weight_b sum_t loss_bt` on a given rollout.

    That is one training step's plan and loss pass.

    Args:
        method: Anything that `as_method` takes.
        policies: Tables by name.
        rollout: `N` completions.
        weight: `[N]`, one per completion.
        task: For methods that learn from a verifier.

    Returns:
        `[X, S, V]`, like the student's logits.
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
    """Run the loss pass of `gradient_on` and return the engine's own numbers.

    Args:
        method: Anything that `as_method` takes.
        policies: Tables by name.
        rollout: `N` completions.
        weight: `[N]`, one per completion.
        task: For methods that learn from a verifier.

    Returns:
        `loss`, weighted `gradient [tokens, V]` and `grad_norm`, token by token.
    """
    chosen: Any = as_method(method, "exact.gradient")
    planned = run_plan(chosen, Batch(rollout, policies, task))
    return planned.gradient(weight.repeat_interleave(rollout.lengths))


def differences(objective: Callable[[Table], Tensor], table: Table, step: float = 1e-5) -> Tensor:
    """Compute central differences of a number in every logit.

    Args:
        objective: A function of a table.
        table: The table.
        step: Half the distance; the error is about step² and 1e-16 / step.

    Returns:
        `[X, S, V]`.
    """
    out = torch.zeros_like(table.logits).flatten()
    with torch.no_grad():
        for i in range(out.numel()):
            at = torch.tensor([i])
            nudge = torch.zeros_like(out).index_fill(0, at, step).view_as(table.logits)
            above, below = objective(table.add(nudge)), objective(table.add(-nudge))
            out[i] = (above - below) / (2 * step)
    return out.view_as(table.logits)
