"""Traces of several processes, put together: the trace of one."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from opdlab import Trace
from opdlab.data.notes import Windows
from opdlab.data.trace_merging import merge_traces, trace_from_bytes, trace_to_bytes


def trace(rows: list[int], total: float | None = None) -> Trace:
    """A trace of completions of 1 to 3 tokens; `rows` are their numbers in the whole batch."""
    lengths = [1 + row % 3 for row in rows]
    sample = np.repeat(np.arange(len(rows)), lengths)
    number = np.repeat(rows, lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    norm = number + 1.0 + position
    windows = [
        {"sample": i, "position": 0, "student": [1], "teacher": [2], "distance": float(row)}
        for i, row in enumerate(rows)
    ]
    data = {
        "run": pa.array(["r"] * len(sample)).dictionary_encode(),
        "sample": sample,
        "position": position,
        "token_id": 10 + number,
        "grad_norm": norm,
        "share": norm / norm.sum(),
    }
    meta = {
        "format": 2,
        "policies": ["student"],
        "texts": [f"text {row}" for row in rows],
        "finish": ["stop" if row % 2 else "length" for row in rows],
        "prompts": [f"prompt {row}" for row in rows],
        "vocab": {str(10 + row): chr(97 + row) for row in rows},
        "notes": {
            "Mine": {
                "windows": Windows(windows, threshold=0.5, facts={"all": 5}).as_json(),
                "replies": [[f"reply {row}"] for row in rows],
                "same": {"a": 1},
                "sizes": len(rows),
            }
        },
    }
    asked = [f"prompt {row // 2}" for row in rows]
    different = list(dict.fromkeys(asked))
    meta["rollout"] = {
        "prompts": [{"text": text} for text in different],
        "of": [different.index(text) for text in asked],
        "writer": ["student" if row else "teacher" for row in rows],
        "n": 1,
        "vocabulary": None,
    }
    return Trace(pa.table(data), meta)


def test_the_parts_of_processes_give_the_trace_of_one():
    rows = [[0, 3], [1, 4], [2]]
    parts = [trace_from_bytes(trace_to_bytes(trace(part))) for part in rows]
    merged, whole = merge_traces(parts, rows), trace([0, 1, 2, 3, 4])
    for name in whole.table.column_names:
        assert merged.table[name].to_pylist() == whole.table[name].to_pylist(), name
    sizes = merged.meta["notes"]["Mine"].pop("sizes")
    whole.meta["notes"]["Mine"].pop("sizes")
    assert merged.meta == whole.meta
    assert sizes == {"process 0": 2, "process 1": 2, "process 2": 1}


def test_prompts_of_which_a_part_lacks_its_own_are_not_kept():
    rows = [[0, 3], [1, 4], [2]]
    parts = [trace_from_bytes(trace_to_bytes(trace(part))) for part in rows]
    parts[1].meta["rollout"] = {}  # JSON could not hold them
    assert merge_traces(parts, rows).meta["rollout"] == {}
