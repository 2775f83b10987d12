"""Audits: where the student was asked to show its work, what the teacher would have written there,
and what that weighs (OmniOPD).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from opdlab.data.trace import Trace
from opdlab.errors import OpdlabError
from opdlab.support.expect import expect
from opdlab.viz import markup, payload
from opdlab.viz.channels import Channel, described
from opdlab.viz.glyphs import groups, visible
from opdlab.viz.provenance import notes_of
from opdlab.viz.view import View

SHOWN = 8  # audits that the plain text lists
READ = 4000  # characters of a text that the page shows


class Audits(View):
    """What did the teacher say to each chunk that was audited?

    Entropy along the text, the chunks, the teacher's continuations.

    trace: of an OmniOPD step, `step.trace()`, whose notes hold the audits. For a chunk with k = the
        sum of its N similarities and
    p = the student's own prior, its weight is (k + alpha p) / (N + alpha); `alpha` is read off the
    audits. Raises OpdlabError for a trace without audits. `selected` is a row of `df`, at first in
    the chunk of least weight; `table` has the audits.
    """

    name, scripts, styles = (
        "audits",
        ("tracks.js", "dots.js", "audits.js"),
        ("dots.css", "audits.css"),
    )

    def __init__(self, trace: Trace, title: str = "") -> None:
        super().__init__()
        expect(trace, Trace, type(self).__name__, "trace")
        self.trace, self.title = trace, title
        places = zip(
            trace.column("sample").tolist(), trace.column("position").tolist(), strict=True
        )
        rows = {place: row for row, place in enumerate(places)}
        notes = notes_of(trace, "OmniOPD").get("audits", [])
        self.audits = {
            rows[place]: note
            for note in notes
            if (place := (int(note["sample"]), int(note["start"]))) in rows
        }
        if not self.audits:
            raise OpdlabError("The trace has no audits. Take step.trace() of a run with OmniOPD.")
        self.selected = min(self.audits, key=lambda row: self.audits[row]["weight"])

    @property
    def df(self) -> pd.DataFrame:
        """The trace's rows with `token` and the first row of the `audit` that each lies in (-1:
        none).
        """
        return self.trace.to_pandas().assign(
            token=[visible(p) for p in self.trace.tokens()], audit=self._audit
        )

    @property
    def table(self) -> pd.DataFrame:
        """One row an audit, the least weight first: `row`, `sample`, `start`, `length`, `text`,
        mean `similarity`, `prior`, `weight`, and the commonest of the teacher's texts with their
        number, `answers`.
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

    @property
    def alpha(self) -> float | None:
        """How many texts the student's own prior counts as; None where no audit tells."""
        found = []
        for a in self.audits.values():
            k, n, p, w = math.fsum(a["similarity"]), len(a["similarity"]), a["prior"], a["weight"]
            found += [(k - w * n) / (w - p)] if abs(w - p) > 1e-3 else []
        return float(np.median(found)) if found else None

    def data(self) -> dict[str, Any]:
        inside = lambda name: np.where(self._audit >= 0, self._column(name), np.nan)
        entropy = self._entropy
        lanes = [
            Channel(name, name, inside(name), "", fixed=1.0) for name in ("weight", "similarity")
        ]
        drawn = [described(c, c.limit) for c in (entropy, *lanes)]
        drawn[0]["peaks"] = sorted(self.audits)
        return {
            "title": self.title,
            "text": payload.text(self.trace),
            "channels": drawn,
            "alpha": self.alpha,
            "audit": self._audit,
            "audits": [self._drawn(row, audit) for row, audit in self.audits.items()],
        }

    def static(self) -> str:
        title = markup.title(self.title)
        rows = "".join(
            f"<tr><td>{a['sample']}:{a['start']}</td><td>{markup.number(a['weight'])}</td><td>{markup.number(a['prior'])}</td>"
            f"<td>{markup.number(a['similarity'])}</td><td>{markup.safe(a['text'])}</td><td>{markup.safe(_said(a['answers']))}</td></tr>"
            for a in self.table.to_dict("records")
        )
        names = ("chunk", "weight", "prior", "similarity", "the student wrote", "the teacher wrote")
        head = "".join(f"<th>{name}</th>" for name in names)
        bar = f'<div class="opd-bar"><span>{markup.safe(self._count)}</span></div>'
        return (
            f'{title}{bar}<div class="opd-audit-table"><table><tr>{head}</tr>{rows}</table></div>'
        )

    def __repr__(self) -> str:
        lines = [
            f"{a['sample']}:{a['start']}  weight {markup.number(a['weight'])} = prior"
            f" {markup.number(a['prior'])}, similarity {markup.number(a['similarity'])} "
            f" {a['text']!r} | {_said(a['answers'])}"
            for a in self.table.head(SHOWN).to_dict("records")
        ]
        more = [f"… {len(self.audits) - SHOWN} more"] if len(self.audits) > SHOWN else []
        head = f"Audits: {self.title + ', ' if self.title else ''}{self._count}"
        return "\n".join(
            [head, *markup.sparkline_of(self.trace, self._entropy, self.selected), *lines, *more]
        )

    @property
    def _entropy(self) -> Channel:
        return Channel(
            "entropy",
            "student entropy",
            self._column("student_entropy"),
            less="certain",
            more="undecided",
        )

    @cached_property
    def _audit(self) -> np.ndarray:
        out = np.full(len(self.trace), -1)
        for row, audit in self.audits.items():
            out[row : row + int(audit["length"])] = row
        return out

    @property
    def _count(self) -> str:
        weights, similar = (
            [a[key] for a in self.table.to_dict("records")] for key in ("weight", "similarity")
        )
        return (
            f"{len(self.audits)} audited chunks: mean similarity {markup.number(_mean(similar))},"
            f" weights {markup.number(min(weights))} to {markup.number(max(weights))}"
        )

    def _column(self, name: str) -> np.ndarray:
        return (
            self.trace.column(name).astype(float)
            if name in self.trace.table.column_names
            else np.full(len(self.trace), np.nan)
        )

    def _drawn(self, row: int, audit: Mapping[str, Any]) -> dict[str, Any]:
        """An audit as the page reads it: the texts as glyphs, equal ones of the teacher counted,
        the most similar first.
        """
        said = Counter(zip(audit["continuations"], audit["similarity"], strict=True))
        answers = [
            {"glyph": _glyph(text), "similarity": phi, "count": n}
            for (text, phi), n in sorted(said.items(), key=lambda x: -x[0][1])
        ]
        return {
            "row": row,
            "length": int(audit["length"]),
            "glyph": _glyph(audit["text"]),
            "prior": audit["prior"],
            "weight": audit["weight"],
            "similarity": _mean(audit["similarity"]),
            "n": len(audit["similarity"]),
            "answers": answers,
        }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if len(values) else float("nan")


def _said(answers: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{text!r} ×{n}" if n > 1 else repr(text) for text, n in answers)


def _glyph(text: str) -> list[Any]:
    """A text as the page draws it, cut where it is endless: what is seen beside what it stands for."""
    shown = text if len(text) <= READ else f"{text[:READ]} … ({len(text):,} characters)"
    (group,) = groups([shown.encode("utf-8", "replace")])
    return [group.lead, [list(part) for part in group.parts], int(group.special)]
