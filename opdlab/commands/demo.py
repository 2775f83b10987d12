"""The main job in one call: evaluate, distil, evaluate again, print a table and write one page to
look at.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from opdlab import methods, viz
from opdlab.data.rollout import Rollout
from opdlab.data.trace import Trace
from opdlab.engine.scoring import score
from opdlab.errors import InvalidValue, OpdlabError, TokenizerMismatch
from opdlab.losses.divergences import TopK
from opdlab.models.policy import Policy, sample
from opdlab.models.same_tokens import check_same_tokens
from opdlab.support.validation import Count, validate
from opdlab.tasks import Task
from opdlab.tasks.profiles import load
from opdlab.teachers import LogprobServer, TextOnly, TextServer
from opdlab.training.evaluation import Evaluation, evaluate, paired
from opdlab.training.run import Run, distill

# What each profile measures: how many held-out prompts, and whether greedily or by one sample each
# at temperature 1.
PROFILES: dict[str, dict[str, Any]] = {
    "market": {"steps": 60, "prompts": 400, "sampled": False, "score": "right totals"},
    "small": {
        "steps": 20,
        "prompts": 96,
        "sampled": True,
        "score": "answers that keep to the rule",
    },
    "gpu": {"steps": 100, "prompts": 200, "sampled": False, "score": "right answers"},
}
# Sizes that suit the shipped world's answers of 24 tokens: options of a method, and settings of its
# run.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "OmniOPD": (
        {
            "length": 1,
            "chunks": 4,
            "continuations": 2,
            "similarity": "rouge1",
            "match_length": True,
        },
        {"batch": 16, "lr": 1e-3, "steps": 60},
    ),
    "GRPO": ({}, {"batch": 16, "n": 8}),
}
# held-out prompts that a teacher which only writes is measured on: its answers may cost money
ASKED = 48


@dataclass(frozen=True, eq=False)
class Seen:
    """One policy as the demo sees it: its evaluation and, where it writes tokens, what it writes on
    the probe prompts.
    """

    evaluation: Evaluation
    rollout: Rollout | None
    sampled: bool

    @property
    def accuracy(self) -> float:
        return self.evaluation.avg_at_k if self.sampled else self.evaluation.accuracy


def demo(
    profile: str = "market",
    student: str | None = None,
    teacher: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    out: Path = Path("runs/demo"),
    prompts: int | None = None,
    settings: Mapping[str, Any] | None = None,
    method: str | None = None,
    teacher_url: str | None = None,
    teacher_model: str | None = None,
) -> str:
    """Run the demo and return its last line: `demo: accuracy BEFORE -> AFTER (teacher T) in S s`
    (S: seconds of training).

    steps, prompts (held out, to measure on) and `settings` (of `distill`) have the profile's own
    values by default. method: a name of `opdlab.methods`; OPD by default, OmniOPD with a server.
    teacher_url: an OpenAI-compatible server that teaches instead.
    """
    console, plan = Console(), PROFILES.get(profile, PROFILES["market"])
    checked = validate(
        "demo",
        {"steps": steps, "prompts": prompts},
        {"steps": Count | None, "prompts": Count | None},
    )
    steps, prompts = checked["steps"], checked["prompts"]
    if teacher_model is not None and teacher_url is None:
        raise InvalidValue(
            f"demo got teacher_model={teacher_model!r} without a server. Give teacher_url as well,"
            " or leave it out."
        )
    plan = plan | {"prompts": prompts or plan["prompts"]}
    way, sizes = chosen(method or ("omniopd" if teacher_url else "opd"), profile, bool(teacher_url))
    console.print(f"[bold]opdlab demo[/bold]: loading the {profile} models …")
    pupil, local, task = load(profile, student=student, teacher=teacher)
    grader: Any = local
    if teacher_url:
        kind: Any = (
            LogprobServer
            if any(name.split("+")[0] == "teacher" for name in way.needs)
            else TextServer
        )
        grader = kind(teacher_url, teacher_model, cache=out / "teacher.sqlite")
    given = {
        "steps": plan["steps"],
        **sizes,
        **({"steps": steps} if steps else {}),
        **(settings or {}),
    }
    start = pupil.frozen()  # without the adapter that the run gives it
    run = distill(
        pupil, grader, task, method=way, seed=seed, **given
    )  # first: it checks all that can be checked
    before, best = _look(start, task, plan, "student"), _look_at_teacher(grader, pupil, task, plan)
    fixed = _traced(before, start, grader)
    console.print(
        f"student {before.accuracy:.2f}, teacher {best.accuracy:.2f} ({plan['score']}); distilling"
        f" with {type(way).__name__} …"
    )
    began = time.perf_counter()
    run.train()
    seconds = time.perf_counter() - began
    after = _look(pupil, task, plan, "student, distilled")
    _print(console, before, after, best, task)
    again = _traced(before, pupil, grader)
    path = _page(
        out,
        (profile, plan),
        run,
        (before, after, best),
        (fixed, again),
        _traced(after, pupil, grader),
    )
    fixed.save(out / "before.parquet")
    again.save(out / "after.parquet")
    if isinstance(grader, TextServer | LogprobServer):
        service = grader.service if isinstance(grader, TextServer) else grader.text.service
        console.print(
            f"teacher: {service.budget.spent.requests:,} requests, {service.budget.spent.tokens:,}"
            f" tokens; answers kept in {out}"
        )
    console.print(f"page: {path}")
    return (
        f"demo: accuracy {before.accuracy:.2f} -> {after.accuracy:.2f} (teacher"
        f" {best.accuracy:.2f}) in {seconds:.0f} s"
    )


def chosen(name: str, profile: str = "market", served: bool = False) -> tuple[Any, dict[str, Any]]:
    """The method of that name (capitals and hyphens do not matter) and the settings that suit it;
    raises OpdlabError for others.

    served: where the teacher's log-probs come from a server, OPD compares on as many tokens as that
        gives.
    """
    kinds = {
        kind: getattr(methods, kind) for kind in methods.__all__ if kind not in ("Method", "method")
    }
    found = next(
        (kind for kind in kinds if kind.lower() == name.lower().replace("-", "").replace("_", "")),
        None,
    )
    if found is None:
        raise OpdlabError(
            f"There is no method {name!r}. Use one of {', '.join(sorted(kinds))}; capitals and"
            " hyphens do not matter."
        )
    options, settings = SIZES.get(found, ({}, {})) if profile == "market" else ({}, {})
    if served and found == "OPD":
        options = {"top_k": TopK(LogprobServer.K, by="teacher")}
    return kinds[found](**options), settings


def _look(policy: Policy, task: Task, plan: dict[str, Any], name: str) -> Seen:
    result = evaluate(
        policy, task, n=plan["prompts"], k=int(plan["sampled"]), name=name, quiet=False
    )
    probe = sample(
        policy, task.prompts(6, seed=1, split="test"), max_new_tokens=task.max_new_tokens, seed=1
    )
    return Seen(result, probe, plan["sampled"])


def _look_at_teacher(teacher: Any, pupil: Policy, task: Task, plan: dict[str, Any]) -> Seen:
    """As `_look`; of a teacher that is not a local model, or speaks other tokens, the scores of
    some texts.
    """
    if isinstance(teacher, Policy) and _same_tokens(pupil, teacher):
        return _look(teacher, task, plan, "teacher")
    writer = TextOnly(teacher) if isinstance(teacher, Policy) else teacher
    asked = task.prompts(min(ASKED, plan["prompts"]), seed=0, split="test")
    texts = writer.write(
        asked, max_new_tokens=4 * task.max_new_tokens, temperature=float(plan["sampled"])
    )
    scores = np.array(task.scores(asked, (row[0] for row in texts)), float)
    unknown = np.full(len(scores), np.nan)
    many = scores[:, None] if plan["sampled"] else scores[:, None][:, :0]
    return Seen(
        Evaluation("teacher", scores, many, unknown, unknown, key=(task.name,)),
        None,
        plan["sampled"],
    )


def _same_tokens(pupil: Policy, teacher: Policy) -> bool:
    try:
        check_same_tokens(pupil, teacher)
    except TokenizerMismatch:
        return False
    return True


def _traced(seen: Seen, pupil: Policy, teacher: Any) -> Trace:
    """What it wrote under the student and, where that is a local model of the same tokens, the
    teacher.
    """
    assert seen.rollout is not None
    return score(
        seen.rollout,
        pupil,
        teacher if isinstance(teacher, Policy) and _same_tokens(pupil, teacher) else None,
    )


def _print(console: Console, before: Seen, after: Seen, best: Seen, task: Task) -> None:
    table = Table(title=f"{task.name}: before and after")
    for column in ("", "before", "after", "teacher"):
        table.add_column(column, justify="left" if not column else "right")
    for label, *cells in _summary(before, after, best):
        table.add_row(label, *cells)
    console.print(table)
    answers = Table(title="the same prompts, answered before and after", show_lines=True)
    for column in ("prompt", "before", "after"):
        answers.add_column(column, overflow="fold")
    assert before.rollout is not None
    assert after.rollout is not None
    for prompt, old, new in list(
        zip(before.rollout.prompts, before.rollout.texts, after.rollout.texts, strict=True)
    )[:4]:
        answers.add_row(
            *(
                _cell(text)
                for text in (
                    prompt.messages[-1]["content"] if prompt.messages else prompt.text or "",
                    old,
                    new,
                )
            )
        )
    console.print(answers)


def _cell(text: str) -> str:
    """Model text for a terminal: control characters made visible and console markup off."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() else " " for c in text))


def _summary(before: Seen, after: Seen, best: Seen) -> list[tuple[str, str, str, str]]:
    shown = [(s.evaluation, s.accuracy) for s in (before, after, best)]
    scores = [
        s.evaluation.sampled[:, 0] if s.sampled else s.evaluation.greedy for s in (before, after)
    ]
    gain = paired(scores[1], scores[0])
    return [
        ("accuracy", *(f"{a:.3f}" for _, a in shown)),  # type: ignore[list-item]
        ("length, tokens", *(_known(e.length.mean(), ".1f") for e, _ in shown)),  # type: ignore[list-item]
        ("cut off", *(_known(e.cut.mean(), ".2f") for e, _ in shown)),  # type: ignore[list-item]
        ("gain, 95 % interval", "", f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]", ""),
    ]


def _known(value: float, form: str) -> str:
    return "–" if np.isnan(value) else format(value, form)


def _page(
    out: Path,
    profile: tuple[str, dict[str, Any]],
    run: Run,
    seen: tuple[Seen, Seen, Seen],
    traces: Any,
    fresh: Any,
) -> Path:
    name, plan = profile
    before, again = traces
    graded = "teacher_reverse_kl" in before.table.column_names
    worst = int(
        before.to_pandas()
        .groupby("sample")["teacher_reverse_kl" if graded else "student_entropy"]
        .max()
        .idxmax()
    )
    lenses = [
        (
            f"Before: a text that the student wrote{', graded by the teacher' if graded else ''}",
            viz.TokenLens(before, worst),
        ),
        ("After: the same text under the distilled student", viz.TokenLens(again, worst)),
        (
            "After: what the distilled student writes now for the same prompt",
            viz.TokenLens(fresh, worst),
        ),
    ]
    if run.last is not None and run.last.notes.get("audits"):
        audit = run.last.notes["audits"][0]
        told = (
            "In training: where the teacher was asked to go on, it wrote"
            f" {', '.join(map(repr, audit['continuations']))} the first time"
        )
        lenses.append(
            (told, viz.TokenLens(run.last.trace(), audit["sample"], channel="similarity"))
        )
    note = (
        f"{name}: {plan['score']} on {seen[0].evaluation.prompts} held-out prompts; {len(run.rows)}"
        f" updates of {type(run.method).__name__}."
    )
    keys = [key for key in ("reverse_kl", "reward", "entropy", "length") if key in run.history]
    curves = viz.curves(run.history, keys=keys)
    return viz.page(
        out / "index.html",
        title="opdlab demo",
        summary=_summary(*seen),
        figures=[curves],
        lenses=lenses,
        note=note,
    )
