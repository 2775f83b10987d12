"""Names for the tokens of a table: `a`, `b`, `c`, …, so that what a toy model writes is a text."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from opdlab.errors import OpdlabError


@dataclass(frozen=True)
class Letters:
    """As much of a tokenizer as methods ask for: one token a letter, and perhaps one that ends a
    text.
    """

    vocab: int
    eos_token_id: int | None = None

    @property
    def all_special_ids(self) -> list[int]:
        return [] if self.eos_token_id is None else [self.eos_token_id]

    def get_vocab(self) -> dict[str, int]:
        return {
            piece: i for i, piece in enumerate(self.convert_ids_to_tokens(list(range(self.vocab))))
        }

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return ["." if i == self.eos_token_id else string.ascii_letters[i] for i in ids]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        kept = [i for i in ids if not (skip_special_tokens and i == self.eos_token_id)]
        return "".join(self.convert_ids_to_tokens(kept))

    def batch_decode(
        self, rows: Sequence[Sequence[int]], skip_special_tokens: bool = False
    ) -> list[str]:
        return [self.decode(row, skip_special_tokens) for row in rows]

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        """The ids of a text without spaces, under the key `input_ids`; nothing is added to it."""
        known = self.get_vocab()
        if strange := sorted(set(text) - set(known)):
            raise OpdlabError(
                f"A table of {self.vocab} tokens cannot read {strange[0]!r}. Write with"
                f" {' '.join(known)}."
            )
        return {"input_ids": [known[letter] for letter in text]}
