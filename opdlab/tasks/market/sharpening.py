"""A world in which no teacher is needed: the student can do all, and breaks off now and then.

Student and teacher are the shipped teacher with another row of the output head: the one of the end
of a text. Each of their tokens may be the end, with a probability near `rate`, and a text that ends
early is wrong. No other row changes, so as long as they go on, they write exactly as the shipped
teacher does:

    p(v | x, v is not the end) = q(v | x, v is not the end)

The student breaks off at about one token in 40, the teacher at one in 250. The student's greedy
texts are right nearly always, and about 60 % of its samples. So a gain shows in samples, and needs
no knowledge: the end is nearly always among the least likely tokens, and to push those down is all
that there is to learn.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from opdlab.models.policy import Policy
from opdlab.models.text_rollouts import rollout_from_texts
from opdlab.tasks.market import market, model
from opdlab.tasks.task import Task

STUDENT_RATE = 0.025
TEACHER_RATE = 0.004
TEXTS = 256  # solutions that the row is fitted to
RIDGE, DECAY = 1e-4, 1e-5  # weight decay of the first fit, and of the last
NEWTON_STEPS = 8
# Found with seeds from 100 on; see benchmarks/README.md.
RECIPE = {"batch": 128, "lr": 6e-4, "lora": 16, "steps": 12}


def task() -> Task:
    """Make the task: the problems of `market`, with a recipe for these two.

    Returns:
        A task that draws fresh problems without end.
    """
    return replace(market(), recipe=RECIPE)


def pair() -> tuple[Policy, Policy]:
    """Make the student, which breaks off at one token in 40, and the teacher, at one in 250.

    Returns:
        Two policies on weights of their own.
    """
    shipped = model("teacher")
    prompts = market().prompts(TEXTS)
    rollout = rollout_from_texts(shipped, prompts, [prompt.answer or "" for prompt in prompts])
    hidden = shipped.grade(rollout).hidden
    logits = shipped.head(hidden).double()
    (end,) = shipped.weights.eos
    others = torch.cat([logits[:, :end], logits[:, end + 1 :]], 1).logsumexp(1)
    chance = (logits[:, end] - others).sigmoid()
    is_end = rollout.ids[rollout.mask] == end

    def breaking_off(policy: Policy, rate: float) -> Policy:
        wanted = torch.where(is_end, chance, rate)
        with torch.no_grad():
            policy.weights.head.weight[end] = _fit_row(hidden.double(), others, wanted)
        # A policy that knows of no file, since that of the shipped teacher gives other weights.
        return Policy.of(policy.weights.model, policy.tokenizer)

    return breaking_off(shipped.copied(), STUDENT_RATE), breaking_off(shipped, TEACHER_RATE)


def _fit_row(hidden: Tensor, others: Tensor, wanted: Tensor) -> Tensor:
    """Fit the row of one token by logistic regression, with Newton's method.

    Args:
        hidden: `[n, H]`, hidden states.
        others: `[n]`, log of the summed exponentials of the other tokens' logits.
        wanted: `[n]`, the probabilities that the token shall have.

    Returns:
        `[H]`, the row.
    """
    n, identity = len(hidden), torch.eye(hidden.shape[1], dtype=hidden.dtype)
    # The start is the least-squares fit of the log odds.
    gram = hidden.T @ hidden / n + RIDGE * identity
    row: Tensor = torch.linalg.solve(gram, hidden.T @ (wanted.logit() + others) / n)
    for _ in range(NEWTON_STEPS):
        found = (hidden @ row - others).sigmoid()
        gradient = hidden.T @ (found - wanted) / n + DECAY * row
        weight = (found * (1 - found))[:, None]
        curvature = (weight * hidden).T @ hidden / n + DECAY * identity
        row = row - torch.linalg.solve(curvature, gradient)
    return row
