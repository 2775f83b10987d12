"""The main job in one call: evaluate, distil, evaluate again, print a table and write one page to look at."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from opdlab import viz
from opdlab.distill import Run, distill
from opdlab.evaluate import Evaluation, evaluate, paired
from opdlab.policy import Policy
from opdlab.profiles import load
from opdlab.rollout import Rollout, sample
from opdlab.tasks import Task
from opdlab.trace import score

# What each profile measures: how many held-out prompts, and whether greedily or by one sample each at temperature 1.
PROFILES: dict[str, dict[str, Any]] = {
    "market": {"steps": 60, "prompts": 400, "sampled": False, "score": "right totals"},
    "small": {"steps": 20, "prompts": 96, "sampled": True, "score": "answers that keep to the rule"},
    "gpu": {"steps": 100, "prompts": 200, "sampled": False, "score": "right answers"},
}


@dataclass(frozen=True, eq=False)
class Seen:
    """One policy as the demo sees it: its evaluation, and what it writes on the probe prompts."""

    evaluation: Evaluation
    rollout: Rollout
    sampled: bool

    @property
    def accuracy(self) -> float:
        return self.evaluation.avg_at_k if self.sampled else self.evaluation.accuracy


def demo(profile: str = "market", student: str | None = None, teacher: str | None = None, steps: int | None = None, seed: int = 0,
         out: Path = Path("runs/demo"), prompts: int | None = None, settings: Mapping[str, Any] | None = None) -> str:  # fmt: skip
    """Run the demo and return its last line: `demo: accuracy BEFORE -> AFTER (teacher T) in S s` (S: seconds of training).

    steps, prompts (held out, to measure on) and `settings` (of `distill`) have the profile's own values by default.
    """
    console, plan = Console(), PROFILES.get(profile, PROFILES["market"])
    plan = plan | {"prompts": prompts or plan["prompts"]}
    console.print(f"[bold]opdlab demo[/bold]: loading the {profile} models …")
    pupil, grader, task = load(profile, student=student, teacher=teacher)
    before, best = (_look(policy, task, plan, name) for policy, name in ((pupil, "student"), (grader, "teacher")))
    first = score(before.rollout, pupil, grader)
    console.print(f"student {before.accuracy:.2f}, teacher {best.accuracy:.2f} ({plan['score']}); distilling …")
    run = distill(pupil, grader, task, steps=steps or plan["steps"], seed=seed, **(settings or {}))
    began = time.perf_counter()
    run.train()
    seconds = time.perf_counter() - began
    after = _look(pupil, task, plan, "student, distilled")
    _print(console, before, after, best, task)
    again = score(before.rollout, pupil, grader)
    path = _page(out, (profile, plan), run, (before, after, best), (first, again), score(after.rollout, pupil, grader))
    first.save(out / "before.parquet")
    again.save(out / "after.parquet")
    console.print(f"page: {path}")
    return f"demo: accuracy {before.accuracy:.2f} -> {after.accuracy:.2f} (teacher {best.accuracy:.2f}) in {seconds:.0f} s"


def _look(policy: Policy, task: Task, plan: dict[str, Any], name: str) -> Seen:
    result = evaluate(policy, task, n=plan["prompts"], k=int(plan["sampled"]), name=name, quiet=False)
    probe = sample(policy, task.prompts(6, seed=1, split="test"), max_new_tokens=task.max_new_tokens, seed=1)
    return Seen(result, probe, plan["sampled"])


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
    for prompt, old, new in list(zip(before.rollout.prompts, before.rollout.texts, after.rollout.texts, strict=True))[:4]:
        answers.add_row(*(_cell(text) for text in (prompt.messages[-1]["content"] if prompt.messages else prompt.text or "", old, new)))
    console.print(answers)


def _cell(text: str) -> str:
    """Model text for a terminal: control characters made visible and console markup off."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() else " " for c in text))


def _summary(before: Seen, after: Seen, best: Seen) -> list[tuple[str, str, str, str]]:
    shown = [(s.evaluation, s.accuracy) for s in (before, after, best)]
    scores = [s.evaluation.sampled[:, 0] if s.sampled else s.evaluation.greedy for s in (before, after)]
    gain = paired(scores[1], scores[0])
    return [
        ("accuracy", *(f"{a:.3f}" for _, a in shown)),  # type: ignore[list-item]
        ("length, tokens", *(f"{e.length.mean():.1f}" for e, _ in shown)),  # type: ignore[list-item]
        ("cut off", *(f"{e.cut.mean():.2f}" for e, _ in shown)),  # type: ignore[list-item]
        ("gain, 95 % interval", "", f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]", ""),
    ]


def _page(out: Path, profile: tuple[str, dict[str, Any]], run: Run, seen: tuple[Seen, Seen, Seen], traces: Any, fresh: Any) -> Path:
    name, plan = profile
    before, again = traces
    worst = int(before.to_pandas().groupby("sample")["teacher_reverse_kl"].max().idxmax())
    lenses = [
        ("Before: a text that the student wrote, graded by the teacher", viz.TokenLens(before, worst)),
        ("After: the same text under the distilled student", viz.TokenLens(again, worst)),
        ("After: what the distilled student writes now for the same prompt", viz.TokenLens(fresh, worst)),
    ]
    note = f"{name}: {plan['score']} on {plan['prompts']} held-out prompts; {len(run.rows)} updates of {type(run.method).__name__}."
    curves = viz.curves(run.history, keys=["reverse_kl", "reward", "entropy", "length"])
    return viz.page(out / "index.html", title="opdlab demo", summary=_summary(*seen), figures=[curves], lenses=lenses, note=note)
