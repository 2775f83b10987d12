"""The input of a loss: aligned log-probs, sampled tokens and plan columns of a chunk of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

from torch import Tensor

from opdlab.errors import UnknownColumn
from opdlab.losses.closed_forms import Pair
from opdlab.losses.divergences import TopK
from opdlab.models.graded import TopLogprobs, whole_distribution_error

LogProbs: TypeAlias = Tensor | TopLogprobs  # all of a distribution, or its top tokens


class Rows:
    """A chunk of `n` tokens as a loss sees it.

    Policies and plan columns are read by name: `rows.student`, `rows["teacher+hint"]`,
    `rows.advantage`.

    A loss treats each row alone and writes to none of them. Chunks have any size, so what needs
    several tokens (a mean, a quantile, a softmax over tokens) belongs in the plan. A loss draws no
    random numbers, and may be called more than once on a chunk. The log-probs are there until the
    function returns, since the engine uses their memory again; copy what is to be kept.

    Args:
        logp: Log-probs by policy, kept as `distributions`.
        token: The sampled ids `[n]`.
        columns: The plan's columns by name; none by default.

    Attributes:
        distributions: Log-probs `[n, V]` of each policy in float32; the student's carry the
            gradient. Of a server, the top log-probs that it gives.
        token: The sampled ids `[n]`.
        columns: The columns of the method's plan by name, `[n, ...]` each.
    """

    def __init__(
        self,
        logp: Mapping[str, LogProbs],
        token: Tensor,
        columns: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.distributions, self.token, self.columns = dict(logp), token, dict(columns or {})
        self._probabilities: dict[str, Tensor] = {}
        self._pairs: dict[str, Pair] = {}

    @property
    def logp(self) -> Tensor:
        """The student's log-prob of the sampled token, `[n]`."""
        return self.logp_of("student")

    def probabilities(self, policy: str) -> Tensor:
        """Compute a policy's probabilities, once for all who ask.

        Args:
            policy: The policy's name.

        Returns:
            `[n, V]`, the exponential of its log-probs.
        """
        if policy not in self._probabilities:
            self._probabilities[policy] = self[policy].exp()
        return self._probabilities[policy]

    def pair(self, policy: str) -> Pair:
        """Put the student beside another policy, with what they share computed once for all.

        Args:
            policy: The policy's name.

        Returns:
            Their log-probs, the student's probabilities, and the reverse KL when first asked for.
        """
        if policy not in self._pairs:
            p = self.probabilities("student")
            self._pairs[policy] = Pair(self["student"], self[policy], p)
        return self._pairs[policy]

    def logp_of(self, policy: str) -> Tensor:
        """Read a policy's log-prob of the sampled token.

        Args:
            policy: The policy's name.

        Returns:
            `[n]`, in nats. A server's log-prob is known even where the token is not among its top
            ones.

        Raises:
            UnknownColumn: There is no such name.
        """
        known = self.distributions.get(policy)
        if isinstance(known, TopLogprobs):
            return known.sampled
        return self[policy].gather(-1, self.token[:, None])[:, 0]

    def on(self, policy: str, support: TopK) -> tuple[Tensor, Tensor]:
        """Reduce the student's and another distribution to the same top tokens.

            reverse_kl(*rows.on("teacher", TopK(64)))

        Args:
            policy: The other policy's name.
            support: The policy whose top tokens count, their number, and the fate of the rest.

        Returns:
            Log-probs of the student and of the policy, `[n, k + 1]` with a bucket for the rest,
            else `[n, k]`.
        """
        chooser, other = self.distributions.get(support.by), self.distributions.get(policy)
        if isinstance(chooser, TopLogprobs):
            ids = chooser.support(support)
        else:
            ids = support.support(self[support.by])
        if other is chooser and isinstance(other, TopLogprobs):
            coarse = other.coarse(support)
        else:
            coarse = support.coarse(self[policy], ids)
        return support.coarse(self["student"], ids), coarse

    def select(self, index: Tensor | slice) -> Rows:
        """Select the rows at some indices, in that order.

        Args:
            index: Indices `[m]` of rows; an index may stand there twice. A slice copies nothing.

        Returns:
            The `m` rows.
        """
        distributions: dict[str, LogProbs] = {}
        for name, logp in self.distributions.items():
            distributions[name] = logp.part(index) if isinstance(logp, TopLogprobs) else logp[index]
        columns = {name: column[index] for name, column in self.columns.items()}
        return Rows(distributions, self.token[index], columns)

    def __getitem__(self, name: str) -> Tensor:
        if name in self.distributions:
            logp = self.distributions[name]
            if isinstance(logp, TopLogprobs):
                raise whole_distribution_error(name, logp)
            return logp
        if name in self.columns:
            return self.columns[name]
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
