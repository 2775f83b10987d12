"""The trackers of Accelerate that a run logs to: check them, and show them graded texts.

Numbers go to all trackers, and graded texts to those that can show them.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from opdlab.errors import InvalidValue, OpdlabError
from opdlab.support.expect import shortened
from opdlab.training.sharding import check_launcher


def make_accelerator(log_with: Any, folder: Path | None) -> Accelerator:
    """Make an accelerator that logs to `log_with`.

    Trackers that keep files put them into the run's folder.

    Args:
        log_with: A tracker's name, a tracker, a list of them, or None.
        folder: The run's folder; None puts trackers' files under `runs`.

    Returns:
        The accelerator.

    Raises:
        InvalidValue: There is no such tracker, or its package is not installed; or the launcher
            asks for something with which opdlab does not train.
    """
    check_trackers(log_with)
    check_launcher()
    return Accelerator(
        log_with=log_with, project_dir=None if log_with is None else str(folder or Path("runs"))
    )


def start_trackers(
    accelerator: Accelerator, settings: Mapping[str, Any], folder: Path | None
) -> None:
    """Start the trackers of a run, and tell them its settings.

    Args:
        accelerator: The accelerator, as `make_accelerator` made it.
        settings: The settings of the run.
        folder: The run's folder, or None.

    Raises:
        InvalidValue: A tracker does not start, as for want of a key.
    """
    options: dict[str, dict[str, Any]] = {}
    if folder is not None:
        # The same folder is the same run when it is taken up; others with its name are not.
        place = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:6]
        name = f"{folder.name}-{place}"
        options = {
            "trackio": {"name": name, "resume": "allow"},
            "wandb": {"name": name, "dir": str(folder)},
        }
    try:
        accelerator.init_trackers("opdlab", dict(settings), init_kwargs=options)
    except Exception as error:  # each tracker has its own kinds
        said = " ".join(str(error).split())
        raise InvalidValue(
            f"A tracker does not start: {type(error).__name__}: {said} Log in to it, use it"
            " offline (WANDB_MODE=offline for Weights & Biases), or leave it out of log_with."
        ) from error


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

    def to_png(self, path: str | os.PathLike[str], dark: bool = False, width: int = 1200) -> Path:
        """Draw the picture with a browser.

        Args:
            path: The file of the PNG.
            dark: Whether to draw it as on a dark page.
            width: Width in CSS pixels.

        Returns:
            The path.
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
    """Show graded texts in every tracker that can: HTML in Weights & Biases and Trackio.

    TensorBoard gets the plain texts, and the first one as an image where there is a browser.

    Args:
        accelerator: The accelerator of the run, with its trackers.
        strips: The texts.
        step: The step after which they were written.
    """
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            _show_in_tensorboard(tracker.tracker, strips, step)
        elif tracker.name in ("trackio", "wandb"):
            _show_as_html(tracker, strips, step)


def _show_as_html(tracker: Any, strips: Sequence[Strip], step: int) -> None:
    # Trackio and Weights & Biases have the same class under the same name.
    kind: Any = importlib.import_module(tracker.name).Html
    shown = {f"texts/{one.name}": kind(one.picture.html(script=False)) for one in strips}
    tracker.log(shown, step=step)


def _show_in_tensorboard(writer: Any, strips: Sequence[Strip], step: int) -> None:
    for one in strips:
        # TensorBoard reads Markdown, in which an indented text is shown letter by letter.
        told = f"{_as_code(one.prompt)}\n\n---\n\n{_as_code(one.text)}"
        writer.add_text(f"texts/{one.name}", told, global_step=step)
    image = _draw(strips[0].picture) if strips else None
    if image is not None:
        writer.add_image(f"strips/{strips[0].name}", image, global_step=step, dataformats="HWC")
    writer.flush()


def _draw(picture: Picture) -> Any:
    """The picture as an array `[height, width, 3]`; None without a browser or Pillow."""
    try:
        import numpy as np
        from PIL import Image

        with tempfile.TemporaryDirectory() as folder:
            path = picture.to_png(Path(folder) / "strip.png")
            return np.asarray(Image.open(path).convert("RGB"))
    except (OpdlabError, ImportError):
        return None


def _as_code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
