"""The texts of a step, which may have been written before it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from opdlab.data.rollout import Rollout
from opdlab.models.graded import Graded


@dataclass(frozen=True)
class Written:
    """Texts of a step, and when they were written.

    Attributes:
        step: Number of the step that they are for, from 0.
        updates: Updates that the student had made when it wrote them.
        rollout: The texts of this process.
        everyone: Those of all processes, in the order of the step, which checkpoints hold; without
            `generate_ahead` those of this process.
        grades: The grades that servers are at work on, by policy.
    """

    step: int
    updates: int
    rollout: Rollout
    everyone: Rollout
    grades: dict[str, Future[Graded]] = field(default_factory=dict)
