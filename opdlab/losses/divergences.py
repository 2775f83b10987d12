"""Divergences between two next-token distributions, as functions of log-probs `[..., V] -> [...]`.

The first argument is always the student p, the second the teacher q; names carry the direction, so
`forward_kl(student, teacher)` is KL(q || p). All work in log space in float32 at least, and are
exact and differentiable where a log-prob is -inf (a token that a model rules out). A KL to a
distribution that rules out what the other one does is +inf, which is its true value. Reductions,
masks and weights belong to a method.
"""

from __future__ import annotations

import math
import numbers
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opdlab.errors import InvalidValue
from opdlab.support.expect import shortened
from opdlab.support.validation import Text, Whole, validate

__all__ = [
    "TopK",
    "alpha_divergence",
    "entropy",
    "forward_kl",
    "generalized_jsd",
    "jeffreys",
    "jensen_shannon",
    "le_cam",
    "neyman",
    "pearson",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "squared_hellinger",
    "total_variation",
]


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(q || p) = sum q (log q - log p) in nats: the student covers what the teacher does.

    Args:
        student: Log-probs `[..., V]` of p.
        teacher: Log-probs `[..., V]` of q.

    Returns:
        `[...]`; +inf where the student rules out a token that the teacher does not.
    """
    return _kl(teacher, student)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(p || q) = sum p (log p - log q) in nats: the student keeps to what q allows.

    Args:
        student: Log-probs `[..., V]` of p.
        teacher: Log-probs `[..., V]` of q.

    Returns:
        `[...]`; +inf where the teacher rules out a token that the student does not.
    """
    return _kl(student, teacher)


def jeffreys(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(q || p) + KL(p || q) in nats.

    Args:
        student: Log-probs `[..., V]` of p.
        teacher: Log-probs `[..., V]` of q.

    Returns:
        `[...]`; +inf where one of the two rules out a token that the other does not.
    """
    return _kl(teacher, student) + _kl(student, teacher)


def jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ½ KL(q || m) + ½ KL(p || m), m = ½ q + ½ p: symmetric, from 0 to log 2 nats.

    Args:
        student: Log-probs `[..., V]` of p.
        teacher: Log-probs `[..., V]` of q.

    Returns:
        The divergence, `[...]`.
    """
    return generalized_jsd(student, teacher, 0.5)


def generalized_jsd(
    student: Tensor, teacher: Tensor, beta: float = 0.5, normalize: bool = False
) -> Tensor:
    """Return beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p, in nats.

    This is GKD's divergence (arXiv 2306.13649, section 2). A small beta behaves like the forward
    KL and a large beta like the reverse KL, but the bare form shrinks to zero at both ends, so beta
    also changes the effective learning rate.

    Args:
        student: Log-probs `[..., V]` of p.
        teacher: Log-probs `[..., V]` of q.
        beta: The teacher's share of the mixture, between 0 and 1.
        normalize: Divide by beta (1 - beta). The limits are then the two KLs themselves, and a
            beta of 0 or 1 is allowed.

    Returns:
        The divergence, `[...]`.

    Raises:
        InvalidValue: beta is outside its range.
    """
    _check_number("generalized_jsd", "beta", beta)
    if normalize and beta in (0, 1):
        return reverse_kl(student, teacher) if beta else forward_kl(student, teacher)
    if not 0 < beta < 1:
        raise InvalidValue(
            f"generalized_jsd got beta={beta}; the bare form is zero at 0 and 1. Use a beta"
            " between, normalize=True, or forward_kl / reverse_kl themselves."
        )
    middle = _mix(teacher, student, beta)
    value = beta * _kl(teacher, middle) + (1 - beta) * _kl(student, middle)
    return value / (beta * (1 - beta)) if normalize else value


def skew_forward_kl(student: Tensor, teacher: Tensor, alpha: float = 0.1) -> Tensor:
    """Return KL(q || alpha q + (1 - alpha) p) in nats, at most -log alpha.

    This is DistiLLM's skew KL (arXiv 2402.03898).

    Args:
        student: Log-probs `[..., V]` of p.
        teacher: Log-probs `[..., V]` of q.
        alpha: The teacher's share of the mixture, from 0 (the forward KL) to below 1.

    Returns:
        The divergence, `[...]`.

    Raises:
        InvalidValue: alpha is outside its range.
    """
    return _kl(teacher, _mix(teacher, student, _share(alpha)))


def skew_reverse_kl(student: Tensor, teacher: Tensor, alpha: float = 0.1) -> Tensor:
    """Return KL(p || (1 - alpha) q + alpha p) in nats, at most -log alpha.

    This is DistiLLM's skew reverse KL (arXiv 2402.03898).

    Args:
        student: Log-probs `[..., V]` of p.
        teacher: Log-probs `[..., V]` of q.
        alpha: The student's share of the mixture, from 0 (the reverse KL) to below 1.

    Returns:
        The divergence, `[...]`.

    Raises:
        InvalidValue: alpha is outside its range.
    """
    return _kl(student, _mix(student, teacher, _share(alpha)))


def alpha_divergence(student: Tensor, teacher: Tensor, alpha: float = 0.5) -> Tensor:
    """Return (sum q^alpha p^(1-alpha) - 1) / (alpha (alpha - 1)), the Cressie-Read form.

    Args:
        student: Log-probs `[..., V]` of p.
        teacher: Log-probs `[..., V]` of q.
        alpha: 0 is the reverse KL, 1 the forward KL, ½ four times the squared Hellinger distance, 2
            half of Pearson's and -1 half of Neyman's chi².

    Returns:
        The divergence, `[...]`.

    Raises:
        InvalidValue: alpha is not a finite number.
    """
    _check_number("alpha_divergence", "alpha", alpha)
    if alpha in (0, 1):
        return forward_kl(student, teacher) if alpha else reverse_kl(student, teacher)
    student, teacher = as_float(student), as_float(teacher)
    power = alpha * teacher + (1 - alpha) * student
    nowhere = student.isneginf() & teacher.isneginf()  # -inf against -inf: no mass on either side
    return (power.masked_fill(nowhere, -math.inf).exp().sum(-1) - 1) / (alpha * (alpha - 1))


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ½ sum |p - q|, from 0 to 1.

    1 - TV is the chance that a token of the student survives speculative checking by the teacher.

    Args:
        student: Log-probs `[..., V]` of p.
        teacher: Log-probs `[..., V]` of q.

    Returns:
        The divergence, `[...]`.
    """
    return 0.5 * (as_float(student).exp() - as_float(teacher).exp()).abs().sum(-1)


def squared_hellinger(student: Tensor, teacher: Tensor) -> Tensor:
    """Return ½ sum (√p - √q)², from 0 to 1.

    Args:
        student: Log-probs `[..., V]` of p.
        teacher: Log-probs `[..., V]` of q.

    Returns:
        The divergence, `[...]`.
    """
    root_p, root_q = (0.5 * as_float(student)).exp(), (0.5 * as_float(teacher)).exp()
    return 0.5 * (root_q - root_p).square().sum(-1)


def pearson(student: Tensor, teacher: Tensor) -> Tensor:
    """Return Pearson's chi², sum (q - p)² / p; +inf where it does not fit a float.

    Args:
        student: Log-probs `[..., V]` of p.
        teacher: Log-probs `[..., V]` of q.

    Returns:
        The divergence, `[...]`.
    """
    return _chi_squared(student, teacher)


def neyman(student: Tensor, teacher: Tensor) -> Tensor:
    """Return Neyman's chi², sum (q - p)² / q; +inf where it does not fit a float.

    Args:
        student: Log-probs `[..., V]` of p.
        teacher: Log-probs `[..., V]` of q.

    Returns:
        The divergence, `[...]`.
    """
    return _chi_squared(teacher, student)


def le_cam(student: Tensor, teacher: Tensor) -> Tensor:
    """Return Le Cam's divergence, sum (q - p)² / (q + p), from 0 to 2.

    Args:
        student: Log-probs `[..., V]` of p.
        teacher: Log-probs `[..., V]` of q.

    Returns:
        The divergence, `[...]`.
    """
    student, teacher = _finite(student), _finite(teacher)
    # (q - p) / (q + p) is a hyperbolic tangent of the log-ratio, which neither overflows nor
    # divides by zero.
    return ((teacher.exp() - student.exp()) * (0.5 * (teacher - student)).tanh()).sum(-1)


def entropy(logp: Tensor) -> Tensor:
    """Return -sum p log p in nats.

    Args:
        logp: Log-probs `[..., V]`.

    Returns:
        `[...]`, from 0 to log V.
    """
    logp = as_float(logp)
    return -expectation(logp.exp(), logp)


def expectation(p: Tensor, values: Tensor) -> Tensor:
    """Return sum p * values, where a token without mass adds nothing, whatever its value.

    Args:
        p: Probabilities `[..., V]`.
        values: Numbers `[..., V]`, which may be infinite or NaN where `p` is 0.

    Returns:
        `[...]`. It is infinite or NaN where a token with mass has such a value: a teacher with
        broken weights must not look like one that agrees.
    """
    value: Tensor = torch.linalg.vecdot(p, values)
    # Usually all values are finite, and masking them would double the time. On a GPU the question
    # would wait for the device.
    if value.device.type == "cpu" and bool(torch.isfinite(value).all()):
        return value
    masked: Tensor = torch.linalg.vecdot(p, values.masked_fill(p == 0, 0.0))
    return masked


@dataclass(frozen=True)
class TopK:
    """A coarse support: the `k` likeliest tokens of one policy, and a rule for the mass outside.

    Attributes:
        k: Number of tokens.
        by: The policy whose top tokens are taken, "student" or a name of the method's `needs`.
        tail: "bucket" keeps the mass outside as one more outcome, so that a divergence is a lower
            bound of the full one and zero only if top and tail agree. "renormalize" forgets the
            mass outside on both sides. "drop" leaves it out, which lets a reverse KL win by leaving
            the support.

    Raises:
        InvalidValue: k is below 1, or there is no such tail.
    """

    k: int
    by: str = "student"
    tail: Literal["bucket", "renormalize", "drop"] = "bucket"

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", validate("TopK", {"k": self.k}, {"k": Whole})["k"])
        validate("TopK", {"by": self.by}, {"by": Text})
        tails = ("bucket", "renormalize", "drop")
        if self.k < 1 or not (isinstance(self.tail, str) and self.tail in tails):
            raise InvalidValue(
                f"TopK got k={self.k}, tail={shortened(self.tail)}. Use k >= 1 and bucket,"
                " renormalize or drop."
            )
        if self.tail == "drop":
            warnings.warn(
                "TopK(tail='drop'): truncated log-probs do not sum to one, so the loss can turn"
                " negative and a student can lower it by moving mass off the support. Use"
                " tail='bucket' unless you study just that.",
                stacklevel=3,
            )

    def support(self, by: Tensor) -> Tensor:
        """Return ids `[n, min(k, V)]` of the likeliest tokens, likeliest first, without gradient.

        Args:
            by: Log-probs `[n, V]` of the policy whose top tokens are taken.

        Returns:
            Token ids; no gradient goes through the choice.
        """
        return by.detach().topk(min(self.k, by.shape[-1]), dim=-1).indices

    def coarse(self, logp: Tensor, ids: Tensor) -> Tensor:
        """Return log-probs on the support.

        Args:
            logp: Log-probs `[n, V]`.
            ids: The support `[n, k]`.

        Returns:
            `[n, k]`, or `[n, k + 1]` with the bucket (none where k covers all of V).
        """
        top = logp.gather(-1, ids)
        if self.tail == "renormalize":
            return top.log_softmax(-1)
        if self.tail == "drop" or ids.shape[-1] == logp.shape[-1]:
            return top
        least = torch.finfo(logp.dtype).min  # not -inf, of which a logsumexp has the gradient nan
        rest = logp.scatter(-1, ids, least).clamp(min=least).logsumexp(-1, keepdim=True)
        return torch.cat([top, rest.masked_fill(rest < 0.5 * least, -math.inf)], -1)


class _KL(torch.autograd.Function):
    """sum a (log a - log b) with both gradients by hand.

    That is half the passes over memory of autograd, and has no 0 * inf.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        p, gap = a.exp(), a - b
        value: Tensor = torch.linalg.vecdot(p, gap)
        if value.device.type != "cpu" or not bool(torch.isfinite(value).all()):  # see `expectation`
            # e^-20000 is no mass in floats, and the slope there is 0 too.
            value = torch.linalg.vecdot(p, gap.masked_fill_(p == 0, 0.0))
        # The slope p (gap + 1), in the memory of gap.
        slope = torch.addcmul(p, p, gap, out=gap) if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(slope, p if ctx.needs_input_grad[1] else None)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        slope, p = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        return None if slope is None else slope * grad, None if p is None else p * -grad


def _kl(a: Tensor, b: Tensor) -> Tensor:
    pair = torch.broadcast_tensors(as_float(a), as_float(b))
    value: Tensor = _KL.apply(*pair)  # type: ignore[no-untyped-call]  # PyTorch has no types for it
    return value


def _chi_squared(base: Tensor, other: Tensor) -> Tensor:
    """Return sum (b - a)² / a of base a and other b, as (b / √a - √a)²: no ratio to a power."""
    base, other = _finite(base), _finite(other)
    half = 0.5 * base
    return ((other - half).exp() - half.exp()).square().sum(-1)


def _mix(first: Tensor, second: Tensor, share: float) -> Tensor:
    """log(share * first + (1 - share) * second)."""
    if share == 0:
        return as_float(second)
    # -inf with -inf would have the gradient nan.
    return torch.logaddexp(as_float(first) + math.log(share), _finite(second) + math.log1p(-share))


def _check_number(owner: str, name: str, value: Any) -> None:
    """Raise InvalidValue unless a parameter of a divergence is a finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise InvalidValue(f"{owner} got {name}={shortened(value)}. Use a finite number.")


def _share(alpha: float) -> float:
    _check_number("A skew divergence", "alpha", alpha)
    if not 0 <= alpha < 1:
        raise InvalidValue(
            f"The skew alpha is {alpha}; it is the share of a distribution in a mixture. Use 0 <="
            " alpha < 1."
        )
    return alpha


def as_float(logp: Tensor) -> Tensor:
    """Return float32 and float64 as they are and other types as float32.

    Args:
        logp: A tensor of any floating-point type and shape.

    Returns:
        The tensor itself, or a float32 copy.
    """
    if not isinstance(logp, Tensor):
        raise InvalidValue(
            f"A divergence got {shortened(logp)}. Give log-probs as a tensor [..., V], such as"
            " rows.student."
        )
    return logp if logp.dtype in (torch.float32, torch.float64) else logp.float()


def _finite(logp: Tensor) -> Tensor:
    """Replace -inf by the least number, so that no difference of two is NaN."""
    logp = as_float(logp)
    return logp.clamp(min=torch.finfo(logp.dtype).min)
