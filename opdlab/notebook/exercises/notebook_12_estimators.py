"""Notebook 12: both gradients of an estimate, a top-k support with its tail, the value baseline."""

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
Gradients = tuple[Tensor, Tensor]


def two_gradients(k: Estimate, logits: Tensor, teacher: Tensor) -> Gradients:
    """Solve 12.1: the expected gradients of an estimate in the reward and as a loss.

    Args:
        k: The estimate as a function of log u, with u = teacher / student.
        logits: The student's logits, `[V]`.
        teacher: Log-probs, `[V]`.

    Returns:
        The gradients in the logits, `[V]` each: of the estimate as a fixed reward, and as a loss.
    """
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    p, value = logp.exp().detach(), k(teacher - logp)
    (reward,) = torch.autograd.grad((p * value.detach() * logp).sum(), logits, retain_graph=True)
    (loss,) = torch.autograd.grad((p * value).sum(), logits)
    return reward, loss


def _reference_gradients(k: Estimate, logits: Tensor, teacher: Tensor) -> Gradients:
    """Both uses as methods, over every token that could be sampled."""
    table = exact.Table.random(len(logits), 1)
    policies = {
        "student": replace(table, logits=logits[None, None]),
        "teacher": replace(table, logits=teacher[None, None]),
    }
    name = k.__name__
    reward = exact.gradient(in_reward(name), policies)[0, 0]
    return reward, exact.gradient(as_loss(name), policies)[0, 0]


def _cases_of_gradients() -> list[tuple[Estimate, Tensor, Tensor]]:
    cases: list[tuple[Estimate, Tensor, Tensor]] = []
    for seed, k in enumerate((k1, k2, k3)):
        student, teacher = random_log_probs(1, 6, seed=seed)
        cases.append((k, student[0], teacher[0]))
    return cases


def _swapped(k: Estimate, logits: Tensor, teacher: Tensor) -> Gradients:
    reward, loss = two_gradients(k, logits, teacher)
    return loss, reward


def _sampling_differentiated_in_loss(k: Estimate, logits: Tensor, teacher: Tensor) -> Gradients:
    reward, loss = two_gradients(k, logits, teacher)
    return reward, reward + loss


def _sampling_differentiated_in_both(k: Estimate, logits: Tensor, teacher: Tensor) -> Gradients:
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    p, value = logp.exp(), k(teacher - logp)
    (reward,) = torch.autograd.grad((p * value.detach() * logp).sum(), logits, retain_graph=True)
    (loss,) = torch.autograd.grad((p * value).sum(), logits)
    return reward, loss


def _sampling_differentiated_in_reward(k: Estimate, logits: Tensor, teacher: Tensor) -> Gradients:
    reward = _sampling_differentiated_in_both(k, logits, teacher)[0]
    return reward, two_gradients(k, logits, teacher)[1]


def _reward_differentiated(k: Estimate, logits: Tensor, teacher: Tensor) -> Gradients:
    logits = logits.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    p, value = logp.exp().detach(), k(teacher - logp)
    (reward,) = torch.autograd.grad((p * value * logp).sum(), logits, retain_graph=True)
    (loss,) = torch.autograd.grad((p * value).sum(), logits)
    return reward, loss


def coarse(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """Solve 12.2: the reverse KL on the teacher's top k and one outcome for the rest.

    Args:
        student: Log-probs, `[n, V]`.
        teacher: Log-probs, `[n, V]`.
        k: Number of tokens that are kept apart.

    Returns:
        The reverse KL of the coarse distributions, `[n]` in nats.
    """
    ids = teacher.topk(k, dim=-1).indices
    p, q = student.gather(-1, ids).exp(), teacher.gather(-1, ids).exp()
    p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
    q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    return (p * (p / q).log()).sum(-1)


def _reference_coarse(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    support = TopK(k, by="teacher")
    ids = support.support(teacher)
    return reverse_kl(support.coarse(student, ids), support.coarse(teacher, ids))


def _cases_of_coarse() -> list[tuple[Tensor, Tensor, int]]:
    return [(*random_log_probs(4, 8, seed=0), 3), (*random_log_probs(4, 8, seed=1), 1)]


def _rest_left_out(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    ids = teacher.topk(k, dim=-1).indices
    p, q = student.gather(-1, ids), teacher.gather(-1, ids)
    return (p.exp() * (p - q)).sum(-1)


def _renormalised(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    ids = teacher.topk(k, dim=-1).indices
    p, q = student.gather(-1, ids), teacher.gather(-1, ids)
    return reverse_kl(p.log_softmax(-1), q.log_softmax(-1))


def _on_the_student_s_support(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    support = TopK(k)
    ids = support.support(student)
    return reverse_kl(support.coarse(student, ids), support.coarse(teacher, ids))


def _forward_on_support(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    support = TopK(k, by="teacher")
    ids = support.support(teacher)
    return forward_kl(support.coarse(student, ids), support.coarse(teacher, ids))


def advantage(student: Tensor, teacher: Tensor, token: Tensor) -> Tensor:
    """Solve 12.3: the advantage of a sampled token minus its expectation.

    Args:
        student: Log-probs, `[n, V]`.
        teacher: Log-probs, `[n, V]`.
        token: The sampled ids, `[n]`.

    Returns:
        The advantage, `[n]` in nats.
    """
    gap = (teacher - student).gather(-1, token[:, None])[:, 0]
    return gap + (student.exp() * (student - teacher)).sum(-1)


def _reference_advantage(student: Tensor, teacher: Tensor, token: Tensor) -> Tensor:
    return _without_baseline(student, teacher, token) + reverse_kl(student, teacher)


def _cases_of_advantage() -> list[tuple[Tensor, Tensor, Tensor]]:
    token = torch.tensor([0, 1, 2, 3, 4, 0])
    return [(*random_log_probs(6, 5, seed=i), token) for i in range(2)]


def _without_baseline(student: Tensor, teacher: Tensor, token: Tensor) -> Tensor:
    return (teacher - student)[torch.arange(len(token)), token]


def _baseline_subtracted(student: Tensor, teacher: Tensor, token: Tensor) -> Tensor:
    return _without_baseline(student, teacher, token) - reverse_kl(student, teacher)


def _baseline_under_teacher(student: Tensor, teacher: Tensor, token: Tensor) -> Tensor:
    return _without_baseline(student, teacher, token) - forward_kl(student, teacher)


EXERCISES = (
    Exercise(
        "12.1",
        request="return the expected gradients [V] in the logits of k in the reward and as a loss",
        confirmation="both are the expected gradients of a training step",
        reference=_reference_gradients,
        solution=two_gradients,
        cases=_cases_of_gradients,
        mistakes={
            "the two are swapped: the reward is held fixed, the loss is differentiated.": _swapped,
            (
                "the second lets a gradient through the token's probability as well. Detach p: a "
                "token is sampled, not differentiated."
            ): _sampling_differentiated_in_loss,
            (
                "both let a gradient through the token's probability. Detach p: a token is sampled,"
                " not differentiated."
            ): _sampling_differentiated_in_both,
            (
                "the first lets a gradient through the token's probability as well. Detach p: a "
                "token is sampled, not differentiated."
            ): _sampling_differentiated_in_reward,
            (
                "the reward is differentiated. Detach k: a reward is a number that does not depend "
                "on the student."
            ): _reward_differentiated,
        },
    ),
    Exercise(
        "12.2",
        request="return the reverse KL on the teacher's top k and one bucket for the rest, [n]",
        confirmation="that loss sees the mass outside the support",
        reference=_reference_coarse,
        solution=coarse,
        cases=_cases_of_coarse,
        mistakes={
            (
                "the rest is left out: add one more outcome, of mass 1 - sum, on both sides."
            ): _rest_left_out,
            ("the top k are renormalised, so their total mass is not seen."): _renormalised,
            (
                "the support is the student's; use the teacher's top k here."
            ): _on_the_student_s_support,
            (
                "that is the forward KL. Use the student's probabilities as weights."
            ): _forward_on_support,
        },
    ),
    Exercise(
        "12.3",
        request=(
            "return the advantage log q - log p of each sampled token minus its expectation, [n]"
        ),
        confirmation="that is vOPD's advantage",
        reference=_reference_advantage,
        solution=advantage,
        cases=_cases_of_advantage,
        mistakes={
            "that is the advantage without a baseline.": _without_baseline,
            (
                "the baseline has the wrong sign: the expectation of log q - log p is minus the KL,"
                " so the KL is added."
            ): _baseline_subtracted,
            (
                "the expectation is under the student, which samples the token, and not under the "
                "teacher."
            ): _baseline_under_teacher,
        },
    ),
)
