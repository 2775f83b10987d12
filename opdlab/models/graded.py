"""The grades of a rollout's tokens: hidden states with a head, or top-k log-probs.

A local model knows its whole distribution and gives `States`; the log-probs `[tokens, V]` are made
a chunk at a time. A server gives the log-probs of its `k` likeliest tokens and of the sampled one,
`TopLogprobs`. Of all other tokens only the total mass is known, so a loss gets them as one bucket
or not at all, and a loss that asks for the whole distribution gets an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from opdlab.errors import PartialDistribution
from opdlab.losses.divergences import TopK
from opdlab.models.head import Head


@runtime_checkable
class Graded(Protocol):
    """A grader's distributions over the tokens of a rollout, `n` of them in order."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the distributions are over, `V`."""
        ...

    def part(self, piece: slice | Tensor) -> Graded:
        """Take the grades of some tokens, without gradient.

        Args:
            piece: A slice or indices of tokens.

        Returns:
            The grades of these tokens.
        """
        ...

    def logp(self) -> Tensor | TopLogprobs:
        """Compute log-probs `[n, V]`; the top ones where only these are known.

        Returns:
            In nats, over the whole vocabulary or over the top tokens.
        """
        ...


@dataclass(frozen=True)
class States:
    """A policy's hidden states on some rollout, with the head that reads them.

    Attributes:
        hidden: `[tokens, H]`, the state where each token is predicted.
        head: The policy's output head.
        device: Where log-probs are wanted: the device of the student's tokens. None for that of
            the hidden states.
    """

    hidden: Tensor
    head: Head
    device: torch.device | None = None

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the distributions are over, `V`."""
        return self.head.vocab_size

    def part(self, piece: slice | Tensor) -> States:
        """Take the states of some tokens, without gradient.

        Args:
            piece: A slice or indices of tokens.

        Returns:
            The states of these tokens, with the same head.
        """
        if isinstance(piece, Tensor):
            piece = piece.to(self.hidden.device)
        return States(self.hidden[piece].detach(), self.head, self.device)

    def logp(self, memory: Tensor | None = None) -> Tensor:
        """Compute log-probs `[n, V]`.

        Args:
            memory: Log-probs of an earlier call that are no longer needed (see `Head`).

        Returns:
            In nats, in the precision of the head's logits: float32, or float64. They are on
            `device`, so that those of a teacher elsewhere can be compared with the student's.
        """
        return log_softmax_in_place(self.head(self.hidden, memory)).to(self.device)


# Float32 log-probs show the mass that the top tokens leave over to about this much.
RESOLUTION = 1e-7


@dataclass(frozen=True)
class TopLogprobs:
    """Top-k log-probs from a server.

    Same interface as `States`, so the engine accepts either.

    Attributes:
        ids: Ids of the likeliest tokens, likeliest first, `[n, k]`.
        top: Their log-probs in nats, `[n, k]`.
        sampled: Log-probs of the tokens that were written, `[n]`.
        token: Ids of the tokens that were written, `[n]`.
        vocab_size: Number of tokens that the distributions are over, `V`.
    """

    ids: Tensor
    top: Tensor
    sampled: Tensor
    token: Tensor
    vocab_size: int

    @property
    def k(self) -> int:
        """Number of likeliest tokens that are known."""
        return self.ids.shape[-1]

    def part(self, piece: slice | Tensor) -> TopLogprobs:
        """Take the log-probs of some tokens.

        Args:
            piece: A slice or indices of tokens.

        Returns:
            The log-probs of these tokens.
        """
        return TopLogprobs(
            self.ids[piece],
            self.top[piece],
            self.sampled[piece],
            self.token[piece],
            self.vocab_size,
        )

    def logp(self) -> TopLogprobs:
        """Return itself: these are log-probs already.

        Returns:
            The object itself.
        """
        return self

    def support(self, support: TopK) -> Tensor:
        """Take the ids `[n, k']` of the likeliest tokens that a loss asks for.

        Args:
            support: Says how many tokens, and of which policy.

        Returns:
            Ids, likeliest first; k' is at most `k`.

        Raises:
            PartialDistribution: It asks for more than there are.
        """
        if support.k > self.k and self.k < self.vocab_size:
            raise PartialDistribution(
                f"{support} wants {support.k} tokens of {support.by!r}, whose server gives"
                f" {self.k}. Use TopK({self.k}, by={support.by!r}), or LogprobServer(…,"
                f" k={support.k}) if the server allows that many."
            )
        return self.ids[:, : support.k]

    def coarse(self, support: TopK) -> Tensor:
        """Compute log-probs on the top tokens, as `TopK.coarse` does.

        Args:
            support: Says how many tokens, and what becomes of the mass outside.

        Returns:
            `[n, k']`, or `[n, k' + 1]` with the bucket of all other tokens at the end.
        """
        k = min(support.k, self.k)
        top = self.top[:, :k]
        if support.tail == "renormalize":
            return top.log_softmax(-1)
        if support.tail == "drop" or k == self.vocab_size:
            return top
        tail = torch.cat([self.top[:, k:], self.tail()[:, None]], -1).logsumexp(-1, keepdim=True)
        return torch.cat([top, tail], -1)

    def tail(self) -> Tensor:
        """Compute the log of the mass outside the top `k`, `[n]`; -inf where they are all tokens.

        The top tokens leave that mass over. Below `RESOLUTION` it is rounding, so it is kept within
        known bounds.

        Returns:
            Log-masses in nats, in the dtype of `top`.
        """
        top = self.top.double()
        mass = (1 - top.exp().sum(-1)).clamp(min=RESOLUTION)
        # At most: every other token is as likely as the last of the top.
        most = (self.vocab_size - self.k) * top[:, -1].exp()
        # At least: the share of the sampled token, where it is outside the top.
        is_outside = (self.ids != self.token[:, None]).all(-1)
        least = torch.where(is_outside, self.sampled.double().exp(), 0.0)
        return mass.minimum(most).maximum(least).log().to(self.top.dtype)


def whole_distribution_error(name: str, some: TopLogprobs) -> PartialDistribution:
    """Make the error for a loss that asks for the whole distribution of a server.

    Args:
        name: The server's name among the policies.
        some: Its grades.

    Returns:
        The error, for the caller to raise.
    """
    return PartialDistribution(
        f"This loss needs the whole distribution of {name!r}, but its server gives the {some.k}"
        f" likeliest of {some.vocab_size} tokens and the sampled one. Use OPD(top_k=TopK({some.k},"
        f" by={name!r})), OPD(estimator='sampled'), or rows.on(…) and rows.logp_of(…) in a loss of"
        " your own."
    )


def log_softmax_in_place(logits: Tensor) -> Tensor:
    """Compute a log-softmax in the logits' own memory, which a head makes anew at every call.

    Args:
        logits: Logits `[n, V]`, which are overwritten.

    Returns:
        Log-probs `[n, V]` in nats, in the same memory.
    """
    return torch.log_softmax(logits, -1, out=logits)
