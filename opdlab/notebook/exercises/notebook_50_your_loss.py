"""Notebook 50: a gated loss, a selection of tokens, and the check by differences of any loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opdlab.engine.rows import Rows
from opdlab.losses.divergences import entropy as entropy_of
from opdlab.losses.divergences import forward_kl, jensen_shannon, reverse_kl
from opdlab.notebook.cases import evaluate_loss, random_log_probs, random_rows
from opdlab.notebook.checking import Exercise, WrongAnswer

PairLoss = Callable[[Tensor, Tensor], Tensor]  # of the log-probs of student and teacher

PADDING_CHOSEN = "padding is chosen: only positions where mask is true are tokens."
AUTOGRAD = (
    "that is autograd, which cannot judge itself. Move each logit up and down by a step and take "
    "the difference."
)
ONE_SIDED = (
    "that is a one-sided difference. Take (loss above - loss below) / (2 · step), which is far more"
    " exact."
)


def gated(student: Tensor, teacher: Tensor) -> Tensor:
    """Solve 50.1: reverse KL where the teacher is sure, forward KL where it is undecided.

    Args:
        student: Log-probs, `[n, V]`.
        teacher: Log-probs, `[n, V]`.

    Returns:
        The loss, `[n]` in nats.
    """
    entropy = -(teacher.exp() * teacher).sum(-1)
    gate = 1 - torch.exp(-entropy)
    reverse = (student.exp() * (student - teacher)).sum(-1)
    forward = (teacher.exp() * (teacher - student)).sum(-1)
    return (1 - gate) * reverse + gate * forward


def _mix(gate: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    return (1 - gate) * reverse_kl(student, teacher) + gate * forward_kl(student, teacher)


def _reference_gated(student: Tensor, teacher: Tensor) -> Tensor:
    return _mix(1 - (-entropy_of(teacher)).exp(), student, teacher)


def _observe_gated(function: PairLoss, rows: Rows) -> dict[str, Any]:
    return evaluate_loss(lambda given: function(given.student, given.teacher), rows)


def _gate_reversed(student: Tensor, teacher: Tensor) -> Tensor:
    return _mix((-entropy_of(teacher)).exp(), student, teacher)


def _entropy_of_student(student: Tensor, teacher: Tensor) -> Tensor:
    return _mix(1 - (-entropy_of(student)).exp(), student, teacher)


def _forward_added(student: Tensor, teacher: Tensor) -> Tensor:
    gate = 1 - (-entropy_of(teacher)).exp()
    return reverse_kl(student, teacher) + gate * forward_kl(student, teacher)


def _entropy_sign_wrong(student: Tensor, teacher: Tensor) -> Tensor:
    return _mix(1 - entropy_of(teacher).exp(), student, teacher)


def keep(entropy: Tensor, kl: Tensor, mask: Tensor, vocab: int, share: float) -> Tensor:
    """Solve 50.2: the tokens with the largest score in the batch.

    Args:
        entropy: Entropy at each token, `[B, T]` in nats.
        kl: Divergence at each token, `[B, T]` in nats.
        mask: True for tokens and false for padding, `[B, T]`.
        vocab: The number of tokens, `V`.
        share: The share of the batch's tokens to keep.

    Returns:
        1 for kept tokens and 0 for the others, `[B, T]`.
    """
    h = entropy / math.log(vocab)
    delta = 1 - torch.exp(-kl)
    u = (h + delta - h * delta).masked_fill(~mask, -1.0)
    n = math.ceil(share * int(mask.sum()))
    kept = torch.zeros(mask.numel(), dtype=torch.long)
    kept[u.flatten().topk(n).indices] = 1
    return kept.view(mask.shape)


def _tokens_before(entropy: Tensor, kl: Tensor, mask: Tensor, vocab: int) -> Tensor:
    """For each position, the number of tokens with a larger score, `[B, T]`."""
    u = 1 - (1 - entropy / math.log(vocab)) * (-kl).exp()  # the soft "or" in its other form
    return (u[mask][None] > u[..., None]).sum(-1)


def _reference_keep(entropy: Tensor, kl: Tensor, mask: Tensor, vocab: int, share: float) -> Tensor:
    before = _tokens_before(entropy, kl, mask, vocab)
    return ((before < math.ceil(share * int(mask.sum()))) & mask).long()


def _cases_of_keep() -> list[tuple[Tensor, Tensor, Tensor, int, float]]:
    generator, vocab, cases = torch.Generator().manual_seed(0), 16, []
    for rows, longest, share in ((3, 8, 0.25), (4, 12, 0.3), (2, 20, 0.5)):
        lengths = torch.randint(3, longest + 1, (rows, 1), generator=generator)
        mask = torch.arange(longest) < lengths
        entropy = torch.rand(rows, longest, generator=generator, dtype=torch.float64)
        kl = 3 * torch.rand(rows, longest, generator=generator, dtype=torch.float64) ** 2
        kl = torch.where(mask, kl, 9.0)  # values in the padding must not matter
        cases.append((math.log(vocab) * entropy, kl, mask, vocab, share))
    return cases


def _observe_keep(function: Callable[..., Tensor], *batch: Any) -> Tensor:
    """The selection; one in the padding is named at once, whatever else is wrong."""
    chosen, mask = function(*batch), batch[2]
    is_selection = isinstance(chosen, Tensor) and chosen.shape == mask.shape
    if is_selection and bool((chosen[~mask] != 0).any()):
        raise WrongAnswer(PADDING_CHOSEN)
    return chosen


def _mask_ignored(entropy: Tensor, kl: Tensor, mask: Tensor, vocab: int, share: float) -> Tensor:
    return keep(entropy, kl, torch.ones_like(mask), vocab, share)


def _padding_counted(entropy: Tensor, kl: Tensor, mask: Tensor, vocab: int, share: float) -> Tensor:
    before = _tokens_before(entropy, kl, mask, vocab)
    return ((before < math.ceil(share * mask.numel())) & mask).long()


def _row_by_row(entropy: Tensor, kl: Tensor, mask: Tensor, vocab: int, share: float) -> Tensor:
    rows = [slice(i, i + 1) for i in range(len(mask))]
    return torch.cat([keep(entropy[row], kl[row], mask[row], vocab, share) for row in rows])


def _plain_sum(entropy: Tensor, kl: Tensor, mask: Tensor, vocab: int, share: float) -> Tensor:
    # A divergence whose score alone orders tokens as h + delta does.
    total = entropy / math.log(vocab) + 1 - (-kl).exp()
    same_order = -torch.log1p(-total / 3)
    return keep(torch.zeros_like(entropy), same_order, mask, vocab, share)


def _entropy_alone(entropy: Tensor, kl: Tensor, mask: Tensor, vocab: int, share: float) -> Tensor:
    return keep(entropy, torch.zeros_like(kl), mask, vocab, share)


def _divergence_alone(
    entropy: Tensor, kl: Tensor, mask: Tensor, vocab: int, share: float
) -> Tensor:
    return keep(torch.zeros_like(entropy), kl, mask, vocab, share)


def slope(loss: PairLoss, logits: Tensor, teacher: Tensor, step: float = 1e-5) -> Tensor:
    """Solve 50.3: the slope of a loss by central differences.

    Args:
        loss: A function of the log-probs of student and teacher, which returns `[n]`.
        logits: The student's logits, `[n, V]`.
        teacher: Log-probs, `[n, V]`.
        step: Size of the move of a logit, up and down.

    Returns:
        The slope in each logit, `[n, V]`.
    """
    out = torch.zeros_like(logits)
    for v in range(logits.shape[-1]):
        nudge = torch.zeros_like(logits)
        nudge[:, v] = step
        up = loss((logits + nudge).log_softmax(-1), teacher)
        down = loss((logits - nudge).log_softmax(-1), teacher)
        out[:, v] = (up - down) / (2 * step)
    return out


def _reference_slope(loss: PairLoss, logits: Tensor, teacher: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf.log_softmax(-1), teacher).sum(), leaf)[0]


def _cases_of_slope() -> list[tuple[PairLoss, Tensor, Tensor]]:
    student, teacher = random_log_probs(4, 6, seed=1)
    return [(_reference_gated, student, teacher), (jensen_shannon, student, teacher)]


def _observe_slope(
    function: Callable[..., Tensor], loss: PairLoss, logits: Tensor, teacher: Tensor
) -> Tensor:
    """The slope of a loss, after two probes that reveal how it was computed.

    A loss without gradient stops autograd. A loss with a kink at the logits has the central
    difference 0 there, at any step, and a one-sided difference far from 0.
    """
    if function is _reference_slope:
        return _reference_slope(loss, logits, teacher)

    @torch.no_grad()
    def without_gradient(student: Tensor, teacher: Tensor) -> Tensor:
        return loss(student.detach(), teacher)

    here = logits.log_softmax(-1)

    def with_kink(student: Tensor, teacher: Tensor) -> Tensor:
        return (student - here).abs().sum(-1)

    try:
        slopes = function(without_gradient, logits.clone(), teacher)
    except RuntimeError as error:
        if "grad" in str(error):
            raise WrongAnswer(AUTOGRAD) from error
        raise
    at_kink = function(with_kink, logits.clone(), teacher)
    is_slope = isinstance(at_kink, Tensor) and at_kink.shape == logits.shape
    if is_slope and float(at_kink.abs().max()) > 0.1:
        raise WrongAnswer(ONE_SIDED)
    return slopes


def _by_backward(loss: PairLoss, logits: Tensor, teacher: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    loss(leaf.log_softmax(-1), teacher).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def _one_sided(loss: PairLoss, logits: Tensor, teacher: Tensor, step: float = 1e-5) -> Tensor:
    here = loss(logits.log_softmax(-1), teacher)
    nudges = step * torch.eye(logits.shape[-1], dtype=logits.dtype)
    above = [loss((logits + nudge).log_softmax(-1), teacher) for nudge in nudges]
    return torch.stack([(value - here) / step for value in above], -1)


def _log_probs_nudged(loss: PairLoss, logits: Tensor, teacher: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    nudges = 1e-5 * torch.eye(logits.shape[-1], dtype=logp.dtype)
    differences = [loss(logp + nudge, teacher) - loss(logp - nudge, teacher) for nudge in nudges]
    return torch.stack(differences, -1) / 2e-5


def _divided_by_one_step(loss: PairLoss, logits: Tensor, teacher: Tensor) -> Tensor:
    return 2 * slope(loss, logits, teacher)


EXERCISES = (
    Exercise(
        "50.1",
        request=(
            "return (1 - g) KL(p || q) + g KL(q || p) of every row, [n], with g = 1 - exp(-H(q))"
        ),
        confirmation="the reverse KL where the teacher is sure, the forward KL where it is not",
        reference=_reference_gated,
        solution=gated,
        cases=lambda: [(random_rows(),), (random_rows(6, 9, seed=2),)],
        observe=_observe_gated,
        mistakes={
            (
                "the gate is the wrong way round: g, near 1 where the teacher is undecided, belongs"
                " to the forward KL."
            ): _gate_reversed,
            (
                "that is the student's entropy. The gate asks whether the teacher is undecided."
            ): _entropy_of_student,
            (
                "the entropy has the wrong sign: H = -(q.exp() * q).sum(-1), which is never below "
                "0."
            ): _entropy_sign_wrong,
            "the forward KL replaces the reverse KL: multiply that by 1 - g.": _forward_added,
        },
    ),
    Exercise(
        "50.2",
        request=(
            "return 1 for the ceil(share · tokens) largest u of the batch and 0 for the others, [B,"
            " T]"
        ),
        confirmation="that is the selection over the whole batch",
        reference=_reference_keep,
        solution=keep,
        cases=_cases_of_keep,
        observe=_observe_keep,
        mistakes={
            PADDING_CHOSEN: _mask_ignored,
            (
                "padding is counted in the number of tokens: it is ceil(share · mask.sum())."
            ): _padding_counted,
            (
                "that selects in each row. The selection is over the whole batch, so that texts "
                "without mistakes get fewer tokens."
            ): _row_by_row,
            (
                "that is the sum h + delta. The soft or subtracts what both have: - h · delta."
            ): _plain_sum,
            "that is by entropy alone.": _entropy_alone,
            "that is by divergence alone.": _divergence_alone,
        },
    ),
    Exercise(
        "50.3",
        request="return the slope of each row's loss in its logits, [n, V], by central differences",
        confirmation="it is computed without autograd, so it can judge one",
        reference=_reference_slope,
        solution=slope,
        cases=_cases_of_slope,
        tolerance=1e-6,
        observe=_observe_slope,
        mistakes={
            (
                "the log-probs are nudged and not the logits: they must sum to one again, so take "
                "the log-softmax after the nudge."
            ): _log_probs_nudged,
            "the distance between the two ends is 2 · step.": _divided_by_one_step,
            AUTOGRAD: _by_backward,
            ONE_SIDED: _one_sided,
        },
    ),
)
