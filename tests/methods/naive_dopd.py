"""A naive float64 copy of DOPD's definition, token by token, that its tests share."""

from __future__ import annotations

import math

import numpy as np
import torch

from opdlab import exact
from opdlab.methods.dopd import Route

LH, LL, HT, HS = Route
T, S = "teacher+hint", "student+hint"


def sampled(seed: int, n: int = 60, scale: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of `n` sampled tokens under the hinted teacher and student."""
    g = torch.Generator().manual_seed(seed)
    return tuple(
        -scale * torch.rand(n, generator=g, dtype=torch.float64) ** 2 - 1e-3 for _ in range(2)
    )


def naive_route(lt, ls, mask, trim: float = 0.05) -> list[int]:
    """The definition, token by token."""
    lt, ls, mask = (x.tolist() for x in (lt, ls, mask))
    a = [abs(x - y) for x, y, m in zip(lt, ls, mask, strict=True) if m]
    kept = [i for i, x in enumerate(a) if x <= np.quantile(a, 1 - trim)]
    q = [(math.exp(x), math.exp(y)) for x, y, m in zip(lt, ls, mask, strict=True) if m]
    mean, sure = (
        np.mean([a[i] for i in kept]),
        np.mean([q[i][0] for i in kept]) + np.mean([q[i][1] for i in kept]),
    )
    found = [
        ((0 if sum(p) >= sure else 1) if x < mean else 2 if p[0] >= p[1] else 3)
        for x, p in zip(a, q, strict=True)
    ]
    return [found.pop(0) if m else -1 for m in mask]


def tables(
    vocab: int = 6, length: int = 3, seed: int = 0, **scales: float
) -> dict[str, exact.Table]:
    names = ("student", T, S)
    return {
        name: exact.Table.random(vocab, length, 2, seed=3 * seed + i, scale=scales.get(name, 1.5))
        for i, name in enumerate(names)
    }


def naive_kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * (a.log() - b.log())).sum()


def naive_loss(kind: int, s, t, anchor, k: int, weights=(0.6, 0.3, 1.0, 0.6)) -> torch.Tensor:
    """One token's loss from probabilities `[V]`, as the table of regimes has it."""

    def top_k(target):
        ids = sorted(range(len(s)), key=lambda i: -s[i].item())[:k]
        rest = [i for i in range(len(s)) if i not in ids]
        fold = lambda p: torch.stack(
            [*(p[i] for i in ids), *([sum(p[i] for i in rest)] if rest else [])]
        )
        return naive_kl(fold(s), fold(target))

    m = (s + t) / 2
    value = [
        lambda: top_k(t),
        lambda: top_k(anchor),
        lambda: (naive_kl(t, m) + naive_kl(s, m)) / 2,
        lambda: top_k(anchor),
    ]
    return weights[kind] * value[kind]()


def naive_dopd(policies, rollout, logits, k: int, routes) -> torch.Tensor:
    """Loss of each token of the rollout, in order, differentiable in the student's `logits [X, S,
    V]` alone.
    """
    where = policies["student"].where(rollout)
    p = [logits[where].softmax(-1), *(policies[name].logits[where].softmax(-1) for name in (T, S))]
    return torch.stack([naive_loss(r, *(x[i] for x in p), k) for i, r in enumerate(routes)])
