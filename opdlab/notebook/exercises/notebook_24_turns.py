"""Notebook 24: the loss of conversations, returns across turns, and weights by turn."""

from __future__ import annotations

import torch
from torch import Tensor

from opdlab.engine.batch import return_to_go
from opdlab.notebook.checking import Exercise


def mean_loss(loss: Tensor, learn: Tensor) -> Tensor:
    """Solve 24.1: the mean loss over the student's own tokens.

    Args:
        loss: `[B, T]`.
        learn: `[B, T]`, true on tokens that the student wrote.

    Returns:
        A number.
    """
    return loss[learn].mean()


def _reference_mean(loss: Tensor, learn: Tensor) -> Tensor:
    return (loss * learn).sum() / learn.sum()


def _cases_of_mean() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    cases = []
    for shape in ((3, 7), (2, 5)):
        loss = torch.rand(shape, generator=generator, dtype=torch.float64)
        learn = torch.rand(shape, generator=generator) > 0.4
        cases.append((loss, learn))
    return cases


def _over_all_tokens(loss: Tensor, learn: Tensor) -> Tensor:
    return loss.mean()


def _divided_by_all(loss: Tensor, learn: Tensor) -> Tensor:
    return (loss * learn).mean()


def _mean_of_rows(loss: Tensor, learn: Tensor) -> Tensor:
    return ((loss * learn).sum(1) / learn.sum(1).clamp(min=1)).mean()


def returns(reward: Tensor, learn: Tensor, discount: float) -> Tensor:
    """Solve 24.2: discounted returns of one conversation, in which a reply takes no time.

    Args:
        reward: `[T]`.
        learn: `[T]`, true on tokens that the student wrote.
        discount: From 0 to 1.

    Returns:
        `[T]`, zero where the student did not write.
    """
    out = torch.zeros_like(reward)
    later: float | Tensor = 0.0
    for t in reversed(range(len(reward))):
        if learn[t]:
            later = reward[t] + discount * later
            out[t] = later
    return out


def _reference_returns(reward: Tensor, learn: Tensor, discount: float) -> Tensor:
    return return_to_go(reward[None], learn[None], discount)[0]


def _cases_of_returns() -> list[tuple[Tensor, Tensor, float]]:
    learn = torch.tensor([True, True, False, False, True, False, True])
    generator = torch.Generator().manual_seed(1)
    reward = torch.rand(7, generator=generator, dtype=torch.float64)
    return [(reward, learn, discount) for discount in (0.5, 0.9, 1.0)]


def _replies_count(reward: Tensor, learn: Tensor, discount: float) -> Tensor:
    whole = torch.ones_like(learn)
    return return_to_go(reward[None], whole[None], discount)[0] * learn


def _replies_take_time(reward: Tensor, learn: Tensor, discount: float) -> Tensor:
    return _replies_count(reward * learn, learn, discount)


def _only_its_own_turn(reward: Tensor, learn: Tensor, discount: float) -> Tensor:
    out, later = torch.zeros_like(reward), torch.zeros((), dtype=reward.dtype)
    for t in reversed(range(len(reward))):
        later = reward[t] + discount * later if learn[t] else torch.zeros_like(later)
        out[t] = later
    return out * learn


EXERCISES = (
    Exercise(
        "24.1",
        request="return the mean of loss [B, T] over the tokens where learn [B, T] is true",
        confirmation="that is the loss that a step of opdlab takes the gradient of",
        reference=_reference_mean,
        solution=mean_loss,
        cases=_cases_of_mean,
        mistakes={
            "that counts what the tool said. Use the tokens where learn is true.": _over_all_tokens,
            (
                "the sum is right, but it is divided by all tokens: a talkative tool would lower"
                " the learning rate."
            ): _divided_by_all,
            (
                "that is a mean of means: a token of a short conversation counts more. Take all"
                " tokens together."
            ): _mean_of_rows,
        },
    ),
    Exercise(
        "24.2",
        request="return the discounted sum of later rewards [T], skipping what the tool said",
        confirmation="that is the credit that reaches a turn from those after it",
        reference=_reference_returns,
        solution=returns,
        cases=_cases_of_returns,
        mistakes={
            "rewards of the tool's tokens count too. Skip tokens where learn is false.": (
                _replies_count
            ),
            (
                "the tool's tokens take time: discount once per token of the student, or a longer"
                " reply changes the credit."
            ): _replies_take_time,
            (
                "the credit stops at the end of a turn. A call is good because of the turns after"
                " it."
            ): _only_its_own_turn,
        },
    ),
)
