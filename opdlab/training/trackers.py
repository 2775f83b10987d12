"""The trackers of Accelerate that a run logs to: check them, and show them graded texts.

Numbers go to all trackers, and graded texts to those that can show them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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


class Picture(Protocol):
    """A picture of a text, as far as trackers show one."""

    def html(self, assets: bool = True, script: bool = True) -> str:
        """Return the picture as HTML.

        Args:
            assets: Whether styles and scripts are inside.
            script: False leaves out all scripts.

        Returns:
            An HTML fragment.
        """
        ...


@dataclass(frozen=True, eq=False)
class Strip:
    """A text with its grades, as a tracker shows it.

    Attributes:
        name: The name under which the tracker keeps it.
        prompt: The question.
        text: The text.
        picture: The text in colour.
    """

    name: str
    prompt: str
    text: str
    picture: Picture


def show_strips(accelerator: Accelerator, strips: Sequence[Strip], step: int) -> None:
    """Show graded texts in every tracker that can.

    Args:
        accelerator: The accelerator of the run, with its trackers.
        strips: The texts.
        step: The step after which they were written.
    """
    for tracker in accelerator.trackers:
        show = _SHOWN.get(tracker.name)
        if show is not None:
            show(tracker, strips, step)


def _show_in_tensorboard(tracker: Any, strips: Sequence[Strip], step: int) -> None:
    for strip in strips:
        # Markdown is drawn there, so a text stands in a block of code.
        told = f"{_as_code(strip.prompt)}\n\n{_as_code(strip.text)}"
        tracker.tracker.add_text(f"texts/{strip.name}", told, global_step=step)
    tracker.tracker.flush()


def _as_code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


_SHOWN = {"tensorboard": _show_in_tensorboard}
