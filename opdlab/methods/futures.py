"""The futures after a fork: window distances by loss, and the effect of updates on one window.

These are the two diagnoses of arXiv 2606.00305 (figures 2 and 5), for any pair of policies. The
paper finds 29 % false alarms (a high loss before futures as alike as those after tokens of low
loss), and window distances of 0.538 before, 0.350 after five updates of OPD and 0.204 after five of
TOPD. Both depend on choices that it does not report, so both functions name theirs: above all
whether the student's window is the rollout's own text or a greedy one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.engine.batch import Batch
from opdlab.errors import InvalidValue
from opdlab.losses import reverse_kl
from opdlab.methods import windows
from opdlab.methods.windows import Point
from opdlab.models.policy import Policy
from opdlab.models.same_tokens import check_same_tokens

ARMS = ("opd", "topd", "exact", "diagonal", "teacher_context")


def forks(
    student: Policy,
    teacher: Policy,
    rollout: Rollout,
    *,
    window: int = 8,
    share: float = 0.0225,
    score: str = "teacher_nll",
    embedding: str = "student",
    seed: int = 0,
) -> pd.DataFrame:
    """Measure window distances at tokens of high, of low and of any score.

    Args:
        student: The student.
        teacher: The teacher, with the same tokens.
        rollout: The completions.
        window: K, in tokens.
        share: ceil(share N) positions of each completion of N tokens are in each group.
        score: As in `TOPD`.
        embedding: As in `TOPD`.
        seed: Seed of the random group.

    Returns:
        One row per probed position: `group` ("high", "random", "low"; the random positions may be
        in another group too), `sample`, `position`, `token_id`, `score` (nats), and the exact
        transport distance of the teacher's greedy window to the student's `rollout` text and to its
        `greedy` one.
    """
    check_same_tokens(student, teacher)
    policies = {"student": student, "teacher": teacher}
    value = windows.scores(Batch(rollout, policies), score)
    room = windows.room(student, rollout, window)
    noise = torch.rand(value.shape, generator=torch.Generator().manual_seed(seed))
    counts = windows.quota(rollout.learn.sum(1), share)
    groups = {
        name: windows.top(by, room, counts)
        for name, by in (("high", value), ("random", noise), ("low", -value))
    }
    points = sorted({p for group in groups.values() for p in group})
    theirs = windows.write(teacher, rollout, points, window)
    ours = {
        "rollout": windows.slices(rollout, points, window),
        "greedy": windows.write(student, rollout, points, window),
    }
    distance = {
        name: windows.solve(windows.costs(texts, theirs, embedding, policies))[0].tolist()
        for name, texts in ours.items()
    }
    rows = {
        p: {
            "sample": p[0],
            "position": p[1],
            "token_id": int(rollout.ids[p]),
            "score": float(value[p]),
            **{name: d[i] for name, d in distance.items()},
        }
        for i, p in enumerate(points)
    }
    columns = ["group", "sample", "position", "token_id", "score", "rollout", "greedy"]
    return pd.DataFrame(
        [{"group": name, **rows[p]} for name, group in groups.items() for p in group],
        columns=columns,
    )


def false_alarm_rate(high: Sequence[float] | pd.Series, low: Sequence[float] | pd.Series) -> float:
    """Return the share of high-loss positions with a window distance as at low-loss positions.

    A distance is one of those if it is at most the upper quartile of the low-loss positions, so the
    share is 0.75, and not 0.5, where the loss says nothing about the future.

    Args:
        high: Distances at positions of high loss.
        low: Distances at positions of low loss.

    Returns:
        The share; NaN where one group is empty.
    """
    if not len(high) or not len(low):
        return float("nan")
    return float(np.mean(np.asarray(high) <= np.quantile(low, 0.75)))


@dataclass(frozen=True)
class Pair:
    """A prefix and the two windows after it.

    Attributes:
        prompt: The prompt.
        prefix: Token ids before the windows.
        student: The student's window.
        teacher: The teacher's window.
        logp: The teacher's log-probs along the student's window, `[K, V]`.
    """

    prompt: Prompt
    prefix: list[int]
    student: list[int]
    teacher: list[int]
    logp: Tensor


def local_correction(
    student: Policy,
    teacher: Policy,
    rollout: Rollout,
    points: Sequence[Point],
    *,
    arms: Sequence[str] = ("opd", "topd", "diagonal", "teacher_context"),
    window: int = 8,
    updates: int = 5,
    lr: float = 1e-3,
    weight: float = 0.3,
    epsilon: float = 0.05,
    student_window: str = "greedy",
    embedding: str = "student",
    rank: int = 16,
) -> pd.DataFrame:
    """Train a copy of the student on one window alone, let it write again, and measure.

    All arms take the reverse KL over the student's window ("opd"), plus `weight` times the
    cross-entropy to the plan's targets ("topd" entropic, "exact"), to the teacher's token at the
    same place ("diagonal"), or along the teacher's own window ("teacher_context"). Each point and
    arm takes the same number of Adam updates from the same start. The student stays as it is.

    Args:
        student: The student.
        teacher: The teacher, with the same tokens.
        rollout: The completions.
        points: Completion and position of each window.
        arms: Names of `ARMS`.
        window: K, in tokens.
        updates: Adam steps.
        lr: Learning rate.
        weight: λ, as in `TOPD`.
        epsilon: Strength of the entropic plan's regularization, as in `TOPD`.
        student_window: The text that is trained on, the student's "greedy" one or its "rollout".
        embedding: As in `TOPD`.
        rank: Rank of the adapter that a student without one gets for the time.

    Returns:
        One row per point and arm: `sample`, `position`, `arm` ("origin" is before), `distance`
        (exact, of the new greedy window to the teacher's, which stays), and `first_token` (whether
        the new text begins with the teacher's token; the trap is a text that does and goes wrong
        after it).

    Raises:
        InvalidValue: There is no such arm or window.
    """
    if strange := sorted(set(arms) - set(ARMS)):
        raise InvalidValue(
            f"local_correction has no arm {strange[0]!r}. There are {', '.join(ARMS)}."
        )
    if student_window not in ("greedy", "rollout"):
        raise InvalidValue(
            f"local_correction got student_window={student_window!r}. Use greedy or rollout."
        )
    check_same_tokens(student, teacher)
    policies, rows = {"student": student, "teacher": teacher}, []
    targets, before = (
        windows.write(policy, rollout, points, window) for policy in (teacher, student)
    )
    trained = before if student_window == "greedy" else windows.slices(rollout, points, window)
    with _probe(student, rank) as (probe, parameters, start):
        for (b, t), text, own, first in zip(points, targets, trained, before, strict=True):
            pair = pair_of(teacher, rollout.prompts[b], rollout.ids[b, :t].tolist(), own, text)
            plans = plans_of(pair, embedding, policies, epsilon)
            texts = {"origin": first}
            for arm in arms:
                _reset(parameters, start)
                _train(
                    partial(loss_of, probe, pair, plans.get(arm), arm, weight),
                    parameters,
                    updates,
                    lr,
                )
                texts[arm] = windows.write(probe, rollout, [(b, t)], window)[0]
            costs = windows.costs(list(texts.values()), [text] * len(texts), embedding, policies)
            rows += [
                {
                    "sample": b,
                    "position": t,
                    "arm": arm,
                    "distance": d,
                    "first_token": new[:1] == text[:1],
                }
                for (arm, new), d in zip(
                    texts.items(), windows.solve(costs)[0].tolist(), strict=True
                )
            ]
    return pd.DataFrame(rows, columns=["sample", "position", "arm", "distance", "first_token"])


def loss_of(student: Policy, pair: Pair, plan: Tensor | None, arm: str, weight: float) -> Tensor:
    """Compute the loss of an arm, a mean over the window, in nats.

    Args:
        student: The policy in training.
        pair: The windows.
        plan: The arm's plan `[K, K']`; None for arms without one.
        arm: A name of `ARMS`.
        weight: λ.

    Returns:
        A scalar with a gradient in the student's parameters.
    """
    logp = _log_probs(student, pair.prompt, pair.prefix, pair.student)
    loss = reverse_kl(logp, pair.logp).mean()
    if arm == "teacher_context":
        theirs = _log_probs(student, pair.prompt, pair.prefix, pair.teacher)
        tokens = torch.tensor(pair.teacher, device=theirs.device)
        return loss - weight * theirs.gather(-1, tokens[:, None]).mean()
    if plan is None:
        return loss
    return loss - weight * (plan.to(logp) * logp[:, pair.teacher]).sum()


def plans_of(
    pair: Pair, embedding: str, policies: dict[str, Any], epsilon: float
) -> dict[str, Tensor]:
    """Return the plans `[K, K']` of a pair by arm, for the arms that have one.

    Args:
        pair: The windows of student and teacher.
        embedding: As in `TOPD`.
        policies: The policies by name.
        epsilon: Strength of the entropic plan's regularization, above 0.

    Returns:
        "topd" (the entropic plan), "exact" and "diagonal".
    """
    cost = windows.costs([pair.student], [pair.teacher], embedding, policies)
    return {
        "topd": windows.solve(cost, epsilon)[1][0],
        "exact": windows.solve(cost)[1][0],
        "diagonal": windows.diagonal(pair.student, pair.teacher),
    }


def pair_of(
    teacher: Policy, prompt: Prompt, prefix: list[int], student: list[int], text: list[int]
) -> Pair:
    """Make a pair of windows, the teacher's called `text`, and grade the student's.

    Args:
        teacher: The teacher.
        prompt: The prompt.
        prefix: Token ids of the completion before the windows.
        student: Token ids of the student's window.
        text: Token ids of the teacher's window.

    Returns:
        The pair, with the teacher's log-probs along the student's window.
    """
    with torch.no_grad():
        return Pair(prompt, prefix, student, text, _log_probs(teacher, prompt, prefix, student))


def _log_probs(policy: Policy, prompt: Prompt, prefix: list[int], text: list[int]) -> Tensor:
    """Log-probs `[K, V]` along `text` after the prefix; one window, so they fit."""
    ids = torch.tensor([prefix + text], device=policy.weights.device)
    none = torch.zeros(ids.shape, device=ids.device)
    lengths = torch.tensor([ids.shape[1]], device=ids.device)
    hidden = policy.hidden(
        Rollout((prompt,), ids, lengths, none, none, ("length",), ("",), ("student",))
    )
    return policy.head(hidden[len(prefix) :]).log_softmax(-1)


@contextmanager
def _probe(student: Policy, rank: int) -> Iterator[tuple[Policy, list[Tensor], list[Tensor]]]:
    """A trainable copy of the student, its parameters and what they start from; gone afterwards."""
    weights = student.weights
    probe = student.frozen() if student.adapter else student.frozen().adapt(rank)
    try:
        with weights.using(probe.adapter) as model:
            named: list[Tensor] = [
                p
                for name, p in model.named_parameters()
                if p.requires_grad and f".{probe.adapter}." in name
            ]
            yield probe, named, [p.detach().clone() for p in named]
    finally:
        weights.delete_adapter(str(probe.adapter))


@torch.no_grad()
def _reset(parameters: Sequence[Tensor], start: Sequence[Tensor]) -> None:
    for p, value in zip(parameters, start, strict=True):
        p.copy_(value)


def _train(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], updates: int, lr: float
) -> None:
    """Run Adam on these parameters alone; nothing else gets a gradient."""
    optimizer = torch.optim.Adam(list(parameters), lr=lr)
    for _ in range(updates):
        with torch.enable_grad():
            slopes = torch.autograd.grad(loss(), list(parameters))
        for p, slope in zip(parameters, slopes, strict=True):
            p.grad = slope
        optimizer.step()
