"""The most memory that was in use since a moment, on a GPU or in this process."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """The high-water mark of memory.

    On a GPU this is what PyTorch's allocator has given out. Elsewhere it is the resident memory of
    the process without the program code of libraries, which needs Linux with `/proc`.

    Args:
        device: The device whose memory counts.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> float:
        """Set the mark to the memory in use now.

        Returns:
            The bytes in use now; NaN where they cannot be read.
        """
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return float(torch.cuda.memory_allocated(self.device))
        try:
            _give_freed_memory_back()
            _CLEAR.write_text("5")  # Linux: VmHWM becomes VmRSS
            return _read("VmRSS") - _read("RssFile")
        except OSError:
            return math.nan

    def read(self) -> float:
        """Return the most bytes in use since `reset`; NaN where they cannot be read."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        try:
            return _read("VmHWM") - _read("RssFile")
        except OSError:
            return math.nan


def _give_freed_memory_back() -> None:
    """Let glibc return what was freed earlier, which is no longer in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _read(key: str) -> float:
    """Bytes of a line of the process's status."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024.0
