"""The gallery: every view on the shipped world and on a small real model, and their pictures on
request.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opdlab.data.column import Column
from opdlab.data.rollout import Rollout
from opdlab.data.trace import Trace
from opdlab.engine.batch import Batch
from opdlab.engine.planned import run_plan
from opdlab.engine.scoring import score
from opdlab.errors import OpdlabError
from opdlab.methods import DOPD, TOPD, OmniOPD
from opdlab.models.policy import Policy
from opdlab.tasks import Task
from opdlab.tasks.market import model
from opdlab.tasks.profiles import load
from opdlab.teachers import TextOnly
from opdlab.training import snapshots
from opdlab.training.evaluation import evaluate
from opdlab.training.run import distill
from opdlab.viz import (
    Alignment,
    Audits,
    Compare,
    Forks,
    Playground,
    PrivilegeLens,
    Regimes,
    Rollouts,
    RunBoard,
    RunCard,
    Scrubber,
    TailAudit,
    Timeline,
    TokenLens,
    View,
    page,
)
from opdlab.viz.overview import overview

Scene = Iterator[tuple[str, View]]


def market(quick: bool = False) -> Scene:
    """Every view, on the shipped models. `quick`: few steps, for tests."""
    student, teacher, task = load("market")
    steps, held = (4, 40) if quick else (60, 200)
    start = student.frozen()
    rollout = student.sample(
        task.prompts(24, split="test"), max_new_tokens=task.max_new_tokens, seed=0
    )
    trace = typed(score(rollout, start, teacher), task, rollout, student)
    rewards = judged(task, rollout)
    several = start.sample(
        rollout.prompts[:1], n=8, max_new_tokens=task.max_new_tokens, temperature=1.5, seed=1
    )
    roads = Timeline(score(several, start, teacher), rewards=judged(task, several))
    wrong = rewards.index(0.0) if 0.0 in rewards else 0
    before = evaluate(start, task, n=held, name="before")
    run = distill(
        student, teacher, task, steps=steps, snapshot_every=max(1, steps // 6), quiet=True
    ).train()
    after, again = evaluate(student, task, n=held, name="after"), score(rollout, student, teacher)

    yield (
        "What each token was told",
        TokenLens(trace, wrong, title="Written by the student, graded by the teacher"),
    )
    yield "The same text before and after", Compare({"before": trace, "after": again}, sample=wrong)
    yield "All completions", Rollouts(trace, rewards=rewards)
    yield "Where texts leave the teacher's road", roads
    secret = told()
    yield "Which tokens a rule touches", Regimes(secret)
    yield (
        "What a hint adds",
        PrivilegeLens(secret, wrong="teacher+wrong", title="A skill, or a leaked answer?"),
    )
    yield (
        "Real forks and false alarms",
        Forks(first_step(start, teacher, task, TOPD(share=0.1), 24)),
    )
    chunks = OmniOPD(length=1, chunks=4, continuations=4, similarity="rouge1", match_length=True)
    yield (
        "What a teacher that only writes said",
        Audits(first_step(start, TextOnly(model("scribe")), task, chunks, 8)),
    )
    yield (
        "The fate of each token over training",
        Scrubber(snapshots.rescore(run, rollout, teacher), history=run.history, sample=wrong),
    )
    yield (
        "What was written at each step",
        Scrubber(snapshots.rewrite(run, rollout.prompts[wrong : wrong + 1], teacher), run.history),
    )
    yield "The run, with its alarms", RunBoard(run)
    yield (
        "The run on one card",
        RunCard(
            run, before, after, samples={"before": trace, "after": again}, title="OPD on market"
        ),
    )
    yield (
        "What a loss does",
        Playground(["forward_kl", "reverse_kl", "jensen_shannon"], trace=trace, sample=wrong),
    )
    yield "What the kept tokens miss", TailAudit(trace, wrong)
    yield (
        "Two tokenizers, one text",
        Alignment.of(rollout.texts[wrong], student.tokenizer, model("scribe").tokenizer),
    )


def told() -> Trace:
    """Secret problems under the student, the teacher bare, told the hint, and told another
    problem's; with DOPD's routes.
    """
    student, teacher, task = load("market", secret=True)
    prompts = task.prompts(24, split="test")
    other = {
        p.id: p.hint for p in load("market", secret=True, wrong=True)[2].prompts(24, split="test")
    }
    rollout = student.sample(prompts, max_new_tokens=task.max_new_tokens, seed=0)
    seen: dict[str, Any] = {
        "teacher+hint": teacher.seeing(),
        "teacher+wrong": teacher.seeing(lambda p: p.with_context(str(other[p.id]))),
    }
    batch = Batch(
        rollout,
        {
            "student": student,
            "teacher+hint": seen["teacher+hint"],
            "student+hint": student.seeing(),
        },
        task,
    )
    planned = run_plan(DOPD(), batch)
    trace = typed(score(rollout, student, teacher, **seen), task, rollout, student)
    columns = {
        name: Column(values, planned.descriptions[name]) for name, values in planned.columns.items()
    }
    trace = trace.with_columns(**columns)
    return Trace(trace.table, {**trace.meta, "plan": list(columns), "method": "DOPD"})


def small(quick: bool = False) -> Scene:
    """The views of one scored text, and of a short run, on SmolLM2: real words, a vocabulary of
    49,000, byte-level pieces.
    """
    student, teacher, task = load("small")
    start, steps = student.frozen(), 1 if quick else 6
    rollout = student.sample(
        task.prompts(4, split="test"), max_new_tokens=8 if quick else 48, seed=0
    )
    trace = score(rollout, start, teacher)
    run = distill(
        student,
        teacher,
        task,
        steps=steps,
        batch=2 if quick else 8,
        snapshot_every=max(1, steps // 3),
        quiet=True,
    ).train()
    again = score(rollout, student, teacher)
    rewards = judged(task, rollout)
    yield from overview(trace)
    yield "The same text before and after", Compare({"before": trace, "after": again})
    yield (
        "The fate of each token over training",
        Scrubber(snapshots.rescore(run, rollout, teacher), history=run.history),
    )
    yield "The run, with its alarms", RunBoard(run)
    yield "The answers that keep to the rule", Rollouts(trace, rewards=rewards)
    yield (
        "Two tokenizers, one text",
        Alignment.of(rollout.texts[0], student.tokenizer, model("scribe").tokenizer),
    )


def first_step(student: Policy, teacher: Any, task: Task, method: Any, batch: int) -> Trace:
    """What a method saw in one step of training."""
    return next(
        distill(student.frozen(), teacher, task, method=method, steps=1, batch=batch, quiet=True)
    ).trace()


def judged(task: Task, rollout: Rollout) -> list[float]:
    """The verifier's word on every text."""
    if task.verify is None:
        raise OpdlabError(
            f"The task {task.name!r} has no verifier, so its texts have no rewards. Give it"
            " verify=."
        )
    return task.scores(rollout.prompts, rollout.texts)


def typed(trace: Trace, task: Task, rollout: Rollout, student: Policy) -> Trace:
    """With the true type of every token, where the task knows it."""
    return trace.with_columns(
        type=[kind for row in task.token_types(rollout, student.tokenizer) for kind in row]
    )


WORLDS = {"market": market, "small": small}


def gallery(
    out: Path = Path("runs/gallery"),
    world: str = "market",
    pictures: bool = False,
    quick: bool = False,
) -> Path:
    """Write `out/<world>.html` with every view; with `pictures`, each in light and dark at 480 and
    1200 pixels as well.
    """
    if world not in WORLDS:
        raise OpdlabError(f"There is no gallery of {world!r}. Use {' or '.join(WORLDS)}.")
    views = list(WORLDS[world](quick))
    path = page(out / f"{world}.html", title=f"opdlab: every view, on {world}", lenses=views)
    for number, (_, view) in enumerate(views if pictures else []):
        for dark, width in itertools.product((False, True), (480, 1200)):
            name = f"{world}-{number:02d}-{view.name}-{width}-{'dark' if dark else 'light'}.png"
            view.to_png(out / name, dark=dark, width=width)
    return path
