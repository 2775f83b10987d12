"""Keep the answers of a served teacher on disk, so that nothing is paid for twice.

The file is SQLite with rows of JSON, private to the user. A row's key is a hash of all that was
asked (server, model, messages, prefix, sampling, seed) and of the sample's number. Each row has a
checksum, and the number of rows is kept beside them, so that no answer is lost in silence.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from opdlab.errors import DamagedFile, OpdlabError

WAIT = 60.0  # seconds for another process to finish its write
PRIVATE = 0o600  # mode of the file
MOST_ROWS = 10**7  # that a rescue looks for
# The number of answers is kept by the file itself, in the transaction that changes it. Files of
# earlier versions get it when they are opened.
SCHEMA = (
    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL,"
    " checksum TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value INTEGER NOT NULL)",
    "INSERT OR IGNORE INTO facts SELECT 'answers', count(*) FROM answers",
    "CREATE TRIGGER IF NOT EXISTS count_up AFTER INSERT ON answers BEGIN"
    " UPDATE facts SET value = value + 1 WHERE name = 'answers'; END",
    "CREATE TRIGGER IF NOT EXISTS count_down AFTER DELETE ON answers BEGIN"
    " UPDATE facts SET value = value - 1 WHERE name = 'answers'; END",
)


def key_of(asked: Any) -> str:
    """Return a hash of JSON data, the same in every process.

    Args:
        asked: JSON data; the order of keys in a dict does not matter.

    Returns:
        SHA-256 as 64 hexadecimal digits.
    """
    return hashlib.sha256(json.dumps(asked, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def rescue(path: str | os.PathLike[str], to: str | os.PathLike[str]) -> int:
    """Copy the answers that can still be read from a damaged cache into a new one.

    Args:
        path: The damaged cache.
        to: The new file, which must not exist.

    Returns:
        The number of answers that were saved.

    Raises:
        OpdlabError: The new file exists, or cannot be written.
        DamagedFile: Nothing at all can be read.
    """
    if Path(to).exists():
        raise OpdlabError(f"{to} exists already. Give a new file for the answers.")
    damaged, new = Cache(path), Cache(to)
    found = damaged._whole_rows()
    for key, answer in found.items():
        new.put(key, json.loads(answer))
    return len(found)


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
            DamagedFile: The file holds something else than was written. The message says how many
                answers are lost.
            OpdlabError: The file cannot be read.
        """
        with self._lock:
            found = self._run("SELECT answer, checksum FROM answers WHERE key = ?", key)
        if not found:
            return None
        answer, checksum = found[0]
        if not _is_whole(key, answer, checksum):
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
                "INSERT INTO answers VALUES (?, ?, ?)"
                " ON CONFLICT (key) DO UPDATE SET answer = excluded.answer,"
                " checksum = excluded.checksum",
                key,
                text,
                key_of([key, text]),
            )

    def _run(self, statement: str, *values: str) -> list[Any]:
        try:
            if self._rows is None:
                rows = self._open()
                self._check(rows)
                self._rows = rows
            with self._rows:  # one transaction
                return self._rows.execute(statement, values).fetchall()
        except (sqlite3.OperationalError, OSError) as error:  # a full disk, a read-only folder
            raise OpdlabError(
                f"The cache {self.path} cannot be used ({error}). Make room, or give the teacher"
                " another cache=…."
            ) from None
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise self._damaged(str(error)) from None

    def _open(self) -> sqlite3.Connection:
        if self.path is None:
            rows = sqlite3.connect(":memory:", check_same_thread=False)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Prompts and answers are nobody else's business. The journal gets the file's mode.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, PRIVATE))
            if self.path.stat().st_mode & 0o077:
                self.path.chmod(PRIVATE)
            rows = sqlite3.connect(self.path, timeout=WAIT, check_same_thread=False)
        # No log that is written ahead: SQLite drops the damaged end of one without a word.
        rows.execute("PRAGMA journal_mode=DELETE")
        rows.execute("PRAGMA synchronous=NORMAL")
        rows.isolation_level = "IMMEDIATE"
        with rows:
            rows.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA:
                rows.execute(statement)
        return rows

    def _check(self, rows: sqlite3.Connection) -> None:
        """Check that no answer is missing or damaged, when the file is opened.

        Raises:
            DamagedFile: Some are. The message says how many.
        """
        with rows:
            rows.execute("BEGIN")
            problems = [str(row[0]) for row in rows.execute("PRAGMA integrity_check(1)")]
            found = rows.execute("SELECT key, answer, checksum FROM answers").fetchall()
            counted = rows.execute("SELECT value FROM facts WHERE name = 'answers'").fetchall()
        whole = sum(_is_whole(*row) for row in found)
        expected = counted[0][0] if counted else None
        if not isinstance(expected, int) or expected < len(found):
            raise self._damaged("the number of its answers is not what was written")
        if whole < expected:
            raise self._damaged(f"{expected - whole} of its {expected} answers are lost")
        if problems != ["ok"]:
            raise self._damaged(problems[0])

    def _whole_rows(self) -> dict[str, str]:
        """All answers that can still be read, by key: row by row where the table is damaged."""
        rows = sqlite3.connect(f"file:{quote(str(self.path))}?mode=ro", uri=True)
        found: dict[str, str] = {}
        try:
            last = rows.execute("SELECT max(rowid) FROM answers").fetchone()[0] or 0
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise self._damaged(str(error)) from None
        for i in range(1, min(last, MOST_ROWS) + 1):
            with suppress(sqlite3.Error, UnicodeDecodeError):
                row = rows.execute(
                    "SELECT key, answer, checksum FROM answers WHERE rowid = ?", (i,)
                ).fetchone()
                if row is not None and _is_whole(*row):
                    found[row[0]] = row[1]
        rows.close()
        return found

    def _damaged(self, why: str) -> DamagedFile:
        return DamagedFile(
            f"{self.path} is not a cache of teachers' answers as it was written ({why}). Delete it,"
            " give the teacher another cache=…, or copy the answers that are left:"
            " opdlab.teachers.rescue(path, to)."
        )

    def __repr__(self) -> str:
        return f"Cache({self.path or 'in memory'})"


def _is_whole(key: Any, answer: Any, checksum: Any) -> bool:
    """Tell whether a row is what was written."""
    if not (isinstance(key, str) and isinstance(answer, str)):
        return False
    return bool(checksum == key_of([key, answer]))
