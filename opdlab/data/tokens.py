"""Token ids as the exact bytes that they stand for, so that joined pieces are the text again.

Decoding one id at a time shows a replacement sign for every byte piece, and joining those is not
the text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any, Protocol


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that reads texts back from ids.

    Every `PreTrainedTokenizerBase` has it; `data` knows no more of transformers than this.
    Arguments and results are `Any` where transformers accepts and returns several types.
    """

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the tokens that begin, end or structure a text."""
        ...

    def get_added_vocab(self) -> dict[str, int]:
        """List the ids of the tokens that were added to the vocabulary, by their text.

        Returns:
            Ids by text.
        """
        ...

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Name the pieces of ids, as the vocabulary spells them; None for an id without one.

        Args:
            ids: A list of ids, or one id.

        Returns:
            One piece per id, or one piece.
        """
        ...

    def batch_decode(self, sequences: Any, **options: Any) -> Any:
        """Decode several sequences of ids to texts.

        Args:
            sequences: One list of ids per text.
            options: As in transformers, such as `skip_special_tokens`.

        Returns:
            One text per sequence.
        """
        ...

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """Decode one sequence of ids to a text.

        Args:
            token_ids: A list of ids.
            options: As in transformers, such as `clean_up_tokenization_spaces`.

        Returns:
            The text.
        """
        ...

    def __len__(self) -> int: ...


_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>$")


def token_bytes(tokenizer: Tokenizer, ids: list[int]) -> list[bytes]:
    """Give the bytes of each token; b"" for an id that the tokenizer does not have.

    Knows byte-level BPE, SentencePiece-like pieces (`▁`, `<0x0A>`) and plain pieces.

    Args:
        tokenizer: The tokenizer that the ids are of.
        ids: Token ids; they need not be one text.

    Returns:
        One entry per id. Special and added tokens stand as the UTF-8 bytes of their own text.
    """
    byte_level = '"ByteLevel"' in _decoder(tokenizer)
    # Added tokens stand as themselves.
    added = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    pieces = tokenizer.convert_ids_to_tokens(ids)
    return [
        _bytes(piece or "", byte_level and i not in added)
        for i, piece in zip(ids, pieces, strict=True)
    ]


def completion_texts(
    tokenizer: Tokenizer, rows: Sequence[Sequence[int]], eos: Collection[int]
) -> list[str]:
    """Decode completions to the texts that verifiers and pictures see.

    Only the token that ends a completion is left out. Special tokens within it stay, since tags
    such as `<answer>` or `<think>` are often added as special tokens, and a verifier looks for
    them.

    Args:
        tokenizer: The tokenizer of the policy that wrote the completions.
        rows: Token ids of each completion, without padding.
        eos: The tokens that end that policy's texts.

    Returns:
        One text per completion.
    """
    ended = [bool(row) and row[-1] in eos for row in rows]
    bodies = [list(row[:-1] if stops else row) for row, stops in zip(rows, ended, strict=True)]
    return [str(text) for text in tokenizer.batch_decode(bodies, skip_special_tokens=False)]


def _bytes(piece: str, byte_level: bool) -> bytes:
    if byte_level:
        table = _alphabet()
        return b"".join(bytes([table[c]]) if c in table else c.encode() for c in piece)
    found = _BYTE_PIECE.match(piece)
    return bytes([int(found[1], 16)]) if found else piece.replace("▁", " ").encode()


def _decoder(tokenizer: Tokenizer) -> str:
    """The settings of the tokenizer's decoder, as text; "" where it has none to show."""
    # A foreign object: tokenizers that transformers runs in Python have no backend.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = (
        backend.decoder.__getstate__()
        if backend is not None and backend.decoder is not None
        else b""
    )
    return state.decode() if isinstance(state, bytes) else str(state)


@lru_cache(1)
def _alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable character; this is the way back."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}
