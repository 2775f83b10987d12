"""Merge the traces that several processes made of one batch into the trace of one process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from opdlab.data.notes import TYPE
from opdlab.data.trace import Trace
from opdlab.data.trace_prompts import merge_descriptions

_META = b"opdlab trace"


def trace_to_bytes(trace: Trace) -> bytes:
    """Write a trace to bytes, to send it to another process.

    Args:
        trace: The trace.

    Returns:
        An Arrow stream.
    """
    table = trace.table.replace_schema_metadata({_META: json.dumps(trace.meta).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def trace_from_bytes(data: bytes) -> Trace:
    """Read what `trace_to_bytes` wrote.

    Args:
        data: An Arrow stream.

    Returns:
        The trace.
    """
    table = pa.ipc.open_stream(data).read_all()
    return Trace(table.replace_schema_metadata(), json.loads(table.schema.metadata[_META]))


def merge_traces(parts: Sequence[Trace], rows: Sequence[Sequence[int]]) -> Trace:
    """Put the traces of several processes together, completion by completion.

    Args:
        parts: At least one, with the same columns.
        rows: For each part, the number of each of its completions in the whole batch.

    Returns:
        A trace like that of one process. Entries of notes that name a `sample` are numbered anew;
        a note that is one list with an entry for each completion is put in their order. Other notes
        are kept where all parts agree, else one value for each process.
    """
    tables = []
    for part, numbers in zip(parts, rows, strict=True):
        sample = np.asarray(numbers, np.int64)[part.table["sample"].to_numpy()]
        at = part.table.column_names.index("sample")
        tables.append(part.table.set_column(at, "sample", pa.array(sample)))
    order = [("sample", "ascending"), ("position", "ascending")]
    table = pa.concat_tables(tables, promote_options="permissive").sort_by(order)
    if "share" in table.column_names:
        norm = table["grad_norm"].to_numpy()
        share = pa.array(norm / max(float(norm.sum()), 1e-30))
        table = table.set_column(table.column_names.index("share"), "share", share)
    meta = dict(parts[0].meta)
    for name in ("texts", "finish", "prompts"):
        meta[name] = _in_order([part.meta[name] for part in parts], rows)
    described = [part.meta.get("rollout") or {} for part in parts]
    if "rollout" in meta:  # nothing if a part lacks it: that of the first part is not the whole's
        meta["rollout"] = merge_descriptions(described, rows) if all(described) else {}
    vocab = {token: piece for part in parts for token, piece in part.meta["vocab"].items()}
    meta["vocab"] = dict(sorted(vocab.items(), key=lambda item: int(item[0])))
    meta["notes"] = {
        method: _merge_notes([part.meta["notes"].get(method, {}) for part in parts], rows)
        for method in {name: None for part in parts for name in part.meta.get("notes", {})}
    }
    return Trace(table, meta)


def _in_order(parts: Sequence[Sequence[Any]], rows: Sequence[Sequence[int]]) -> list[Any]:
    """Values of completions in the order of their numbers."""
    numbered = {
        number: value
        for part, numbers in zip(parts, rows, strict=True)
        for number, value in zip(numbers, part, strict=True)
    }
    return [numbered[number] for number in sorted(numbered)]


def _merge_notes(
    parts: Sequence[Mapping[str, Any]], rows: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """The notes of a plan in all processes."""
    names = {name: None for part in parts for name in part}
    return {name: _merge_note([part.get(name) for part in parts], rows) for name in names}


def _merge_note(notes: Sequence[Any], rows: Sequence[Sequence[int]]) -> Any:
    """One note of all processes."""
    if all(isinstance(note, Mapping) and TYPE in note for note in notes):
        whole = dict(notes[0])
        for name, value in whole.items():
            if isinstance(value, list):
                entries = [
                    entry
                    for note, numbers in zip(notes, rows, strict=True)
                    for entry in _numbered(note[name], numbers)
                ]
                whole[name] = sorted(entries, key=_place)
        return whole
    lengths = [len(numbers) for numbers in rows]
    if [len(note) if isinstance(note, list) else None for note in notes] == lengths:
        return _in_order(notes, rows)
    if all(note == notes[0] for note in notes):
        return notes[0]
    return {f"process {number}": note for number, note in enumerate(notes)}


def _numbered(entries: Sequence[Any], numbers: Sequence[int]) -> list[Any]:
    """Entries of a note with the numbers that their completions have in the whole batch."""
    return [
        {**entry, "sample": numbers[entry["sample"]]}
        if isinstance(entry, Mapping) and "sample" in entry
        else entry
        for entry in entries
    ]


def _place(entry: Any) -> tuple[int, int]:
    """The completion and the position that an entry of a note is about."""
    if not isinstance(entry, Mapping):
        return 0, 0
    return int(entry.get("sample", 0)), int(entry.get("position", entry.get("start", 0)))
