"""Names for the tokens of a table: `a`, `b`, `c`, …, so that what a toy model writes is a text."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from opdlab.errors import OpdlabError


@dataclass(frozen=True)
class Letters:
    """A tokenizer with one token per letter, as far as methods ask for one.

    Attributes:
        vocab: Number of tokens.
        eos_token_id: The token that ends a text, or None.
    """

    vocab: int
    eos_token_id: int | None = None

    @property
    def all_special_ids(self) -> list[int]:
        """The EOS token, if there is one."""
        return [] if self.eos_token_id is None else [self.eos_token_id]

    def get_vocab(self) -> dict[str, int]:
        """Return the ids by letter.

        Returns:
            One entry per token.
        """
        return {
            piece: i for i, piece in enumerate(self.convert_ids_to_tokens(list(range(self.vocab))))
        }

    def get_added_vocab(self) -> dict[str, int]:
        """Return nothing: no token was added.

        Returns:
            An empty dict.
        """
        return {}

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the letter of each id; the EOS token is a full stop.

        Args:
            ids: Token ids, below `vocab`.

        Returns:
            One letter per id.
        """
        return ["." if i == self.eos_token_id else string.ascii_letters[i] for i in ids]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of ids.

        Args:
            ids: Token ids, below `vocab`.
            skip_special_tokens: Whether to leave out the EOS token.

        Returns:
            The letters in a row.
        """
        kept = [i for i in ids if not (skip_special_tokens and i == self.eos_token_id)]
        return "".join(self.convert_ids_to_tokens(kept))

    def batch_decode(
        self, rows: Sequence[Sequence[int]], skip_special_tokens: bool = False
    ) -> list[str]:
        """Return the text of each row of ids.

        Args:
            rows: Token ids of each text.
            skip_special_tokens: Whether to leave out the EOS token.

        Returns:
            One text per row.
        """
        return [self.decode(row, skip_special_tokens) for row in rows]

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        """Return the ids of a text without spaces, under the key `input_ids`."""
        known = self.get_vocab()
        if strange := sorted(set(text) - set(known)):
            raise OpdlabError(
                f"A table of {self.vocab} tokens cannot read {strange[0]!r}. Write with"
                f" {' '.join(known)}."
            )
        return {"input_ids": [known[letter] for letter in text]}
