"""One update of a run, with everything that was written and computed in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from opdlab.data.rollout import Rollout
from opdlab.data.trace import Trace
from opdlab.engine.scoring import record_trace
from opdlab.training.resolution import grader_names


@dataclass(frozen=True, eq=False)
class Step:
    """One update: its number (from 1), its `metrics`, what was written, and every token's numbers
    and plan columns.
    """

    number: int
    metrics: dict[str, float]
    rollout: Rollout
    columns: dict[str, Tensor]
    plan: dict[str, Tensor]
    policies: dict[str, Any] = field(repr=False)
    notes: dict[str, Any] = field(default_factory=dict, repr=False)
    planner: dict[str, str] = field(default_factory=dict, repr=False)

    def trace(self) -> Trace:
        """The step's tokens as a `Trace`; without top tokens (`opdlab.score` on `step.rollout` adds
        them).
        """
        graded = {name: self.policies[name] for name in grader_names(self.policies)}
        return record_trace(
            self.rollout,
            graded,
            self.columns,
            step=self.number,
            plan=self.plan,
            notes=self.notes,
            method=self.planner,
        )

    def __repr__(self) -> str:
        return (
            f"Step({self.number}: "
            + ", ".join(f"{k} {v:.3g}" for k, v in self.metrics.items() if k != "step")
            + ")"
        )
