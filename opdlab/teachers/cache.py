"""Keep the answers of a served teacher on disk, so that nothing is paid for twice.

The file is SQLite with rows of JSON. A row's key is a hash of all that was asked (server, model,
messages, prefix, sampling, seed) and of the sample's number.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

from opdlab.errors import DamagedFile, OpdlabError

WAIT = 60.0  # seconds for another process to finish its write


def key_of(asked: Any) -> str:
    """Return a hash of JSON data, the same in every process.

    Args:
        asked: JSON data; the order of keys in a dict does not matter.

    Returns:
        SHA-256 as 64 hexadecimal digits.
    """
    return hashlib.sha256(json.dumps(asked, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _log_ahead(rows: sqlite3.Connection) -> None:
    """Let commits wait for no disk; a crash of the process still loses nothing.

    SQLite itself does not wait if two processes change the journal of a new file at once, so we do.
    """
    end = time.monotonic() + WAIT
    while True:
        try:
            rows.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.01)


class Cache:
    """JSON objects by key, each written at once or not at all.

    Threads may share it, and so may processes.

    Args:
        path: The file; None keeps everything in memory.

    Raises:
        DamagedFile: The file holds something else than was written.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._lock = threading.Lock()
        self._rows: sqlite3.Connection | None = None

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the answer stored under `key`, or None.

        Args:
            key: A hash from `key_of`.

        Returns:
            The answer as JSON data, or None if there is none.

        Raises:
            DamagedFile: The file holds something else than was written.
            OpdlabError: The file cannot be read.
        """
        with self._lock:
            found = self._run("SELECT answer, checksum FROM answers WHERE key = ?", key)
        if not found:
            return None
        answer, checksum = found[0]
        if not isinstance(answer, str) or checksum != key_of([key, answer]):
            raise self._damaged("a row is not what was written")
        stored: dict[str, Any] = json.loads(answer)
        return stored

    def put(self, key: str, answer: dict[str, Any]) -> None:
        """Store `answer` under `key`, in place of an earlier one.

        Args:
            key: A hash from `key_of`.
            answer: JSON data.

        Raises:
            DamagedFile: The file is no cache of answers.
            OpdlabError: The file cannot be written.
        """
        text = json.dumps(answer)
        with self._lock:
            self._run(
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", key, text, key_of([key, text])
            )

    def _run(self, statement: str, *values: str) -> list[Any]:
        try:
            if self._rows is None:
                self._rows = self._open()
            with self._rows:  # one transaction
                return self._rows.execute(statement, values).fetchall()
        except (sqlite3.OperationalError, OSError) as error:  # a full disk, a read-only folder
            raise OpdlabError(
                f"The cache {self.path} cannot be used ({error}). Make room, or give the teacher"
                " another cache=…."
            ) from None
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from None

    def _open(self) -> sqlite3.Connection:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = sqlite3.connect(self.path or ":memory:", timeout=WAIT, check_same_thread=False)
        _log_ahead(rows)
        rows.execute("PRAGMA synchronous=NORMAL")
        with rows:
            rows.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL,"
                " checksum TEXT NOT NULL)"
            )
        return rows

    def _damaged(self, why: str) -> DamagedFile:
        return DamagedFile(
            f"{self.path} is not a cache of teachers' answers ({why}). Delete it, or give the"
            " teacher another cache=…."
        )

    def __repr__(self) -> str:
        return f"Cache({self.path or 'in memory'})"
