"""Numbers per token under all policies: functions of `Rows`, run by the engine in its own pass.

Column names are `<policy>_<number>`: `student_logp`, `teacher_entropy`, `teacher+hint_reverse_kl`.
All in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opdlab.engine.rows import LogProbs, Rows
from opdlab.errors import PartialDistribution, UnknownName
from opdlab.losses.divergences import (
    TopK,
    entropy,
    expectation,
    forward_kl,
    generalized_jsd,
    reverse_kl,
)
from opdlab.models.graded import Graded, TopLogprobs
from opdlab.models.routed import known_top

TOP = 8  # tokens of each policy that `Signals` keeps
PIECE = 256  # tokens of a piece of the vocabulary in `likeliest_token`


def cheap(rows: Rows) -> dict[str, Tensor]:
    """Compute what training keeps at every step.

    Args:
        rows: Tokens under all policies.

    Returns:
        `[n]` each: `<policy>_logp` of the sampled token, `student_entropy`, and
        `<policy>_reverse_kl` of every other policy. A server that gives top log-probs only has
        `<policy>_coarse_reverse_kl` instead: a lower bound, with the tail as one bucket.
    """
    out = {f"{name}_logp": rows.logp_of(name) for name in rows.distributions}
    if "student" in rows.distributions:
        out["student_entropy"] = -expectation(rows.probabilities("student"), rows["student"])
    for name in _others(rows):
        known = rows.distributions[name]
        if isinstance(known, TopLogprobs):
            out[f"{name}_coarse_reverse_kl"] = reverse_kl(*rows.on(name, TopK(known.k, by=name)))
        else:
            out[f"{name}_reverse_kl"] = rows.pair(name).reverse_kl
    return out


def watched(rows: Rows) -> dict[str, Tensor]:
    """Compute the numbers of `cheap`, and whether the student knows what its teacher wants.

    Args:
        rows: Tokens under all policies.

    Returns:
        The numbers of `cheap`, and `wanted`, `[n]`: the student's probability of the token that is
        likeliest for the first of the other policies. It is left out if there is none.
    """
    out = cheap(rows)
    others = _others(rows)
    if others and "student" in rows.distributions:
        known = rows.distributions[others[0]]
        if isinstance(known, TopLogprobs):
            likeliest = known.ids[:, :1]
        else:
            likeliest = likeliest_token(known)[:, None]
        out["wanted"] = rows["student"].gather(-1, likeliest)[:, 0].exp()
    return out


def likeliest_token(logp: Tensor) -> Tensor:
    """Find the likeliest token, the first of several, in a sixth of the time of `argmax` on a CPU.

    Finding the largest value is fast, and keeping its place is slow. So the largest value of each
    piece of the vocabulary is found first, then the place in the piece that has the largest of all.

    Args:
        logp: Log-probs `[n, V]`.

    Returns:
        Token ids, `[n]`.
    """
    pieces = logp.shape[-1] // PIECE
    whole, rest = logp[:, : pieces * PIECE], logp[:, pieces * PIECE :]
    if not pieces:
        only: Tensor = rest.max(-1).indices
        return only
    parts = whole.unflatten(-1, (pieces, PIECE))
    best = parts.amax(-1).max(-1)
    inside = parts.gather(1, best.indices[:, None, None].expand(-1, 1, PIECE))[:, 0]
    token: Tensor = best.indices * PIECE + inside.max(-1).indices
    if not rest.shape[-1]:
        return token
    last = rest.max(-1)
    return torch.where(last.values > best.values, pieces * PIECE + last.indices, token)


def full(k: int = TOP, allow_partial: bool = False) -> Callable[[Rows], dict[str, Tensor]]:
    """Make a function of rows that computes everything a picture shows.

    Beside the numbers of `cheap` these are, of each policy:

        <policy>_entropy, <policy>_rank         rank 1 for its likeliest token
        <policy>_forward_kl, <policy>_jsd       against the student
        <policy>_overlap                        share of its top k that the student's has too
        support [n, S]                          the sampled token, then each top k; repeats are -1
        <policy>_top [n, S]                     its log-probs there; -inf at repeats
        <policy>_tail [n]                       its mass elsewhere

    Args:
        k: Top tokens of each policy.
        allow_partial: Whether a policy that gives only some log-probs contributes what can be known
            (the numbers of `cheap`, the overlap, its own top tokens). By default such a policy
            raises PartialDistribution.

    Returns:
        The function; it gives a dict of `[n]` or `[n, S]` for `n` tokens.
    """

    def measure(rows: Rows) -> dict[str, Tensor]:
        out = cheap(rows)
        tops = _likeliest_of_each(rows, k)
        support = _support(rows, tops)
        out["support"] = support
        for name, logp in rows.distributions.items():
            if not (allow_partial and isinstance(logp, TopLogprobs)):
                out |= _numbers_of(rows, name, support)
        for name in _others(rows):
            same = tops[name][:, :, None] == tops["student"][:, None, :]
            out[f"{name}_overlap"] = same.any(-1).float().mean(-1)
        return out

    return measure


def _numbers_of(rows: Rows, name: str, support: Tensor) -> dict[str, Tensor]:
    """Numbers of one policy, alone and against the student.

    Raises PartialDistribution where only some log-probs are known.
    """
    logp = rows[name]
    out = {
        f"{name}_entropy": entropy(logp),
        f"{name}_rank": _rank(rows, name),
        **top_on(support, name, logp),
    }
    if name != "student":
        out[f"{name}_forward_kl"] = forward_kl(rows["student"], logp)
        out[f"{name}_jsd"] = generalized_jsd(rows["student"], logp)
    return out


def top_on(support: Tensor, name: str, logp: Tensor) -> dict[str, Tensor]:
    """Compute a policy's log-probs on the kept tokens, and its mass elsewhere.

    Args:
        support: Ids of the kept tokens, `[n, S]`; -1 for none.
        name: The policy.
        logp: Its log-probs, `[n, V]`.

    Returns:
        `<name>_top [n, S]`, -inf where there is no token, and `<name>_tail [n]`.
    """
    place, is_repeat = support.clamp(min=0), support < 0
    rest = logp.scatter(-1, place, -torch.inf)
    # Repeats were written to id 0: put its value back, unless it is in the support itself.
    rest[:, 0] = torch.where((support == 0).any(-1), -torch.inf, logp[:, 0])
    return {
        f"{name}_top": logp.gather(-1, place).masked_fill(is_repeat, -torch.inf),
        f"{name}_tail": rest.logsumexp(-1).exp(),
    }


def support_of(rows: Rows, k: int) -> Tensor:
    """Choose the tokens that a trace keeps: the sampled one, then the likeliest of each policy.

    Args:
        rows: Tokens under all policies.
        k: Top tokens of each policy; at most the vocabulary.

    Returns:
        Ids `[n, S]`; repeats are -1.
    """
    return _support(rows, _likeliest_of_each(rows, k))


class Signals(Mapping[str, Tensor]):
    """All numbers of `full` for a batch by name, each computed when first asked for.

    They are `[B, T]` or `[B, T, S]`.

    Iterating goes over the numbers of `cheap` alone, which come from one pass over the vocabulary.
    The top tokens (`support`, `<policy>_top`, `<policy>_tail`, `<policy>_overlap`) come from one
    pass too, every other number from one of its own.

    Raises:
        UnknownName: There is no such number; the message lists what there is.
        PartialDistribution: The policy is a server that gives some log-probs, and the number needs
            all of them.
    """

    def __init__(
        self,
        distributions: Sequence[str],
        states: Callable[[str], Graded],
        map_rows: Callable[..., Any],
    ) -> None:
        """Offer the numbers of a batch.

        Args:
            distributions: Names of the policies that grade the student's tokens.
            states: Gives what one of them returned.
            map_rows: Runs a function of rows over the whole batch, as `Batch.map`.
        """
        self._distributions, self._states, self._map = list(distributions), states, map_rows
        self._known: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            self._compute(name)
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in self._available() if self._is_cheap(name)])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in self._available()

    def __repr__(self) -> str:
        return f"Signals({', '.join(self._available())})"

    def _available(self) -> list[str]:
        return [name for name, lacking in self._names().items() if not lacking]

    def _is_cheap(self, name: str) -> bool:
        number = _parts(name, self._distributions)[1]
        return number in ("logp", "reverse_kl", "coarse_reverse_kl") or name == "student_entropy"

    def _names(self) -> dict[str, str]:
        """Every name with the policy that lacks what it takes, or ""."""
        without_all = [name for name in self._distributions if self._is_partial(name)]
        out = dict[str, str]()
        for policy in self._distributions:
            lacks = policy if policy in without_all else ""
            out[f"{policy}_logp"] = ""
            out |= {f"{policy}_{number}": lacks for number in ("entropy", "rank", "top", "tail")}
            if policy != "student":
                out |= {
                    f"{policy}_{number}": lacks for number in ("reverse_kl", "forward_kl", "jsd")
                }
                out |= {f"{policy}_overlap": ""}
                out |= {f"{policy}_coarse_reverse_kl": ""} if lacks else {}
        return out | {"support": ""}

    def _is_partial(self, name: str) -> bool:
        return known_top(self._states(name)) is not None

    def _compute(self, name: str) -> None:
        names = self._names()
        if name not in names:
            raise UnknownName(
                f"The batch has no signal {name!r}; there are {', '.join(self._available())}."
                " Compute others with batch.map(function of rows)."
            )
        if policy := names[name]:
            have = [known for known in self._available() if known.startswith(f"{policy}_")]
            k = known_top(self._states(policy)) or TOP
            raise PartialDistribution(
                f"The signal {name!r} needs the whole distribution of {policy!r}, whose server"
                f" gives its {k} likeliest tokens and the sampled one. There are {', '.join(have)}."
                f" Use OPD(top_k=TopK({k}, by={policy!r})), OPD(estimator='sampled'), or"
                f" rows.on({policy!r}, TopK({k}, by={policy!r})) in batch.map."
            )
        policy, number = _parts(name, self._distributions)
        if self._is_cheap(name):
            self._known |= self._map(cheap)
        elif number in _ALONE:
            needs = [policy] if number in ("entropy", "rank") else ["student", policy]
            self._known[name] = self._map(partial(_ALONE[number], policy=policy), needs=needs)
        else:
            self._known |= self._map(full(allow_partial=True))


def _rank(rows: Rows, policy: str) -> Tensor:
    return (rows[policy] > rows.logp_of(policy)[:, None]).sum(-1) + 1


def _entropy(rows: Rows, policy: str) -> Tensor:
    return entropy(rows[policy])


def _forward_kl(rows: Rows, policy: str) -> Tensor:
    return forward_kl(rows["student"], rows[policy])


def _jsd(rows: Rows, policy: str) -> Tensor:
    return generalized_jsd(rows["student"], rows[policy])


_ALONE = {
    "entropy": _entropy,
    "rank": _rank,
    "forward_kl": _forward_kl,
    "jsd": _jsd,
}


def _parts(name: str, policies: list[str]) -> tuple[str, str]:
    """Split a name into policy and number.

    The longest policy that fits counts, since one may be called `teacher_2`.
    """
    fitting = [policy for policy in policies if name.startswith(f"{policy}_")]
    policy = max(fitting, key=len, default="")
    return policy, name.removeprefix(f"{policy}_")


def _likeliest(logp: LogProbs, k: int) -> Tensor:
    """Ids `[n, k]` of a policy's likeliest tokens, or as many as it gives."""
    if isinstance(logp, TopLogprobs):
        return logp.ids[:, :k]
    return logp.topk(k, -1).indices


def _likeliest_of_each(rows: Rows, k: int) -> dict[str, Tensor]:
    """Ids `[n, k]` of the likeliest tokens, by policy."""
    width = min(k, rows["student"].shape[-1])
    return {name: _likeliest(logp, width) for name, logp in rows.distributions.items()}


def _support(rows: Rows, tops: Mapping[str, Tensor]) -> Tensor:
    return _without_repeats(torch.cat([rows.token[:, None], *tops.values()], -1))


def _others(rows: Rows) -> list[str]:
    return [name for name in rows.distributions if name != "student"]


def _without_repeats(ids: Tensor) -> Tensor:
    """`[n, S]` with every id that stands further left replaced by -1."""
    same = ids[:, :, None] == ids[:, None, :]
    return ids.masked_fill(same.tril(-1).any(-1), -1)
