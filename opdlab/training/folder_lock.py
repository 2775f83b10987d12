"""Keep a run's folder to one process, and remove what a killed process left in it.

The lock is the operating system's, so it ends with the process that holds it, however that ends.
Runs of one process share it: an interrupted run and the one that takes it up in the same notebook.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import weakref
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from opdlab.errors import OpdlabError

NAME = ".lock"
_OLD = re.compile(r"\.(step-\d{6,})\.\d+\.old")
_PARTIAL = re.compile(r"\..+\.\d+\.partial|\.probe-[0-9a-f]+")
# The locks of this process, by its number (a forked one starts anew) and the folder.
_HELD: dict[tuple[int, Path], tuple[FileLock, int]] = {}


class FolderLock:
    """Hold a folder until `release`, or until this object is gone.

    Args:
        folder: The folder of a run; it exists.

    Raises:
        OpdlabError: Another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._key = (os.getpid(), folder.resolve())
        _acquire(self._key, folder)
        self._end = weakref.finalize(self, _release, self._key)

    def release(self) -> None:
        """Let go of the folder, if that has not happened yet."""
        self._end()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _acquire(key: tuple[int, Path], folder: Path) -> None:
    if key in _HELD:
        lock, holders = _HELD[key]
        _HELD[key] = (lock, holders + 1)
        return
    path = folder / NAME
    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise OpdlabError(
            f"{folder} is in use by {_holder(path)}. Two processes would replace each other's"
            " checkpoints: end that one (or restart its notebook's kernel), or give another folder"
            " as save=."
        ) from None
    with suppress(OSError):  # for the words of the error above, not for the lock
        path.write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname()}))
    _HELD[key] = (lock, 1)


def _release(key: tuple[int, Path]) -> None:
    lock, holders = _HELD.get(key, (None, 0))
    if lock is None or key[0] != os.getpid():
        return
    if holders > 1:
        _HELD[key] = (lock, holders - 1)
        return
    del _HELD[key]
    # Removed while it is held: whoever opened it in the meantime sees that it is gone, and retries.
    with suppress(OSError):
        (key[1] / NAME).unlink(missing_ok=True)
    lock.release()


def _holder(path: Path) -> str:
    try:
        said = json.loads(path.read_text())
        return f"process {int(said['process'])} on {str(said['host'])[:100]!r}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def remove_leftovers(folder: Path) -> list[str]:
    """Remove partial files and folders of processes that were killed while they saved.

    A checkpoint that had made room for a new one of the same step gets its name back. The caller
    holds the folder's lock.

    Args:
        folder: The folder of a run.

    Returns:
        The names of what was removed or restored.
    """
    found = []
    for place in (folder, folder / "snapshots", *sorted(folder.glob("step-*"))):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            old = _OLD.fullmatch(path.name)
            if old is None and _PARTIAL.fullmatch(path.name) is None:
                continue
            found.append(path.name)
            if old is not None and not (place / old[1]).exists():
                path.rename(place / old[1])
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    return found
