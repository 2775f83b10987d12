"""Gradients of divergences for the logits of the student, in closed form.

With p = softmax(z) the student and q the teacher, for one distribution:

    reverse KL      p (log(p / q) - KL(p || q))
    forward KL      p - q
    Jensen-Shannon  ½ p (log(p / m) - KL(p || m)),  m = ½ (p + q)

They are those that autograd finds for `opdlab.losses` (tests/exact/worlds/test_pulls.py), at a
fraction of the time, which is what maps of thousands of settings need.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def pull_reverse_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """Return the gradient of KL(p || q) for the logits of p.

    Args:
        logp: The student's log-probs `[..., V]`.
        logq: The teacher's log-probs of a shape that fits.

    Returns:
        `[..., V]`.
    """
    p, ratio = logp.exp(), logp - logq
    return p * (ratio - (p * ratio).sum(-1, keepdim=True))


def pull_forward_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """Return the gradient of KL(q || p) for the logits of p; that of cross-entropy on q as well.

    Args:
        logp: The student's log-probs `[..., V]`.
        logq: The teacher's log-probs of a shape that fits.

    Returns:
        `[..., V]`.
    """
    return logp.exp() - logq.exp()


def pull_jensen_shannon(logp: Tensor, logq: Tensor) -> Tensor:
    """Return the gradient of the Jensen-Shannon divergence for the logits of p.

    Args:
        logp: The student's log-probs `[..., V]`.
        logq: The teacher's log-probs of a shape that fits.

    Returns:
        `[..., V]`.
    """
    middle = torch.logaddexp(logp, logq) - math.log(2)
    return pull_reverse_kl(logp, middle) / 2


PULLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reverse_kl": pull_reverse_kl,
    "forward_kl": pull_forward_kl,
    "jensen_shannon": pull_jensen_shannon,
}


def peaked(token: Tensor, mass: Tensor | float, vocab: int) -> Tensor:
    """Return probabilities with `mass` on one token each, and the rest spread evenly.

    Args:
        token: Token ids `[...]`.
        mass: The probability of the token, of a shape that fits `[...]`.
        vocab: Number of tokens `V`.

    Returns:
        `[..., V]` in float64.
    """
    share = torch.as_tensor(mass, dtype=torch.float64).expand(token.shape)[..., None]
    hot = torch.nn.functional.one_hot(token, vocab).double()
    return hot * share + (1 - hot) * (1 - share) / (vocab - 1)
