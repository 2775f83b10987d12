"""What a hint does to a student that will have none: routes by the true type of the token, and the
privilege illusion.
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

PROMPTS, STEPS, BATCH = (
    128,
    120,
    32,
)  # so few prompts that each is seen 30 times: what a hint tells can be memorised


def fixed(task: Task, n: int, seed: int) -> Task:
    """The task with only `n` training prompts."""
    pool = task.prompts(n, seed=1000 + seed)

    def draw(k: int, at: int, split: Split) -> list[Prompt]:
        return (
            random.Random(f"fixed/{at}").choices(pool, k=k)
            if split == "train"
            else task.draw(k, at, split)
        )

    return replace(task, draw=draw)


def looked_up(policy: Policy, task: Task, prompts: Sequence[Prompt]) -> dict[str, dict[str, float]]:
    """By token type on the reference answers: negative log-likelihood (nats), accuracy of the
    favourite, entropy.
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
    """Train on few prompts with secret hints; look at the secret symbols of training and of fresh
    prompts.
    """
    student, teacher, task = opd.load("market", secret=True)
    few = fixed(task, PROMPTS, seed)
    told, policies, method = teacher, {}, opd.OPD()
    learner: Policy = student
    if arm in ("teacher told", "both told"):
        policies = {"teacher": teacher.seeing()}
    if arm == "both told":
        learner = student.seeing()
    if arm == "OPSD (frozen self, told)":
        method, told = opd.SelfDistillation.opsd(), None
    if arm.startswith("DOPD"):
        options: dict[str, dict[str, Any]] = {
            "DOPD": {},
            "DOPD, frozen anchor": {"anchor": "frozen"},
            "DOPD, HS to teacher": {"hs": "teacher"},
        }
        method = opd.DOPD(**options[arm])
    before = looked_up(student, task, task.prompts(300, seed=5, split="test"))
    run = opd.distill(
        learner,
        told,
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
        looked_up(student, task, prompts)
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
    """Share of each true type that goes to each route, on rollouts of the shipped student."""
    student, teacher, task = opd.load("market", secret=True)
    rollout = student.sample(
        task.prompts(256, seed=seed), max_new_tokens=task.max_new_tokens, seed=seed
    )
    batch = Batch(
        rollout,
        {"student": student, "teacher+hint": teacher.seeing(), "student+hint": student.seeing()},
        task,
    )
    route = opd.DOPD(gap_student=gap_student).plan(batch)["route"][rollout.mask]  # type: ignore[arg-type]
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
