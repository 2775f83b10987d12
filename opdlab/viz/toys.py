"""Small worlds that show the effect of a loss.

121 log ratios, two tokens, three tokens, a Gaussian under two hills.

Everything follows from one function, `Push.gradient`: -dE[L]/dlogits of students `[n, V]` against
teachers `[n, V]`, in float64, where E is over the tokens that the student samples, as in training.
`static/toys.js` does the same for the built-in divergences; the tests hold the two together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opdlab.audit.subject import subject_of
from opdlab.engine.rows import Rows
from opdlab.losses import Generator

X = torch.arange(-60, 61, dtype=torch.float64) / 10  # log ratios, log q - log p
SPACE = X.clone()  # where the hills stand
HILLS = ((0.6, -2.5, 0.6), (0.4, 2.5, 0.8))  # share, centre, width
FAR = 50.0  # log ratios are kept within
START = (0.6, 1.0)  # centre and width of the Gaussian before any step
RATE = 0.5
CELLS = 10  # of a side of the triangle
Gradient = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Push:
    """A loss by its gradient.

    Attributes:
        name: The loss.
        gradient: -dE[L]/dlogits of students `[n, V]` (logits) against teachers (log-probs).
        curvature: Sets the step, so that losses of different units compare; 1 if it is not known.
        own: The user's loss, where it is one.
    """

    name: str
    gradient: Gradient
    curvature: float = 1.0
    own: Any = None

    @property
    def rate(self) -> float:
        """The step size."""
        is_known = math.isfinite(self.curvature) and self.curvature > 0
        return RATE / self.curvature if is_known else RATE


def of_generator(generator: Generator, clip: float = 0.0, name: str = "") -> Push:
    """Return a built-in divergence, whose gradient is p_k (w_k - mean w).

    Args:
        generator: The divergence.
        clip: The largest distance of a weight from that of a token on which both agree; 0 for any.
        name: A name of your own.

    Returns:
        The loss; its curvature sets the step.
    """

    def gradient(logits: Tensor, teacher: Tensor) -> Tensor:
        student = logits.log_softmax(-1)
        w = generator.weight((teacher - student).clamp(-FAR, FAR)) - generator.centre
        w = w.clamp(-clip, clip) if clip else w
        p = student.exp()
        return p * (w - (p * w).sum(-1, keepdim=True))

    return Push(name or generator.name, gradient, generator.curvature)


def of_loss(loss: Any, name: str = "") -> Push:
    """Return a loss of one's own.

    Args:
        loss: A function of rows, or of student and teacher log-probs, or a method without a plan.
        name: A name of your own; by default the loss'.

    Returns:
        The loss, with a curvature of 1.

    Raises:
        OpdlabError: The loss has no expectation over the student's tokens.
    """
    subject = subject_of(loss, where="Playground")

    def gradient(logits: Tensor, teacher: Tensor) -> Tensor:
        return -slope(subject.method.loss, logits, teacher)

    return Push(name or subject.name, gradient, own=loss)


def losses(function: Callable[[Rows], Tensor], student: Tensor, teacher: Tensor) -> Tensor:
    """Return the loss of every token that each student may sample, `[n, V]`.

    Args:
        function: The loss of rows, `[n]`.
        student: `[n, V]` log-probs.
        teacher: `[n, V]` log-probs.

    Returns:
        `[n, V]`: the loss at each position, if the student sampled that token there.
    """
    n, vocab_size = student.shape
    policies = {
        name: log_probs[:, None, :].expand(n, vocab_size, vocab_size).reshape(-1, vocab_size)
        for name, log_probs in (("student", student), ("teacher", teacher))
    }
    return function(Rows(policies, torch.arange(vocab_size).repeat(n))).reshape(n, vocab_size)


def slope(function: Callable[[Rows], Tensor], logits: Tensor, teacher: Tensor) -> Tensor:
    """Return d/dlogits of the mean loss, the sampling held still as in training, `[n, V]`.

    Args:
        function: The loss of rows, `[n]`.
        logits: `[n, V]` logits of the student.
        teacher: `[n, V]` log-probs.

    Returns:
        `[n, V]`; each row is of its own mean loss.
    """
    leaf = logits.detach().clone().requires_grad_()
    with torch.enable_grad():
        student = leaf.log_softmax(-1)
        mean = (student.detach().exp() * losses(function, student, teacher)).sum()
        (out,) = torch.autograd.grad(mean, leaf)
    return out


def finite_difference(loss: Any, seed: int = 0, step: float = 1e-5) -> tuple[float, float]:
    """Compare autograd with central differences of the mean loss, the sampling held still.

    They differ where a loss holds part of itself back (`detach`), as estimates in the reward do on
    purpose.

    Args:
        loss: The loss, as `of_loss` takes it.
        seed: Seeds the four students and teachers over five tokens that are compared.
        step: The distance by which a logit is moved.

    Returns:
        The largest gap, and the largest slope.
    """
    function = subject_of(loss, where="Playground").method.loss
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = (
        1.2 * torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    teacher = teacher.log_softmax(-1)
    p, want, gap = logits.log_softmax(-1).exp(), slope(function, logits, teacher), 0.0
    for k in range(5):
        moved = torch.zeros(5, dtype=torch.float64)
        moved[k] = step
        up, down = (
            (p * losses(function, (logits + s * moved).log_softmax(-1), teacher)).sum(-1)
            for s in (1, -1)
        )
        gap = max(gap, float(((up - down).detach() / (2 * step) - want[:, k]).abs().max()))
    return gap, float(want.abs().max())


def weights(push: Push) -> np.ndarray:
    """Return the push on a token per unit of the student's probability, by its log ratio `X`.

    It is 0 where both agree. Read off one world with every ratio: p ~ e^(-x/2), q ~ e^(x/2).

    Args:
        push: The loss.

    Returns:
        `[121]`, one for each value of `X`.
    """
    student, teacher = (-X / 2).log_softmax(-1)[None], (X / 2).log_softmax(-1)[None]
    w = push.gradient(student, teacher)[0] / student[0].exp()
    return (w - w[len(X) // 2]).numpy()


def pulls(push: Push, mass: float = 0.5) -> np.ndarray:
    """Return the push on the logit of a token that the teacher gives `mass`, by log ratio.

    NaN where the student would give it more than 1.

    Args:
        push: The loss.
        mass: The teacher's probability of the token; a second token has the rest.

    Returns:
        `[121]`, one for each value of `X`.
    """
    p = mass * (-X).exp()
    there = p < 1 - 1e-9
    student = torch.stack([p[there], 1 - p[there]], -1).log()
    teacher = torch.tensor([mass, 1 - mass], dtype=torch.float64).log().expand_as(student)
    out = torch.full_like(X, math.nan)
    out[there] = push.gradient(student, teacher)[:, 0]
    return out.numpy()


def students() -> Tensor:
    """Return the points of the triangle that get an arrow, `[n, 3]`.

    Returns:
        Probabilities of three outcomes, none of them 0.
    """
    sides = range(CELLS + 1)
    points = [(i, j, CELLS - i - j) for i, j in product(sides, sides) if i + j <= CELLS]
    p = torch.tensor(points, dtype=torch.float64) * 0.94 / CELLS + 0.02
    return p / p.sum(-1, keepdim=True)


def apply_temperature(teacher: Tensor, temperature: float) -> Tensor:
    """Return log q^(1/T), normalised.

    Args:
        teacher: `[…, V]` log-probs, or logits.
        temperature: T; above 1 the teacher gets flatter.

    Returns:
        `[…, V]` log-probs.
    """
    return (teacher / temperature).log_softmax(-1)


def field(push: Push, teacher: Tensor, temperature: float = 1.0) -> np.ndarray:
    """Return the move dp/dt of each of `students` in a gradient step on its logits, `[n, 3]`.

    Args:
        push: The loss.
        teacher: `[3]` probabilities.
        temperature: The teacher's temperature.

    Returns:
        Moves whose three parts sum to 0.
    """
    p = students()
    g = push.gradient(p.log(), apply_temperature(teacher.log(), temperature).expand_as(p))
    return (p * (g - (p * g).sum(-1, keepdim=True))).numpy()


def path(
    push: Push, student: Tensor, teacher: Tensor, steps: int, temperature: float = 1.0
) -> np.ndarray:
    """Return the student after each of `steps` gradient steps on its logits, `[steps + 1, 3]`.

    Args:
        push: The loss.
        student: `[3]` probabilities before the first step.
        teacher: `[3]` probabilities.
        steps: The number of steps.
        temperature: The teacher's temperature.

    Returns:
        Probabilities, the first row those of `student`.
    """
    z, q, out = student.log()[None], apply_temperature(teacher.log(), temperature)[None], [student]
    for _ in range(steps):
        z = z + push.rate * push.gradient(z, q)
        out.append(z.softmax(-1)[0])
    return torch.stack(out).numpy()


def hills(temperature: float = 1.0) -> Tensor:
    """Return the log-probs of the teacher with two hills, over `SPACE`.

    Args:
        temperature: The teacher's temperature.

    Returns:
        `[121]` log-probs.
    """
    q = sum(
        share * (-(((SPACE - at) / width) ** 2) / 2).exp() / width for share, at, width in HILLS
    )
    return apply_temperature(torch.as_tensor(q).log(), temperature)


def fit(push: Push, steps: int, temperature: float = 1.0) -> tuple[float, float]:
    """Return centre and width of a Gaussian after `steps` natural gradient steps.

    Args:
        push: The loss.
        steps: The number of steps, from `START`.
        temperature: The teacher's temperature.

    Returns:
        (centre, width), on the scale of `SPACE`.
    """
    (at, width), teacher = START, hills(temperature)[None]
    spread = math.log(width)
    for _ in range(steps):
        width = math.exp(spread)
        z = (SPACE - at) / width
        g = push.gradient(-(z**2)[None] / 2, teacher)[0]
        at += max(-0.3, min(0.3, push.rate * 0.2 * width * float((g * z).sum())))
        spread += max(-0.2, min(0.2, push.rate * 0.1 * float((g * z**2).sum())))
        spread = max(math.log(0.15), min(math.log(6.0), spread))
    return at, math.exp(spread)


def shares(at: float, width: float) -> tuple[float, float]:
    """Return the student's mass left and right of the valley between the hills.

    Args:
        at: The centre of the student's Gaussian.
        width: Its width.

    Returns:
        (left, right), which sum to 1.
    """
    p = (-(((SPACE - at) / width) ** 2) / 2).softmax(-1)
    left = float(p[SPACE < 0.1].sum())
    return left, 1 - left
