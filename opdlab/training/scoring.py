"""Grade a rollout: every number per token under all policies, and what a method says about it."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from opdlab.data.rollout import Rollout
from opdlab.data.trace import Trace
from opdlab.engine import signals
from opdlab.engine.batch import Batch, Judge
from opdlab.engine.passes import compute
from opdlab.engine.planned import Planned, run_plan
from opdlab.engine.recording import record_trace
from opdlab.errors import MissingPolicy, OpdlabError
from opdlab.methods.conversion import as_method
from opdlab.methods.formulas import formula_of
from opdlab.models.policy import Policy, as_policy
from opdlab.models.protocols import Checked, Grader
from opdlab.models.same_tokens import check_same_tokens
from opdlab.models.vocabulary import check_written_with
from opdlab.support.expect import expect, shortened
from opdlab.support.validation import Count, validate
from opdlab.tasks import Task
from opdlab.training.processes import AcceleratedProcesses, gather_trace
from opdlab.training.resolution import grader_names, missing_policy_error, resolve_policies


def score(
    rollout: Rollout,
    student: Policy,
    teacher: Grader | None = None,
    k: int = 8,
    *,
    method: Any = None,
    task: Judge | None = None,
    processes: Accelerator | None = None,
    **others: Grader,
) -> Trace:
    """Grade a rollout: every number of `signals.full(k)` per token, under all policies given.

    With a method, the trace also has the columns of its plan and its loss per token, as a training
    step would have them; nothing is trained.

    Args:
        rollout: Texts in the student's tokens.
        student: The first policy, with which the others are compared.
        teacher: Anything that grades a rollout, such as a policy or a LogprobServer. A server that
            gives only some log-probs contributes what can be known: the log-prob of the sampled
            token, a lower bound of the reverse KL (`teacher_coarse_reverse_kl`), and the overlap of
            the top tokens.
        k: Top tokens that are kept of each policy.
        method: A method, as `distill` takes it. Its `needs` are resolved as there, from the
            student, the teacher and `others`.
        task: The task whose verifier the method's plan asks, if it asks for rewards.
        processes: `run.accelerator`, to share the completions among the processes of a run. Every
            process must call it then, with the same rollout, and all get the same trace.
        others: More graders by name, such as `reference=…`; pass `**{"teacher+hint": …}` for names
            that are no identifiers.

    Returns:
        A trace with one row for each token.

    Raises:
        TokenizerMismatch: The rollout or a policy has other tokens than the student. Nothing has
            run then.
        MissingPolicy: One of them cannot grade, or the method needs another policy.
        InvalidValue: `k` is no count, or `method` is no method.
        OpdlabError: `rollout` is no rollout.
    """
    if not isinstance(rollout, Rollout):
        raise OpdlabError(
            f"score got {_named(rollout)} for a rollout. Write one with student.sample(prompts) or"
            " opdlab.rollout_from_texts(…)."
        )
    if as_policy(student) is None:
        raise MissingPolicy(
            f"score got {_named(student)} for the student. Give a Policy: opdlab.score(rollout,"
            " student, teacher)."
        )
    k = validate("score", {"k": k}, {"k": Count})["k"]
    if task is not None:
        expect(task, Task, "score", "task")
    graders: dict[str, Any] = {"student": student}
    if teacher is not None:
        graders["teacher"] = teacher
    graders |= others
    check_written_with(student.tokenizer, student.weights.vocab_size, rollout, "the student")
    for name, grader in graders.items():
        _check_grader(name, grader, student, rollout)
    everyone = AcceleratedProcesses.of(processes, "score")
    groups = len(rollout) // rollout.n
    row = torch.arange(len(rollout))
    if groups < everyone.count:  # too few to share
        everyone = AcceleratedProcesses(None)
    elif everyone.count > 1:
        row = row.view(groups, -1)[everyone.index :: everyone.count].flatten()
        rollout = rollout.select(row.tolist())
    shared = {"processes": everyone, "row": row}
    planned = None
    if method is not None:
        planned = _plan(method, rollout, student, teacher, others, task, shared)
        policies = planned.batch.policies
        graders |= {name: policies[name] for name in grader_names(policies)}
    batch = Batch(rollout, graders) if planned is None else planned.batch
    states = {name: batch.states(name) for name in graders}
    numbers = compute(signals.full(k, allow_partial=True), states, batch.token)
    if planned is not None:
        numbers["loss"] = planned.losses()
    columns = [] if planned is None else [*numbers, *planned.columns]
    formula = "" if planned is None else formula_of(planned.method, columns)
    trace = record_trace(rollout, graders, numbers, planned=planned, formula=formula)
    return gather_trace(trace, row, everyone)


def _plan(
    method: Any,
    rollout: Rollout,
    student: Policy,
    teacher: Grader | None,
    others: dict[str, Grader],
    task: Judge | None,
    shared: dict[str, Any],
) -> Planned:
    """Let a method plan for the rollout, with its needs resolved as for a training run."""
    chosen = as_method(method, "score")
    policies = resolve_policies(student, teacher, chosen.needs, others)
    for name in chosen.needs:
        if name not in policies:
            raise missing_policy_error(chosen, name)
    return run_plan(chosen, Batch(rollout, policies | others, task, **shared))


def _check_grader(name: str, grader: Any, student: Policy, rollout: Rollout) -> None:
    """Refuse a grader that cannot grade the student's tokens."""
    policy = as_policy(grader)
    if policy is not None:
        check_same_tokens(student, policy, name)
    elif not isinstance(grader, Grader):
        raise MissingPolicy(
            f"score got {_named(grader)} for {name!r}, which has no log-probs of given tokens. Give"
            " a Policy or a LogprobServer; a teacher that only writes can be compared by its texts"
            " (OmniOPD, SequenceKD)."
        )
    elif isinstance(grader, Checked):  # a server is compared with the student before it grades
        grader.check(student, list(rollout.prompts), int(rollout.lengths.max()))


def _named(value: Any) -> str:
    return (
        shortened(value)
        if isinstance(value, (str, int, float, list, dict, type(None)))
        else f"a {type(value).__name__}"
    )
