"""Look back along a run: one text, or one prompt, under the student of every step that was kept.

    run = opdlab.distill(student, teacher, task, snapshot_every=10).train()
    traces = snapshots.rescore(run, rollout, teacher)           # the same tokens, graded again
    traces = snapshots.rewrite(run, task.prompts(1), teacher)   # new texts of each student

Kept are the adapters in `run.snapshots` and, where the run saves checkpoints, those on the disk.
All are looked at through one adapter of the shared weights, so looking back costs the memory of
one. Full training keeps no adapters, so there is nothing to look back at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from opdlab.data.prompt import Prompt, expect_prompts
from opdlab.data.rollout import Rollout
from opdlab.data.trace import Trace
from opdlab.engine import signals
from opdlab.engine.batch import Batch
from opdlab.engine.passes import compute
from opdlab.engine.recording import record_trace
from opdlab.errors import OpdlabError
from opdlab.models.policy import Policy
from opdlab.models.same_tokens import check_same_tokens
from opdlab.support.expect import expect
from opdlab.support.validation import (
    Count,
    GeneratorSeed,
    Temperature,
    Unchecked,
    WholeNumbers,
    validate_arguments,
)
from opdlab.teachers.contract import expect_teacher
from opdlab.training import checkpoint, run_folder
from opdlab.training.run import Run
from opdlab.training.scoring import score


def steps(run: Run) -> list[int]:
    """List the steps whose student is known, in order.

    They are those of `run.snapshots` and of the checkpoints in the run's folder.

    Args:
        run: The run.

    Returns:
        Numbers of steps done; 0 is the student before any update.
    """
    return sorted({*run.snapshots, *_saved(run)})


@validate_arguments
def rescore(
    run: Unchecked[Run],
    rollout: Unchecked[Rollout],
    teacher: Unchecked[Policy | None] = None,
    *,
    at: WholeNumbers = (),
    k: Count = 8,
    **others: Policy,
) -> dict[int, Trace]:
    """Score the same rollout under the student of every kept step.

    The teacher and the others do not move, so they run once. A teacher that shares the student's
    adapter would move with it: give it `.frozen()`.

    Args:
        run: A run that kept snapshots or checkpoints.
        rollout: The completions to score.
        teacher: The policy that the student is compared with; None for none.
        at: Only these steps; all kept ones by default.
        k: Top tokens that are kept of each policy.
        others: Further policies, by name.

    Returns:
        A trace for each step.

    Raises:
        OpdlabError: The run kept nothing, or not one of these steps.
    """
    expect(run, Run, "rescore", "run")
    expect(rollout, Rollout, "rescore", "rollout")
    fixed = {**({"teacher": teacher} if teacher is not None else {}), **others}
    for name, policy in fixed.items():
        expect_teacher(policy, "rescore", name)
    for name, policy in fixed.items():
        check_same_tokens(run.student, policy, name)
    batch = Batch(rollout, fixed)
    still, out = {name: batch.states(name) for name in fixed}, {}
    for step, student in _students(run, at):
        policies = {"student": student, **fixed}
        states = {"student": Batch(rollout, policies).states("student"), **still}
        out[step] = record_trace(
            rollout, policies, compute(signals.full(k), states, batch.token), step=step
        )
    return out


@validate_arguments
def rewrite(
    run: Unchecked[Run],
    prompts: Unchecked[Sequence[Prompt]],
    teacher: Unchecked[Policy | None] = None,
    *,
    at: WholeNumbers = (),
    k: Count = 8,
    seed: GeneratorSeed = 0,
    temperature: Temperature = 0.0,
) -> dict[int, Trace]:
    """Let the student of every kept step write to the same prompts, and grade the texts.

    Args:
        run: A run that kept snapshots or checkpoints.
        prompts: The prompts to ask.
        teacher: The policy that the student is compared with; None for none.
        at: Only these steps; all kept ones by default.
        k: Top tokens that are kept of each policy.
        seed: Seed of the sampling; all steps draw with the same random numbers.
        temperature: 0 takes the likeliest tokens.

    Returns:
        A trace for each step.

    Raises:
        OpdlabError: The run kept nothing, or not one of these steps.
    """
    expect(run, Run, "rewrite", "run")
    prompts = expect_prompts(prompts, "rewrite")
    width, out = run.settings.max_new_tokens, {}
    for step, student in _students(run, at):
        rollout = student.sample(
            prompts,
            max_new_tokens=width,
            temperature=temperature,
            seed=seed,
            **run.task.sample_options,
        )
        out[step] = score(rollout, student, teacher, k=k)
    return out


def _students(run: Run, at: Sequence[int]) -> Iterator[tuple[int, Policy]]:
    """Steps and their students: one policy that moves from step to step, removed in the end."""
    known = steps(run)
    if not known:
        raise OpdlabError(
            "This run kept no student but the last. Train a LoRA with snapshot_every=…, or with"
            " save= and save_every=…."
        )
    if missing := [step for step in at if step not in known]:
        raise OpdlabError(
            f"The run kept no step {missing[0]}; it kept {', '.join(map(str, known))}. Give at="
            " some of these."
        )
    with _adapter_beside(run) as policy:
        for step in at or known:
            policy.weights.set_adapter_state(str(policy.adapter), _state(run, step))
            yield step, policy


@contextmanager
def _adapter_beside(run: Run) -> Iterator[Policy]:
    """The student through an adapter of its own, which is taken away again."""
    policy = run.student.frozen()
    try:
        yield policy
    finally:
        policy.weights.delete_adapter(str(policy.adapter))


def _state(run: Run, step: int) -> dict[str, Tensor]:
    if step in run.snapshots:
        return run.snapshots[step]
    return checkpoint.read_adapter(checkpoint.find_checkpoint(_saved(run)[step]))


def _saved(run: Run) -> dict[int, Path]:
    """Find the checkpoints of adapters on the run's path so far, by step.

    Those of other runs in the folder do not count.
    """
    found = run_folder.list_checkpoints(run.folder) if run.folder else []
    return {
        saved.step: saved.path
        for saved in found
        if run.lineage.includes(saved.run, saved.step)
        and (saved.path / "adapter_model.safetensors").exists()
    }
