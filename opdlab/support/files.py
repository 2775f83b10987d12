"""Write files atomically."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# A partial file that nobody has written to for so many seconds is taken for abandoned, if its
# process is gone. The age matters where several machines share a folder: a process of another
# machine is never found on this one.
ABANDONED_AFTER = 600


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file beside its name, and give it its name when the block ends well.

    A process that is killed in the block leaves the partial file behind. The next one that writes
    the same file removes it.

    Args:
        path: The file; missing folders are made.

    Yields:
        The partial file to write, in the same folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_file(path: Path, data: bytes, flush: bool = False) -> Path:
    """Write a file atomically: a reader sees the old file or the new one.

    Args:
        path: The file; missing folders are made.
        data: Its content.
        flush: Wait until the content is on the disk, so that a power cut loses neither version.

    Returns:
        The path.
    """
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(data)
        if flush:
            file.flush()
            os.fsync(file.fileno())
    return path


def _remove_abandoned(path: Path) -> None:
    """Remove partial versions of a file whose processes were killed."""
    own = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.partial")
    with suppress(OSError):
        for entry in os.scandir(path.parent):
            match = own.fullmatch(entry.name)
            if match is None or not entry.is_file(follow_symlinks=False):
                continue
            is_old = time.time() - entry.stat().st_mtime > ABANDONED_AFTER
            if is_old and not _is_alive(int(match[1])):
                Path(entry.path).unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # there the call below would end the process
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
