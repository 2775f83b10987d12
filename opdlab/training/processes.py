"""The processes of a run, as a batch asks them for statistics of the whole step."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import pad_across_processes
from torch import Tensor


class AcceleratedProcesses:
    """Sums and gathers over the processes of an Accelerate run.

    In a run of one process they give its own values back.

    Args:
        accelerator: The processes of the run.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over all processes.

        Args:
            values: A tensor of any shape, the same shape in every process.

        Returns:
            The sum, the same in every process.
        """
        total: Tensor = self._accelerator.reduce(values, "sum")
        return total

    def gather(self, values: Tensor) -> Tensor:
        """Put the rows `[n, ...]` of all processes together, in the order of their ranks.

        `n` may differ among the processes.

        Args:
            values: `[n, ...]` of this process.

        Returns:
            `[N, ...]`, the same in every process.
        """
        if self._accelerator.num_processes == 1:
            return values
        count = torch.tensor([len(values)], device=values.device)
        counts = self._accelerator.gather(count).tolist()
        padded = pad_across_processes(values, dim=0)
        longest = max(counts)
        if longest == 0:
            return values
        everyone = self._accelerator.gather(padded).unflatten(0, (len(counts), longest))
        return torch.cat([rows[:n] for rows, n in zip(everyone, counts, strict=True)])
