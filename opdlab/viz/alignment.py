"""Alignment: one text in the tokens of two models, joined where their bytes agree."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from opdlab.data.alignment import Span, decode_bytes, one_to_one, spans
from opdlab.data.trace import Trace
from opdlab.errors import OpdlabError
from opdlab.support.expect import expect
from opdlab.viz import markup, payload
from opdlab.viz.channels import Channel
from opdlab.viz.glyphs import visible
from opdlab.viz.provenance import notes_of
from opdlab.viz.view import View

LONG = 72  # columns from which a span's tokens wrap, and are not joined one by one
FULL = 60  # tokens of a side that a cell shows; of more, the first and last halves of these
STILL = 400  # spans that the picture without script holds


@dataclass(frozen=True)
class Piece:
    """A span as it is drawn: token places on both sides, bytes, and whether both sides spell the
    same there.
    """

    ours: range
    theirs: range
    size: int
    matched: bool = True

    @property
    def kind(self) -> str:
        return f"{len(self.ours)}:{len(self.theirs)}" if self.matched else "unmatched"


class Alignment(View):
    """Which tokens of two models stand for the same text? Two rows of tokens, joined span by span.

        viz.Alignment.of(text, student.tokenizer, teacher.tokenizer)
        viz.Alignment.of_trace(step.trace(), sample=0)       # of SpanOPD, coloured by what each span costs

    ours, theirs: the bytes that each token adds to the text (`opdlab.data.alignment.spoken`). Where
        the two spell different texts,
    what lies between their common beginning and end is unmatched, and hatched; so are tokens
    without bytes. kl: log p - log q of each span in nats, as SpanOPD notes it; orange where the
    student is over-confident, blue where the teacher wants more of it.
    cuts: spans that are known already, [start, stop, start, stop] in tokens of either side.

    `selected` is a span, a row of `df`.
    """

    name, scripts, styles = "alignment", ("alignment.js",), ("alignment.css",)

    def __init__(
        self,
        ours: Sequence[bytes],
        theirs: Sequence[bytes],
        kl: Sequence[float] | None = None,
        title: str = "",
        names: tuple[str, str] = ("student", "teacher"),
        cuts: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.title, self.names = title, names
        self.ours, self.theirs = (
            [bytes(piece) for piece in ours],
            [bytes(piece) for piece in theirs],
        )
        self.pieces = (
            list(pieces(self.ours, self.theirs))
            if cuts is None
            else [self._piece(*cut) for cut in cuts]
        )
        matched = sum(p.matched for p in self.pieces)
        if kl is not None and len(kl) not in (
            matched,
            matched + 1,
        ):  # SpanOPD also notes the end, which is no span of the text
            raise OpdlabError(
                f"Alignment got kl for {len(kl)} spans, but the texts have {matched}. Give one"
                " number a span."
            )
        self.kl = None if kl is None else np.asarray(kl, float)

    @classmethod
    def of(cls, text: str, ours: Any, theirs: Any, **options: Any) -> Alignment:
        """One text through two tokenizers."""
        ids = [
            tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (ours, theirs)
        ]
        return cls(decode_bytes(ours, ids[0]), decode_bytes(theirs, ids[1]), **options)

    @classmethod
    def of_trace(cls, trace: Trace, sample: int = 0, **options: Any) -> Alignment:
        """A completion of a step that SpanOPD trained on, with its KL; raises OpdlabError for one
        whose spans were not noted.
        """
        expect(trace, Trace, "Alignment.of_trace", "trace")
        noted = {one["sample"]: one for one in notes_of(trace, "SpanOPD").get("spans", [])}
        if sample not in noted:
            there = ", ".join(map(str, noted)) or "none"
            raise OpdlabError(
                f"The trace notes no spans of completion {sample}, only of {there}. Give"
                " step.trace() of a run with SpanOPD."
            )
        one = noted[sample]
        last = one["spans"][-1][1] if one["spans"] else 0
        return cls(
            trace.sample(sample).tokens()[:last],
            [t.encode() for t in one["teacher"]],
            kl=one["kl"],
            cuts=one["spans"],
            **options,
        )

    @property
    def share(self) -> float:
        """The share of the matched bytes that lie in spans of one token on either side."""
        return one_to_one(Span(p.ours, p.theirs, p.size) for p in self.pieces if p.matched)

    @property
    def df(self) -> pd.DataFrame:
        """One row a span: its tokens on both sides, bytes, kind ("1:1", "2:3", "unmatched") and KL
        where it is known.
        """
        rows = [
            {
                "ours": [visible(self.ours[t]) for t in p.ours],
                "theirs": [visible(self.theirs[t]) for t in p.theirs],
                "bytes": p.size,
                "kind": p.kind,
            }
            for p in self.pieces
        ]
        table = pd.DataFrame(rows, columns=["ours", "theirs", "bytes", "kind"])
        return table if self.kl is None else table.assign(kl=self._kl())

    def data(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "names": list(self.names),
            "said": self._said(),
            "ours": _drawn(self.ours),
            "theirs": _drawn(self.theirs),
            "cuts": np.array([_ends(p) for p in self.pieces], int).ravel(),
            "kl": None if self.kl is None else payload.numbers(-self._kl()),
            "limit": self._limit(),
            "long": LONG,
            "full": FULL,
        }

    def static(self) -> str:
        title = markup.title(self.title)
        cells = "".join(self._cell(i, p) for i, p in enumerate(self.pieces[:STILL]))
        more = (
            f'<span class="opd-soft">… {len(self.pieces) - STILL:,} more spans</span>'
            if len(self.pieces) > STILL
            else ""
        )
        return (
            f'{title}<div class="opd-bar"><span>{markup.safe(self._said())}</span></div><div'
            f' class="opd-rows2">{cells}{more}</div><div'
            f' class="opd-peaks">{markup.safe(" above, ".join(self.names))} below; · is a'
            " space</div>"
        )

    def __repr__(self) -> str:
        lines = [f"Alignment: {self.title + ', ' if self.title else ''}{self._said()}"]
        if self.pieces:
            size = (
                [max(len(p.ours), len(p.theirs)) for p in self.pieces]
                if self.kl is None
                else self._kl()
            )
            lines.append(
                f"{markup.sparkline(Channel('', '', np.array(size, float)))}"
                f" {'tokens' if self.kl is None else 'KL'} by span"
            )
        for i, name in enumerate(self.names):
            side, parts = (
                (self.ours, self.theirs)[i],
                ((p.ours, p.theirs)[i] for p in self.pieces[:24]),
            )
            lines.append(
                f"{name:>10} |"
                f" {' | '.join(' '.join(_seen(side[part.start : part.stop])) or '∅' for part in parts)}"
            )
        return "\n".join(lines)

    def _cell(self, i: int, piece: Piece) -> str:
        sides = [
            self.ours[piece.ours.start : piece.ours.stop],
            self.theirs[piece.theirs.start : piece.theirs.stop],
        ]
        wide = [[width(token) for token in side] for side in sides]
        rows = ["".join(_word(token) for token in _seen(side)) for side in sides]
        columns = [
            f"grid-template-columns:{' '.join(f'minmax(0, {w}fr)' for w in side) if 0 < len(side) <= FULL else '1fr'}"
            for side in wide
        ]
        wide_cell = max(map(sum, wide))
        loose = not piece.matched or wide_cell > LONG
        look = f"opd-pair{'' if piece.matched else ' opd-unmatched'}{'' if piece.kind == '1:1' else ' opd-several'}{' opd-loose' * loose}"
        shade = "" if self.kl is None else _shade(-float(self._kl()[i]), self._limit())
        top, foot = (
            f'<span class="opd-toks" style="{c};{shade}">{row}</span>'
            for c, row in zip(columns, rows, strict=True)
        )
        lines = "" if loose else joints(*sides)
        return (
            f'<span class="{look}" style="min-width:min({wide_cell}ch, 100%)">{top}<svg viewBox="0'
            ' 0 100 20" preserveAspectRatio="none" aria-hidden="true"><path'
            f' d="{lines}"/></svg>{foot}</span>'
        )

    def _piece(self, a: int, b: int, c: int, d: int) -> Piece:
        return Piece(range(a, b), range(c, d), sum(map(len, self.ours[a:b])))

    def _kl(self) -> np.ndarray:
        """By row of `df`; nan for what is unmatched."""
        assert self.kl is not None
        out, at = (
            np.full(len(self.pieces), np.nan),
            [i for i, p in enumerate(self.pieces) if p.matched],
        )
        out[at] = self.kl[: len(at)]
        return out

    def _limit(self) -> float:
        return 1.0 if self.kl is None else Channel("", "", self.kl).limit

    def _said(self) -> str:
        matched = [p for p in self.pieces if p.matched]
        single, unmatched = (
            sum(p.kind == "1:1" for p in matched),
            sum(p.size for p in self.pieces if not p.matched),
        )
        said = (
            f"{100 * self.share:.0f} % of the {'matched ' * bool(unmatched)}bytes in 1:1 spans"
            f" ({single} of {len(matched)})"
        )
        counts = (
            f"{len(self.ours)} {self.names[0]} tokens, {len(self.theirs)} {self.names[1]} tokens"
        )
        return f"{said} · {counts}{f' · {unmatched} bytes unmatched' if unmatched else ''}"


def pieces(ours: Sequence[bytes], theirs: Sequence[bytes]) -> Iterator[Piece]:
    """The spans of the common beginning, what differs as one unmatched piece, and the spans of the
    common end.
    """
    n, m = len(ours), len(theirs)
    a, b = _together(ours, theirs)
    c, d = (0, 0) if (a, b) == (n, m) else _together(ours[a:][::-1], theirs[b:][::-1], back=True)
    for part, i, j in (
        (spans(ours[:a], theirs[:b]), 0, 0),
        (None, 0, 0),
        (spans(ours[n - c :], theirs[m - d :]) if c or d else [], n - c, m - d),
    ):
        if part is None and (a + c < n or b + d < m):
            size = sum(map(len, ours[a : n - c])) or sum(map(len, theirs[b : m - d]))
            yield Piece(range(a, n - c), range(b, m - d), size, matched=False)
        for span in part or []:
            yield Piece(_moved(span.ours, i), _moved(span.theirs, j), span.size)


@lru_cache(maxsize=65_536)
def width(piece: bytes) -> int:
    """Columns that a token takes in a monospaced row, with a little air."""
    return 1 + sum(
        2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in payload.word(visible(piece))
    )


def joints(above: Sequence[bytes], below: Sequence[bytes]) -> str:
    """A line from each token above to each below that it shares bytes with; hundredths of the
    cell's width, twenty high.
    """
    out, (tops, feet) = [], (_places(side) for side in (above, below))
    for x, a, b in tops:
        out += [f"M{x:.1f} 0L{y:.1f} 20" for y, c, d in feet if min(b, d) - max(a, c) > 1e-9]
    return "".join(out)


def _places(side: Sequence[bytes]) -> list[tuple[float, float, float]]:
    """Of each token of a cell its centre in percent, and where its bytes begin and end as shares of
    the cell's.
    """
    x, y = (
        np.cumsum([0, *sizes]) / (sum(sizes) or 1)
        for sizes in ([width(p) for p in side], [len(p) for p in side])
    )
    return list(zip((50 * (x[:-1] + x[1:])).tolist(), y[:-1].tolist(), y[1:].tolist(), strict=True))


def _together(
    ours: Sequence[bytes], theirs: Sequence[bytes], back: bool = False
) -> tuple[int, int]:
    """How many tokens of either side, from the start, spell the same bytes (`back`: both sides come
    reversed).
    """
    way = -1 if back else 1
    whole = [b"".join(piece[::way] for piece in side) for side in (ours, theirs)]
    same = next(
        (i for i, (x, y) in enumerate(zip(*whole, strict=False)) if x != y), min(map(len, whole))
    )
    ends = [np.cumsum([0, *map(len, side)]) for side in (ours, theirs)]
    shared = [e for e in set(ends[0].tolist()) & set(ends[1].tolist()) if e <= same]
    cut = max(shared, default=0)
    if not cut and any(whole):
        return 0, 0
    a, b = (int(np.searchsorted(e, cut, side="right")) - 1 for e in ends)
    return a, b


def _ends(p: Piece) -> list[int]:
    return [p.ours.start, p.ours.stop, p.theirs.start, p.theirs.stop, p.size, int(p.matched)]


def _moved(places: range, by: int) -> range:
    return range(places.start + by, places.stop + by)


def _some(side: Sequence[bytes]) -> list[bytes | int]:
    """The tokens that a cell shows, and how many it leaves out, where it does."""
    if len(side) <= FULL:
        return list(side)
    return [*side[: FULL // 2], len(side) - FULL, *side[len(side) - FULL // 2 :]]


def _seen(side: Sequence[bytes]) -> list[str]:
    return [
        f"… {token:,} more …" if isinstance(token, int) else payload.word(visible(token))
        for token in _some(side)
    ]


def _word(token: str) -> str:
    return f"<span>{markup.safe(token)}</span>"


def _drawn(side: Sequence[bytes]) -> dict[str, Any]:
    """Every distinct token once; which each is; its columns and its bytes."""
    known = {piece: i for i, piece in enumerate(dict.fromkeys(side))}
    at = np.array([known[piece] for piece in side], int)
    wide, size = (
        np.array([measure(piece) for piece in known], int)[at] if known else at
        for measure in (width, len)
    )
    return {
        "word": [payload.word(visible(piece)) for piece in known],
        "at": at,
        "wide": wide,
        "size": size,
    }


def _shade(value: float, limit: float) -> str:
    if not np.isfinite(value):
        return ""
    (r, g, b), most = markup.INK[markup.side("ratio", value)]
    alpha = markup.weight(value, limit) * most
    return f"background-color:rgba({r},{g},{b},{alpha:.3f})" if alpha >= 0.02 else ""
