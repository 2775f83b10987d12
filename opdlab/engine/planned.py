"""A batch that a method has planned for, and the loss pass on it.

The order is the same everywhere (training, rehearsal, exact gradients, the TRL bridge): the method
plans on the whole batch, the policies grade it, the loss runs on the tokens.

    planned = run_plan(method, batch)
    result = planned.gradient(weight)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opdlab.data.column import Column, Description
from opdlab.data.notes import Note
from opdlab.engine.batch import Batch
from opdlab.engine.closed_form import closed_form_of
from opdlab.engine.columns import flatten, is_same, plain_data
from opdlab.engine.loss_contract import adding_note, call_loss
from opdlab.engine.passes import Pass, Slopes, compute, gradient
from opdlab.engine.rows import Rows
from opdlab.errors import BadPlan
from opdlab.models.graded import Graded, States
from opdlab.support.expect import shortened


@dataclass(frozen=True, eq=False)
class Planned:
    """A batch with what a method's plan said about it.

    Attributes:
        method: The method.
        batch: The batch that it planned for.
        columns: The plan's columns by name, `[tokens, ...]` each.
        descriptions: The descriptions of the plan's `Column`s, by name.
        notes: The notes that the plan left in `batch.notes`, as plain JSON data.
    """

    method: Any
    batch: Batch
    columns: dict[str, Tensor]
    descriptions: dict[str, Description]
    notes: dict[str, Any]

    def compute(self, function: Callable[[Rows], Any]) -> Any:
        """Run a function of rows, with the plan's columns, over all tokens without gradient.

        Args:
            function: Gives `[n, ...]`, or a dict of them, for the rows of `n` tokens.

        Returns:
            `[tokens, ...]`, or a dict of them.
        """
        states = {name: self.batch.states(name) for name in self.batch.distributions}
        return compute(function, states, self.batch.token, self.columns)

    def losses(self) -> Tensor:
        """Compute the loss of every token without training, under the contract of training.

        Returns:
            `[tokens]`; zero where the loss does not see the token.

        Raises:
            BadLoss: The loss does not keep its contract.
        """
        loss = self.method.loss

        def call(rows: Rows) -> Tensor:
            leaf = rows["student"].detach().clone().requires_grad_()
            distributions = {**rows.distributions, "student": leaf}
            with torch.enable_grad():
                return call_loss(loss, Rows(distributions, rows.token, rows.columns)).detach()

        losses: Tensor = self.compute(call)
        return torch.where(self.batch.rollout.learned, losses, 0.0)

    def tokens_of(self, rows: Sequence[int]) -> slice | Tensor:
        """Find the tokens of some completions among all tokens of the batch.

        Args:
            rows: Numbers of completions.

        Returns:
            A slice where the completions stand side by side, else indices.
        """
        ends = self.batch.rollout.lengths.cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        if isinstance(rows, range) and rows.step == 1 and len(rows):
            return slice(starts[rows[0]], ends[rows[-1]])
        index = [i for row in rows for i in range(starts[row], ends[row])]
        return torch.tensor(index, dtype=torch.long, device=self.batch.rollout.ids.device)

    def gradient(
        self,
        weight: Tensor,
        *,
        student: States | None = None,
        rows: Sequence[int] | None = None,
        watch: Callable[[Rows], dict[str, Tensor]] | None = None,
        check: bool = True,
        slopes: Slopes | None = None,
    ) -> Pass:
        """Loss and gradient of some completions, over the tokens that the loss sees.

        Args:
            weight: `[tokens]`, each token's share of the mean, for all tokens of the batch.
            student: The student's states on these completions, which carry its gradient; those of
                the batch by default.
            rows: The completions to use, in this order; all by default.
            watch: Numbers to note in the same pass, on detached rows.
            check: Whether to check that the loss treats each row alone (see
                `opdlab.engine.passes.gradient`).
            slopes: Numbers to keep of the gradient of each token's own loss (see there).

        Returns:
            Loss, gradient and numbers of every token of these completions. Tokens that the loss
            does not see have a loss and a gradient of zero.
        """
        rollout = self.batch.rollout
        piece = self.tokens_of(range(len(rollout)) if rows is None else rows)
        states: dict[str, Graded] = {}
        for name in self.batch.distributions:
            if name == "student" and student is not None:
                states[name] = student
            else:
                states[name] = self.batch.states(name).part(piece)
        columns = {name: column[piece] for name, column in self.columns.items()}
        token, learned = self.batch.token[piece], rollout.learned[piece]
        weight = weight[piece]
        index = None if bool(learned.all()) else learned.nonzero()[:, 0]
        if index is not None:
            states = {name: graded.part(index) for name, graded in states.items()}
            columns = {name: column[index] for name, column in columns.items()}
            token, weight = token[index], weight[index]
        found = gradient(
            self.method.loss,
            states,
            token,
            weight,
            columns,
            watch=watch,
            check=check,
            slopes=slopes,
            closed_form=closed_form_of(self.method),
        )
        return found if index is None else found.spread(index, len(learned))


def run_plan(method: Any, batch: Batch) -> Planned:
    """Let a method plan for a batch.

    Args:
        method: With or without a `plan`.
        batch: The batch that the plan sees.

    Returns:
        The batch with the plan's columns, their descriptions and notes; a method without a plan has
        none.

    Raises:
        BadPlan: The plan returned something else than columns, or changed the rollout.
    """
    if not hasattr(method, "plan"):
        return Planned(method, batch, {}, {}, {})
    rollout = batch.rollout
    tensors = ("ids", "lengths", "logp", "entropy", "learn", "turn")
    before = {name: getattr(rollout, name).clone() for name in tensors}
    with adding_note(f"Raised by the plan of {type(method).__name__} in step {batch.step + 1}."):
        plan = method.plan(batch)
    changed = [
        name for name, tensor in before.items() if not is_same(tensor, getattr(rollout, name))
    ]
    if changed or batch.rollout is not rollout:
        raise BadPlan(
            f"plan changed batch.rollout{f'.{changed[0]}' if changed else ''}, which the loss, the"
            " rewards and the trace read too. Work on a copy, such as batch.rollout.ids.clone(),"
            " and return what you computed as a column."
        )
    if not isinstance(plan, Mapping):
        raise BadPlan(
            f"plan returned {shortened(plan) if not isinstance(plan, Tensor) else 'a tensor'}."
            " Return columns by name, such as {'advantage': tensor}, or {} for none."
        )
    notes = {str(name): _stored(note, str(name)) for name, note in batch.notes.items()}
    needs = getattr(method, "needs", ())
    # A batch may hold more policies than the trace has.
    graded = ["student", *([needs] if isinstance(needs, str) else needs)]
    columns = {name: flatten(batch, name, column, graded) for name, column in plan.items()}
    said = {name: column.description for name, column in plan.items() if isinstance(column, Column)}
    return Planned(method, batch, columns, said, notes)


def _stored(note: Any, name: str) -> Any:
    """A note as plain JSON data."""
    return plain_data(note.as_json() if isinstance(note, Note) else note, name)
