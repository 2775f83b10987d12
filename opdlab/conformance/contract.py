"""Describe how to call a loss of another code base: one protocol for each kind of loss.

Tensors are padded on the right: `B` texts of at most `T` completion tokens, `V` tokens in all.
`mask` is True where a token counts. A loss returns one number, or `[B, T]` numbers that its trainer
reduces, or a tuple that begins with one of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from torch import Tensor

Returned = Tensor | tuple[Any, ...]


class Kind(Enum):
    """Name the input that a loss takes before its keywords."""

    LOGITS = "logits"
    LOG_PROBS = "log_probs"
    SAMPLED = "sampled"
    TOP_K = "top_k"
    HIDDEN = "hidden"
    SEQUENCES = "sequences"


class LogitsLoss(Protocol):
    """A loss of logits, or, as `Kind.LOG_PROBS`, of log-probs of the whole vocabulary."""

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor, /, **more: Any) -> Returned:
        """Compute the loss.

        Args:
            student: `[B, T, V]`; row `t` is what token `t` was drawn from.
            teacher: `[B, T, V]`, likewise.
            mask: `[B, T]`, bool.
            more: What the spec's `keywords` and `options` name.

        Returns:
            A number or `[B, T]`.
        """
        ...


class SampledLoss(Protocol):
    """A loss of the sampled tokens' log-probs alone."""

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor, /, **more: Any) -> Returned:
        """Compute the loss.

        Args:
            student: Log-probs `[B, T]` of the tokens, in nats.
            teacher: Log-probs `[B, T]`, likewise.
            mask: `[B, T]`, bool.
            more: What the spec's `keywords` and `options` name.

        Returns:
            A number or `[B, T]`.
        """
        ...


class TopKLoss(Protocol):
    """A loss of the student's logits and of the teacher's `K` likeliest tokens."""

    def __call__(
        self, student: Tensor, log_probs: Tensor, ids: Tensor, mask: Tensor, /, **more: Any
    ) -> Returned:
        """Compute the loss.

        Args:
            student: Logits `[B, T, V]`.
            log_probs: The teacher's log-probs `[B, T, K]`, which do not sum to one.
            ids: The tokens that they are of, `[B, T, K]`.
            mask: `[B, T]`, bool.
            more: What the spec's `keywords` and `options` name.

        Returns:
            A number or `[B, T]`.
        """
        ...


class HiddenLoss(Protocol):
    """A fused loss, which applies both heads itself."""

    def __call__(
        self,
        student: Tensor,
        student_head: Tensor,
        teacher: Tensor,
        teacher_head: Tensor,
        mask: Tensor,
        /,
        **more: Any,
    ) -> Returned:
        """Compute the loss.

        Args:
            student: Hidden states `[B, T, H]`.
            student_head: Weights `[V, H]`.
            teacher: Hidden states `[B, T, H]`.
            teacher_head: Weights `[V, H]`.
            mask: `[B, T]`, bool.
            more: What the spec's `keywords` and `options` name.

        Returns:
            A number or `[B, T]`.
        """
        ...


@dataclass(frozen=True, eq=False)
class Sequences:
    """Whole sequences, as a trainer holds them: prompt, completion, padding.

    Attributes:
        ids: `[B, L]`.
        attention_mask: `[B, L]`, 1 at real tokens.
        labels: `[B, L]`: the ids of the tokens that count, -100 elsewhere. Nothing is shifted.
        prompt_lengths: `[B]`.
        prompt_width: The longest prompt of the batch.
        pad_id: The token that stands in the padding. It may be one of `eos_ids`.
        eos_ids: The tokens that end a text.
    """

    ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    prompt_lengths: Tensor
    prompt_width: int
    pad_id: int
    eos_ids: tuple[int, ...]


class SequencesLoss(Protocol):
    """A loss of whole sequences, which shifts and masks itself."""

    def __call__(
        self, student: Tensor, teacher: Tensor, sequences: Sequences, /, **more: Any
    ) -> Returned:
        """Compute the loss.

        Args:
            student: Logits `[B, L, V]` as a model returns them: row `i` predicts token `i + 1`.
            teacher: Logits `[B, L, V]`, likewise.
            sequences: The tokens.
            more: What the spec's `keywords` and `options` name.

        Returns:
            A number.
        """
        ...


Loss = LogitsLoss | SampledLoss | TopKLoss | HiddenLoss | SequencesLoss


class Reduction(Enum):
    """Name the way from the losses of the tokens to the loss."""

    NONE = "none"  # it does not reduce: [B, T]
    SUM = "sum"
    # The mean over all tokens of the batch.
    TOKEN = "token"  # nosec B105  # no password
    SEQUENCE = "sequence"  # the mean over texts of the mean over their tokens
    TEXT_SUM = "text_sum"  # the mean over texts of the sum over their tokens


class Quantity(Enum):
    """Name a number or tensor that a loss may take by a keyword of its own."""

    TOKENS = "tokens"  # ids [B, T] of the completion tokens
    COUNT = "count"  # tokens that count in all micro-batches, over the number of processes
    TEMPERATURE = "temperature"  # of both softmaxes
    SAMPLER = "sampler"  # log-probs [B, T] with which the tokens were sampled
