"""What a grader returns for the tokens of a rollout: hidden states with a head, or top-k log-probs.

A local model knows its whole distribution and gives `States`; the log-probs `[tokens, V]` are made
a chunk at a time. A server gives the log-probs of its `k` likeliest tokens and of the sampled one,
`TopLogprobs`. What these leave out has a known total mass and nothing else, so a loss gets it as
one bucket or not at all, and a loss that asks for the whole distribution gets an error.
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
        """How many tokens the distributions are over."""
        ...

    def part(self, piece: slice | Tensor) -> Graded:
        """The same for some tokens, without gradient. `piece`: a slice or indices."""
        ...

    def logp(self) -> Tensor | TopLogprobs:
        """Log-probs `[n, V]`, or the top ones where only these are known."""
        ...


@dataclass(frozen=True)
class States:
    """A policy's hidden states `[tokens, H]` on some rollout, with the head that reads them."""

    hidden: Tensor
    head: Head

    @property
    def vocab_size(self) -> int:
        """How many tokens the distribution is over."""
        return self.head.rows

    def part(self, piece: slice | Tensor) -> States:
        """The same for some tokens, without gradient. `piece`: a slice or indices."""
        return States(self.hidden[piece].detach(), self.head)

    def logp(self) -> Tensor:
        """Log-probs `[n, V]`."""
        return log_softmax_in_place(self.head(self.hidden))


RESOLUTION = (
    1e-7  # float32 log-probs show the mass that the top tokens leave over to about this much
)


@dataclass(frozen=True)
class TopLogprobs:
    """`ids [n, k]`, likeliest first, with log-probs `top [n, k]`; `sampled [n]` is that of the
    token that was written.

    `vocab` is the vocabulary size. Same interface as `States`, so the engine accepts either.
    """

    ids: Tensor
    top: Tensor
    sampled: Tensor
    token: Tensor
    vocab: int

    @property
    def vocab_size(self) -> int:
        """How many tokens the distributions are over."""
        return self.vocab

    @property
    def k(self) -> int:
        return self.ids.shape[-1]

    def part(self, piece: slice | Tensor) -> TopLogprobs:
        """The same for some tokens. `piece`: a slice or indices."""
        return TopLogprobs(
            self.ids[piece], self.top[piece], self.sampled[piece], self.token[piece], self.vocab
        )

    def logp(self) -> TopLogprobs:
        """Itself: these are log-probs already."""
        return self

    def support(self, support: TopK) -> Tensor:
        """Ids `[n, k']` of its likeliest tokens; raises PartialDistribution where more are asked
        for than it has.
        """
        if support.k > self.k and self.k < self.vocab:
            raise PartialDistribution(
                f"{support} wants {support.k} tokens of {support.by!r}, whose server gives"
                f" {self.k}. Use TopK({self.k}, by={support.by!r}), or LogprobServer(…,"
                f" k={support.k}) if the server allows that many."
            )
        return self.ids[:, : support.k]

    def coarse(self, support: TopK) -> Tensor:
        """Log-probs on its own top tokens as `TopK.coarse` gives them:

        `[n, k']`, or `[n, k' + 1]` with the bucket.
        """
        k = min(support.k, self.k)
        top = self.top[:, :k]
        if support.tail == "renormalize":
            return top.log_softmax(-1)
        if support.tail == "drop" or k == self.vocab:
            return top
        tail = torch.cat([self.top[:, k:], self.tail()[:, None]], -1).logsumexp(-1, keepdim=True)
        return torch.cat([top, tail], -1)

    def tail(self) -> Tensor:
        """Log of the mass outside the top `k`, `[n]`; -inf where they are all tokens.

        It is what the top tokens leave over. Below `RESOLUTION` that is rounding, so it is kept
        between what is known: at least the sampled token's share where that is outside, at most as
        much as if each token had the last one's.
        """
        top = self.top.double()
        most = (self.vocab - self.k) * top[:, -1].exp()
        outside = (self.ids != self.token[:, None]).all(-1)
        least = torch.where(outside, self.sampled.double().exp(), 0.0)
        return (
            (1 - top.exp().sum(-1))
            .clamp(min=RESOLUTION)
            .minimum(most)
            .maximum(least)
            .log()
            .to(self.top.dtype)
        )


def whole_distribution_error(name: str, some: TopLogprobs) -> PartialDistribution:
    """The error for a loss that asks for all of it."""
    return PartialDistribution(
        f"This loss needs the whole distribution of {name!r}, but its server gives the {some.k}"
        f" likeliest of {some.vocab} tokens and the sampled one. Use OPD(top_k=TopK({some.k},"
        f" by={name!r})), OPD(estimator='sampled'), or rows.on(…) and rows.logp_of(…) in a loss of"
        " your own."
    )


def log_softmax_in_place(logits: Tensor) -> Tensor:
    """In the logits' own memory, which a head makes anew at every call."""
    return torch.log_softmax(logits, -1, out=logits)
