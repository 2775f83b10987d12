"""How long the tests of robustness go on: for seconds in `make test`, for long in `make stress`.

`OPDLAB_STRESS` holds the minutes of each fuzz test; unset means the short form.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

MINUTES = float(os.environ.get("OPDLAB_STRESS", "0"))


def times(short: int, long: int) -> int:
    """Return how often something is tried."""
    return long if MINUTES else short


def for_minutes(check: Callable[[], None]) -> int:
    """Run a check once, or again and again for `OPDLAB_STRESS` minutes; returns how often."""
    end, rounds = time.monotonic() + 60 * MINUTES, 0
    while rounds == 0 or time.monotonic() < end:
        check()
        rounds += 1
    return rounds
