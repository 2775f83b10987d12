"""Measure how hints change a student that will have none later.

`ROUTES` counts DOPD's routes by the true type of the token, `ARMS` measures the privilege illusion.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import opdlab as opd
from opdlab.data.prompt import Prompt
from opdlab.engine.batch import Batch
from opdlab.losses.divergences import entropy
from opdlab.methods.dopd import Route
from opdlab.models.policy import Policy
from opdlab.models.text_rollouts import rollout_from_texts
from opdlab.tasks.task import Split, Task

# The prompts are so few that each is seen 30 times, so a hint's information can be memorised.
PROMPTS, STEPS, BATCH = 128, 120, 32


def with_few_prompts(task: Task, n: int, seed: int) -> Task:
    """Limit a task to `n` training prompts."""
    pool = task.prompts(n, seed=1000 + seed)

    def draw(k: int, at: int, split: Split) -> list[Prompt]:
        return (
            random.Random(f"fixed/{at}").choices(pool, k=k)
            if split == "train"
            else task.draw(k, at, split)
        )

    return replace(task, draw=draw)


def grade_answers(
    policy: Policy, task: Task, prompts: Sequence[Prompt]
) -> dict[str, dict[str, float]]:
    """Grade the reference answers by a policy.

    Returns:
        For each type of token, the mean negative log-likelihood and entropy (nats), and the
        accuracy of the likeliest token.
    """
    rollout = rollout_from_texts(policy, prompts, [p.answer or "" for p in prompts])
    numbers = Batch(rollout, {"student": policy}).map(
        lambda rows: {
            "nll": -rows.logp,
            "right": (rows.student.argmax(-1) == rows.token).float(),
            "entropy": entropy(rows.student),
        }
    )
    kinds = [kind for row in task.token_types(rollout, policy.tokenizer) for kind in row]
    flat = {key: value[rollout.mask] for key, value in numbers.items()}
    where = {kind: torch.tensor([k == kind for k in kinds]) for kind in sorted(set(kinds))}
    return {
        kind: {key: float(value[at].mean()) for key, value in flat.items()}
        for kind, at in where.items()
    }


def train(seed: int, arm: str) -> dict[str, float]:
    """Train on few prompts with secret hints, and grade the answers of training and fresh prompts.

    Args:
        seed: Seed of the run and its prompts.
        arm: Who teaches, and who sees the hints; a name in `ARMS`.
    """
    student, teacher, task = opd.load("market", secret=True)
    few = with_few_prompts(task, PROMPTS, seed)
    guide: Policy | None = teacher
    policies: dict[str, Policy] = {}
    method: Any = opd.OPD()
    learner: Policy = student
    if arm in ("teacher told", "both told"):
        policies = {"teacher": teacher.seeing()}
    if arm == "both told":
        learner = student.seeing()
    if arm == "OPSD (frozen self, told)":
        method, guide = opd.SelfDistillation.opsd(), None
    if arm.startswith("DOPD"):
        options: dict[str, dict[str, Any]] = {
            "DOPD": {},
            "DOPD, frozen anchor": {"anchor": "frozen"},
            "DOPD, HS to teacher": {"hs": "teacher"},
        }
        method = opd.DOPD(**options[arm])
    before = grade_answers(student, task, task.prompts(300, seed=5, split="test"))
    run = opd.distill(
        learner,
        guide,
        few,
        method=method,
        policies=policies,
        steps=STEPS,
        batch=BATCH,
        seed=seed,
        quiet=True,
    )
    run.train()
    student._adapter = learner._adapter  # "both told" trains a view of the student
    seen, fresh = (
        grade_answers(student, task, prompts)
        for prompts in (few.prompts(300, seed=6), task.prompts(300, seed=5, split="test"))
    )
    out = {
        "secret accuracy, training prompts": seen["secret"]["right"],
        "secret accuracy, fresh": fresh["secret"]["right"],
        "secret NLL, training prompts": seen["secret"]["nll"],
        "secret NLL, fresh": fresh["secret"]["nll"],
        "secret NLL, fresh, before": before["secret"]["nll"],
        "secret entropy, fresh": fresh["secret"]["entropy"],
        "mixed NLL, fresh": fresh["mixed"]["nll"],
        "noise entropy, fresh": fresh["noise"]["entropy"],
    }
    return out | {"accuracy, fresh": opd.evaluate(student, task).accuracy}


def routes(seed: int, gap_student: str) -> dict[str, float]:
    """Count the share of each true type of token that goes to each route.

    Args:
        seed: Seed of the prompts and the samples.
        gap_student: DOPD's option of this name.
    """
    student, teacher, task = opd.load("market", secret=True)
    rollout = student.sample(
        task.prompts(256, seed=seed), max_new_tokens=task.max_new_tokens, seed=seed
    )
    batch = Batch(
        rollout,
        {"student": student, "teacher+hint": teacher.seeing(), "student+hint": student.seeing()},
        task,
    )
    column = opd.DOPD(gap_student=gap_student).plan(batch)["route"]  # type: ignore[arg-type]
    route = column.values[rollout.mask]
    kinds = [kind for row in task.token_types(rollout, student.tokenizer) for kind in row]
    out = {}
    for kind in ("copy", "skill", "derived", "style", "secret", "mixed", "noise"):
        at = torch.tensor([k == kind for k in kinds])
        out |= {f"{kind} {r.name}": float((route[at] == r).float().mean()) for r in Route}
    return out


ARMS = {
    arm: partial(train, arm=arm)
    for arm in (
        "no hint",
        "teacher told",
        "both told",
        "OPSD (frozen self, told)",
        "DOPD",
        "DOPD, frozen anchor",
        "DOPD, HS to teacher",
    )
}
ROUTES = {
    f"gap from the {g} student": partial(routes, gap_student=g) for g in ("privileged", "bare")
}
