"""The gallery: every view on the shipped models or on a small real one, as one page or as pictures.

A view that no scene here shows comes with its own example, so a new view needs no line here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opdlab.data.column import Column
from opdlab.data.labels import Labels
from opdlab.data.rollout import Rollout
from opdlab.data.trace import Trace
from opdlab.diagnose.attribution import attribute, depth
from opdlab.diagnose.branching import branch
from opdlab.engine.batch import Batch
from opdlab.engine.planned import run_plan
from opdlab.errors import OpdlabError
from opdlab.methods import DOPD, OPD, TOPD, OmniOPD
from opdlab.models.policy import Policy
from opdlab.tasks import Task
from opdlab.tasks.market import model
from opdlab.tasks.profiles import load
from opdlab.teachers import TextOnly
from opdlab.training import snapshots
from opdlab.training.evaluation import evaluate
from opdlab.training.run import distill
from opdlab.training.scoring import score
from opdlab.viz import (
    VIEWS,
    Alignment,
    Audits,
    Branches,
    Compare,
    Disagreements,
    Equation,
    Forks,
    Marks,
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
    TwoRules,
    View,
    Why,
    page,
)
from opdlab.viz.overview import overview


def gallery(
    out: Path = Path("runs/gallery"),
    world: str = "market",
    pictures: bool = False,
    quick: bool = False,
) -> Path:
    """Write a page with every view.

    Args:
        out: The folder of `<world>.html` and of the pictures.
        world: "market" (shipped models) or "small" (SmolLM2-135M).
        pictures: Whether to draw each view as a PNG as well: light and dark, 480 and 1200 pixels
            wide.
        quick: Whether to train for a few steps only, as the tests do.

    Returns:
        The page's path.

    Raises:
        OpdlabError: There is no gallery of that world.
    """
    if world not in WORLDS:
        raise OpdlabError(f"There is no gallery of {world!r}. Use {' or '.join(WORLDS)}.")
    views = complete(list(WORLDS[world](quick)))
    shown = [(view.caption, view) for view in views]
    path = page(out / f"{world}.html", title=f"opdlab: every view, on {world}", lenses=shown)
    for number, view in enumerate(views if pictures else []):
        for dark, width in itertools.product((False, True), (480, 1200)):
            name = f"{world}-{number:02d}-{view.name}-{width}-{'dark' if dark else 'light'}.png"
            view.to_png(out / name, dark=dark, width=width)
    return path


def complete(views: list[View]) -> list[View]:
    """Return the views in the order of `VIEWS`, with the example of each kind that is not there.

    Args:
        views: Views of any kinds.

    Returns:
        At least one view of each kind.
    """
    out: list[View] = []
    for kind in VIEWS:
        out += [view for view in views if type(view) is kind] or [kind.example()]
    return out


def market_views(quick: bool = False) -> Iterator[View]:
    """Yield views of the shipped models before, during and after a run.

    Args:
        quick: Whether to train for 4 steps in place of 60, and to evaluate less.

    Yields:
        Views of nearly every kind; `complete` adds the others.
    """
    student, teacher, task = load("market")
    start = student.frozen()
    room = task.max_new_tokens
    rollout = student.sample(task.prompts(24, split="test"), max_new_tokens=room, seed=0)
    trace = with_types(score(rollout, start, teacher), task, rollout, student)
    rewards = task.scores(rollout.prompts, rollout.texts)
    wrong = rewards.index(0.0) if 0.0 in rewards else 0
    lens = TokenLens(trace, wrong, title="Written by the student, graded by the teacher")
    yield lens
    yield Equation(trace, OPD("generalized_jsd"), wrong, title="The loss of one token")
    yield Disagreements(trace)
    tree = branch(rollout, start, teacher, wrong, lens.selected, task=task, quiet=True)
    yield Branches(trace, [tree], sample=wrong, title="The teacher's token, forced")
    labels = Labels(trace)
    labels.add(wrong, lens.selected, "slip", "Here the answer goes wrong.")
    yield Marks(trace, labels, wrong)
    yield Rollouts(trace, rewards=rewards)
    yield TailAudit(trace, wrong)
    divergences = ["forward_kl", "reverse_kl", "jensen_shannon"]
    yield Playground(divergences, trace=trace, sample=wrong)
    scribe = model("scribe").tokenizer
    yield Alignment.of(rollout.texts[wrong], student.tokenizer, scribe)

    several = start.sample(rollout.prompts[:1], n=8, max_new_tokens=room, temperature=1.5, seed=1)
    graded = score(several, start, teacher)
    yield Timeline(graded, rewards=task.scores(several.prompts, several.texts))
    secret = secret_trace()
    yield Regimes(secret)
    yield TwoRules(secret, "route = HT teacher leads", "type = secret")
    yield why_a_secret()
    yield PrivilegeLens(secret, wrong="teacher+wrong", title="A skill, or a leaked answer?")
    yield Forks(first_step(start, teacher, task, TOPD(share=0.1), batch=24))
    chunks = OmniOPD(length=1, chunks=4, continuations=4, similarity="rouge1", match_length=True)
    yield Audits(first_step(start, TextOnly(model("scribe")), task, chunks, batch=8))

    steps, held_out = (4, 40) if quick else (60, 200)
    before = evaluate(start, task, n=held_out, name="before")
    every = max(1, steps // 6)
    run = distill(student, teacher, task, steps=steps, snapshot_every=every, quiet=True).train()
    after = evaluate(student, task, n=held_out, name="after")
    again = score(rollout, student, teacher)
    both = {"before": trace, "after": again}
    yield Compare(both, sample=wrong, title="Before and after training")
    yield Scrubber(snapshots.rescore(run, rollout, teacher), history=run.history, sample=wrong)
    prompt = rollout.prompts[wrong : wrong + 1]
    yield Scrubber(snapshots.rewrite(run, prompt, teacher), run.history)
    yield RunBoard(run)
    yield RunCard(run, before, after, samples=both, title="OPD on market")


def small_views(quick: bool = False) -> Iterator[View]:
    """Yield views of one scored text and of a short run on SmolLM2.

    Real words, a vocabulary of 49,000, byte-level pieces.

    Args:
        quick: Whether to write 8 tokens in place of 48, and to train for 1 step in place of 6.

    Yields:
        Views of a few kinds.
    """
    student, teacher, task = load("small")
    start = student.frozen()
    room = 8 if quick else 48
    rollout = student.sample(task.prompts(4, split="test"), max_new_tokens=room, seed=0)
    trace = score(rollout, start, teacher)
    for _, view in overview(trace):
        if not isinstance(view, Rollouts):
            yield view
    yield Rollouts(trace, rewards=task.scores(rollout.prompts, rollout.texts))
    scribe = model("scribe").tokenizer
    yield Alignment.of(rollout.texts[0], student.tokenizer, scribe)

    steps, batch = (1, 2) if quick else (6, 8)
    run = distill(
        student,
        teacher,
        task,
        steps=steps,
        batch=batch,
        snapshot_every=max(1, steps // 3),
        quiet=True,
    ).train()
    yield Compare({"before": trace, "after": score(rollout, student, teacher)})
    yield Scrubber(snapshots.rescore(run, rollout, teacher), history=run.history)
    yield RunBoard(run)


WORLDS = {"market": market_views, "small": small_views}


def secret_trace() -> Trace:
    """Grade answers to secret problems with and without hints, and route them as DOPD does.

    The teacher reads the problem alone, with its hint, and with the hint of another problem.

    Returns:
        A trace with the true types of the tokens and the columns of DOPD's plan.
    """
    student, teacher, task = load("market", secret=True)
    prompts = task.prompts(24, split="test")
    wrong_task = load("market", secret=True, wrong=True)[2]
    wrong_hints = {prompt.id: str(prompt.hint) for prompt in wrong_task.prompts(24, split="test")}
    rollout = student.sample(prompts, max_new_tokens=task.max_new_tokens, seed=0)
    hinted = teacher.seeing()
    misled = teacher.seeing(lambda prompt: prompt.with_context(wrong_hints[prompt.id]))
    others: dict[str, Any] = {"teacher+hint": hinted, "teacher+wrong": misled}
    graded = score(rollout, student, teacher, **others)
    trace = with_types(graded, task, rollout, student)
    policies = {"student": student, "teacher+hint": hinted, "student+hint": student.seeing()}
    planned = run_plan(DOPD(), Batch(rollout, policies, task))
    columns = {
        name: Column(values, planned.descriptions[name]) for name, values in planned.columns.items()
    }
    return trace.with_columns(**columns)


def why_a_secret() -> Why:
    """Ask why a hinted teacher wants a secret letter, and in which layer the hint acts.

    Returns:
        The view, at the first secret token of a completion.
    """
    student, teacher, task = load("market", secret=True)
    hinted = teacher.seeing()
    prompts = task.prompts(2, split="test")
    rollout = student.sample(prompts, max_new_tokens=task.max_new_tokens, seed=0)
    trace = with_types(score(rollout, student, hinted), task, rollout, student)
    at = trace.sample(0).table["type"].to_pylist().index("secret")
    layers = depth(rollout, teacher, hinted, 0, at)
    reasons = (attribute(rollout, student, hinted, 0, at), layers)
    return Why(trace, reasons, title="Where the hint leaks")


def first_step(student: Policy, teacher: Any, task: Task, method: Any, batch: int) -> Trace:
    """Return the trace of one step of training, with the notes of its plan.

    Args:
        student: The policy to start from; it is not changed.
        teacher: The teacher, which may only write.
        task: The task to train on.
        method: The method whose plan is wanted.
        batch: Prompts of the step.

    Returns:
        The trace of the step.
    """
    run = distill(student.frozen(), teacher, task, method=method, steps=1, batch=batch, quiet=True)
    return next(run).trace()


def with_types(trace: Trace, task: Task, rollout: Rollout, student: Policy) -> Trace:
    """Add the true type of every token.

    Args:
        trace: The trace of the rollout.
        task: A task that knows the types.
        rollout: The texts.
        student: Its tokenizer cuts the texts into pieces.

    Returns:
        The trace with the column `type`.

    Raises:
        OpdlabError: The task knows no types.
    """
    types = task.token_types(rollout, student.tokenizer)
    return trace.with_columns(type=[kind for row in types for kind in row])
