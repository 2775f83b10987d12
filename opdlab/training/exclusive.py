"""Notice when another run has moved the weights of a run's student."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from opdlab.errors import OpdlabError
from opdlab.models.weights import Weights

# How often each adapter of a set of weights was updated; None stands for the model itself.
_UPDATES: WeakKeyDictionary[Weights, dict[str | None, int]] = WeakKeyDictionary()


class Claim:
    """A run's claim to train an adapter, or the whole model, alone.

    Two runs may be prepared on one student, but only one of them may go on.

    Attributes:
        weights: The weights that the run trains.
        adapter: The adapter among them; None for the whole model.
    """

    def __init__(self, weights: Weights, adapter: str | None) -> None:
        """Claim the adapter of these weights; None claims the whole model."""
        self.weights, self.adapter = weights, adapter
        self._seen = self._counted()

    def check(self, run: object) -> None:
        """Check that no other run has moved the weights since this one's last update.

        Args:
            run: The run that holds the claim, for the error.

        Raises:
            OpdlabError: Another run has. The message tells the number of its updates.
        """
        if others := self._counted() - self._seen:
            raise OpdlabError(
                f"Another run has made {others} updates to this student since the last step of"
                f" {run}. The two share its weights, but not their optimizers, references and"
                " checkpoints. Finish one before the next is prepared, or give each a student of"
                " its own: Policy.load(…), or student.copied()."
            )

    def count(self) -> None:
        """Count an update of this run."""
        updates = _UPDATES.setdefault(self.weights, {})
        updates[self.adapter] = updates.get(self.adapter, 0) + 1
        self._seen = self._counted()

    def _counted(self) -> int:
        updates = _UPDATES.get(self.weights, {})
        return sum(updates.get(name, 0) for name in {None, self.adapter})
