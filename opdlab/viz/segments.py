"""Segments: which stretches of a completion are thought, answer, or turns of a conversation."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate, groupby

from opdlab.data.trace import Trace
from opdlab.viz import categories
from opdlab.viz.turns import find_turns

# Across tokens. Some templates have the first mark in the prompt, so the text begins inside.
THINK = re.compile(rb"<think>|</think>")


def find_segments(trace: Trace) -> list[tuple[str, int, int]]:
    """Return `(name, first row, rows)` of each stretch of a completion, in order.

    A column `segment` of names decides, else the turns of a conversation: "turn 1" and the "reply"
    to it, and so on; else `<think>` and `</think>` in the text: "think" with both marks, "answer"
    besides. Nothing where none of them is there.

    Args:
        trace: The trace of one completion.

    Returns:
        Stretches that cover all rows, or an empty list.
    """
    if "segment" in trace.table.column_names and categories.is_text(trace.table["segment"].type):
        names = [name or "" for name in trace.table["segment"].to_pylist()]
    elif turns := find_turns(trace):
        return [
            (f"turn {turn + 1}" if is_own else "reply", first, size)
            for first, size, turn, is_own in turns
        ]
    else:
        names = _name_tokens(trace.tokens())
    out, at = [], 0
    for name, run in groupby(names):
        size = len(list(run))
        out.append((name, at, size))
        at += size
    return out


def _name_tokens(pieces: list[bytes]) -> list[str]:
    """Think or answer for each token; nothing for a text without marks.

    A token belongs where its last byte does.
    """
    thoughts = list(_find_thoughts(b"".join(pieces)))
    starts, names = [start for start, _ in thoughts], []
    for end in accumulate(map(len, pieces)) if thoughts else ():
        last = bisect_left(starts, end) - 1  # the last one that begins before this token ends
        names.append("think" if last >= 0 and end <= thoughts[last][1] else "answer")
    return names


def _find_thoughts(text: bytes) -> Iterator[tuple[int, int]]:
    """Byte ranges from a mark to the one that ends it, or to the end of a text that was cut off."""
    marks = list(THINK.finditer(text))
    start = 0 if marks and marks[0][0] == b"</think>" else None
    for mark in marks:
        if mark[0] == b"<think>":
            start = mark.start() if start is None else start
        elif start is not None:
            yield start, mark.end()
            start = None
    if start is not None:
        yield start, len(text)
