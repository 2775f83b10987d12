"""Some of a distribution's log-probs, as servers give them: those of its `k` likeliest tokens and of the sampled one.

What is left out has a known total mass and nothing else, so a loss gets it as one bucket or not at all, and a loss that
asks for the whole distribution gets an error. Never `[tokens, V]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdlab.divergence import TopK
from opdlab.errors import PartialDistribution

RESOLUTION = 1e-7  # float32 log-probs show the mass that the top tokens leave over to about this much


@dataclass(frozen=True)
class Partial:
    """`ids [n, k]`, likeliest first, with log-probs `top [n, k]`; `sampled [n]` is that of the token that was written.

    `vocab` is how many tokens there are in all. Stands where `rows.States` stands for a policy that knows everything.
    """

    ids: Tensor
    top: Tensor
    sampled: Tensor
    token: Tensor
    vocab: int

    @property
    def rows(self) -> int:
        return self.vocab

    @property
    def k(self) -> int:
        return self.ids.shape[-1]

    def part(self, piece: slice | Tensor) -> Partial:
        """The same for some tokens. `piece`: a slice or indices."""
        return Partial(self.ids[piece], self.top[piece], self.sampled[piece], self.token[piece], self.vocab)

    def logp(self) -> Partial:
        """Itself: these are log-probs already."""
        return self

    def support(self, support: TopK) -> Tensor:
        """Ids `[n, k']` of its likeliest tokens; raises PartialDistribution where more are asked for than it has."""
        if support.k > self.k and self.k < self.vocab:
            raise PartialDistribution(
                f"{support} wants {support.k} tokens of {support.by!r}, whose server gives {self.k}. Use "
                f"TopK({self.k}, by={support.by!r}), or LogprobServer(…, k={support.k}) if the server allows that many."
            )
        return self.ids[:, : support.k]

    def coarse(self, support: TopK) -> Tensor:
        """Log-probs on its own top tokens as `TopK.coarse` gives them: `[n, k']`, or `[n, k' + 1]` with the bucket."""
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

        It is what the top tokens leave over. Below `RESOLUTION` that is rounding, so it is kept between what is known: at
        least the sampled token's share where that is outside, at most as much as if each token had the last one's.
        """
        top = self.top.double()
        most = (self.vocab - self.k) * top[:, -1].exp()
        outside = (self.ids != self.token[:, None]).all(-1)
        least = torch.where(outside, self.sampled.double().exp(), 0.0)
        return (1 - top.exp().sum(-1)).clamp(min=RESOLUTION).minimum(most).maximum(least).log().to(self.top.dtype)


def whole(name: str, some: Partial) -> PartialDistribution:
    """The error for a loss that asks for all of it."""
    return PartialDistribution(
        f"This loss needs the whole distribution of {name!r}, but its server gives the {some.k} likeliest of {some.vocab} tokens and the "
        f"sampled one. Use OPD(top_k=TopK({some.k}, by={name!r})), OPD(estimator='sampled'), or rows.on(…) and rows.logp_of(…) in a "
        "loss of your own."
    )
