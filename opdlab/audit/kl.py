"""k1, k2, k3: estimates of KL(p || q) from one token, as a value, in a reward and as a loss.

The student draws the token. With u = q/p at the token, S = grad log p(token) and p the law of it:

              value                       in the reward: E[k S]             as a loss: E[-u k'(u) S]
    k1        unbiased, any sign          grad KL(p || q)                   0
    k2        biased, never negative      no first-order signal             grad KL(p || q)
    k3        unbiased, never negative    grad KL(p || q) - grad KL(q || p) grad KL(q || p)

The gradient of E[k] is the sum of the two columns. Sources: http://joschu.net/blog/kl-approx.html
for the values, arXiv 2506.09477 (Tang and Munos), 2510.01555 and 2512.21852 for the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from opdlab.engine.rows import Rows
from opdlab.errors import InvalidValue
from opdlab.support.validation import Finite, Text, validate

Value = Callable[[Tensor], Tensor]


def k1(log_u: Tensor) -> Tensor:
    """Compute -log u, with log u = log q - log p: unbiased, of either sign, noisy.

    Args:
        log_u: Log-ratios of sampled tokens in nats, any shape.

    Returns:
        Nats, in the same shape.
    """
    return -log_u


def k2(log_u: Tensor) -> Tensor:
    """Compute ½ log² u: biased, never negative.

    Args:
        log_u: Log-ratios of sampled tokens in nats, any shape.

    Returns:
        Nats, in the same shape.
    """
    return 0.5 * log_u**2


def k3(log_u: Tensor) -> Tensor:
    """Compute u - 1 - log u: unbiased, never negative; noisier than k1 at large ratios.

    Args:
        log_u: Log-ratios of sampled tokens in nats, any shape.

    Returns:
        Nats, in the same shape.
    """
    return log_u.expm1() - log_u


ESTIMATES: dict[str, Value] = {"k1": k1, "k2": k2, "k3": k3}


@dataclass(frozen=True)
class Estimate:
    """An estimate of the KL as a method.

    Attributes:
        k: "k1", "k2" or "k3".
        use: "reward" holds the number fixed, "loss" differentiates it as it stands.
        shift: Adds c (u - 1), whose mean is zero; k3 is k1 with a shift of 1.

    Raises:
        InvalidValue: There is no such estimate or use.
    """

    k: str
    use: Literal["reward", "loss"]
    shift: float = 0.0

    needs: ClassVar[tuple[str, ...]] = ("teacher",)

    def __post_init__(self) -> None:
        validate(
            "Estimate",
            {"k": self.k, "use": self.use, "shift": self.shift},
            {"k": Text, "use": Text, "shift": Finite},
        )
        if self.k not in ESTIMATES or self.use not in ("reward", "loss"):
            raise InvalidValue(
                f"There is no estimate {self.k!r} as {self.use!r}. Use {', '.join(ESTIMATES)}, and"
                " 'reward' or 'loss'."
            )

    def value(self, log_u: Tensor) -> Tensor:
        """Compute the estimate, with its shift.

        Args:
            log_u: Log-ratios log q - log p of sampled tokens in nats, any shape.

        Returns:
            Nats, in the same shape.
        """
        return ESTIMATES[self.k](log_u) + (self.shift * log_u.expm1() if self.shift else 0)

    def loss(self, rows: Rows) -> Tensor:
        """Compute the estimate of each token.

        In the reward it is held fixed and multiplies the token's own probability ratio (1, with a
        gradient).

        Args:
            rows: A chunk of `n` tokens.

        Returns:
            `[n]`, in nats.
        """
        value = self.value(rows.logp_of("teacher") - rows.logp)
        if self.use == "loss":
            return value
        return (rows.logp - rows.logp.detach()).exp() * value.detach()

    def form(self, c: float) -> Estimate:
        """Return the estimate with the same mean and `c (u - 1)` added.

        Args:
            c: The multiple of `u - 1` that is added.

        Returns:
            A new estimate.
        """
        return replace(self, shift=self.shift + c)


def in_reward(k: str) -> Estimate:
    """Use `k` as the price of a sampled token, without a gradient through the number.

    Args:
        k: "k1", "k2" or "k3".

    Returns:
        The estimate as a method.

    Raises:
        InvalidValue: There is no such estimate.
    """
    return Estimate(k, "reward")


def as_loss(k: str) -> Estimate:
    """Differentiate `k` as it stands, without a gradient through the drawing of the token.

    Args:
        k: "k1", "k2" or "k3".

    Returns:
        The estimate as a method.

    Raises:
        InvalidValue: There is no such estimate.
    """
    return Estimate(k, "loss")
