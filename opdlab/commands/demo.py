"""Run the main job in one call: evaluate a student, distil it, evaluate it again, show the change.

    demo()  →  choose_method → distill → measure (student, teacher) → train → measure → report

`opdlab.commands.demo_report` prints the tables and writes the page.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from opdlab.commands.demo_report import Measured, Outcome, print_tables, write_page
from opdlab.data.trace import Trace
from opdlab.engine.needs import Access, parse_need
from opdlab.errors import InvalidValue, TokenizerMismatch
from opdlab.losses.divergences import TopK
from opdlab.methods import Method
from opdlab.methods.by_name import find_method
from opdlab.models.policy import Policy, sample
from opdlab.models.same_tokens import check_same_tokens
from opdlab.support.consoles import make_console
from opdlab.support.validation import Count, validate
from opdlab.tasks import Task
from opdlab.tasks.profiles import find_smollm2, load
from opdlab.teachers import LogprobServer, TextOnly, TextServer
from opdlab.training.evaluation import Evaluation, evaluate
from opdlab.training.run import Run, distill
from opdlab.training.scoring import score

# Prompts that a teacher which only writes is measured on: its answers may cost money.
PROMPTS_OF_WRITERS = 48
PROBES = 6  # prompts whose answers the page shows

Server = LogprobServer | TextServer


@dataclass(frozen=True)
class Plan:
    """The training and the measurements of a profile's demo.

    Attributes:
        steps: Updates.
        prompts: Held-out prompts to measure on.
        is_sampled: Whether accuracy is that of one sample per prompt at temperature 1, not of the
            greedy answer.
        score: The meaning of a right answer, in words.
    """

    steps: int
    prompts: int
    is_sampled: bool
    score: str


PLANS = {
    "market": Plan(60, 400, False, "right totals"),
    "small": Plan(20, 96, True, "answers that keep to the rule"),
    "gpu": Plan(100, 200, False, "right answers"),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes that suit the shipped world's answers of 24 tokens.

    Attributes:
        options: Arguments of the method.
        settings: Settings of its run.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


MARKET_SIZES = {
    "OmniOPD": Sizes(
        {
            "length": 1,
            "chunks": 4,
            "continuations": 2,
            "similarity": "rouge1",
            "match_length": True,
        },
        {"batch": 16, "lr": 1e-3, "steps": 60},
    ),
    "GRPO": Sizes(settings={"batch": 16, "n": 8}),
}


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
    """Run the demo: tables on the terminal, a page and two traces in `out`.

    Args:
        profile: "market", "small" or "gpu", as `opdlab.load` takes it.
        student: A shipped model's name, a Hub name or a folder; the profile's own by default.
        teacher: Likewise.
        steps: Updates; the profile's own number by default.
        seed: Seed of prompts, samples and the adapter.
        out: Folder for the page and the traces.
        prompts: Held-out prompts to measure on; the profile's own number by default.
        settings: Further settings of `distill`.
        method: A name of `opdlab.methods`; "opd" by default, "omniopd" with a server.
        teacher_url: An OpenAI-compatible server that teaches in place of a local teacher.
        teacher_model: The model's name there.

    Returns:
        The last line to print: `demo: accuracy BEFORE -> AFTER (teacher T) in S s`, where S counts
        the seconds of training.

    Raises:
        InvalidValue: An argument is not what it must be.
        OpdlabError: There is no such profile or method, or the pair cannot work.
    """
    began = time.perf_counter()
    console = make_console()
    prepared = _prepare(
        _Asked(profile, student, teacher, steps, seed, out, prompts, settings or {}),
        _Served(method, teacher_url, teacher_model),
        console,
    )
    console.print(f"loaded in {time.perf_counter() - began:.0f} s")
    outcome, seconds = _distil(prepared, console)
    _keep(prepared, outcome, out, console)
    console.print(f"{time.perf_counter() - began:.0f} s in all, with loading and evaluations")
    return (
        f"demo: accuracy {outcome.before.accuracy:.2f} -> {outcome.after.accuracy:.2f} (teacher"
        f" {outcome.teacher.accuracy:.2f}) in {seconds:.0f} s"
    )


@dataclass(frozen=True)
class _Asked:
    """The arguments of `demo` that say what runs."""

    profile: str
    student: str | None
    teacher: str | None
    steps: int | None
    seed: int
    out: Path
    prompts: int | None
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class _Served:
    """The arguments of `demo` that say who teaches, and how."""

    method: str | None
    url: str | None
    model: str | None


@dataclass(frozen=True, eq=False)
class Prepared:
    """Everything that a demo needs, checked.

    Attributes:
        profile: The profile's name.
        plan: The profile's plan.
        start: The student without the adapter that the run gives it.
        learner: The student that learns.
        guide: The teacher.
        task: Where prompts come from.
        run: The run, not begun.
    """

    profile: str
    plan: Plan
    start: Policy
    learner: Policy
    guide: Policy | Server
    task: Task
    run: Run


def _prepare(asked: _Asked, served: _Served, console: Console) -> Prepared:
    """Load the models and make the run, which checks all that can be checked."""
    plan = _plan(asked.profile, asked.steps, asked.prompts)
    if served.model is not None and served.url is None:
        raise InvalidValue(
            f"demo got teacher_model={served.model!r} without a server. Give teacher_url as well,"
            " or leave it out."
        )
    name = served.method or ("omniopd" if served.url else "opd")
    chosen, own_settings = choose_method(name, asked.profile, is_served=bool(served.url))
    console.print(f"[bold]opdlab demo[/bold]: loading the {asked.profile} models …")
    learner, local_teacher, task = load(asked.profile, student=asked.student, teacher=asked.teacher)
    guide: Policy | Server = local_teacher
    if served.url:
        guide = _connect(chosen, served.url, served.model, cache=asked.out / "teacher.sqlite")
    given = {"steps": plan.steps, **own_settings}
    given |= {"steps": asked.steps} if asked.steps else {}
    start = learner.frozen()
    run = distill(
        learner, guide, task, method=chosen, seed=asked.seed, **{**given, **asked.settings}
    )
    return Prepared(asked.profile, plan, start, learner, guide, task, run)


def _distil(prepared: Prepared, console: Console) -> tuple[Outcome, float]:
    """Measure, train and measure again; returns the outcome and the seconds of training."""
    plan, task, guide, run = prepared.plan, prepared.task, prepared.guide, prepared.run
    before = _measure(prepared.start, task, plan, "student")
    best = _measure_teacher(guide, prepared.learner, task, plan)
    console.print(
        f"student {before.accuracy:.2f}, teacher {best.accuracy:.2f} ({plan.score}); distilling"
        f" with {type(run.method).__name__} …"
    )
    trace_before = _trace(before, prepared.start, guide)
    began = time.perf_counter()
    run.train()
    seconds = time.perf_counter() - began
    after = _measure(prepared.learner, task, plan, "student, distilled")
    outcome = Outcome(
        profile=prepared.profile,
        score=plan.score,
        before=before,
        after=after,
        teacher=best,
        trace_before=trace_before,
        trace_after=_trace(before, prepared.learner, guide),
        trace_now=_trace(after, prepared.learner, guide),
    )
    return outcome, seconds


def _keep(prepared: Prepared, outcome: Outcome, out: Path, console: Console) -> None:
    """Show the tables, and write the page, the traces and the adapter."""
    print_tables(console, outcome, prepared.task.name)
    path = write_page(out / "index.html", outcome, prepared.run)
    outcome.trace_before.save(out / "before.parquet")
    outcome.trace_after.save(out / "after.parquet")
    _print_cost(console, prepared.guide, out)
    console.print(f"page: {path}", soft_wrap=True)
    adapter = _write_adapter(prepared.run, outcome, out / "adapter")
    if adapter is not None:
        console.print(f"adapter: {adapter}; it loads in plain PEFT:", soft_wrap=True)
        console.print(
            loading_code(prepared, adapter), soft_wrap=True, markup=False, highlight=False
        )


def _write_adapter(run: Run, outcome: Outcome, folder: Path) -> Path | None:
    """Save the trained adapter with its card; None if all weights were trained."""
    if run.student.adapter is None:
        return None
    measured = {"before": outcome.before, "after": outcome.after, "teacher": outcome.teacher}
    evaluations = {name: one.evaluation for name, one in measured.items()}
    return run.save_adapter(folder, evaluations=evaluations)


def loading_code(prepared: Prepared, adapter: Path) -> str:
    """Write the Python that loads a demo's student without opdlab.

    Args:
        prepared: The demo.
        adapter: The folder of its adapter.

    Returns:
        Lines that can be pasted.
    """
    source = f"{prepared.start.weights.source!r}"
    if prepared.profile == "small" and (file := find_smollm2()) is not None:
        source = f"{str(file.parent)!r}, gguf_file={file.name!r}"
    return (
        "    from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        f"    base = AutoModelForCausalLM.from_pretrained({source})\n"
        f"    student = PeftModel.from_pretrained(base, {str(adapter.resolve())!r})"
    )


def _plan(profile: str, steps: int | None, prompts: int | None) -> Plan:
    """The plan of a profile, with the user's number of prompts; `load` refuses other profiles."""
    checked = validate(
        "demo",
        {"steps": steps, "prompts": prompts},
        {"steps": Count | None, "prompts": Count | None},
    )
    plan = PLANS.get(profile, PLANS["market"])
    return replace(plan, prompts=checked["prompts"] or plan.prompts)


def choose_method(
    name: str, profile: str = "market", is_served: bool = False
) -> tuple[Method, dict[str, Any]]:
    """Find a method by name, with sizes that suit the profile.

    Args:
        name: A name of `opdlab.methods`; capitals, hyphens and underscores do not matter.
        profile: The profile of the demo.
        is_served: Whether the teacher's log-probs come from a server. OPD then compares on as many
            tokens as a server gives.

    Returns:
        The method, and settings for its run.

    Raises:
        OpdlabError: There is no such method.
    """
    kind = find_method(name)
    found = kind.__name__
    sizes = MARKET_SIZES.get(found, Sizes()) if profile == "market" else Sizes()
    options = dict(sizes.options)
    if is_served and found == "OPD":
        options["top_k"] = TopK(LogprobServer.K, by="teacher")
    return kind(**options), dict(sizes.settings)


def _connect(method: Method, url: str, model: str | None, cache: Path) -> Server:
    """Make a teacher of a server; it gives log-probs if the method reads them, texts if not."""
    needs = [parse_need(name) for name in method.needs]
    reads_log_probs = any(
        need.policy == "teacher" and need.access is Access.LOGITS for need in needs
    )
    kind = LogprobServer if reads_log_probs else TextServer
    return kind(url, model, cache=cache)


def _measure(policy: Policy, task: Task, plan: Plan, name: str) -> Measured:
    """Evaluate a policy, and let it write on the probe prompts."""
    samples = 1 if plan.is_sampled else 0
    result = evaluate(policy, task, n=plan.prompts, k=samples, name=name, quiet=False)
    probes = task.prompts(PROBES, seed=1, split="test")
    rollout = sample(policy, probes, max_new_tokens=task.max_new_tokens, seed=1)
    return Measured(result, rollout, plan.is_sampled)


def _measure_teacher(teacher: Policy | Server, student: Policy, task: Task, plan: Plan) -> Measured:
    """Evaluate the teacher, by its texts alone if it does not share the student's tokens."""
    if isinstance(teacher, (LogprobServer, TextServer)):
        return _measure_texts(teacher, task, plan)
    if _share_tokens(student, teacher):
        return _measure(teacher, task, plan, "teacher")
    return _measure_texts(TextOnly(teacher), task, plan)


def _measure_texts(teacher: TextOnly | Server, task: Task, plan: Plan) -> Measured:
    asked = task.prompts(min(PROMPTS_OF_WRITERS, plan.prompts), seed=0, split="test")
    # The teacher's tokens may be shorter than the student's, so it gets four times as many.
    texts = teacher.write(
        asked, max_new_tokens=4 * task.max_new_tokens, temperature=float(plan.is_sampled)
    )
    scores = np.array(task.scores(asked, (row[0] for row in texts)), float)
    unknown = np.full(len(scores), np.nan)
    sampled = scores[:, None] if plan.is_sampled else np.empty((len(scores), 0))
    evaluation = Evaluation("teacher", scores, sampled, unknown, unknown, key=(task.name,))
    return Measured(evaluation, None, plan.is_sampled)


def _share_tokens(student: Policy, teacher: Policy) -> bool:
    try:
        check_same_tokens(student, teacher)
    except TokenizerMismatch:
        return False
    return True


def _trace(measured: Measured, student: Policy, teacher: Policy | Server) -> Trace:
    """Grade the probe texts by the student and by a local teacher that shares its tokens."""
    assert measured.rollout is not None
    if isinstance(teacher, (LogprobServer, TextServer)) or not _share_tokens(student, teacher):
        return score(measured.rollout, student)
    return score(measured.rollout, student, teacher)


def _print_cost(console: Console, teacher: Policy | Server, folder: Path) -> None:
    """Say how many requests and tokens a server was asked for."""
    if isinstance(teacher, LogprobServer):
        teacher = teacher.text
    if isinstance(teacher, TextServer):
        spent = teacher.service.budget.spent
        console.print(
            f"teacher: {spent.requests:,} requests, {spent.tokens:,} tokens; answers kept in"
            f" {folder}"
        )
