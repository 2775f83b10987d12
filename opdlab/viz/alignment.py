"""Alignment: one text in the tokens of two models, joined where their bytes agree."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from opdlab.data.alignment import Span, decode_bytes, one_to_one, spans
from opdlab.data.notes import Alignments
from opdlab.data.trace import Trace
from opdlab.errors import OpdlabError
from opdlab.support.expect import expect
from opdlab.support.validation import Text, validate_arguments
from opdlab.viz import markup, payload
from opdlab.viz.channel import Channel
from opdlab.viz.glyphs import show_piece
from opdlab.viz.view import EXAMPLE_TOKENS, EXAMPLE_WORDS, View

if TYPE_CHECKING:
    from typing_extensions import Self

LONG = 72  # columns from which a span's tokens wrap, and are not joined one by one
FULL = 60  # tokens of a side that a cell shows; of more, the first and last halves of these
STILL = 400  # spans that the picture without script holds
FIELDS = {"sample", "teacher", "spans", "kl"}  # of a noted alignment


@dataclass(frozen=True)
class Piece:
    """A span as it is drawn.

    Attributes:
        ours: Places of the student's tokens.
        theirs: Places of the teacher's tokens.
        size: Bytes.
        matched: Whether both sides spell the same there.
    """

    ours: range
    theirs: range
    size: int
    matched: bool = True

    @property
    def kind(self) -> str:
        """Such as "1:1", or "unmatched"."""
        return f"{len(self.ours)}:{len(self.theirs)}" if self.matched else "unmatched"


class Alignment(View):
    """Two rows of tokens, those of either model, joined span by span.

        viz.Alignment.of(text, student.tokenizer, teacher.tokenizer)
        viz.Alignment.of_trace(step.trace(), sample=0)  # coloured by the cost of each span

    Where the two spell different texts, the part between their common beginning and end is
    unmatched, and hatched; so are tokens without bytes.

    Args:
        ours: The bytes that each token of the student adds to the text
            (`opdlab.data.alignment.decode_bytes`).
        theirs: The same of the teacher.
        kl: log p - log q of each span in nats: orange where the student is over-confident, blue
            where the teacher wants more of it.
        title: The title above.
        names: The names of the two models.
        cuts: Spans that are known already, [start, stop, start, stop] in tokens of either side.

    Attributes:
        pieces: The spans, in order.
        selected: A span, as a row of `df`.
        ours: The bytes of the student's tokens.
        theirs: The bytes of the teacher's tokens.
        kl: log p - log q of each matched span in nats; None where it is not known.

    Raises:
        OpdlabError: There is not one KL for each span.
    """

    caption = "Which tokens of two models stand for the same text?"
    takes = "one text in the tokens of two models, or a trace with noted spans"
    name, scripts, styles = "alignment", ("alignment.js",), ("alignment.css",)

    @validate_arguments
    def __init__(
        self,
        ours: Sequence[bytes],
        theirs: Sequence[bytes],
        kl: Sequence[float] | None = None,
        title: Text = "",
        names: tuple[str, str] = ("student", "teacher"),
        cuts: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.title, self.names = title, names
        self.ours = [bytes(piece) for piece in ours]
        self.theirs = [bytes(piece) for piece in theirs]
        if cuts is None:
            self.pieces = list(find_pieces(self.ours, self.theirs))
        else:
            self.pieces = [self._piece(*cut) for cut in cuts]
        matched = sum(p.matched for p in self.pieces)
        # A method may also note the end of the text, which is no span of it.
        if kl is not None and len(kl) not in (matched, matched + 1):
            raise OpdlabError(
                f"Alignment got kl for {len(kl)} spans, but the texts have {matched}. Give one"
                " number a span."
            )
        self.kl = None if kl is None else np.asarray(kl, float)

    @classmethod
    def fits(cls, given: object, sample: int = 0) -> bool:
        """Return whether `given` is a trace whose plan noted the spans of this completion.

        Args:
            given: Anything.
            sample: The completion whose spans are wanted.

        Returns:
            Whether `of_trace(given, sample)` would work.
        """
        return isinstance(given, Trace) and sample in _find_spans(given)

    @classmethod
    def example(cls, tokens: Sequence[bytes] = EXAMPLE_TOKENS, words: str = EXAMPLE_WORDS) -> Self:
        """Make the alignment of a text with the same text in pieces of three bytes.

        Args:
            tokens: The bytes of the text's tokens.
            words: The title, and the name of both models.

        Returns:
            The alignment.
        """
        raw = b"".join(tokens).decode("utf-8", "replace").encode()
        thirds = [raw[i : i + 3] for i in range(0, len(raw), 3)]
        return cls(tokens, thirds, title=words, names=(words, f"{words}, in threes"))

    @classmethod
    def of(cls, text: str, ours: Any, theirs: Any, **options: Any) -> Self:
        """Make the alignment of one text in the tokens of two tokenizers.

        Args:
            text: The text.
            ours: The student's tokenizer.
            theirs: The teacher's tokenizer.
            options: Other arguments of `Alignment`.

        Returns:
            The alignment, without KL unless `options` has `kl`.
        """
        return cls(_cut(text, ours), _cut(text, theirs), **options)

    @classmethod
    def of_trace(cls, trace: Trace, sample: int = 0, **options: Any) -> Self:
        """Make the alignment of a completion whose spans a plan noted, with their KL.

        Args:
            trace: The trace of a step of SpanOPD, or of another method that notes `Alignments`.
            sample: The completion.
            options: Other arguments of `Alignment`.

        Returns:
            The alignment, coloured by the KL of each span.

        Raises:
            OpdlabError: The spans of this completion were not noted.
        """
        expect(trace, Trace, "Alignment.of_trace", "trace")
        noted = _find_spans(trace)
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
            [piece.encode() for piece in one["teacher"]],
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
        """One row for each span: its tokens on both sides, `bytes`, `kind`, and `kl` where known.

        The kind is such as "1:1" or "2:3", or "unmatched".
        """
        rows = [
            {
                "ours": [show_piece(self.ours[t]) for t in p.ours],
                "theirs": [show_piece(self.theirs[t]) for t in p.theirs],
                "bytes": p.size,
                "kind": p.kind,
            }
            for p in self.pieces
        ]
        table = pd.DataFrame(rows, columns=["ours", "theirs", "bytes", "kind"])
        return table if self.kl is None else table.assign(kl=self._kl())

    def data(self) -> dict[str, Any]:
        """Return all that the script draws.

        Returns:
            Plain data and numpy arrays, as `static/alignment.js` reads them.
        """
        return {
            "title": self.title,
            "names": list(self.names),
            "said": self._summary(),
            "ours": _describe_row(self.ours),
            "theirs": _describe_row(self.theirs),
            "cuts": np.array([_list_ends(p) for p in self.pieces], int).ravel(),
            "kl": None if self.kl is None else payload.compact(-self._kl()),
            "limit": self._limit(),
            "long": LONG,
            "full": FULL,
        }

    def static(self) -> str:
        """Return the picture as HTML without a script.

        Returns:
            Markup with the first 400 spans; every foreign string in it is escaped.
        """
        cells = "".join(self._draw_cell(i, piece) for i, piece in enumerate(self.pieces[:STILL]))
        left = len(self.pieces) - STILL
        more = f'<span class="opd-soft">… {left:,} more spans</span>' if left > 0 else ""
        names = markup.escape(" above, ".join(self.names))
        return (
            f"{markup.draw_title(self.title)}"
            f'<div class="opd-bar"><span>{markup.escape(self._summary())}</span></div>'
            f'<div class="opd-rows2">{cells}{more}</div>'
            f'<div class="opd-peaks">{names} below; · is a space</div>'
        )

    def __repr__(self) -> str:
        lines = [f"Alignment: {self.title + ', ' if self.title else ''}{self._summary()}"]
        if self.pieces:
            size = self._kl()
            if self.kl is None:
                size = np.array([max(len(p.ours), len(p.theirs)) for p in self.pieces], float)
            bars = markup.draw_sparkline(Channel("", "", size))
            lines.append(f"{bars} {'tokens' if self.kl is None else 'KL'} by span")
        ours = [self.ours[p.ours.start : p.ours.stop] for p in self.pieces[:24]]
        theirs = [self.theirs[p.theirs.start : p.theirs.stop] for p in self.pieces[:24]]
        for name, cells in zip(self.names, (ours, theirs), strict=True):
            shown = " | ".join(" ".join(_show_row(cell)) or "∅" for cell in cells)
            lines.append(f"{name:>10} | {shown}")
        return "\n".join(lines)

    def _draw_cell(self, i: int, piece: Piece) -> str:
        """A span as HTML: its tokens in two rows, and a line between tokens that share bytes."""
        ours = self.ours[piece.ours.start : piece.ours.stop]
        theirs = self.theirs[piece.theirs.start : piece.theirs.stop]
        columns = max(sum(map(count_columns, side)) for side in (ours, theirs))
        is_loose = not piece.matched or columns > LONG
        look = ["opd-pair"]
        look += [] if piece.matched else ["opd-unmatched"]
        look += [] if piece.kind == "1:1" else ["opd-several"]
        look += ["opd-loose"] if is_loose else []
        shade = "" if self.kl is None else _draw_shade(-float(self._kl()[i]), self._limit())
        lines = "" if is_loose else draw_joints(ours, theirs)
        return (
            f'<span class="{" ".join(look)}" style="min-width:min({columns}ch, 100%)">'
            f"{_draw_row(ours, shade)}"
            '<svg viewBox="0 0 100 20" preserveAspectRatio="none" aria-hidden="true">'
            f'<path d="{lines}"/></svg>'
            f"{_draw_row(theirs, shade)}</span>"
        )

    def _piece(self, a: int, b: int, c: int, d: int) -> Piece:
        return Piece(range(a, b), range(c, d), sum(map(len, self.ours[a:b])))

    def _kl(self) -> np.ndarray:
        """The KL by row of `df`; NaN where it is not known and for unmatched pieces."""
        out = np.full(len(self.pieces), np.nan)
        if self.kl is not None:
            matched = [i for i, piece in enumerate(self.pieces) if piece.matched]
            out[matched] = self.kl[: len(matched)]
        return out

    def _limit(self) -> float:
        return 1.0 if self.kl is None else Channel("", "", self.kl).limit

    def _summary(self) -> str:
        matched = [piece for piece in self.pieces if piece.matched]
        single = sum(piece.kind == "1:1" for piece in matched)
        unmatched = sum(piece.size for piece in self.pieces if not piece.matched)
        of = "matched bytes" if unmatched else "bytes"
        parts = [
            f"{100 * self.share:.0f} % of the {of} in 1:1 spans ({single} of {len(matched)})",
            f"{len(self.ours)} {self.names[0]} tokens, {len(self.theirs)} {self.names[1]} tokens",
        ]
        return " · ".join([*parts, f"{unmatched} bytes unmatched"] if unmatched else parts)


def _cut(text: str, tokenizer: Any) -> list[bytes]:
    """The bytes of a text's tokens."""
    return decode_bytes(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


def _find_spans(trace: Trace) -> dict[int, dict[str, Any]]:
    """The alignments that a plan noted, by completion."""
    note = trace.note(Alignments)
    noted = note.alignments if note else []
    return {int(one["sample"]): one for one in noted if set(one) >= FIELDS}


def find_pieces(ours: Sequence[bytes], theirs: Sequence[bytes]) -> Iterator[Piece]:
    """Yield the spans of two token rows, with the part where they differ as one unmatched piece.

    The spans of the common beginning come first, then that piece, then the spans of the common end.

    Args:
        ours: The bytes of each token of the student.
        theirs: The same of the teacher.

    Yields:
        Pieces in the order of the text.
    """
    n, m = len(ours), len(theirs)
    a, b = _count_common(ours, theirs)
    c, d = (
        (0, 0) if (a, b) == (n, m) else _count_common(ours[a:][::-1], theirs[b:][::-1], back=True)
    )
    yield from _shift_spans(ours[:a], theirs[:b], 0, 0)
    if a + c < n or b + d < m:
        size = sum(map(len, ours[a : n - c])) or sum(map(len, theirs[b : m - d]))
        yield Piece(range(a, n - c), range(b, m - d), size, matched=False)
    if c or d:
        yield from _shift_spans(ours[n - c :], theirs[m - d :], n - c, m - d)


def _shift_spans(
    ours: Sequence[bytes], theirs: Sequence[bytes], ours_start: int, theirs_start: int
) -> Iterator[Piece]:
    """The spans of two parts that begin at these places of the whole."""
    for span in spans(ours, theirs):
        yield Piece(
            range(span.ours.start + ours_start, span.ours.stop + ours_start),
            range(span.theirs.start + theirs_start, span.theirs.stop + theirs_start),
            span.size,
        )


@lru_cache(maxsize=65_536)
def count_columns(piece: bytes) -> int:
    """Return the columns that a token takes in a monospaced row, with a little air.

    Args:
        piece: The token's bytes.

    Returns:
        One more than the columns of its name; wide characters count twice.
    """
    return 1 + sum(
        2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in payload.shorten_word(show_piece(piece))
    )


def draw_joints(above: Sequence[bytes], below: Sequence[bytes]) -> str:
    """Return the SVG path that joins each token above with those below that share its bytes.

    In hundredths of the cell's width; the path is twenty high.

    Args:
        above: The bytes of each token of the upper row.
        below: The bytes of each token of the lower row.

    Returns:
        The `d` of an SVG path.
    """
    out = []
    feet = _places(below)
    for x, a, b in _places(above):
        out += [f"M{x:.1f} 0L{y:.1f} 20" for y, c, d in feet if min(b, d) - max(a, c) > 1e-9]
    return "".join(out)


def _places(side: Sequence[bytes]) -> list[tuple[float, float, float]]:
    """Each token's centre in percent of the cell, and where its bytes begin and end, 0 to 1."""
    columns = _find_edges([count_columns(piece) for piece in side])
    at = _find_edges([len(piece) for piece in side])
    centres = 50 * (columns[:-1] + columns[1:])
    return list(zip(centres.tolist(), at[:-1].tolist(), at[1:].tolist(), strict=True))


def _find_edges(sizes: list[int]) -> np.ndarray:
    """Return the beginnings of parts and the end of the last one, as shares of the sum."""
    return np.asarray(np.cumsum([0, *sizes]) / (sum(sizes) or 1))


def _count_common(
    ours: Sequence[bytes], theirs: Sequence[bytes], back: bool = False
) -> tuple[int, int]:
    """Count the tokens of either side that spell the same bytes from the start.

    `back` says that both sides come reversed.
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


def _list_ends(p: Piece) -> list[int]:
    return [p.ours.start, p.ours.stop, p.theirs.start, p.theirs.stop, p.size, int(p.matched)]


def _shorten_row(side: Sequence[bytes]) -> list[bytes | int]:
    """The tokens that a cell shows, and how many it leaves out, where it does."""
    if len(side) <= FULL:
        return list(side)
    return [*side[: FULL // 2], len(side) - FULL, *side[len(side) - FULL // 2 :]]


def _show_row(side: Sequence[bytes]) -> list[str]:
    return [
        f"… {token:,} more …" if isinstance(token, int) else payload.shorten_word(show_piece(token))
        for token in _shorten_row(side)
    ]


def _draw_word(token: str) -> str:
    return f"<span>{markup.escape(token)}</span>"


def _draw_row(side: Sequence[bytes], shade: str) -> str:
    """The tokens of one side of a span as HTML, each as wide as its text."""
    few = 0 < len(side) <= FULL
    columns = " ".join(f"minmax(0, {count_columns(token)}fr)" for token in side) if few else "1fr"
    words = "".join(_draw_word(token) for token in _show_row(side))
    return f'<span class="opd-toks" style="grid-template-columns:{columns};{shade}">{words}</span>'


def _describe_row(side: Sequence[bytes]) -> dict[str, Any]:
    """One row of tokens as the page reads it: every distinct token once, then each token's place.

    `wide` and `size` are a token's columns and bytes.
    """
    known = {piece: i for i, piece in enumerate(dict.fromkeys(side))}
    at = np.array([known[piece] for piece in side], int)
    return {
        "word": [payload.shorten_word(show_piece(piece)) for piece in known],
        "at": at,
        "wide": np.array([count_columns(piece) for piece in side], int),
        "size": np.array([len(piece) for piece in side], int),
    }


def _draw_shade(value: float, limit: float) -> str:
    if not np.isfinite(value):
        return ""
    (r, g, b), most = markup.INK[markup.colour_of("ratio", value)]
    alpha = markup.strength_of(value, limit) * most
    return f"background-color:rgba({r},{g},{b},{alpha:.3f})" if alpha >= 0.02 else ""
