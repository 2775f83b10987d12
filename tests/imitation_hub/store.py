"""What the imitation holds: repositories, their revisions and files, and what users write."""

from __future__ import annotations

import base64
import hashlib
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .repositories import REPOSITORIES, Repository

LARGE = 1_000_000  # bytes from which the Hub keeps a file in its large storage
DATE = "2026-11-01T12:00:00.000Z"


class Refusal(Exception):
    """An answer of the Hub that is no success.

    Args:
        status: The HTTP status.
        code: The Hub's name for the error, which huggingface_hub reads.
        message: The error in words.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass(frozen=True)
class Blob:
    """A file of a revision.

    Attributes:
        path: Its path in the repository.
        file: Where it lies here.
    """

    path: str
    file: Path

    @property
    def size(self) -> int:
        """Bytes."""
        return self.file.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """The digest by which the large storage knows it."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

    @cached_property
    def oid(self) -> str:
        """The digest by which git knows it."""
        content = self.file.read_bytes()
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()

    @property
    def is_large(self) -> bool:
        """Whether the Hub keeps it in its large storage and answers with a redirect."""
        return self.size >= LARGE

    def as_json(self) -> dict[str, Any]:
        """Describe it as the tree of a repository does."""
        found: dict[str, Any] = {"type": "file", "path": self.path, "size": self.size}
        found["oid"] = self.oid
        if self.is_large:
            found["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return found


@dataclass(frozen=True)
class Snapshot:
    """A revision of a repository.

    Attributes:
        name: The repository's name.
        kind: "model" or "dataset".
        is_gated: Whether access has to be granted.
        blobs: Its files by path.
    """

    name: str
    kind: str
    is_gated: bool
    blobs: Mapping[str, Blob]

    @cached_property
    def commit(self) -> str:
        """The hash of its files, as a commit hash."""
        lines = "\n".join(f"{path} {blob.sha256}" for path, blob in sorted(self.blobs.items()))
        return hashlib.sha1(lines.encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """Describe it as `/api/models/NAME` does."""
        return {
            "_id": self.commit[:24],
            "id": self.name,
            "modelId": self.name,
            "author": self.name.split("/")[0],
            "sha": self.commit,
            "lastModified": DATE,
            "createdAt": DATE,
            "private": False,
            "disabled": False,
            "gated": "manual" if self.is_gated else False,
            "downloads": 0,
            "likes": 0,
            "tags": ["transformers", "safetensors"],
            "siblings": [{"rfilename": path} for path in sorted(self.blobs)],
        }

    def tree(self, under: str, *, is_recursive: bool) -> list[dict[str, Any]]:
        """List what lies under a folder, "" for all."""
        prefix = f"{under}/" if under else ""
        inside = [path for path in sorted(self.blobs) if path.startswith(prefix)]
        if not inside:
            raise Refusal(404, "EntryNotFound", f"{under} does not exist on this revision")
        entries: dict[str, dict[str, Any]] = {}
        for path in inside:
            first, _, rest = path.removeprefix(prefix).partition("/")
            if rest:
                folder = prefix + first
                entries[folder] = {"type": "directory", "path": folder, "size": 0}
                entries[folder]["oid"] = hashlib.sha1(folder.encode()).hexdigest()
            if is_recursive or not rest:
                entries[path] = self.blobs[path].as_json()
        return list(entries.values())


class ImitationHub:
    """The repositories and who asked for them.

    Args:
        folder: An empty folder for the files.
        repositories: What it serves; everything in `repositories.py` by default.

    Attributes:
        requests: What was asked, as `(method, path, user)`; the user is None without a token.
    """

    def __init__(self, folder: Path, repositories: Mapping[str, Repository] = REPOSITORIES) -> None:
        self.folder, self.repositories = folder, dict(repositories)
        self.requests: list[tuple[str, str, str | None]] = []
        self._snapshots: dict[tuple[str, str], Snapshot] = {}
        self._lock = threading.RLock()

    def snapshot(self, name: str, revision: str = "main") -> Snapshot:
        """Return a revision, whose files are written when it is first asked for.

        Args:
            name: Name of the repository.
            revision: A branch or a commit hash.

        Returns:
            The files and their commit.

        Raises:
            Refusal: There is no such repository or revision.
        """
        with self._lock:
            if (repository := self.repositories.get(name)) is None:
                raise Refusal(404, "RepoNotFound", "Repository not found")
            if revision in repository.revisions:
                return self._branch(name, repository, revision)
            for branch in repository.revisions:
                if (found := self._branch(name, repository, branch)).commit == revision:
                    return found
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def _branch(self, name: str, repository: Repository, branch: str) -> Snapshot:
        if (name, branch) not in self._snapshots:
            folder = self.folder / name.replace("/", "--") / branch
            folder.mkdir(parents=True)
            repository.build(folder, branch)
            self._read(name, repository, branch)
        return self._snapshots[name, branch]

    def _read(self, name: str, repository: Repository, branch: str) -> Snapshot:
        folder = self.folder / name.replace("/", "--") / branch
        files = [file for file in folder.rglob("*") if file.is_file()]
        paths = {file.relative_to(folder).as_posix(): file for file in files}
        blobs = {path: Blob(path, file) for path, file in paths.items()}
        found = Snapshot(name, repository.kind, repository.is_gated, blobs)
        self._snapshots[name, branch] = found
        return found

    # What users write.

    def create(self, name: str, kind: str) -> None:
        """Make an empty repository with a branch main.

        Raises:
            Refusal: There is one of this name.
        """
        with self._lock:
            if name in self.repositories:
                raise Refusal(409, "RepoAlreadyExists", "You already created this repo")
            self.repositories[name] = Repository(_write_attributes, kind=kind)

    def commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> Snapshot:
        """Add and delete files of a branch.

        Args:
            name: Name of the repository.
            branch: Its branch.
            lines: The lines of the request, each `{"key": …, "value": …}`.

        Returns:
            The branch as it is then.
        """
        with self._lock:
            self.snapshot(name, branch)
            folder = self.folder / name.replace("/", "--") / branch
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    file = folder / value["path"]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(base64.b64decode(value["content"]))
                elif line["key"] == "deletedFile":
                    (folder / value["path"]).unlink()
                elif line["key"] == "deletedFolder":
                    shutil.rmtree(folder / value["path"])
            return self._read(name, self.repositories[name], branch)


def _write_attributes(folder: Path, revision: str) -> None:
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n", "utf-8")
