"""The folder of a run: may it be used, which checkpoints lie in it, and which run wrote them.

A folder holds one run. A run that is taken up gets a new name and remembers its ancestors, so that
checkpoints of a path that was left (a run resumed at an earlier step) are told from those of the
path that leads to it.
"""

from __future__ import annotations

import json
import math
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opdlab.errors import InvalidValue, OpdlabError
from opdlab.support.expect import shortened

_STEP = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Lineage:
    """The name of a run, and of the runs that it was resumed from.

    Attributes:
        name: The run's own name, random.
        ancestors: For each earlier run, the last step of it that is on this run's path.
        root: The run that was not resumed from any other; None if it is this one.
    """

    name: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    ancestors: Mapping[str, int] = field(default_factory=dict)
    root: str | None = None  # the run that was not resumed from any other; None: this one

    @property
    def family(self) -> str:
        """The name that all runs share that come from one beginning."""
        return self.name if self.root is None else self.root

    def includes(self, name: str, step: int) -> bool:
        """Tell whether the checkpoint that run `name` wrote after `step` is on this run's path.

        Args:
            name: The run that wrote it.
            step: The step after which it was written.

        Returns:
            True for this run's own checkpoints, and for earlier runs' up to where they were left.
        """
        return name == self.name or step <= self.ancestors.get(name, -1)

    def child(self, step: int) -> Lineage:
        """Make the lineage of a run that takes this one up after `step`.

        Args:
            step: The step of the checkpoint that is resumed.

        Returns:
            A lineage with a new name and this run among the ancestors.
        """
        kept = {name: min(last, step) for name, last in self.ancestors.items()}
        return Lineage(ancestors={**kept, self.name: step}, root=self.family)


@dataclass(frozen=True)
class Saved:
    """A checkpoint in a folder.

    `family` is the run at the beginning of those that were resumed one from the other.

    Attributes:
        path: The checkpoint's folder.
        step: The step after which it was written.
        run: Name of the run that wrote it.
        family: Name of the first of the runs that were resumed one from the other.
        serial: Place in the order of writing; infinite for a checkpoint that cannot be read.
    """

    path: Path
    step: int
    run: str
    family: str
    serial: float


def list_checkpoints(folder: Path) -> list[Saved]:
    """List the complete checkpoints in a run's folder, in the order in which they were written.

    Args:
        folder: The run's folder; one that does not exist holds none.

    Returns:
        The checkpoints.
    """
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        match = _STEP.fullmatch(path.name)
        if match and path.is_dir():
            found.append(_read(path, int(match[1])))
    return sorted(found, key=lambda saved: (saved.serial, saved.step))


def _read(path: Path, step: int) -> Saved:
    try:
        written = json.loads((path / "run.json").read_text(encoding="utf-8")).get("run", {})
        name = str(written.get("name", ""))
        return Saved(
            path, step, name, str(written.get("root", name)), float(written.get("serial", 0))
        )
    except (OSError, ValueError, AttributeError, TypeError):
        # Damaged: nobody knows when it was written. Taken for the newest, it is found out by its
        # checksums.
        return Saved(path, step, "", "", math.inf)


def next_serial(folder: Path) -> int:
    """Return a serial number that is one more than any checkpoint in the folder has.

    Args:
        folder: The run's folder.

    Returns:
        The number, 1 for an empty folder.
    """
    return 1 + int(
        max((one.serial for one in list_checkpoints(folder) if one.serial < math.inf), default=0)
    )


def check_owner(folder: Path, lineage: Lineage) -> None:
    """Refuse a folder that holds checkpoints of a run that did not begin with this one.

    Args:
        folder: The folder to write into.
        lineage: The run that wants to write.

    Raises:
        OpdlabError: With the steps that lie there.
    """
    # A damaged checkpoint does not say whose it is; reading it will tell that it is damaged.
    strangers = [
        one
        for one in list_checkpoints(folder)
        if one.serial < math.inf and one.family != lineage.family
    ]
    if strangers:
        steps = ", ".join(str(one.step) for one in sorted(strangers, key=lambda one: one.step))
        raise OpdlabError(
            f"{folder} holds checkpoints of another run (steps {steps}). Two runs in one folder "
            "could not be told apart: give another folder as save=, go on with that run by"
            " opdlab.resume(path, …), or delete it first."
        )


def check_folder(folder: Any, owner: str = "distill got save") -> Path | None:
    """Check that checkpoints can be written to a folder, before anything is computed.

    Args:
        folder: The user's `save=`; None for no checkpoints.
        owner: The start of the error message, as "distill got save".

    Returns:
        The folder, with `~` replaced by the home directory, made if it was not there.

    Raises:
        InvalidValue: It is no path, or cannot be made or written.
    """
    if folder is None:
        return None
    path = _as_path(folder, owner)
    try:
        is_checkpoint = (path / "manifest.json").exists()
        if not is_checkpoint:
            _probe(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidValue(
            f"{owner}={shortened(folder)}, where nothing can be written ({reason}). Use a folder"
            " that can be made."
        ) from None
    if is_checkpoint:
        raise InvalidValue(
            f"{owner}={shortened(folder)}, which is itself a checkpoint. Use the folder of the run:"
            f" {str(path.parent)!r}."
        )
    return path


def _as_path(folder: Any, owner: str) -> Path:
    said = f"{owner}={shortened(folder)}"
    if not isinstance(folder, (str, os.PathLike)):
        raise InvalidValue(f"{said}. Use the path of a folder, or None for no checkpoints.")
    text = os.fspath(folder)
    if not isinstance(text, str):
        raise InvalidValue(f"{said}. Use a path as text.")
    if not text.strip():
        raise InvalidValue(
            f"{said}. Use the path of a folder, as 'runs/first', or None for no checkpoints."
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidValue(
            f"{said}, which is no valid text (a lone surrogate). Use another name."
        ) from None
    if "\0" in text:
        raise InvalidValue(f"{said}, which contains a null character. Use another name.")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InvalidValue(
            f"{said}, but there is no such home directory. Write the path out."
        ) from None


def _probe(path: Path) -> None:
    """Check that the folder can be written to: make it, and a file in it for a moment.

    The folder stays, since other processes of the same run may look at it now.
    """
    path.mkdir(parents=True, exist_ok=True)
    probe = path / f".probe-{uuid.uuid4().hex}"
    probe.touch()
    probe.unlink(missing_ok=True)  # another process may have tidied up
