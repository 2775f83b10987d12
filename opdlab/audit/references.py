"""The gradients that a loss is compared with: divergences whose name and strength are known, and a
few other functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from opdlab import exact
from opdlab.losses.generators import Generator

Divergence = Callable[[Tensor, Tensor], Tensor]  # student, teacher [..., V] -> [...]

NAMES = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "jensen_shannon": "Jensen-Shannon divergence",
    "total_variation": "total variation",
    "squared_hellinger": "squared Hellinger distance",
    "pearson": "Pearson chi²",
    "neyman": "Neyman chi²",
    "jeffreys": "Jeffreys divergence",
    "le_cam": "Le Cam divergence",
}
OTHERS: dict[str, tuple[str, Divergence]] = {
    "log_ratio_squared": ("squared log-ratio", lambda p, q: 0.5 * (q.exp() * (q - p) ** 2).sum(-1)),
    "squared_error": (
        "squared error of the probabilities",
        lambda p, q: 0.5 * ((q.exp() - p.exp()) ** 2).sum(-1),
    ),
    "reverse_minus_forward": (
        "reverse KL minus the forward KL",
        lambda p, q: (
            Generator("reverse_kl").divergence(p, q) - Generator("forward_kl").divergence(p, q)
        ),
    ),
}
FIXED: dict[str, tuple[str, Divergence]] = {
    name: (said, Generator(name).divergence) for name, said in NAMES.items()
} | OTHERS
FAMILIES = {  # name: what it is called, its parameter, where the parameter is looked for
    "generalized_jsd": ("generalised JSD", "beta", (0.002, 0.998)),
    "alpha": ("alpha-divergence", "alpha", (-2.0, 3.0)),
    "skew_forward_kl": ("skew forward KL", "alpha", (0.001, 0.95)),
    "skew_reverse_kl": ("skew reverse KL", "alpha", (0.001, 0.95)),
}


@dataclass(frozen=True)
class Match:
    """How a gradient compares with that of one divergence: `cosine`, and the `ratio` of their
    lengths.

    credit: "token" holds fixed where the writer goes, "text" is the gradient of the sum over the
        text through where it goes.
    """

    divergence: str
    said: str
    target: str
    credit: str
    cosine: float
    ratio: float

    @property
    def exact(self) -> bool:
        return abs(self.cosine) > 1 - 1e-7


def matches(
    gradient: Tensor, student: exact.Table, targets: dict[str, exact.Table], visits: Tensor | None
) -> list[Match]:
    """Every known divergence beside a gradient `[X, S, V]`, the closest first.

    targets: what the student may be drawn to, by name. visits: how often somebody else's texts pass
        each prefix; None where
    the student writes.
    """
    credits = ("token", "text") if visits is None and student.length > 1 else ("token",)
    out, slopes = [], {}
    for target, table in targets.items():
        for credit in credits:
            slopes[target, credit] = lambda d, table=table, credit=credit: reference(
                d, student, table, credit, visits
            )
            out += [
                _match(gradient, slopes[target, credit](d), name, said, target, credit)
                for name, (said, d) in FIXED.items()
            ]
    if not any(m.exact for m in out):
        out += [
            _fitted(gradient, slope, name, *where)
            for where, slope in slopes.items()
            for name in FAMILIES
        ]
    return sorted(out, key=lambda m: (-round(abs(m.cosine), 9), m.credit == "text"))


def reference(
    divergence: Divergence,
    student: exact.Table,
    target: exact.Table,
    credit: str,
    visits: Tensor | None,
) -> Tensor:
    """Gradient `[X, S, V]` of the divergence summed over a text, by autograd."""
    leaf = student.logits.clone().requires_grad_()
    live = exact.Table(leaf, student.prompts, student.length, student.eos)
    weight = (
        visits
        if visits is not None
        else exact.visits(live)
        if credit == "text"
        else exact.visits(student)
    )
    return torch.autograd.grad((weight * divergence(live.logp, target.logp)).sum(), leaf)[0]


def _match(
    gradient: Tensor, slope: Tensor, name: str, said: str, target: str, credit: str
) -> Match:
    long, other = gradient.norm().item(), slope.norm().item()
    cosine = (gradient * slope).sum().item() / (long * other) if long and other else 0.0
    return Match(name, said, target, credit, cosine, long / other if other else 0.0)


def _fitted(
    gradient: Tensor, slope: Callable[[Divergence], Tensor], name: str, target: str, credit: str
) -> Match:
    """The member of a family that comes closest: the best of a grid, then a bounded search around
    it.
    """
    said, parameter, (low, high) = FAMILIES[name]

    def at(x: float) -> Match:
        divergence = Generator(name, **{parameter: x}).divergence
        return _match(
            gradient, slope(divergence), name, f"{said} ({parameter} {x:.3g})", target, credit
        )

    grid = [low + (high - low) * i / 8 for i in range(9)]
    best = max(range(9), key=lambda i: abs(at(grid[i]).cosine))
    around = (grid[max(best - 1, 0)], grid[min(best + 1, 8)])
    found = minimize_scalar(
        lambda x: -abs(at(float(x)).cosine),
        bounds=around,
        method="bounded",
        options={"xatol": 1e-6, "maxiter": 40},
    )
    return at(float(found.x))
