"""Notebook 21: the weight of any f by autograd, its loss, the stop-gradient near the teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opdlab.engine.rows import Rows
from opdlab.losses import Generator
from opdlab.methods import OPDPlus
from opdlab.notebook.cases import evaluate_loss, random_rows
from opdlab.notebook.checking import Exercise

Function = Callable[[Tensor], Tensor]
SHOWN = ("forward_kl", "jensen_shannon", "squared_hellinger", "pearson")


def weight(f: Function, log_u: Tensor) -> Tensor:
    """Solve 21.1: the weight of OPD+ for any f.

    Args:
        f: The generator as a function of log u.
        log_u: Teacher's minus student's log-probs, any shape.

    Returns:
        The weight u f'(u) - f(u), in the shape of `log_u`.
    """
    x = log_u.clone().requires_grad_()
    value = f(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    return slope - value.detach()


def _generator_of(f: Function) -> Generator:
    """The generator whose bound method a case holds."""
    generator: Generator = f.__self__  # type: ignore[attr-defined]
    return generator


def _reference_weight(f: Function, log_u: Tensor) -> Tensor:
    return _generator_of(f).weight(log_u)


def _cases_of_weight() -> list[tuple[Function, Tensor]]:
    log_u = torch.linspace(-4, 4, 9).double()
    return [(Generator(name).f, log_u) for name in ("reverse_kl", *SHOWN)]


def _score_half(f: Function, log_u: Tensor) -> Tensor:
    return -f(log_u)


def _pathwise_half(f: Function, log_u: Tensor) -> Tensor:
    return weight(f, log_u) + f(log_u)


def _divided_by_u(f: Function, log_u: Tensor) -> Tensor:
    return _pathwise_half(f, log_u) / log_u.exp() - f(log_u)


def loss(generator: Generator, rows: Rows) -> Tensor:
    """Solve 21.2: a loss with the gradient of OPD+.

    Args:
        generator: The f-divergence to train.
        rows: Log-probs of student and teacher, and the sampled tokens, of `n` rows.

    Returns:
        The loss, `[n]`; only its gradient counts.
    """
    log_u = (rows.logp_of("teacher") - rows.logp).detach()
    return -generator.weight(log_u) * rows.logp


def _reference_loss(generator: Generator, rows: Rows) -> Tensor:
    """The loss of OPD+, with the columns that its plan would have returned."""
    method, logp = OPDPlus(generator.name, clip=None), rows.logp.detach()
    plan = {"advantage": method.weight(rows.logp_of("teacher") - logp), "sampler_logp": logp}
    return method.loss(Rows(rows.distributions, rows.token, plan))


def _cases_of_loss() -> list[tuple[Generator, Rows]]:
    return [(Generator(name), random_rows(seed=i)) for i, name in enumerate(SHOWN)]


def _observe_gradient(
    loss: Callable[[Generator, Rows], Tensor], generator: Generator, rows: Rows
) -> Tensor:
    gradient: Tensor = evaluate_loss(lambda given: loss(generator, given), rows)["gradient"]
    return gradient


def _weight_not_detached(generator: Generator, rows: Rows) -> Tensor:
    return -generator.weight(rows.logp_of("teacher") - rows.logp) * rows.logp


def _stop_gradient(generator: Generator, rows: Rows) -> Tensor:
    return generator.f((rows.logp_of("teacher") - rows.logp).detach()) * rows.logp


def _f_differentiated(generator: Generator, rows: Rows) -> Tensor:
    return generator.f(rows.logp_of("teacher") - rows.logp)


def factor(f: Function) -> Tensor:
    """Solve 21.3: the length of the stop-gradient's gradient close to the teacher.

    Args:
        f: The generator as a function of log u.

    Returns:
        -f'(1) / f''(1), one number.
    """
    h = 1e-4
    up, down = f(torch.tensor(1 + h).double().log()), f(torch.tensor(1 - h).double().log())
    first, second = (up - down) / (2 * h), (up + down) / h**2
    return -first / second


def _reference_factor(f: Function) -> Tensor:
    generator = _generator_of(f)
    return -torch.tensor(generator.centre / generator.curvature)


def _cases_of_factor() -> list[tuple[Function]]:
    return [(Generator(name).f,) for name in ("reverse_kl", "skew_forward_kl", *SHOWN)]


def _slopes_in_log_u(f: Function) -> Tensor:
    h = 1e-4
    up, down = f(torch.tensor(h).double()), f(torch.tensor(-h).double())
    return -(up - down) / (2 * h) / ((up + down) / h**2)


def _sign_not_turned(f: Function) -> Tensor:
    return -factor(f)


EXERCISES = (
    Exercise(
        "21.1",
        request="return w_f(u) = -f(u) + u f'(u) for any f of log u, in the shape of log u",
        confirmation="that is the weight of OPD+, for any f",
        reference=_reference_weight,
        solution=weight,
        cases=_cases_of_weight,
        mistakes={
            (
                "that is -f(u), the advantage with the stop-gradient. The change of f(u) with the "
                "student, u f'(u), is missing."
            ): _score_half,
            "that is u f'(u) alone. The score half, -f(u), is missing.": _pathwise_half,
            (
                "by the chain rule the slope in log u is u f'(u) already. Do not divide it by u."
            ): _divided_by_u,
        },
    ),
    Exercise(
        "21.2",
        request="return a loss, [n], whose gradient is -w_f(u) times that of the token's log-prob",
        confirmation="that loss trains the divergence",
        reference=_reference_loss,
        solution=loss,
        cases=_cases_of_loss,
        observe=_observe_gradient,
        mistakes={
            (
                "the weight carries a gradient of its own, so its slope is counted twice. Detach "
                "it."
            ): _weight_not_detached,
            (
                "that is the loss with the stop-gradient: its weight is -f(u). Use "
                "generator.weight."
            ): _stop_gradient,
            (
                "that differentiates f(u) itself, which is the pathwise half alone."
            ): _f_differentiated,
        },
    ),
    Exercise(
        "21.3",
        request="return -f'(1) / f''(1), for an f that takes log u",
        confirmation="that is the part of the gradient that is left close to the teacher",
        reference=_reference_factor,
        solution=factor,
        cases=_cases_of_factor,
        tolerance=1e-3,
        mistakes={
            (
                "these are slopes in log u. Step in u: f takes its logarithm, log(1 + h)."
            ): _slopes_in_log_u,
            (
                "that is f'(1) / f''(1). The detached weight is -f, so the sign turns."
            ): _sign_not_turned,
        },
    ),
)
