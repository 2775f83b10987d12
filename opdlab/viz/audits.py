"""Audits: chunks of the student's text beside the texts that a teacher wrote there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from opdlab.data.notes import Chunks
from opdlab.data.trace import Trace
from opdlab.errors import OpdlabError
from opdlab.support.expect import expect
from opdlab.support.validation import Text, Unchecked, validate_arguments
from opdlab.viz import markup, payload
from opdlab.viz.channel import Channel, describe_channel
from opdlab.viz.glyphs import group_pieces, show_piece
from opdlab.viz.made_up import make_trace
from opdlab.viz.view import EXAMPLE_TOKENS, EXAMPLE_WORDS, View

if TYPE_CHECKING:
    from typing_extensions import Self

SHOWN = 8  # audits that the plain text lists
READ = 4000  # characters of a text that the page shows
FIELDS = {  # of a chunk
    "sample",
    "start",
    "length",
    "text",
    "continuations",
    "similarity",
    "prior",
    "weight",
}


class Audits(View):
    """Entropy along the text, the chunks that were compared, and the teacher's texts for each.

    Any method may note such chunks (`opdlab.data.notes.Chunks`), as OmniOPD does. There a chunk
    with k = the sum of its N similarities and p = the student's own prior has the weight
    (k + alpha p) / (N + alpha).

    Args:
        trace: The trace of a step whose plan noted chunks, `step.trace()`.
        title: The title above.

    Attributes:
        audits: The chunks by their first row of `df`.
        alpha: The number of texts that the prior counts as; None where the notes do not say.
        selected: The row of `df` that is looked at; at first in the chunk of least weight.
        trace: The trace.

    Raises:
        OpdlabError: The trace has no chunks.
    """

    caption = "What would the teacher have written instead, and what does that weigh?"
    name = "audits"
    scripts = ("audits.js",)
    styles = ("dots.css", "audits.css")

    @validate_arguments
    def __init__(self, trace: Unchecked[Trace], title: Text = "") -> None:
        super().__init__()
        expect(trace, Trace, type(self).__name__, "trace")
        self.trace, self.title = trace, title
        samples, positions = trace.column("sample").tolist(), trace.column("position").tolist()
        rows = {place: row for row, place in enumerate(zip(samples, positions, strict=True))}
        self.audits: dict[int, dict[str, Any]] = {}
        for chunk in _find_chunks(trace):
            row = rows.get((int(chunk["sample"]), int(chunk["start"])))
            if row is not None:
                self.audits[row] = chunk
        if not self.audits:
            raise OpdlabError("The trace has no audits. Take step.trace() of a run with OmniOPD.")
        note = trace.note(Chunks)
        alpha = (note.facts or {}).get("alpha") if note else None
        self.alpha = None if alpha is None else float(alpha)
        self.selected = min(self.audits, key=lambda row: self.audits[row]["weight"])

    @classmethod
    def fits(cls, given: object, sample: int = 0) -> bool:
        """Return whether `given` is a trace whose plan noted chunks.

        Args:
            given: Anything.
            sample: Not used: the view shows all completions.

        Returns:
            Whether at least one chunk was noted.
        """
        return isinstance(given, Trace) and bool(_find_chunks(given))

    @classmethod
    def of_trace(cls, trace: Trace, sample: int = 0) -> Self:
        """Make the view of all chunks of a trace.

        Args:
            trace: A trace that the view fits.
            sample: Not used: the view shows all completions.

        Returns:
            The view.
        """
        return cls(trace)

    @classmethod
    def example(cls, tokens: Sequence[bytes] = EXAMPLE_TOKENS, words: str = EXAMPLE_WORDS) -> Self:
        """Make the view of one chunk, the first token, and two texts of a teacher.

        Args:
            tokens: The bytes of the completion's tokens.
            words: All other texts: title, prompt, names.

        Returns:
            The view.
        """
        said = b"".join(tokens).decode("utf-8", "replace")
        chunk = {
            "sample": 0,
            "start": 0,
            "length": 1,
            "text": said,
            "continuations": [words, said],
            "similarity": [0.5, 1.0],
            "prior": 0.2,
            "weight": 0.64,
        }
        trace = make_trace(tokens, prompt=words, finish=words)
        note = Chunks([chunk], facts={"alpha": 0.5}).as_json()
        return cls(Trace(trace.table, trace.meta | {"notes": {"": {"chunks": note}}}), title=words)

    @property
    def df(self) -> pd.DataFrame:
        """The trace's rows with `token` and `audit`, the first row of its chunk (-1: none)."""
        return self.trace.to_pandas().assign(
            token=[show_piece(p) for p in self.trace.tokens()], audit=self._audit
        )

    @property
    def table(self) -> pd.DataFrame:
        """One row for each chunk, the least weight first.

        Columns: `row`, `sample`, `start`, `length`, `text`, the mean `similarity`, `prior`,
        `weight`, and `answers`, the teacher's texts with their numbers, the commonest first.
        """
        rows = [
            {
                "row": row,
                "sample": int(a["sample"]),
                "start": int(a["start"]),
                "length": int(a["length"]),
                "text": str(a["text"]),
                "similarity": _mean(a["similarity"]),
                "prior": float(a["prior"]),
                "weight": float(a["weight"]),
                "answers": [(text, n) for text, n in Counter(a["continuations"]).most_common()],
            }
            for row, a in self.audits.items()
        ]
        return pd.DataFrame(rows).sort_values("weight", kind="stable", ignore_index=True)

    def data(self) -> dict[str, Any]:
        """Return all that the script draws.

        Returns:
            Plain data and numpy arrays, as `static/audits.js` reads them.
        """
        lanes = [
            self._entropy,
            Channel("weight", "weight", self._in_chunks("weight"), "", fixed=1.0),
            Channel("similarity", "similarity", self._in_chunks("similarity"), "", fixed=1.0),
        ]
        drawn = [describe_channel(lane, lane.limit) for lane in lanes]
        drawn[0]["peaks"] = sorted(self.audits)
        return {
            "title": self.title,
            "text": payload.describe_text(self.trace),
            "channels": drawn,
            "alpha": self.alpha,
            "audit": self._audit,
            "audits": [self._describe_chunk(row, audit) for row, audit in self.audits.items()],
        }

    def static(self) -> str:
        """Return the picture as HTML without a script.

        Returns:
            Markup with a table of the chunks; every foreign string in it is escaped.
        """
        names = ("chunk", "weight", "prior", "similarity", "the student wrote", "the teacher wrote")
        head = "".join(f"<th>{name}</th>" for name in names)
        rows = "".join(_table_row(chunk) for chunk in self.table.to_dict("records"))
        return (
            f"{markup.draw_title(self.title)}"
            f'<div class="opd-bar"><span>{markup.escape(self._count)}</span></div>'
            f'<div class="opd-audit-table"><table><tr>{head}</tr>{rows}</table></div>'
        )

    def __repr__(self) -> str:
        lines = [
            f"{a['sample']}:{a['start']}  weight {markup.format_number(a['weight'])}"
            f" = prior {markup.format_number(a['prior'])},"
            f" similarity {markup.format_number(a['similarity'])} "
            f" {a['text']!r} | {_list_answers(a['answers'])}"
            for a in self.table.head(SHOWN).to_dict("records")
        ]
        more = [f"… {len(self.audits) - SHOWN} more"] if len(self.audits) > SHOWN else []
        head = f"Audits: {self.title + ', ' if self.title else ''}{self._count}"
        bars = markup.draw_sparkline_of(self.trace, self._entropy, self.selected)
        return "\n".join([head, *bars, *lines, *more])

    @property
    def _entropy(self) -> Channel:
        known = "student_entropy" in self.trace.table.column_names
        values = np.full(len(self.trace), np.nan)
        if known:
            values = self.trace.column("student_entropy").astype(float)
        return Channel("entropy", "student entropy", values, less="certain", more="undecided")

    @cached_property
    def _audit(self) -> np.ndarray:
        out = np.full(len(self.trace), -1)
        for row, audit in self.audits.items():
            out[row : row + int(audit["length"])] = row
        return out

    @property
    def _count(self) -> str:
        weights, similar = self.table["weight"].tolist(), self.table["similarity"].tolist()
        least, most = markup.format_number(min(weights)), markup.format_number(max(weights))
        return (
            f"{len(self.audits)} audited chunks: mean similarity"
            f" {markup.format_number(_mean(similar))}, weights {least} to {most}"
        )

    def _in_chunks(self, name: str) -> np.ndarray:
        """A number of each chunk on its tokens, NaN elsewhere; the mean of several."""
        out = np.full(len(self.trace), np.nan)
        for row, chunk in self.audits.items():
            values = np.atleast_1d(np.asarray(chunk[name], float))
            out[row : row + int(chunk["length"])] = _mean(values.tolist())
        return out

    def _describe_chunk(self, row: int, audit: Mapping[str, Any]) -> dict[str, Any]:
        """A chunk as the page reads it: texts as glyphs, equal ones of the teacher counted.

        The most similar text comes first.
        """
        counted = Counter(zip(audit["continuations"], audit["similarity"], strict=True))
        ordered = sorted(counted.items(), key=_negative_similarity)
        answers = [
            {"glyph": _describe_glyph(text), "similarity": similarity, "count": count}
            for (text, similarity), count in ordered
        ]
        return {
            "row": row,
            "length": int(audit["length"]),
            "glyph": _describe_glyph(audit["text"]),
            "prior": audit["prior"],
            "weight": audit["weight"],
            "similarity": _mean(audit["similarity"]),
            "n": len(audit["similarity"]),
            "answers": answers,
        }


def _find_chunks(trace: Trace) -> list[dict[str, Any]]:
    """The chunks of the trace's notes that have all fields."""
    note = trace.note(Chunks)
    return [chunk for chunk in note.chunks if set(chunk) >= FIELDS] if note else []


def _table_row(chunk: Mapping[str, Any]) -> str:
    cells = [
        f"{chunk['sample']}:{chunk['start']}",
        markup.format_number(chunk["weight"]),
        markup.format_number(chunk["prior"]),
        markup.format_number(chunk["similarity"]),
        markup.escape(chunk["text"]),
        markup.escape(_list_answers(chunk["answers"])),
    ]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _negative_similarity(counted: tuple[tuple[str, float], int]) -> float:
    return -counted[0][1]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if len(values) else float("nan")


def _list_answers(answers: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{text!r} ×{n}" if n > 1 else repr(text) for text, n in answers)


def _describe_glyph(text: str) -> list[Any]:
    """A text as the page draws it, cut where it is endless."""
    shown = text if len(text) <= READ else f"{text[:READ]} … ({len(text):,} characters)"
    (group,) = group_pieces([shown.encode("utf-8", "replace")])
    return [group.lead, [list(part) for part in group.parts], int(group.special)]
