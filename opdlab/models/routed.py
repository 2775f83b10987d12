"""The grades of several graders for one rollout: each token has a grader, or a mixture of some.

Same interface as `States` and `TopLogprobs`, so the engine accepts it as one teacher's grades. The
log-probs `[n, V]` of a chunk are made when they are asked for, each row by its own grader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opdlab.data.rollout import Rollout
from opdlab.losses.divergences import TopK
from opdlab.models.graded import Graded, TopLogprobs

Mixture = Literal["arithmetic", "geometric"]


@dataclass(frozen=True)
class Routed:
    """Several graders' grades of one rollout.

    Attributes:
        parts: The grades of each grader, of those tokens alone that it was asked about.
        place: `[n, M]`, the number of each token among those of part `m`; -1 where part `m` has no
            grade of it.
        weight: `[n, M]`, the weight of each part's distribution, 0 where it has none; rows sum to
            1.
        token: Ids of the tokens that were written, `[n]`.
        vocab_size: Number of tokens that the distributions are over, `V`.
        k: The number of likeliest tokens to which all grades are reduced, since one grader gives no
            more; None for whole distributions.
        mixture: How distributions of one token are mixed: "arithmetic" (the weighted mean of
            probabilities) or "geometric" (of log-probs, normalised).
        names: The graders' names, in the order of `parts`, for errors.

    `place` and `weight` are kept on the CPU: each chunk asks which tokens a part has graded, and on
    a GPU every such question would wait for all work that was begun.
    """

    parts: tuple[Graded, ...]
    place: Tensor
    weight: Tensor
    token: Tensor
    vocab_size: int
    k: int | None = None
    mixture: Mixture = "arithmetic"
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "place", self.place.cpu())
        object.__setattr__(self, "weight", self.weight.cpu())

    def part(self, piece: slice | Tensor) -> Routed:
        """Take the grades of some tokens.

        Args:
            piece: A slice or indices of tokens.

        Returns:
            The grades of these tokens.
        """
        here = piece.cpu() if isinstance(piece, Tensor) else piece
        return Routed(
            self.parts,
            self.place[here],
            self.weight[here],
            self.token[piece],
            self.vocab_size,
            self.k,
            self.mixture,
            self.names,
        )

    def logp(self) -> Tensor | TopLogprobs:
        """Compute log-probs `[n, V]`; the top ones where a grader gives no more.

        Returns:
            In nats, over the whole vocabulary or over the `k` likeliest tokens of each row.
        """
        return self._whole() if self.k is None else self._top(self.k)

    def _graded(self, m: int) -> tuple[Tensor, Tensor | TopLogprobs]:
        """The tokens of these that part `m` has graded, and its log-probs of them."""
        rows = (self.place[:, m] >= 0).nonzero()[:, 0]
        return rows, self.parts[m].part(self.place[rows, m]).logp()

    def _whole(self) -> Tensor:
        out: Tensor | None = None
        for m in range(len(self.parts)):
            rows, logp = self._graded(m)
            if isinstance(logp, TopLogprobs):
                raise TypeError("whole distributions were promised")  # k says what there is
            if out is None:
                shape = len(self.token), self.vocab_size
                out = logp.new_full(shape, 0.0 if self.mixture == "geometric" else -torch.inf)
            out = out.to(torch.promote_types(out.dtype, logp.dtype))
            weight = self.weight[rows, m].to(out)[:, None]
            if self.mixture == "geometric":
                out[rows] = out[rows] + weight * logp
            else:
                # A weight of 1 leaves the numbers as they are, bit for bit.
                out[rows] = torch.logaddexp(out[rows], weight.log() + logp)
        if out is None:
            return self._zeros(len(self.token), self.vocab_size)
        is_mixed = bool((self.weight.max(1).values < 1).any()) if len(out) else False
        return out.log_softmax(-1) if self.mixture == "geometric" and is_mixed else out

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.weight.dtype, device=self.token.device)

    def _top(self, k: int) -> TopLogprobs:
        n = len(self.token)
        ids = self.token.new_zeros(n, k)
        top, sampled = self._zeros(n, k), self._zeros(n)
        for m in range(len(self.parts)):
            rows, logp = self._graded(m)
            if isinstance(logp, TopLogprobs):
                ids[rows], top[rows] = logp.ids[:, :k], logp.top[:, :k].to(top)
                sampled[rows] = logp.sampled.to(top)
            else:
                ids[rows] = TopK(k).support(logp)
                top[rows] = logp.gather(-1, ids[rows]).to(top)
                sampled[rows] = logp.gather(-1, self.token[rows, None])[:, 0].to(top)
        return TopLogprobs(ids, top, sampled, self.token, self.vocab_size)


def join_graded(parts: Sequence[Graded], rows: Sequence[Sequence[int]], rollout: Rollout) -> Graded:
    """Put grades of some completions each together to those of the whole rollout.

    Args:
        parts: At least one grade.
        rows: The completions that each part is about, in order; together all of the rollout's.
        rollout: The whole rollout.

    Returns:
        The grades of all tokens; the only part itself where there is one.
    """
    if len(parts) == 1:
        return parts[0]
    row = torch.arange(len(rollout)).repeat_interleave(rollout.lengths.cpu())  # [tokens]
    place = torch.full((len(row), len(parts)), -1)
    for m, own in enumerate(rows):
        tokens = torch.isin(row, torch.tensor(own))
        place[tokens, m] = torch.arange(int(tokens.sum()))
    k = [known for part in parts if (known := known_top(part)) is not None]
    return Routed(
        tuple(parts),
        place,
        (place >= 0).float(),
        rollout.ids[rollout.mask],
        max(part.vocab_size for part in parts),
        min(k, default=None),
        names=("hinted", "plain")[: len(parts)],
    )


def known_top(graded: Graded) -> int | None:
    """Return how many tokens a grade gives log-probs of, where it does not give all.

    Args:
        graded: A policy's states or log-probs.

    Returns:
        The number of likeliest tokens; None for the whole distribution.
    """
    return graded.k if isinstance(graded, (TopLogprobs, Routed)) else None
