"""Match the tokens of different tokenizers by the bytes of their text, never by index.

    ours      4 | _7 | _= | _85 |             tokens of `4 7 = 85`, a space shown as _
    theirs    4 | _ | 7_ | = | _8 | 5 |
    spans     4 | _7_=        | _85 |         the same bytes on both sides, each as short as can be

Works on exact bytes, so half a character in a token is no problem. No model is asked.
"""

from __future__ import annotations

import codecs
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from opdlab.data.tokens import Tokenizer, token_bytes
from opdlab.errors import OpdlabError


@dataclass(frozen=True)
class Span:
    """A shortest piece of text at whose both ends both tokenizers have a boundary.

    Attributes:
        ours: Our tokens of the piece.
        theirs: Their tokens of the piece.
        size: Its size in bytes.
    """

    ours: range
    theirs: range
    size: int

    @property
    def single(self) -> bool:
        """Whether it is one token on both sides."""
        return len(self.ours) == len(self.theirs) == 1


def decode_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> list[bytes]:
    """Give the bytes that each token of a completion adds to its text; joined, they are the text.

    Special tokens add nothing. The space that SentencePiece-like tokenizers put before a first
    piece, and drop when they decode, is no part of the text.

    Args:
        tokenizer: The tokenizer that the ids are of.
        ids: Token ids of one completion.

    Returns:
        The bytes of each token, one entry per id; b"" for special tokens.
    """
    silent = set(tokenizer.all_special_ids)
    said = [
        b"" if i in silent else piece
        for i, piece in zip(ids, token_bytes(tokenizer, list(ids)), strict=True)
    ]
    first = next((t for t, piece in enumerate(said) if piece), None)
    if first is not None and said[first].startswith(b" "):
        alone = str(tokenizer.decode([ids[first]], clean_up_tokenization_spaces=False))
        said[first] = said[first] if alone.startswith(" ") else said[first][1:]
    return said


def spans(ours: Sequence[bytes], theirs: Sequence[bytes]) -> list[Span]:
    """Find the shortest spans that two tokenizations of one text share.

    A token without bytes belongs to the span on its left (at the start, to the first).

    Args:
        ours: The bytes of each of our tokens.
        theirs: The bytes of each of their tokens.

    Returns:
        Spans in order, which together cover all tokens; none where the text is empty.

    Raises:
        OpdlabError: The two spell different texts.
    """
    mine, other = b"".join(ours), b"".join(theirs)
    if mine != other:
        at = next(
            (i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b),
            min(len(mine), len(other)),
        )
        raise OpdlabError(
            f"Only two tokenizations of one text can be aligned, but these differ from byte {at}"
            f" on: {mine[at : at + 20]!r} and {other[at : at + 20]!r}. Tokenize the very text that"
            " was written."
        )
    ends = [list(accumulate(map(len, pieces))) for pieces in (ours, theirs)]
    cuts = [0, *sorted(set(ends[0]) & set(ends[1]) - {0})]
    places = [[0, *(bisect_right(side, cut) for cut in cuts[1:])] for side in ends]
    whole = zip(pairwise(places[0]), pairwise(places[1]), pairwise(cuts), strict=True)
    return [Span(range(*a), range(*b), end - start) for a, b, (start, end) in whole]


def one_to_one(found: Iterable[Span]) -> float:
    """Compute the share of a text's bytes that lie in spans of one token on either side.

    Args:
        found: Spans of one text or of several, as `spans` gives them.

    Returns:
        From 0 to 1; 1.0 where there is no text.
    """
    found = list(found)
    if not found:
        return 1.0
    single = sum(span.size for span in found if span.single)
    return single / max(sum(span.size for span in found), 1)


def nats_per_byte(nats: Iterable[float], texts: Iterable[str]) -> float:
    """Divide all nats by all UTF-8 bytes, to compare runs with different tokenizers.

        nats_per_byte(trace.column("teacher_reverse_kl"), trace.meta["texts"])

    Nats on an end token count, though it has no bytes.

    Args:
        nats: One number per token.
        texts: The texts that the tokens spell.

    Returns:
        The mean in nats per byte, over all texts together.

    Raises:
        OpdlabError: There is no text.
    """
    size = sum(len(text.encode()) for text in texts)
    if not size:
        raise OpdlabError(
            "nats_per_byte got no text, so there are no bytes to divide by. Give the texts that the"
            " numbers belong to."
        )
    return float(sum(nats)) / size


def text_of(pieces: Iterable[bytes]) -> str:
    """Decode some tokens' bytes to whole characters.

    A last character that is cut in two is left out; bytes that are no UTF-8 show as �.

    Args:
        pieces: The bytes of consecutive tokens.

    Returns:
        Their text.
    """
    return codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(pieces))


def starts_character(piece: bytes) -> bool:
    """Tell whether a text may be cut before this token.

    It may not where the token goes on with a character that the token before began.

    Args:
        piece: The bytes of the token.

    Returns:
        True for a token without bytes, too.
    """
    return not piece or piece[0] & 0xC0 != 0x80
