"""Per-token numbers under all policies that a method looks at: functions of `Rows`, run by the
engine in its own pass.

Column names are `<policy>_<number>`: `student_logp`, `teacher_entropy`, `teacher+hint_reverse_kl`.
All in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opdlab.engine.rows import Rows
from opdlab.errors import PartialDistribution, UnknownName
from opdlab.losses.divergences import TopK, entropy, forward_kl, generalized_jsd, reverse_kl
from opdlab.models.graded import Graded, TopLogprobs

TOP = 8  # tokens of each policy that `Signals` keeps


def cheap(rows: Rows) -> dict[str, Tensor]:
    """What training notes at every step: log-probs of the sampled token, the student's entropy,
    reverse KLs. `[n]` each.

    `<policy>_coarse_reverse_kl` for one of which only some log-probs are known: a lower bound, its
    tail being one bucket.
    """
    out = {f"{name}_logp": rows.logp_of(name) for name in rows.distributions}
    if "student" in rows.distributions:
        out["student_entropy"] = entropy(rows["student"])
    for name in _others(rows):
        some = rows.distributions[name]
        if isinstance(some, TopLogprobs):
            out[f"{name}_coarse_reverse_kl"] = reverse_kl(*rows.on(name, TopK(some.k, by=name)))
        else:
            out[f"{name}_reverse_kl"] = reverse_kl(rows["student"], rows[name])
    return out


def full(k: int = TOP, allow_partial: bool = False) -> Callable[[Rows], dict[str, Tensor]]:
    """Everything a picture shows: `cheap`, plus entropies, forward KL, JSD, ranks, overlap and the
    top `k` of all policies.

    `support [n, S]` holds the sampled token, then the top `k` of each policy in turn; a repeated id
    is -1. Each `<policy>_top [n, S]` holds log-probs on it (-inf at repeats) and `<policy>_tail
    [n]` the mass outside it. `<policy>_rank`: 1 for the policy's favourite. `<policy>_overlap`:
    share of its top k that the student's has too.

    Args:
        k: Top tokens of each policy.
        allow_partial: Of a policy that gives only some log-probs, give what can be known (the
            numbers of `cheap` and the overlap; its own top tokens are in the support). By default
            such a policy raises PartialDistribution.
    """

    def measure(rows: Rows) -> dict[str, Tensor]:
        out = cheap(rows)
        width = min(k, rows["student"].shape[-1])
        known = [
            name
            for name, logp in rows.distributions.items()
            if not (allow_partial and isinstance(logp, TopLogprobs))
        ]
        everyone = {
            name: rows[name] for name in known
        }  # raises where only some log-probs are known
        tops = {name: _favourites(logp, width) for name, logp in rows.distributions.items()}
        out["support"] = _unique(torch.cat([rows.token[:, None], *tops.values()], -1))
        absent = out["support"] < 0
        for name, logp in everyone.items():
            out[f"{name}_entropy"] = entropy(logp)
            out[f"{name}_rank"] = _rank(rows, name)
            top = logp.gather(-1, out["support"].clamp(min=0)).masked_fill(absent, -torch.inf)
            rest = logp.scatter(
                -1, out["support"].clamp(min=0), -torch.inf
            )  # repeats point at id 0: put it back below
            rest[:, 0] = torch.where((out["support"] == 0).any(-1), -torch.inf, logp[:, 0])
            out[f"{name}_top"], out[f"{name}_tail"] = top, rest.logsumexp(-1).exp()
        for name in _others(rows):
            if name in everyone:
                out[f"{name}_forward_kl"] = forward_kl(rows["student"], rows[name])
                out[f"{name}_jsd"] = generalized_jsd(rows["student"], rows[name])
            same = tops[name][:, :, None] == tops["student"][:, None, :]
            out[f"{name}_overlap"] = same.any(-1).float().mean(-1)
        return out

    return measure


class Signals(Mapping[str, Tensor]):
    """All numbers of `full` for a batch by name, as `[B, T]` or `[B, T, S]`, each computed when it
    is first asked for.

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
        map: Callable[..., Any],
    ) -> None:
        """Offer the numbers of a batch.

        Args:
            distributions: Names of the policies that grade the student's tokens.
            states: Gives what one of them returned.
            map: Runs a function of rows over the whole batch, as `Batch.map`.
        """
        self._distributions, self._states, self._map = list(distributions), states, map
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
        partial = [name for name in self._distributions if self._is_partial(name)]
        out = dict[str, str]()
        for policy in self._distributions:
            lacks = policy if policy in partial else ""
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
        return isinstance(self._states(name), TopLogprobs)

    def _compute(self, name: str) -> None:
        names = self._names()
        if name not in names:
            raise UnknownName(
                f"The batch has no signal {name!r}; there are {', '.join(self._available())}."
                " Compute others with batch.map(function of rows)."
            )
        if policy := names[name]:
            have = [known for known in self._available() if known.startswith(f"{policy}_")]
            states: Any = self._states(policy)
            k = states.k
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
            self._known[name] = self._map(lambda rows: _ALONE[number](rows, policy), needs=needs)
        else:
            self._known |= self._map(full(allow_partial=True))


_Number = Callable[[Rows, str], Tensor]


def _rank(rows: Rows, policy: str) -> Tensor:
    return (rows[policy] > rows.logp_of(policy)[:, None]).sum(-1) + 1


def _entropy(rows: Rows, policy: str) -> Tensor:
    return entropy(rows[policy])


def _forward_kl(rows: Rows, policy: str) -> Tensor:
    return forward_kl(rows["student"], rows[policy])


def _jsd(rows: Rows, policy: str) -> Tensor:
    return generalized_jsd(rows["student"], rows[policy])


_ALONE: dict[str, _Number] = {
    "entropy": _entropy,
    "rank": _rank,
    "forward_kl": _forward_kl,
    "jsd": _jsd,
}


def _parts(name: str, policies: list[str]) -> tuple[str, str]:
    """Policy and number of a name; the longest policy that fits, since one may be called
    `teacher_2`.
    """
    fitting = [policy for policy in policies if name.startswith(f"{policy}_")]
    policy = max(fitting, key=len, default="")
    return policy, name.removeprefix(f"{policy}_")


def _favourites(logp: Any, k: int) -> Tensor:
    """Ids `[n, k]` of a policy's likeliest tokens, or as many as it gives."""
    return logp.ids[:, :k] if isinstance(logp, TopLogprobs) else logp.topk(k, -1).indices


def _others(rows: Rows) -> list[str]:
    return [name for name in rows.distributions if name != "student"]


def _unique(ids: Tensor) -> Tensor:
    """`[n, S]` with every id that stands further left replaced by -1."""
    same = ids[:, :, None] == ids[:, None, :]
    return ids.masked_fill(same.tril(-1).any(-1), -1)
