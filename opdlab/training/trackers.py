"""Check the trackers of Accelerate that a run logs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from opdlab.errors import InvalidValue
from opdlab.support.expect import shortened


def make_accelerator(log_with: Any, folder: Path | None) -> Accelerator:
    """Make an accelerator that logs to `log_with`.

    Trackers that keep files put them into the run's folder.

    Args:
        log_with: A tracker's name, a tracker, a list of them, or None.
        folder: The run's folder; None puts trackers' files under `runs`.

    Returns:
        The accelerator.

    Raises:
        InvalidValue: There is no such tracker, or its package is not installed.
    """
    check_trackers(log_with)
    return Accelerator(
        log_with=log_with, project_dir=None if log_with is None else str(folder or Path("runs"))
    )


def check_trackers(log_with: Any) -> None:
    """Refuse values that are no tracker, and trackers whose package is missing.

    Accelerate would leave these out without a word.

    Args:
        log_with: A tracker's name, a tracker, a list of them, or None.

    Raises:
        InvalidValue: There is no such tracker, or its package is not installed.
    """
    known = {str(name): name for name in LOGGER_TYPE_TO_CLASS}
    installed = {str(name) for name in get_available_trackers()}
    for one in log_with if isinstance(log_with, (list, tuple)) else [log_with]:
        if one is None or isinstance(one, GeneralTracker) or str(one) == "all":
            continue
        names = (
            f"Use {', '.join(sorted(known))}, 'all', or a tracker of your own"
            " (accelerate.tracking.GeneralTracker)."
        )
        if not isinstance(one, str) or str(one) not in known:
            raise InvalidValue(
                f"distill got log_with={shortened(one)}, which is no tracker. {names}"
            )
        if str(one) not in installed:
            raise InvalidValue(
                f"distill got log_with={str(one)!r}, whose package is not installed. Install it, or"
                " leave log_with out."
            )
