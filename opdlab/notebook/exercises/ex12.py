"""Notebook 12: both gradients of an estimate, a top-k support with its tail, and the value
baseline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from opdlab import exact
from opdlab.audit import as_loss, in_reward, k1, k2, k3
from opdlab.losses.divergences import TopK, forward_kl, reverse_kl
from opdlab.notebook.cases import random_log_probs
from opdlab.notebook.checking import Exercise

Estimate = Callable[[Tensor], Tensor]


def two_gradients(k: Estimate, logits: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    p, value = logp.exp().detach(), k(teacher - logp)
    (reward,) = torch.autograd.grad((p * value.detach() * logp).sum(), logits, retain_graph=True)
    (loss,) = torch.autograd.grad((p * value).sum(), logits)
    return reward, loss


def engine(k: Estimate, logits: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    """The library's: both uses as methods, over every token that could be sampled."""
    table = exact.Table.random(len(logits), 1)
    policies = {
        "student": replace(table, logits=logits[None, None]),
        "teacher": replace(table, logits=teacher[None, None]),
    }
    return tuple(exact.gradient(use(k.__name__), policies)[0, 0] for use in (in_reward, as_loss))


def swapped(k: Estimate, logits: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    reward, loss = two_gradients(k, logits, teacher)
    return loss, reward


def both(k: Estimate, logits: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Without the detach of p the loss has the gradient of the sampling as well."""
    reward, loss = two_gradients(k, logits, teacher)
    return reward, reward + loss


def never_detached(k: Estimate, logits: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """With p left in the graph, the weight of each token is differentiated in both uses."""
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    p, value = logp.exp(), k(teacher - logp)
    (reward,) = torch.autograd.grad((p * value.detach() * logp).sum(), logits, retain_graph=True)
    (loss,) = torch.autograd.grad((p * value).sum(), logits)
    return reward, loss


def undetached_reward(k: Estimate, logits: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The weight is detached in the loss only."""
    return never_detached(k, logits, teacher)[0], two_gradients(k, logits, teacher)[1]


def undetached_value(k: Estimate, logits: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiating the reward itself: what k as a reward must not do."""
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    p, value = logp.exp().detach(), k(teacher - logp)
    (reward,) = torch.autograd.grad((p * value * logp).sum(), logits, retain_graph=True)
    (loss,) = torch.autograd.grad((p * value).sum(), logits)
    return reward, loss


def single() -> list[tuple[Estimate, Tensor, Tensor]]:
    return [
        (k, student[0], teacher[0])
        for i, k in enumerate((k1, k2, k3))
        for student, teacher in [random_log_probs(1, 6, seed=i)]
    ]


def coarse(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    ids = teacher.topk(k, dim=-1).indices
    p, q = student.gather(-1, ids).exp(), teacher.gather(-1, ids).exp()
    p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
    q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    return (p * (p / q).log()).sum(-1)


def bucket_of(
    kl: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor, k: int
) -> Tensor:
    support = TopK(k, by="teacher")
    ids = support.support(teacher)
    return kl(support.coarse(student, ids), support.coarse(teacher, ids))


def bucket(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    return bucket_of(reverse_kl, student, teacher, k)


def dropped(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    ids = teacher.topk(k, dim=-1).indices
    p, q = student.gather(-1, ids), teacher.gather(-1, ids)
    return (p.exp() * (p - q)).sum(-1)


def renormalised(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    ids = teacher.topk(k, dim=-1).indices
    return reverse_kl(
        student.gather(-1, ids).log_softmax(-1), teacher.gather(-1, ids).log_softmax(-1)
    )


def by_student(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    support = TopK(k)
    ids = support.support(student)
    return reverse_kl(support.coarse(student, ids), support.coarse(teacher, ids))


def advantage(student: Tensor, teacher: Tensor, token: Tensor) -> Tensor:
    gap = (teacher - student).gather(-1, token[:, None])[:, 0]
    return gap + (student.exp() * (student - teacher)).sum(-1)


def baselined(student: Tensor, teacher: Tensor, token: Tensor) -> Tensor:
    return (teacher - student)[torch.arange(len(token)), token] + reverse_kl(student, teacher)


def bare(student: Tensor, teacher: Tensor, token: Tensor) -> Tensor:
    return advantage(student, teacher, token) - reverse_kl(student, teacher)


def drawn() -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(*random_log_probs(6, 5, seed=i), torch.tensor([0, 1, 2, 3, 4, 0])) for i in range(2)]


EXERCISES = (
    Exercise(
        "12.1",
        asks="return the expected gradient [V] in the logits of k in the reward and of k as a loss",
        says="both are what a training step does, in expectation",
        truth=engine,
        solution=two_gradients,
        cases=single,
        mistakes={
            "the two are swapped: the reward is held fixed, the loss is differentiated.": swapped,
            "the second lets a gradient through the token's probability as well. Detach p: a token is drawn, not differentiated.": (
                both
            ),
            "both let a gradient through the token's probability. Detach p: a token is drawn, not differentiated.": (
                never_detached
            ),
            "the first lets a gradient through the token's probability as well. Detach p: a token is drawn, not differentiated.": (
                undetached_reward
            ),
            "the reward is differentiated. Detach k: a reward is a number that does not depend on the student.": (
                undetached_value
            ),
        },
    ),
    Exercise(
        "12.2",
        asks="return the reverse KL on the teacher's top k and one bucket for the rest, [n]",
        says="that keeps an eye on the mass outside",
        truth=bucket,
        solution=coarse,
        cases=lambda: [(*random_log_probs(4, 8, seed=0), 3), (*random_log_probs(4, 8, seed=1), 1)],
        mistakes={
            "the rest is left out: add one more outcome, of mass 1 - sum, on both sides.": dropped,
            "the top k are renormalised, which is blind to how much mass they have.": renormalised,
            "the support is the student's; the teacher's is wanted here.": by_student,
            "that is the forward KL. Weigh by the student's probabilities.": lambda s, t, k: (
                bucket_of(forward_kl, s, t, k)
            ),
        },
    ),
    Exercise(
        "12.3",
        asks="return the advantage log q - log p of each sampled token less its expectation, [n]",
        says="that is vOPD's advantage",
        truth=baselined,
        solution=advantage,
        cases=drawn,
        mistakes={
            "that is the advantage without a baseline.": bare,
            "the baseline has the wrong sign: the expectation of log q - log p is minus the KL, so it is added.": lambda s, t, token: (
                2 * bare(s, t, token) - advantage(s, t, token)
            ),
            "the expectation is under the student, who draws the token, and not under the teacher.": lambda s, t, token: (
                bare(s, t, token) - (t.exp() * (t - s)).sum(-1)
            ),
        },
    ),
)
