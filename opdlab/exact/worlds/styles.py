"""Styles: every word has a content and a form, and teacher and student prefer other forms.

A text has `words` words; a token is a content and a form, "a" to "d" written lower or upper case.
One content is right at each word. The form does not matter to the score, and both sides have their
own. After a word in the student's form the teacher is out of its element, and less sure of the
content; and one more token, the repetition, leads into a loop: in it the student goes on repeating,
and so does the teacher as far as `trap` says.

A teacher of another tokenizer grades only part of the words: at the others its tokens do not end
where the student's do, so its log-probs cannot be told in the student's tokens. Its texts can be
read everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from opdlab.support.validation import Amount, Count, PositiveShare, Seed, Share, validate_fields

CONTENTS = 4
LOOP = 2 * CONTENTS  # the token that repeats
VOCAB = LOOP + 1
OWN, OTHER, LOOPING = 0, 1, 2  # what the teacher sees before a word: its form, the other, a loop


@dataclass(frozen=True)
class StyleWorld:
    """Words with contents and forms.

    Attributes:
        style: How strongly each side prefers its own form, in nats (log-odds).
        unaligned: The share of words that the teacher's log-probs cannot be told for.
        trap: The teacher's probability of going on in a loop.
        words: Words of a text.
        known: The student's probability of the right content before training.
        error: The teacher's probability of a wrong content after its own form.
        upset: How much of its certainty the teacher loses per nat of style after the other form.
        seed: Seed of the right contents, of the start and of the words that do not align.

    Raises:
        InvalidValue: A value is out of its range.
    """

    style: Amount = 1.0
    unaligned: Share = 0.0
    trap: Share = 0.1
    words: Count = 8
    known: PositiveShare = 0.4
    error: PositiveShare = 0.03
    upset: Share = 0.1
    seed: Seed = 0

    def __post_init__(self) -> None:
        validate_fields(self)

    @cached_property
    def right(self) -> Tensor:
        """The right content of each word, `[words]`."""
        return torch.randint(CONTENTS, (self.words,), generator=self._random(0))

    @cached_property
    def graded(self) -> Tensor:
        """The words for which the teacher's log-probs can be told, `[words]`."""
        order = torch.randperm(self.words, generator=self._random(1))
        return order >= round(self.unaligned * self.words)

    def teacher(self) -> Tensor:
        """Return the teacher's log-probs after its own form, after the other, and in a loop.

        Returns:
            `[words, 3, V]` in float64; it writes upper case.
        """
        sure = 1 - self.error
        shaken = max(1 / CONTENTS, sure * (1 - self.upset * self.style))
        own, other = (self._row(mass, -self.style, 0.01) for mass in (sure, shaken))
        return torch.stack([own, other, self._row(sure, -self.style, self.trap)], 1).log()

    def student(self) -> Tensor:
        """Return the student's logits before training; it writes lower case.

        Returns:
            `[words, 3, V]` in float64.
        """
        plain = self._row(self.known, self.style, 0.1)
        looping = self._row(self.known, self.style, 0.9)
        noise = torch.randn(self.words, 3, VOCAB, generator=self._random(2), dtype=torch.float64)
        return torch.stack([plain, plain, looping], 1).log() + 0.3 * noise

    @staticmethod
    def follow(token: Tensor) -> Tensor:
        """Return what the teacher sees after a token: its own form, the other, or a loop.

        Args:
            token: Token ids of any shape.

        Returns:
            States of the same shape.
        """
        state = torch.where(token < CONTENTS, OTHER, OWN)
        return torch.where(token == LOOP, LOOPING, state)

    def visits(self, logits: Tensor) -> Tensor:
        """Return the chance of what stands before each word.

        Args:
            logits: Of the writer, `[..., words, 3, V]`.

        Returns:
            `[..., words, 3]`; a text begins in the teacher's element.
        """
        p = logits.softmax(-1)
        after = torch.stack(
            [p[..., CONTENTS:LOOP].sum(-1), p[..., :CONTENTS].sum(-1), p[..., LOOP]], -1
        )  # [..., words, before, after]
        at = torch.zeros_like(p[..., 0, :, 0])
        at[..., OWN] = 1
        out = []
        for t in range(self.words):
            out.append(at)
            at = (at[..., None] * after[..., t, :, :]).sum(-2)
        return torch.stack(out, -2)

    def accuracy(self, logits: Tensor) -> Tensor:
        """Return the share of words with the right content, in whatever form.

        Args:
            logits: Of the writer, `[..., words, 3, V]`.

        Returns:
            `[...]`.
        """
        p, index = logits.softmax(-1), self.right[:, None, None].expand(*logits.shape[:-1], 1)
        hit = (p.gather(-1, index) + p.gather(-1, index + CONTENTS))[..., 0]
        return (self.visits(logits) * hit).sum(-1).mean(-1)

    def own_form(self, logits: Tensor) -> Tensor:
        """Return the share of words in the form that the student writes before training.

        Args:
            logits: Of the writer, `[..., words, 3, V]`.

        Returns:
            `[...]`.
        """
        own = logits.softmax(-1)[..., :CONTENTS].sum(-1)
        return (self.visits(logits) * own).sum(-1).mean(-1)

    def _row(self, mass: float, style: float, loop: float) -> Tensor:
        """Probabilities `[words, V]`: contents times forms, after the share of the loop."""
        wrong = (1 - mass) / (CONTENTS - 1)
        content = torch.full((self.words, CONTENTS), wrong, dtype=torch.float64)
        content.scatter_(1, self.right[:, None], mass)
        lower = torch.sigmoid(torch.tensor(float(style), dtype=torch.float64))
        both = torch.cat([content * lower, content * (1 - lower)], -1)
        repeat = torch.full((self.words, 1), loop, dtype=torch.float64)
        return torch.cat([both * (1 - loop), repeat], -1)

    def _random(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(3 * self.seed + stream)


def spell(token: int) -> str:
    """Return the two characters of a token: its content, and "-" or "+" for its form.

    Args:
        token: The token's id.

    Returns:
        The text.
    """
    if token == LOOP:
        return "~~"
    return "abcd"[token % CONTENTS] + ("-" if token < CONTENTS else "+")
