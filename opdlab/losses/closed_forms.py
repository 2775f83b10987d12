"""Closed forms: a divergence together with its gradient in the student's logits, without autograd.

With `z` the student's logits, `p = softmax(z)`, and `g` the gradient in the log-probs,

    dD/dz  =  g - p sum(g)

The divergences of `opdlab.losses.divergences` define what is computed. The same numbers come here
with fewer passes over the vocabulary: `p` is computed once, and the way back through the softmax is
part of the formula. The engine uses them for the losses that offer one
(`opdlab.engine.closed_form`). A token without mass adds nothing, whatever its log-ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from opdlab.losses.divergences import expectation


@dataclass(frozen=True)
class ClosedForm:
    """The loss of some tokens with its gradient.

    Attributes:
        value: The loss of each token, `[n]`.
        gradient: The gradient of each token's own loss in its logits, `[n, V]`; its memory belongs
            to the caller.
    """

    value: Tensor
    gradient: Tensor

    def times(self, factor: Tensor) -> ClosedForm:
        """Multiply each token's loss with a number.

        Args:
            factor: One number per token, `[n]`, without gradient.

        Returns:
            The loss with its gradient, in the same memory.
        """
        return ClosedForm(self.value * factor, self.gradient.mul_(factor[:, None]))


@dataclass(frozen=True)
class Pair:
    """Student and teacher on some tokens, with what several formulas share computed once.

    Attributes:
        student: Log-probs of p, `[n, V]`.
        teacher: Log-probs of q, `[n, V]`.
        p: The student's probabilities, `[n, V]`.
    """

    student: Tensor
    teacher: Tensor
    p: Tensor

    @cached_property
    def q(self) -> Tensor:
        """The teacher's probabilities, `[n, V]`."""
        return self.teacher.exp()

    @cached_property
    def reverse_kl(self) -> Tensor:
        """KL(p || q) in nats, `[n]`."""
        return _mean(self.p, self._log_ratio)

    @property
    def log_ratio(self) -> Tensor:
        """Log p - log q, `[n, V]`; 0 where it is infinite and p is 0."""
        _ = self.reverse_kl
        return self._log_ratio

    @cached_property
    def _log_ratio(self) -> Tensor:
        return self.student - self.teacher


def reverse_kl(pair: Pair) -> ClosedForm:
    """Compute KL(p || q); its gradient is p (log p - log q - KL).

    Args:
        pair: Student and teacher.

    Returns:
        Value and gradient.
    """
    value = pair.reverse_kl
    return ClosedForm(value, _centred(pair.p, pair.log_ratio, value))


def forward_kl(pair: Pair) -> ClosedForm:
    """Compute KL(q || p); its gradient is p - q.

    Args:
        pair: Student and teacher.

    Returns:
        Value and gradient.
    """
    return ClosedForm(expectation(pair.q, pair.teacher - pair.student), pair.p - pair.q)


def jeffreys(pair: Pair) -> ClosedForm:
    """Compute KL(q || p) + KL(p || q).

    Args:
        pair: Student and teacher.

    Returns:
        Value and gradient.
    """
    forward, reverse = forward_kl(pair), reverse_kl(pair)
    return ClosedForm(forward.value + reverse.value, forward.gradient.add_(reverse.gradient))


def jensen_shannon(pair: Pair) -> ClosedForm:
    """Compute the Jensen-Shannon divergence, `generalized_jsd` with a beta of ½.

    Args:
        pair: Student and teacher.

    Returns:
        Value and gradient.
    """
    return generalized_jsd(pair)


def generalized_jsd(pair: Pair, beta: float = 0.5, normalize: bool = False) -> ClosedForm:
    """Compute beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p.

    In the log-probs its gradient is (1 - beta) p log(p / m).

    Args:
        pair: Student and teacher.
        beta: The teacher's share of the mixture.
        normalize: Divide by beta (1 - beta); the limits are then the two KLs.

    Returns:
        Value and gradient.
    """
    if normalize and beta in (0, 1):
        return reverse_kl(pair) if beta else forward_kl(pair)
    scale = 1 / (beta * (1 - beta)) if normalize else 1.0
    log_m = _mixture(pair.q, pair.p, beta).log_()
    of_teacher = expectation(pair.q, pair.teacher - log_m)
    log_ratio = torch.sub(pair.student, log_m, out=log_m)
    of_student = _mean(pair.p, log_ratio)
    value = scale * (beta * of_teacher + (1 - beta) * of_student)
    gradient = _centred(pair.p, log_ratio, of_student)
    return ClosedForm(value, gradient.mul_(scale * (1 - beta)))


def skew_forward_kl(pair: Pair, alpha: float = 0.1) -> ClosedForm:
    """Compute KL(q || m), m = alpha q + (1 - alpha) p; g = -(1 - alpha) p q / m.

    Args:
        pair: Student and teacher.
        alpha: The teacher's share of the mixture.

    Returns:
        Value and gradient.
    """
    if alpha == 0:
        return forward_kl(pair)
    m = _mixture(pair.q, pair.p, alpha)
    slope = (pair.q / m).mul_(pair.p).mul_(alpha - 1)
    value = expectation(pair.q, torch.sub(pair.teacher, m.log_(), out=m))
    return ClosedForm(value, through_softmax(slope, pair.p))


def skew_reverse_kl(pair: Pair, alpha: float = 0.1) -> ClosedForm:
    """Compute KL(p || m), m = alpha p + (1 - alpha) q; g = p (log(p / m) + 1 - alpha p / m).

    Args:
        pair: Student and teacher.
        alpha: The student's share of the mixture.

    Returns:
        Value and gradient.
    """
    if alpha == 0:
        return reverse_kl(pair)
    m = _mixture(pair.p, pair.q, alpha)
    share = pair.p / m
    log_ratio = torch.sub(pair.student, m.log_(), out=m)
    value = _mean(pair.p, log_ratio)
    inside = share.mul_(-alpha).add_(log_ratio)
    return ClosedForm(value, _centred(pair.p, inside, _mean(pair.p, inside)))


def alpha_divergence(pair: Pair, alpha: float = 0.5) -> ClosedForm:
    """Compute (S - 1) / (alpha (alpha - 1)) of S = sum s, s = q^alpha p^(1-alpha); g = -s / alpha.

    Args:
        pair: Student and teacher.
        alpha: The power.

    Returns:
        Value and gradient.
    """
    if alpha in (0, 1):
        return forward_kl(pair) if alpha else reverse_kl(pair)
    power = torch.add(alpha * pair.teacher, pair.student, alpha=1 - alpha)
    # -inf against -inf: no mass on either side
    power.masked_fill_(pair.student.isneginf() & pair.teacher.isneginf(), -torch.inf)
    product = power.exp_()
    value = (product.sum(-1) - 1) / (alpha * (alpha - 1))
    return ClosedForm(value, through_softmax(product.mul_(-1 / alpha), pair.p))


def total_variation(pair: Pair) -> ClosedForm:
    """Compute ½ sum |p - q|; g = ½ p sign(p - q).

    Args:
        pair: Student and teacher.

    Returns:
        Value and gradient.
    """
    gap = pair.p - pair.q
    value = 0.5 * torch.linalg.vector_norm(gap, ord=1, dim=-1)
    return ClosedForm(value, through_softmax(gap.sign_().mul_(pair.p).mul_(0.5), pair.p))


def squared_hellinger(pair: Pair) -> ClosedForm:
    """Compute ½ sum (√p - √q)²; g = ½ √p (√p - √q).

    Args:
        pair: Student and teacher.

    Returns:
        Value and gradient.
    """
    root_p = pair.p.sqrt()
    gap = root_p - (0.5 * pair.teacher).exp_()
    value = 0.5 * gap.square().sum(-1)
    return ClosedForm(value, through_softmax(gap.mul_(root_p).mul_(0.5), pair.p))


def pearson(pair: Pair) -> ClosedForm:
    """Compute sum (q - p)² / p; g = p - q² / p.

    Args:
        pair: Student and teacher.

    Returns:
        Value and gradient.
    """
    # As the difference of two roots, so that no ratio is taken to a power: r = q / √p, s = √p.
    half = 0.5 * _finite(pair.student)
    r = torch.sub(_finite(pair.teacher), half).exp_()
    s = half.exp_()
    gap = s - r
    value = gap.square().sum(-1)
    return ClosedForm(value, through_softmax(gap.mul_(r.add_(s)), pair.p))


def neyman(pair: Pair) -> ClosedForm:
    """Compute sum (q - p)² / q; g = 2 p (p - q) / q.

    Args:
        pair: Student and teacher.

    Returns:
        Value and gradient.
    """
    half = 0.5 * _finite(pair.teacher)
    r = torch.sub(_finite(pair.student), half).exp_()  # p / √q
    gap = r - half.exp_()
    value = gap.square().sum(-1)
    return ClosedForm(value, through_softmax(gap.mul_(r).mul_(2), pair.p))


def le_cam(pair: Pair) -> ClosedForm:
    """Compute sum (q - p)² / (q + p); with t = (q - p) / (q + p), g = -p t (2 + t).

    Args:
        pair: Student and teacher.

    Returns:
        Value and gradient.
    """
    t = (_finite(pair.teacher) - _finite(pair.student)).mul_(0.5).tanh_()
    value = torch.linalg.vecdot(pair.q - pair.p, t)
    return ClosedForm(
        value, through_softmax(torch.addcmul(2 * t, t, t).mul_(pair.p).neg_(), pair.p)
    )


def through_softmax(slope: Tensor, p: Tensor) -> Tensor:
    """Carry a gradient in log-probs back through the softmax.

    Args:
        slope: Gradient in log-probs, `[n, V]`; it is overwritten.
        p: The probabilities, `[n, V]`.

    Returns:
        Gradient in logits, `[n, V]`, in the memory of `slope`.
    """
    return slope.addcmul_(p, slope.sum(-1, keepdim=True), value=-1)


def _mean(p: Tensor, values: Tensor) -> Tensor:
    """Sum p * values; of tokens without mass, values that are no numbers are set to 0 in place."""
    mean: Tensor = torch.linalg.vecdot(p, values)
    if mean.device.type != "cpu" or not bool(torch.isfinite(mean).all()):  # see `expectation`
        mean = torch.linalg.vecdot(p, values.masked_fill_(p == 0, 0.0))
    return mean


def _centred(p: Tensor, values: Tensor, mean: Tensor) -> Tensor:
    """P (values - mean), the gradient in logits of a loss whose g is p * values."""
    return (values - mean[:, None]).mul_(p)


def _mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Share first + (1 - share) second, not below the least normal number, for a logarithm."""
    mixed = (share * first).add_(second, alpha=1 - share)
    return mixed.clamp_(min=torch.finfo(mixed.dtype).tiny)


def _finite(logp: Tensor) -> Tensor:
    """Replace -inf by the least number, so that no difference of two is NaN."""
    return logp.clamp(min=torch.finfo(logp.dtype).min)
