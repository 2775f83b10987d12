"""Generators of f-divergences: what a sampled token adds to a divergence and to its gradient.

    D_f(q || p)  =  E_{a ~ p} f(u),     u = q(a) / p(a)              (q the teacher, p the student)
    -grad D_f    =  E_{a ~ p} w_f(u) grad log p(a),       w_f(u) = -f(u) + u f'(u)

The second line is OPD+ (arXiv 2606.01039). All functions take `log_u = log q - log p` of any shape.
The generators themselves are in `opdlab.losses.divergence_table`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from opdlab.errors import InvalidValue
from opdlab.losses.divergence_table import DIVERGENCES, Form, sum_over_vocabulary
from opdlab.losses.divergences import as_float
from opdlab.support.validation import Number, Text, validate


@dataclass(frozen=True)
class Generator:
    """The generator `f` of a divergence by name: `Generator("forward_kl")` is f = u log u.

    Attributes:
        name: A name of `opdlab.losses.DIVERGENCES`.
        alpha: Parameter of "alpha_divergence" and of the two skews; None is the default of each.
        beta: Parameter of "generalized_jsd"; None is ½.
        shift: Adds `shift (u - 1)` to f, which is another generator of the same divergence.
        scale: Multiplies f, above 0.

    Raises:
        InvalidValue: There is no such name, it has no such parameter, or a value is out of range.
    """

    name: str
    alpha: float | None = None
    beta: float | None = None
    shift: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        validate("Generator", {"name": self.name}, {"name": Text})
        if self.name not in DIVERGENCES:
            raise InvalidValue(
                f"There is no generator {self.name!r}. Use one of {', '.join(DIVERGENCES)}."
            )
        given = {name: getattr(self, name) for name in ("alpha", "beta", "shift", "scale")}
        validate(
            "Generator",
            {name: value for name, value in given.items() if value is not None},
            dict.fromkeys(given, Number),
        )
        self._fill_parameter()
        if not 0 < self.scale < math.inf or not math.isfinite(self.shift):
            raise InvalidValue(
                f"{self!r} has shift={self.shift}, scale={self.scale}. Use finite numbers and a"
                " scale above 0."
            )

    def _fill_parameter(self) -> None:
        """Set the divergence's own parameter to its default, and refuse any other."""
        own = DIVERGENCES[self.name].parameter
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if own is not None and name == own.name:
                if value is None:
                    object.__setattr__(self, name, own.default)
            elif value is not None:
                raise InvalidValue(
                    f"The generator {self.name!r} has no {name}, but got {name}={value}. Leave it"
                    " out."
                )
        if own is not None and not own.allows(self._parameter):
            raise InvalidValue(f"{self!r} is no divergence. Use {own.advice}.")

    def f(self, log_u: Tensor) -> Tensor:
        """Return `f(u)`, whose mean under the student is the divergence.

        Args:
            log_u: log q - log p of any shape; -inf gives `at_zero`.

        Returns:
            `f(u)`, of the same shape.
        """
        log_u = as_float(log_u)
        value = self._form.f(log_u) + (self.shift * log_u.expm1() if self.shift else 0)
        value = value.masked_fill(log_u.isneginf(), self._form.at_zero - self.shift)
        if self.at_infinity:
            # Where terms of both signs are too large for a float, f is as well.
            limit = math.copysign(math.inf, self.at_infinity)
            value = value.masked_fill(value.isnan() & ~log_u.isnan(), limit)
        return self.scale * value

    def slope(self, log_u: Tensor) -> Tensor:
        """Return `f'(u)`.

        Args:
            log_u: log q - log p of any shape.

        Returns:
            `f'(u)`, of the same shape.
        """
        return self.scale * (self._form.slope(as_float(log_u)) + self.shift)

    def weight(self, log_u: Tensor) -> Tensor:
        """Return `w_f(u) = -f(u) + u f'(u)`, the advantage of OPD+, which never decreases in u.

        `shift` adds a constant to it.

        Args:
            log_u: log q - log p of any shape.

        Returns:
            `w_f(u)`, of the same shape.
        """
        return self.scale * (self._form.weight(as_float(log_u)) + self.shift)

    def stop_gradient_weight(self, log_u: Tensor) -> Tensor:
        """Return `-f(u)`, the advantage that ignores how f(u) moves with the student.

        It is right for the reverse KL and few others, and `shift` changes what it trains.

        Args:
            log_u: log q - log p of any shape.

        Returns:
            `-f(u)`, of the same shape.
        """
        return -self.f(log_u)

    @property
    def centre(self) -> float:
        """`f'(1)`, the weight of a token on which both agree."""
        return self.scale * (self._form.centre + self.shift)

    @property
    def curvature(self) -> float:
        """`f''(1)`, how strongly a small difference counts; infinite for total variation."""
        return self.scale * self._form.curvature

    @property
    def at_zero(self) -> float:
        """`f(0)`, the price of the student's mass on tokens that the teacher rules out."""
        return self.scale * (self._form.at_zero - self.shift)

    @property
    def at_infinity(self) -> float:
        """`lim f(u) / u`, the price of the teacher's mass on tokens that the student rules out."""
        return self.scale * (self._form.at_infinity + self.shift)

    def shifted(self, c: float) -> Generator:
        """Return `f + c (u - 1)`, another generator of the same divergence.

        Args:
            c: Slope of the line that is added.

        Returns:
            A new generator.
        """
        return replace(self, shift=self.shift + c / self.scale)

    def scaled(self, factor: float) -> Generator:
        """Return `factor f`; with `1 / curvature`, learning rates of divergences compare.

        Args:
            factor: A number above 0.

        Returns:
            A new generator.
        """
        return replace(self, scale=self.scale * factor)

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return `D_f(q || p)`, summed over the vocabulary, for ratios that fit a float.

        The entries of `opdlab.losses.DIVERGENCES` have no such limit where they have an exact form.

        Args:
            student: Log-probs `[..., V]`.
            teacher: Log-probs `[..., V]`.

        Returns:
            `[...]`; mass on a token that one of the two rules out counts at its price.
        """
        return sum_over_vocabulary(self.f, self.at_zero, self.at_infinity, student, teacher)

    @property
    def _parameter(self) -> float:
        own = DIVERGENCES[self.name].parameter
        return getattr(self, own.name) if own else 0.0

    @property
    def _form(self) -> Form:
        return DIVERGENCES[self.name].form(self._parameter)

    def __repr__(self) -> str:
        given = {
            "alpha": self.alpha,
            "beta": self.beta,
            "shift": self.shift or None,
            "scale": None if self.scale == 1 else self.scale,
        }
        keywords = [f"{name}={value:g}" for name, value in given.items() if value is not None]
        return f"Generator({', '.join([repr(self.name), *keywords])})"
