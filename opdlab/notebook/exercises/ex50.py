"""Notebook 50: a gated loss, a selection of tokens, and the check by differences that any loss must
pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opdlab import losses as d
from opdlab.engine.rows import Rows
from opdlab.notebook.cases import random_log_probs, random_rows, evaluate_loss
from opdlab.notebook.checking import Exercise, WrongAnswer

Pair = Callable[[Tensor, Tensor], Tensor]


def gated(student: Tensor, teacher: Tensor) -> Tensor:
    entropy = -(teacher.exp() * teacher).sum(-1)
    gate = 1 - torch.exp(-entropy)
    reverse = (student.exp() * (student - teacher)).sum(-1)
    forward = (teacher.exp() * (teacher - student)).sum(-1)
    return (1 - gate) * reverse + gate * forward


def library(student: Tensor, teacher: Tensor) -> Tensor:
    gate = 1 - (-d.entropy(teacher)).exp()
    return (1 - gate) * d.reverse_kl(student, teacher) + gate * d.forward_kl(student, teacher)


def swapped(student: Tensor, teacher: Tensor) -> Tensor:
    return (
        d.reverse_kl(student, teacher) + d.forward_kl(student, teacher) - library(student, teacher)
    )


def by_student(student: Tensor, teacher: Tensor) -> Tensor:
    gate = 1 - (-d.entropy(student)).exp()
    return (1 - gate) * d.reverse_kl(student, teacher) + gate * d.forward_kl(student, teacher)


def added(student: Tensor, teacher: Tensor) -> Tensor:
    return d.reverse_kl(student, teacher) + (1 - (-d.entropy(teacher)).exp()) * d.forward_kl(
        student, teacher
    )


def by_certainty(student: Tensor, teacher: Tensor) -> Tensor:
    """The entropy with the wrong sign, as `(q.exp() * q).sum(-1)` without the minus."""
    gate = 1 - d.entropy(teacher).exp()
    return (1 - gate) * d.reverse_kl(student, teacher) + gate * d.forward_kl(student, teacher)


def look(function: Pair, given: Rows) -> dict[str, Any]:
    return evaluate_loss(lambda r: function(r.student, r.teacher), given)


def keep(entropy: Tensor, kl: Tensor, mask: Tensor, vocab: int, share: float) -> Tensor:
    h = entropy / math.log(vocab)
    delta = 1 - torch.exp(-kl)
    u = (h + delta - h * delta).masked_fill(~mask, -1.0)
    n = math.ceil(share * int(mask.sum()))
    kept = torch.zeros(mask.numel(), dtype=torch.long)
    kept[u.flatten().topk(n).indices] = 1
    return kept.view(mask.shape)


def by_rank(entropy: Tensor, kl: Tensor, mask: Tensor, vocab: int, share: float) -> Tensor:
    """The same by counting, for each token, how many others come before it."""
    u = 1 - (1 - entropy / math.log(vocab)) * (-kl).exp()  # the soft "or" in its other form
    before = (u[mask][None] > u[..., None]).sum(-1)
    return ((before < math.ceil(share * int(mask.sum()))) & mask).long()


def padded(entropy: Tensor, kl: Tensor, mask: Tensor, vocab: int, share: float) -> Tensor:
    return keep(entropy, kl, torch.ones_like(mask), vocab, share)


def counting_padding(entropy: Tensor, kl: Tensor, mask: Tensor, vocab: int, share: float) -> Tensor:
    """The right order, cut at a share of all places."""
    u = 1 - (1 - entropy / math.log(vocab)) * (-kl).exp()
    before = (u[mask][None] > u[..., None]).sum(-1)
    return ((before < math.ceil(share * mask.numel())) & mask).long()


def by_row(entropy: Tensor, kl: Tensor, mask: Tensor, vocab: int, share: float) -> Tensor:
    rows = [slice(i, i + 1) for i in range(len(mask))]
    return torch.cat([keep(entropy[row], kl[row], mask[row], vocab, share) for row in rows])


def look_at_choice(function: Callable[..., Tensor], *batch: Any) -> Tensor:
    """The choice of a batch; a choice in the padding is named at once, whatever else is wrong."""
    chosen, mask = function(*batch), batch[2]
    if (
        isinstance(chosen, Tensor)
        and chosen.shape == mask.shape
        and bool((chosen[~mask] != 0).any())
    ):
        raise WrongAnswer("padding is chosen: only places where mask is true are tokens.")
    return chosen


def batches() -> list[tuple[Tensor, Tensor, Tensor, int, float]]:
    made, vocab, out = torch.Generator().manual_seed(0), 16, []
    for b, t, share in ((3, 8, 0.25), (4, 12, 0.3), (2, 20, 0.5)):
        lengths = torch.randint(3, t + 1, (b, 1), generator=made)
        mask = torch.arange(t) < lengths
        entropy = math.log(vocab) * torch.rand(b, t, generator=made, dtype=torch.float64)
        kl = 3 * torch.rand(b, t, generator=made, dtype=torch.float64) ** 2
        kl = torch.where(mask, kl, 9.0)  # what stands in the padding must not matter
        out.append((entropy, kl, mask, vocab, share))
    return out


def slope(loss: Pair, logits: Tensor, teacher: Tensor, step: float = 1e-5) -> Tensor:
    out = torch.zeros_like(logits)
    for v in range(logits.shape[-1]):
        nudge = torch.zeros_like(logits)
        nudge[:, v] = step
        up = loss((logits + nudge).log_softmax(-1), teacher)
        down = loss((logits - nudge).log_softmax(-1), teacher)
        out[:, v] = (up - down) / (2 * step)
    return out


def autograd(loss: Pair, logits: Tensor, teacher: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf.log_softmax(-1), teacher).sum(), leaf)[0]


def by_backward(loss: Pair, logits: Tensor, teacher: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    loss(leaf.log_softmax(-1), teacher).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


AUTOGRAD = (
    "that is autograd, which cannot judge itself. Move each logit up and down by a step and take"
    " the difference."
)
ONE_SIDED = (
    "that is a one-sided difference. Take (loss above - loss below) / (2 · step), which is far more"
    " exact."
)


def one_sided(loss: Pair, logits: Tensor, teacher: Tensor, step: float = 1e-5) -> Tensor:
    here = loss(logits.log_softmax(-1), teacher)
    nudges = step * torch.eye(logits.shape[-1], dtype=logits.dtype)
    return torch.stack(
        [(loss((logits + nudge).log_softmax(-1), teacher) - here) / step for nudge in nudges], -1
    )


def look_at_slope(
    function: Callable[..., Tensor], loss: Pair, logits: Tensor, teacher: Tensor
) -> Tensor:
    """The slope of a loss, after two probes that tell how it was made.

    A loss without gradient stops autograd. A loss with a kink where the logits stand has the
    central difference 0 there, at any step, and a one-sided difference far from 0.
    """

    if function is autograd:  # the truth that answers are held against
        return autograd(loss, logits, teacher)

    @torch.no_grad()
    def without_gradient(student: Tensor, teacher: Tensor) -> Tensor:
        return loss(student.detach(), teacher)

    here = logits.log_softmax(-1)

    def kinked(student: Tensor, teacher: Tensor) -> Tensor:
        return (student - here).abs().sum(-1)

    try:
        slopes = function(without_gradient, logits.clone(), teacher)
    except RuntimeError as error:
        if "grad" in str(error):
            raise WrongAnswer(AUTOGRAD) from error
        raise
    at_kink = function(kinked, logits.clone(), teacher)
    if (
        isinstance(at_kink, Tensor)
        and at_kink.shape == logits.shape
        and float(at_kink.abs().max()) > 0.1
    ):
        raise WrongAnswer(ONE_SIDED)
    return slopes


def without_softmax(loss: Pair, logits: Tensor, teacher: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    ends = lambda v, e: loss(logp + e * torch.eye(logits.shape[-1], dtype=logp.dtype)[v], teacher)
    return torch.stack(
        [(ends(v, 1e-5) - ends(v, -1e-5)) / 2e-5 for v in range(logits.shape[-1])], -1
    )


EXERCISES = (
    Exercise(
        "50.1",
        asks="return (1 - g) KL(p || q) + g KL(q || p) of every row, [n], with g = 1 - exp(-H(q))",
        says="it seeks where the teacher is sure, and covers where it is not",
        truth=library,
        solution=gated,
        look=look,
        cases=lambda: [(random_rows(),), (random_rows(6, 9, seed=2),)],
        mistakes={
            "the gate is the wrong way round: g, near 1 where the teacher is undecided, belongs to the forward KL.": (
                swapped
            ),
            "that is the student's entropy. The gate asks whether the teacher is undecided.": (
                by_student
            ),
            "the entropy has the wrong sign: H = -(q.exp() * q).sum(-1), which is never below 0.": (
                by_certainty
            ),
            "the reverse KL is to give way: weigh it with 1 - g.": added,
        },
    ),
    Exercise(
        "50.2",
        asks=(
            "return 1 for the ceil(share · tokens) largest u of the batch and 0 for the others,"
            " [B, T]"
        ),
        says="that is the choice over the whole batch",
        truth=by_rank,
        solution=keep,
        cases=batches,
        look=look_at_choice,
        mistakes={
            "padding is chosen: only places where mask is true are tokens.": padded,
            "padding is counted in the number of tokens: it is ceil(share · mask.sum()).": (
                counting_padding
            ),
            "that chooses in each row. The choice is over the whole batch, so that texts without trouble give way.": (
                by_row
            ),
            "that is the sum h + delta. The soft or takes off what both say: - h · delta.": (
                lambda h, kl, mask, vocab, share: keep(
                    torch.zeros_like(h),
                    -torch.log1p(-(h / math.log(vocab) + 1 - (-kl).exp()) / 3),
                    mask,
                    vocab,
                    share,
                )
            ),
            "that is by entropy alone.": lambda h, kl, mask, vocab, share: keep(
                h, torch.zeros_like(kl), mask, vocab, share
            ),
            "that is by divergence alone.": lambda h, kl, mask, vocab, share: keep(
                torch.zeros_like(h), kl, mask, vocab, share
            ),
        },
    ),
    Exercise(
        "50.3",
        asks="return the slope of each row's loss in its logits, [n, V], by central differences",
        says="that needs no autograd, so it can judge one",
        truth=autograd,
        solution=slope,
        close=1e-6,
        look=look_at_slope,
        cases=lambda: [
            (pair, student, teacher)
            for pair in (library, d.jensen_shannon)
            for student, teacher in [random_log_probs(4, 6, seed=1)]
        ],
        mistakes={
            "the log-probs are nudged and not the logits: they must sum to one again, so take the log-softmax after the nudge.": (
                without_softmax
            ),
            "the distance between the two ends is 2 · step.": lambda *a: 2 * slope(*a),
            AUTOGRAD: by_backward,
            ONE_SIDED: one_sided,
        },
    ),
)
