"""Map the tokens of one tokenizer to those of another, by the bytes of their text.

    s        what the text goes on with, as far as a token of theirs tells it
    greedy   the longest of our tokens that s begins with: the one that reads the text's next bytes
    open     s is the beginning of a longer token of ours, so what follows s may change the answer

`ByteMap.to_ours` answers for all of their tokens at once. No model is asked.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from opdlab.data.tokens import Tokenizer, token_bytes

KEPT = 256  # tables that a map keeps; each has one entry for each of their tokens


@dataclass(frozen=True)
class Table:
    """Give each token of the teacher's a token of the student's.

    Attributes:
        target: `[V]`, the id of our greedy token; `residual` where no token of ours fits,
            `impossible` where the token contradicts the bytes that are known.
        is_open: `[V]`, whether what follows may change the answer.
    """

    target: Tensor
    is_open: Tensor


class ByteMap:
    """The tokens of a teacher as the tokens of a student.

    Args:
        ours: The bytes of each token of the student; b"" for special ones.
        theirs: The bytes of each token of the teacher; b"" for special ones.
        end: The student's token that ends a text; None for none.
        stops: The teacher's tokens that end a text.
        prefer: For bytes that several of our tokens have, the id that counts.

    Attributes:
        residual: The entry of `Table.target` for text that no token of ours begins.
        impossible: The entry for what cannot be.
    """

    def __init__(
        self,
        ours: Sequence[bytes],
        theirs: Sequence[bytes],
        end: int | None = None,
        stops: Collection[int] = (),
        prefer: dict[bytes, int] | None = None,
    ) -> None:
        self._ours: dict[bytes, int] = {}
        for i, piece in enumerate(ours):
            if piece:
                self._ours.setdefault(piece, i)
        self._ours |= prefer or {}
        self._begun = {piece[:n] for piece in self._ours for n in range(len(piece))}
        self._longest = max(map(len, self._ours), default=0)
        self._theirs = sorted((piece, i) for i, piece in enumerate(theirs) if piece)
        self._size, self._end, self._stops = len(theirs), end, tuple(stops)
        self.residual, self.impossible = len(ours), len(ours) + 1
        self.to_ours = lru_cache(KEPT)(self._to_ours)

    def is_open(self, text: bytes) -> bool:
        """Tell whether a longer token of ours begins with these bytes.

        Args:
            text: Some bytes.

        Returns:
            True if what follows them may change the greedy token.
        """
        return text in self._begun

    def greedy(self, text: bytes) -> int:
        """Find the longest token of ours that a text begins with.

        Args:
            text: The bytes that come next.

        Returns:
            Its id, or `residual`.
        """
        for n in range(min(len(text), self._longest), 0, -1):
            if text[:n] in self._ours:
                return self._ours[text[:n]]
        return self.residual

    def _to_ours(self, known: bytes, before: bytes) -> Table:
        """Say what becomes of each of their tokens.

        Args:
            known: Bytes that their next token is known to begin with, and which the student has
                read already.
            before: Bytes that come before their next token, and which the student has not read.

        Returns:
            The table. One of `known` and `before` is empty.
        """
        target = torch.full((self._size,), self.impossible if known else self.residual)
        is_open = torch.zeros(self._size, dtype=torch.bool)
        if not known:
            for stop in self._stops:
                ends = self._end if self._end is not None and not before else self.greedy(before)
                target[stop] = ends
        default = self.greedy(before)
        next_bytes = {piece[len(before)] for piece in self._begun_with(before)}
        start = bisect_left(self._theirs, (known,))
        for piece, i in self._theirs[start:]:
            if not piece.startswith(known):
                break
            rest = piece[len(known) :]
            if not rest:  # it ends where the student stands, but the text was read otherwise
                continue
            if before and rest[0] not in next_bytes:
                target[i] = default
                continue
            text = before + rest
            target[i], is_open[i] = self.greedy(text), self.is_open(text)
        return Table(target, is_open)

    def _begun_with(self, text: bytes) -> list[bytes]:
        """Our tokens that begin with some bytes and are longer."""
        if not text:
            return []
        return [piece for piece in self._ours if len(piece) > len(text) and piece.startswith(text)]


def vocabulary_bytes(tokenizer: Tokenizer, size: int, *, at_start: bool) -> list[bytes]:
    """List the bytes that each token adds to a text; b"" for special tokens and unknown ids.

    Args:
        tokenizer: The tokenizer.
        size: Number of ids, from 0 on.
        at_start: Whether the token is the first of a completion, where SentencePiece-like
            tokenizers drop a leading space.

    Returns:
        One entry per id.
    """
    silent = set(tokenizer.all_special_ids)
    pieces = [
        b"" if i in silent or i >= len(tokenizer) else piece
        for i, piece in enumerate(token_bytes(tokenizer, list(range(size))))
    ]
    if at_start and drops_first_space(tokenizer, pieces):
        return [piece[1:] if piece.startswith(b" ") else piece for piece in pieces]
    return pieces


def drops_first_space(tokenizer: Tokenizer, pieces: Sequence[bytes]) -> bool:
    """Tell whether a tokenizer drops the space of a first token when it decodes.

    Args:
        tokenizer: The tokenizer.
        pieces: The bytes of its tokens.

    Returns:
        False for a tokenizer without tokens that begin with a space.
    """
    spaced = next((i for i, p in enumerate(pieces) if p.startswith(b" ") and len(p) > 1), None)
    if spaced is None:
        return False
    alone = str(tokenizer.decode([spaced], clean_up_tokenization_spaces=False))
    return not alone.startswith(" ")
