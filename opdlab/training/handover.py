"""Bring the student's weights to the sampler of a run.

Weights are handed over right before they are needed: after an update, when the next texts are to be
written. So a sampler that fails stops a run between two steps, with everything kept, and the run
can go on in the same process or be resumed.
"""

from __future__ import annotations

from opdlab.models.policy import Policy
from opdlab.models.protocols import StudentSampler

# Who used a sampler last, by its identity: a run, or an evaluation. Two runs may take turns.
_OWNERS: dict[int, object] = {}


class Handover:
    """The weights that a sampler holds, from the side of one run.

    Args:
        sampler: The sampler.

    Attributes:
        sampler: The sampler.
    """

    def __init__(self, sampler: StudentSampler) -> None:
        self.sampler = sampler
        self._token = object()
        self._held = -1

    def bring(self, student: Policy, step: int) -> StudentSampler:
        """Let the sampler hold the student as it is after `step` updates.

        Args:
            student: The policy that learns.
            step: Number of updates done.

        Returns:
            The sampler, ready to write.
        """
        if _OWNERS.get(id(self.sampler)) is not self._token:
            _OWNERS.pop(id(self.sampler), None)  # if this fails, nobody's weights are in place
            self.sampler.start(student)
            _OWNERS[id(self.sampler)] = self._token
        elif self._held != step:
            self.sampler.update(student, step)
        self._held = step
        return self.sampler
