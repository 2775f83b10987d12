"""Notebook 32: the target of routed rows, and a mixture of several teachers."""

from __future__ import annotations

import torch
from torch import Tensor

from opdlab.models.graded import States
from opdlab.models.head import Head
from opdlab.models.routed import Routed
from opdlab.notebook.checking import Exercise


def route(log_probs: Tensor, owner: Tensor) -> Tensor:
    """Solve 32.1: each row's target is the distribution of its own teacher.

    Args:
        log_probs: Log-probs of `M` teachers, `[M, n, V]`.
        owner: The number of each row's teacher, `[n]`.

    Returns:
        Log-probs, `[n, V]`.
    """
    return log_probs[owner, torch.arange(len(owner))]


def mix(log_probs: Tensor, weights: Tensor) -> Tensor:
    """Solve 32.2: the log of the weighted mean of the teachers' probabilities.

    Args:
        log_probs: Log-probs of `M` teachers, `[M, n, V]`.
        weights: Their weights, which sum to 1, `[M]`.

    Returns:
        Log-probs, `[n, V]`.
    """
    return (log_probs + weights.log()[:, None, None]).logsumexp(0)


def _routed(log_probs: Tensor, place: Tensor, weight: Tensor) -> Tensor:
    """The library's own answer: `Routed` over the teachers' grades."""
    vocab_size = log_probs.shape[-1]
    eye = torch.eye(vocab_size, dtype=log_probs.dtype)
    parts = tuple(States(one, Head(eye, None, vocab_size)) for one in log_probs)
    token = torch.zeros(len(place), dtype=torch.long)
    logp = Routed(parts, place, weight, token, vocab_size).logp()
    assert isinstance(logp, Tensor)
    return logp


def _reference_route(log_probs: Tensor, owner: Tensor) -> Tensor:
    place = torch.full((len(owner), len(log_probs)), -1)
    rows = torch.arange(len(owner))
    place[rows, owner] = rows
    return _routed(log_probs, place, (place >= 0).to(log_probs))


def _reference_mix(log_probs: Tensor, weights: Tensor) -> Tensor:
    n = log_probs.shape[1]
    place = torch.arange(n)[:, None].expand(n, len(log_probs))
    return _routed(log_probs, place, weights.expand(n, -1))


def _random(seed: int, teachers: int, n: int, vocab_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = teachers, n, vocab_size
    return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).log_softmax(-1)


def _cases_of_route() -> list[tuple[Tensor, Tensor]]:
    return [
        (_random(0, 2, 4, 5), torch.tensor([0, 1, 1, 0])),
        (_random(1, 3, 3, 3), torch.tensor([2, 0, 1])),
    ]


def _cases_of_mix() -> list[tuple[Tensor, Tensor]]:
    return [
        (_random(2, 2, 3, 4), torch.tensor([0.5, 0.5], dtype=torch.float64)),
        (_random(3, 3, 2, 5), torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)),
    ]


def _first_teacher_only(log_probs: Tensor, owner: Tensor) -> Tensor:
    return log_probs[0]


def _all_rows_of_each(log_probs: Tensor, owner: Tensor) -> Tensor:
    return log_probs[owner]


def _mean_of_all(log_probs: Tensor, owner: Tensor) -> Tensor:
    return log_probs.mean(0)


def _mean_of_logs(log_probs: Tensor, weights: Tensor) -> Tensor:
    return (log_probs * weights[:, None, None]).sum(0)


def _geometric(log_probs: Tensor, weights: Tensor) -> Tensor:
    return (log_probs * weights[:, None, None]).sum(0).log_softmax(-1)


def _no_log(log_probs: Tensor, weights: Tensor) -> Tensor:
    return (log_probs.exp() * weights[:, None, None]).sum(0)


def _without_weights(log_probs: Tensor, weights: Tensor) -> Tensor:
    return log_probs.exp().mean(0).log()


EXERCISES = (
    Exercise(
        "32.1",
        request="return the log-probs of each row's own teacher, [n, V]",
        confirmation="that is all that several teachers change in the loss",
        reference=_reference_route,
        solution=route,
        cases=_cases_of_route,
        mistakes={
            "every row has the first teacher. Read the number in owner.": _first_teacher_only,
            (
                "that is [n, n, V], all rows of each teacher. Take one row of each: index the"
                " second dimension too."
            ): _all_rows_of_each,
            "that is the mean of all teachers. Each row has one.": _mean_of_all,
        },
    ),
    Exercise(
        "32.2",
        request="return the log of the weighted mean of the teachers' probabilities, [n, V]",
        confirmation="the forward KL to it has the gradient of the weighted forward KLs",
        reference=_reference_mix,
        solution=mix,
        cases=_cases_of_mix,
        mistakes={
            (
                "that is the mean of log-probs, which is no distribution: it does not sum to 1."
            ): _mean_of_logs,
            (
                "that is the geometric mean, normalised. Average the probabilities, then take the"
                " log."
            ): _geometric,
            "these are probabilities. Return their log.": _no_log,
            "all teachers count alike. Use the weights.": _without_weights,
        },
    ),
)
