"""Near futures: are high-loss tokens real forks, and what do five updates on one window change?"""

from __future__ import annotations

import opdlab as opd
from opdlab.methods import topd
from opdlab.methods.futures import ARMS as LOSSES

WINDOW, POINTS = 8, 30


def alarms(seed: int) -> dict[str, float]:
    """Window distances (medians) at tokens of high, random and low loss, and the false-alarm rate, for both window choices."""
    student, teacher, task = opd.load("market")
    rollout = student.sample(task.prompts(256, seed=seed), max_new_tokens=task.max_new_tokens, seed=seed)
    found = topd.forks(student, teacher, rollout, window=WINDOW, share=0.05, seed=seed)
    out = {}
    for choice in ("rollout", "greedy"):
        groups = {name: found[found.group == name][choice] for name in ("high", "random", "low")}
        out |= {f"{choice}: {name}": float(values.median()) for name, values in groups.items()}
        out[f"{choice}: false alarms"] = topd.false_alarm_rate(groups["high"], groups["low"])
        both = found.drop_duplicates(["sample", "position"])
        out[f"{choice}: Spearman, loss"] = float(both["score"].corr(both[choice], method="spearman"))
    return out


def correction(seed: int) -> dict[str, float]:
    """Mean distance of the student's greedy window to the teacher's at forks: before, and after five updates of each loss."""
    student, teacher, task = opd.load("market")
    rollout = student.sample(task.prompts(256, seed=100 + seed), max_new_tokens=task.max_new_tokens, seed=seed)
    found = topd.forks(student, teacher, rollout, window=WINDOW, share=0.05, seed=seed)
    high = found[(found.group == "high") & (found.greedy > 0)].sort_values("score", ascending=False).head(POINTS)
    points = list(zip(high["sample"].astype(int), high["position"].astype(int), strict=True))
    rows = topd.local_correction(student, teacher, rollout, points, window=WINDOW, updates=5, arms=LOSSES)
    means = rows.groupby("arm")["distance"].mean()
    first = rows.groupby("arm")["first_token"].mean()
    return {arm: float(means[arm]) for arm in ("origin", *LOSSES)} | {f"first token: {arm}": float(first[arm]) for arm in ("opd", "topd")}


ARMS = {"false alarms": alarms, "five updates on one window": correction}
