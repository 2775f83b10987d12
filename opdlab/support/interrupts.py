"""Hold back interrupts while something is finished that must not be half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def hold_interrupts() -> Iterator[None]:
    """Hold back Ctrl-C, the notebook's stop button and SIGTERM until the block is done.

    Signals that came meanwhile are delivered afterwards, as they would have been without the block.
    Only the main thread hears signals, so in others the block runs as it is.

    Yields:
        Nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: dict[int, FrameType | None] = {}
    # A handler that was not installed from Python reads as None and could not be put back.
    before: dict[int, Any] = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not None
    }
    for number in before:
        signal.signal(number, waiting.__setitem__)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number, frame in waiting.items():
            if callable(before[number]):
                before[number](number, frame)
            else:
                signal.raise_signal(number)  # the system's own reaction: the end, or nothing
