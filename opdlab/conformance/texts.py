"""The toy texts that a loss is called on: logits of both policies at every token, without a model.

Two policies are tables of logits (`opdlab.exact.Table`), so the probability of every text is known.
`Texts` holds the rows of some texts; `lay_out` puts them into whole sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from opdlab import exact
from opdlab.conformance.contract import Sequences

PROMPTS = 3  # of the enumerated world
SPREAD = 1.2  # standard deviation of its logits
PADDING = ("left", "right")
Side = Literal["left", "right"]


@dataclass(frozen=True, eq=False)
class Texts:
    """Some completions under both policies.

    Attributes:
        student: Logits `[B, T, V]`; row `t` is what token `t` was drawn from. Rows in the padding
            hold numbers that must not matter.
        teacher: Logits `[B, T, V]`, likewise.
        ids: `[B, T]`.
        lengths: Real tokens of each text, `[B]`.
        mask: `[B, T]`, bool: the tokens that count. Others are padding, or a tool wrote them.
        eos_ids: The tokens that end a text; none where texts only end by their length.
    """

    student: Tensor
    teacher: Tensor
    ids: Tensor
    lengths: Tensor
    mask: Tensor
    eos_ids: tuple[int, ...] = ()

    @property
    def real(self) -> Tensor:
        """`[B, T]`, bool: the tokens that are no padding."""
        return torch.arange(self.ids.shape[1]) < self.lengths[:, None]

    @property
    def count(self) -> int:
        """Count the tokens that are not masked."""
        return int(self.mask.sum())

    def part(self, rows: slice) -> Texts:
        """Take some of the texts.

        Args:
            rows: Which.

        Returns:
            Their rows, as wide as all.
        """
        fields = ("student", "teacher", "ids", "lengths", "mask")
        return replace(self, **{name: getattr(self, name)[rows] for name in fields})

    def token(self, text: int, at: int) -> Texts:
        """Take one token as a text of its own; what stood before belongs to the prompt.

        Args:
            text: Number of the text.
            at: Position of the token.

        Returns:
            One text of one token.
        """
        row = self.part(slice(text, text + 1))
        here = slice(at, at + 1)
        one = torch.ones(1, dtype=torch.long)
        return Texts(
            row.student[:, here],
            row.teacher[:, here],
            row.ids[:, here],
            one,
            _ones(1, 1),
            self.eos_ids,
        )

    def padded(self, columns: int) -> Texts:
        """Add padding with random logits.

        Args:
            columns: How many positions.

        Returns:
            Wider texts.
        """
        batch, _, vocab = self.student.shape
        generator = torch.Generator().manual_seed(7)
        wider = []
        for own in (self.student, self.teacher):
            junk = torch.randn((batch, columns, vocab), generator=generator, dtype=own.dtype)
            wider.append(torch.cat([own, 3 * junk], 1))
        last = self.eos_ids[0] if self.eos_ids else 0
        ids = torch.cat([self.ids, torch.full((batch, columns), last)], 1)
        mask = torch.cat([self.mask, ~_ones(batch, columns)], 1)
        return replace(self, student=wider[0], teacher=wider[1], ids=ids, mask=mask)

    def moved(self, student: Tensor | None = None, teacher: Tensor | None = None) -> Texts:
        """Replace the logits of a policy.

        Args:
            student: `[B, T, V]`, or None to leave them.
            teacher: Likewise.

        Returns:
            The same tokens under other policies.
        """
        return replace(
            self,
            student=self.student if student is None else student,
            teacher=self.teacher if teacher is None else teacher,
        )

    def to(self, dtype: torch.dtype) -> Texts:
        """Convert the logits.

        Args:
            dtype: A floating-point type.

        Returns:
            The same texts.
        """
        return self.moved(self.student.to(dtype), self.teacher.to(dtype))


def make_pair(
    vocab: int, seed: int, *, apart: float | None = None
) -> tuple[exact.Table, exact.Table]:
    """Make two random policies.

    Args:
        vocab: Tokens `V`.
        seed: Seed of their logits.
        apart: None for two policies that know nothing of each other; else the standard deviation
            of the teacher's logits around the student's, 0 for equal policies.

    Returns:
        Student and teacher.
    """
    length = 2 if vocab <= 8 else 1
    student, other = (
        exact.Table.random(vocab, length, PROMPTS, seed=1000 * seed + i, scale=SPREAD)
        for i in range(2)
    )
    return student, other if apart is None else student.add(apart / SPREAD * other.logits)


def every_prefix(student: exact.Table, teacher: exact.Table) -> Texts:
    """List every token after every prefix of every prompt, as texts of one token.

    Args:
        student: The student.
        teacher: The teacher.

    Returns:
        `X * S * V` texts, in the order of the tables' logits `[X, S, V]`.
    """
    vocab = student.vocab
    rows = [table.logits.flatten(0, 1).repeat_interleave(vocab, 0) for table in (student, teacher)]
    count = len(rows[0])
    ids = torch.arange(vocab).repeat(count // vocab)[:, None]
    ones = torch.ones(count, dtype=torch.long)
    return Texts(rows[0][:, None], rows[1][:, None], ids, ones, _ones(count, 1))


def uneven(vocab: int, seed: int = 0, *, with_eos: bool = True) -> Texts:
    """Make six texts of one to four tokens: some end by themselves, some are cut.

    Args:
        vocab: Tokens `V`, at least 4.
        seed: Seed of the logits.
        with_eos: Whether tokens 0 and 1 end a text. Otherwise all texts are cut.

    Returns:
        The texts, all of whose tokens count.
    """
    lengths = torch.tensor([4, 1, 2, 4, 3, 1])
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), 4, vocab)
    student, teacher = (
        SPREAD * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    ids = torch.randint(2, vocab - 1, shape[:2], generator=generator)  # the last stays free
    eos = {0: 0, 1: 0, 2: 1, 4: 0} if with_eos else {}  # texts 3 and 5 are cut
    for text, token in eos.items():
        ids[text, lengths[text] - 1] = token
    real = torch.arange(4) < lengths[:, None]
    ids = torch.where(real, ids, 0)
    return Texts(student, teacher, ids, lengths, real, (0, 1) if with_eos else ())


@dataclass(frozen=True, eq=False)
class Layout:
    """Texts inside whole sequences.

    Attributes:
        sequences: The sequences.
        at: `[B, T]`: the position whose logits predict each token of a text. -1 in the padding.
        student: Logits `[B, L, V]`, with numbers that must not matter at all other positions.
        teacher: Logits `[B, L, V]`, likewise.
    """

    sequences: Sequences
    at: Tensor
    student: Tensor
    teacher: Tensor


def free_token(texts: Texts) -> int:
    """Find a token that stands in no text and ends none, for the padding.

    Args:
        texts: The texts.

    Returns:
        Its id; the last one of the vocabulary where all are in use.
    """
    vocab = texts.student.shape[-1]
    used = {*texts.ids[texts.real].tolist(), *texts.eos_ids}
    return next((token for token in reversed(range(vocab)) if token not in used), vocab - 1)


def lay_out(texts: Texts, side: Side, pad_id: int) -> Layout:
    """Put texts behind prompts of two to four tokens.

    Args:
        texts: The texts.
        side: Where prompts are padded: "left" as for generation, with all completions beginning in
            one column; "right" as by a collator, where a completion follows its prompt at once.
        pad_id: The token of the padding.

    Returns:
        The sequences.
    """
    batch, width, vocab = texts.student.shape
    generator = torch.Generator().manual_seed(11)
    prompt_lengths = torch.tensor([2 + i % 3 for i in range(batch)])
    prompt_width = int(prompt_lengths.max())
    total = prompt_width + width
    first = torch.full((batch,), prompt_width) if side == "left" else prompt_lengths
    begin = first - prompt_lengths
    place = torch.arange(total)
    ids = torch.full((batch, total), pad_id)
    labels = torch.full((batch, total), -100)
    attention = (place >= begin[:, None]) & (place < (first + texts.lengths)[:, None])
    in_prompt = (place >= begin[:, None]) & (place < first[:, None])
    prompt = torch.randint(0, vocab, (batch, total), generator=generator)
    ids = torch.where(in_prompt, prompt, ids)
    real = texts.real
    row, column = real.nonzero(as_tuple=True)
    ids[row, first[row] + column] = texts.ids[row, column]
    row, column = (texts.mask & real).nonzero(as_tuple=True)
    labels[row, first[row] + column] = texts.ids[row, column]
    at = torch.where(real, first[:, None] + torch.arange(width) - 1, -1)
    junk = torch.randn((2, batch, total, vocab), generator=generator, dtype=texts.student.dtype)
    logits = []
    row, column = real.nonzero(as_tuple=True)
    for i, own in enumerate((texts.student, texts.teacher)):
        full = 2 * junk[i]
        full[row, at[row, column]] = own[row, column]
        logits.append(full)
    sequences = Sequences(
        ids, attention.long(), labels, prompt_lengths, prompt_width, pad_id, texts.eos_ids
    )
    return Layout(sequences, at, *logits)


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)
