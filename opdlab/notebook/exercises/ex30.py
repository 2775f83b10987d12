"""Notebook 30: the loss of a student told a hint, the best that a student without it can do, and
OPSD's clip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opdlab.engine.rows import Rows
from opdlab.losses.divergences import jensen_shannon
from opdlab.methods import SelfDistillation
from opdlab.methods.self_distillation import clipped_forward_kl
from opdlab.notebook.cases import random_log_probs, evaluate_loss
from opdlab.notebook.checking import Exercise, Function

Logits = Callable[[Tensor], Tensor]


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def cut(logits: Logits, before: Tensor, text: Tensor, skip: int) -> Tensor:
    """Log-probs of a text's tokens, read from place `skip` on."""
    return logits(torch.cat([before, text]))[skip : skip + len(text)].log_softmax(-1)


def told_self(logits: Logits, prompt: Tensor, told: Tensor, text: Tensor) -> Tensor:
    student = logits(torch.cat([prompt, text]))[len(prompt) - 1 : -1].log_softmax(-1)
    with torch.no_grad():
        teacher = logits(torch.cat([told, text]))[len(told) - 1 : -1].log_softmax(-1)
    middle = torch.logaddexp(student, teacher) - torch.tensor(2.0).log()
    return (kl(student, middle) + kl(teacher, middle)) / 2


def library(logits: Logits, prompt: Tensor, told: Tensor, text: Tensor) -> Tensor:
    student, teacher = (cut(logits, before, text, len(before) - 1) for before in (prompt, told))
    return SelfDistillation().loss(
        Rows({"student": student, "reference+hint": teacher.detach()}, text)
    )


def late(logits: Logits, prompt: Tensor, told: Tensor, text: Tensor) -> Tensor:
    """Every token is read at its own place, which foretells the next one."""
    return jensen_shannon(
        cut(logits, prompt, text, len(prompt)), cut(logits, told, text, len(told)).detach()
    )


def aligned(logits: Logits, prompt: Tensor, told: Tensor, text: Tensor) -> Tensor:
    """The told text cut where the bare one begins."""
    return jensen_shannon(
        cut(logits, prompt, text, len(prompt) - 1),
        cut(logits, told, text, len(prompt) - 1).detach(),
    )


def moving(logits: Logits, prompt: Tensor, told: Tensor, text: Tensor) -> Tensor:
    student, teacher = (cut(logits, before, text, len(before) - 1) for before in (prompt, told))
    return jensen_shannon(student, teacher)


def one_way(logits: Logits, prompt: Tensor, told: Tensor, text: Tensor) -> Tensor:
    student, teacher = (cut(logits, before, text, len(before) - 1) for before in (prompt, told))
    return kl(student, teacher.detach())


def lengths() -> list[tuple[Tensor, ...]]:
    """A table of a toy model's weights, a prompt, the prompt told a hint, and a text."""
    out = []
    for seed, (bare, told, text) in enumerate(((3, 5, 4), (2, 2, 3), (4, 9, 6))):
        made = torch.Generator().manual_seed(seed)
        table = torch.randn(7, 7, generator=made, dtype=torch.float64).requires_grad_()
        out.append((table, *(torch.randint(7, (n,), generator=made) for n in (bare, told, text))))
    return out


def felt(function: Function, table: Tensor, *ids: Tensor) -> dict[str, Any]:
    """The value `[T]` of a loss of a model whose logits are sums over what stands before, and its
    gradient in the weights.
    """
    value = function(lambda tokens: table[tokens].cumsum(0), *ids)
    if not isinstance(value, Tensor) or not value.requires_grad:
        return {"value": value, "gradient": None if value is None else torch.zeros_like(table)}
    return {"value": value, "gradient": torch.autograd.grad(value.sum(), table)[0]}


def best(told: Tensor) -> tuple[Tensor, Tensor]:
    forward = told.exp().mean(0).log()
    reverse = told.mean(0).log_softmax(-1)
    return forward, reverse


def descended(told: Tensor) -> tuple[Tensor, Tensor]:
    """Both by descent on the mean divergence itself, without their closed forms."""
    forward = lambda s: (told.exp() * (told - s)).sum(-1).mean()
    reverse = lambda s: (s.exp() * (s - told)).sum(-1).mean()
    return lowest(forward, told), lowest(reverse, told)


def lowest(mean: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The log-law `[V]` at which a function of one is least, by L-BFGS from the uniform one."""
    z = torch.zeros(like.shape[-1], dtype=like.dtype, requires_grad=True)
    search = torch.optim.LBFGS(
        [z],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def value() -> Tensor:
        search.zero_grad()
        loss = mean(z.log_softmax(-1))
        loss.backward()
        return loss

    search.step(value)
    return z.detach().log_softmax(-1)


def clipped(rows: Rows) -> Tensor:
    teacher = rows["reference+hint"]
    entries = teacher.exp() * (teacher - rows.student)
    return entries.clamp(max=0.05).sum(-1)


def whole(rows: Rows) -> Tensor:
    """The clip on the token, not on the entry."""
    teacher = rows["reference+hint"]
    return (teacher.exp() * (teacher - rows.student)).sum(-1).clamp(max=0.05)


def both_sides(rows: Rows) -> Tensor:
    teacher = rows["reference+hint"]
    return (teacher.exp() * (teacher - rows.student)).clamp(-0.05, 0.05).sum(-1)


def ratio(rows: Rows) -> Tensor:
    teacher = rows["reference+hint"]
    return (teacher.exp() * (teacher - rows.student).clamp(max=0.05)).sum(-1)


def told_rows() -> list[tuple[Rows]]:
    out = []
    for seed, scale in ((0, 1.0), (1, 3.0)):
        student, told = random_log_probs(6, 7, seed=seed, scale=scale)
        out.append(
            (
                Rows(
                    {"student": student.requires_grad_(), "reference+hint": told},
                    torch.zeros(6, dtype=torch.long),
                ),
            )
        )
    return out


EXERCISES = (
    Exercise(
        "30.1",
        asks="return the Jensen-Shannon divergence of every token of the text, [T]",
        says="the loss of SelfDistillation, and its gradient",
        truth=library,
        solution=told_self,
        cases=lengths,
        look=felt,
        mistakes={
            "a token is foretold one place before it: the text's first by the last place of the prompt.": (
                late
            ),
            "the told text begins later than the bare one. Cut each behind its own prompt.": (
                aligned
            ),
            "the told self is a target: compute it without gradient. Else hint and text pull each other.": (
                moving
            ),
            "that is a reverse KL. Take both KLs to the middle of the two laws, and half of their sum.": (
                one_way
            ),
        },
    ),
    Exercise(
        "30.2",
        asks="return two log-laws, [V] each: of least mean forward KL and of least mean reverse KL",
        says="where descent on the mean divergences ends, too",
        truth=descended,
        solution=best,
        cases=lambda: [
            (random_log_probs(4, seed=0)[0],),
            (random_log_probs(8, 5, seed=1, scale=2.0)[1],),
        ],
        close=1e-4,
        mistakes={
            "the two are swapped: forward KL averages probabilities, reverse KL log-probs.": (
                lambda told: best(told)[::-1]
            ),
            "a mean of log-probs sums to less than one as probabilities. Normalise it.": (
                lambda told: (
                    best(told)[0],
                    told.mean(0),
                )
            ),
            "both are the arithmetic mean. The reverse KL weighs by the student, which makes it a geometric one.": lambda told: (
                best(told)[0],
                best(told)[0],
            ),
        },
    ),
    Exercise(
        "30.3",
        asks="return the clipped forward KL of every token, [n]",
        says="SelfDistillation.opsd(clip=0.05), and its gradient",
        truth=lambda rows: clipped_forward_kl(rows.student, rows["reference+hint"], 0.05),
        solution=clipped,
        cases=told_rows,
        look=evaluate_loss,
        mistakes={
            "the clip is for every entry of the vocabulary, before the sum.": whole,
            "only large positive entries are clipped. Negative ones stay as they are, so the loss may be negative.": (
                both_sides
            ),
            "the whole entry q (log q - log p) is clipped, not the log ratio in it.": ratio,
        },
    ),
)
