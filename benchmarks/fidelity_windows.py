"""Measure windows of TOPD: are tokens of high loss real forks, and what do five updates change?"""

from __future__ import annotations

from functools import partial

import opdlab as opd
from opdlab.methods import topd
from opdlab.methods.futures import ARMS as LOSSES

WINDOW, POINTS = 8, 30


def alarms(seed: int, secret: bool) -> dict[str, float]:
    """Measure windows after tokens of high, random and low loss.

    Tokens of high loss are the 5 % with the highest loss. Their loss may still be small, so those
    with more than 1 nat are counted apart.

    Args:
        seed: Seed of the prompts and the samples.
        secret: Whether problems have secrets and styles.

    Returns:
        Median distances and false-alarm rates for both choices of windows, and which types of token
        the false alarms above 1 nat are.
    """
    student, teacher, task = opd.load("market", secret=secret)
    rollout = student.sample(
        task.prompts(256, seed=seed), max_new_tokens=task.max_new_tokens, seed=seed
    )
    found = topd.forks(student, teacher, rollout, window=WINDOW, share=0.05, seed=seed)
    kinds = task.token_types(rollout, student.tokenizer)
    found["type"] = [kinds[b][t] for b, t in zip(found["sample"], found["position"], strict=True)]
    groups = {name: found[found.group == name] for name in ("high", "random", "low")}
    real = groups["high"][groups["high"].score > 1]
    out = {"above 1 nat": len(real) / len(groups["high"])}
    for choice in ("rollout", "greedy"):
        out |= {f"{choice}: {name}": float(rows[choice].median()) for name, rows in groups.items()}
        out |= {f"{choice}: above 1 nat": float(real[choice].median())}
        out[f"{choice}: false alarms"] = topd.false_alarm_rate(
            groups["high"][choice], groups["low"][choice]
        )
        out[f"{choice}: false alarms above 1 nat"] = topd.false_alarm_rate(
            real[choice], groups["low"][choice]
        )
    false = real[real.greedy <= groups["low"].greedy.quantile(0.75)]
    return out | {
        f"false alarms that are {kind}": float((false.type == kind).mean())
        for kind in ("skill", "style", "noise")
        if len(false)
    }


def correction(seed: int) -> dict[str, float]:
    """Measure five updates of each loss on one window at a fork.

    Args:
        seed: Seed of the prompts and the samples.

    Returns:
        Mean distances of the student's greedy window to the teacher's, before and after.
    """
    student, teacher, task = opd.load("market")
    rollout = student.sample(
        task.prompts(256, seed=100 + seed), max_new_tokens=task.max_new_tokens, seed=seed
    )
    found = topd.forks(student, teacher, rollout, window=WINDOW, share=0.05, seed=seed)
    high = (
        found[(found.group == "high") & (found.greedy > 0)]
        .sort_values("score", ascending=False)
        .head(POINTS)
    )
    points = list(zip(high["sample"].astype(int), high["position"].astype(int), strict=True))
    rows = topd.local_correction(
        student, teacher, rollout, points, window=WINDOW, updates=5, arms=LOSSES
    )
    means = rows.groupby("arm")["distance"].mean()
    first = rows.groupby("arm")["first_token"].mean()
    return {arm: float(means[arm]) for arm in ("origin", *LOSSES)} | {
        f"first token: {arm}": float(first[arm]) for arm in ("opd", "topd")
    }


ARMS = {
    "false alarms, plain": partial(alarms, secret=False),
    "false alarms, with style and secrets": partial(alarms, secret=True),
    "five updates on one window": correction,
}
