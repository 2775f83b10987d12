"""Notebook 21: the weight of any f by autograd, the loss that trains it, and what the stop-gradient
does close to the teacher.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opdlab.engine.rows import Rows
from opdlab.losses.divergences import Generator
from opdlab.methods import OPDPlus
from opdlab.notebook.cases import random_rows, evaluate_loss
from opdlab.notebook.checking import Exercise

Function = Callable[[Tensor], Tensor]
SHOWN = ("forward_kl", "jensen_shannon", "squared_hellinger", "pearson")


def weight(f: Function, log_u: Tensor) -> Tensor:
    x = log_u.clone().requires_grad_()
    value = f(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    return slope - value.detach()


def slope_only(f: Function, log_u: Tensor) -> Tensor:
    return weight(f, log_u) + f(log_u)


def wrong_chain(f: Function, log_u: Tensor) -> Tensor:
    return slope_only(f, log_u) / log_u.exp() - f(log_u)


def loss(generator: Generator, rows: Rows) -> Tensor:
    log_u = (rows.logp_of("teacher") - rows.logp).detach()
    return -generator.weight(log_u) * rows.logp


def library(generator: Generator, rows: Rows) -> Tensor:
    """OPD+'s own, with the columns that its plan would have left."""
    method, logp = OPDPlus(generator.name, clip=None), rows.logp.detach()
    plan = {"advantage": method.weight(rows.logp_of("teacher") - logp), "sampler_logp": logp}
    return method.loss(Rows(rows.distributions, rows.token, plan))


def attached(generator: Generator, rows: Rows) -> Tensor:
    return -generator.weight(rows.logp_of("teacher") - rows.logp) * rows.logp


def pulled(loss: Callable[[Generator, Rows], Tensor], generator: Generator, rows: Rows) -> Tensor:
    slope: Tensor = evaluate_loss(lambda given: loss(generator, given), rows)["gradient"]
    return slope


def factor(f: Function) -> Tensor:
    h = 1e-4
    up, down = f(torch.tensor(1 + h).double().log()), f(torch.tensor(1 - h).double().log())
    first, second = (up - down) / (2 * h), (up + down) / h**2
    return -first / second


def by_log(f: Function) -> Tensor:
    h = 1e-4
    up, down = f(torch.tensor(h).double()), f(torch.tensor(-h).double())
    return -(up - down) / (2 * h) / ((up + down) / h**2)


EXERCISES = (
    Exercise(
        "21.1",
        asks="return w_f(u) = -f(u) + u f'(u) for any f of log u, in the shape of log u",
        says="that is the weight of OPD+, for any f",
        truth=lambda f, log_u: f.__self__.weight(log_u),
        solution=weight,
        cases=lambda: [
            (Generator(name).f, torch.linspace(-4, 4, 9).double())
            for name in ("reverse_kl", *SHOWN)
        ],
        mistakes={
            "that is -f(u), the advantage with the stop-gradient. How f(u) moves with the student, u f'(u), is left out.": lambda f, log_u: (
                -f(log_u)
            ),
            "that is u f'(u) alone. The score half, -f(u), is left out.": slope_only,
            "by the chain rule the slope in log u is u f'(u) already. Do not divide it by u.": (
                wrong_chain
            ),
        },
    ),
    Exercise(
        "21.2",
        asks="return a loss, [n], whose gradient is -w_f(u) times that of the token's log-prob",
        says="that loss trains the divergence",
        truth=library,
        solution=loss,
        cases=lambda: [(Generator(name), random_rows(seed=i)) for i, name in enumerate(SHOWN)],
        look=pulled,
        mistakes={
            "the weight carries a gradient of its own, so its slope is counted twice. Detach it.": (
                attached
            ),
            "that is the stop-gradient's: its weight is -f(u). Use generator.weight.": (
                lambda g, r: g.f((r.logp_of("teacher") - r.logp).detach()) * r.logp
            ),
            "that differentiates f(u) itself, which is the pathwise half alone.": lambda g, r: g.f(
                r.logp_of("teacher") - r.logp
            ),
        },
    ),
    Exercise(
        "21.3",
        asks="return -f'(1) / f''(1), for an f that takes log u",
        says="that is what is left of the gradient close to the teacher",
        truth=lambda f: -torch.tensor(f.__self__.centre / f.__self__.curvature),
        solution=factor,
        close=1e-3,
        cases=lambda: [(Generator(name).f,) for name in ("reverse_kl", "skew_forward_kl", *SHOWN)],
        mistakes={
            "these are slopes in log u. Step in u: f takes its logarithm, log(1 + h).": by_log,
            "that is f'(1) / f''(1). The detached weight is -f, so the sign turns.": lambda f: (
                -factor(f)
            ),
        },
    ),
)
