"""The exact effect of a method on a student, by its own plan and loss, over every completion.

Nothing here knows a formula of any method. The expected gradient is the sum over all completions of
their probability times the gradient of a training step on them; no gradient runs through the
sampling, as in training. Central differences of any objective are the other side of the comparison.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opdlab.data.rollout import Rollout
from opdlab.engine.batch import Batch
from opdlab.engine.passes import Pass
from opdlab.engine.planned import run_plan
from opdlab.errors import InvalidValue
from opdlab.exact.comparing import find_compared
from opdlab.exact.laws import law
from opdlab.exact.table import Table, everything
from opdlab.methods.contract import name_of
from opdlab.methods.conversion import as_method
from opdlab.support.validation import Count, validate

if TYPE_CHECKING:
    from opdlab.tasks import Task

LARGEST = 20_000  # batches that are gone through, a plan and a loss pass each


def gradient(
    method: Any,
    policies: Mapping[str, Any],
    *,
    writer: str = "student",
    n: int | None = None,
    task: Task | None = None,
) -> Tensor:
    """Compute the expected gradient of `sum_t loss_t` for the student's logits.

    Each prompt counts once. A plan that compares completions (`batch.mean`, quantiles, the mean
    reward of a group) gives a completion other columns in other batches, so its gradient depends on
    the batch: give `n`.

    Args:
        method: Anything that `as_method` takes.
        policies: Tables by name: "student", and those that the method needs.
        writer: The policy that writes the completions.
        n: Completions of each prompt in a step, drawn independently. The expectation then runs over
            all such batches, `N^n` for one prompt with `N` possible completions, and a completion's
            `sum_t loss_t` counts 1 / n. None runs the plan once, on every completion together.
        task: For methods that learn from a verifier.

    Returns:
        `[X, S, V]`, like the student's logits.

    Raises:
        InvalidValue: The plan compares completions and `n` is not given, or there are too many
            batches.
    """
    by: Table = policies[writer]
    rollout = everything(by.prompts, by.vocab, by.length, eos=by.eos, by=by)
    chance = law(by, rollout).detach()
    if n is not None:
        return _over_batches(method, policies, rollout, chance, n, task)
    chosen: Any = as_method(method, "exact.gradient")
    _check_plan(chosen, policies, rollout, task)
    return gradient_on(chosen, policies, rollout, chance, task=task)


def _over_batches(
    method: Any,
    policies: Mapping[str, Any],
    rollout: Rollout,
    chance: Tensor,
    n: int,
    task: Task | None,
) -> Tensor:
    """The expected gradient over all batches of `n` completions of each prompt."""
    n = validate("exact.gradient", {"n": n}, {"n": Count})["n"]
    each = rollout.n  # completions that a prompt may get
    prompts = len(rollout) // each
    if each ** (n * prompts) > LARGEST:
        raise InvalidValue(
            f"exact.gradient got n={n} for {prompts} prompts with {each} completions each, which"
            f" makes {each}^{n * prompts} batches; at most {LARGEST} are gone through. Use fewer"
            " tokens, shorter texts or one prompt."
        )
    groups = [itertools.product(range(x * each, (x + 1) * each), repeat=n) for x in range(prompts)]
    total = torch.zeros_like(policies["student"].logits)
    for batch in itertools.product(*groups):
        rows = list(itertools.chain(*batch))
        weight = (chance[rows].prod() / n).expand(len(rows))
        part = replace(rollout.select(rows), n=n)
        total += gradient_on(method, policies, part, weight, task=task)
    return total


def _check_plan(
    method: Any, policies: Mapping[str, Any], rollout: Rollout, task: Task | None
) -> None:
    """Refuse a plan that gives a completion other columns beside other completions."""
    column = find_compared(method, policies, rollout, task)
    if column is None:
        return
    raise InvalidValue(
        f"exact.gradient got {name_of(method)}, whose plan compares completions: the column"
        f" {column!r} of a text is another beside other texts. So its gradient depends on the"
        " batch. Give n=2 (or more), the completions of each prompt in a step, to take the"
        " expectation over all such batches; exact.gradient_on has the gradient of one batch."
    )


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
