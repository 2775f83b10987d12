"""Generators of f-divergences, and what each of them tells a sampled token.

    D_f(q || p)  =  E_{a ~ p} f(u),     u = q(a) / p(a),  f convex, f(1) = 0          (q the teacher, p the student)
    -grad D_f    =  E_{a ~ p} w_f(u) grad log p(a),       w_f(u) = -f(u) + u f'(u)     (OPD+, arXiv 2606.01039)

All functions take `log_u = log q - log p`, of any shape, in forms that neither overflow early nor
cancel near u = 1. Forward KL, reverse KL and Jensen-Shannon are the paper's (table 1, as a public
reproduction quotes it); the other rows are derived here by the same rule. Left out: losses on a
whole vocabulary, which `divergence.py` has in constant memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from opdlab.errors import InvalidValue
from opdlab.support.validation import Number, Text, validate


@dataclass(frozen=True)
class Generator:
    """`f` of a divergence by name, in the convention above: "forward_kl" is KL(q || p), f = u log
    u.

    alpha: of "alpha" (0 reverse KL, ½ four times squared Hellinger, 1 forward KL) and of the two
        skews. beta: of
    "generalized_jsd". shift: `f + shift (u - 1)` is another form of the same divergence. scale: its
    unit. Raises InvalidValue for a name or a parameter that is none.
    """

    name: str
    alpha: float | None = None
    beta: float | None = None
    shift: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        validate("Generator", {"name": self.name}, {"name": Text})
        if self.name not in FORMS:
            raise InvalidValue(
                f"There is no generator {self.name!r}. Use one of {', '.join(FORMS)}."
            )
        given = {name: getattr(self, name) for name in ("alpha", "beta", "shift", "scale")}
        validate(
            "Generator",
            {name: value for name, value in given.items() if value is not None},
            dict.fromkeys(given, Number),
        )
        own = PARAMETERS.get(self.name)
        for name in ("alpha", "beta"):
            if own is not None and name == own.name and getattr(self, name) is None:
                object.__setattr__(self, name, own.default)
            elif getattr(self, name) is not None and (own is None or name != own.name):
                raise InvalidValue(
                    f"The generator {self.name!r} has no {name}, but got"
                    f" {name}={getattr(self, name)}. Leave it out."
                )
        if own is not None and not own.allows(self._parameter):
            raise InvalidValue(f"{self!r} is no divergence. Use {own.says}.")
        if not 0 < self.scale < math.inf or not math.isfinite(self.shift):
            raise InvalidValue(
                f"{self!r} has shift={self.shift}, scale={self.scale}. Use finite numbers and a"
                " scale above 0."
            )

    def f(self, log_u: Tensor) -> Tensor:
        """`f(u)`; its mean under the student is the divergence (in nats where that is a KL or a
        JSD).
        """
        log_u = _float(log_u)
        value = self._form.f(log_u) + (self.shift * log_u.expm1() if self.shift else 0)
        value = value.masked_fill(log_u.isneginf(), self._form.at_zero - self.shift)
        if self.at_infinity:  # where terms of both signs are too large for a float, f is as well
            value = value.masked_fill(
                value.isnan() & ~log_u.isnan(), math.copysign(math.inf, self.at_infinity)
            )
        return self.scale * value

    def slope(self, log_u: Tensor) -> Tensor:
        """`f'(u)`."""
        return self.scale * (self._form.slope(_float(log_u)) + self.shift)

    def weight(self, log_u: Tensor) -> Tensor:
        """`w_f(u) = -f(u) + u f'(u)`: the advantage of OPD+, never decreasing in u.

        `shift` adds a constant to it.
        """
        return self.scale * (self._form.weight(_float(log_u)) + self.shift)

    def stop_gradient_weight(self, log_u: Tensor) -> Tensor:
        """`-f(u)`: the advantage that forgets how f(u) moves with the student.

        Right for the reverse KL and few others, and `shift` changes what it trains.
        """
        return -self.f(log_u)

    @property
    def centre(self) -> float:
        """`f'(1)`, which is the weight of a token on which both agree."""
        return self.scale * (self._form.centre + self.shift)

    @property
    def curvature(self) -> float:
        """`f''(1)`: how strongly a small difference counts. Infinite for total variation."""
        return self.scale * self._form.curvature

    @property
    def at_zero(self) -> float:
        """`f(0)`: the price of a unit of the student's mass that the teacher rules out."""
        return self.scale * (self._form.at_zero - self.shift)

    @property
    def at_infinity(self) -> float:
        """`lim f(u) / u`: the price of a unit of the teacher's mass that the student rules out, and
        so never shows.
        """
        return self.scale * (self._form.at_infinity + self.shift)

    def shifted(self, c: float) -> Generator:
        """`f + c (u - 1)`: the same divergence in another form."""
        return replace(self, shift=self.shift + c / self.scale)

    def scaled(self, factor: float) -> Generator:
        """`factor * f`; with `1 / curvature`, rates of different divergences compare."""
        return replace(self, scale=self.scale * factor)

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """`D_f(q || p)` from log-probs, `[..., V] -> [...]`; what one of the two rules out counts
        at its price. For ratios that fit a float: `opdlab.losses` has no such limit.
        """
        student, teacher = torch.broadcast_tensors(_float(student), _float(teacher))
        here, there = ~student.isneginf(), ~teacher.isneginf()
        shared = student.exp() * self.f(torch.where(here & there, teacher - student, 0.0))
        ends = student.new_tensor([self.at_infinity, self.at_zero])
        price = ends[here.long()].masked_fill(here == there, 0.0)
        return (shared + price * torch.where(here, student, teacher).exp()).sum(-1)

    @property
    def _parameter(self) -> float:
        own = PARAMETERS.get(self.name)
        return getattr(self, own.name) if own else math.nan

    @property
    def _form(self) -> Form:
        return FORMS[self.name](self._parameter)

    def __repr__(self) -> str:
        given = {
            "alpha": self.alpha,
            "beta": self.beta,
            "shift": self.shift or None,
            "scale": None if self.scale == 1 else self.scale,
        }
        return (
            ", ".join(
                [
                    f"Generator({self.name!r}",
                    *(f"{key}={value:g}" for key, value in given.items() if value is not None),
                ]
            )
            + ")"
        )


class Form(NamedTuple):
    """One row of the table: three functions of `x = log u`, and what they come to at u = 1, 0 and
    infinity.
    """

    f: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    centre: float
    curvature: float
    at_zero: float
    at_infinity: float


class Parameter(NamedTuple):
    name: str
    default: float
    allows: Callable[[float], bool]
    says: str


def _forward_kl(_: float) -> Form:
    """u log u"""
    return Form(lambda x: x.exp() * x, lambda x: x.exp(), lambda x: x + 1, 1, 1, 0, math.inf)


def _reverse_kl(_: float) -> Form:
    """-log u"""
    return Form(lambda x: -x, lambda x: x - 1, lambda x: -(-x).exp(), -1, 1, math.inf, 0)


def _reverse_kl_k3(_: float) -> Form:
    """u - 1 - log u: the reverse KL once more, never negative; its weight is plain log u."""
    return Form(lambda x: x.expm1() - x, lambda x: x, lambda x: -(-x).expm1(), 0, 1, math.inf, 1)


def _generalized_jsd(b: float) -> Form:
    """b u log(u / m) - (1 - b) log m,  m = b u + 1 - b"""
    log_m = lambda x: _mix(x, b, 1 - b)
    log_u_m = lambda x: (
        -_mix(-x, 1 - b, b)
    )  # log(u / m), without the difference of two large numbers
    return Form(
        lambda x: b * x.exp() * log_u_m(x) - (1 - b) * log_m(x),
        lambda x: (1 - b) * log_m(x),
        lambda x: b * log_u_m(x),
        0,
        b * (1 - b),
        -(1 - b) * math.log(1 - b),
        -b * math.log(b),
    )


def _total_variation(_: float) -> Form:
    """½ |u - 1|"""
    return Form(
        lambda x: 0.5 * x.expm1().abs(),
        lambda x: 0.5 * x.sign(),
        lambda x: 0.5 * x.sign(),
        0,
        math.inf,
        0.5,
        0.5,
    )


def _squared_hellinger(_: float) -> Form:
    """½ (√u - 1)²"""
    return Form(
        lambda x: 0.5 * (x / 2).expm1() ** 2,
        lambda x: 0.5 * (x / 2).expm1(),
        lambda x: -0.5 * (-x / 2).expm1(),
        0,
        0.25,
        0.5,
        0.5,
    )


def _pearson(_: float) -> Form:
    """(u - 1)²"""
    return Form(
        lambda x: x.expm1() ** 2,
        lambda x: (2 * x).expm1(),
        lambda x: 2 * x.expm1(),
        0,
        2,
        1,
        math.inf,
    )


def _neyman(_: float) -> Form:
    """(u - 1)² / u"""
    return Form(
        lambda x: -x.expm1() * (-x).expm1(),
        lambda x: -2 * (-x).expm1(),
        lambda x: -(-2 * x).expm1(),
        0,
        2,
        math.inf,
        1,
    )


def _alpha(a: float) -> Form:
    """(u^a - a u - (1 - a)) / (a (a - 1)):

    Amari's, Cressie and Read's. The weight is the Box-Cox transform of u.
    """
    f = lambda x: x.exp() * _power(x, a - 1) - _power(x, a)  # u f' - w: no division by a (a - 1)
    ends = 1 / a if a > 0 else math.inf, 1 / (1 - a) if a < 1 else math.inf
    return Form(f, lambda x: _power(x, a), lambda x: _power(x, a - 1), 0, 1, *ends)


def _skew_forward_kl(a: float) -> Form:
    """u log(u / m),  m = a u + 1 - a"""
    log_u_m = lambda x: -_mix(-x, 1 - a, a)
    over_m = lambda x: (1 - a) * (-_mix(x, a, 1 - a)).exp()
    return Form(
        lambda x: x.exp() * log_u_m(x),
        lambda x: (1 - a) * log_u_m(x).exp(),
        lambda x: log_u_m(x) + over_m(x),
        1 - a,
        (1 - a) ** 2,
        0,
        -_log(a),
    )


def _skew_reverse_kl(a: float) -> Form:
    """-log m,  m = (1 - a) u + a"""
    log_m = lambda x: _mix(x, 1 - a, a)
    return Form(
        lambda x: -log_m(x),
        lambda x: log_m(x) - 1 + a * (-log_m(x)).exp(),
        lambda x: -(1 - a) * (-log_m(x)).exp(),
        a - 1,
        (1 - a) ** 2,
        -_log(a),
        0,
    )


def _jeffreys(_: float) -> Form:
    """(u - 1) log u: forward and reverse KL together."""
    return Form(
        lambda x: x.expm1() * x,
        lambda x: x + x.expm1(),
        lambda x: x - (-x).expm1(),
        0,
        2,
        math.inf,
        math.inf,
    )


def _le_cam(_: float) -> Form:
    """(u - 1)² / (u + 1)"""
    return Form(
        lambda x: x.expm1() * (x / 2).tanh(),
        lambda x: 4 * x.sigmoid() ** 2 - 1,
        lambda x: (x / 2).tanh() * (1 + 2 * (-x).sigmoid()),
        0,
        1,
        1,
        1,
    )


FORMS: dict[str, Callable[[float], Form]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "reverse_kl_k3": _reverse_kl_k3,
    "jensen_shannon": lambda _: _generalized_jsd(0.5),
    "generalized_jsd": _generalized_jsd,
    "total_variation": _total_variation,
    "squared_hellinger": _squared_hellinger,
    "pearson": _pearson,
    "neyman": _neyman,
    "alpha": _alpha,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "jeffreys": _jeffreys,
    "le_cam": _le_cam,
}

PARAMETERS = {
    "generalized_jsd": Parameter(
        "beta",
        0.5,
        lambda b: 0 < b < 1,
        "a beta between 0 and 1, or forward_kl and reverse_kl themselves",
    ),
    "alpha": Parameter("alpha", 0.5, math.isfinite, "a finite alpha"),
    "skew_forward_kl": Parameter("alpha", 0.1, lambda a: 0 <= a < 1, "0 <= alpha < 1"),
    "skew_reverse_kl": Parameter("alpha", 0.1, lambda a: 0 <= a < 1, "0 <= alpha < 1"),
}


def _mix(x: Tensor, a: float, b: float) -> Tensor:
    """log(a u + b)."""
    return torch.logaddexp(x + _log(a), torch.as_tensor(_log(b), dtype=x.dtype, device=x.device))


def _power(x: Tensor, a: float) -> Tensor:
    """(u^a - 1) / a, and log u at a = 0."""
    return (a * x).expm1() / a if a else x


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def _float(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
