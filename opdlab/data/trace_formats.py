"""Read traces of earlier formats.

Format 1 kept no descriptions: what a plan's columns and notes were was known from the method's name alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opdlab.data.column import Description
from opdlab.data.notes import Alignments, Chunks, Note, Windows

_CODES = {
    "DOPD": (
        "route",
        ("LH agree, sure", "LL agree, unsure", "HT teacher leads", "HS student leads"),
    ),
    "EOPD": ("gated", ("reverse KL alone", "gated: forward KL too")),
    "OmniOPD": ("audited", ("anchored", "audited")),
    "TOPD": ("divergent", ("no", "yes")),
}


def upgrade(meta: Any) -> Any:
    """Give the metadata of an earlier format those of the present one; what is no mapping stays as it is.

    Raises:
        ValueError: The file was written by a later version.
    """
    if not isinstance(meta, Mapping) or meta.get("format", 1) == 2:
        return meta
    if meta.get("format", 1) != 1:
        raise ValueError(
            f"its format is {meta['format']}, which only a later version of opdlab can read"
        )
    name = _method(meta)
    notes = _notes(meta.get("notes") or {})
    columns = {}
    if name in _CODES and _CODES[name][0] in meta.get("plan", []):
        column, labels = _CODES[name]
        columns[column] = Description(labels=labels).as_json()
    return {
        **meta,
        "format": 2,
        "method": name,
        "columns": columns,
        "notes": {name: notes} if notes else {},
    }


def _method(meta: Mapping[str, Any]) -> str:
    """The method of opdlab whose plan made the columns; "" where that is not known."""
    mark = meta.get("method")
    if isinstance(mark, Mapping):
        planner = str(mark.get("planner", ""))
        return (
            planner.rpartition(".")[2]
            if planner.startswith("opdlab.")
            else str(mark.get("name", ""))
        )
    planned = set(meta.get("plan", []))
    for name, columns in (
        ("DOPD", {"route", "gap"}),
        ("TOPD", {"divergent", "window_distance"}),
        ("OmniOPD", {"audited", "weight", "similarity"}),
    ):
        if columns <= planned:
            return name
    return ""


def _notes(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Notes with their types, told by what they hold."""
    facts = {name: note for name, note in notes.items() if name in ("topd", "alignment")}
    typed: dict[str, Note] = {}
    if _holds(notes.get("windows"), "sample", "position", "student", "teacher", "distance"):
        known = facts.get("topd", {})
        typed["windows"] = Windows(notes["windows"], known.get("threshold"), known)
    if _holds(
        notes.get("audits"), "sample", "start", "length", "text", "continuations", "similarity"
    ):
        typed["chunks"] = Chunks(notes["audits"])
    if _holds(notes.get("spans"), "sample", "teacher", "spans", "kl"):
        typed["alignments"] = Alignments(notes["spans"], facts.get("alignment"))
    used = {"windows": "windows", "audits": "chunks", "spans": "alignments"}
    rest = {
        name: note
        for name, note in notes.items()
        if used.get(name) not in typed and name not in facts
    }
    return rest | {name: note.as_json() for name, note in typed.items()}


def _holds(note: Any, *keys: str) -> bool:
    return isinstance(note, list) and all(
        isinstance(entry, Mapping) and set(keys) <= set(entry) for entry in note
    )
