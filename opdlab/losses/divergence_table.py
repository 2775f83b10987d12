"""The table of divergences: one entry each, which everything that offers a choice reads.

    D_f(q || p)  =  E_{a ~ p} f(u),     u = q(a) / p(a),  f convex, f(1) = 0

`q` is the teacher and `p` the student. `OPD`, `OPDPlus`, `SelfDistillation`, `audit`, `Generator`
and the Playground take every name in `DIVERGENCES`. To add a divergence, write its generator as a
`Form` and its entry below; `tests/losses/test_divergence_table.py` then checks it. An entry without
an exact form is summed from its generator, which holds while the ratios fit a float.

Forward KL, reverse KL and Jensen-Shannon are those of OPD+ (arXiv 2606.01039, table 1, as a public
reproduction quotes it); the weights of the other rows are derived here by the same rule.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from opdlab.errors import InvalidValue, UnknownOption
from opdlab.losses import closed_forms, divergences
from opdlab.losses.divergences import as_float
from opdlab.support.expect import shortened

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """A generator `f`, as functions of `x = log u` that neither overflow early nor cancel near 0.

    Attributes:
        f: `f(u)`.
        weight: `w_f(u) = -f(u) + u f'(u)`, the detached advantage whose policy gradient is that of
            the divergence (OPD+).
        slope: `f'(u)`.
        centre: `f'(1)`.
        curvature: `f''(1)`.
        at_zero: `f(0)`, the price of the student's mass where the teacher has none.
        at_infinity: `lim f(u) / u`, the price of the teacher's mass where the student has none.
    """

    f: Function
    weight: Function
    slope: Function
    centre: float
    curvature: float
    at_zero: float
    at_infinity: float


@dataclass(frozen=True)
class Parameter:
    """The parameter of a family of divergences.

    Attributes:
        name: The keyword, such as "alpha".
        default: Its default value.
        allows: Whether the generator has a value.
        advice: The values that `allows` accepts, in words for an error message.
        low: Lower end of the range that a slider or a search covers; allowed.
        high: Upper end of that range; allowed.
    """

    name: str
    default: float
    allows: Callable[[float], bool]
    advice: str
    low: float
    high: float


@dataclass(frozen=True)
class Divergence:
    """One entry of the table; call it with log-probs for its value on the full vocabulary.

    Attributes:
        name: The name that users write, such as "reverse_kl".
        label: The name in sentences and pictures, such as "reverse KL".
        form: Makes the generator from the parameter (0 for an entry without one).
        exact: A function of student and teacher log-probs `[..., V] -> [...]` that is right for
            all logits. None: the sum of the generator over the vocabulary.
        parameter: The family's parameter, or None.
        form_of: The entry of which this is only another generator, or None.
        closed_form: The same divergence with its gradient in the student's logits, a function of a
            `closed_forms.Pair` with the keywords of `exact`. None: autograd finds the gradient.
    """

    name: str
    label: str
    form: Callable[[float], Form]
    exact: Callable[..., Tensor] | None = None
    parameter: Parameter | None = None
    form_of: str | None = None
    closed_form: Callable[..., closed_forms.ClosedForm] | None = None

    def __call__(self, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        """Return the divergence on the full vocabulary, in nats where it is a KL or a JSD.

        Args:
            student: Log-probs `[..., V]`.
            teacher: Log-probs `[..., V]`.
            options: Keywords of `options`, such as `alpha=0.3`.

        Returns:
            `[...]`, in float32 at least.

        Raises:
            UnknownOption: The divergence has no such keyword.
            InvalidValue: The parameter is out of its range.
        """
        self.check_options(options)
        if self.exact is not None:
            return self.exact(student, teacher, **options)
        value = options.get(self.parameter.name, self.parameter.default) if self.parameter else 0.0
        form = self.form(value)
        return sum_over_vocabulary(form.f, form.at_zero, form.at_infinity, student, teacher)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse keywords that the divergence does not have, and parameters out of range.

        An exact form checks its parameter itself: it may allow ends of the range at which the
        generator is another one.

        Args:
            options: Keywords of a call.

        Raises:
            UnknownOption: The divergence has no such keyword.
            InvalidValue: The parameter is out of its range.
        """
        for name, value in options.items():
            if name not in self.options:
                takes = f"It takes {', '.join(self.options)}." if self.options else "It takes none."
                raise UnknownOption(f"{self.name} has no option {name!r}. {takes}")
            if self.exact is None and self.parameter and not self.parameter.allows(value):
                advice = f"Use {self.parameter.advice}."
                raise InvalidValue(f"{self.name} got {name}={shortened(value)}. {advice}")

    @cached_property
    def options(self) -> Mapping[str, float | bool]:
        """The keywords of a call with their defaults."""
        if self.exact is None:
            return {self.parameter.name: self.parameter.default} if self.parameter else {}
        keywords = list(inspect.signature(self.exact).parameters.values())[2:]
        return {keyword.name: keyword.default for keyword in keywords}


def sum_over_vocabulary(
    f: Function, at_zero: float, at_infinity: float, student: Tensor, teacher: Tensor
) -> Tensor:
    """Sum `p f(q / p)` over the vocabulary, `[..., V] -> [...]`, for ratios that fit a float.

    Args:
        f: The generator as a function of log u.
        at_zero: Price of the student's mass on tokens that the teacher rules out.
        at_infinity: Price of the teacher's mass on tokens that the student rules out.
        student: Log-probs `[..., V]`.
        teacher: Log-probs `[..., V]`.

    Returns:
        `[...]`; mass on a token that one of the two rules out counts at its price.
    """
    student, teacher = torch.broadcast_tensors(as_float(student), as_float(teacher))
    in_student, in_teacher = ~student.isneginf(), ~teacher.isneginf()
    log_u = torch.where(in_student & in_teacher, teacher - student, 0.0)
    prices = student.new_tensor([at_infinity, at_zero])
    price = prices[in_student.long()].masked_fill(in_student == in_teacher, 0.0)
    alone = price * torch.where(in_student, student, teacher).exp()
    return (student.exp() * f(log_u) + alone).sum(-1)


def _forward_kl(_: float) -> Form:
    """Make f = u log u."""
    return Form(
        f=lambda x: x.exp() * x,
        weight=lambda x: x.exp(),
        slope=lambda x: x + 1,
        centre=1,
        curvature=1,
        at_zero=0,
        at_infinity=math.inf,
    )


def _reverse_kl(_: float) -> Form:
    """Make f = -log u."""
    return Form(
        f=lambda x: -x,
        weight=lambda x: x - 1,
        slope=lambda x: -(-x).exp(),
        centre=-1,
        curvature=1,
        at_zero=math.inf,
        at_infinity=0,
    )


def _reverse_kl_k3(_: float) -> Form:
    """Make f = u - 1 - log u: never negative; its weight is log u itself."""
    return Form(
        f=lambda x: x.expm1() - x,
        weight=lambda x: x,
        slope=lambda x: -(-x).expm1(),
        centre=0,
        curvature=1,
        at_zero=math.inf,
        at_infinity=1,
    )


def _generalized_jsd(b: float) -> Form:
    """Make f = b u log(u / m) - (1 - b) log m,  m = b u + 1 - b."""

    def log_m(x: Tensor) -> Tensor:
        return _log_mix(x, b, 1 - b)

    def log_u_over_m(x: Tensor) -> Tensor:
        return -_log_mix(-x, 1 - b, b)  # without the difference of two large numbers

    return Form(
        f=lambda x: b * x.exp() * log_u_over_m(x) - (1 - b) * log_m(x),
        weight=lambda x: (1 - b) * log_m(x),
        slope=lambda x: b * log_u_over_m(x),
        centre=0,
        curvature=b * (1 - b),
        at_zero=-(1 - b) * math.log(1 - b),
        at_infinity=-b * math.log(b),
    )


def _jensen_shannon(_: float) -> Form:
    """Make f = ½ u log(u / m) - ½ log m,  m = ½ (u + 1)."""
    return _generalized_jsd(0.5)


def _total_variation(_: float) -> Form:
    """Make f = ½ |u - 1|."""
    return Form(
        f=lambda x: 0.5 * x.expm1().abs(),
        weight=lambda x: 0.5 * x.sign(),
        slope=lambda x: 0.5 * x.sign(),
        centre=0,
        curvature=math.inf,
        at_zero=0.5,
        at_infinity=0.5,
    )


def _squared_hellinger(_: float) -> Form:
    """Make f = ½ (√u - 1)²."""
    return Form(
        f=lambda x: 0.5 * (x / 2).expm1() ** 2,
        weight=lambda x: 0.5 * (x / 2).expm1(),
        slope=lambda x: -0.5 * (-x / 2).expm1(),
        centre=0,
        curvature=0.25,
        at_zero=0.5,
        at_infinity=0.5,
    )


def _pearson(_: float) -> Form:
    """Make f = (u - 1)²."""
    return Form(
        f=lambda x: x.expm1() ** 2,
        weight=lambda x: (2 * x).expm1(),
        slope=lambda x: 2 * x.expm1(),
        centre=0,
        curvature=2,
        at_zero=1,
        at_infinity=math.inf,
    )


def _neyman(_: float) -> Form:
    """Make f = (u - 1)² / u."""
    return Form(
        f=lambda x: -x.expm1() * (-x).expm1(),
        weight=lambda x: -2 * (-x).expm1(),
        slope=lambda x: -(-2 * x).expm1(),
        centre=0,
        curvature=2,
        at_zero=math.inf,
        at_infinity=1,
    )


def _alpha_divergence(a: float) -> Form:
    """Make f = (u^a - a u - (1 - a)) / (a (a - 1)); the weight is the Box-Cox transform of u."""
    return Form(
        # u f' - w, which has no division by a (a - 1)
        f=lambda x: x.exp() * _power(x, a - 1) - _power(x, a),
        weight=lambda x: _power(x, a),
        slope=lambda x: _power(x, a - 1),
        centre=0,
        curvature=1,
        at_zero=1 / a if a > 0 else math.inf,
        at_infinity=1 / (1 - a) if a < 1 else math.inf,
    )


def _skew_forward_kl(a: float) -> Form:
    """Make f = u log(u / m),  m = a u + 1 - a."""

    def log_u_over_m(x: Tensor) -> Tensor:
        return -_log_mix(-x, 1 - a, a)

    return Form(
        f=lambda x: x.exp() * log_u_over_m(x),
        weight=lambda x: (1 - a) * log_u_over_m(x).exp(),
        slope=lambda x: log_u_over_m(x) + (1 - a) * (-_log_mix(x, a, 1 - a)).exp(),
        centre=1 - a,
        curvature=(1 - a) ** 2,
        at_zero=0,
        at_infinity=-_log(a),
    )


def _skew_reverse_kl(a: float) -> Form:
    """Make f = -log m,  m = (1 - a) u + a."""

    def log_m(x: Tensor) -> Tensor:
        return _log_mix(x, 1 - a, a)

    return Form(
        f=lambda x: -log_m(x),
        weight=lambda x: log_m(x) - 1 + a * (-log_m(x)).exp(),
        slope=lambda x: -(1 - a) * (-log_m(x)).exp(),
        centre=a - 1,
        curvature=(1 - a) ** 2,
        at_zero=-_log(a),
        at_infinity=0,
    )


def _jeffreys(_: float) -> Form:
    """Make f = (u - 1) log u: forward and reverse KL together."""
    return Form(
        f=lambda x: x.expm1() * x,
        weight=lambda x: x + x.expm1(),
        slope=lambda x: x - (-x).expm1(),
        centre=0,
        curvature=2,
        at_zero=math.inf,
        at_infinity=math.inf,
    )


def _le_cam(_: float) -> Form:
    """Make f = (u - 1)² / (u + 1)."""
    return Form(
        f=lambda x: x.expm1() * (x / 2).tanh(),
        weight=lambda x: 4 * x.sigmoid() ** 2 - 1,
        slope=lambda x: (x / 2).tanh() * (1 + 2 * (-x).sigmoid()),
        centre=0,
        curvature=1,
        at_zero=1,
        at_infinity=1,
    )


def _log_mix(x: Tensor, a: float, b: float) -> Tensor:
    """log(a u + b)."""
    return torch.logaddexp(x + _log(a), torch.as_tensor(_log(b), dtype=x.dtype, device=x.device))


def _power(x: Tensor, a: float) -> Tensor:
    """(u^a - 1) / a, and log u at a = 0."""
    return (a * x).expm1() / a if a else x


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def _is_inside(value: float) -> bool:
    return 0 < value < 1


def _is_share(value: float) -> bool:
    return 0 <= value < 1


_BETA = Parameter(
    "beta",
    default=0.5,
    allows=_is_inside,
    advice="a beta between 0 and 1, or forward_kl and reverse_kl themselves",
    low=0.002,
    high=0.998,
)
_ALPHA = Parameter(
    "alpha", default=0.5, allows=math.isfinite, advice="a finite alpha", low=-2.0, high=3.0
)
_SKEW = Parameter(
    "alpha", default=0.1, allows=_is_share, advice="0 <= alpha < 1", low=0.001, high=0.95
)

DIVERGENCES: dict[str, Divergence] = {
    entry.name: entry
    for entry in (
        Divergence(
            "forward_kl",
            "forward KL",
            _forward_kl,
            divergences.forward_kl,
            closed_form=closed_forms.forward_kl,
        ),
        Divergence(
            "reverse_kl",
            "reverse KL",
            _reverse_kl,
            divergences.reverse_kl,
            closed_form=closed_forms.reverse_kl,
        ),
        Divergence(
            "reverse_kl_k3",
            "reverse KL, k3 form",
            _reverse_kl_k3,
            divergences.reverse_kl,
            form_of="reverse_kl",
            closed_form=closed_forms.reverse_kl,
        ),
        Divergence(
            "jensen_shannon",
            "Jensen-Shannon divergence",
            _jensen_shannon,
            divergences.jensen_shannon,
            closed_form=closed_forms.jensen_shannon,
        ),
        Divergence(
            "generalized_jsd",
            "generalised JSD",
            _generalized_jsd,
            divergences.generalized_jsd,
            _BETA,
            closed_form=closed_forms.generalized_jsd,
        ),
        Divergence(
            "total_variation",
            "total variation",
            _total_variation,
            divergences.total_variation,
            closed_form=closed_forms.total_variation,
        ),
        Divergence(
            "squared_hellinger",
            "squared Hellinger distance",
            _squared_hellinger,
            divergences.squared_hellinger,
            closed_form=closed_forms.squared_hellinger,
        ),
        Divergence(
            "pearson",
            "Pearson chi²",
            _pearson,
            divergences.pearson,
            closed_form=closed_forms.pearson,
        ),
        Divergence(
            "neyman", "Neyman chi²", _neyman, divergences.neyman, closed_form=closed_forms.neyman
        ),
        Divergence(
            "alpha_divergence",
            "alpha-divergence",
            _alpha_divergence,
            divergences.alpha_divergence,
            _ALPHA,
            closed_form=closed_forms.alpha_divergence,
        ),
        Divergence(
            "skew_forward_kl",
            "skew forward KL",
            _skew_forward_kl,
            divergences.skew_forward_kl,
            _SKEW,
            closed_form=closed_forms.skew_forward_kl,
        ),
        Divergence(
            "skew_reverse_kl",
            "skew reverse KL",
            _skew_reverse_kl,
            divergences.skew_reverse_kl,
            _SKEW,
            closed_form=closed_forms.skew_reverse_kl,
        ),
        Divergence(
            "jeffreys",
            "Jeffreys divergence",
            _jeffreys,
            divergences.jeffreys,
            closed_form=closed_forms.jeffreys,
        ),
        Divergence(
            "le_cam",
            "Le Cam divergence",
            _le_cam,
            divergences.le_cam,
            closed_form=closed_forms.le_cam,
        ),
    )
}
