"""The order of a finite task's prompts in training: in epochs, without replacement.

Nothing is remembered between steps: the prompts of a step follow from the number of prompts, the
batch size, the seed and the step alone, so a resumed run goes on exactly where it stopped and every
process can work out the whole batch.
"""

from __future__ import annotations

import random
from functools import lru_cache


class EpochOrder:
    """Shuffled passes over `count` prompts, cut into batches of `size`.

    Every prompt is drawn once before any is drawn twice. A batch that ends one epoch and begins the
    next holds no prompt twice either; only a batch larger than `count` does, since there is no
    other way to fill it.

    Args:
        count: Number of prompts.
        size: Prompts per batch.
        seed: Seed of the shuffles.
    """

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.count, self.size, self.seed = count, size, seed
        self._epoch = -1
        self._order: list[int] = []

    def batch(self, step: int) -> list[int]:
        """Return the prompts of one step.

        Args:
            step: The step, from 0.

        Returns:
            `size` numbers from 0 to `count - 1`.
        """
        indices: list[int] = []
        position = step * self.size
        while len(indices) < self.size:
            epoch, offset = divmod(position, self.count)
            part = self._epoch_order(epoch)[offset : offset + self.size - len(indices)]
            indices += part
            position += len(part)
        return indices

    def first(self, n: int) -> list[int]:
        """Return the first `n` draws, however many epochs they take.

        Args:
            n: Number of draws.

        Returns:
            `n` numbers from 0 to `count - 1`.
        """
        epochs = range(-(-n // self.count))
        return [index for epoch in epochs for index in self._shuffled(epoch)][:n]

    def _epoch_order(self, epoch: int) -> list[int]:
        """The order of one epoch.

        Each depends on how the one before ends, so they are made in turn.
        """
        if self.size > self.count:
            return self._shuffled(epoch)
        if epoch < self._epoch:
            self._epoch = -1
        while self._epoch < epoch:
            self._epoch += 1
            self._order = self._without_repeats(
                self._shuffled(self._epoch), self._epoch * self.count % self.size
            )
        return self._order

    def _without_repeats(self, order: list[int], begun: int) -> list[int]:
        """Move the last `begun` prompts of the last epoch behind the batch that they began."""
        if not begun:
            return order
        taken = set(self._order[-begun:])
        free = [index for index in order if index not in taken][: self.size - begun]
        chosen = set(free)
        return free + [index for index in order if index not in chosen]

    def _shuffled(self, epoch: int) -> list[int]:
        return random.Random(f"{self.seed}/{epoch}").sample(range(self.count), self.count)


@lru_cache(maxsize=16)
def epoch_order(count: int, size: int, seed: int) -> EpochOrder:
    """Return the `EpochOrder` of these numbers.

    The object is kept, because the order of a far epoch takes a while to reach.

    Args:
        count: Number of prompts.
        size: Prompts per step.
        seed: The run's seed.

    Returns:
        The order, the same object for the same numbers.
    """
    return EpochOrder(count, size, seed)
