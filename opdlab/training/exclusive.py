"""One run at a time trains a student: notice when another one has moved its weights in between."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from opdlab.errors import OpdlabError
from opdlab.models.weights import Weights

# How often each adapter of a set of weights was updated; None stands for the model itself.
_UPDATES: WeakKeyDictionary[Weights, dict[str | None, int]] = WeakKeyDictionary()


class Turn:
    """A run's claim to an adapter (None: the whole model), from when it is prepared."""

    def __init__(self, weights: Weights, adapter: str | None) -> None:
        self.weights, self.adapter = weights, adapter
        self._seen = self._counted()

    def check(self, run: object) -> None:
        """Refuse to go on with weights that another run has moved.

        Raises:
            OpdlabError: With the number of updates that came from elsewhere.
        """
        if others := self._counted() - self._seen:
            raise OpdlabError(
                f"Another run has made {others} updates to this student since the last step of "
                f"{run}. The two share its weights, but "
                "not their optimizers, references and checkpoints. Finish one before the next is "
                "prepared, or give each a student of "
                "its own: Policy.load(…), or student.copied()."
            )

    def count(self) -> None:
        """Note an update of this run."""
        updates = _UPDATES.setdefault(self.weights, {})
        updates[self.adapter] = updates.get(self.adapter, 0) + 1
        self._seen = self._counted()

    def _counted(self) -> int:
        updates = _UPDATES.get(self.weights, {})
        return sum(updates.get(name, 0) for name in {None, self.adapter})
