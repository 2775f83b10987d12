"""One update of a run, with everything that was written and computed in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from opdlab.data.rollout import Rollout
from opdlab.data.trace import Trace
from opdlab.engine.planned import Planned
from opdlab.engine.recording import record_trace
from opdlab.methods.formulas import formula_of
from opdlab.training.processes import AcceleratedProcesses, gather_trace
from opdlab.training.resolution import grader_names
from opdlab.training.sampler_gap import DESCRIPTIONS


@dataclass(frozen=True, eq=False)
class Step:
    """One update.

    Attributes:
        number: The step, from 1.
        metrics: Means and counts over the whole step, by name.
        planned: The batch with what the method planned for it.
        columns: `loss`, `grad_norm` (the length of d loss / d hidden) and further numbers of every
            token, `[tokens]` each; with `Settings.trace_k` also the top tokens, `[tokens, S]`.
        processes: The processes that share the step; None for this one alone.
    """

    number: int
    metrics: dict[str, float]
    planned: Planned = field(repr=False)
    columns: dict[str, Tensor] = field(repr=False)
    processes: AcceleratedProcesses | None = field(default=None, repr=False)

    @property
    def rollout(self) -> Rollout:
        """The completions of this process."""
        return self.planned.batch.rollout

    @property
    def plan(self) -> dict[str, Tensor]:
        """The plan's columns, `[tokens, ...]` each."""
        return self.planned.columns

    @property
    def notes(self) -> dict[str, Any]:
        """The plan's notes, as plain JSON data."""
        return self.planned.notes

    @property
    def policies(self) -> dict[str, Any]:
        """The policies that the method reads, by name: graders and writers."""
        return self.planned.batch.policies

    def trace(self) -> Trace:
        """Make a `Trace` of the step's tokens, those of this process.

        With `Settings.trace_k` it has the top tokens of every policy and the slopes of the loss on
        them, from before the update; else it has none. `opdlab.score` on `step.rollout` has top
        tokens for the weights of now, which give other losses than the step had.

        Returns:
            The trace, with the columns and notes of the method's plan.
        """
        graders = {name: self.policies[name] for name in grader_names(self.policies)}
        return record_trace(
            self.rollout,
            graders,
            self.columns,
            step=self.number,
            planned=self.planned,
            described={name: DESCRIPTIONS[name] for name in DESCRIPTIONS if name in self.columns},
            formula=formula_of(self.planned.method, [*self.columns, *self.planned.columns]),
        )

    def gather_trace(self) -> Trace:
        """Make a `Trace` of the step's tokens in all processes.

        Every process must call it, since they send each other their parts.

        Returns:
            The trace of the whole step, the same in every process.
        """
        trace = self.trace()
        if self.processes is None:
            return trace
        return gather_trace(trace, self.planned.batch.row, self.processes)

    def __repr__(self) -> str:
        said = ", ".join(
            f"{name} {value:.3g}" for name, value in self.metrics.items() if name != "step"
        )
        return f"Step({self.number}: {said})"
