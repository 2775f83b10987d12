"""Per-token numbers under all policies that a method looks at: functions of `Rows`, run by the engine in its own pass.

Column names are `<policy>_<number>`: `student_logp`, `teacher_entropy`, `teacher+hint_reverse_kl`. All in nats.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opdlab.divergence import TopK, entropy, forward_kl, generalized_jsd, reverse_kl
from opdlab.partial import Partial
from opdlab.rows import Rows


def cheap(rows: Rows) -> dict[str, Tensor]:
    """What training notes at every step: log-probs of the sampled token, the student's entropy, reverse KLs. `[n]` each.

    `<policy>_coarse_reverse_kl` for one of which only some log-probs are known: a lower bound, its tail being one bucket.
    """
    out = {f"{name}_logp": rows.logp_of(name) for name in rows.distributions}
    out["student_entropy"] = entropy(rows["student"])
    for name in _others(rows):
        some = rows.distributions[name]
        if isinstance(some, Partial):
            out[f"{name}_coarse_reverse_kl"] = reverse_kl(*rows.on(name, TopK(some.k, by=name)))
        else:
            out[f"{name}_reverse_kl"] = reverse_kl(rows["student"], rows[name])
    return out


def full(k: int = 8) -> Callable[[Rows], dict[str, Tensor]]:
    """Everything a picture shows: `cheap`, plus entropies, forward KL, JSD, ranks, overlap and the top `k` of all policies.

    `support [n, S]` holds the sampled token, then the top `k` of each policy in turn; a repeated id is -1. Each
    `<policy>_top [n, S]` holds log-probs on it (-inf at repeats) and `<policy>_tail [n]` the mass outside it.
    `<policy>_rank`: 1 for the policy's favourite. `<policy>_overlap`: share of its top k that the student's has too.
    """

    def measure(rows: Rows) -> dict[str, Tensor]:
        out = cheap(rows)
        width = min(k, rows["student"].shape[-1])
        everyone = {name: rows[name] for name in rows.distributions}  # raises where only some log-probs are known
        tops = {name: logp.topk(width, -1).indices for name, logp in everyone.items()}
        out["support"] = _unique(torch.cat([rows.token[:, None], *tops.values()], -1))
        absent = out["support"] < 0
        for name, logp in everyone.items():
            out[f"{name}_entropy"] = entropy(logp)
            out[f"{name}_rank"] = (logp > rows.logp_of(name)[:, None]).sum(-1) + 1
            top = logp.gather(-1, out["support"].clamp(min=0)).masked_fill(absent, -torch.inf)
            rest = logp.scatter(-1, out["support"].clamp(min=0), -torch.inf)  # repeats point at id 0: put it back below
            rest[:, 0] = torch.where((out["support"] == 0).any(-1), -torch.inf, logp[:, 0])
            out[f"{name}_top"], out[f"{name}_tail"] = top, rest.logsumexp(-1).exp()
        for name in _others(rows):
            out[f"{name}_forward_kl"] = forward_kl(rows["student"], rows[name])
            out[f"{name}_jsd"] = generalized_jsd(rows["student"], rows[name])
            same = tops[name][:, :, None] == tops["student"][:, None, :]
            out[f"{name}_overlap"] = same.any(-1).float().mean(-1)
        return out

    return measure


def _others(rows: Rows) -> list[str]:
    return [name for name in rows.distributions if name != "student"]


def _unique(ids: Tensor) -> Tensor:
    """`[n, S]` with every id that stands further left replaced by -1."""
    same = ids[:, :, None] == ids[:, None, :]
    return ids.masked_fill(same.tril(-1).any(-1), -1)
