"""Measure the phases of a step: wall seconds, and memory while a run is profiled."""

from __future__ import annotations

import time

import torch

from opdlab.support.memory import PeakMemory

PHASES = ("generate", "grade", "learn")


class PhaseClock:
    """A stopwatch for the phases of one step.

    Args:
        device: The device that the student is on.
        is_exact: Wait for the device at the end of each phase, and measure the memory of each. A
            GPU works behind the program's back, so without this the seconds of a phase may hold
            work of the phase before.
    """

    def __init__(self, device: torch.device, is_exact: bool = False) -> None:
        self._device = device
        self._memory = PeakMemory(device) if is_exact else None
        self.numbers: dict[str, float] = {}
        self._began = self._last = self._now()
        self._reset_memory()

    def end(self, phase: str) -> None:
        """End a phase; the next one begins.

        Args:
            phase: One of `PHASES`.
        """
        now = self._now()
        self.numbers[f"{phase}_s"] = now - self._last
        if self._memory is not None:
            self.numbers[f"{phase}_bytes"] = self._memory.read()
        self._reset_memory()
        self._last = self._now()

    def read(self) -> dict[str, float]:
        """Return the seconds of each phase and of the whole step, and bytes where measured."""
        return {**self.numbers, "seconds": self._last - self._began}

    def _reset_memory(self) -> None:
        if self._memory is not None:
            self._memory.reset()

    def _now(self) -> float:
        if self._memory is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
