"""Check before any training whether on-policy distillation can work between two models.

The doctor compares tokens, stops, templates and room without running a model. Then, for as many
prompts as fit into some seconds, it lets the student write `k` answers and the teacher grade them,
lets the teacher answer alone and from half of the student's text, looks whether the student can
find the teacher's first tokens, and predicts the cost of a step
(`opdlab.diagnose.examination`). `stop` is only said of pairs that `distill` would refuse or that
leave no signal at all. If success is unlikely, that is a `warn`, with what to do first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.diagnose.allowance import Allowance
from opdlab.diagnose.checks import Check
from opdlab.diagnose.diagnosis import Diagnosis
from opdlab.diagnose.examination import Evidence, Pair, examine, whole_scope
from opdlab.diagnose.first_tokens import FIRST
from opdlab.diagnose.pair_checks import check_pair
from opdlab.diagnose.probe import choose_prompts
from opdlab.diagnose.text_checks import (
    Skill,
    check_lengths,
    check_memory,
    check_overlap,
    check_ranking,
    check_student,
    check_teacher,
)
from opdlab.errors import OpdlabError
from opdlab.models.policy import Policy, as_policy
from opdlab.models.protocols import Checked, Grader, Writer
from opdlab.models.same_tokens import compare_chats
from opdlab.support.progress import Progress
from opdlab.support.validation import Count, Flag, Positive, Seed, Unchecked, validate_arguments
from opdlab.tasks import Task
from opdlab.tasks.splits import count_distinct
from opdlab.teachers.contract import expect_teacher
from opdlab.training.settings import Settings, make_settings

BUDGET = 90.0  # seconds
QUESTIONS = (
    "What is 17 + 25?",
    "Name three colours.",
    "Why is the sky blue?",
    "Write a sentence about a cat.",
    "What comes after Tuesday?",
    "Translate 'good morning' into French.",
    "Is 7 a prime number?",
    "How do I boil an egg?",
)
PLAIN = tuple(
    Prompt(messages=({"role": "user", "content": text},), id=str(i))
    for i, text in enumerate(QUESTIONS)
)


@validate_arguments
def doctor(
    student: Policy,
    teacher: Any,
    task: Task | None = None,
    *,
    prompts: Unchecked[int | Sequence[Prompt]] = 32,
    k: Count = 8,
    seed: Seed = 0,
    budget: Positive = BUDGET,
    quiet: Flag = False,
    **settings: Any,
) -> Diagnosis:
    """Look at a pair before training it. Trains nothing.

    It asks as much as fits into `budget`, and says what it left out and how wide the intervals
    therefore are. An interrupt ends it early, with what it has found so far.

    Args:
        student: The policy that would train.
        teacher: A policy, or any other teacher; of the latter only its own check runs.
        task: Where prompts and scores come from. Without one, a few plain questions are asked and
            nothing can be scored.
        prompts: Prompts to ask at most, or how many of the task's held-out ones.
        k: The student's samples of each, at most.
        seed: Seed of prompts and samples.
        budget: Seconds to keep to, without loading. A single long text can take longer on a slow
            machine.
        quiet: Whether to show no progress.
        settings: Settings of the planned `distill`, for the cost.

    Returns:
        A diagnosis. Faults of the pair are in it, and are not raised.

    Raises:
        InvalidValue: An argument or setting cannot be right.
        MissingHint: The teacher reads hints, and a prompt has none.
    """
    expect_teacher(teacher, "doctor")
    if task is None:
        task = Task("plain questions", lambda n, seed, split: list((PLAIN * n)[:n]))
        prompts = list(PLAIN) if isinstance(prompts, int) else prompts
    planned = make_settings(settings, None, task, "doctor")
    asked = choose_prompts(task, prompts, seed)
    names = _name(student, "student"), _name(teacher, "teacher")
    local = as_policy(teacher)
    if local is None:
        return Diagnosis(tuple(_check_other(student, teacher, asked, planned)), names=names)
    pair = Pair(student, local, task, k, planned)
    allowance = Allowance(
        budget, Progress(len(asked), "doctor", "prompt", quiet, False, clock=False)
    )
    return _look_at(pair, asked, seed, names, allowance)


def _look_at(
    pair: Pair, asked: list[Prompt], seed: int, names: tuple[str, str], allowance: Allowance
) -> Diagnosis:
    """Look at a local pair: first without running it, then at what both write."""
    student, teacher = pair.student, pair.teacher
    allowance.draw("tokens and templates are compared", is_due=True)
    checks = check_pair(student, teacher, asked, max(pair.planned.max_new_tokens, FIRST))
    templates = compare_chats(student, teacher)
    stopped = [check.name for check in checks if check.state == "stop"]
    if "room" in stopped:
        allowance.finish()
        return Diagnosis(tuple(checks), templates, names=names)
    pair = replace(pair, is_comparable=not stopped)
    try:
        evidence = examine(pair, asked, seed, allowance)
    finally:
        allowance.finish()
    checks.append(_check_asked(pair, asked, evidence, allowance))
    checks += _judge(pair, evidence)
    return Diagnosis(
        checks=tuple(checks),
        templates=templates,
        overlap=evidence.overlap,
        probe=_probe_table(pair, evidence),
        cost=evidence.cost,
        first_tokens=evidence.first_tokens,
        rollout=evidence.rollout,
        method=recommend(checks),
        names=names,
    )


def _check_asked(
    pair: Pair, asked: Sequence[Prompt], evidence: Evidence, allowance: Allowance
) -> Check:
    """Say how much was asked, and what was left out."""
    rollout, scope = evidence.rollout, evidence.scope
    done = count_distinct(rollout.prompts) if rollout is not None else 0
    wanted = count_distinct(asked)
    left_out = scope.missing(whole_scope(pair)) if scope is not None else []
    found = f"{done} of {wanted} prompts in {allowance.spent:.0f} s"
    if evidence.is_interrupted:
        found += "; then it was interrupted"
    if left_out:
        found += f"; {'; '.join(left_out)}"
    is_short = evidence.is_interrupted or evidence.answer_limit is not None
    if done == wanted and not left_out and not is_short:
        return Check("asked", "ok", found)
    if evidence.answer_limit is not None:
        found += (
            f"; the teacher's context left it {evidence.answer_limit} tokens for an answer, and it"
            " did not go on from the student's texts"
        )
    # Half the width of Wilson's interval, at its widest: for a share of one half.
    wide = f"; shares are known to ±{0.98 / (done + 3.84) ** 0.5:.2f} at worst" * bool(done)
    remedy = f"A larger budget asks more: it was {allowance.seconds:.0f} s."
    if evidence.answer_limit is not None:
        remedy = "Lower the task's max_new_tokens to what the teacher's context holds."
    return Check("asked", "note", f"{found}{wide}", remedy)


def _judge(pair: Pair, evidence: Evidence) -> list[Check]:
    """Judge all that was found."""
    rollout, scope = evidence.rollout, evidence.scope
    first = [evidence.first_tokens.check()] if evidence.first_tokens is not None else []
    if rollout is None or scope is None:
        nothing = "it had not written when the doctor was interrupted"
        return [*first, Check("student's texts", "none", nothing)]
    if scope.length < pair.planned.max_new_tokens and rollout.tokens:
        checks = [Check("student's texts", "none", "cut short to keep to the budget")]
    else:
        checks = [check_lengths(rollout, scope.length)]
    overlap = evidence.overlap
    if overlap is not None and evidence.graded_rollout is not None:
        checks += check_overlap(overlap, evidence.graded_rollout, pair.teacher_is_told_more)
    else:
        said = "it was not graded" if pair.is_comparable else "not comparable token by token"
        checks.append(Check("overlap", "none", said))
    checks += first + _judge_scores(pair, evidence, rollout)
    if evidence.cost is not None:
        checks.append(check_memory(evidence.cost))
    return checks


def _judge_scores(pair: Pair, evidence: Evidence, rollout: Rollout) -> list[Check]:
    """Judge the student's pass@k, the teacher's answers, and its ranking of texts."""
    scope = evidence.scope
    assert scope is not None
    if pair.task.verify is None:
        unknown = (
            f"{pair.task.name} has no verifier, so pass@{pair.k} and the teacher's accuracy are"
            " unknown"
        )
        return [Check("student", "none", unknown)]
    if scope.length < pair.planned.max_new_tokens:
        return [Check("student", "none", "its texts were cut, so they were not scored")]
    right = pair.scores(rollout)
    helped = _mean_helped(evidence)
    skill = Skill(
        mean=float(right.mean()),
        solved=float(right.reshape(-1, scope.k).max(1).mean()),
        alone=float(np.mean(evidence.alone)) if evidence.alone else float("nan"),
        helped=helped,
        prompts=count_distinct(rollout.prompts),
        answered=count_distinct(evidence.answered),
    )
    is_own_teacher = pair.student.weights is pair.teacher.weights and pair.teacher_is_told_more
    checks = [
        check_student(skill, scope.k, is_own_teacher),
        check_teacher(skill, evidence.half),
    ]
    overlap, graded = evidence.overlap, evidence.graded_rollout
    if overlap is not None and graded is not None:
        sums = overlap.tokens.groupby("sample")["reward"].sum()
        reward = sums.reindex(range(len(graded)), fill_value=0.0).to_numpy()
        checks += check_ranking(pair.scores(graded), reward, graded)
    return checks


def _mean_helped(evidence: Evidence) -> float:
    """The teacher's score from half of the student's text; NaN if no text is that long."""
    tables = [table for table in evidence.helped if len(table)]
    if not tables:
        return float("nan")
    every = pd.concat(tables)
    return float(np.average(every["teacher"], weights=every["texts"]))


def _probe_table(pair: Pair, evidence: Evidence) -> pd.DataFrame | None:
    """The teacher's scores, alone and from half of the student's text, as `continuation` has them.

    It is None if nothing was scored.
    """
    scope, rollout = evidence.scope, evidence.rollout
    if scope is None or rollout is None or not evidence.alone:
        return None
    own = pair.scores(rollout.select(range(0, len(rollout), scope.k)))[: len(evidence.alone)]
    rows: list[dict[str, float]] = [
        {
            "length": 0,
            "texts": len(evidence.alone),
            "teacher": float(np.mean(evidence.alone)),
            "student": float(own.mean()),
        }
    ]
    tables = [table for table in evidence.helped if len(table)]
    if tables:
        every = pd.concat(tables)
        rows.append(
            {
                "length": evidence.half,
                "texts": int(every["texts"].sum()),
                "teacher": _mean_helped(evidence),
                "student": float(np.average(every["student"], weights=every["texts"])),
            }
        )
    return pd.DataFrame(rows)


def recommend(checks: Sequence[Check]) -> str:
    """Choose a method by what was found, as a line that can be pasted.

    Args:
        checks: The checks of a pair that can be compared token by token, or not.

    Returns:
        The argument `method=…` of `distill`; "" if the pair cannot be trained as it is.
    """
    states = {check.name: check.state for check in checks}
    if "stop" in states.values():
        return ""
    if states.get("in reach") == "warn":
        return 'method=opd.OPD("forward_kl")'
    if "warn" in (states.get("overlap"), states.get("student"), states.get("stopping")):
        return 'method=opd.OPD("forward_kl", on_policy=0.5)'
    if states.get("in reach") == "note":
        return 'method=opd.OPD("forward_kl")'
    if states.get("overlap") == "ok":
        return 'method=opd.OPD("reverse_kl")'
    return ""


def _check_other(
    student: Policy, teacher: Grader | Writer, prompts: Sequence[Prompt], planned: Settings
) -> list[Check]:
    """Check a teacher that is no local model by its own check.

    It is not asked to write or grade, which may cost money.
    """
    name = type(teacher).__name__
    if isinstance(teacher, Grader):
        said = f"{name} grades tokens of its own making; it is checked below"
        checks = [Check("tokens", "note", said)]
    else:
        said = f"{name} only writes, so its tokens do not matter"
        remedy = "Use a method that needs only its texts (OmniOPD, SequenceKD)."
        checks = [Check("tokens", "ok", said, remedy)]
    if not isinstance(teacher, Checked):
        return [*checks, Check("teacher", "none", f"{name} has no check of its own")]
    try:
        teacher.check(student, prompts, planned.max_new_tokens)
    except OpdlabError as error:
        return [*checks, Check("teacher", "stop", str(error))]
    taken = "takes these prompts; it was not asked to write or grade"
    return [*checks, Check("teacher", "ok", taken)]


def _name(teacher: object, role: str) -> str:
    """The name of a model for the report: that of its folder or on the Hub."""
    policy = as_policy(teacher)
    source = type(teacher).__name__ if policy is None else policy.weights.source
    return (Path(source).name if Path(source).is_dir() else source) or role
