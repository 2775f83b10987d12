"""Read traces of earlier formats.

Format 1 kept no descriptions: only the method's name told what a plan's columns and notes were.
Format 2 had no checksum over metadata and table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opdlab.data.column import Description
from opdlab.data.notes import Alignments, Chunks, Note, Windows

_CODES = {
    "DOPD": (
        "route",
        Description(
            labels=("LH agree, sure", "LL agree, unsure", "HT teacher leads", "HS student leads"),
            hues=("amount", "minus", "teacher", "student"),
        ),
    ),
    "EOPD": ("gated", Description(labels=("reverse KL alone", "gated: forward KL too"))),
    "OmniOPD": ("audited", Description(labels=("anchored", "audited"))),
    "TOPD": ("divergent", Description(labels=("no", "yes"))),
}


def upgrade(meta: Any) -> Any:
    """Turn the metadata of an earlier format into those of the present one.

    Args:
        meta: As a file has them. Anything but a mapping is returned as it is.

    Returns:
        Metadata of format 3; the argument itself where there is nothing to do.

    Raises:
        ValueError: The file was written by a later version.
    """
    if not isinstance(meta, Mapping) or meta.get("format", 1) == 3:
        return meta
    if meta.get("format", 1) == 2:
        return {**meta, "format": 3}
    if meta.get("format", 1) != 1:
        raise ValueError(
            f"its format is {meta['format']!r}, which only a later version of opdlab can read"
        )
    ours = _method_of_opdlab(meta)
    name = ours or _name_in_mark(meta)
    notes = _notes(meta.get("notes") or {})
    columns = {}
    if ours in _CODES and _CODES[ours][0] in (meta.get("plan") or []):
        column, description = _CODES[ours]
        columns[column] = description.as_json()
    if ours == "DOPD":
        columns |= _gap_of_dopd(meta)
    return {
        **meta,
        "format": 3,
        "method": name,
        "columns": columns,
        "notes": {name: notes} if notes else {},
    }


def _gap_of_dopd(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the gap of DOPD, and the confidence that pictures derive from the same policies."""
    names = list(meta.get("policies") or [])
    hinted = [name for name in names if name.endswith("+hint") and name != "teacher+hint"]
    student = next(iter(hinted), "student")
    if "teacher+hint" not in names or student not in names:
        return {}
    lines = (meta.get("notes") or {}).get("thresholds", {})
    return {
        name: Description(
            unit=unit,
            compares=("teacher+hint", student),
            threshold=lines.get(name) if isinstance(lines, Mapping) else None,
        ).as_json()
        for name, unit in (("gap", "nats"), ("confidence", ""))
    }


def _name_in_mark(meta: Mapping[str, Any]) -> str:
    mark = meta.get("method")
    return str(mark.get("name", "")) if isinstance(mark, Mapping) else ""


def _method_of_opdlab(meta: Mapping[str, Any]) -> str:
    """The method of opdlab whose plan made the columns; "" for others, and where none is known."""
    mark = meta.get("method")
    if isinstance(mark, Mapping):
        package, _, planner = str(mark.get("planner", "")).rpartition(".")
        return planner if package.partition(".")[0] == "opdlab" else ""
    # The first files did not name their method.
    planned = set(meta.get("plan") or [])
    for name, columns in (
        ("DOPD", {"route", "gap"}),
        ("TOPD", {"divergent", "window_distance"}),
        ("OmniOPD", {"audited", "weight", "similarity"}),
    ):
        if columns <= planned:
            return name
    return ""


def _notes(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Give notes their types, told by what they hold."""
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
