"""Traces made by hand, tokens that break things, and files of the first format."""

from __future__ import annotations

import pyarrow as pa

from opdlab.data.notes import Note
from opdlab.data.trace import Trace
from opdlab.data.trace_formats import upgrade
from opdlab.viz.made_up import make_trace as made

__all__ = ["NASTY", "by_method", "byte_pieces", "made", "several", "with_notes"]
NASTY = (
    "<script>window.broken=1</script>",
    "</script>",
    "<img src=x onerror=window.broken=1>",
    "&amp;",
    "<!--",
    "\u202eevil",
    "👩\u200d💻",
    "\u200b",
    "\x00",
    "",
    " ",
    "\n",
    "\t",
    "\r",
    " the",
    "日本",
    "شكرا",
    "\u0301",
    "<|im_end|>",
    "\"'`",
    "]]>",
    "\u2028",
)


def byte_pieces(text: str, size: int = 2) -> list[bytes]:
    """The text cut anywhere, also inside characters."""
    raw = text.encode()
    return [raw[i : i + size] for i in range(0, len(raw), size)]


def by_method(trace: Trace, method: object) -> Trace:
    """The trace as a file of the first format, after a step of this method, is read."""
    meta = {name: value for name, value in trace.meta.items() if name not in ("format", "columns")}
    kind = type(method)
    mark = {"name": kind.__name__, "planner": f"{kind.__module__}.{kind.__qualname__}"}
    return Trace(trace.table, upgrade({**meta, "method": mark}))


def with_notes(trace: Trace, **notes: Note) -> Trace:
    """The trace with notes of a plan of somebody's own."""
    stored = {name: note.as_json() for name, note in notes.items()}
    return Trace(trace.table, trace.meta | {"notes": {"mine": stored}})


def several(*traces: Trace) -> Trace:
    """Completions of their own as one trace; their vocabularies must agree where they use the same
    ids.
    """
    tables = [
        t.table.set_column(t.table.column_names.index("sample"), "sample", pa.array([i] * len(t)))
        for i, t in enumerate(traces)
    ]
    meta = {key: [v for t in traces for v in t.meta[key]] for key in ("texts", "finish", "prompts")}
    vocab: dict[str, str] = {}
    for t in traces:
        assert all(vocab.get(i, word) == word for i, word in t.meta["vocab"].items())
        vocab |= t.meta["vocab"]
    return Trace(
        pa.concat_tables(tables, promote_options="default"),
        {**traces[0].meta, **meta, "vocab": vocab},
    )
