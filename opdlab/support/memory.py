"""The memory that work used, and whether work can fit the machine at all."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import psutil
import torch

from opdlab.errors import InvalidValue

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


def refuse_beyond_memory(what: str, least: float, device: torch.device, advice: str) -> None:
    """Refuse work that cannot fit the memory of the machine, whatever else runs on it.

    Args:
        what: What was asked for, as the beginning of the error's sentence.
        least: Bytes that it needs at the very least.
        device: Where it would be held.
        advice: What to do instead.

    Raises:
        InvalidValue: `least` is more than the device has in all, with swap on a CPU.
    """
    whole = total_memory(device)
    if least > whole:
        raise InvalidValue(
            f"{what} needs at least {least / 2**30:,.0f} GiB of memory, and"
            f" {'the GPU' if device.type == 'cuda' else 'this machine'} has"
            f" {whole / 2**30:,.0f}. {advice}"
        )


def total_memory(device: torch.device) -> float:
    """Return the bytes that a device has in all, free or not; infinity where it does not say.

    Args:
        device: A GPU, or the CPU, whose memory counts with its swap.
    """
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu":
        return math.inf
    return float(psutil.virtual_memory().total + psutil.swap_memory().total)


def _give_freed_memory_back() -> None:
    """Let glibc return what was freed earlier, which is no longer in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _read(key: str) -> float:
    """Bytes of a line of the process's status."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024.0
