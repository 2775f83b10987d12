"""Notes of a plan that a picture can draw: what a method looked at besides single tokens.

A plan writes `batch.notes["windows"] = Windows(…)`; any method may. A trace keeps each note with
its type, and a view asks for the type: `trace.note(Windows)`. Other notes are plain JSON data under
a name of the method's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

TYPE = "opdlab note"  # the key under which a stored note tells its type


@dataclass(frozen=True)
class Note:
    """A note of a known type.

    Attributes:
        kind: The name of the type in files.
    """

    kind: ClassVar[str] = ""

    def as_json(self) -> dict[str, Any]:
        """Give plain data for a file.

        Returns:
            The note's fields by name, and its kind under `TYPE`.
        """
        return {TYPE: self.kind, **asdict(self)}


AnyNote = TypeVar("AnyNote", bound=Note)


@dataclass(frozen=True)
class Windows(Note):
    """Pairs of continuations from the same place, compared.

    Attributes:
        windows: For each pair: `sample` and `position` (where it starts), `student` and `teacher`
            (token ids), `distance`.
        threshold: The distance from which the two count as different.
        facts: Further numbers, by name.
    """

    kind: ClassVar[str] = "windows"
    windows: list[dict[str, Any]]
    threshold: float | None = None
    facts: dict[str, Any] | None = None


@dataclass(frozen=True)
class Chunks(Note):
    """Chunks of a completion that were compared with texts of a teacher.

    Attributes:
        chunks: For each chunk: `sample`, `start`, `length` (in tokens), `text`, `continuations`,
            `similarity`, `prior`, `weight`.
        facts: Further numbers, by name, such as `alpha`.
    """

    kind: ClassVar[str] = "chunks"
    chunks: list[dict[str, Any]]
    facts: dict[str, Any] | None = None


@dataclass(frozen=True)
class Alignments(Note):
    """Completions as two tokenizers cut them.

    Attributes:
        alignments: For each completion: `sample`, `teacher` (its pieces), `spans`, `kl`.
        facts: Further numbers, by name.
    """

    kind: ClassVar[str] = "alignments"
    alignments: list[dict[str, Any]]
    facts: dict[str, Any] | None = None


def read_note(stored: Any, note: type[AnyNote]) -> AnyNote | None:
    """Read a stored note as its type.

    Args:
        stored: Plain data of a trace.
        note: The type to read, such as `Windows`.

    Returns:
        The note; None where the data are of another type, or lack what the type needs.
    """
    if not isinstance(stored, Mapping) or stored.get(TYPE) != note.kind:
        return None
    known = {field.name for field in fields(note)}
    try:
        return note(**{name: value for name, value in stored.items() if name in known})
    except TypeError:
        return None
