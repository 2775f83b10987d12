"""Notebook 30: the loss of a hinted student, the best compromise without the hint, OPSD's clip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opdlab.engine.rows import Rows
from opdlab.losses.divergences import jensen_shannon
from opdlab.methods import SelfDistillation
from opdlab.methods.self_distillation import clipped_forward_kl
from opdlab.notebook.cases import evaluate_loss, random_log_probs
from opdlab.notebook.checking import Exercise, Function

Logits = Callable[[Tensor], Tensor]


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def hinted_loss(logits: Logits, prompt: Tensor, hinted: Tensor, text: Tensor) -> Tensor:
    """Solve 30.1: the Jensen-Shannon divergence to the hinted student, from logits.

    Args:
        logits: Returns the logits `[T, V]` of ids `[T]`.
        prompt: Ids of the bare prompt.
        hinted: Ids of the prompt with its hint.
        text: Ids of the text, `[T]`.

    Returns:
        The divergence, `[T]` in nats.
    """
    student = logits(torch.cat([prompt, text]))[len(prompt) - 1 : -1].log_softmax(-1)
    with torch.no_grad():
        teacher = logits(torch.cat([hinted, text]))[len(hinted) - 1 : -1].log_softmax(-1)
    middle = torch.logaddexp(student, teacher) - torch.tensor(2.0).log()
    return (_kl(student, middle) + _kl(teacher, middle)) / 2


def _log_probs(logits: Logits, before: Tensor, text: Tensor, first: int) -> Tensor:
    """Log-probs for the tokens of a text, read from position `first` of the sequence on."""
    return logits(torch.cat([before, text]))[first : first + len(text)].log_softmax(-1)


def _both_sides(
    logits: Logits, prompt: Tensor, hinted: Tensor, text: Tensor
) -> tuple[Tensor, Tensor]:
    student = _log_probs(logits, prompt, text, len(prompt) - 1)
    return student, _log_probs(logits, hinted, text, len(hinted) - 1)


def _reference_loss(logits: Logits, prompt: Tensor, hinted: Tensor, text: Tensor) -> Tensor:
    student, teacher = _both_sides(logits, prompt, hinted, text)
    rows = Rows({"student": student, "reference+hint": teacher.detach()}, text)
    return SelfDistillation().loss(rows)


def _cases_of_loss() -> list[tuple[Tensor, ...]]:
    """A toy model's weights, a prompt, the prompt with a hint, and a text."""
    cases = []
    for seed, lengths in enumerate(((3, 5, 4), (2, 2, 3), (4, 9, 6))):
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(7, 7, generator=generator, dtype=torch.float64).requires_grad_()
        ids = [torch.randint(7, (length,), generator=generator) for length in lengths]
        cases.append((table, *ids))
    return cases


def _observe_loss(function: Function, table: Tensor, *ids: Tensor) -> dict[str, Any]:
    """The loss `[T]` of a toy model, and its gradient in the weights.

    The toy model's logits at a position are the sum of the table's rows of all tokens up to it.
    """
    value = function(lambda tokens: table[tokens].cumsum(0), *ids)
    if value is None:
        return {"value": None, "gradient": None}
    if not isinstance(value, Tensor) or not value.requires_grad:
        return {"value": value, "gradient": torch.zeros_like(table)}
    return {"value": value, "gradient": torch.autograd.grad(value.sum(), table)[0]}


def _one_position_late(logits: Logits, prompt: Tensor, hinted: Tensor, text: Tensor) -> Tensor:
    student = _log_probs(logits, prompt, text, len(prompt))
    return jensen_shannon(student, _log_probs(logits, hinted, text, len(hinted)).detach())


def _cut_behind_the_same_prompt(
    logits: Logits, prompt: Tensor, hinted: Tensor, text: Tensor
) -> Tensor:
    student = _log_probs(logits, prompt, text, len(prompt) - 1)
    return jensen_shannon(student, _log_probs(logits, hinted, text, len(prompt) - 1).detach())


def _target_with_gradient(logits: Logits, prompt: Tensor, hinted: Tensor, text: Tensor) -> Tensor:
    return jensen_shannon(*_both_sides(logits, prompt, hinted, text))


def _reverse_kl_only(logits: Logits, prompt: Tensor, hinted: Tensor, text: Tensor) -> Tensor:
    student, teacher = _both_sides(logits, prompt, hinted, text)
    return _kl(student, teacher.detach())


def best(hinted: Tensor) -> tuple[Tensor, Tensor]:
    """Solve 30.2: the best compromises for the forward and for the reverse KL.

    Args:
        hinted: Log-probs under each hint, `[P, V]`.

    Returns:
        Log-probs, `[V]` each.
    """
    forward = hinted.exp().mean(0).log()
    reverse = hinted.mean(0).log_softmax(-1)
    return forward, reverse


def _reference_best(hinted: Tensor) -> tuple[Tensor, Tensor]:
    """Both by descent on the mean divergence itself, without their closed forms."""

    def mean_forward(s: Tensor) -> Tensor:
        return (hinted.exp() * (hinted - s)).sum(-1).mean()

    def mean_reverse(s: Tensor) -> Tensor:
        return (s.exp() * (s - hinted)).sum(-1).mean()

    return _minimise(mean_forward, hinted), _minimise(mean_reverse, hinted)


def _minimise(function: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The log-probs `[V]` where a function of log-probs is smallest, by L-BFGS."""
    logits = torch.zeros(like.shape[-1], dtype=like.dtype, requires_grad=True)
    search = torch.optim.LBFGS(
        [logits],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def value() -> Tensor:
        search.zero_grad()
        loss = function(logits.log_softmax(-1))
        loss.backward()
        return loss

    search.step(value)
    return logits.detach().log_softmax(-1)


def _cases_of_best() -> list[tuple[Tensor]]:
    return [(random_log_probs(4, seed=0)[0],), (random_log_probs(8, 5, seed=1, scale=2.0)[1],)]


def _means_swapped(hinted: Tensor) -> tuple[Tensor, Tensor]:
    forward, reverse = best(hinted)
    return reverse, forward


def _not_normalised(hinted: Tensor) -> tuple[Tensor, Tensor]:
    return best(hinted)[0], hinted.mean(0)


def _both_arithmetic(hinted: Tensor) -> tuple[Tensor, Tensor]:
    return best(hinted)[0], best(hinted)[0]


def clipped(rows: Rows) -> Tensor:
    """Solve 30.3: the forward KL with clipped entries.

    Args:
        rows: Log-probs of student and `reference+hint`, `[n, V]` each.

    Returns:
        The sum of the clipped entries, `[n]`.
    """
    teacher = rows["reference+hint"]
    entries = teacher.exp() * (teacher - rows.student)
    return entries.clamp(max=0.05).sum(-1)


def _reference_clipped(rows: Rows) -> Tensor:
    return clipped_forward_kl(rows.student, rows["reference+hint"], 0.05)


def _cases_of_clipped() -> list[tuple[Rows]]:
    cases = []
    for seed, scale in ((0, 1.0), (1, 3.0)):
        student, hinted = random_log_probs(6, 7, seed=seed, scale=scale)
        distributions = {"student": student.requires_grad_(), "reference+hint": hinted}
        cases.append((Rows(distributions, torch.zeros(6, dtype=torch.long)),))
    return cases


def _sum_clipped(rows: Rows) -> Tensor:
    teacher = rows["reference+hint"]
    return (teacher.exp() * (teacher - rows.student)).sum(-1).clamp(max=0.05)


def _clipped_on_both_sides(rows: Rows) -> Tensor:
    teacher = rows["reference+hint"]
    return (teacher.exp() * (teacher - rows.student)).clamp(-0.05, 0.05).sum(-1)


def _log_ratio_clipped(rows: Rows) -> Tensor:
    teacher = rows["reference+hint"]
    return (teacher.exp() * (teacher - rows.student).clamp(max=0.05)).sum(-1)


EXERCISES = (
    Exercise(
        "30.1",
        request="return the Jensen-Shannon divergence of every token of the text, [T]",
        confirmation="the loss of SelfDistillation, and its gradient",
        reference=_reference_loss,
        solution=hinted_loss,
        cases=_cases_of_loss,
        observe=_observe_loss,
        mistakes={
            (
                "the logits one position before a token predict it: the text's first token by the "
                "last position of the prompt."
            ): _one_position_late,
            (
                "the text begins later after the prompt with the hint. Cut each sequence behind its"
                " own prompt."
            ): _cut_behind_the_same_prompt,
            (
                "the hinted student is a target: compute it without gradient. Otherwise both sides "
                "move towards each other."
            ): _target_with_gradient,
            (
                "that is a reverse KL. Take both KLs to the middle of the two distributions, and "
                "half of their sum."
            ): _reverse_kl_only,
        },
    ),
    Exercise(
        "30.2",
        request=(
            "return log-probs of two distributions, [V] each: of the smallest mean forward KL and "
            "of the smallest mean reverse KL"
        ),
        confirmation="descent on the mean divergences ends there, too",
        reference=_reference_best,
        solution=best,
        cases=_cases_of_best,
        tolerance=1e-4,
        mistakes={
            (
                "the two are swapped: forward KL averages probabilities, reverse KL log-probs."
            ): _means_swapped,
            (
                "a mean of log-probs sums to less than one as probabilities. Normalise it."
            ): _not_normalised,
            (
                "both are the arithmetic mean. The reverse KL has the student's probabilities as "
                "weights, which makes its best student a geometric mean."
            ): _both_arithmetic,
        },
    ),
    Exercise(
        "30.3",
        request="return the clipped forward KL of every token, [n]",
        confirmation="SelfDistillation.opsd(clip=0.05), and its gradient",
        reference=_reference_clipped,
        solution=clipped,
        cases=_cases_of_clipped,
        observe=evaluate_loss,
        mistakes={
            "the clip is for every entry of the vocabulary, before the sum.": _sum_clipped,
            (
                "only large positive entries are clipped. Negative ones stay as they are, so the "
                "loss may be negative."
            ): _clipped_on_both_sides,
            (
                "the whole entry q (log q - log p) is clipped, not the log ratio in it."
            ): _log_ratio_clipped,
        },
    ),
)
