"""What a loss sees: aligned log-probs, sampled tokens and plan columns of a chunk of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from opdlab.errors import UnknownColumn
from opdlab.losses.divergences import TopK
from opdlab.models.graded import TopLogprobs, whole_distribution_error


class Rows:
    """A chunk of `n` tokens as a loss sees it.

    `rows.student`, `rows.teacher`, `rows["teacher+hint"]`: aligned log-probs `[n, V]`, float32; the
    student's carry the gradient. `rows.token [n]`: the sampled ids. `rows.logp [n]`: the student's
    log-prob of them. `rows.<column>`: what the method's plan returned. An unknown name raises
    UnknownColumn and lists what there is.

    A loss treats each row alone and writes to none of them: chunks have any size, and what needs
    several tokens (a mean, a quantile, a softmax over tokens) belongs in plan. It draws no random
    numbers and may be called more than once on a chunk.
    """

    def __init__(
        self, logp: Mapping[str, Any], token: Tensor, columns: Mapping[str, Tensor] | None = None
    ) -> None:
        self.distributions, self.token, self.columns = dict(logp), token, dict(columns or {})

    @property
    def logp(self) -> Tensor:
        """The student's log-prob of the sampled token, `[n]`."""
        return self.logp_of("student")

    def logp_of(self, policy: str) -> Tensor:
        """A policy's log-prob of the sampled token, `[n]`."""
        some = self.distributions.get(policy)
        return (
            some.sampled
            if isinstance(some, TopLogprobs)
            else self[policy].gather(-1, self.token[:, None])[:, 0]
        )

    def on(self, policy: str, support: TopK) -> tuple[Tensor, Tensor]:
        """Student and `policy` on a coarse support, `[n, k + 1]` each:

        `reverse_kl(*rows.on("teacher", TopK(64)))`.
        """
        by, theirs = self.distributions.get(support.by), self.distributions.get(policy)
        ids = (
            by.support(support)
            if isinstance(by, TopLogprobs)
            else support.support(self[support.by])
        )
        coarse = (
            theirs.coarse(support)
            if theirs is by and isinstance(theirs, TopLogprobs)
            else support.coarse(self[policy], ids)
        )
        return support.coarse(self["student"], ids), coarse

    def __getitem__(self, name: str) -> Tensor:
        for place in (self.distributions, self.columns):
            if name in place:
                return _all_of(name, place[name])
        known = ", ".join([*self.distributions, "token", "logp", *self.columns])
        raise UnknownColumn(
            f"rows has no {name!r}; there are {known}. Name the policy in `needs`, or return the"
            " column from plan."
        )

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def __contains__(self, name: object) -> bool:
        return name in self.distributions or name in self.columns

    def __iter__(self) -> Iterator[str]:
        return iter([*self.distributions, *self.columns])

    def __len__(self) -> int:
        return len(self.token)


def _all_of(name: str, logp: Any) -> Tensor:
    if isinstance(logp, TopLogprobs):
        raise whole_distribution_error(name, logp)
    return logp
