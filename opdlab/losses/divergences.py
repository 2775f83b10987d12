"""Divergences between two next-token distributions: pure functions on log-probs, `[..., V] ->
[...]`, in nats.

Names carry the direction: the first argument is always the student p, the second the teacher q, and
`forward_kl(student, teacher)` is KL(q || p). All work in float32 at least, in log space, and are
exact and differentiable where a log-prob is -inf (a token that a model rules out); a KL to a
distribution that rules out what the other one does is +inf, which is its true value. Left out:
reductions, masks and weights (they belong to a method).
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
from opdlab.losses.generators import Generator
from opdlab.support.expect import shortened
from opdlab.support.validation import Text, Whole, validate

__all__ = [
    "Generator",
    "TopK",
    "alpha_divergence",
    "entropy",
    "forward_kl",
    "generalized_jsd",
    "jensen_shannon",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
]


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) = sum q (log q - log p): covers what the teacher does.

    `[..., V] -> [...]`, nats.
    """
    return _kl(teacher, student)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher) = sum p (log p - log q): keeps to what the teacher allows.

    `[..., V] -> [...]`, nats.
    """
    return _kl(student, teacher)


def jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    """½ KL(q || m) + ½ KL(p || m), m = ½ q + ½ p: symmetric, between 0 and log 2.

    `[..., V] -> [...]`, nats.
    """
    return generalized_jsd(student, teacher, 0.5)


def generalized_jsd(
    student: Tensor, teacher: Tensor, beta: float = 0.5, normalize: bool = False
) -> Tensor:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p (GKD, arXiv 2306.13649,
    section 2).

    Small beta behaves like the forward, large beta like the reverse KL, but the bare form shrinks
    to zero at both ends, so that beta also turns the learning rate. `normalize=True` divides by
    beta (1 - beta): the limits are then the two KLs themselves, and beta = 0 and 1 are allowed.
    `[..., V] -> [...]`, nats. Raises InvalidValue for other betas.
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
    """KL(q || alpha q + (1 - alpha) p), at most -log alpha (DistiLLM, arXiv 2402.03898). alpha = 0
    is forward KL.
    """
    return _kl(teacher, _mix(teacher, student, _share(alpha)))


def skew_reverse_kl(student: Tensor, teacher: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(p || (1 - alpha) q + alpha p), at most -log alpha (DistiLLM, arXiv 2402.03898). alpha = 0
    is reverse KL.
    """
    return _kl(student, _mix(student, teacher, _share(alpha)))


def alpha_divergence(student: Tensor, teacher: Tensor, alpha: float = 0.5) -> Tensor:
    """(sum q^alpha p^(1-alpha) - 1) / (alpha (alpha - 1)): reverse KL at 0, forward KL at 1, 4
    Hellinger² at ½.

    The Cressie-Read form, so Pearson's chi² / 2 at 2 and Neyman's at -1. `[..., V] -> [...]`.
    """
    _check_number("alpha_divergence", "alpha", alpha)
    if alpha in (0, 1):
        return forward_kl(student, teacher) if alpha else reverse_kl(student, teacher)
    student, teacher = _float(student), _float(teacher)
    power = alpha * teacher + (1 - alpha) * student
    nowhere = student.isneginf() & teacher.isneginf()  # -inf against -inf: no mass on either side
    return (power.masked_fill(nowhere, -math.inf).exp().sum(-1) - 1) / (alpha * (alpha - 1))


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    """½ sum |p - q|: between 0 and 1; 1 - TV is the chance that a token survives speculative
    checking.
    """
    return 0.5 * (_float(student).exp() - _float(teacher).exp()).abs().sum(-1)


def entropy(logp: Tensor) -> Tensor:
    """- sum p log p. `[..., V] -> [...]`, nats."""
    logp = _float(logp)
    return -torch.linalg.vecdot(
        logp.exp(), logp.clamp(min=torch.finfo(logp.dtype).min)
    )  # 0 * -inf is 0 here


@dataclass(frozen=True)
class TopK:
    """A coarse support: the `k` likeliest tokens of one policy, and what becomes of the mass
    outside.

    `by` names the policy whose top tokens are taken. `tail`: "bucket" keeps the rest as one more
    outcome, so that a divergence on it is a lower bound of the full one and zero only if top and
    tail agree; "renormalize" forgets the rest on both sides; "drop" leaves it out, which lets a
    reverse KL win by leaving the support.
    """

    k: int
    by: str = "student"
    tail: Literal["bucket", "renormalize", "drop"] = "bucket"

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", validate("TopK", {"k": self.k}, {"k": Whole})["k"])
        validate("TopK", {"by": self.by}, {"by": Text})
        if self.k < 1 or self.tail not in ("bucket", "renormalize", "drop"):
            raise InvalidValue(
                f"TopK got k={self.k}, tail={self.tail!r}. Use k >= 1 and bucket, renormalize or"
                " drop."
            )
        if self.tail == "drop":
            warnings.warn(
                "TopK(tail='drop'): truncated log-probs do not sum to one, so the loss can turn"
                " negative and a student can lower it by moving mass off the support. Use"
                " tail='bucket' unless you study just that.",
                stacklevel=3,
            )

    def support(self, by: Tensor) -> Tensor:
        """Ids `[n, min(k, V)]` of the likeliest tokens, likeliest first; carries no gradient."""
        return by.detach().topk(min(self.k, by.shape[-1]), dim=-1).indices

    def coarse(self, logp: Tensor, ids: Tensor) -> Tensor:
        """`[n, V]` on the support:

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
    """sum a (log a - log b) with both gradients by hand: half the passes over memory, and no 0 *
    inf.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        p = a.exp()
        # A token without mass under `a` adds nothing, whatever `b` says. +inf is a true value
        # elsewhere, and NaN stays NaN: a teacher with broken weights must not look like one that
        # agrees.
        gap = (a - b).masked_fill_(a.isneginf(), 0.0)
        value = torch.linalg.vecdot(p, gap)
        slope = (
            torch.addcmul(p, p, gap, out=gap) if ctx.needs_input_grad[0] else None
        )  # p (gap + 1), in gap's own memory
        ctx.save_for_backward(slope, p if ctx.needs_input_grad[1] else None)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        slope, p = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        return None if slope is None else slope * grad, None if p is None else p * -grad


def _kl(a: Tensor, b: Tensor) -> Tensor:
    return _KL.apply(*torch.broadcast_tensors(_float(a), _float(b)))


def _mix(first: Tensor, second: Tensor, share: float) -> Tensor:
    """log(share * first + (1 - share) * second)."""
    if share == 0:
        return _float(second)
    second = _float(second)
    second = second.clamp(
        min=torch.finfo(second.dtype).min
    )  # -inf with -inf would have the gradient nan
    return torch.logaddexp(_float(first) + math.log(share), second + math.log1p(-share))


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


def _float(logp: Tensor) -> Tensor:
    return logp if logp.dtype in (torch.float32, torch.float64) else logp.float()
